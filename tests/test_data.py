"""Sources, packing, splitting and the model's own text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from npt.data import load_documents, pack, pack_token_ids, sample_blocks, split_blocks
from npt.errors import DataError
from tests.conftest import converted, random_base


class Words:
    """A tokenizer of one id per word: BOS 1, EOS 2, words from 3."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *(3 + int(word) for word in text.split())]}


def test_packing_marks_joins_and_cuts_long_documents() -> None:
    blocks = pack(["0 1", "2 3 4", "5"], Words(), 5)
    assert blocks["input_ids"][:] == [[1, 3, 4, 2, 1], [5, 6, 7, 2, 1]]
    assert blocks["labels"][:] == [[1, 3, 4, 2, -100], [5, 6, 7, 2, -100]]
    assert blocks["attention_mask"][:] == [[1] * 5] * 2


def test_a_remainder_is_padded_only_when_asked_or_alone() -> None:
    assert len(pack_token_ids([[1, 2, 3, 4]], 3, pad_token_id=0)) == 1
    kept = pack_token_ids([[1, 2, 3, 4, 5]], 3, pad_token_id=0, keep_remainder=True)
    assert kept["input_ids"][:] == [[1, 2, 3], [4, 5, 0]]
    assert kept["labels"][:] == [[1, 2, 3], [4, 5, -100]] and kept["attention_mask"][1] == [1, 1, 0]
    alone = pack(["0"], Words(), 6)
    assert alone["input_ids"][:] == [[1, 3, 2, 0, 0, 0]]


def test_packing_stops_at_max_blocks_without_reading_on() -> None:
    def endless() -> Any:
        while True:
            yield "0 1 2 3"

    assert len(pack(endless(), Words(), 4, max_blocks=3)) == 3


def test_every_token_is_packed_once_and_in_order() -> None:
    documents = [list(range(10 * n, 10 * n + 1 + n % 7)) for n in range(40)]
    flat = [token for document in documents for token in document]
    blocks = pack_token_ids(documents, 8, pad_token_id=0)
    packed = [token for row in blocks["input_ids"][:] for token in row]
    assert packed == flat[: len(packed)] and len(flat) - len(packed) < 8


@pytest.mark.parametrize("documents,length", [([], 8), (["", "  \n"], 8)])
def test_nothing_to_pack(documents: list[str], length: int) -> None:
    with pytest.raises(DataError, match="no text to pack"):
        pack(documents, Words(), length)


def test_block_too_short() -> None:
    with pytest.raises(DataError, match="max_length=1"):
        pack(["0"], Words(), 1)


def test_split_never_overlaps(caplog: pytest.LogCaptureFixture) -> None:
    blocks = pack_token_ids([list(range(40))], 2, pad_token_id=0)
    train, held_out = split_blocks(blocks, 12, 5)
    assert train["input_ids"][0] == [0, 1] and len(train) == 12
    assert held_out["input_ids"][:] == [[2 * n, 2 * n + 1] for n in range(15, 20)]
    train, held_out = split_blocks(blocks, 100, 50)
    assert (len(train), len(held_out)) == (18, 2) and "num_train_samples=100" in caplog.text
    with pytest.raises(DataError, match=r"fills 1 block"):
        split_blocks(blocks.select([0]), 1, 1)


