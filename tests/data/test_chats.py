"""Chats are read in their forms, written by the tokenizer's template, and scored whole or by their replies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import NPTConfig, Objective, calibrate, evaluate
from npt.cli import main
from npt.data import load_documents, pack
from npt.data.batches import batches_of, with_mask
from npt.data.chats import Chat, chat_ids
from npt.data.inputs import as_batches, documents_or_blocks
from npt.data.seen import Seen, TextRecord
from npt.data.sources import TextFiles
from npt.data.streaming import BlockStream, DocumentStream, hub_source, local_source
from npt.errors import DataError
from tests.helpers import settings, trainer

HEAD = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
#: The same text, without marks and with marks around the replies.
PLAIN = HEAD + "{{ m.content }}<end>\n{% endfor %}" + PROMPT
MARKED = HEAD + (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<end>\n{% endif %}{% endfor %}"
) + PROMPT  # fmt: skip


def chat(number: int = 0) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Is {number} a number, or {number + 1}?"},
        {"role": "assistant", "content": f" Ünïcödé {number} 🙂"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "\nBoth are."},
    ]


def shared(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The chat in ShareGPT's form."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


def file(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(local_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(local_model, chat_template=PLAIN)


CHATS = [chat(number) for number in range(12)]


def test_the_same_chats_in_every_form_are_the_templates_tokens(tmp_path: Path, tokenizer: Any) -> None:
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in CHATS]
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    expected = pack(documents_or_blocks([{"messages": messages} for messages in CHATS], "x"), tokenizer, 64)
    flat = [i for row in expected["input_ids"] for i in row]
    assert flat == ids[: len(flat)] and len(ids) - len(flat) < 64
    parquet = {"messages": CHATS, "data": [{"conversations": shared(messages)} for messages in CHATS]}
    pyarrow.parquet.write_table(pyarrow.table(parquet), tmp_path / "b.parquet")
    rows = [{"id": 1, "conversations": shared(messages)} for messages in CHATS]
    lists = [{"messages": {k: [m[k] for m in messages] for k in ("role", "content")}} for messages in CHATS]
    parts = [[{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages] for messages in CHATS]
    folder = str(file(tmp_path / "set" / "train.jsonl", *rows).parent)
    given = {
        "openai": TextFiles([file(tmp_path / "a.jsonl", *({"text": None, "messages": m} for m in CHATS))]),
        "parquet": TextFiles([tmp_path / "b.parquet"]),
        "nested": TextFiles([tmp_path / "b.parquet"], "data.conversations"),
        "named": TextFiles([file(tmp_path / "c.jsonl", *({"x": m, "messages": "no"} for m in CHATS))], "x"),
        "lists": TextFiles([file(tmp_path / "d.jsonl", *lists)]),
        "parts": TextFiles([file(tmp_path / "e.jsonl", *({"messages": m} for m in parts))]),
        "sharegpt": load_documents(folder, cache_dir=str(tmp_path / "cache")),
        "chats": documents_or_blocks(CHATS, "x"),
        "data set": documents_or_blocks(datasets.Dataset.from_list(rows), "x"),
    }
    for source in (local_source([tmp_path / "a.jsonl"], "text"), hub_source(folder, None, "text")):
        stream = DocumentStream(source, seed=0, window=1)
        given[f"stream {len(given)}"] = [stream.take() for _ in CHATS]
    for name, documents in given.items():
        assert pack(documents, tokenizer, 64)[:] == expected[:], name
    one = documents_or_blocks(CHATS[0], "x")
    assert pack(one, tokenizer, 8)[:] == pack(documents_or_blocks({"messages": CHATS[0]}, "x"), tokenizer, 8)[:]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_replies_are_what_is_written_after_their_prompts(template: str, tokenizer: Any, pretrained: Path) -> None:
    """Marks of the template and the texts of the chat's beginnings name the same tokens, of bytes and of words."""
    for found in (tokenizer, AutoTokenizer.from_pretrained(pretrained)):
        found.chat_template = template
        ids, scored = chat_ids(Chat(chat()), found, "replies")
        assert ids == chat_ids(Chat(chat()), found)[0] == found.apply_chat_template(chat())["input_ids"]
        text = found.decode([i for i, counts in zip(ids, scored, strict=True) if counts])
        assert text.replace(" ", "") == "Ünïcödé0🙂<end>\n\nBothare.<end>\n"


