"""`npt bench editing`: records written by several methods, asked after, and kept; what was kept, joined into one table."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npt.common.display import one_line
from npt.common.distribution import versions
from npt.common.fingerprint import base_fingerprint
from npt.common.writable import check_file
from npt.editing.benchmark.asking import Asker
from npt.editing.benchmark.extras import Extras
from npt.editing.benchmark.figures import batches_of, check_draws, measured
from npt.editing.benchmark.methods import Method, Setup
from npt.editing.benchmark.records import Record, check_apart, read_records
from npt.editing.benchmark.registry import METHODS, known_method, made, options_of
from npt.editing.benchmark.rows import Kept, Row, joined, names_of, read_kept, write_kept
from npt.editing.metrics import METRICS, Source
from npt.editing.scan import SPREAD, choose_layers
from npt.editing.statistics import digest_of, own_text, token_rows
from npt.errors import DataError, NPTError
from npt.runs.base_model import load_base
from npt.runs.edits import Options, config_for, only_process

logger = logging.getLogger(__name__)

#: The random stream of the running text that the base writes, and its width; statistics have another stream.
_TEXT_SEED, _TEXT_WIDTH = 1, 64
#: Seconds between two saves: a command that is killed loses no more than these and the batch that it was at.
KEEP_SECONDS = 2.0


@dataclass(frozen=True)
class Bench:
    """A command's words. None or empty where nothing was said.

    records: a file. model: of the base. overrides: as --set gives them. draws: random batches of each size above
    1, no record in two of a size. layers: blocks, rising. options: METHOD.NAME=VALUE. text: running text. tuned_on: the file
    that choices were made on. extras: see `npt.editing.benchmark.extras`. cache: a folder that keeps statistics.
    """

    records: Path
    model: str
    overrides: Sequence[str] = ()
    methods: Sequence[str] = ()
    limit: int | None = None
    batches: Sequence[int] = ()
    draws: int | None = None
    sequential: bool = False
    layers: Sequence[int] = ()
    metric: str = "domain"
    options: Sequence[str] = ()
    text: Path | None = None
    tuned_on: Path | None = None
    extras: Sequence[str] = ()
    cache: Path | None = None
    output: Path | None = None

    def names(self) -> list[str]:
        """The methods, each once."""
        return list(dict.fromkeys(self.methods or METHODS))

    def check(self) -> None:
        """Checks what needs no file and no model.

        Raises:
            NPTError: an unknown method, option or figure, or a number out of range.
        """
        check_methods(self.names(), self.options, self.metric, self.layers)
        Extras(self.extras)
        numbers = {"--limit": [self.limit], "--draws": [self.draws], "--batch": self.batches}
        for option, values in numbers.items():
            for value in values:
                if value is not None and value < 1:
                    raise NPTError(f"{option} {value}: use a whole number from 1")
        if self.draws is not None and not any(size > 1 for size in self.batches):
            raise NPTError(f"--draws {self.draws}: draws batches of more than one record; give their size with --batch")
        if self.sequential and self.batches and max(self.batches) == 1:
            raise NPTError(
                "--sequential: a batch of 1 has no order; leave --batch out for all records, or give a larger size"
            )
        if self.output is not None:
            check_file("--output", self.output, ".json")

    def decides(self, records: Sequence[Record], text: str | None) -> dict[str, Any]:
        """The arguments that the figures depend on, as the file of figures holds them."""
        found = {
            "--model": self.model, "--set": list(self.overrides), "--records": self.records.name, "--limit": self.limit,
            "--method": self.names(), "--batch": list(self.batches), "--draws": self.draws,
            "--sequential": self.sequential, "--layers": list(self.layers), "--metric": self.metric,
            "--option": list(self.options), "--text": None if self.text is None else self.text.name,
            "--with": sorted(set(self.extras)), "--tuned-on": None if self.tuned_on is None else self.tuned_on.name,
        }  # fmt: skip
        digest = None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]
        contents = {"the records' content": names_of([records]), "the text's content": digest}
        return found | contents


def check_methods(methods: Sequence[str], options: Sequence[str], metric: str, layers: Sequence[int]) -> None:
    """Checks words that say how facts are written.

    Args:
        methods, options, metric, layers: see `Bench`.

    Raises:
        NPTError: an unknown method, option or metric, or layers out of order.
    """
    for name in methods:
        known_method(name)
    for method in options_of(options):
        if method not in methods:
            raise NPTError(f"--option {method}: --method does not name {method}; add it, or leave the option out")
    if metric not in METRICS:
        raise NPTError(f"--metric {one_line(metric, 40)}: is unknown; use {', '.join(METRICS)}")
    if list(layers) != sorted(set(layers)) or any(layer < 0 for layer in layers):
        raise NPTError(f"--layers {' '.join(map(str, layers))}: use block indices from 0, each once, rising")


@dataclass
class Material:
    """A base, the records that are written into it and the text beside them: from a file, or from a world of its own.

    text: token ids of running text; None for text of the base's own. statistics, domain: as `EditStore` takes them.
    """

    model: Any
    tokenizer: Any
    records: list[Record]
    text: list[list[int]] | None = None
    statistics: str | Sequence[str] = "self"
    domain: Sequence[str] | None = None


def measure_editing(bench: Bench) -> Kept:
    """Measures every method at every batch size. With an output, the figures of finished batches are kept there, and those
    that it holds already are not measured again.

    Raises:
        NPTError: an argument out of range, or an output that other arguments began. DataError: a bad file.
    """
    bench.check()
    records = read_records(bench.records)[: bench.limit]
    for size in bench.batches:
        _check_size(size, bench.draws, len(records))
    if bench.tuned_on is not None:
        check_apart(records, bench.records, read_records(bench.tuned_on), bench.tuned_on)
    text = None if bench.text is None else _running_text(bench.text)
    arguments = bench.decides(records, text)
    with nullcontext() if bench.output is None else only_process(bench.output):
        before = None if bench.output is None else _begun(bench.output, arguments)
        if before is not None and before.rows and all(row.done == len(row.sizes) for row in before.rows):
            logger.info("%s: holds every figure already", bench.output)
            return before
        return Measuring(bench, material_of(bench, records, text), arguments, before).run()


def material_of(bench: Bench, records: list[Record], text: str | None) -> Material:
    """The base that is named, and the records of a file."""
    config = config_for(Options(bench.model, bench.overrides), None)
    model, tokenizer = load_base(config.model, config.optimization, config.paths.cache_dir)
    return Material(model, tokenizer, records, None if text is None else token_rows(tokenizer, [text], "--text"))


class Measuring:
    """One command at work.

    Args:
        bench: its words. material: the model and the records. arguments: see `Bench.decides`.
        before: the figures that an earlier call of the same command kept; None for none.

    Raises:
        DataError: no record can be written. NPTError: another base, machine or version than before,
            or a batch larger than the records left.
    """

    def __init__(self, bench: Bench, material: Material, arguments: Mapping[str, Any], before: Kept | None):
        self.bench, self.material = bench, material
        text = material.text
        if text is None:
            text = own_text(material.model, material.tokenizer, _TEXT_WIDTH, bench.cache, _TEXT_SEED)
        asker = Asker(material.model, material.tokenizer, text)
        together = bench.sequential or any(size > 1 for size in bench.batches)
        self.records = kept_records(material.records, asker, together)
        self.plan = self._plan()
        self.kept = Kept(about(material.model, bench.model, text), dict(arguments), self._rows())
        if before is not None:
            self._check_same(before)
        self.setup = self._setup()
        self.options = options_of(bench.options)
        self.methods: dict[str, Method] = {name: self._made(name) for name in bench.names()}
        lowest = min(method.setup.layers[0] for method in self.methods.values())
        self.asker = Asker(material.model, material.tokenizer, text, lowest)
        self.extras = Extras(bench.extras)
        self._saved = time.monotonic()
        if before is not None:
            self._take(before)

    def run(self) -> Kept:
        """Measures what is not measured yet."""
        for row in self.kept.rows:
            batches = self.plan[row.batch]
            if row.done == len(batches):
                continue
            method = self.methods[row.method]
            if method.carries and row.batch != self.kept.rows[0].batch:
                method = self._made(row.method)  # as if nothing had been written before
            label = f"{row.method}, {row.batch} at once" if row.batch > 1 else row.method
            found = measured(
                method, self.asker, batches, label=label, sequential=row.sequential, extras=self.extras, first=row.done,
                wrong=row.wrong,
            )  # fmt: skip
            try:
                for one in found:
                    row.add(one)
                    self._keep(time.monotonic() - self._saved >= KEEP_SECONDS)
            finally:
                found.close()
                self._keep(True)
        return self.kept

    def _keep(self, now: bool) -> None:
        if self.bench.output is not None and now:
            write_kept(self.bench.output, self.kept)
            self._saved = time.monotonic()

    def _made(self, name: str) -> Method:
        return made(name, self.setup, self.options.get(name, {}))

    def _plan(self) -> dict[int, list[list[Record]]]:
        """{batch size: its batches}; single edits are always all records, one after the other."""
        bench = self.bench
        sizes = list(dict.fromkeys(bench.batches)) or [len(self.records) if bench.sequential else 1]
        plan = {}
        for size in sizes:
            _check_size(size, bench.draws, len(self.records))
            plan[size] = batches_of(self.records, size, bench.draws if size > 1 else None)
        return plan

    def _rows(self) -> list[Row]:
        return [
            Row(name, size, self.bench.sequential and size > 1, [len(part) for part in batches], names_of(batches))
            for size, batches in self.plan.items()
            for name in self.bench.names()
        ]

    def _check_same(self, before: Kept) -> None:
        for name in ("base_fingerprint", "text"):
            if before.about.get(name) != self.kept.about[name]:
                what = "another base" if name == "base_fingerprint" else "other running text"
                raise NPTError(f"--output {self.bench.output}: is of {what}; name another file")
        for part in ("machine", "versions"):  # figures, and seconds above all, are of one machine
            there, here = before.about.get(part), self.kept.about[part]
            there = there if isinstance(there, dict) else {}
            for name in (name for name in here if there.get(name) != here[name]):
                raise NPTError(
                    f"--output {self.bench.output}: was begun with {name} {_said(there.get(name))}, and it is "
                    f"{_said(here[name])} now; go on where it was begun, or name another file"
                )

    def _take(self, before: Kept) -> None:
        """Takes over what is measured already; a method that carries its past along begins a half-done row anew."""
        there = {(row.method, row.batch): row for row in before.rows}
        for number, row in enumerate(self.kept.rows):
            old = there.get((row.method, row.batch))
            if old is None or (old.asked, old.sizes) != (row.asked, row.sizes):
                continue
            if old.done == len(old.sizes) or not self.methods[row.method].carries:
                self.kept.rows[number] = old

    def _setup(self) -> Setup:
        bench, material = self.bench, self.material
        source = Source(
            material.model, material.tokenizer, bench.metric, material.statistics, material.domain, bench.cache, True
        )
        layers = tuple(bench.layers) or choose_layers(source, [self.records[0].request], SPREAD)
        return Setup(material.model, material.tokenizer, source, layers)


def _check_size(size: int, draws: int | None, records: int) -> None:
    if size > records:
        raise NPTError(f"--batch {size}: more than the {records} records there are; use a smaller batch")
    if draws is not None and size > 1:
        check_draws(f"--batch {size} --draws {draws}", size, draws, records)


def _begun(path: Path, arguments: Mapping[str, Any]) -> Kept | None:
    """The figures that an output holds; None where there is no file.

    Raises:
        NPTError: they were begun with other arguments. DataError: it is something else.
    """
    if not path.exists():
        return None
    kept = read_kept(path, "--output")
    check_arguments(path, kept.arguments, arguments)
    return kept


def check_arguments(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that an output was begun with the arguments that it is to go on with.

    Raises:
        NPTError: it was not.
    """
    for name in [*now, *before]:
        there, here = before.get(name), now.get(name)
        if there != here:
            raise NPTError(
                f"--output {path}: was begun with {name} {_said(there)}, and it is {_said(here)} now; use the same arguments, "
                "or name another file"
            )


