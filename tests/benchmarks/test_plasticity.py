"""Tasks for plastic blocks: right and disjoint examples, rates chosen by held-out loss, and a small run of all arms."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from benchmarks.plasticity import __main__ as command
from benchmarks.plasticity.__main__ import DEVELOPMENT, chosen_rates, tried_rates
from benchmarks.plasticity.arms import ARMS
from benchmarks.plasticity.tables import kept_plasticity, plasticity_section
from benchmarks.plasticity.tasks import PARTS, TASKS, examples, right
from npt.errors import NPTError
from tests.helpers import quick_reports


@pytest.mark.parametrize("task", TASKS)
def test_parts_have_nothing_in_common_whatever_the_seed(task: str) -> None:
    prompts = {part: {one.prompt for seed in (0, 1) for one in examples(task, seed, part, 150)} for part in PARTS}
    assert not prompts["train"] & prompts["test"] and not prompts["train"] & prompts["development"]
    assert not prompts["test"] & prompts["development"]
    groups = {part: {one.group for one in examples(task, 0, part, 150)} for part in PARTS}
    assert not groups["train"] & (groups["test"] | groups["development"])
    assert examples(task, 0, "train", 20) == examples(task, 0, "train", 20) != examples(task, 1, "train", 20)
    assert len({one.prompt for one in examples(task, 0, "train", 150)}) == 150


def test_answers_are_right_by_another_way_of_finding_them() -> None:
    for one in examples("rule-switching", 0, "test", 40):
        cue, numbers = one.prompt.split(": ")
        digits, said = numbers.split(), one.answer.split()
        expected = {"up": sorted(digits), "down": sorted(digits)[::-1], "back": digits[::-1]}
        assert said == expected.get(cue, [str(int(d) * 2) for d in digits])
    for one in examples("recall", 0, "test", 40):
        asked = one.prompt.split()[-1].removesuffix("=?")
        assert re.findall(rf"\b{asked}=(\d)", one.prompt) == [one.answer]
    for one in examples("regression", 0, "test", 40):
        points = [part.split(":") for part in one.prompt.split()]
        (x0, y0), (x1, y1) = [(int(x), int(y)) for x, y in points[:2]]
        assert int(one.answer) * (x1 - x0) == y0 * (x1 - x0) + (y1 - y0) * (int(points[3][0]) - x0)
    for one in examples("two-hop", 0, "test", 40):
        who = re.search(r"does (\w+) live", one.prompt)
        assert who is not None
        (city,) = re.findall(rf"{who[1]} lives in (\w+)", one.prompt)
        assert f"{city} is in {one.answer}." in one.prompt
    for one in examples("chains", 0, "test", 40):
        assert int(one.answer.split()[-1]) == sum(map(int, one.prompt.removesuffix("=?").split("+")))
        assert all(sum(map(int, a.split("+"))) == int(b) for a, b in _steps(one.answer))
    for one in examples("domain", 0, "test", 40):
        endings = {"za": "mol", "ke": "tir", "bo": "fen", "lu": "sak"}
        opening, *stems = one.prompt.split()
        assert one.answer.split() == [stem + endings[opening] for stem in stems]


def _steps(answer: str) -> list[list[str]]:
    return [step.split("=") for step in answer.split(" so ")[0].split()]


def test_what_counts_as_right() -> None:
    assert right("regression", " 12\n", "12") and not right("regression", "123", "12")
    assert right("chains", "1+2=3 so 3", "1+2=3 3+4=7 so 3") and not right("chains", "", "1+2=3 so 3")


def test_more_examples_than_a_task_has_are_refused() -> None:
    with pytest.raises(ValueError, match="rule-switching: has fewer than 3000 test examples"):
        examples("rule-switching", 0, "test", 3000)


def test_each_arm_gets_the_rate_with_its_lowest_loss() -> None:
    def record(rate: float, *losses: float) -> dict[str, Any]:
        return {"task": "recall", "arms": {a: {"rate": rate, "loss": x} for a, x in zip(ARMS, losses, strict=True)}}

    records = {"a": record(1e-3, 1.0, 3.0, 2.0), "b": record(1e-2, 2.0, 1.0, 3.0)}
    assert chosen_rates(records, "recall") == {"npt": 1e-3, "lora": 1e-2, "dora": 1e-3}
    assert tried_rates(records) == [1e-3, 1e-2]
    with pytest.raises(NPTError, match="two-hop: the development part does not hold it"):
        chosen_rates(records, "two-hop")


@pytest.mark.slow
def test_all_arms_run_and_a_second_call_measures_nothing_anew(tmp_path: Any, capsys: Any) -> None:
    development, test = tmp_path / "plasticity-tiny--development.json", tmp_path / "plasticity-tiny--test.json"
    common = ["--task", "domain", "--steps", "6", "--examples", "300", "--set", "data.eval_texts=[builtin:python-docs]"]
    with quick_reports():
        assert command.main([*common, "--rates", "0.01", "--output", str(development)]) == 0
        call = [*common, "--part", "test", "--seed", "0", "--tuned-on", str(development), "--output", str(test)]
        assert command.main(call) == 0
    first = test.read_bytes()
    (record,) = json.loads(first)["contexts"].values()
    assert set(record["arms"]) == set(ARMS)
    for figures in record["arms"].values():
        assert figures["loss"] < figures["base_loss"] and figures["kl"] > 0 and len(figures["right"]) == 200
    capsys.readouterr()
    assert command.main(call) == 0
    assert test.read_bytes() == first and "domain, seed 0: npt" in capsys.readouterr().out
    assert plasticity_section(kept_plasticity(tmp_path)["tiny"]).count("\n| domain |") == len(ARMS)


def test_the_development_seed_is_not_reported(capsys: Any) -> None:
    assert command.main(["--part", "test", "--seed", str(DEVELOPMENT)]) == 1
    assert "rates were chosen on it" in capsys.readouterr().err


def test_the_template_ends_a_turn_with_a_line_break_that_ends_an_answer_too() -> None:
    from transformers import AutoTokenizer

    from benchmarks.plasticity.arms import TEMPLATE
    from npt.builtin import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder("builtin:tiny"))
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "user: a\nassistant: b\n"
