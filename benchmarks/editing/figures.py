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
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.editing.methods import Method
from benchmarks.editing.records import Neighbour, Record
from benchmarks.tables import markdown
from npt.common.progress import progress_bar
from npt.editing.bench import chunks, written
from npt.editing.keys import Prompts
from npt.editing.measure import divergences, follows
from npt.editing.statistics import padded
from npt.errors import NPTError
from npt.tuner.converted import base_of, device_of, eval_mode, vocabulary_size

#: Tokens that are written behind a neighbour's prompt, and behind others beside those of the target.
WRITTEN = 12


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


class Asker:
    """Puts questions to a model before and after edits; remembers what the base says.

    Args:
        model, tokenizer: as a method has them, with nothing written. rows: token ids of running text.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]):
        self.base, self.tokenizer, self.text = base_of(model), tokenizer, list(rows)
        self.prompts = Prompts(tokenizer, self.base.config, vocabulary_size(self.base))
        self._said: dict[str, str] = {}

    def sentence(self, text: str, tokens: int = WRITTEN) -> str:
        """The text that the model writes now, up to the end of its first sentence or line."""
        return first_sentence(written(self.base, self.tokenizer, text, tokens))

    def said(self, prompt: str) -> str:
        """What the base writes behind a prompt; asked once, with nothing at work."""
        if prompt not in self._said:
            self._said[prompt] = self.sentence(prompt)
        return self._said[prompt]

    def says(self, text: str, target: str) -> bool:
        """True where the model writes the target behind a text."""
        tokens = len(self.prompts.target(text, target, None).targets)
        return follows(written(self.base, self.tokenizer, text, WRITTEN + tokens), target)

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits (rows, tokens, vocabulary) of what is at work now."""
        with eval_mode(self.base):
            found: Tensor = self.base(**padded(rows, device_of(self.base)), use_cache=False).logits
        return found

    def forced(self, text: str, target: str) -> tuple[float, float]:
        """(share of the target's tokens that are the likeliest, mean log-likelihood of a token), the target being given."""
        row = self.prompts.target(text, target, None)
        logits = self.logits([row.ids])[0, row.start - 1 : -1].cpu().double().log_softmax(-1)
        ids = torch.tensor(row.targets)
        return float((logits.argmax(-1) == ids).double().mean()), float(logits.gather(-1, ids[:, None]).mean())

    def divergence(self, method: Method) -> float:
        """Mean KL of the edited model from the base over the running text, in nats a token."""
        total, tokens = 0.0, 0
        for part in chunks(self.text, 4):
            edited = self.logits(part)
            with method.disabled():
                base = self.logits(part)
            for i, row in enumerate(part):
                total += float(divergences(base[i, : len(row)], edited[i, : len(row)]).sum())
                tokens += len(row)
        return total / tokens


def first_sentence(text: str) -> str:
    """A text up to the end of its first sentence or line."""
    return re.split(r"(?<=[.!?])(?:\s|$)|\n", text.strip(), maxsplit=1)[0]


def measure(
    method: Method, asker: Asker, records: Sequence[Record], batch: int = 1, label: str = "", progress: bool = True
) -> list[Outcome]:
    """The outcome of every record: `batch` are written together, then all of these are asked, then they are taken back.

    Raises:
        NPTError: a batch of no record.
    """
    if batch < 1:
        raise NPTError(f"batch={batch}: use a whole number from 1")
    for neighbour in (near for record in records for near in record.neighbours):
        asker.said(neighbour.prompt)  # while nothing is written
    found = []
    with progress_bar(label or "Editing", len(records), progress, unit="records") as advance:
        for group, part in enumerate(chunks(records, batch)):
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


def _outcome(
    method: Method, asker: Asker, record: Record, group: int, kl: float, seconds: float, passes: float
) -> Outcome:
    request = record.request
    prompt = method.text(request.prompt)
    said = [asker.says(method.text(text), request.target) for text in record.paraphrases]
    kept = [asker.sentence(method.text(near.prompt)) == asker.said(near.prompt) for near in record.neighbours]
    ordered = [_ordered(method, asker, near, request.target) for near in record.neighbours if near.truth]
    return Outcome(
        group=group,
        efficacy=float(asker.says(prompt, request.target)),
        paraphrase=fmean(said) if said else math.nan,
        locality=fmean(kept) if kept else math.nan,
        ordering=fmean(ordered) if ordered else None,
        forced=asker.forced(prompt, request.target)[0],
        kl=kl,
        seconds=seconds,
        passes=passes,
    )


def _ordered(method: Method, asker: Asker, near: Neighbour, target: str) -> bool:
    text, truth = method.text(near.prompt), near.truth or ""
    return asker.forced(text, truth)[1] > asker.forced(text, target)[1]


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
