"""The documents agree with the repository: links, names, defaults and constants, and tables with the kept figures."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import mixture
from benchmarks.absorbing import tables as absorbing
from benchmarks.beyond import tables as beyond
from benchmarks.editing_tables import DOCUMENT, tables
from benchmarks.law_tables import README_MODEL, kept_laws, law_readme, law_table
from benchmarks.plasticity import tables as plasticity
from benchmarks.tables import (
    RESULTS,
    command_table,
    cost_table,
    equivalence_table,
    kept_equivalence,
    linear_table,
    materialized_table,
    outcomes_table,
    sharing_table,
    speed_sentence,
    speed_table,
)
from npt.config import RunConfig
from scripts.marked import ROOT, section, with_section

SOURCE = ROOT / "src" / "npt"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *PAGES,
    *(ROOT / name / "README.md" for name in ("examples", "recipes", "fuzz")),
]
EACH = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
#: The page that names files of the original layout; those that are gone stand in its first column.
ORIGINAL = ROOT / "docs" / "original_layout.md"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def packages() -> list[str]:
    """The names of the packages of src/npt."""
    return sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))


# -- README and indexes ------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").split()) <= 1600


def test_the_readme_counts_the_families() -> None:
    families = section(text_of(ROOT / "docs" / "families.md"), "families").split(", ")
    assert f"lists the {len(families)} families" in " ".join(text_of(ROOT / "README.md").split())


def test_the_file_map_names_every_package() -> None:
    readme = text_of(ROOT / "README.md")
    named = {name.rstrip("/") for name in re.findall(r"^\| `([\w./]+)` \|", readme, re.MULTILINE)}
    assert {f"src/npt/{name}" for name in packages()} - named == set()
    assert all((ROOT / name).exists() for name in named)
    assert {"tests", "docs", "examples", "benchmarks", "recipes", "scripts", "fuzz"} <= named
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.sh")):
        assert f"`{path.name}`" in readme, path.name


def test_the_order_of_packages_is_the_one_that_is_held() -> None:
    """`ORDER` of tests/test_layout.py also names packages that do not exist yet."""
    shown = re.search(r"^    errors -> (?:.*\n)+?\n", text_of(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    held = re.search(r"^ORDER = (\(.*?\n\))", text_of(ROOT / "tests" / "test_layout.py"), re.MULTILINE | re.DOTALL)
    assert shown is not None and held is not None
    present = {*packages(), *(path.stem for path in SOURCE.glob("*.py"))}
    groups = [[name for name in group.split() if name in present] for group in ast.literal_eval(held.group(1))]
    assert [group.strip().split(", ") for group in shown.group().split("->")] == [group for group in groups if group]
    assert set(packages()) <= {name for group in groups for name in group}


def test_the_index_lists_every_page() -> None:
    listed = re.findall(r"^- \[[\w./]+\]\(([\w./]+)\): ", text_of(ROOT / "docs" / "README.md"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {path.name for path in PAGES} - {"README.md"} == {name for name in listed if "/" not in name}


# -- links and names -----------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), f"{path.name}: {link}"
            assert not anchor or anchor in anchors(text_of(target)), f"{path.name}: {link}"


@EACH
def test_files_exist(path: Path) -> None:
    text = text_of(path)
    if path == ORIGINAL:
        text = "\n".join(line.split(" | ", 1)[-1] for line in text.splitlines())
    paths = re.findall(r"(?:src|tests|docs|benchmarks|examples|recipes|scripts|fuzz)/[\w./-]*\w", text)
    missing = [name for name in paths if not (ROOT / name).exists() and not (path.parent / name).exists()]
    assert not missing, f"{path.name}: {missing}"
    assert not re.findall(r"(?<!src/)\bnpt/\w+[\w/]*\.py", text), "write the path from the root: src/npt/..."
    bare = set(re.findall(r"`(\w+\.(?:py|sh))`", text))
    near = (ROOT, path.parent)
    unknown = {name for name in bare if not any((p / name).is_file() for p in near) and not list(SOURCE.rglob(name))}
    assert not unknown, f"{path.name}: {unknown}"


@EACH
def test_modules_exist(path: Path) -> None:
    text = text_of(path)
    for name in re.findall(r"python -m ((?:scripts|benchmarks)[\w.]*)", text):
        file = ROOT / name.rstrip(".").replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), f"{path.name}: python -m {name}"
    for name in re.findall(r"(?<![\w./@-])npt\.[a-zA-Z_][\w.]*", text):
        assert names_something(name.rstrip(".").split(".")[1:]), f"{path.name}: {name}"


def names_something(parts: list[str]) -> bool:
    """True for the path of a module below npt, and for a name that its deepest module holds."""
    place = SOURCE
    while parts and (place / parts[0]).is_dir():
        place, parts = place / parts[0], parts[1:]
    file = place / "__init__.py"
    if parts and (place / f"{parts[0]}.py").is_file():
        file, parts = place / f"{parts[0]}.py", parts[1:]
    return file.is_file() and all(re.search(rf"\b{part}\b", text_of(file)) for part in parts)


# -- defaults and constants ------------------------------------------------------------------------------------------------


def test_the_configuration_table_has_every_key_and_its_default() -> None:
    rows = re.findall(r"^\| `(\w+\.\w+)` \| `(.*?)` \|", text_of(ROOT / "docs" / "configuration.md"), re.MULTILINE)
    documented: dict[str, Any] = {key: yaml.safe_load(default) for key, default in rows}
    sections = RunConfig().model_dump()
    defaults = {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}
    assert documented == defaults and len(rows) == len(defaults)


def constants() -> dict[str, list[Any]]:
    """{name: the literals assigned to it} of module-level constants anywhere in src/npt."""
    found: dict[str, list[Any]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(text_of(path)).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for name, value in pairs(targets[0], getattr(node, "value", None)):
                found.setdefault(name, []).append(value)
    return found


def pairs(target: ast.expr | None, value: ast.expr | None) -> list[tuple[str, Any]]:
    """(name, literal) of an assignment, also of several names at once."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return [pair for t, v in zip(target.elts, value.elts, strict=True) for pair in pairs(t, v)]
    if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
        return [(target.id, value.value)]
    return []


