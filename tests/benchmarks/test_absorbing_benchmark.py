"""The benchmark of absorbing: its data, the gradient arm, its figures, and going on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.absorbing import __main__ as command
from benchmarks.absorbing import arms
from benchmarks.absorbing.cases import FILES, Case, contains, read_cases
from benchmarks.absorbing.choice import Chosen, caught_up, choose, given, recovered, summary, with_error
from benchmarks.absorbing.exam import Exam
from benchmarks.absorbing.tables import drawn, kind_table
from benchmarks.kept import PARTS, Kept, read_kept
from npt import EditStore, load_base
from npt.editing.absorbing.gradient import Trained, Training
from npt.editing.absorbing.lesson import divergences
from npt.editing.absorbing.settings import Options
from npt.editing.descent import mean_divergence, zero
from npt.errors import DataError, NPTError

TEXTS = ["Once upon a time, there was a little dog.", "Tom had a red ball.", "She went to the park with her mum."]
QUESTIONS = [
    "What is Bo?",
    "Who is red?",
    "Where does the cat live?",
    "Is Bo big?",
    "What does Bo eat?",
    "Who likes fish?",
]
CASE = Case(
    "cat", "document", "test", "Bo is a big red cat. Bo lives in the old mill, eats fish and likes the rain.",
    ("What colour has Bo?", "Where can Bo be found?"), ("red", "mill"),
)  # fmt: skip
OPTIONS: dict[str, Any] = {
    "questions": QUESTIONS, "blocks": [2, 3], "mu": 1.0, "lam": 0.01, "phrasings": 1, "new_tokens": 8, "rank": 8,
    "limit": 10.0, "style": "question", "steps": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def store() -> Iterator[EditStore]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npt.editing.absorbing.questions.TOKENS", 6)
        patch.setattr("npt.editing.absorbing.general.WATCHED", 2)
        patch.setattr("npt.editing.absorbing.general.LENGTH", 24)
        found = EditStore(*load_base("builtin:tiny"), statistics=TEXTS, progress=False)
        arms.prepare(found, OPTIONS["blocks"])
        yield found
        found.close()


# -- data ------------------------------------------------------------------------------------------------------------------


def test_the_contexts_are_as_many_and_as_long_as_they_shall_be() -> None:
    cases = read_cases()
    parts = {(kind, part): [c for c in cases if (c.kind, c.part) == (kind, part)] for kind in FILES for part in PARTS}
    assert [len(found) for found in parts.values()] == [3, 7, 2, 4]
    for case in cases:
        if case.answers is None:
            assert len(case.questions) == 8, case.name
        else:
            assert len(case.questions) == len(case.answers) == 12 and 120 <= len(case.text.split()) <= 180, case.name
            pairs = zip(case.questions, case.answers, strict=True)
            assert not [question for question, answer in pairs if answer.casefold() in question.casefold()]


def test_the_parts_share_no_text_and_no_question() -> None:
    seen = [{text for c in read_cases() if c.part == part for text in (c.text, *c.questions)} for part in PARTS]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    ("text", "answer", "there"),
    [
        ("Two FOXES ran.", "fox", True), ("It is 1874.", "1874", True), ("It is 18740.", "1874", False),
        ("It has 31412 trees.", "412", False), ("We started it.", "star", False), ("at 5:40 sharp", "5:40", True),
    ],
)  # fmt: skip
def test_an_answer_is_found_as_words(text: str, answer: str, there: bool) -> None:
    assert contains(text, answer) is there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": "train"}, "line 1: part 'train' is unknown; use development or test"),
        ({"text": " "}, "line 1, text: is blank"),
        ({"more": 1}, "line 1: has more, name, part, questions, text; use"),
        ({"questions": []}, "line 1: questions is no list"),
        (
            {"questions": [{"question": "Is it red?", "answer": "red"}]},
            "question 1: the answer 'red' is in its question",
        ),
        (
            {"questions": [{"question": "Colour?", "answer": "blue"}]},
            "question 1: the answer 'blue' is not in the text",
        ),
        ({"questions": [{"question": "Colour?", "answer": "red"}] * 2}, "question 2: is asked before"),
        ({"questions": ["Colour?"]}, "question 1: use {"),
    ],
)
def test_data_that_is_wrong_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {"name": "a", "part": "test", "text": "A red cat.", "questions": [{"question": "Colour?", "answer": "red"}]}
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert [case.answers for case in read_cases({"document": path})] == [("red",)]
    path.write_text(json.dumps(row | change), encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_cases({"document": path})
    assert message in str(error.value)


# -- arms ------------------------------------------------------------------------------------------------------------------


def test_all_arms_of_a_context(store: EditStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The LoRA comes nearer to the teacher with its steps, nothing stays on the model, and a weak context ends early."""
    trainings = (Training(1e-2), Training(1e-2, "answers"))
    plan = arms.Plan(trainings, (5, 40), 10, True, OPTIONS, number=6)
    monkeypatch.setattr(arms, "EFFECT", 0.0)
    record = arms.measure(store, CASE, plan)
    assert record["nothing"]["kl"] == record["effect"] and record["nothing"]["text_kl"] == 0
    assert record["absorb"]["kl"] < record["effect"] and record["absorb"]["text_kl"] > 0
    assert record["descended"]["kl"] < record["effect"] and record["descended"]["kl"] != record["absorb"]["kl"]
    assert record["descended"]["seconds"] > 0 and record["descended"]["learnt"]["tokens"] > 0
    for one in record["gradient"]:
        few, many = one["points"]
        assert (few["steps"], many["steps"]) == (5, 40) and many["seconds"] > few["seconds"] > 0
        assert many["kl"] < 0.8 * record["effect"] and many["kl"] < few["kl"] and many["loss"] < few["loss"]
    assert record["setting"]["blocks"] == [2, 3] and record["learnt"]["tokens"] > 0
    assert record["asking_seconds"] > 0 and record["absorb"]["seconds"] > 0
    assert all(peak > 0 for peak in record["peaks"].values())
    assert store.edits == [] and not store.contexts.patches.together
    assert arms.measure(store, CASE, replace(plan, trainings=(), memory=False))["nothing"] == record["nothing"]
    monkeypatch.setattr(arms, "EFFECT", 100.0)
    assert "absorb" not in arms.measure(store, CASE, plan)


