"""The order of the packages of npt, and the sizes and first words that keep its files readable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

SOURCES = REPOSITORY / "src"
#: A package may import those of the groups before its own; those of one group do not import each other.
ORDER = (
    "errors", "common", "builtin", "block config data", "tuner", "adapters evaluation", "training report", "equivalence",
    "editing finetuning", "runs", "planning", "integrations selfcheck", "cli",
)  # fmt: skip
RANK = {package: rank for rank, group in enumerate(ORDER) for package in group.split()}
#: Outside the order: they define nothing and give names of other packages to users.
FACADES = ("npt/__init__.py", "npt/families.py")
OPENINGS = ("What", "Whether", "That", "As", "Of")


def imports_of(path: Path, sources: Path) -> Iterator[Path]:
    """The files below `sources` that a file imports, anywhere in it."""
    package = ".".join(path.parent.relative_to(sources).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            place = sources.joinpath(*name.split("."))
            files = (place.with_suffix(".py"), place / "__init__.py", place.parent.with_suffix(".py"))
            yield from [file for file in (*files, place.parent / "__init__.py") if file.is_file()][:1]


def wrong_imports(sources: Path) -> list[str]:
    """A line for each import against the order: the importing file, the imported file."""

    def package_of(file: Path) -> str:
        return file.relative_to(sources / "npt").parts[0].removesuffix(".py")

    found = []
    for path in sorted(sources.rglob("*.py")):
        for other in imports_of(path, sources):
            names = [str(file.relative_to(sources)) for file in (path, other)]
            one, two = package_of(path), package_of(other)
            if one != two and not set(FACADES) & set(names) and RANK[one] <= RANK[two]:
                found.append(f"{names[0]} imports {names[1]}")
    return found


def test_packages_import_only_earlier_ones() -> None:
    found = wrong_imports(SOURCES)
    assert not found, "\n".join(found)


def test_no_test_module_imports_another() -> None:
    """Shared code of tests is in tests/helpers.py."""
    tests = REPOSITORY / "tests"
    found = [
        f"{path.relative_to(REPOSITORY)} imports {other.relative_to(REPOSITORY)}"
        for path in sorted(tests.rglob("*.py"))
        for other in imports_of(path, REPOSITORY)
        if other.name.startswith(("test_", "conftest"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "statement", "imported"),
    [
        ("common/files.py", "from npt.block.layer import NPTLayer", "block/layer.py"),
        ("data/packing.py", "def later():\n    import npt.config.sections", "config/sections.py"),
        ("report/page.py", "if TYPE_CHECKING:\n    from npt.training import signals", "training/signals.py"),
        ("tuner/model.py", "from npt.runs import run_training", "runs/__init__.py"),
        ("block/layer.py", "from ..cli import main", "cli/__init__.py"),
    ],
)
def test_an_import_against_the_order_is_found(file: str, statement: str, imported: str, tmp_path: Path) -> None:
    """A copy of the names of npt's files, with one import in one of them."""
    for name in ("common/files", "block/layer", "config/sections", "data/packing", "tuner/model", "training/signals",
                 "report/page", "runs/__init__", "cli/__init__", "__init__"):  # fmt: skip
        path = tmp_path / "npt" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from npt.common.files import write_text\n" if name == "runs/__init__" else "import os\n")
    assert wrong_imports(tmp_path) == []
    (tmp_path / "npt" / file).write_text(statement + "\n")
    assert wrong_imports(tmp_path) == [f"npt/{file} imports npt/{imported}"]


def parsed() -> Iterator[tuple[str, str, ast.Module]]:
    """(name, text, syntax tree) of every file of npt."""
    for path in sorted(SOURCES.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield str(path.relative_to(SOURCES)), text, ast.parse(text)


def test_files_have_at_most_400_lines_and_functions_60() -> None:
    long = [f"{name}: {text.count(chr(10))} lines" for name, text, _ in parsed() if text.count("\n") > 400]
    for name, _, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                long += [f"{name}, {node.name}: {lines} lines"] * (lines > 60)
    assert not long, "\n".join(long)


def test_docstrings_begin_with_their_subject() -> None:
    found = []
    for name, _, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or "-"
                if text.split()[0].strip("`,") in OPENINGS:
                    found.append(f"{name}, {getattr(node, 'name', 'the file')}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)
