"""Figures of a method on records, on text that the model writes with nothing of the answer given.

efficacy     the text behind the prompt begins with the target
paraphrase   the same behind the paraphrases
locality     behind a neighbour's prompt, the base and the edited model write the same up to the sentence's end
ordering     behind a neighbour's prompt, what is right stays likelier than the target; of records that say what is right
S            harmonic mean of efficacy, paraphrase and locality
forced       share of the target's tokens that are the likeliest with those before given; `gap` is forced less efficacy
kl           mean divergence of next-token distributions from the base's over running text, in nats; 0 for the context, which
             is put in front of prompts alone
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from npt.common.display import markdown
from npt.common.progress import progress_bar
from npt.editing.bench import chunks
from npt.editing.benchmark.asking import Asker
from npt.editing.benchmark.methods import Method
from npt.editing.benchmark.records import Record
from npt.errors import NPTError


@dataclass(frozen=True)
class Outcome:
    """The figures of one record; `ordering` is None where the record does not say what is right.

    group: the batch that it was written in. kl, seconds and passes are those of the batch: divergence, and cost of one edit.
    """

    group: int
    efficacy: float
    paraphrase: float
    locality: float
    ordering: float | None
    forced: float
    kl: float
    seconds: float
    passes: float


def measure(
    method: Method, asker: Asker, batches: Sequence[Sequence[Record]], label: str = "", progress: bool = True
) -> list[Outcome]:
    """The outcome of every record: those of a batch are written together, then all are asked, then they are taken back."""
    for near in (near for batch in batches for record in batch for near in record.neighbours):
        asker.said(near.prompt)  # while nothing is written
    found = []
    with progress_bar(label or "Editing", sum(map(len, batches)), progress, unit="records") as advance:
        for group, part in enumerate(batches):
            start, passes = time.perf_counter(), method.passes
            try:
                method.write_many([record.request for record in part])
                cost = (time.perf_counter() - start) / len(part), (method.passes - passes) / len(part)
                kl = asker.divergence(method)
                for record in part:
                    found.append(_outcome(method, asker, record, group, kl, *cost))
                    advance(1)
            finally:
                method.undo()
    return found


def batches_of(records: Sequence[Record], size: int, draws: int | None = None, seed: int = 0) -> list[list[Record]]:
    """Records in batches: one after the other, or so many random draws of `size` different ones.

    Raises:
        NPTError: a size or number of draws below 1, or draws of more records than there are.
    """
    if size < 1 or (draws is not None and draws < 1):
        raise NPTError(f"batch={size}, draws={draws}: use whole numbers from 1")
    if draws is None:
        return [list(part) for part in chunks(records, size)]
    if size > len(records):
        raise NPTError(f"batch={size}: more than the {len(records)} records there are; use a smaller batch")
    chance = random.Random(seed)
    return [chance.sample(list(records), size) for _ in range(draws)]


def _outcome(
    method: Method, asker: Asker, record: Record, group: int, kl: float, seconds: float, passes: float
) -> Outcome:
    target = record.request.target
    said = [asker.says(method.text(text), target) for text in record.paraphrases]
    forced, locality, ordering = asker.answers(method, record)
    return Outcome(
        group=group,
        efficacy=float(asker.says(method.text(record.request.prompt), target)),
        paraphrase=fmean(said) if said else math.nan,
        locality=locality,
        ordering=ordering,
        forced=forced,
        kl=kl,
        seconds=seconds,
        passes=passes,
    )


# -- over records ----------------------------------------------------------------------------------------------------------


def harmonic(values: Sequence[float]) -> float:
    """The harmonic mean; 0 where a value is."""
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0


def mean_of(name: str) -> Callable[[Sequence[Outcome]], float]:
    """The mean of one figure over the records that have it; NaN where none has."""

    def over(outcomes: Sequence[Outcome]) -> float:
        values = [v for v in (getattr(outcome, name) for outcome in outcomes) if v is not None and not math.isnan(v)]
        return fmean(values) if values else math.nan

    return over


def score(outcomes: Sequence[Outcome]) -> float:
    """S: the harmonic mean of the mean efficacy, paraphrase and locality."""
    return harmonic([mean_of(name)(outcomes) for name in ("efficacy", "paraphrase", "locality")])


def gap(outcomes: Sequence[Outcome]) -> float:
    """The teacher-forced figure less that of generated text."""
    return mean_of("forced")(outcomes) - mean_of("efficacy")(outcomes)


FIGURES: dict[str, Callable[[Sequence[Outcome]], float]] = {
    **{name: mean_of(name) for name in ("efficacy", "paraphrase", "locality", "ordering")},
    "S": score,
    **{"forced": mean_of("forced"), "gap": gap, "kl": mean_of("kl")},
    **{name: mean_of(name) for name in ("passes", "seconds")},
}


def with_error(outcomes: Sequence[Outcome], figure: Callable[[Sequence[Outcome]], float]) -> tuple[float, float]:
    """(a figure, its standard error by leaving out one batch at a time).

    Records of a batch share a model, so batches are what is independent: single edits are batches of one. For a mean over
    batches of equal size this is the usual standard error. NaN with a single batch.
    """
    return _leaving_out(outcomes, lambda group: figure(_without(outcomes, group)))


def ahead(outcomes: Sequence[Outcome], others: Sequence[Outcome]) -> tuple[float, float]:
    """(S of a method less that of another on the same batches, the standard error of this paired difference).

    Raises:
        NPTError: the two were not measured in the same batches.
    """
    if [outcome.group for outcome in outcomes] != [outcome.group for outcome in others]:
        raise NPTError("two methods can be compared on the same records in the same batches only; measure them so")
    return _leaving_out(outcomes, lambda group: score(_without(outcomes, group)) - score(_without(others, group)))


def _without(outcomes: Sequence[Outcome], group: int | None) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.group != group]


def _leaving_out(outcomes: Sequence[Outcome], figure: Callable[[int | None], float]) -> tuple[float, float]:
    """(a figure of everything, its standard error), of a figure without a batch; None leaves out nothing."""
    groups = sorted({outcome.group for outcome in outcomes})
    whole, count = figure(None), len(groups)
    if count < 2:
        return whole, math.nan
    left = [figure(group) for group in groups]
    centre = fmean(left)
    return whole, math.sqrt((count - 1) / count * sum((value - centre) ** 2 for value in left))


def table(results: dict[str, Sequence[Outcome]]) -> str:
    """One row per method: every figure, with its standard error where there is one; behind them, S less the first row's."""
    rows, first = [], next(iter(results.values()))
    for name, outcomes in results.items():
        figures = [*(with_error(outcomes, figure) for figure in FIGURES.values()), ahead(outcomes, first)]
        rows.append([name, str(len(outcomes)), *(_cell(*figure) for figure in figures)])
    return markdown(["method", "records", *FIGURES, "S less the first row's"], rows)


def _cell(value: float, error: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3g}" if math.isnan(error) else f"{value:.3g} ± {error:.2g}"


def as_json(results: dict[str, Sequence[Outcome]]) -> dict[str, list[dict[str, Any]]]:
    """{method: figures of every record}, for paired differences."""
    return {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in results.items()}
