"""Figures of methods of editing: on generated text, with standard errors; files of records; the command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from npt import load_base
from npt.editing.benchmark.asking import Asker, first_sentence
from npt.editing.benchmark.figures import (
    FIGURES,
    Measured,
    Outcome,
    ahead,
    batches_of,
    gap,
    harmonic,
    largest_kl,
    mean_of,
    measure,
    measured,
    perplexity,
    score,
    with_error,
)
from npt.editing.benchmark.methods import Context, Method, Setup, Store
from npt.editing.benchmark.records import Neighbour, Record, check_apart, read_records, record_of
from npt.editing.benchmark.rows import LESS, Row, table
from npt.editing.measure import mean_kl
from npt.editing.metrics import Source
from npt.editing.replay import Recording
from npt.editing.requests import Request
from npt.editing.solve import Factors
from npt.errors import DataError, NPTError, RunError
from npt.runs.editing_bench import kept_records
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
OUTCOME = Outcome(
    group=0, efficacy=1.0, paraphrase=0.5, locality=1.0, ordering=None, forced=0.9, forced_all=1.0, fluency=None,
    fluency_change=None, kl=0.1, rise=0.0, skill=None, skill_change=None, seconds=2.0, passes=3.0, bytes=4.0,
)  # fmt: skip


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


def test_a_largest_value_has_no_error_and_a_ratio_is_of_geometric_means() -> None:
    found = [replace(OUTCOME, group=g, kl=kl, rise=rise) for g, kl, rise in ((0, 0.1, 0.2), (1, 0.4, 0.0))]
    assert largest_kl(found) == 0.4 and math.isnan(with_error(found, largest_kl)[1])
    assert perplexity(found) == pytest.approx(math.exp(0.1)) and with_error(found, perplexity)[1] > 0
    assert FIGURES["forced"](found) == pytest.approx(0.9) and FIGURES["forced all"](found) == 1


def row(method: str, outcomes: Sequence[Outcome], batch: int = 1) -> Row:
    return Row(method, batch, False, [1] * len(outcomes), "", list(outcomes))


def test_a_table_has_a_row_for_each_method_and_leaves_out_what_is_not_known() -> None:
    two = [OUTCOME, replace(OUTCOME, group=1)]
    one = row("one", [OUTCOME, replace(OUTCOME, group=1, efficacy=0.0)])
    lines = table([one, row("two", two), row("three", [OUTCOME], 8)]).splitlines()
    assert lines[0].startswith("| method | batch | records | efficacy | paraphrase | locality | S |")
    assert "ordering" not in lines[0] and "skill" not in lines[0] and lines[0].endswith(f"| {LESS} |")
    assert lines[2].startswith("| one | 1 | 2 | 0.5 ± 0.5 | 0.5 ± 0 | 1 ± 0 | ") and lines[2].endswith("| - |")
    assert lines[3].startswith("| two | 1 | 2 | 1 ± 0 | 0.5 ± 0 |") and lines[3].endswith("| 0.15 ± 0.38 |")
    assert lines[4].startswith("| three | 8 | 1 | 1 | 0.5 | 1 | ") and lines[4].endswith("| - |")


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


def test_records_of_a_batch_can_be_written_in_turn_and_measuring_can_begin_later(setup: Setup, asker: Asker) -> None:
    method = Said(setup, 0.0)
    batches = batches_of([RECORD, RECORD, RECORD, RECORD], 2)
    found = list(measured(method, asker, batches, progress=False, sequential=True, first=1))
    assert method.calls == [1, 1] and [o.group for one in found for o in one.outcomes] == [1, 1]
    assert {o.passes for o in found[0].outcomes} == {2}


def test_texts_are_kept_of_the_first_records_and_of_what_came_out_wrong(
    setup: Setup, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npt.editing.benchmark.figures.SHOWN", 1)

    def kinds(found: Sequence[Measured]) -> list[tuple[str, bool]]:
        return [(example.kind, example.right) for one in found for example in one.examples]

    batches = [[base_record(asker)], [base_record(asker)], [RECORD]]
    found = list(measured(Said(setup, 0.0), asker, batches, progress=False))
    assert kinds(found) == [("prompt", True), ("paraphrase", True), ("neighbour", True), ("prompt", False)]
    prompt = found[0].examples[0]
    assert prompt.before == prompt.after == asker.tokenizer.decode(asker.said(prompt.prompt)).strip() != ""
    found = list(measured(Said(setup, 5.0), asker, [[RECORD]] * 2, progress=False, wrong=2))
    assert [not right for _, right in kinds(found)] == [True] * 3  # of the second record none is left to show


def test_bytes_are_those_of_the_saved_lora(setup: Setup, tmp_path: Path) -> None:
    method = Store(setup, values="newton", steps=1)
    method.write_many([RECORD.request])
    method._store.save(tmp_path / "store")
    weights = load_file(tmp_path / "store" / "adapter_model.safetensors")
    assert method.bytes == sum(4 * tensor.numel() for tensor in weights.values()) > 0
    method.undo()
    assert method.bytes == 0


def test_development_records_are_not_reported() -> None:
    other = replace(RECORD, request=replace(RECORD.request, prompt="One day, Tim had a"), case="CounterFact 3")
    here, there = Path("test.json"), Path("dev.json")
    check_apart([RECORD], here, [other], there)
    with pytest.raises(DataError, match=r"record 2 \('One day, Tim saw a big'\) is record 1 of --tuned-on dev.json"):
        check_apart([other, RECORD], here, [RECORD], there)
    with pytest.raises(DataError, match="record 1 .* is record 2 of"):
        check_apart([replace(RECORD, case="CounterFact 3")], here, [replace(other, case="zsRE 3"), other], there)
    assert record_of({**FLAT, "case_id": 7}, "here").case == "CounterFact 7"


def test_divergence_is_that_of_the_whole_text(setup: Setup, asker: Asker) -> None:
    method = Said(setup, 0.5)
    texts = ["Once upon a time, there was a dog.", "Tom ran."]
    with method.once():
        kl, rise = asker.on_text(method)
        factors = method.deltas._factors[3]
    with method.at(3) as bench:
        bench.adapter.set(factors)
        assert kl == pytest.approx(mean_kl(bench, texts), rel=1e-4) and kl > 1e-4
        edited = losses(asker)
    assert rise == pytest.approx(edited - losses(asker), rel=1e-3) and rise > 1e-4


@torch.no_grad()
def losses(asker: Asker) -> float:
    """Mean negative log-likelihood of the asker's text, in nats a token."""
    found = []
    for ids in map(torch.tensor, asker.text):
        likely = asker.base(ids[None]).logits[0, :-1].log_softmax(-1)
        found += [-float(likely[i, token]) for i, token in enumerate(ids[1:])]
    return fmean(found)