def test_labels_of_replies(tokenizer: Any) -> None:
    documents = list(documents_or_blocks(CHATS, "x"))
    every, replies = (pack(documents, tokenizer, 128, score=score) for score in ("all", "replies"))
    assert every["input_ids"][:] == replies["input_ids"][:] and "starts" not in every.column_names
    labels = np.array(replies["labels"][:])
    scored = labels != -100
    assert (labels[scored] == np.array(replies["input_ids"][:])[scored]).all()
    text = tokenizer.decode(labels[scored].tolist())
    assert text.startswith(" Ünïcödé 0 🙂<end>\n\nBoth are.<end>\n Ünïcödé 1") and "number" not in text
    starts = np.array(replies["input_ids"][:]) == tokenizer.bos_token_id
    assert (np.array(replies["starts"][:]).astype(bool) == starts).all() and starts.sum() > 9
    for bad in ("reply", "", "ALL"):
        with pytest.raises(DataError, match="use all or replies"):
            pack(documents, tokenizer, 64, score=bad)


def test_text_is_known_by_its_content_whatever_is_scored(tokenizer: Any) -> None:
    documents = [*documents_or_blocks(CHATS, "x"), "some text between the chats", *documents_or_blocks(CHATS, "x")]
    for bos in (False, True):
        every, replies = (
            pack(documents, tokenizer, 128, score=score, begin_with_bos=bos) for score in ("all", "replies")
        )
        seen = Seen().add(every)
        assert seen.hashes.tolist() == Seen().add(replies).hashes.tolist()
        assert seen.hashes.tolist() != Seen().add(replies.remove_columns("starts")).hashes.tolist()
        assert seen.covers(replies).all()
        record = TextRecord()
        for batch in batches_of(replies, len(replies), torch.device("cpu")):
            record.add_batch(with_mask(batch))
        assert record.trained.hashes.tolist() == seen.hashes.tolist()


def test_blocks_without_a_reply_are_left_out(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "word " * 100}]
    documents = list(documents_or_blocks([question, *CHATS[:1], question], "x"))
    blocks = pack(documents, tokenizer, 32, score="replies")
    assert 0 < len(blocks) < 5 and all(max(labels[1:]) >= 0 for labels in blocks["labels"])
    assert tokenizer.decode([i for row in blocks["labels"] for i in row if i >= 0]).endswith("Both are.<end>\n")
    with pytest.raises(DataError, match="the chats hold no reply, and data.score=replies scores nothing else"):
        pack([documents[0]], tokenizer, 32, score="replies")
    with pytest.raises(DataError, match="the chats hold no reply"):
        pack([documents[0]], tokenizer, 4096, score="replies")

    def stream(*chats: Any) -> BlockStream:
        path = file(tmp_path / f"{len(chats)}.jsonl", *({"messages": messages} for messages in chats))
        return BlockStream(
            DocumentStream(local_source([path], "text"), seed=0, window=4), tokenizer, 32, score="replies"
        )

    both, again = stream(question, *CHATS[:2], question), stream(question, *CHATS[:2], question)
    for _ in range(6):
        both.take()
    again.load_state_dict(json.loads(json.dumps(both.state_dict())))
    for one, other in [(both.take(), again.take()) for _ in range(30)]:
        assert (one["labels"][1:] >= 0).any() and all(torch.equal(one[name], other[name]) for name in one)
    monkeypatch.setattr("npt.data.streaming.MOST_UNSCORED", 50)
    with pytest.raises(DataError, match="50 blocks in a row of the streamed chats hold no reply"):
        stream(question).take()


