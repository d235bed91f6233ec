"""The mutation check makes the changes it says and tells a test that notices one from a test that doesn't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.mutations import mutants_of, sample
from tests.helpers import REPOSITORY

SOURCE = '''
"""Not in a docstring: 1 + 1."""

import logging

logger = logging.getLogger(__name__)


def larger(x: int | None, options: dict[str, int]) -> int:
    """The larger one."""
    logger.info("comparing %d", 3)
    if x is None or not options:
        raise ValueError(f"x={x} is" + "missing")
    options["seen"] = max(x, 0)
    return abs(x - 1) if x < options["limit"] else x[1:]
'''


def test_what_is_changed() -> None:
    mutants = mutants_of(SOURCE)
    assert {(m.operator, m.before, m.after) for m in mutants} == {
        ("boolean", "x is None or not options", "(x is None and (not options))"),
        ("comparison", "x is None", "(x is not None)"),
        ("comparison", 'x < options["limit"]', "(x <= options['limit'])"),
        ("condition", "x is None or not options", "(not (x is None or not options))"),
        ("condition", 'x < options["limit"]', "(x >= options['limit'])"),
        ("constant", "0", "1"),
        ("constant", "0", "(-1)"),
        *(("constant", "1", other) for other in ("0", "2")),
        ("arithmetic", "x - 1", "(x + 1)"),
        ("method", "abs(x - 1)", "(x - 1)"),
        ("return", 'return abs(x - 1) if x < options["limit"] else x[1:]', "return None"),
        ("statement", 'raise ValueError(f"x={x} is" + "missing")', "pass"),
        ("statement", 'options["seen"] = max(x, 0)', "pass"),
        ("string", '"limit"', "'limit?'"),
        ("string", '"seen"', "'seen?'"),
        ("twin", "max(x, 0)", "min(x, 0)"),
        ("unary", "not options", "options"),
    }
    for mutant in mutants:
        changed = mutant.apply(SOURCE)
        compile(changed, "changed", "exec")
        assert changed != SOURCE and mutant.after in changed


def test_the_sample_is_seeded_and_outlives_a_change_elsewhere() -> None:
    mutants = mutants_of(SOURCE)
    chosen = sample(mutants, 9, seed=0)
    assert len(chosen) == 9 and chosen == sample(mutants, 9, seed=0) != sample(mutants, 9, seed=1)
    later = mutants_of(SOURCE.replace("import logging", "import logging\n\n\ndef other() -> bool:\n    return True"))
    assert len(later) == len(mutants) + 2
    assert len({m.id for m in sample(later, 9, seed=0)} & {m.id for m in chosen}) >= 7


SMALL = "def small(x):\n    y = abs(x * x)\n    return y > 0\n"
TESTS = "from small import small\n\n\ndef test_small():\n    assert small(1) and not small(0)\n"
RUN = """
import json, pathlib, sys
from scripts.mutants import Target, check
from scripts.mutations import mutants_of
root = pathlib.Path(sys.argv[1])
target = Target("small", "src/small.py", ("tests/test_small.py",))
mutants = mutants_of((root / target.file).read_text())
print(json.dumps(list(check(root, target, mutants, []))))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_planted_change_is_killed_and_one_that_changes_nothing_survives(tmp_path: Path) -> None:
    for name, text in (("src/small.py", SMALL), ("tests/test_small.py", TESTS)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120).stdout
    records = {(r["operator"], r["after"]): r for r in json.loads(output.splitlines()[-1])}
    assert {change for change, record in records.items() if record["verdict"] == "survived"} == {("method", "(x * x)")}
    assert records["comparison", "(y >= 0)"]["by"] == "tests/test_small.py::test_small"
    assert (tmp_path / "src/small.py").read_text() == SMALL
