"""Adapters of disjoint blocks of one base, trained by separate jobs, joined into one: docs/scaling.md.

Everything is read from the adapters' own files; the base model is not needed.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from npt.adapters.folder import RUN_CONFIG, WEIGHTS, resolve_checkpoint
from npt.builtin import name_of
from npt.common.display import blocks_text, one_line, ranges
from npt.common.files import new_folder, temporary_name
from npt.common.fingerprint import difference
from npt.common.places import place
from npt.common.writable import check_folders
from npt.config import RunConfig, load_config, save_config, with_overrides
from npt.data.seen import TextRecord
from npt.errors import CheckpointError, ConfigError, ConversionError, NPTError
from npt.tuner.card import write_model_card
from npt.tuner.config import LAYER_NAME, OPTIONS, NPTConfig

logger = logging.getLogger(__name__)

#: Files that a tokenizer's save_pretrained writes.
TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken", "chat_template*", "additional_chat_templates",
)  # fmt: skip
#: Fields of the configuration that must be alike; `format_version` says how the files are to be read.
_ALIKE = ("format_version", *(name for name in OPTIONS if name != "npt_layers"), "task_type")
#: Keys of a run's record in which jobs for different blocks may differ; "paths." and "wandb." stand for all their keys.
_JOBS_OWN = ("model.npt_layers", "training.seed", "paths.", "wandb.")


@dataclass(frozen=True)
class Part:
    """One of the adapters to join. folder: as it was named. found: where its files are."""

    folder: Path
    found: Path
    config: NPTConfig
    weights: dict[str, Tensor]

    @property
    def blocks(self) -> list[int]:
        """The blocks it converts."""
        return sorted(self.config.npt_layers)  # type: ignore[arg-type]

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.weights.values())

    def error(self, text: str) -> CheckpointError:
        """One that names this folder."""
        return CheckpointError(f"checkpoint {self.folder}: {text}")


def merge_adapters(folders: Iterable[str | Path], output: str | Path) -> Path:
    """Joins adapters of disjoint blocks of one base into one adapter folder; returns `output`.

    Adapters trained with objective `local` or `composite` give the jointly trained adapter, bit for bit on one seed.

    Raises:
        NPTError: fewer than two folders, or an output that is not free; nothing is written.
        CheckpointError: one is no adapter, or they don't go together; nothing is written.
        RunError: the disk is full or gone; there is no output.
    """
    join(folders, output)
    return place(output)


def join(folders: Iterable[str | Path], output: str | Path) -> list[Part]:
    """`merge_adapters`; returns what was joined."""
    named, target = [place(folder) for folder in folders], place(output).resolve()
    if len(named) < 2:
        raise NPTError(
            f"{', '.join(map(str, named)) or 'no folder'}: nothing to join; name two adapter folders or more"
        )
    _check_output(output, target)
    parts = [_read(folder) for folder in named]
    for index, part in enumerate(parts):
        for before in parts[:index]:
            _check_disjoint(before, part)
        if index:
            _check_alike(parts[0], part)
            _check_base(parts[0], part)
    for part in parts:
        found, temporary = part.found.resolve(), temporary_name(target)
        if found in (target, *target.parents) or temporary in (found, *found.parents):
            raise NPTError(f"--output={output}: is in {part.folder}, one of the adapters; name a folder of its own")
    new_folder(target, lambda folder: _fill(parts, folder), again="do it again")
    return parts


def _check_output(output: str | Path, target: Path) -> None:
    check_folders({"--output": place(output)})
    if target.is_dir() and any(target.iterdir()):
        raise NPTError(f"--output={output}: is there and not empty; name a new folder, or move what is in it")


# -- one adapter ---------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> Part:
    found = resolve_checkpoint(folder)
    try:
        config = NPTConfig.from_pretrained(str(found))
    except ConversionError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from error
    part = Part(folder, found, config, load_file(found / WEIGHTS))
    _check_targets(part)
    _check_weights(part)
    return part


def _check_targets(part: Part) -> None:
    """Checks that npt_layers are numbers and target_modules the names of exactly these blocks, as npt writes them."""
    layers, targets = part.config.npt_layers, part.config.target_modules
    remedy = "restore adapter_config.json from a backup, or save the adapter again"
    if not isinstance(layers, list) or not layers or not all(type(i) is int and i >= 0 for i in layers):
        raise part.error(f"npt_layers={one_line(layers, 80)}: a saved adapter has numbers of blocks there; {remedy}")
    named = [str(name) for name in targets] if isinstance(targets, list) else []
    if len({name.rpartition(".")[0] for name in named}) != 1 or sorted(
        name.rpartition(".")[2] for name in named
    ) != sorted(map(str, set(layers))):
        raise part.error(
            f"target_modules={one_line(targets, 80)} are not the blocks of npt_layers={one_line(layers, 80)}; {remedy}"
        )


def _check_weights(part: Part) -> None:
    """Checks that every block has weights of the same names, and that there are no others."""
    remedy = "name a folder that npt wrote"
    targets: Any = part.config.target_modules
    own: dict[str, dict[str, Tensor]] = {_key(name): {} for name in targets}
    for key, tensor in part.weights.items():
        block = next((block for block in own if key.startswith(block)), None)
        if block is None:
            raise part.error(
                f"{WEIGHTS} holds {one_line(key, 200)}, which is no weight of its {blocks_text(part.blocks)}; {remedy}"
            )
        own[block][key.removeprefix(block)] = tensor
    names = set().union(*own.values())
    for block, found in own.items():
        if missing := sorted(names - set(found)):
            raise part.error(f"{WEIGHTS} lacks {one_line(block + missing[0], 200)}; {remedy}")
    if not names and part.config.carry != "exact":
        raise part.error(f"{WEIGHTS} holds nothing for its {blocks_text(part.blocks)}; {remedy}")
    rows = {tuple(found["A"].shape) for found in own.values() if "A" in found}
    wrong = [shape for shape in rows if len(shape) != 2 or shape[1] != part.config.rank]
    if wrong:
        raise part.error(
            f"{WEIGHTS}: A has the shape {list(wrong[0])}, which is not of rank={part.config.rank}; {remedy}"
        )


def _key(block: str) -> str:
    """The prefix of the names of a block's weights."""
    return f"base_model.model.{block}.{LAYER_NAME}.npt_components."