def test_the_lora_begins_as_the_base_and_learns_from_the_same_tokens(store: EditStore) -> None:
    exam = Exam(store, CASE, Options(new_tokens=8, style="question"))
    base = exam.mark().kl
    contexts = store.contexts
    for tokens in ("all", "answers"):
        training = Training(1e-6, tokens, batch=len(exam.conversations))
        begin = zero(contexts.blocks.shapes([2, 3]), 4)
        one = Trained(exam.lesson, begin, training, together=contexts.patches.together)
        try:
            loss = one.train(1)
            assert all(len(factors.right) == 4 for factors in one.factors.values())
            assert exam.mark().kl == pytest.approx(base, rel=1e-2)
        finally:
            one.close()
        student = exam.lesson.stream.copy().finish()
        each = divergences(contexts.blocks.base, exam.lesson.last, student)
        used = exam.lesson.counted >= 0 if tokens == "answers" else torch.ones_like(each, dtype=torch.bool)
        assert loss == pytest.approx(float(each[used].mean()), rel=1e-4), tokens
        assert used.sum() == (
            sum(c.shared for c in exam.conversations) if tokens == "all" else exam.lesson.tokens.sum()
        )


def test_the_divergence_is_zero_for_equal_states_and_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    head, states = torch.nn.Linear(4, 7), torch.randn(3, 4)
    now = torch.randn(3, 4, requires_grad=True)
    assert float(mean_divergence(head, states, states).detach()) == pytest.approx(0, abs=1e-6)
    loss = mean_divergence(head, states, now)
    p, q = (head(x).log_softmax(-1) for x in (states, now))
    assert float(loss.detach()) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean().detach()), rel=1e-5)
    (slope,) = torch.autograd.grad(loss, now)
    assert slope.abs().sum() > 0
    monkeypatch.setattr("npt.editing.descent.ENTRIES", 14)  # two tokens at once
    again = mean_divergence(head, states, now)
    assert torch.allclose(again, loss) and torch.allclose(torch.autograd.grad(again, now)[0], slope)


# -- figures ---------------------------------------------------------------------------------------------------------------


def record_of(kl: float, points: list[tuple[int, float, float, float]], **more: Any) -> dict[str, Any]:
    """A record of effect 1 whose teacher answers two of three questions right. points: (steps, kl, text_kl, seconds)."""
    marks = [
        {"steps": n, "kl": k, "text_kl": t, "seconds": s, "texts": ["Oslo", "blue", "six"]} for n, k, t, s in points
    ]
    return {
        "kind": "document", "part": "test", "effect": 1.0, "answers": ["Oslo", "red", "six"],
        "taught": ["In Oslo.", "It is red.", "Five."], "nothing": {"kl": 1.0, "text_kl": 0.0, "texts": ["a", "b", "six"]},
        "absorb": {"kl": kl, "text_kl": 0.01, "seconds": 2.0, "texts": ["Oslo", "Red!", "five"]},
        "gradient": [{"rate": 0.1, "tokens": "all", "beta": 0.0, "points": marks}], **more,
    }  # fmt: skip


