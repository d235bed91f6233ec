"""Contexts to absorb, files of questions about them, and options of `npt absorb`."""

from __future__ import annotations

import json

from tests.catalogue.edits import GOOD
from tests.catalogue.entries import Entry

GOOD_CONTEXT = "Bo is a red cat."
ONE = {
    "id": "00000000", "layer": 1, "values": "absorb", "passes": 1, "before": "", "after": "", "holds": True, "note": "",
    "style": "question", "new_tokens": 4, "context": GOOD_CONTEXT,
    "setting": {"blocks": [1], "mu": 1.0, "lam": 0.01, "rank": 8},
    "figures": {"kl_before": 1.0, "kl_after": 0.1, "text_kl": 0.01, "seconds": 1.0}, "compared": [], "left_out": [],
    "learnt": [{"question": "a", "reply": "b", "student": 4, "teacher": 9, "shared": 3, "answer": 1}], "reported": [],
}  # fmt: skip


def bad_context(
    name: str, content: str | bytes, *words: str, more: tuple[str, ...] = (), file: str = "c.txt", script: bool = False
) -> Entry:
    """A file of a context."""
    data = content.encode() if isinstance(content, str) else content
    arguments = ("absorb", "--context", file, "--store", "s", "--model", "{model}", *more)
    return Entry(f"absorb: {name}", arguments, words, {file: data}, script=script)


def bad_questions(name: str, content: str | bytes, *words: str, file: str = "q.txt") -> Entry:
    """A file of questions."""
    data = content.encode() if isinstance(content, str) else content
    arguments = ("absorb", "--context", "c.txt", "--questions", file, "--store", "s", "--model", "{model}",
                 "--new-tokens", "4")  # fmt: skip
    return Entry(f"absorb: questions, {name}", arguments, words, {"c.txt": GOOD_CONTEXT.encode(), file: data})


def bad_ledger(name: str, one: object, *words: str) -> Entry:
    """The contexts of a store's edits.json."""
    record = {**GOOD, "format_version": 2, "contexts": [one], "modules": [], "order": ["00000000"]}
    return Entry(
        f"store: {name}", ("edit", "list", "--store", "s"), words, {"s/edits.json": json.dumps(record).encode()}
    )


ABSORBING = [
    bad_context("an empty context", "", "c.txt: is blank", "write some text"),
    bad_context("a blank context", " \n", "c.txt: is blank"),
    bad_context("a context that is not UTF-8", b"\xff\xfe", "c.txt: is not UTF-8", "save it as UTF-8"),
    bad_context("messages that are no JSON", "[", "c.json: not JSON", "list of messages", file="c.json"),
    bad_context("no message", "[]", "c.json: holds no message", "give a text, or a chat", file="c.json"),
    bad_context("a number for messages", "3", "c.json: is int", "give a text, or a chat", file="c.json"),
    bad_context(
        "messages that end with a question", '[{"role": "user", "content": "a"}]', "c.json: ends with a user's message",
        "add the answer", file="c.json",
    ),
    bad_context(
        "messages for a model without a chat template",
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', "the model has no chat template",
        "write the examples as text", file="c.json",
    ),
    bad_context(
        "a style that needs a chat template", GOOD_CONTEXT, "style='chat': the tokenizer has no chat template",
        "use style='question'", more=("--style", "chat"),
    ),
    bad_context(
        "a window that holds no answer", "a " * 200, "window of 128 tokens leaves no room", "lower new_tokens",
        more=("--new-tokens", "120"),
    ),
    bad_context("an unknown style", GOOD_CONTEXT, "style='html' is unknown; use auto", more=("--style", "html")),
    bad_context("blocks that are no numbers", GOOD_CONTEXT, "--blocks first: use 'auto'", more=("--blocks", "first")),
    bad_context("a block too high", GOOD_CONTEXT, "names 40, and the model has 4 blocks", more=("--blocks", "1,40")),
    bad_context("too few questions", GOOD_CONTEXT, "number=3: use a whole number from 4", more=("--number", "3")),
    bad_context("a rank too high", GOOD_CONTEXT, "rank=513: use a whole number from 1 to 512", more=("--rank", "513")),
    bad_context("no limit", GOOD_CONTEXT, "limit=0.0: use a number above 0", more=("--limit", "0")),
    bad_context("mu below 0", GOOD_CONTEXT, "mu=-1.0: use a number above 0, or None", more=("--mu=-1",)),
    bad_context("mu of steps from zero", GOOD_CONTEXT, "mu=2.0: is of the closed form", more=("--mu=2", "--steps=9")),
    bad_context("unknown start", GOOD_CONTEXT, "start='x' is unknown; use zero or closed", more=("--start=x",)),
    bad_context("steps below 0", GOOD_CONTEXT, "steps=-1: use a whole number from 0 to 10,000", more=("--steps=-1",)),
    bad_context("a rate of 0", GOOD_CONTEXT, "rate=0.0: use a number above 0", more=("--rate", "0")),
    Entry(
        "absorb: a context that is not there", ("absorb", "--context", "c.txt", "--store", "s", "--model", "{model}"),
        ("c.txt: can't be read (No such file", "name a file of text"),
    ),
    Entry("absorb: no context", ("absorb", "--store", "s"), ("Missing option '--context'", "see npt absorb --help")),
    Entry(
        "absorb: no base", ("absorb", "--context", "c.txt", "--store", "s"), ("--model: no base is named",),
        {"c.txt": b"Bo is red."},
    ),
    bad_questions("none", "\n", "q.txt: holds no question", "write one a line"),
    bad_questions("one twice", "Who?\nWho?\n", "questions, text 2: 'Who?' stands there before", "leave it out"),
    bad_questions("longer than the window", "a" * 200, "questions, text 1: has", "window 128; shorten it"),
    bad_questions("no JSON", "{", "q.jsonl line 1: not JSON", "one object a line", file="q.jsonl"),
    bad_questions("an unknown name", '{"qestion": "a"}', "line 1: unknown name 'qestion'", "use question", file="q.jsonl"),
    bad_questions("no question", '{"answer": "a"}', "line 1: question is missing", file="q.jsonl"),
    bad_questions(
        "answers to some", '{"question": "a", "answer": "b"}\n{"question": "c"}', "line 2: answers are given to some", "none",
        file="q.jsonl",
    ),
    bad_questions("a blank answer", '{"question": "a", "answer": " "}', "line 1, answer: is blank", file="q.jsonl"),
    bad_ledger("a context that is a number", 3, "context 1 is damaged", "restore it from a backup"),
    bad_ledger("a context without its text", {**ONE, "context": ""}, "context 1 is damaged (context: is blank"),
    bad_ledger("no block", {**ONE, "setting": {"blocks": [], "mu": 1, "lam": 1, "rank": 8}}, "context 1 is damaged (blocks"),
    bad_ledger("a path for an id", {**ONE, "id": "../../x"}, "context 1 has the id '../../x'"),
]  # fmt: skip
