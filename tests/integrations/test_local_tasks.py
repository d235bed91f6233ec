"""Tasks for lm-evaluation-harness out of text: which words are asked for, and what a folder of them holds."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from npt.cli import main
from npt.errors import DataError, NPTError
from npt.integrations.local_tasks import ANSWER_WORDS, CHOICES, _last_word, _passages, make_tasks

ANIMALS = ["cat", "dog", "fox", "hen", "cow", "pig", "bee", "ant", "owl", "elk"]


def written(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def story(sentences: int) -> str:
    """Sentences of nine words, no two alike."""
    lines = (
        f"The {ANIMALS[n % 10]} number {n} went from town to the {ANIMALS[n // 10 % 10]}." for n in range(sentences)
    )
    return " ".join(lines)


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def asked(folder: Path, text: str, name: str, words: int = 4, items: int = 4) -> list[tuple[str, str]]:
    """(context, answer) of every passage of a text, in its order; as many items are asked for as there are."""
    folder.mkdir()
    make_tasks(folder / "tasks", [written(folder, text)], items=items, words=words)
    rows = rows_of(folder / "tasks", name)
    found = [(row["context"], row["word"] if name == "cloze" else row["choices"][row["answer"]]) for row in rows]
    return sorted(found, key=lambda pair: text.index(" ".join(pair)))


def test_a_cloze_asks_for_the_last_word_of_a_sentence() -> None:
    """With its mark joined to it or, as in WikiText, apart; not for numbers, unknown words, or a word that begins a line."""
    text = (
        "one two three four end. a b c d\nline. a b c d 1984. a b c d <unk> . one two three\nfour split . "
        "now say it to \u201cfriend.\u201d the last of all words!) No more than this."
    )
    assert [(each.context, each.answer) for each in _passages(text, 4, _last_word)] == [
        ("one two three four", "end"),
        ("one two three\nfour", "split"),
        ("the last of all", "words"),
    ]


def test_a_continuation_begins_a_sentence_and_stays_in_its_paragraph(tmp_path: Path) -> None:
    text = "Zero zero zero zero ends here. It goes on.\n\nAnother paragraph follows in quite some words here. "
    found = asked(tmp_path / "a", text + story(12), "continuation", words=6)
    assert all("paragraph" not in answer for _, answer in found)
    for context, answer in found:
        assert context.endswith(".") and answer.startswith("The ")
        assert (len(context.split()), len(answer.split())) == (6, ANSWER_WORDS)


@pytest.mark.parametrize("name", ["cloze", "continuation"])
def test_passages_stand_in_the_text_and_share_no_word(name: str, tmp_path: Path) -> None:
    text = story(60)
    pairs = asked(tmp_path / "a", text, name, words=12, items=20)
    assert len(pairs) == 20
    spans = sorted((text.index(f"{context} {answer}"), len(f"{context} {answer}")) for context, answer in pairs)
    assert all(start + length <= after for (start, length), (after, _) in pairwise(spans))
    assert all(len(context.split()) == 12 for context, _ in pairs)


def test_the_wrong_choices_are_continuations_of_other_passages(tmp_path: Path) -> None:
    text = story(60)
    make_tasks(tmp_path / "tasks", [written(tmp_path, text)], items=20, words=12)
    rows = rows_of(tmp_path / "tasks", "continuation")
    for row in rows:
        assert len(set(row["choices"])) == CHOICES and all(choice in text for choice in row["choices"])
        follows = [f"{row['context']} {choice}" in text for choice in row["choices"]]
        assert follows == [number == row["answer"] for number in range(CHOICES)]
    assert {row["answer"] for row in rows} == set(range(CHOICES))


def test_a_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    text = written(tmp_path, story(60))
    names = ("cloze.jsonl", "continuation.jsonl")
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_tasks(tmp_path / folder, [text], items=12, words=12, seed=seed)
    same, other, third = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in "abc")
    assert same == other and all(one != two for one, two in zip(same, third, strict=True))
    task = yaml.safe_load((tmp_path / "c" / "cloze.yaml").read_text(encoding="utf-8"))
    assert task["metadata"] == {"version": 1.0, "text": [str(text)], "items": 12, "words": 12, "seed": 1}
    assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "c" / "cloze.jsonl")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        [*names, "cloze.yaml", "continuation.yaml"]
    )


def test_too_little_text_names_what_there_is_room_for(tmp_path: Path) -> None:
    text = written(tmp_path, story(20))
    with pytest.raises(
        DataError, match=r"text\.txt: has \d+ passages .* --items 50 needs 50: .* or --items \d+$"
    ) as told:
        make_tasks(tmp_path / "tasks", [text], items=50, words=6)
    assert not (tmp_path / "tasks").exists()
    (room,) = re.findall(r"or --items (\d+)", str(told.value))
    make_tasks(tmp_path / "tasks", [text], items=int(room), words=6)
    assert len(rows_of(tmp_path / "tasks", "cloze")) == int(room)
    with pytest.raises(DataError, match=r"has 0 passages .* fewer words with --words$"):
        make_tasks(tmp_path / "more", [text], items=2, words=500)


def test_equal_continuations_count_once(tmp_path: Path) -> None:
    text = written(tmp_path, "The same few words come again and again here. " * 60)
    with pytest.raises(DataError, match="has 1 passages for the task continuation"):
        make_tasks(tmp_path / "tasks", [text], items=4, words=6)


def test_a_chat_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    chat.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    with pytest.raises(DataError, match="document 1 is a chat"):
        make_tasks(tmp_path / "tasks", [chat])
    with pytest.raises(NPTError, match="is there and not empty; name a new folder"):
        make_tasks(tmp_path, [written(tmp_path, story(60))], items=4, words=6)


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = written(tmp_path, story(60))
    arguments = ["--items", "10", "--words", "12", "--text", str(text)]
    assert main(["make-tasks", str(tmp_path / "tasks"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"cloze: 10 items, of \d+ passages", printed) and "continuation: 10 items" in printed
    assert len(rows_of(tmp_path / "tasks", "continuation")) == 10
    assert main(["make-tasks", str(tmp_path / "tasks"), *arguments]) == 2
    assert "is there and not empty" in capsys.readouterr().err