def test_the_constants_of_the_maths_are_those_of_the_code() -> None:
    maths, known = text_of(ROOT / "docs" / "maths.md"), constants()
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([\d.,e-]+) \|", maths, re.MULTILINE)
    assert len(rows) >= 9
    for name, value in rows:
        assert known.get(name) == [float(value.replace(",", ""))], name
    value = {name: known[name][0] for name, _ in rows}
    prose = " ".join(maths.split())
    for words in (
        f"{value['CHUNK_TOKENS']:,}, or {value['CHUNK_TOKENS_PER_CHANNEL']} d where that is more",
        f"min(1, {value['OUTLIER_FACTOR']:g} median|D|^2 / |D|^2, {value['OUTLIER_FACTOR']:g} median|a|^2 / |a|^2)",
        f"root mean square {value['MODULATION_STD']}",
        "lambda = 1e-4",
        "gamma / (gamma^2 + 1e-6)",
        f"on {value['PROBE_TOKENS']} tokens",
        f"for {value['POSITION_CHUNK']:,} positions at a time",
    ):
        assert words in prose, words
    assert (value["LOW_RANK_RIDGE"], value["NORM_WEIGHT_EPSILON"]) == (1e-4, 1e-6)


# -- tables with the kept figures --------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_kept_figures() -> None:
    kept, laws, speed = kept_equivalence(), kept_laws(), json.loads(text_of(RESULTS / "cpu-2-cores.json"))
    expected = {
        ("README.md", "results"): law_readme(laws[README_MODEL]),
        ("docs/editing.md", "editing cost"): cost_table(json.loads(text_of(RESULTS / "editing-cost.json"))),
        ("docs/law.md", "law"): law_table(laws),
        ("README.md", "speed sentence"): speed_sentence(speed),
        ("docs/results.md", "outcomes"): outcomes_table(kept),
        ("docs/speed.md", "speed"): speed_table(speed),
        ("docs/speed.md", "speed cpu-1-core"): speed_table(json.loads(text_of(RESULTS / "cpu-1-core.json"))),
        ("docs/families.md", "mixture"): mixture.table(json.loads(text_of(RESULTS / "mixture.json"))),
        ("docs/speed.md", "materialized"): materialized_table(speed),
        ("docs/speed.md", "linear"): linear_table(speed),
        ("docs/speed.md", "command"): command_table(json.loads(text_of(RESULTS / "command.json"))),
        ("docs/speed.md", "sharing"): sharing_table(json.loads(text_of(RESULTS / "sharing.json"))),
        **{("docs/results.md", f"equivalence {name}"): equivalence_table(kept[name]) for name in kept},
        **{(DOCUMENT, name): table for name, table in tables().items()},
        **{
            (DOCUMENT, absorbing.section_of(n)): absorbing.absorbing_section(n, k)
            for n, k in absorbing.kept_absorbing().items()
        },
        **{(DOCUMENT, beyond.section_of(n)): beyond.beyond_section(k) for n, k in beyond.kept_beyond().items()},
        **{
            (plasticity.DOCUMENT, plasticity.section_of(n)): plasticity.plasticity_section(k)
            for n, k in plasticity.kept_plasticity().items()
        },
    }
    for (file, name), table in expected.items():
        assert section(text_of(ROOT / file), name) == table, f"{file}: {name}"


def test_marked_parts_are_replaced_and_nothing_else() -> None:
    text = "a\n<!-- x: start -->\nold\n<!-- x: end -->\nb\n"
    assert section(text, "x") == "old"
    assert with_section(text, "x", "new\nlines") == text.replace("old", "new\nlines")
    for broken in ("a", text + text, "<!-- x: end -->\n<!-- x: start -->"):
        with pytest.raises(ValueError, match="x: start"):
            with_section(broken, "x", "new")