def _said(value: Any) -> str:
    words = " ".join(map(str, value)) if isinstance(value, list) else "not given" if value is None else str(value)
    return one_line(words or "not given", 80)


def _running_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {path}: can't be read ({one_line(error, 60)}); name a UTF-8 text file") from error


def kept_records(records: Sequence[Record], asker: Asker, together: bool = False) -> list[Record]:
    """The records that every method can write; each that is left out is said.

    A subject's last token must not be the text's first one. `together` leaves out those whose prompt and subject an earlier
    record has, since a model holds one target at a time.

    Raises:
        DataError: there is none.
    """
    found, facts = [], dict[tuple[str, str | None], int]()
    for number, record in enumerate(records, 1):
        try:
            asker.prompts.place(record.request.prompt, record.request.subject)
        except DataError as error:
            logger.warning("record %d is left out: %s", number, error)
            continue
        earlier = facts.setdefault(record.request.fact, number)
        if together and earlier != number:
            logger.warning("record %d is left out: its prompt and subject are those of record %d", number, earlier)
            continue
        found.append(record)
    if not found:
        raise DataError("--records: no record can be written; see the lines above")
    return found


def about(model: Any, name: str, text: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The base, the running text, the versions and the machine that figures belong to."""
    return {
        "model": name,
        "base_fingerprint": base_fingerprint(model),
        "text": digest_of(text),
        "text_tokens": sum(map(len, text)),
        "versions": versions(),
        "machine": machine(next(model.parameters()).dtype),
    }


def machine(dtype: torch.dtype) -> dict[str, Any]:
    """The device, cores, threads and format that figures computed here belong to. dtype: of the weights."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def joined_figures(paths: Sequence[Path]) -> Kept:
    """The figures of several outputs as one table.

    Raises:
        NPTError: see `npt.editing.benchmark.rows.joined`. DataError: a bad file.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise NPTError("--from: names a file twice; name each once")
    return joined({path: read_kept(path, "--from") for path in paths})