def test_figures_mean_what_they_say() -> None:
    one = record_of(0.25, [(10, 0.5, 0.01, 3.0), (20, 0.2, 0.015, 8.0)])
    other = record_of(0.15, [(10, 0.7, 0.01, 5.0), (20, 0.4, 0.05, 9.0)])
    assert recovered(one, one["absorb"]) == 0.75
    assert [given(one, one[arm]["texts"]) for arm in ("nothing", "absorb")] == [0.0, 1.0]
    assert (
        given(one | {"answers": None}, []) is None and given(one | {"taught": ["", "", ""]}, ["Oslo", "", ""]) is None
    )
    rows = summary([one, other], Chosen(0.1, "all", 10))
    assert rows["absorb"]["recovered"] == pytest.approx((0.8, 0.05))
    assert rows["gradient"]["recovered"] == pytest.approx((0.4, 0.1)) and rows["gradient"]["given"] == (0.5, 0.0)
    assert rows["gradient"]["seconds"] == (4.0, 1.0) and rows["absorb"]["seconds"] == (2.0, 0.0)
    assert rows["context"]["recovered"] == (1.0, 0.0) and rows["context"]["given"] == (1.0, 0.0)
    assert rows["nothing"]["text_kl"] == (0.0, 0.0) and rows["context"]["text_kl"] is None
    assert with_error([None]) is None and math.isnan((with_error([2.0, None]) or (0.0, 0.0))[1])
    assert caught_up([one, other], "absorb", Chosen(0.1, "all", 20), 0.02) == (1, 4.0)
    assert caught_up([other], "absorb", Chosen(0.1, "all", 20), 0.02) == (0, None)


def test_the_gradient_is_chosen_within_the_limit_on_general_text() -> None:
    found = {"a": record_of(0.2, [(10, 0.5, 0.01, 3.0), (20, 0.2, 0.03, 8.0)])}
    assert choose(found, "document", 0.02) == Chosen(0.1, "all", 10)
    assert choose(found, "document", 0.04) == Chosen(0.1, "all", 20)
    assert choose(found, "document", 0.005) == Chosen(0.1, "all", 10), "the nearest to the limit"
    assert choose(found, "prompt", 0.02) == Chosen(0.1, "all", 10), "no prompt of its own"
    weak = {name: value for name, value in found["a"].items() if name != "absorb"}
    for records in ({}, {"a": weak}):
        with pytest.raises(NPTError, match="run --part development first, with"):
            choose(records, "document", 0.02)


def test_tables_name_what_was_left_out_and_the_plot_is_drawn() -> None:
    weak = {"kind": "document", "effect": 0.125}
    chosen = {"rate": 0.1, "tokens": "all", "steps": 10}
    about = {
        "model": "m",
        "machine": {"device": "a CPU"},
        "limit": 0.02,
        "steps": [10, 20],
        "chosen": {"document": chosen, "prompt": chosen},
    }
    points = [(10, 0.5, 0.01, 3.0), (20, 0.2, 0.015, 8.0)]
    records = {"a": record_of(0.25, points), "b": record_of(0.15, points), "c": weak}
    kept = Kept(about, records)
    text = kind_table("document", kept)
    assert "**2 documents**" in text and "c (0.12 nats)" in text and kind_table("prompt", kept) == ""
    assert "| absorb, closed form | 80.0 ± 5.0 % | 100.0 ± 0.0 % | 0.0100 ± 0.0000 | 2.0 ± 0.0 |  |" in text
    assert (
        "Within 20 steps the LoRA gets as far as `absorb, closed form` in 1 of 2 contexts, after a median of 4.0 times its "
        "seconds." in text
    )
    assert "documents, absorb" in drawn(kept).svg


# -- going on --------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_and_leaves_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measure(store: Any, case: Case, plan: arms.Plan) -> dict[str, Any]:
        asked.append(case.name)
        if asked == ["village", "game"]:
            raise KeyboardInterrupt
        return record_of(0.1, [(n, 0.5, 0.01, 3.0) for n in plan.steps]) | {"kind": case.kind}

    monkeypatch.setattr(arms, "measure", measure)
    monkeypatch.setattr(arms, "prepare", lambda store: 0.0)
    monkeypatch.setattr(command, "load_base", lambda name: (None, None))
    monkeypatch.setattr(command, "EditStore", lambda *args, **named: None)
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    options = ["--rates", "0.1", "--steps", "10", "5"]
    with pytest.raises(KeyboardInterrupt):
        command.main([*options, "--output", str(one)])
    assert list(read_kept(one).contexts) == ["village"]
    assert command.main([*options, "--output", str(one)]) == 0 and asked.count("village") == 1
    assert command.main([*options, "--output", str(other)]) == 0
    assert one.read_bytes() == other.read_bytes()
    assert "village: effect 1.00 nats; closed form 90 % recovered" in capsys.readouterr().out
    assert command.main([*options, "--batch", "4", "--output", str(one)]) == 1
    assert "was measured with batch 8, not 4" in capsys.readouterr().err
    test = ["--part", "test", "--tuned-on", str(one), "--output", str(tmp_path / "test.json")]
    assert command.main([*test, "--only", "museum"]) == 0
    kept = read_kept(tmp_path / "test.json")
    assert list(kept.contexts) == ["museum"] and kept.about["chosen"]["document"] == {
        "rate": 0.1, "tokens": "all", "steps": 5, "beta": 0.0,
    }  # fmt: skip
    assert command.main([*test, "--only", "village"]) == 1
    assert "no context of the test part; use ship," in capsys.readouterr().err
    assert command.main(["--part", "test", "--tuned-on", str(tmp_path / "none.json")]) == 1
    assert "measure them first" in capsys.readouterr().err
