"""Figures of methods of editing: on generated text, with standard errors; files of records; the command."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch

from benchmarks.editing.__main__ import kept_records, main, options_of
from npt import load_base
from npt.editing.benchmark.asking import Asker, first_sentence
from npt.editing.benchmark.figures import (
    Outcome,
    ahead,
    batches_of,
    gap,
    harmonic,
    mean_of,
    measure,
    score,
    table,
    with_error,
)
from npt.editing.benchmark.methods import Method, Setup
from npt.editing.benchmark.records import Neighbour, Record, read_records, record_of
from npt.editing.measure import mean_kl
from npt.editing.metrics import Source
from npt.editing.requests import Request
from npt.editing.solve import Factors
from npt.errors import DataError, NPTError
from tests.helpers import random_base, spelling_tokenizer

FLAT = {
    "prompt": "One day, Tim saw a big", "subject": "Tim", "target_new": "cat", "rephrase_prompt": "In the park, Tim met a",
    "locality_prompt": "One day, Sara saw a big", "locality_ground_truth": "box",
}  # fmt: skip
NESTED = {
    "requested_rewrite": {
        "prompt": "One day, {} saw a big", "subject": "Tim", "target_new": {"str": "cat"}, "target_true": {"str": "box"},
    },
    "paraphrase_prompts": ["In the park, Tim met a"],
    "neighborhood_prompts": ["One day, Sara saw a big"],
}  # fmt: skip
ZSRE = {
    "src": "One day, Tim saw a big", "subject": "Tim", "alt": "cat", "rephrase": "In the park, Tim met a",
    "loc": "One day, Sara saw a big", "loc_ans": "box",
}  # fmt: skip
RECORD = Record(
    Request("One day, Tim saw a big", "cat", "Tim"),
    ("In the park, Tim met a",),
    (Neighbour("One day, Sara saw a big", "box"),),
)
OUTCOME = Outcome(0, 1.0, 0.5, 1.0, None, 1.0, 0.1, 2.0, 3.0)


# -- records ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [FLAT, NESTED, ZSRE])
def test_every_format_gives_the_same_record(values: dict[str, Any]) -> None:
    assert record_of(values, "here") == RECORD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{}", "holds no list"),
        ("[]", "holds no list"),
        ("[3]", "record 1: not a JSON object but int"),
        ('[{"prompt": "a b"}]', "record 1: .*'subject'.*use CounterFact's format"),
        (
            '[{"src": "a b", "subject": "c", "alt": "d", "rephrase": "e", "loc": "f"}]',
            "record 1: the subject 'c' does not",
        ),
    ],
)
def test_a_file_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_records(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: can't be read"):
        read_records(tmp_path / "none.json")


# -- over records ----------------------------------------------------------------------------------------------------------


def outcomes(efficacies: Sequence[float], groups: Sequence[int]) -> list[Outcome]:
    return [replace(OUTCOME, efficacy=e, group=g) for e, g in zip(efficacies, groups, strict=True)]


def test_the_error_of_a_mean_is_the_usual_one() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    mean, error = with_error(outcomes(values, range(5)), mean_of("efficacy"))
    assert mean == pytest.approx(0.6) and error == pytest.approx(stdev(values) / math.sqrt(5))


def test_records_of_a_batch_are_not_independent() -> None:
    _, error = with_error(outcomes([1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2]), mean_of("efficacy"))
    assert error == pytest.approx(stdev([1, 0, 0.5]) / math.sqrt(3))
    assert math.isnan(with_error(outcomes([1, 0], [0, 0]), mean_of("efficacy"))[1])


def test_the_score_is_the_harmonic_mean_of_means() -> None:
    found = [OUTCOME, replace(OUTCOME, group=1, efficacy=0.0, paraphrase=0.0)]
    assert score(found) == pytest.approx(3 / (1 / 0.5 + 1 / 0.25 + 1 / 1.0))
    assert harmonic([1.0, 0.0]) == 0.0
    assert gap(found) == pytest.approx(0.5)


def test_a_paired_difference_knows_what_two_methods_have_in_common() -> None:
    one = [replace(OUTCOME, efficacy=e, paraphrase=e, locality=e, group=g) for g, e in enumerate([1.0, 0.2, 0.6])]
    other = [replace(o, efficacy=o.efficacy - 0.1, paraphrase=o.efficacy - 0.1, locality=o.efficacy - 0.1) for o in one]
    value, error = ahead(one, other)
    assert value == pytest.approx(0.1) and error == pytest.approx(0.0, abs=1e-9) and with_error(one, score)[1] > 0.1
    value, error = ahead(one, list(reversed([replace(o, group=2 - o.group) for o in other])))
    assert value == pytest.approx(0.1) and error > 0.1
    with pytest.raises(NPTError, match="same batches"):
        ahead(one, other[:2])


def test_a_table_has_a_row_for_each_method_and_leaves_out_what_is_not_known() -> None:
    two = [OUTCOME, replace(OUTCOME, group=1)]
    lines = table({"one": [OUTCOME, replace(OUTCOME, group=1, efficacy=0.0)], "two": two}).splitlines()
    assert lines[0].startswith("| method | records | efficacy | paraphrase | locality | ordering | S |")
    assert lines[2].startswith("| one | 2 | 0.5 ± 0.5 | 0.5 ± 0 | 1 ± 0 | - |") and lines[2].endswith("| 0 ± 0 |")
    assert lines[3].startswith("| two | 2 | 1 ± 0 | 0.5 ± 0 |") and lines[3].endswith("| 0.15 ± 0.38 |")
    assert table({"one": [OUTCOME]}).splitlines()[2].startswith("| one | 1 | 1 | 0.5 | 1 | - |")


# -- on a model ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup() -> Setup:
    model, tokenizer = load_base("builtin:tiny")
    return Setup(model, tokenizer, Source(model, tokenizer, "text", ["Tom had a ball."], None, None, False), (2, 3))


@pytest.fixture
def asker(setup: Setup) -> Asker:
    rows = [
        setup.tokenizer("Once upon a time, there was a dog.")["input_ids"],
        setup.tokenizer("Tom ran.")["input_ids"],
    ]
    return Asker(setup.model, setup.tokenizer, rows)


class Said(Method):
    """Writes a weight delta of its own making: noise, or nothing; counts what it is asked to do."""

    def __init__(self, setup: Setup, size: float):
        super().__init__(setup)
        self.size, self.calls = size, list[int]()

    def write_many(self, requests: Sequence[Request]) -> None:
        self.calls.append(len(requests))
        self.passes += 2 * len(requests)
        noise = torch.Generator().manual_seed(0)
        width = self.setup.down(3).in_features
        left = torch.randn(self.setup.down(3).out_features, 2, generator=noise)
        self.deltas.add(3, Factors(self.size * left, torch.randn(2, width, generator=noise)))

    @contextmanager
    def once(self) -> Any:
        self.write_many([])
        yield
        self.undo()


@torch.no_grad()
def logits(asker: Asker) -> Any:
    return asker.base(torch.tensor([asker.text[0]])).logits


def base_record(asker: Asker) -> Record:
    """A record whose target is what the base writes anyway."""
    prompt = "Once upon a time, there was a little"
    target = asker.tokenizer.decode(asker.said(prompt)).split()[0]
    return Record(Request(prompt, target, "time"), (prompt,), (Neighbour("Tom had a", None),))


def test_without_a_change_everything_is_as_the_base_has_it(setup: Setup, asker: Asker) -> None:
    method = Said(setup, 0.0)
    records = [base_record(asker), RECORD, RECORD]
    found = measure(method, asker, batches_of(records, 2), progress=False)
    assert method.calls == [2, 1] and [outcome.group for outcome in found] == [0, 0, 1]
    assert (found[0].efficacy, found[0].paraphrase, found[0].locality, found[0].forced) == (1, 1, 1, 1)
    assert found[0].ordering is None and found[1].ordering is not None
    assert found[1].efficacy == 0 and found[1].locality == 1
    assert all(outcome.kl == 0 and outcome.passes == 2 for outcome in found)


def test_a_change_shows_in_locality_and_divergence_and_is_taken_back(setup: Setup, asker: Asker) -> None:
    method = Said(setup, 5.0)
    record = base_record(asker)
    before = logits(asker)
    (found,) = measure(method, asker, [[record]], progress=False)
    assert found.efficacy == 0 and found.locality == 0 and found.kl > 0.1
    assert torch.equal(logits(asker), before)


def test_divergence_is_that_of_the_whole_text(setup: Setup, asker: Asker) -> None:
    method = Said(setup, 0.5)
    texts = ["Once upon a time, there was a dog.", "Tom ran."]
    with method.once():
        found = asker.divergence(method)
        factors = method.deltas._factors[3]
    with method.at(3) as bench:
        bench.adapter.set(factors)
        assert found == pytest.approx(mean_kl(bench, texts), rel=1e-4) and found > 1e-4


def test_a_batch_that_fails_is_taken_back(setup: Setup, asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    method, before = Said(setup, 5.0), logits(asker)

    def fail(self: Asker, method: Method) -> float:
        raise NPTError("no")

    monkeypatch.setattr(Asker, "divergence", fail)
    with pytest.raises(NPTError, match="no"):
        measure(method, asker, [[RECORD]], progress=False)
    assert torch.equal(logits(asker), before)


def test_batches_are_in_order_or_drawn_from_all_records() -> None:
    records = [replace(RECORD, paraphrases=(str(i),)) for i in range(5)]
    assert batches_of(records, 2) == [records[:2], records[2:4], records[4:]]
    drawn = batches_of(records, 3, draws=4)
    assert [len({record.paraphrases for record in batch}) for batch in drawn] == [3] * 4
    assert drawn == batches_of(records, 3, draws=4) != batches_of(records, 3, draws=4, seed=1)
    for size, draws, message in ((0, None, "batch=0"), (2, 0, "draws=0"), (6, 1, "more than the 5 records")):
        with pytest.raises(NPTError, match=message):
            batches_of(records, size, draws)


def test_a_sentence_ends_at_its_stop_or_line() -> None:
    assert first_sentence(" big. It ran") == "big."
    assert first_sentence("3.5 metres\nlong") == "3.5 metres"
    assert first_sentence("no end") == "no end"


def test_records_that_editors_refuse_are_left_out_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    asker = Asker(random_base("gpt2"), spelling_tokenizer(bos=False), [])
    first, other = (Record(Request("A is the name of", "B", subject), (), ()) for subject in ("A", "name"))
    assert kept_records([first, other], asker) == [other]
    assert "record 1 is left out: 'A is the name of': the subject 'A' is the first token" in capsys.readouterr().err
    with pytest.raises(DataError, match="no record can be written"):
        kept_records([first], asker)


# -- the command -----------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_row_for_each_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, text, output = tmp_path / "records.json", tmp_path / "text.txt", tmp_path / "out.json"
    records.write_text(json.dumps([FLAT, {**FLAT, "target_new": "dog"}, FLAT]))
    text.write_text("Tom had a ball. It was red.")
    given = [
        "--records",
        str(records),
        "--limit",
        "2",
        "--layers",
        "2",
        "3",
        "--metric",
        "identity",
        "--text",
        str(text),
    ]
    methods = ["--method", "ft-m", "--method", "context", "--option", "ft-m.rate=0.02", "--option", "ft-m.steps=40"]
    assert main([*given, *methods, "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| ft-m | 2 | 1 ± 0 |") and lines[3].startswith("| context | 2 | ")
    kept = json.loads(output.read_text())
    assert [row["efficacy"] for row in kept["ft-m"]] == [1, 1] and len(kept["context"]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--option", "rome.clamp"], "METHOD.NAME=VALUE"),
        (["--option", "none.clamp=3"], "METHOD.NAME=VALUE"),
        (["--limit", "0"], "--limit 0"),
        (["--text", "none.txt"], "--text none.txt"),
    ],
)
def test_a_wrong_argument_is_one_line(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "records.json"
    records.write_text(json.dumps([FLAT]))
    assert main(["--records", str(records), *given]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and message in said[-1]


def test_options_are_literals_or_text() -> None:
    assert options_of(["rome.clamp=3", "newton.terminator=.", "locft.limit=None"]) == {
        "rome": {"clamp": 3}, "newton": {"terminator": "."}, "locft": {"limit": None},
    }  # fmt: skip
