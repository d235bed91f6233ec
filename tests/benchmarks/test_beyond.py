"""Memory beyond the context: the facts, what counts as an answer, the LoRA's choice, and a small run of every arm."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.beyond import __main__ as command
from benchmarks.beyond.__main__ import Chosen, choose
from benchmarks.beyond.arms import right
from benchmarks.beyond.facts import DEVELOPMENT, MOST, RELATIONS, Fact, facts, text_of
from benchmarks.beyond.tables import beyond_section, kept_beyond, share
from npt.errors import NPTError


def test_facts_are_of_the_seed_and_a_smaller_number_is_the_start_of_a_larger_one() -> None:
    some = facts(3, MOST)
    assert facts(3, 5) == some[:5] != facts(4, 5)
    assert len({fact.subject for fact in some}) == MOST
    assert {fact.value for fact in some} == {value for relation in RELATIONS for value in relation.values}


def test_what_is_asked_is_not_in_the_text_and_the_statement_is() -> None:
    some = facts(3, 100)
    text = text_of(some)
    for fact in some:
        assert f"{fact.prompt} {fact.value}." in text
        assert fact.asked not in text and fact.learnt not in text and fact.asked != fact.learnt
        assert all(fact.subject in wording for wording in (fact.prompt, fact.learnt, fact.asked))
        assert fact.value not in f"{fact.prompt} {fact.learnt} {fact.asked}".split()


@pytest.mark.parametrize(
    ("text", "expected"), [("Rome.", 1), ("rome", 1), ("Rome, in", 1), ("Romeo", 0), ("the city of Rome", 0), ("", 0)]
)
def test_an_answer_begins_with_the_value_as_a_whole_word(text: str, expected: int) -> None:
    assert right(text, Fact("A B", "A B lives in", "Rome", "a", "b")) == expected


def test_the_lora_that_answers_most_within_the_limit_is_chosen() -> None:
    def record(rate: float, *marks: tuple[int, list[int], float]) -> dict[str, Any]:
        return {"rate": rate, "marks": [{"epochs": e, "asked": a, "text_kl": kl} for e, a, kl in marks]}

    trainings = [record(1e-3, (5, [1, 0], 0.01), (10, [1, 1], 0.2)), record(1e-4, (5, [0, 0], 0.0), (10, [0, 0], 0.01))]
    assert choose({"lora": {"trainings": trainings}}, 0.05) == Chosen(1e-3, 5)
    assert choose({"lora": {"trainings": trainings}}, 0.5) == Chosen(1e-3, 10)
    with pytest.raises(NPTError, match="holds no LoRA"):
        choose({"nothing": {}}, 1.0)


def test_every_arm_runs_and_a_second_call_measures_nothing_anew(
    tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "EPOCHS", 60)
    monkeypatch.setattr(command, "AFTER", (60,))
    monkeypatch.setattr("npt.editing.absorbing.general.WATCHED", 2)
    development, test = tmp_path / "beyond-tiny--development.json", tmp_path / "beyond-tiny--test.json"
    common = ["--model", "builtin:tiny", "--facts", "2", "--number", "6", "--cache", str(tmp_path / "cache")]
    assert command.main([*common, "--arm", "lora", "--rates", "1e-3", "--output", str(development)]) == 0
    (kept,) = json.loads(development.read_text())["contexts"].values()
    (mark,) = kept["trainings"][0]["marks"]
    assert mark["prompt"] == [1, 1], "the LoRA has read both sentences sixty times"
    call = [*common, "--part", "test", "--tuned-on", str(development), "--output", str(test)]
    assert command.main(call) == 0
    first = test.read_bytes()
    contexts = json.loads(first)["contexts"]
    assert {record["arm"] for record in contexts.values()} == set(command.ARMS)
    assert contexts["nothing, 2 facts, seed 0"]["text_kl"] == 0
    assert contexts["edits, 2 facts, seed 0"]["text_kl"] > 0
    capsys.readouterr()
    assert command.main(call) == 0
    assert test.read_bytes() == first and "edits, 2 facts, seed 0" in capsys.readouterr().out
    section = beyond_section(kept_beyond(tmp_path)["tiny"])
    assert section.count("\n| 2 |") == len(command.ARMS) and "lora: rank 8, rate 0.001, 60 epochs" in section


def test_the_development_seed_is_not_reported(capsys: Any) -> None:
    assert command.main(["--part", "test", "--seed", str(DEVELOPMENT)]) == 1
    assert "choices were made on it" in capsys.readouterr().err


def test_a_share_has_the_standard_error_of_its_facts() -> None:
    assert share([1, 0, 1, 0]) == (0.5, 0.25)
