"""Text is read out of every kind of file, packed or not, with the same tokens, and what can't be read is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from npt.data import load_documents, pack
from npt.data.inputs import documents_or_blocks
from npt.data.readers import PACKED, READERS, is_text_name, short_name
from npt.data.sources import TextFiles
from npt.data.streaming import DocumentStream, hub_source, local_source
from npt.errors import DataError

#: What tables like to lose: quotes, separators, lines, words that stand for a null elsewhere, one longer than csv's own limit.
DOCUMENTS = [
    "Once upon a time, there was a girl.", 'She said: "No, thank you."\nAnd\tleft.', "NA", "null", "1.50", " two  spaces ",
    "Ünïcödé \u2028 🙂", "long " * 30_000,
]  # fmt: skip


def table(separator: str, rows: list[list[str]], **options: Any) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator, **options).writerows(rows)
    return file.getvalue().encode()


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def compressed(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, PACKED[ending]) as stream:
        stream.write(data)
    found: bytes = sink.getvalue().to_pybytes()
    return found


#: {kind: (the documents in such a file, data.text_column)}
KINDS: dict[str, tuple[bytes, str]] = {
    ".jsonl": (lines(*({"text": text} for text in DOCUMENTS)), "text"),
    ".json": (json.dumps([{"text": text} for text in DOCUMENTS], indent=1).encode(), "text"),
    ".csv": (table(",", [["n", "text"], *([str(n), text] for n, text in enumerate(DOCUMENTS))]), "text"),
    ".tsv": (table("\t", [["body", "n"], *([text, "NA"] for text in DOCUMENTS)], quoting=csv.QUOTE_ALL), "body"),
    ".parquet": (parquet([{"text": text, "n": n} for n, text in enumerate(DOCUMENTS)]), "text"),
    ".nested.jsonl": (lines(*({"a": {"b": {"c": text}, "n": 1}} for text in DOCUMENTS)), "a.b.c"),
    ".nested.parquet": (parquet([{"a": {"b": {"c": text}, "n": 1}} for text in DOCUMENTS]), "a.b.c"),
    ".dotted.csv": (table(",", [["a.b", "a"], *([text, ""] for text in DOCUMENTS)]), "a.b"),
}


@pytest.mark.parametrize("packed", ["", *PACKED])
def test_the_same_text_of_every_kind_is_the_same_documents(packed: str, tmp_path: Path) -> None:
    for kind, (data, column) in KINDS.items():
        path = tmp_path / f"a{kind}{packed}"
        path.write_bytes(compressed(data, packed) if packed else data)
        assert list(TextFiles([path], column)) == DOCUMENTS, path.name
    for number, text in enumerate(DOCUMENTS):
        data = text.encode()
        (tmp_path / f"{number}.txt{packed}").write_bytes(compressed(data, packed) if packed else data)
    assert list(TextFiles([tmp_path / f"*.txt{packed}"])) == DOCUMENTS


def test_the_same_text_is_the_same_blocks(tmp_path: Path, local_model: Path) -> None:
    """Files of every kind, streamed files, a folder that `datasets` reads, and what Python callers hand over."""
    tokenizer, texts = AutoTokenizer.from_pretrained(local_model), DOCUMENTS[:-1]
    expected = pack(texts, tokenizer, 16)[:]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    rows = [{"data": {"text": text}} for text in texts]
    files = {
        "b.csv.gz": compressed(table(",", [["data.text"], *([text] for text in texts)]), ".gz"),
        "c.jsonl.zst": compressed(lines(*rows), ".zst"),
        "d.parquet": parquet(rows),
        "set/train.jsonl": lines(*rows),
    }
    (tmp_path / "set").mkdir()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    given = {name: TextFiles([tmp_path / name], "data.text") for name in files}
    given |= {"txt": TextFiles([tmp_path / f"{number}.txt" for number in range(len(texts))])}
    folder = str(tmp_path / "set")
    given |= {"folder": load_documents(folder, text_column="data.text", cache_dir=str(tmp_path / "cache"))}
    for source in (local_source([tmp_path / "c.jsonl.zst"], "data.text"), hub_source(folder, None, "data.text")):
        stream = DocumentStream(source, seed=0, window=1)
        given[f"stream {len(given)}"] = [stream.take() for _ in texts]
    for python in ([{"text": text} for text in texts], datasets.Dataset.from_list([{"text": text} for text in texts])):
        given[f"python {len(given)}"] = documents_or_blocks(python, "texts")
    for name, documents in given.items():
        assert pack(documents, tokenizer, 16)[:] == expected, name


def test_a_name_says_what_kind_of_file_it_is() -> None:
    assert [is_text_name(name) for name in ("a.CSV", "a.b.Jsonl.GZ", "a.txt.zst")] == [True] * 3
    assert [is_text_name(name) for name in ("a.gz", "a.csv.bz2", "csv", ".zst", "a.tar.gz")] == [False] * 5
    assert [short_name(Path(name)) for name in ("d/a.b.csv.gz", "a.b.csv", "a.txt")] == ["a.b", "a.b", "a"]


def test_parts_of_a_packed_file_one_after_the_other(tmp_path: Path) -> None:
    for ending in PACKED:
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(compressed(lines({"text": "one"}), ending) + compressed(lines({"text": "two"}), ending))
        assert list(TextFiles([path])) == ["one", "two"]


GOOD = lines(*({"text": f"document {n}"} for n in np.random.default_rng(0).integers(0, 2**62, 2000).tolist()))
WHOLE = {ending: compressed(GOOD, ending) for ending in PACKED}
BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "the beginning": lambda data: data[:7],
    "more after it": lambda data: data + b"more",
    "not packed": lambda data: GOOD,
}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("name", BROKEN)
def test_a_packed_file_that_is_not_whole_is_named(ending: str, name: str, tmp_path: Path) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(BROKEN[name](WHOLE[ending]))
    with pytest.raises(DataError, match=f"a.jsonl{ending}: not a whole {PACKED[ending]} file .*pack it again"):
        TextFiles([tmp_path / f"a.jsonl{ending}"])


def test_columns_inside_others(tmp_path: Path) -> None:
    """A column's own name comes first; null inside a null is blank, a missing one an error that names all there are."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"a.b": "own", "a": {"b": "inside"}}, {"a": {"b": None}}, {"a": None}, {"a": {"b": "x"}}))
    assert list(TextFiles([path], "a.b")) == ["own", "x"]
    path.write_bytes(lines({"x": {"a": {"b": "inside"}, "a.b": "own"}}))
    assert list(TextFiles([path], "x.a.b")) == ["own"]
    for rows, there in (
        (
            [{"a": {"b": "x"}}, {"a": {"c": "y", "d": {"e": 1}}}],
            "line 2: no column 'a.b' .there are: a.c, a.d.e.*: a.c$",
        ),
        ([{"a": {"b": {"c": "x"}}}], "line 1: column 'a.b' holds other columns, not text .there are: a.b.c.*: a.b.c$"),
        ([{"a": "x"}], "line 1: no column 'a.b' .there are: a.*: a$"),
    ):
        path.write_bytes(lines(*rows))
        with pytest.raises(DataError, match=there):
            TextFiles([path], "a.b")
    (tmp_path / "a.parquet").write_bytes(parquet([{"a": {"c": "y", "d": {"e": 1}}, "t": "z"}]))
    with pytest.raises(DataError, match=r"no column 'a.b' \(there are: a.c, a.d.e, t\); name one .*: a.c, t$"):
        TextFiles([tmp_path / "a.parquet"], "a.b")


def test_unknown_kinds_name_the_known_ones(tmp_path: Path) -> None:
    for name, ending in (("a.docx", ".docx"), ("a.gz", ".gz"), ("a.tar.gz", ".tar.gz"), ("a", "")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError) as error:
            TextFiles([tmp_path / name])
        assert f"unknown kind of file '{ending}'; use {', '.join(READERS)}, each also with .gz" in str(error.value)