# -- two of them ---------------------------------------------------------------------------------------------------------


def _check_disjoint(one: Part, other: Part) -> None:
    if one.found.resolve() == other.found.resolve():
        raise other.error(f"is named twice, also as {one.folder}; name each adapter once")
    if both := sorted(set(one.blocks) & set(other.blocks)):
        raise other.error(
            f"its {blocks_text(other.blocks)} and those of {one.folder}, {ranges(one.blocks)}, overlap in {ranges(both)}; "
            "leave one of the two out, or train disjoint blocks with model.npt_layers"
        )


def _check_alike(one: Part, other: Part) -> None:
    """Checks that options and dtype are alike: an adapter has one of each for all its blocks."""
    for name in _ALIKE:
        here, there = (_option(part.config, name) for part in (other, one))
        if here != there:
            raise other.error(
                f"{name}={one_line(here, 80)} and {one.folder} has {one_line(there, 80)}; one adapter has one {name} for "
                "all its blocks: train them with the same"
            )
    here, there = (sorted({str(t.dtype).removeprefix("torch.") for t in p.weights.values()}) for p in (other, one))
    if here != there:
        raise other.error(
            f"its weights are {', '.join(here)}, those of {one.folder} {', '.join(there)}; train them with the same "
            "model.dtype"
        )


def _option(config: NPTConfig, name: str) -> Any:
    value = getattr(config, name)
    return sorted(value) if isinstance(value, list) else value


def _check_base(one: Part, other: Part) -> None:
    """Checks that both have the same base: by fingerprint or, where one of them has none, by shape and name."""
    remedy = "blocks of one base alone can be joined"
    first, second = one.config, other.config
    prefixes = [config.target_modules[0].rpartition(".")[0] for config in (first, second)]  # type: ignore[index]
    if prefixes[0] != prefixes[1]:
        raise other.error(
            f"its blocks are {one_line(prefixes[1])}, those of {one.folder} {one_line(prefixes[0])}; {remedy}"
        )
    if None not in (first.base_shape, second.base_shape) and first.base_shape != second.base_shape:
        raise other.error(
            f"made for a base of other sizes (base_shape={second.base_shape}) than {one.folder} ({first.base_shape}); "
            f"{remedy}"
        )
    prints = [_fingerprint(config) for config in (first, second)]
    names = [name_of(config.base_model_name_or_path) for config in (first, second)]
    if prints[0] is not None and prints[1] is not None:
        told = difference(prints[0], prints[1])
        if told is not None:
            raise other.error(f"made for another base than {one.folder}: {one_line(told, 200)}; {remedy}")
        return
    bare = other if prints[1] is None else one
    if names[0] != names[1]:
        raise other.error(
            f"made for base {one_line(repr(names[1]), 80)} and {one.folder} for {one_line(repr(names[0]), 80)}, and "
            f"{bare.folder} has no base_fingerprint to tell them apart by; {remedy}"
        )
    logger.warning(
        "%s has no base_fingerprint: that it was made for the same weights as the others can't be checked, only name and "
        "sizes", bare.folder,
    )  # fmt: skip