def test_few_recordings_are_kept_of_those_used_last_in_main_memory(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npt.editing.benchmark.asking._RECORDINGS", 2)
    asker, method = Asker(setup.model, setup.tokenizer, [], 2), Said(setup, 0.0)
    records = [replace(RECORD, request=replace(RECORD.request, target=word)) for word in ("cat", "box", "dog")]
    first = [asker.answers(method, records[i]) for i in (0, 1, 0, 2)]
    ids = [tuple(row.ids for row in asker.rows_of(method, item)) for item in records]
    assert list(asker._below) == [ids[0], ids[2]] and first[0] == first[2]
    hidden = asker._below[ids[0]].hidden
    assert hidden is not None and hidden.device.type == "cpu"


def test_recordings_behind_a_context_are_not_kept(setup: Setup) -> None:
    asker, told = Asker(setup.model, setup.tokenizer, [], 2), Context(setup)
    told.write_many([RECORD.request])
    behind = asker.answers(told, RECORD)
    assert not asker._below and behind == asker.answers(told, RECORD)
    told.undo()
    asker.answers(told, RECORD)
    assert len(asker._below) == 1


def test_a_recording_moves_with_all_that_it_holds() -> None:
    one = torch.zeros(1, 2)
    found = Recording({"input_ids": one}, one, (None, (one, None, [one])), one).to("meta")
    rest = found.rests[1]
    assert rest is not None and rest[1] is None and found.hidden is not None and found.logits is not None
    moved = [found.batch["input_ids"], found.hidden, rest[0], rest[2][0], found.logits]
    assert [tensor.device.type for tensor in moved] == ["meta"] * 5


def test_a_batch_that_fails_is_taken_back(setup: Setup, asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    method, before = Said(setup, 5.0), logits(asker)

    def fail(self: Asker, method: Method) -> tuple[float, float]:
        raise NPTError("no")

    monkeypatch.setattr(Asker, "on_text", fail)
    with pytest.raises(NPTError, match="no"):
        measure(method, asker, [[RECORD]], progress=False)
    assert torch.equal(logits(asker), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_stops_the_method_before_it_is_kept(
    value: float, setup: Setup, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = logits(asker)
    monkeypatch.setattr(Asker, "on_text", lambda self, method: (value, 0.0))
    with pytest.raises(
        RunError, match=rf"noise: kl is {value} after 'One day, Tim saw a big' was written: .*; give .*--option"
    ):
        measure(Said(setup, 5.0), asker, [[RECORD]], label="noise", progress=False)
    assert torch.equal(logits(asker), before)


def test_weights_that_are_not_numbers_are_such_a_figure(setup: Setup, asker: Asker) -> None:
    with pytest.raises(RunError, match=r"Editing: kl is nan"):
        measure(Said(setup, math.nan), asker, [[RECORD]], progress=False)


def test_a_record_without_neighbours_has_no_locality(setup: Setup, asker: Asker) -> None:
    (found,) = measure(Said(setup, 0.0), asker, [[replace(RECORD, neighbours=())]], progress=False)
    assert found.locality is None and found.ordering is None and found.kl == 0


def test_figures_beyond_a_float_are_infinite_and_of_nothing_are_none() -> None:
    assert perplexity([replace(OUTCOME, rise=1e4)]) == math.inf and math.isnan(largest_kl([]))


def test_batches_are_in_order_or_drawn_without_a_record_twice() -> None:
    records = [replace(RECORD, paraphrases=(str(i),)) for i in range(13)]
    drawn = batches_of(records, 3, draws=4)
    assert [len(batch) for batch in drawn] == [3] * 4 and len({r.paraphrases for batch in drawn for r in batch}) == 12
    assert drawn == batches_of(records, 3, draws=4) != batches_of(records, 3, draws=4, seed=1)
    records = records[:5]
    assert batches_of(records, 2) == [records[:2], records[2:4], records[4:]]
    for size, draws, message in (
        (0, None, "batch=0"), (2, 0, "draws=0"), (6, 1, "batch=6, draws=1: 6 records, of the 5 .*; use a smaller batch"),
        (2, 3, "batch=2, draws=3: 6 records, of the 5 there are, none twice; use at most 2 draws of 2, or smaller batches"),
    ):  # fmt: skip
        with pytest.raises(NPTError, match=message):
            batches_of(records, size, draws)


def test_a_sentence_ends_at_its_stop_or_line() -> None:
    assert first_sentence(" big. It ran") == "big."
    assert first_sentence("3.5 metres\nlong") == "3.5 metres"
    assert first_sentence("no end") == "no end"


def test_records_that_editors_refuse_are_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    asker = Asker(random_base("gpt2"), spelling_tokenizer(bos=False), [])
    first, other = (Record(Request("A is the name of", "B", subject), (), ()) for subject in ("A", "name"))
    assert kept_records([first, other], asker) == [other]
    assert "record 1 is left out: 'A is the name of': the subject 'A' is the first token" in caplog.text
    with pytest.raises(DataError, match="no record can be written"):
        kept_records([first], asker)
