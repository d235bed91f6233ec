"""Tasks for lm-evaluation-harness out of any text: a folder that its `--include_path` takes, without a hub.

    cloze         the last word of a sentence from the words before it: perplexity of the word, and whether greedy decoding
                  gives it
    continuation  the words after the end of a sentence, to be told from those of three other passages: acc and acc_norm

The passages of a task share no words, so that the harness's standard errors over items hold.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from npt.common.display import one_line
from npt.common.files import new_folder
from npt.common.places import place
from npt.common.writable import check_folders
from npt.data.sources import TextFiles
from npt.errors import DataError, NPTError

#: Answers to choose from, and the words of each.
CHOICES, ANSWER_WORDS = 4, 8
_WORD = re.compile(r"\S+")
#: The end of a sentence: its mark, then quotes or brackets that close. The mark may be a word of its own, as in WikiText.
_SENTENCE_END = re.compile("[.!?][\"'\u201d\u2019\u00bb)]*$")
_LETTERS = re.compile(r"[^\W\d_]{2,}")
_PARAGRAPH_END = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Passage:
    """A stretch of text: the words that a model is shown, and those that follow them after one space."""

    context: str
    answer: str


#: A sentence's end in a list of words to the words that are asked for: (the first one, the one after the last, end of the
#: answer in the text), or None.
Asked = Callable[[str, "Sequence[re.Match[str]]", int], tuple[int, int, int] | None]


def make_tasks(
    folder: str | Path, texts: Sequence[str | Path], *, items: int = 200, words: int = 64, seed: int = 0
) -> dict[str, int]:
    """Writes the tasks `cloze` and `continuation` into a new folder, each as YAML and JSON lines.

    The same arguments give the same items. The YAML names its JSON lines by their whole path.

    Args:
        folder: for the files; is not there yet, or empty.
        texts: paths or globs of the kinds in `npt.data.readers`.
        items: questions of each task.
        words: words of context in each question.
        seed: chooses the passages and the order of the answers.

    Returns:
        {task: passages that the text had room for}, of which `items` were taken.

    Raises:
        DataError: a text that can't be read, a chat, or too little text for so many items.
        NPTError: the folder holds something, or can't be made.
    """
    folder = place(folder)
    check_folders({"FOLDER": folder})
    if folder.exists() and any(folder.iterdir()):
        raise NPTError(f"{folder}: is there and not empty; name a new folder, or move what is in it")
    documents = list(_plain(TextFiles(texts, named_by="--text")))
    found = {
        name: [passage for text in documents for passage in _passages(text, words, asked)]
        for name, asked in (("cloze", _last_word), ("continuation", _next_words))
    }
    found["continuation"] = list({passage.answer: passage for passage in found["continuation"]}.values())
    _check_enough(found, texts, items, words)
    rows = {
        name: make(passages, items, random.Random(f"{name} {seed}"))
        for (name, passages), make in zip(found.items(), (_cloze_rows, _continuation_rows), strict=True)
    }
    made_of = {"text": [str(path) for path in texts], "items": items, "words": words, "seed": seed}

    def fill(temporary: Path) -> None:
        for name in rows:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name])
            (temporary / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            task = _task(name, folder.absolute() / f"{name}.jsonl") | {"metadata": {"version": 1.0, **made_of}}
            text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
            (temporary / f"{name}.yaml").write_text(text, encoding="utf-8")

    new_folder(folder, fill, again="run the command again")
    return {name: len(passages) for name, passages in found.items()}


def _plain(documents: Iterable[Any]) -> Iterator[str]:
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, str):
            raise DataError(f"--text: document {number} is a chat, and tasks are made of plain text; name other files")
        yield document


def _passages(text: str, before: int, asked: Asked) -> Iterator[Passage]:
    """Passages of a document from its start on, none with a word of another: `before` words and what is asked after them."""
    words, free = list(_WORD.finditer(text)), 0
    for at, word in enumerate(words):
        if at < free + before - 1 or not _SENTENCE_END.search(word[0]):
            continue
        if (found := asked(text, words, at)) is None:
            continue
        first, after, end = found
        if first - before >= free and text[words[first - 1].end() : words[first].start()] == " ":
            context = text[words[first - before].start() : words[first - 1].end()]
            yield Passage(context, text[words[first].start() : end])
            free = after


def _last_word(text: str, words: Sequence[re.Match[str]], at: int) -> tuple[int, int, int] | None:
    """The word before the mark that ends a sentence, where it is all letters."""
    own = _SENTENCE_END.sub("", words[at][0])
    first = at if own else at - 1
    last = own or words[first][0]
    return (first, at + 1, words[first].start() + len(last)) if first > 0 and _LETTERS.fullmatch(last) else None


def _next_words(text: str, words: Sequence[re.Match[str]], at: int) -> tuple[int, int, int] | None:
    """The first words after the end of a sentence, where no paragraph ends within them."""
    first, after = at + 1, at + 1 + ANSWER_WORDS
    if after > len(words):
        return None
    end = words[after - 1].end()
    return None if _PARAGRAPH_END.search(text, words[first].start(), end) else (first, after, end)


def _check_enough(found: dict[str, list[Passage]], texts: Sequence[str | Path], items: int, words: int) -> None:
    room = min(map(len, found.values()))
    if room >= max(items, CHOICES):
        return
    where = one_line(", ".join(map(str, texts)), 120)
    name = min(found, key=lambda task: len(found[task]))
    fewer = f", or --items {room}" if room >= CHOICES else ""
    raise DataError(
        f"--text {where}: has {room} passages for the task {name}, each of {words} words "
        f"that end a sentence or lead up to its last word; --items {items} needs {max(items, CHOICES)}: name more text, give "
        f"fewer words with --words{fewer}"
    )


def _cloze_rows(passages: Sequence[Passage], items: int, chance: random.Random) -> list[dict[str, Any]]:
    return [{"context": each.context, "word": each.answer} for each in chance.sample(passages, items)]


def _continuation_rows(passages: Sequence[Passage], items: int, chance: random.Random) -> list[dict[str, Any]]:
    """The true continuation among those of other passages, at a place drawn by chance."""
    rows = []
    for each in chance.sample(passages, items):
        others = [other.answer for other in chance.sample(passages, CHOICES) if other is not each][: CHOICES - 1]
        right = chance.randrange(CHOICES)
        rows.append(
            {"context": each.context, "choices": [*others[:right], each.answer, *others[right:]], "answer": right}
        )
    return rows


def _task(name: str, rows: Path) -> dict[str, Any]:
    """The harness's description of a task. The harness itself puts a space before a choice, but none before a target."""
    own: dict[str, Any]
    if name == "cloze":
        metrics = {"perplexity": ("perplexity", False), "acc": ("mean", True)}
        own = {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{' ' ~ word}}"}
    else:
        metrics = {"acc": ("mean", True), "acc_norm": ("mean", True)}
        own = {
            "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "choices",
            "doc_to_target": "answer",
        }  # fmt: skip
    listed = [
        {"metric": metric, "aggregation": by, "higher_is_better": better} for metric, (by, better) in metrics.items()
    ]
    files = {"data_files": {"test": str(rows)}}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        **own,
        "metric_list": listed,
    }
