"""Figures over contexts, and the gradient's setting that is best on the development contexts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from benchmarks.absorbing.exam import right
from benchmarks.kept import Record
from npt.errors import NPTError

ARMS = ("nothing", "context", "descended", "absorb", "gradient")


@dataclass(frozen=True)
class Chosen:
    """The gradient's setting.

    rate, tokens, beta: see `npt.editing.absorbing.gradient.Training`. steps: after which it ends.
    """

    rate: float
    tokens: str
    steps: int
    beta: float = 0.0


def measured(records: Mapping[str, Record], kind: str) -> dict[str, Record]:
    """The contexts of a kind whose own effect was large enough."""
    return {name: one for name, one in records.items() if one["kind"] == kind and "absorb" in one}


def left_out(records: Mapping[str, Record], kind: str) -> dict[str, float]:
    """{name: its effect in nats} of those whose effect was too small."""
    return {name: one["effect"] for name, one in records.items() if one["kind"] == kind and "absorb" not in one}


def points(record: Record, rate: float, tokens: str, beta: float) -> list[Record]:
    """The gradient's figures over its steps.

    Raises:
        NPTError: it was not trained with this rate on these tokens.
    """
    for one in record["gradient"]:
        if (one["rate"], one["tokens"], one["beta"]) == (rate, tokens, beta):
            found: list[Record] = one["points"]
            return found
    raise NPTError(f"rate {rate:g}, beta {beta:g}, on {tokens} tokens was not measured; measure it on both parts")


def recovered(record: Record, mark: Record) -> float:
    """The share of the context's effect that an arm has: 1 - KL / effect."""
    return 1 - float(mark["kl"]) / float(record["effect"])


def given(record: Record, texts: Sequence[str]) -> float | None:
    """The share of the right answers of the model with the context that an arm's texts give; None where it has none."""
    if record["answers"] is None:
        return None
    known, found = right(record["taught"], record["answers"]), right(list(texts), record["answers"])
    return sum(b for a, b in zip(known, found, strict=True) if a) / sum(known) if any(known) else None


def with_error(values: Sequence[float | None]) -> tuple[float, float] | None:
    """(mean, its standard error, NaN for a single value) of the values that there are; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return fmean(known), stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan


def choose(records: Mapping[str, Record], kind: str, limit: float) -> Chosen:
    """The gradient's setting with the largest mean share recovered among those within the limit on general text.

    As absorbing chooses: where none is within, the one nearest to the limit. Where no development context of the kind has a
    large enough effect, those of the other kind choose.

    Args:
        records: of the development contexts.
        kind: of the contexts.
        limit: mean KL on general text that is allowed, in nats a token.

    Raises:
        NPTError: no development context was measured, or not all with the same settings.
    """
    found = measured(records, kind) or {name: one for name, one in records.items() if "absorb" in one}
    if not found:
        raise NPTError(
            "no development context was measured that moves the model enough; run --part development first, with a model "
            "that follows one of them"
        )
    first = next(iter(found.values()))
    ranked = []
    for one in first["gradient"]:
        rows = [points(record, one["rate"], one["tokens"], one["beta"]) for record in found.values()]
        for marks in zip(*rows, strict=True):
            share = fmean(recovered(r, mark) for r, mark in zip(found.values(), marks, strict=True))
            over = max(0.0, fmean(mark["text_kl"] for mark in marks) - limit)
            ranked.append((over, -share, Chosen(one["rate"], one["tokens"], marks[0]["steps"], one["beta"])))
    if not ranked:
        raise NPTError("the development contexts were measured without a gradient; give --rates and --steps there")
    return min(ranked, key=lambda entry: entry[:2])[2]


def at(record: Record, chosen: Chosen) -> Record:
    """The gradient's figures at the chosen setting."""
    found = points(record, chosen.rate, chosen.tokens, chosen.beta)
    return next(mark for mark in found if mark["steps"] == chosen.steps)


def summary(records: Sequence[Record], chosen: Chosen) -> dict[str, dict[str, tuple[float, float] | None]]:
    """{arm: {figure: (mean over contexts, its standard error)}}; None where an arm has no such figure.

    Figures: recovered and given (shares), text_kl (nats a token), seconds (without those of questions and answers, which
    both need), peak (bytes).

    Args:
        records: measured contexts of one kind.
        chosen: the gradient's setting.
    """
    found: dict[str, dict[str, tuple[float, float] | None]] = {}
    for arm in ARMS:
        rows = [(record, mark) for record in records if (mark := _mark(record, arm, chosen)) is not None]
        found[arm] = {
            "recovered": with_error([recovered(record, mark) for record, mark in rows]),
            "given": with_error([given(record, mark["texts"]) for record, mark in rows]),
            "text_kl": with_error([mark.get("text_kl") for _, mark in rows]),
            "seconds": with_error([mark.get("seconds") for _, mark in rows]),
            "peak": with_error([record.get("peaks", {}).get(arm) for record in records]),
        }
    return found


def _mark(record: Record, arm: str, chosen: Chosen) -> Record | None:
    if arm == "context":
        return {"kl": 0.0, "texts": record["taught"]}
    return at(record, chosen) if arm == "gradient" else record.get(arm)


def curve(records: Sequence[Record], chosen: Chosen) -> Iterator[tuple[int, float, tuple[float, float], float]]:
    """(steps, mean seconds, (mean share recovered, its standard error), mean KL on general text) of the gradient."""
    rows = [points(record, chosen.rate, chosen.tokens, chosen.beta) for record in records]
    for marks in zip(*rows, strict=True):
        share = with_error([recovered(record, mark) for record, mark in zip(records, marks, strict=True)])
        assert share is not None
        yield marks[0]["steps"], fmean(m["seconds"] for m in marks), share, fmean(m["text_kl"] for m in marks)


def caught_up(records: Sequence[Record], arm: str, chosen: Chosen, limit: float) -> tuple[int, float | None]:
    """(contexts in which the gradient gets as far as an arm, the median of its seconds over the arm's there).

    It gets as far at the first measured step where it has at most the arm's KL on the questions and, on general text, at most
    the limit or the arm's own, whichever is larger.
    """
    ratios = []
    for record in records:
        own = record[arm]
        most = max(limit, own["text_kl"])
        for mark in points(record, chosen.rate, chosen.tokens, chosen.beta):
            if mark["kl"] <= own["kl"] and mark["text_kl"] <= most:
                ratios.append(mark["seconds"] / own["seconds"])
                break
    return len(ratios), median(ratios) if ratios else None