def test_local_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\nfile", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n{"text": "third"}\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fourth"], "n": [1]}), tmp_path / "c.parquet")
    files = [tmp_path / "a.txt", tmp_path / "*.jsonl", tmp_path / "c.parquet"]
    assert load_documents("text", data_files=files) == ["first\nfile", "second", "third", "fourth"]


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", b"", "is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "byte 3 is not UTF-8"),
        ("binary.txt", b"ab\0cd", "NUL bytes"),
        ("blank.txt", b" \n\t\n", "nothing but white space"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not a JSON object"),
        ("column.jsonl", b'{"body": "a"}\n', "line 1: no column 'text' .it has body"),
        ("type.jsonl", b'{"text": 3}\n', "line 1: column 'text' is int"),
        ("torn.parquet", b"PAR1abc", "not a readable parquet"),
        ("note.docx", b"x", "unknown kind '.docx'"),
    ],
)
def test_bad_files_name_path_and_place(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_documents("text", data_files=[path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"no such file.*is empty"):
        load_documents("text", data_files=[tmp_path / "m.txt", tmp_path / "e.txt"])


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="can't be loaded.*dataset_name=text") as caught:
        load_documents("no-such/dataset-anywhere")
    assert "\n" not in str(caught.value)


TOKENIZER = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def test_sampling_is_the_models_own_distribution() -> None:
    """Second tokens follow softmax of the first logits, though generation_config asks for something else."""
    base = random_base("llama", torch.float32)
    base.generation_config.update(do_sample=False, top_k=1, temperature=0.1, repetition_penalty=5.0, max_new_tokens=2)
    blocks = sample_blocks(base, TOKENIZER, 4000, 2, seed=0, batch_size=1000)
    counts = torch.bincount(torch.tensor(blocks["input_ids"][:])[:, 1], minlength=96)
    with torch.no_grad():
        expected = base(torch.tensor([[1]])).logits[0, -1].softmax(-1) * 4000
    likely = expected > 5
    chi_square = ((counts - expected).square() / expected)[likely].sum()
    assert chi_square < likely.sum() + 5 * (2 * likely.sum()) ** 0.5


def test_sampling_is_seeded_and_leaves_the_global_state_alone() -> None:
    base = random_base("llama", torch.float32)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = sample_blocks(base, TOKENIZER, 5, 12, seed=0, label="train")["input_ids"][:]
    assert torch.equal(torch.rand(3), expected)
    assert one == sample_blocks(base, TOKENIZER, 5, 12, seed=0, label="train")["input_ids"][:]
    for seed, label in ((1, "train"), (0, "eval")):
        assert one != sample_blocks(base, TOKENIZER, 5, 12, seed=seed, label=label)["input_ids"][:]
    assert all(row[0] == 1 and len(row) == 12 for row in one)


def test_a_converted_model_samples_the_originals_text() -> None:
    base = random_base("llama", torch.float32)
    expected = sample_blocks(base, TOKENIZER, 4, 10, seed=3)["input_ids"][:]
    model = converted("llama", torch.float32)
    assert sample_blocks(model, TOKENIZER, 4, 10, seed=3)["input_ids"][:] == expected


def test_what_follows_a_separator_does_not_count() -> None:
    from npt.data.sampling import _as_dataset

    rows = _as_dataset(torch.tensor([[1, 5, 2, 7, 1, 8, 9]]), {1, 2})
    assert rows["labels"][0] == [1, 5, 2, -100, 1, -100, 9]


def test_sampled_text_is_cached_by_weights(tmp_path: Path) -> None:
    base = random_base("llama", torch.float32)
    arguments: dict[str, Any] = {"seed": 0, "cache_dir": str(tmp_path)}
    first = sample_blocks(base, TOKENIZER, 4, 10, **arguments)["input_ids"][:]
    (folder,) = tmp_path.iterdir()
    state = json.loads((folder / "state.json").read_text())
    assert state
    assert sample_blocks(base, TOKENIZER, 4, 10, **arguments)["input_ids"][:] == first
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    sample_blocks(base, TOKENIZER, 4, 10, **arguments)
    assert len(list(tmp_path.iterdir())) == 2


def test_context_limit_and_missing_start_token() -> None:
    base = random_base("llama", torch.float32)
    with pytest.raises(DataError, match="max_length=129: use 2 to the model's context length, 128"):
        sample_blocks(base, TOKENIZER, 1, 129, seed=0)
    base.config.bos_token_id = None
    with pytest.raises(DataError, match="neither BOS nor EOS"):
        sample_blocks(base, SimpleNamespace(bos_token_id=None, eos_token_id=None), 1, 8, seed=0)
