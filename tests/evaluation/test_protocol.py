"""What a report says of the scored text itself: unknown tokens, and blocks that begin with BOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from npt import NPTConfig, evaluate
from npt.cli import main
from npt.data import pack
from npt.data.packing import IGNORED
from npt.data.streaming import BlockStream, DocumentStream, local_source
from npt.errors import DataError
from npt.report.compare import _grade
from tests.helpers import random_base, settings

KNOWN = "a b c d e f g h i j k l"


def words(**special: str) -> Any:
    """A tokenizer of single known words; every other word is <unk>."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *KNOWN.split()]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", **special}
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[2], rank=2))


def report_on(model: Any, texts: Any, tokenizer: Any = None, **more: Any) -> dict[str, Any]:
    return evaluate(model, tokenizer or words(), texts, **{"context_length": 8, "prompts": [], **more})


def test_unknown_tokens_are_counted_and_the_grade_says_so(model: Any) -> None:
    text = " ".join([KNOWN] * 4)
    strange = text.replace("a", "\u3042").replace("b", "\u3044")
    report = report_on(model, {"strange": [strange], "plain": [text]})
    shares = [figures["unknown_tokens"] for figures in report["evaluations"]["corpora"].values()]
    assert 0.1 < shares[0] < 0.25 and shares[1] == 0
    said = [note for note in report["notes"] if "unknown token" in note]
    assert len(said) == 1 and said[0].startswith(f"{100 * shares[0]:.2g} % of the scored tokens of strange are")
    assert "on text of which the vocabulary does not know" in report["grade"]["text"]
    assert _grade(report).endswith(" (?)") and not _grade(report_on(model, [text])).endswith("?)")
    assert "does not know" not in report_on(model, {"plain": [text], "strange": [strange]})["grade"]["text"]


def test_up_to_one_per_cent_is_not_worth_a_note(model: Any) -> None:
    text = " ".join([KNOWN] * 40).replace("a", "\u3042", 3)
    report = report_on(model, [text])
    assert 0 < report["evaluations"]["corpora"]["text"]["unknown_tokens"] <= 0.01
    assert not [note for note in report["notes"] if "unknown token" in note]


def test_an_end_of_text_that_is_called_unknown_is_not_unknown(model: Any) -> None:
    """GPT-2's tokenizer has one token for BOS, EOS and UNK."""
    report = report_on(model, ["a b c"] * 20, words(unk_token="</s>", eos_token="</s>"))
    assert report["evaluations"]["corpora"]["text"]["unknown_tokens"] == 0


def test_blocks_that_begin_with_bos_are_counted_per_corpus(model: Any) -> None:
    long, bos = [" ".join([KNOWN] * 4)], [[1, 4, 5, 6, 7, 8, 9, 10]] * 3
    protocol = report_on(model, {"long": long, "blocks": bos})["protocol"]
    assert protocol["blocks"] == {"long": 6, "blocks": 3} and protocol["blocks_beginning_with_bos"] == {
        "long": 0,
        "blocks": 3,
    }
    protocol = report_on(model, {"long": long}, begin_with_bos=True)["protocol"]
    assert protocol["blocks_beginning_with_bos"] == protocol["blocks"] == {"long": 7}


@pytest.mark.parametrize("own", [False, True])
def test_every_block_begins_with_bos_and_no_token_is_lost(own: bool, local_model: Path) -> None:
    """own: the tokenizer puts a BOS of its own before each document, which is not doubled."""
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    documents = [("<s>" if own else "") + f"document {n} with some text" for n in range(12)]
    plain, begun = pack(documents, tokenizer, 16), pack(documents, tokenizer, 16, begin_with_bos=True)
    ids, labels = np.array(begun["input_ids"]), np.array(begun["labels"])
    assert (ids[:, 0] == 1).all() and not (ids[:, :-1] == 1)[ids[:, 1:] == 1].any()
    flat = [token for row in begun["input_ids"] for token in row]
    text = tokenizer.decode(flat, skip_special_tokens=True)
    assert tokenizer.decode(np.ravel(plain["input_ids"]).tolist(), skip_special_tokens=True).startswith(text[:200])
    assert (labels[:, 1] == IGNORED).sum() >= len(ids) - (12 if own else 0)


def test_a_stream_and_a_packer_cut_alike(local_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {n} of a stream"}}\n' for n in range(30)))
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    stream = DocumentStream(local_source([str(tmp_path / "a.jsonl")], "text"), seed=0, window=1)
    blocks = BlockStream(stream, tokenizer, 16, bos_token_id=1)
    taken = [blocks.take() for _ in range(20)]
    packed = pack([f"document {n} of a stream" for n in range(30)], tokenizer, 16, begin_with_bos=True)
    assert [block["input_ids"].tolist() for block in taken] == packed["input_ids"][:20]
    assert [block["labels"].tolist() for block in taken] == packed["labels"][:20]
    state, after = blocks.state_dict(), blocks.take()
    again = BlockStream(DocumentStream(stream.source, seed=0, window=1), tokenizer, 16, bos_token_id=1)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert torch.equal(again.take()["input_ids"], after["input_ids"])


def test_a_tokenizer_without_bos_is_named() -> None:
    with pytest.raises(DataError, match="data.begin_with_bos=true: the tokenizer has no BOS token"):
        pack(["a b"], words(bos_token=None), 4, begin_with_bos=True)


@pytest.mark.usefixtures("quick_reports")
def test_the_option_of_a_run(local_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"Line {n * n} is {n} lines long.\n" for n in range(90)))
    more = {"data__dataset_name": "text", "data__data_files": f"[{tmp_path / 'a.txt'}]", "training__num_train_steps": 0}
    found = []
    for value in ("false", "true"):
        arguments = settings(local_model, tmp_path / value, **more, data__begin_with_bos=value)
        assert main(["--quiet", "train", *arguments]) == 0
        report = json.loads((tmp_path / value / "outputs" / "evaluation_report.json").read_text())
        found.append(report["protocol"]["blocks_beginning_with_bos"]["text"])
    assert found == [0, 8]
