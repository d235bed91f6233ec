"""Which small changes of the source no test notices: python -m scripts.mutants component --sample 150 --seed 0

A mutant is one change of one expression or statement. Each runs against the fast tests of its file in a child forked from a
parent that has imported everything but npt and the tests, so it costs seconds and the tree is never edited. What is known is
kept in a JSON-lines file and not run again until the source or its tests change. docs/mutants.md explains the survivors.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import json
import os
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

from scripts.mutations import Mutant, mutants_of, sample

REPOSITORY = Path(__file__).resolve().parents[1]
STATE, EXPLAINED = REPOSITORY / "benchmarks" / "results" / "mutants.jsonl", REPOSITORY / "docs" / "mutants.md"


@dataclass(frozen=True)
class Target:
    """A module to mutate, and what to run against its mutants."""

    module: str
    file: str
    tests: tuple[str, ...]


def _families(test: str, names: str) -> tuple[str, ...]:
    return tuple(f"tests/block/test_families.py::{test}[{name}]" for name in names.split())


_FORMULA, _EXACT = (
    "test_block_equals_explicit_formula_for_every_option",
    "test_exact_and_denominator_are_the_original_and_disabling_gives_it_back_bit_for_bit",
)
_CALIBRATION = (
    "every_block_comes_closer", "better_gains_fit_better", "result_does_not_depend_on_how_text_is_batched",
    "padding_is_left_out", "planted_outliers_do_not_dominate", "degenerate_text_gives_finite_values",
    "no_text_is_an_error", "base_is_not_touched_and_mode_is_kept",
)  # fmt: skip
#: Tests that take less than a few seconds, of what touches the file.
TESTS = {
    "component": (
        *(
            f"tests/{name}.py"
            for name in ("block/test_component", "block/test_parity", "block/test_hooks", "tuner/test_tuner")
        ),
        *_families(_FORMULA, "cohere olmo2"),
        "tests/tuner/test_composition.py::test_half_precision_is_as_near_as_the_base_is",
        "tests/equivalence/test_objectives.py",
    ),
    "hooks": (
        *(f"tests/{name}.py" for name in ("block/test_hooks", "block/test_parity", "tuner/test_tuner")),
        *_families(_FORMULA, "phi3 granite olmo2 gemma2 opt cohere"),
        *_families("test_any_subset_of_projections", "targets0-phi3 targets1-phi3 targets2-phi3 targets3-phi3"),
        *_families(_EXACT, "phi3 granite olmo2 gemma2 opt cohere"),
        "tests/tuner/test_composition.py::test_lora_before_and_after_give_the_same_model",
        "tests/tuner/test_composition.py::test_adapters_switched_per_call",
        "tests/tuner/test_composition.py::test_deepcopy_is_independent_of_the_original",
    ),
    "closed_form": ("tests/equivalence/test_closed_form.py", "tests/equivalence/test_calibrate.py"),
    "calibration": (
        "tests/equivalence/test_closed_form.py",
        "tests/equivalence/test_calibrate.py",
        "tests/tuner/test_nonfinite.py::test_half_precision_overflow_is_caught",
        *(f"tests/equivalence/test_calibration.py::test_{name}" for name in _CALIBRATION),
    ),
}
MODULES = {
    "component": "block.component",
    "hooks": "block.hooks",
    "closed_form": "equivalence.closed_form",
    "calibration": "equivalence.calibration",
}
TARGETS = {
    name: Target(f"npt.{module}", f"src/npt/{module.replace('.', '/')}.py", TESTS[name])
    for name, module in MODULES.items()
}


# -- running ---------------------------------------------------------------------------------------------------------------


class _Loader(SourceFileLoader):
    def __init__(self, module: str, path: str, text: str):
        super().__init__(module, path)
        self.text = text

    def get_code(self, fullname: str) -> Any:
        return compile(self.text, self.path, "exec")


class _Finder:
    """Finds one module, with another text than its file has."""

    def __init__(self, module: str, path: Path, text: str):
        self.module, self.loader = module, _Loader(module, str(path), text)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self.loader) if name == self.module else None


class _Plugin:
    """Runs the most promising tests first, and notes how long each took and which failed."""

    def __init__(self, order: dict[str, float]):
        self.order, self.seconds, self.failed = order, Counter[str](), ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: -self.order.get(item.nodeid, 0))

    def pytest_collectreport(self, report: Any) -> None:
        self.failed = self.failed or f"import of {report.nodeid}" * report.failed

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        self.failed = self.failed or report.nodeid * report.failed


def run(root: Path, target: Target, text: str, order: dict[str, float], limit: float) -> dict[str, Any]:
    """{"verdict", "by", "seconds", and of a run to the end "tests" and "modules"} of the target with a text of its own."""
    start = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.setsid()
            os.close(reader)
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            os.write(writer, json.dumps(_in_child(root, target, text, order)).encode())
        os._exit(0)
    os.close(writer)
    data = b""
    while select.select([reader], [], [], max(0.0, start + limit - time.monotonic()))[0]:
        part = os.read(reader, 1 << 16)
        data += part
        if not part:
            break
    else:
        data = json.dumps({"verdict": "killed", "by": "the time limit"}).encode()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.close(reader)
    os.waitpid(child, 0)
    result = json.loads(data) if data else {"verdict": "killed", "by": "a crash"}
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def _in_child(root: Path, target: Target, text: str, order: dict[str, float]) -> dict[str, Any]:
    sys.meta_path.insert(0, _Finder(target.module, root / target.file, text))
    os.chdir(root)
    import pytest

    plugin = _Plugin(order)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={root}", *target.tests], plugins=[plugin])
    if code:
        return {"verdict": "killed", "by": plugin.failed or "the import"}
    own = {"__main__", "conftest", "tests", "scripts", target.module.split(".")[0]}
    modules = [name for name in sys.modules if name.split(".")[0] not in own and not name.startswith("test_")]
    return {"verdict": "survived", "by": "", "tests": plugin.seconds, "modules": modules}


def check(root: Path, target: Target, mutants: list[Mutant], records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A record of each mutant; `records` of earlier ones say which tests to try first."""
    text = (root / target.file).read_text(encoding="utf-8")
    sys.path[:0] = [str(root / "src"), str(root)]
    whole = run(root, target, text, {}, 3600)
    if whole["verdict"] == "killed":
        raise SystemExit(f"{', '.join(target.tests)}: {whole['by']} fails without any change")
    for name in whole["modules"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    print(f"{len(whole['tests'])} tests in {whole['seconds']} s", flush=True)
    kills = Counter[tuple[str, str]]()
    for record in records:
        kills.update([(record["scope"], record["by"]), ("", record["by"])])
    hashes = hashes_of(root, target)
    for mutant in mutants:
        promise = {n: 0.1 + kills["", n] + 4 * kills[mutant.scope, n] for n in whole["tests"]}
        order = {n: promise[n] / (seconds + 0.02) for n, seconds in whole["tests"].items()}
        found = run(root, target, mutant.apply(text), order, 60 + 2 * whole["seconds"])
        kills.update([(mutant.scope, found["by"]), ("", found["by"])])
        about = {
            k: v if isinstance(v, int) else v[:160] for k, v in asdict(mutant).items() if k not in ("start", "end")
        }
        yield {"file": target.file, **about, **{k: found[k] for k in ("verdict", "by", "seconds")}, **hashes}


def hashes_of(root: Path, target: Target) -> dict[str, str]:
    """Short hashes of the source and of all its tests."""
    files = [
        *sorted({test.split("::")[0] for test in target.tests}),
        "tests/conftest.py",
        "tests/families.py",
        "tests/helpers.py",
    ]
    tests = b"".join((root / name).read_bytes() for name in files if (root / name).exists())
    source = (root / target.file).read_bytes()
    return {"source": hashlib.sha256(source).hexdigest()[:8], "tests": hashlib.sha256(tests).hexdigest()[:8]}


# -- the command -----------------------------------------------------------------------------------------------------------


def summary(target: Target, chosen: list[Mutant], known: dict[str, dict[str, Any]]) -> str:
    """One line: killed, survived, share, and how many of the survivors docs/mutants.md explains."""
    records = [known[mutant.id] for mutant in chosen if mutant.id in known]
    survivors = [record for record in records if record["verdict"] == "survived"]
    explained = EXPLAINED.read_text(encoding="utf-8") if EXPLAINED.exists() else ""
    reasons = sum(record["id"] in explained for record in survivors)
    share = len(survivors) / max(1, len(records))
    older = sum(any(record[k] != v for k, v in hashes_of(REPOSITORY, target).items()) for record in records)
    return (
        f"{target.file}: {len(records)} of {len(chosen)} mutants run, {len(records) - len(survivors)} killed, "
        f"{len(survivors)} survived ({share:.1%}), {reasons} of them explained; {older} with other source or tests; "
        f"{sum(record['seconds'] for record in records):.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--sample", type=int, default=150, help="how many mutants, 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the sample, with what is known of each, and stop")
    parser.add_argument("--survivors", action="store_true", help="run those again that survived, and no others")
    parser.add_argument("--show", metavar="ID", help="print a mutant as a diff, and stop")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork inherits no threads
    target = TARGETS[options.target]
    source = (REPOSITORY / target.file).read_text(encoding="utf-8")
    mutants = mutants_of(source, target.module)
    chosen = sample(mutants, options.sample or len(mutants), options.seed)
    lines = STATE.read_text(encoding="utf-8").splitlines() if STATE.exists() else []
    known = {record["id"]: record for record in map(json.loads, lines)}
    if options.show:
        (mutant,) = (mutant for mutant in mutants if mutant.id == options.show)
        texts = (text.splitlines(keepends=True) for text in (source, mutant.apply(source)))
        print("".join(difflib.unified_diff(*texts, target.file, mutant.id, n=2)), end="")
        return
    if options.list:
        for mutant in chosen:
            verdict = known.get(mutant.id, {"verdict": "not run"})["verdict"]
            change = " ".join(f"{mutant.before[:110]}  ->  {mutant.after[:110]}".split())
            print(f"{mutant.id} {verdict:8} {mutant.line:4}:{mutant.column:<3} {mutant.operator:10} {change}")
        print(f"{len(mutants)} mutants in all")
        return
    hashes = hashes_of(REPOSITORY, target)
    if options.survivors:
        todo = [mutant for mutant in chosen if known.get(mutant.id, {}).get("verdict") == "survived"]
    else:
        todo = [mutant for mutant in chosen if not hashes.items() <= known.get(mutant.id, {}).items()]
    earlier = [record for record in known.values() if record["file"] == target.file]
    with STATE.open("a", encoding="utf-8") as state:
        for record in check(REPOSITORY, target, todo, earlier) if todo else ():
            state.write(json.dumps(record) + "\n")
            state.flush()
            known[record["id"]] = record
            place = f"{record['file']}:{record['line']} {record['operator']}"
            print(f"{record['id']} {record['verdict']} {place} {record['seconds']} s {record['by']}", flush=True)
    ids = {mutant.id for mutant in mutants}
    kept = [record for record in known.values() if record["file"] != target.file or record["id"] in ids]
    STATE.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    print(summary(target, chosen, known))


if __name__ == "__main__":
    main()
