"""`npt bench editing`: one command measures, keeps, goes on and shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.editing.__main__ import BASELINES
from benchmarks.editing.__main__ import main as with_baselines
from benchmarks.editing_tables import editing_table, kept_editing, section_of
from npt.cli import main
from npt.editing.benchmark.methods import Context
from npt.editing.benchmark.registry import METHODS, options_of
from npt.editing.benchmark.rows import read_kept
from npt.errors import NPTError
from scripts.marked import with_section

FLAT = {
    "prompt": "the home of Ada is", "subject": "Ada", "target_new": "Oslo", "rephrase_prompt": "a house of Ada stands in",
    "locality_prompt": "the home of Cam is", "locality_ground_truth": "Rome",
}  # fmt: skip
RECORDS = [FLAT, *({**FLAT, "prompt": f"the {thing} of Ada is"} for thing in ("work", "river", "book"))]


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder and cache of its own, few words to write, and no baselines left in the registry."""
    monkeypatch.setattr("npt.editing.benchmark.asking.WRITTEN", 2)
    monkeypatch.setenv("NPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text(json.dumps(RECORDS))
    (tmp_path / "t.txt").write_text("the home of Cam is old and the work of Ben is art")
    yield
    for name in BASELINES:
        METHODS.pop(name, None)


def command(model: Path, *more: str) -> list[str]:
    return [
        "bench", "editing", "--model", str(model), "--records", "r.json", "--text", "t.txt", "--metric", "identity",
        "--layers", "1", "2", "--method", "naive", "context", *more,
    ]  # fmt: skip


def without_times(file: str) -> Any:
    return re.sub(r'"seconds": \[.*\]', "", Path(file).read_text())


def test_a_row_for_every_method_and_batch(local_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--batch",
        "1",
        "2",
        "--output",
        "o.json",
        "--page",
        "p.html",
        "--with",
        "skill",
        "--option",
        "naive.alpha=2",
    ]
    assert main(["--quiet", *command(local_model, *given)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:6]] == [
        ["| naive", "1", "4"], ["| context", "1", "4"], ["| naive", "2", "4"], ["| context", "2", "4"],
    ]  # fmt: skip
    assert "skill change" in lines[0] and "fluency" not in lines[0] and lines[6] == "page: p.html"
    kept = read_kept(Path("o.json"), "--output")
    assert [row.sizes for row in kept.rows] == [[1] * 4, [1] * 4, [2, 2], [2, 2]]
    assert kept.about["model"] == str(local_model) and len(kept.about["base_fingerprint"]) == 64
    assert {"versions", "machine"} <= set(kept.about) and kept.arguments["--option"] == ["naive.alpha=2"]


def test_the_page_shows_table_plot_texts_and_losses(local_model: Path) -> None:
    (Path("r.json")).write_text(json.dumps([{**FLAT, "rephrase_prompt": "<script>Ada"}, *RECORDS[1:]]))
    assert main(["--quiet", *command(local_model, "--page", "p.html")]) == 0
    page = Path("p.html").read_text()
    assert page.count("<table>") == 2 and page.count("data:image/svg+xml") == 1 and "S by method: naive, single" in page
    assert "&lt;script&gt;Ada" in page and "<script" not in page and "4 of 4 facts do not hold" in page
    assert "does not follow" in page and "the home of Ada is <strong>Oslo" in page and "--metric" in page


def test_a_killed_command_goes_on_where_it_stopped(local_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--batch", "2", "1"]
    assert main(["--quiet", *command(local_model, *given, "--output", "whole.json")]) == 0
    monkeypatch.setattr("npt.runs.editing_bench.KEEP_SECONDS", 0.0)
    write_many, calls = Context.write_many, []

    def killed(self: Context, requests: Any) -> None:
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        write_many(self, requests)

    monkeypatch.setattr(Context, "write_many", killed)
    output = command(local_model, *given, "--output", "o.json")
    assert main(["--quiet", *output]) == 130
    assert [row.done for row in read_kept(Path("o.json"), "").rows] == [2, 1, 0, 0]
    assert main(["--quiet", "bench", "editing", "--from", "o.json"]) == 2
    assert main(["--quiet", *output]) == 0
    assert calls == [2, 2, 2, 1, 1, 1, 1] and without_times("o.json") == without_times("whole.json")
    before = Path("o.json").read_bytes()
    monkeypatch.setattr("npt.runs.editing_bench.load_base", None)  # nothing is left to do
    assert main(["--quiet", *output]) == 0 and Path("o.json").read_bytes() == before


def test_a_method_that_carries_its_past_begins_a_row_anew(local_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npt.runs.editing_bench.KEEP_SECONDS", 0.0)
    write_many, calls = Context.write_many, []

    def killed(self: Context, requests: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_many(self, requests)

    monkeypatch.setattr(Context, "write_many", killed)
    monkeypatch.setattr(Context, "carries", True)
    given = [word for word in command(local_model, "--output", "o.json") if word != "naive"]
    assert main(["--quiet", *given]) == 130
    assert [row.done for row in read_kept(Path("o.json"), "").rows] == [2]
    assert main(["--quiet", *given]) == 0 and len(calls) == 3 + 4


def test_other_arguments_for_an_output_are_refused(local_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = command(local_model, "--output", "o.json", "--limit", "2")
    assert main(["--quiet", *given]) == 0
    for words, said in (
        (["--limit", "3"], "was begun with --limit 2, and it is 3 now"),
        (["--batch", "2"], "was begun with --batch not given, and it is 2 now"),
        (["--sequential"], "was begun with --sequential False, and it is True now"),
    ):
        capsys.readouterr()
        assert main(["--quiet", *given, *words]) == 2
        assert said in capsys.readouterr().err
    Path("t.txt").write_text("some other text")
    assert main(["--quiet", *given]) == 2 and "begun with the text's content" in capsys.readouterr().err


def test_a_half_done_output_of_another_machine_or_version_is_refused(
    local_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = command(local_model, "--output", "o.json", "--limit", "1")
    assert main(["--quiet", *given]) == 0
    found = json.loads(Path("o.json").read_text())
    row = found["rows"][1]
    row |= {part: {name: [] for name in row[part]} for part in ("records", "batches")} | {"examples": []}
    about = found["about"]
    for part, name in (("machine", "device"), ("machine", "threads"), ("versions", "torch")):
        changed = {**about, part: {**about[part], name: "Z 1"}}
        Path("o.json").write_text(json.dumps({**found, "about": changed}))
        capsys.readouterr()
        assert main(["--quiet", *given]) == 2
        assert f"was begun with {name} Z 1, and it is {about[part][name]} now" in capsys.readouterr().err
    Path("o.json").write_text(json.dumps(found))
    assert main(["--quiet", *given]) == 0 and [row.done for row in read_kept(Path("o.json"), "").rows] == [1, 1]


def test_outputs_are_joined(local_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, more in (("a", []), ("b", ["--option", "naive.alpha=3"]), ("c", ["--limit", "3"])):
        assert main(["--quiet", *command(local_model, "--output", f"{name}.json", *more)]) == 0
    capsys.readouterr()
    assert main(["bench", "editing", "--from", "a.json", "b.json", "--page", "p.html"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in said[2:6]] == ["| naive", "| context", "| naive (b)", "| context (b)"]
    assert main(["bench", "editing", "--from", "a.json", "c.json"]) == 2
    assert "--from c.json: its batches of 1 hold other records than those of a.json" in capsys.readouterr().err
    found = json.loads(Path("b.json").read_text())
    for name, what in (("base_fingerprint", "another base"), ("text", "other running text")):
        Path("d.json").write_text(json.dumps({**found, "about": {**found["about"], name: "x"}}))
        assert main(["bench", "editing", "--from", "a.json", "d.json"]) == 2
        assert f"--from d.json: is of {what} than a.json" in capsys.readouterr().err


def test_kept_results_are_tables(local_model: Path) -> None:
    for part in ("one", "two"):
        output = f"editing-world--{part}.json"
        assert main(["--quiet", *command(local_model, "--limit", "2", "--output", output)]) == 0
    Path("editing-cost.json").write_text("{}")
    kept = kept_editing(Path())
    assert list(kept) == ["world"]
    first, blank, head, _, *rows = editing_table(kept["world"]).splitlines()
    assert first.startswith(f"`{local_model}`, r.json, ") and blank == "" and "| S |" in head and "seconds" not in head
    assert [row.split(" | ")[0] for row in rows] == [
        "| naive", "| context", "| naive (editing-world--two)", "| context (editing-world--two)",
    ]  # fmt: skip
    assert with_section("<!-- editing world: start --><!-- editing world: end -->", section_of("world"), first)


def test_records_in_turn_are_one_batch(local_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word for word in command(local_model, "--sequential") if word != "context"]
    assert main(["--quiet", *given]) == 0
    assert "| naive | 4 in turn | 4 |" in capsys.readouterr().out


def test_draws_are_of_batches_and_single_edits_are_all_records(local_model: Path) -> None:
    assert main(["--quiet", *command(local_model, "--batch", "1", "2", "--draws", "1", "--output", "o.json")]) == 0
    sizes = {row.batch: row.sizes for row in read_kept(Path("o.json"), "").rows}
    assert sizes == {1: [1, 1, 1, 1], 2: [2]}


def test_of_two_targets_for_one_fact_a_batch_holds_the_first(
    local_model: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Path("r.json").write_text(json.dumps([*RECORDS[:2], {**FLAT, "target_new": "Rome"}]))
    assert main(["--quiet", *command(local_model, "--output", "o.json")]) == 0 and "left out" not in caplog.text
    assert read_kept(Path("o.json"), "").rows[0].sizes == [1, 1, 1]
    assert main(["--quiet", *command(local_model, "--batch", "2", "--output", "p.json")]) == 0
    assert read_kept(Path("p.json"), "").rows[0].sizes == [2]
    assert "record 3 is left out: its prompt and subject are those of record 1" in capsys.readouterr().err
    assert main(["--quiet", *command(local_model, "--batch", "3")]) == 2
    assert "--batch 3: more than the 2 records there are" in capsys.readouterr().err


def test_only_methods_of_several_blocks_take_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, known in BASELINES.items():
        monkeypatch.setitem(METHODS, name, known)
    names = {"newton", "refined", "optimised", "memit", "alphaedit", "ultraedit"}
    several = [f"{name}.layers=(1,2)" for name in names]
    assert set(options_of(several)) == names
    for name in set(METHODS) - set(options_of(several)):
        with pytest.raises(NPTError, match=rf"--option {name}.layers=\(1, 2\): {name} edits (one|no) block"):
            options_of([f"{name}.layers=(1,2)"])


def test_the_baselines_join_the_same_command(local_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(local_model, "--limit", "2", "--option", "ft-m.steps=2")[2:]
    words[words.index("naive")] = "ft-m"
    assert with_baselines(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| ft-m", "| context"]
    assert with_baselines([*words, "--option", "ft-m.step=2"]) == 2
    assert "--option ft-m.step: ft-m takes no such option; use rate, steps, rows" in capsys.readouterr().err
