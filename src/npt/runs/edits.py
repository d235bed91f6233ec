"""Stores of edits as the command uses them: a folder, its base loaded by name, one process at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from npt.common.display import one_line
from npt.common.files import LOCK, new_folder
from npt.common.kept import kept_models, take_turns
from npt.common.places import place
from npt.common.writable import check_file, check_folders
from npt.config import RunConfig, load_config
from npt.data.sources import TextFiles
from npt.editing.absorbing.absorbed import Absorbed
from npt.editing.checks import MOST_STEPS
from npt.editing.export import gguf_name, read_loras, write_gguf
from npt.editing.folder import check_target, copy_lora
from npt.editing.measure import holding, mean_kl_of
from npt.editing.record import EDITS, read_edits, read_record
from npt.editing.requests import Request, check_together
from npt.editing.store import EditStore
from npt.editing.writing import Edit
from npt.errors import CheckpointError, DataError, NPTError
from npt.runs.base_model import base_config, load_base

logger = logging.getLogger(__name__)

BASE = "model.base_model_name"
#: Edits that are written between two saves: a process that is killed loses no more than these.
PART = 32
#: Facts from which on training them together is worth a line.
MANY = 8


@dataclass(frozen=True)
class Options:
    """A person's words about a store and its base; None where nothing was said.

    overrides: as --set gives them.
    """

    model: str | None = None
    overrides: Sequence[str] = ()
    layer: str | None = None
    metric: str | None = None
    values: str | None = None
    ridge: str | None = None
    limit: float | None = None
    statistics: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def store(self) -> dict[str, Any]:
        """The arguments of `EditStore` that were given.

        Raises:
            NPTError: a layer or ridge that is no number, or a limit that is not above 0.
        """
        if self.limit is not None and not 0 < self.limit < float("inf"):
            raise NPTError(f"--limit {self.limit:g}: use nats above 0")
        named = ("metric", "values", "limit")
        found: dict[str, Any] = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        if self.layer is not None:
            found["layer"] = self.layer if self.layer == "auto" else _layers(self.layer)
        if self.ridge is not None:
            found["ridge"] = self.ridge if self.ridge == "auto" else _number("--ridge", self.ridge, float)
        if self.statistics:
            texts = list(TextFiles(self.statistics, named_by="--statistics"))
            if any(not isinstance(text, str) for text in texts):
                raise DataError("--statistics: holds chats; name files of plain text")
            found["statistics"] = texts
        return found


def _layers(value: str) -> int | list[int]:
    """A block, or several as in 4,5,6, the way edits.json has them."""
    layers = sorted(_number("--layer", part, int) for part in value.split(","))
    return layers if len(layers) > 1 else layers[0]


def _number(name: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        raise NPTError(f"{name} {one_line(value, 40)}: use 'auto' or a number") from error


def config_for(options: Options, recorded: str | None) -> RunConfig:
    """The configuration that loads a store's base: the one that is named, else the one that the store records.

    Raises:
        NPTError: neither names one. ConfigError: see `load_config`.
    """
    name = options.model or recorded
    if name is None and not any(override.startswith(f"{BASE}=") for override in options.overrides):
        raise NPTError("--model: no base is named, and the store records none; name one, such as builtin:smollm2-135m")
    return load_config(None, options.overrides, below={} if name is None else {BASE: name})


def check_options(options: Options, folder: Path) -> None:
    """Checks the options of a store's folder before anything is loaded.

    Raises:
        NPTError: see `Options.store` and `config_for`.
    """
    options.store()
    config_for(options, base_in(folder))


def is_store(folder: Path) -> bool:
    """True for a folder that holds a store."""
    return (folder / EDITS).is_file()


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """One process at a time on a store: others wait for it. The lock lies in the cache, as a store's folder is for others."""
    name = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    locks = cache_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / (name + LOCK))
    take_turns(lock, folder)
    try:
        yield
    finally:
        lock.release()


def cache_folder() -> Path:
    """The folder of npt's cache that statistics and locks of stores are kept in."""
    return kept_models()[-1].parent / "editing"


def opened(folder: Path, options: Options) -> EditStore:
    """The store in a folder, on its base; a new one where there is none.

    Raises:
        NPTError: an option that the folder's store was not made with, or see `EditStore`.
    """
    given = options.store()
    record = read_record(folder) if is_store(folder) else None
    if record is not None:
        for name in ("layer", "metric"):
            there = record[name].split()[0] if name == "metric" else record[name]
            if there is not None and given.get(name, "auto") not in ("auto", there):
                raise NPTError(
                    f"--{name} {given[name]}: the store in {folder} has {name} {there}; leave the option out, or "
                    "name a new folder"
                )
        if record["layer"] is not None:
            given.pop("layer", None)
    config = config_for(options, record["base"] if record else None)
    base, tokenizer = load_base(config.model, config.optimization, config.paths.cache_dir)
    cache = cache_folder()
    if record is None:
        return EditStore(base, tokenizer, cache_dir=cache, **given)
    return EditStore.load(base, tokenizer, folder, cache_dir=cache, **given)


def new_requests(folder: Path, requests: Sequence[Request], places: Sequence[str]) -> list[Request]:
    """The requests that a folder's store does not hold yet, checked against those that it holds.

    Raises:
        DataError: a contradiction. CheckpointError: a damaged store.
    """
    written = []
    if is_store(folder):
        written = [edit.request for edit in edits_in(folder) if not isinstance(edit, Absorbed)]
    known = {request.id for request in written}
    new = [(r, p) for r, p in zip(requests, places, strict=True) if r.id not in known]
    if len(new) < len(requests):
        logger.info("%d of %d edits are in the store already", len(requests) - len(new), len(requests))
    check_together([r for r, _ in new], [p for _, p in new], written)
    return [request for request, _ in new]


