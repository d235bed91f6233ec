"""Text sources are read, packed and split without losing or repeating a token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from npt.data import load_documents, pack, pack_token_ids, split_blocks
from npt.data.streaming import hub_source
from npt.errors import DataError


class Words:
    """A tokenizer of one id per number: BOS 1, EOS 2, numbers from 3."""

    def __init__(self, bos: int | None = 1, eos: int | None = 2, pad: int | None = 0, ends: bool = False) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.ends = bos, eos, pad, ends
        self.seen = 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        self.seen += len(texts)
        head = [] if self.bos_token_id is None else [self.bos_token_id]
        tail = [2] if self.ends else []
        return {"input_ids": [[*head, *(3 + int(word) for word in text.split()), *tail] for text in texts]}


def rows(blocks: datasets.Dataset) -> list[list[int]]:
    return list(blocks["input_ids"])


def test_packing_marks_joins_and_cuts_long_documents() -> None:
    blocks = pack(["0 1", "2 3 4", "5", "6 7 8 9 10 11"], Words(), 5)
    assert rows(blocks) == [[1, 3, 4, 2, 1], [5, 6, 7, 2, 1], [8, 2, 1, 9, 10], [11, 12, 13, 14, 2]]
    no = -100
    assert list(blocks["labels"]) == [[no, 3, 4, 2, no], [5, 6, 7, 2, no], [8, 2, no, 9, 10], [11, 12, 13, 14, 2]]
    assert list(blocks["attention_mask"]) == [[1] * 5] * 4


def test_separator_is_added_once_or_not_at_all() -> None:
    assert rows(pack(["0", "1"], Words(ends=True), 6)) == [[1, 3, 2, 1, 4, 2]]
    blocks = pack(["0 1", "2 3"], Words(bos=None, eos=None), 4)
    assert rows(blocks) == [[3, 4, 5, 6]] and blocks["labels"][0] == [-100, 4, -100, 6]


@pytest.mark.parametrize(("tokenizer", "pad"), [(Words(), 0), (Words(pad=None), 2), (Words(eos=None, pad=None), 0)])
def test_a_remainder_is_padded_when_it_is_all_there_is(tokenizer: Words, pad: int) -> None:
    block = pack(["7"], tokenizer, 6)[0]
    real = sum(block["attention_mask"])
    assert block["attention_mask"] == [1] * real + [0] * (6 - real) and real < 6
    assert block["input_ids"][real:] == [pad] * (6 - real) and block["labels"][real:] == [-100] * (6 - real)


def test_a_remainder_is_dropped_unless_asked_for() -> None:
    assert rows(pack_token_ids([[1, 2, 3, 4, 5]], 3, pad_token_id=0)) == [[1, 2, 3]]
    kept = pack_token_ids([[1, 2, 3, 4, 5]], 3, pad_token_id=9, keep_remainder=True)
    assert rows(kept) == [[1, 2, 3], [4, 5, 9]]
    assert list(kept["labels"]) == [[-100, 2, 3], [4, 5, -100]] and kept[1]["attention_mask"] == [1, 1, 0]
    assert rows(pack_token_ids([[1, 2, 3, 4, 5]], 3, pad_token_id=9, keep_remainder=True, max_blocks=1)) == [[1, 2, 3]]


def test_every_token_is_packed_once_and_in_order() -> None:
    documents = [list(range(10 * n, 10 * n + n % 23)) for n in range(60)]
    flat = [token for document in documents for token in document]
    packed = [token for row in rows(pack_token_ids(documents, 8, pad_token_id=0)) for token in row]
    assert packed == flat[: len(packed)] and 0 <= len(flat) - len(packed) < 8


def test_packing_stops_at_max_blocks_without_reading_on() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "0 1 2 3 " * 1000

    tokenizer = Words()
    assert len(pack(endless(), tokenizer, 4, max_blocks=3)) == 3
    assert tokenizer.seen < 100


def test_packing_errors() -> None:
    for documents in ([], ["", "  \n"]):
        with pytest.raises(DataError, match="no text to pack"):
            pack(documents, Words(), 8)
    with pytest.raises(DataError, match=r"data\.max_length=1"):
        pack(["0"], Words(), 1)
    with pytest.raises(DataError, match="max_blocks=0"):
        pack(["0"], Words(), 8, max_blocks=0)


def test_real_tokenizer_round_trip_without_a_length_warning(pretrained: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    text = "Once upon a time, there was a little girl named Lily. " * 200
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        blocks = pack([text], tokenizer, 64, keep_remainder=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    ids = [t for row in blocks for t, real in zip(row["input_ids"], row["attention_mask"], strict=True) if real]
    assert len(ids) > tokenizer.model_max_length
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert "longer than" not in caplog.text


def test_split_takes_train_from_the_front_and_evaluation_from_the_tail(caplog: pytest.LogCaptureFixture) -> None:
    blocks = pack_token_ids([list(range(40))], 2, pad_token_id=0)
    train, held_out = split_blocks(blocks, 12, 5)
    assert rows(train) == [[2 * n, 2 * n + 1] for n in range(12)]
    assert rows(held_out) == [[2 * n, 2 * n + 1] for n in range(15, 20)]
    assert [len(part) for part in split_blocks(blocks, None, 5)] == [15, 5]
    assert [len(part) for part in split_blocks(blocks, None, None)] == [18, 2]
    assert [len(part) for part in split_blocks(blocks, 20, 0)] == [20, 0]
    assert not caplog.records


@pytest.mark.parametrize(
    ("train", "held_out", "expected"), [(100, 50, (18, 2)), (100, 1, (19, 1)), (12, 10, (12, 8)), (None, 30, (18, 2))]
)
def test_split_of_too_few_blocks_warns(
    train: int | None, held_out: int, expected: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    blocks = pack_token_ids([list(range(40))], 2, pad_token_id=0)
    first, last = split_blocks(blocks, train, held_out)
    assert (len(first), len(last)) == expected
    assert f"20 blocks, fewer than data.num_train_samples={train}" in caplog.text
    assert not set(map(tuple, rows(first))) & set(map(tuple, rows(last)))


def test_split_errors() -> None:
    blocks = pack_token_ids([[1, 2, 3, 4]], 2, pad_token_id=0)
    with pytest.raises(
        DataError, match=r"1 block\(s\) of the 7 or more .*num_train_samples=4, data.num_eval_samples=3"
    ):
        split_blocks(blocks.select([0]), 4, 3)
    for counts in ((0, 1), (1, -1)):
        with pytest.raises(DataError, match="at least 1 block"):
            split_blocks(blocks, *counts)


def test_local_files_of_every_kind_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufefffirst\r\nfile".encode())
    # A line separator inside a string is no end of line; a blank or null document is skipped.
    (tmp_path / "b.jsonl").write_text('{"text": "sec\u2028ond"}\n\n{"text": null}\n{"text": "third"}\n', "utf-8")
    (tmp_path / "c.json").write_text('{"text": "fourth", "n": 1}\n{"text": "fifth", "n": "x"}', "utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["sixth", None], "n": [1, 2]}), tmp_path / "d.parquet")
    (tmp_path / "e[1].TXT").write_text("seventh")
    files = [tmp_path / "e[1].TXT", tmp_path / "a.txt", tmp_path / "*.js*", str(tmp_path / "d.parquet")]
    documents = load_documents("text", data_files=[*files, tmp_path / "a.txt"])
    expected = ["seventh", "first\nfile", "sec\u2028ond", "third", "fourth", "fifth", "sixth"]
    assert list(documents) == list(documents) == expected and len(documents) == 7  # type: ignore[arg-type]


BAD_FILES = [
    ("missing.txt", None, "no such file"),
    ("nothing*.txt", None, "no such file"),
    ("empty.txt", b"", "is empty"),
    ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8 .byte 0xe9 at offset 3."),
    ("binary.txt", b"ab\0cd", "binary, not text .a NUL at offset 2."),
    ("blank.txt", b" \n\t\n", "only white space"),
    ("blank.jsonl", b'{"text": " "}\n', "only white space"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    ("array.jsonl", b'[{"text": "a"}]\n', "line 1: list, not an object"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: not UTF-8"),
    ("column.jsonl", b'{"text": "a"}\n\n{"body": "a", "n": 1}\n', "line 3: no column 'text' .there are: body, n."),
    ("type.jsonl", b'{"text": 3}\n', "line 1: column 'text' holds int"),
    ("torn.parquet", b"PAR1abc", "not a readable parquet"),
    ("note.docx", b"x", "unknown kind of file '.docx'; use .txt"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD_FILES)
def test_bad_files_name_path_and_place(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_documents("text", data_files=[tmp_path / name])
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_every_bad_file_is_named_at_once_though_others_are_good(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text")
    for name, content, _ in BAD_FILES:
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_documents("text", data_files=[tmp_path / "good.txt", *(tmp_path / name for name, _, _ in BAD_FILES)])
    assert all(str(tmp_path / name) in str(caught.value) for name, _, _ in BAD_FILES)
    assert "good" not in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_columns_and_folders(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text' \(there are: body, n\)"):
        load_documents("text", data_files=[tmp_path / "a.parquet"])
    with pytest.raises(DataError, match="column 'n' holds int64"):
        load_documents("text", data_files=[tmp_path / "a.parquet"], text_column="n")
    assert list(load_documents("text", data_files=[tmp_path / "a.parquet"], text_column="body")) == ["a"]
    with pytest.raises(DataError, match="is a folder"):
        load_documents("text", data_files=[tmp_path])


def test_contradictory_sources() -> None:
    with pytest.raises(DataError, match=r"data\.data_files is empty"):
        load_documents("text")
    with pytest.raises(DataError, match=r"needs data.dataset_name=text, not 'some/set'"):
        load_documents("some/set", data_files=["a.txt"])
    with pytest.raises(DataError, match="sample_blocks"):
        load_documents("self")


@pytest.mark.parametrize("error", [ConnectionError("Couldn't\nreach"), ValueError("no config"), RuntimeError("script")])
def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"'no/such', data.dataset_config='c'.*check the name.*dataset_name=text"
    ) as caught:
        load_documents("no/such", dataset_config="c")
    assert "\n" not in str(caught.value)


def test_a_package_that_datasets_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("Compression type zstd not supported"), ImportError("install x")):
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, error=error, **options: next(_raised(error)))
        for read in (load_documents, lambda name: hub_source(name, None, "text")):
            with pytest.raises(DataError, match=r"install what .*zstandard.*which reads .gz and .zst as it is"):
                read("some/set")


def _raised(error: Exception) -> Iterator[Any]:
    raise error
    yield


def test_a_hub_data_set_is_checked_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "", "b"], "n": [1, 2, 3]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table)
    documents = load_documents("some/set")
    assert list(documents) == ["a", "", "b"]
    with pytest.raises(DataError, match=r"no column 'body' \(there are: text, n\)"):
        load_documents("some/set", text_column="body")
    with pytest.raises(DataError, match="column 'n' holds int64"):
        load_documents("some/set", text_column="n")
