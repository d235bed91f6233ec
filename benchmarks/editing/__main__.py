"""Measures methods of editing: python -m benchmarks.editing --records FILE [--method NAME ...] [--limit N]

Prints one row per method, with standard errors. All edit the same model at the same blocks, with the same statistics.
--option METHOD.NAME=VALUE sets an option of one method; --output keeps the figures of every record.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.editing.closed_form import AlphaEdit, Memit, Rome, UltraEdit
from benchmarks.editing.finetuning import FineTuning
from npt import load_base
from npt.common.display import one_line
from npt.editing.benchmark.asking import Asker
from npt.editing.benchmark.figures import as_json, batches_of, measure, table
from npt.editing.benchmark.methods import Context, Method, Setup, Store
from npt.editing.benchmark.records import Record, read_records
from npt.editing.metrics import METRICS, Source
from npt.editing.scan import choose_layer
from npt.editing.statistics import own_text, token_rows
from npt.errors import DataError, NPTError

METHODS: dict[str, Callable[..., Method]] = {
    "newton": partial(Store, values="newton"),
    "optimised": partial(Store, values="optimised"),
    "rome": Rome,
    "memit": Memit,
    "alphaedit": AlphaEdit,
    "ultraedit": UltraEdit,
    "ft-m": FineTuning,
    "locft": partial(FineTuning, breadth=True),
    "context": Context,
}
#: Blocks of methods that edit several: so many, up to the one of the others.
SPREAD = 3
#: The random stream of the running text that the base writes; statistics have another one.
_TEXT_SEED = 1


def options_of(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{method: {option: value}} of METHOD.NAME=VALUE; a value is a Python literal, or else text.

    Raises:
        NPTError: another form, or an unknown method.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        method, dot, rest = text.partition(".")
        name, equals, value = rest.partition("=")
        if not (dot and equals and name) or method not in METHODS:
            raise NPTError(
                f"--option {one_line(repr(text), 60)}: use METHOD.NAME=VALUE, METHOD of {', '.join(METHODS)}"
            )
        try:
            found.setdefault(method, {})[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found.setdefault(method, {})[name] = value
    return found


def kept_records(records: Sequence[Record], asker: Asker) -> list[Record]:
    """The records that every method can write: the subject's last token is not the text's first one, which is said."""
    found = []
    for number, record in enumerate(records, 1):
        try:
            asker.prompts.place(record.request.prompt, record.request.subject)
        except DataError as error:
            print(f"record {number} is left out: {error}", file=sys.stderr)
            continue
        found.append(record)
    if not found:
        raise DataError("--records: no record can be written; see the lines above")
    return found


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.editing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="a JSON file of CounterFact's or zsRE's format")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="default: all")
    parser.add_argument("--limit", type=int, help="the first so many records")
    parser.add_argument("--batch", type=int, default=1, help="records that are written together (default: 1)")
    parser.add_argument("--draws", type=int, help="so many random batches, instead of one after the other")
    parser.add_argument("--model", default="builtin:tiny", help="default: builtin:tiny")
    parser.add_argument("--layers", type=int, nargs="+", help="blocks, rising; methods with one block use the last")
    parser.add_argument("--metric", default="domain", choices=METRICS)
    parser.add_argument("--text", type=Path, help="running text for the divergence (default: the base's own)")
    parser.add_argument("--cache", type=Path, help="a folder that keeps statistics")
    parser.add_argument("--option", action="append", default=[], metavar="METHOD.NAME=VALUE")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures of every record")
    return parser.parse_args(arguments)


def _running_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {path}: can't be read ({one_line(error, 60)}); name a UTF-8 text file") from error


def run(given: argparse.Namespace) -> dict[str, Any]:
    """{method: outcomes} of the command."""
    options = options_of(given.option)
    if given.limit is not None and given.limit < 1:
        raise NPTError(f"--limit {given.limit}: use a whole number from 1")
    records = read_records(given.records)[: given.limit]
    text = None if given.text is None else _running_text(given.text)
    model, tokenizer = load_base(given.model)
    source = Source(model, tokenizer, given.metric, "self", None, given.cache, True)
    rows = (
        own_text(model, tokenizer, 128, given.cache, _TEXT_SEED)
        if text is None
        else token_rows(tokenizer, [text], "--text")
    )
    last = given.layers or choose_layer(source, [records[0].request])
    layers = tuple(range(max(0, last - SPREAD + 1), last + 1)) if isinstance(last, int) else tuple(last)
    setup = Setup(model, tokenizer, source, layers)
    methods = {name: made(name, setup, options.get(name, {})) for name in given.method or METHODS}
    asker = Asker(model, tokenizer, rows, min(method.setup.layers[0] for method in methods.values()))
    batches = batches_of(kept_records(records, asker), given.batch, given.draws)
    return {name: measure(method, asker, batches, name) for name, method in methods.items()}


def made(name: str, setup: Setup, options: Mapping[str, Any]) -> Method:
    """A method with its options; `layers` among them takes the place of the setup's."""
    options = dict(options)
    layers = options.pop("layers", setup.layers)
    if not isinstance(layers, tuple) or not all(type(layer) is int for layer in layers):
        raise NPTError(f"--option {name}.layers={layers!r}: use blocks in brackets, as in (4,5,6)")
    return METHODS[name](replace(setup, layers=layers), **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 1 for an error that is said in one line."""
    given = parsed(arguments)
    try:
        found = run(given)
    except NPTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(found))
    if given.output is not None:
        given.output.write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