def edits_in(folder: Path) -> list[Edit]:
    """The edits of a store's folder; no model is loaded."""
    return read_edits(read_record(folder))


def write_edits(store: EditStore, requests: Sequence[Request], folder: Path | None) -> Iterator[Edit]:
    """Writes requests part by part, each saved before the next begins; yields the edits.

    A store whose facts are trained together is trained once, behind the last part.

    Args:
        folder: None saves nothing.
    """
    steps = store.refining.steps
    for start in range(0, len(requests), PART):
        edits = store.write_many(requests[start : start + PART], refine=False)
        if folder is not None:
            store.save(folder)
        if not steps:
            yield from edits
    if steps:
        store.refine(steps)
        if folder is not None:
            store.save(folder)
        new = {request.id for request in requests}
        yield from (edit for edit in store.edits if edit.id in new)


def untrained(folder: Path) -> int:
    """The number of a store's facts where they are many and not trained together; else 0."""
    record = read_record(folder)
    count = len(record["edits"])
    return count if count >= MANY and not record.get("trained") else 0


def check_refinable(folder: Path, steps: int) -> None:
    """Checks that a store's facts can be trained so many steps, before a model is loaded.

    Raises:
        NPTError: steps out of range, fewer than two facts, or a folder that can't be written.
        CheckpointError: a damaged store.
    """
    if not 0 <= steps <= MOST_STEPS:
        raise NPTError(f"--steps {steps}: use a whole number from 0 to {MOST_STEPS:,}")
    count = sum(not isinstance(edit, Absorbed) for edit in edits_in(folder))
    if steps and count < 2:
        raise NPTError(
            f"{folder}: holds {count} fact{'s' * (count != 1)}, and two or more are trained together; write others"
        )
    check_target(folder)


def refine(store: EditStore, steps: int, folder: Path) -> list[str]:
    """Trains a store's facts together and saves it; lines that say what that changed.

    Raises:
        NPTError: see `EditStore.refine`.
    """
    if not store.facts:
        store.refine(steps)
        store.save(folder)
        return ["no fact is there"]
    ask, rows = holding(store.bench, [edit.request for edit in store.facts]), store.contexts.watched_rows()
    held, moved = sum(ask()), mean_kl_of(store.bench, rows)
    store.refine(steps)
    store.save(folder)
    return [
        f"{sum(ask())} of {len(store.facts)} facts hold, {held} before",
        f"other text moves by {mean_kl_of(store.bench, rows):.4f} nats a token, {moved:.4f} before",
    ]


def export(folder: Path, output: Path, kind: str, options: Options) -> None:
    """Writes a store's LoRA elsewhere: as a folder for PEFT, or as a GGUF file. No weights of the base are loaded.

    Raises:
        NPTError: a bad output, or llama.cpp has no model of this family. CheckpointError: a damaged store.
    """
    record = read_record(folder)
    loras = read_loras(folder, record["modules"])
    if kind == "peft":
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise NPTError(f"--output {output}: is there and not empty; name a new folder")
        check_folders({"--output": output})
        new_folder(output, lambda temporary: copy_lora(folder, temporary))
        return
    check_file("--output", output, ".gguf")
    config = base_config(config_for(options, record["base"]).model)
    for module in loras:
        gguf_name(module, config)
    write_gguf(loras, output, config)


def merge(folders: Sequence[Path], output: Path, options: Options) -> EditStore:
    """The union of stores of one base, layer and metric, in a new folder.

    Raises:
        NPTError: fewer than two, an output that is there, or stores that can't be joined.
    """
    if len({folder.resolve() for folder in folders}) < 2:
        raise NPTError(f"{', '.join(map(str, folders))}: nothing to join; name two stores or more, each once")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise NPTError(f"--store {output}: is there and not empty; name a new folder")
    records = [(folder, read_record(folder)) for folder in folders]
    facts = [(folder, record) for folder, record in records if record["edits"]]
    for folder, record in facts[1:]:
        for name in ("layer", "metric"):
            if record[name] != facts[0][1][name]:
                raise CheckpointError(
                    f"store {folder}: its {name} is {record[name]}, and that of {facts[0][0]} is {facts[0][1][name]}; write "
                    "the edits of one anew with the other's"
                )
    store = opened(place(folders[0]), options)
    for folder in folders[1:]:
        store.close()
        other = EditStore.load(store.model, store.tokenizer, folder)
        other.close()
        store.reopen()
        store.merge(other)
    store.save(output)
    return store


def base_in(folder: Path) -> str | None:
    """The base that a folder's store records; None where there is no store or it records none."""
    return read_record(folder)["base"] if is_store(folder) else None


def edit_in(folder: Path, id: str) -> Edit:
    """One edit of a store's folder.

    Raises:
        NPTError: no edit has that id.
    """
    found = {edit.id: edit for edit in edits_in(folder)}
    if id not in found:
        raise NPTError(
            f"{one_line(repr(id), 40)}: no edit of {folder} has that id; `npt edit list --store {folder}` lists them"
        )
    return found[id]


def opened_there(folder: Path, options: Options) -> EditStore:
    """The store in a folder that holds one.

    Raises:
        CheckpointError: there is none.
    """
    read_record(folder)
    return opened(folder, options)
