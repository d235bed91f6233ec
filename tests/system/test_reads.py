"""A run reads each local text file twice at most: once to check it, once to pack it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet
import pytest

from npt.cli import main
from npt.data import readers
from npt.data.documents import Document
from npt.data.readers import Reader

NAMES = [
    "river",
    "stone",
    "morning",
    "cold",
    "sound",
    "bridge",
    "water",
    "tree",
    "bird",
    "road",
    "house",
    "field",
    "rain",
]


def words(text: str, count: int) -> str:
    """Sentences in an order of the text's own: no text repeats another, and none would be left out of an evaluation."""
    draw = random.Random(text)
    return "".join(f"The {' and the '.join(draw.sample(NAMES, 6))} were there. " for _ in range(count))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """{file name: how often it was opened for its text}; no other code of the package reads documents."""
    found: Counter[str] = Counter()

    def counting(reader: Reader) -> Reader:
        def read(path: Path, file: BinaryIO, text_column: str) -> Iterator[Document]:
            found[path.name] += 1
            yield from reader(path, file, text_column)

        return read

    for suffix, reader in readers.READERS.items():
        monkeypatch.setitem(readers.READERS, suffix, counting(reader))
    return found


def texts(folder: Path) -> dict[str, list[str]]:
    """{key: files} of a run, one of every kind to train on."""
    (folder / "a.txt").write_text(words("a", 60))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": words(f"b{i}", 3)}) + "\n" for i in range(30)))
    table = pyarrow.table({"text": [words(f"c{i}", 3) for i in range(30)]})
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    for name in ("prose", "other", "more"):
        (folder / f"{name}.txt").write_text(words(name, 40))
    return {
        "data_files": [str(folder / name) for name in ("a.txt", "b.jsonl", "c.parquet")],
        "calibration_files": [str(folder / "prose.txt")],
        "eval_texts": [str(folder / "other.txt")],
    }


def test_each_text_file_is_read_twice_at_most(reads: Counter[str], tmp_path: Path) -> None:
    settings = [
        "data.dataset_name=text", "data.max_length=32", "data.num_train_samples=null", "data.num_eval_samples=4",
        "data.num_calibration_samples=8", "training.num_train_steps=0", "model.rank=2",
        f"paths.output_dir={tmp_path / 'out'}", f"paths.checkpoint_dir={tmp_path / 'checkpoints'}",
        *(f"data.{key}={json.dumps(files)}" for key, files in texts(tmp_path).items()),
    ]  # fmt: skip
    overrides = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", *overrides]) == 0
    assert set(reads) == {"a.txt", "b.jsonl", "c.parquet", "prose.txt", "other.txt"}
    assert max(reads.values()) == 2, reads
    reads.clear()
    adapter, report = str(tmp_path / "checkpoints" / "best_model"), str(tmp_path / "report.json")
    arguments = ["--checkpoint", adapter, "--output", report, "--text", str(tmp_path / "more.txt")]
    assert main(["evaluate", *arguments, *overrides]) == 0
    assert set(reads) >= {"a.txt", "other.txt", "more.txt"} and max(reads.values()) == 2, reads