#: A template of each kind that hides where the replies are, and a chat for it.
HIDING = {
    "it drops what a later turn makes old": (
        HEAD + "{{ m.content if loop.last else m.content.split('x')[-1] }}{% endfor %}" + PROMPT,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1x2"}, {"role": "user", "content": "b"}],
    ),
    "its prompt is not in the chat": (
        HEAD + "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}",
        chat(),
    ),
    "it begins with a count": ("{{ messages | length }}" + HEAD + "{{ m.content }}{% endfor %}" + PROMPT, chat()),
    "the reply comes first": (PLAIN, [{"role": "assistant", "content": "Hello."}]),
}


@pytest.mark.parametrize("name", HIDING)
def test_replies_that_can_not_be_told_are_refused(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template, messages = HIDING[name]
    assert chat_ids(Chat(messages), tokenizer)[0]
    with pytest.raises(DataError, match=r"message \d: data.score=replies can't tell the reply .*use data.score=all"):
        chat_ids(Chat(messages, "a.jsonl, line 3"), tokenizer, "replies")


def test_templates_that_do_not_take_a_chat(tokenizer: Any, tmp_path: Path) -> None:
    """Their own message is shown, and what they can do is write text: Jinja's sandbox holds them."""
    for template, why in (
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[9].content }}", "has no"),
        (f"{{{{ ''.__class__.__mro__[1].__subclasses__()[0]('{tmp_path}') }}}}", "unsafe"),
        ("{% for", "unexpected|expected"),
    ):
        tokenizer.chat_template = template
        for score in ("all", "replies"):
            with pytest.raises(DataError, match=f"x, line 1: .*does not take this chat .*({why})") as error:
                chat_ids(Chat(chat(), "x, line 1"), tokenizer, score)
            assert "\n" not in str(error.value)


def test_calls_of_tools_go_to_the_template(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% for t in tools %}[{{ t.function.name }}{% if t.function.x is defined %}!{% endif %}]{% endfor %}"
        "{% for m in messages %}{% if m.content is defined %}{{ m.content }}{% else %}?{% endif %}"
        "{% for c in m.tool_calls %}({{ c.name }}){% endfor %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "id": None}]},
        {"role": "tool", "content": "b", "name": "f"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "x": None}}]
    for rows in ({"messages": messages, "tools": tools}, {"messages": messages, "tools": json.dumps(tools)}):
        blocks = pack(TextFiles([file(tmp_path / "a.jsonl", rows)]), tokenizer, 8)
        assert tokenizer.decode(blocks["input_ids"][0]) == "[f]a?(f)"


