"""What an evaluation scores: never, without saying so, text that the adapter's own record names as trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from npt.cli import main
from npt.data.packing import pack
from npt.data.seen import TextRecord
from tests import helpers
from tests.helpers import settings


def prose(seed: int, sentences: int = 60) -> str:
    """Sentences of a text's own, whose runs of letters no other text has."""
    draw = random.Random(seed)
    words = (" ".join("".join(draw.choices("abcdefgh", k=4)) for _ in range(8)) for _ in range(sentences))
    return "".join(f"{text.capitalize()}.\n" for text in words)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    with helpers.quick_reports():
        yield


@pytest.fixture(scope="module")
def run(local_model: Path, tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """The folder of a run that was only calibrated: on the front of book.txt, with prose.txt mixed in."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "book.txt").write_text(prose(0))
    (folder / "prose.txt").write_text(prose(1, 8))
    more = {"data__calibration_files": f"[{folder / 'prose.txt'}]"}
    assert main(["--quiet", "train", *options(local_model, folder, folder / "book.txt", **more)]) == 0
    return folder


def options(local_model: Path, folder: Path, file: Path | str, **more: Any) -> list[str]:
    return settings(
        local_model,
        folder,
        training__num_train_steps=0,
        data__dataset_name="text",
        data__data_files=f"[{file}]",
        **more,
    )


def evaluated(run: Path, *arguments: str) -> dict[str, Any]:
    output = run / "report.json"
    command = ["evaluate", "--checkpoint", str(run / "checkpoints" / "best_model"), "--output", str(output)]
    assert main(["--quiet", *command, *arguments]) == 0
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def notes(report: dict[str, Any]) -> list[str]:
    return [note for note in report["notes"] if "trained on" in note]


def known(run: Path) -> TextRecord:
    record = TextRecord.read(run / "checkpoints" / "best_model")
    assert record is not None
    return record


def test_the_record_tells_training_from_held_out_text(run: Path, local_model: Path) -> None:
    record, tokenizer = known(run), AutoTokenizer.from_pretrained(local_model)
    blocks = pack([prose(0)], tokenizer, 32)
    assert record.trained.covers(blocks)[:48].all() and not record.trained.covers(blocks)[-8:].any()
    assert record.held_out.covers(blocks).tolist() == [False] * (len(blocks) - 8) + [True] * 8
    assert record.trained.covers(pack([prose(1, 8)], tokenizer, 32)).mean() > 0.5, "the prose of the calibration"


def test_the_same_text_under_another_name_length_and_split_is_recognised(run: Path, local_model: Path) -> None:
    report = json.loads((run / "outputs" / "evaluation_report.json").read_text())
    assert notes(report) == []
    again = evaluated(run, *options(local_model, run, run / "book.txt"))
    assert again["evaluations"]["divergence"] == report["evaluations"]["divergence"] and notes(again) == []
    copy = run / "copied.txt"
    copy.write_text(prose(0))
    renamed = evaluated(run, *options(local_model, run, copy))
    assert renamed["evaluations"]["divergence"] == report["evaluations"]["divergence"] and notes(renamed) == []
    many = evaluated(run, *options(local_model, run, copy, data__num_eval_samples=1000, data__num_train_samples=4))
    total = len(pack([prose(0)], AutoTokenizer.from_pretrained(local_model), 32))
    assert notes(many) == [f"48 blocks of {copy} were trained on and are left out; {total - 48} others are scored"]
    longer = evaluated(run, *options(local_model, run, copy, data__max_length=96, data__num_eval_samples=1000))
    assert ["16 blocks of" in note for note in notes(longer)] == [True]


def test_text_of_the_option_is_compared_too(run: Path, local_model: Path) -> None:
    other = settings(local_model, run, data__dataset_name="self")
    report = evaluated(run, "--text", str(run / "book.txt"), *other)
    assert notes(report) == [f"48 blocks of {run / 'book.txt'} were trained on and are left out; 8 others are scored"]
    asked = evaluated(run, "--text", str(run / "book.txt"), *other, "--set", "data.score_seen_text=true")
    assert notes(asked) == ["8 of 8 scored blocks of book were trained on"]


def test_nothing_left_is_one_line_before_the_base_is_loaded(
    run: Path, local_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npt.runs.evaluate.load_npt", lambda *_: pytest.fail("the base was loaded"))
    (run / "front.txt").write_text(prose(0)[:600])
    checkpoint = ["evaluate", "--checkpoint", str(run / "checkpoints" / "best_model")]
    for arguments in (
        [*options(local_model, run, run / "front.txt")],
        [*settings(local_model, run), "--text", str(run / "front.txt")],
        [*settings(local_model, run, data__eval_texts=f"[{run / 'front.txt'}]")],
        [*options(local_model, run, run / "front.txt", data__streaming="true"), "--set", "training.num_train_steps=1"],
    ):
        capsys.readouterr()
        assert main(["--quiet", *checkpoint, *arguments]) == 2
        err = capsys.readouterr().err
        assert "front.txt: all 18 block(s) that could be scored were trained on" in err, err
        assert "data.score_seen_text=true" in err and err.count("\n") == 1


def test_documents_that_repeat_are_not_held_out(local_model: Path, tmp_path: Path, quick: None) -> None:
    """The tail repeats the front; blocks between them take its place."""
    documents = prose(3, 40).splitlines()
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*documents, *documents[:4]])
    )
    arguments = options(local_model, tmp_path, tmp_path / "a.jsonl", data__num_train_samples=40)
    assert main(["--quiet", "train", *arguments]) == 0
    report = json.loads((tmp_path / "outputs" / "evaluation_report.json").read_text())
    assert [note.split()[1:2] + note.split()[-4:] for note in notes(report)] == [
        ["blocks", "8", "others", "are", "scored"]
    ]
    record = known(tmp_path)
    held_out = pack(documents[:4], AutoTokenizer.from_pretrained(local_model), 32)
    assert not record.held_out.covers(held_out).any() and report["protocol"]["blocks"] == {"text": 8}


def test_training_on_one_document_over_and_over_is_refused(
    local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr("npt.runs.train.convert_base", lambda *_: pytest.fail("the base was loaded"))
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": prose(4, 1)}) + "\n") * 60)
    arguments = options(local_model, tmp_path, tmp_path / "a.jsonl")
    assert main(["--quiet", "train", *arguments]) == 2
    assert "a.jsonl: all" in capsys.readouterr().err and not (tmp_path / "outputs").exists()


def test_eval_texts_that_copy_the_calibration_prose(local_model: Path, tmp_path: Path, quick: None) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(prose(5, 20))
    more = {"data__calibration_files": f"[{tmp_path / 'one.txt'}]", "data__eval_texts": f"[{tmp_path / 'two.txt'}]"}
    assert main(["--quiet", "train", *settings(local_model, tmp_path, training__num_train_steps=0, **more)]) == 0
    report = json.loads((tmp_path / "outputs" / "evaluation_report.json").read_text())
    assert [f"{tmp_path / 'two.txt'} were trained on and are left out" in note for note in notes(report)] == [True]


def test_a_stream_keeps_its_record_over_a_stop(local_model: Path, tmp_path: Path, quick: None) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": prose(n, 2)}) + "\n" for n in range(200)))
    more = {"data__streaming": "true", "data__num_eval_samples": 4, "data__num_calibration_samples": 8}
    arguments = options(local_model, tmp_path, tmp_path / "a.jsonl", **more)
    steps = ["--set", "training.num_train_steps=4"]
    assert main(["--quiet", "train", *arguments, "--set", "training.num_train_steps=2"]) == 0
    before = known(tmp_path)
    assert main(["--quiet", "train", *arguments, *steps, "--resume"]) == 0
    record, tokenizer = known(tmp_path), AutoTokenizer.from_pretrained(local_model)
    texts = [pack([prose(n, 2)], tokenizer, 32) for n in range(200)]
    early, covered = ([seen.covers(text).all() for text in texts] for seen in (before.trained, record.trained))
    assert 10 < sum(early) < sum(covered) < 100 and all(map(int.__le__, map(int, early), map(int, covered)))
    own = json.loads((tmp_path / "outputs" / "evaluation_report.json").read_text())
    report = evaluated(tmp_path, *arguments, *steps)
    assert report["evaluations"]["divergence"] == own["evaluations"]["divergence"]
    own_text = {"data__dataset_name": "self", "data__data_files": "null", "data__streaming": "false"}
    other = settings(local_model, tmp_path, **own_text, data__num_eval_samples=500, data__num_train_samples=2)
    (note,) = notes(evaluated(tmp_path, "--text", str(tmp_path / "a.jsonl"), *other))
    assert int(note.split()[0]) >= 2 * sum(covered)