def _fingerprint(config: NPTConfig) -> dict[str, Any] | None:
    """The record of the base, where it says enough to tell bases apart."""
    record = config.base_fingerprint or {}
    whole = all(record.get(key) for key in ("config", "dtype", "weights", "sample"))
    return record if whole else None


# -- the result ----------------------------------------------------------------------------------------------------------


def _fill(parts: Sequence[Part], folder: Path) -> None:
    weights = {key: tensor for part in parts for key, tensor in part.weights.items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    config = _joined(parts)
    config.save_pretrained(str(folder))
    write_model_card(folder, config, parts=[(_shown(part.folder), part.blocks) for part in parts])
    _copy_tokenizer(parts, folder)
    record = _record(parts, sorted(block for part in parts for block in part.blocks))
    if record is not None:
        save_config(record, folder / RUN_CONFIG)


def _joined(parts: Sequence[Part]) -> NPTConfig:
    config = copy.deepcopy(parts[0].config)
    _join_records(config, [part.config.text_record for part in parts])
    for part in parts:
        config.base_shape = config.base_shape or part.config.base_shape
        config.base_fingerprint = _fingerprint(config) or part.config.base_fingerprint
    blocks = sorted(block for part in parts for block in part.blocks)
    prefix = config.target_modules[0].rpartition(".")[0]  # type: ignore[index]
    config.npt_layers, config.target_modules = blocks, [f"{prefix}.{block}" for block in blocks]
    return config


def _join_records(config: NPTConfig, records: Sequence[TextRecord | None]) -> None:
    """Puts all texts of the parts into the joined record. Where a part has none, nobody knows all the text."""
    known = [record for record in records if record is not None]
    config.text_record = None
    if len(known) == len(records):
        config.text_record = joined = TextRecord()
        for record in known:
            joined.merge(record)


def _shown(folder: Path) -> str:
    """A folder as the card names it: its last names, as many as tell one run's checkpoints/best_model from another's."""
    return "/".join(folder.absolute().parts[1:][-3:])


def _copy_tokenizer(parts: Sequence[Part], folder: Path) -> None:
    """Copies the tokenizer of the first adapter that has one beside it; all adapters have the same base, and so tokenizer."""
    for part in parts:
        found = sorted({path for pattern in TOKENIZER_FILES for path in part.found.glob(pattern)})
        for path in found:
            copied = shutil.copytree if path.is_dir() else shutil.copyfile
            copied(path, folder / path.name)
        if found:
            return


def _record(parts: Sequence[Part], blocks: list[int]) -> RunConfig | None:
    """The configuration the blocks were trained with, where their records agree; None, and a warning, where not."""
    records = [_own_record(part) for part in parts]
    for part, record in zip(parts, records, strict=True):
        if record is not None and "logits" in record.training.objectives():
            logger.warning(
                "%s was trained with objective %s beside the original's other blocks: joined, it is not what training all "
                "blocks together gives; evaluate it", part.folder, record.training.objective,
            )  # fmt: skip
    first, problem = records[0], _disagreement(parts, records)
    if first is None or problem is not None:
        logger.warning(
            "%s: the joined adapter gets no %s; npt evaluate knows its training text by its record of text, and without one "
            "takes any text for it and scores only the part held out", problem, RUN_CONFIG,
        )  # fmt: skip
        return None
    return with_overrides(first, {"model.npt_layers": blocks})


def _disagreement(parts: Sequence[Part], records: Sequence[RunConfig | None]) -> str | None:
    first = records[0]
    for part, record in zip(parts, records, strict=True):
        if first is None or record is None:
            return f"{part.folder} has no {RUN_CONFIG} that can be read"
        if key := _first_difference(first, record):
            return f"{part.folder} was trained with another {key} than {parts[0].folder}"
    return None


def _own_record(part: Part) -> RunConfig | None:
    path = part.found / RUN_CONFIG
    try:
        return load_config(path) if path.is_file() else None
    except ConfigError as error:
        logger.warning("%s", error)
        return None


def _first_difference(one: RunConfig, other: RunConfig) -> str | None:
    """The first key in which two records differ that jobs for different blocks should share."""
    here, there = one.model_dump(), other.model_dump()
    keys = (f"{section}.{key}" for section, values in here.items() for key in values)
    for name in (key for key in keys if not key.startswith(_JOBS_OWN)):
        section, key = name.split(".")
        if here[section][key] != there[section][key]:
            return name
    return None