def test_chats_whose_messages_differ_in_their_keys(tokenizer: Any, tmp_path: Path) -> None:
    """`datasets` keeps them as JSON, or with a null for every key of another message."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    rows = [{"messages": chat()}, {"messages": [*chat(1), call]}]
    path = file(tmp_path / "set" / "train.jsonl", *rows)
    found = load_documents(str(path.parent), cache_dir=str(tmp_path / "cache"))
    datasets.load_dataset(str(path.parent), split="train", cache_dir=str(tmp_path / "cache")).to_parquet(
        tmp_path / "a.parquet"
    )
    expected = [document.messages for document in TextFiles([path])]  # type: ignore[union-attr]
    for documents in (found, TextFiles([tmp_path / "a.parquet"]), TextFiles([tmp_path / "a.parquet"], "messages")):
        assert [document.messages for document in documents] == expected  # type: ignore[union-attr]


@pytest.fixture
def model(local_model: Path) -> Any:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(local_model), NPTConfig(npt_layers=[2], rank=2))


def test_evaluate_and_calibrate_take_chats(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": m} for m in CHATS]
    path = file(tmp_path / "a.jsonl", *rows)
    tokens, blocks = set(), pack(documents_or_blocks(CHATS, "x"), tokenizer, 16, score="replies")
    for texts in (rows, path):
        protocol = evaluate(model, tokenizer, texts, context_length=16, prompts=[], score="replies")["protocol"]
        assert protocol["scored"] == "all tokens but the first, of chats the assistant's replies alone"
        tokens.add((protocol["tokens"], calibrate(model, texts, tokenizer=tokenizer)["layer_2"]["tokens"]))
    every = sum(len(tokenizer.apply_chat_template(m)["input_ids"]) for m in CHATS)
    counted = int((np.array(blocks["labels"][:])[:, 1:] >= 0).sum())
    assert tokens == {(counted, every // 128 * 128)} and counted < every / 2
    whole = evaluate(model, tokenizer, {"chats": CHATS}, context_length=16, prompts=[])["protocol"]
    assert whole["tokens"] > counted and whole["scored"] == "all tokens but the first"
    assert len(list(as_batches(CHATS[0], tokenizer, 16, "x"))) == 1
    tokenizer.chat_template = None
    with pytest.raises(
        DataError, match="evaluate: corpus 'text', chat 1: is a chat, and the tokenizer has no chat template"
    ):
        evaluate(model, tokenizer, CHATS, context_length=16, prompts=[])


@pytest.mark.parametrize("objective", ["local", "logits"])
def test_training_counts_replies_alone(objective: str, tmp_path: Path) -> None:
    """The loss is the mean of the positions that have labels."""
    run = trainer(tmp_path)
    ids = torch.randint(3, 96, (1, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[:, 9:12] = True
    term = Objective(objective)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    term.prepare(run.model, {**rows, "labels": ids})
    losses = [
        float(term(run.model, {**rows, "labels": torch.where(m, ids, -100)}, float(m.sum())).equivalence)
        for m in (mask, mask.roll(1), mask | mask.roll(1))
    ]
    assert len(set(losses)) == 3 and min(losses[:2]) < losses[2] < max(losses[:2])


@pytest.mark.usefixtures("quick_reports")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_on_chats(streaming: bool, local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains on replies, leaves out of the evaluation what it trained on, and refuses text in place of chats."""
    base = Path(shutil.copytree(local_model, tmp_path / "base"))
    (base / "chat_template.jinja").write_text(MARKED)
    rng = np.random.default_rng(0)
    rows = [{"messages": chat(int(n))} for n in rng.integers(0, 2**60, 120)]
    path, other = file(tmp_path / "a.jsonl", *rows), file(tmp_path / "b.jsonl", *rows[:3], {"messages": chat(5)})
    (tmp_path / "prose.txt").write_text("Prose to calibrate on beside the chats. " * 20)
    keys = {
        "data__calibration_files": f"[{tmp_path / 'prose.txt'}]",
        "data__dataset_name": "text", "data__data_files": f"[{path}]", "data__eval_texts": f"[{other}]",
        "data__score": "replies", "data__streaming": str(streaming).lower(), "training__num_train_steps": 2,
    }  # fmt: skip
    assert main(["--quiet", "train", *settings(base, tmp_path, **keys)]) == 0
    report = json.loads((tmp_path / "outputs" / "evaluation_report.json").read_text())
    assert report["protocol"]["scored"].endswith("of chats the assistant's replies alone")
    figures = report["evaluations"]["corpora"]
    assert all(figures[name]["tokens"] < report["protocol"]["blocks"][name] * 31 * 0.8 for name in figures)
    assert any("b.jsonl were trained on and are left out" in note for note in report["notes"]), report["notes"]
    capsys.readouterr()
    keys["data__data_files"] = f"[{file(tmp_path / 'c.jsonl', {'text': 'words ' * 3000})}]"
    assert main(["--quiet", "train", *settings(base, tmp_path / "again", **keys)]) == 2
    assert "c.jsonl: is text, and data.score=replies is for chats" in capsys.readouterr().err
