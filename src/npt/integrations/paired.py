"""An NPT model and its base on the same items of lm-evaluation-harness's tasks: figures, and their paired difference.

The standard error of a difference is that of the items' differences. Two models that answer nearly alike have standard errors
of their own that are much larger than it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from npt.common.display import visible

#: Metrics that are exp(-mean log-likelihood), per item or per word or byte.
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")


@dataclass(frozen=True)
class Figure:
    """A value and its standard error; the error of fewer than two items is None."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Comparison:
    """One metric of one task for both models. difference: NPT - original; changed: items whose own results differ."""

    task: str
    metric: str
    items: int
    original: Figure
    npt: Figure
    difference: Figure
    changed: int


def comparisons(original: Mapping[str, Any], npt: Mapping[str, Any]) -> tuple[list[Comparison], list[str]]:
    """(comparisons, metrics left out as "task metric") of two results of `simple_evaluate` with their samples.

    Compared are means over items, perplexities and bits per byte. Left out is any other metric: it is no function of such
    means, so items give no standard error of its difference.

    Raises:
        ValueError: the two results are not of the same items.
    """
    found, left_out = [], []
    for task, samples in npt["samples"].items():
        for key, value in npt["results"][task].items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            pairs = _paired(original["samples"][task], samples, metric, chosen)
            terms = [_terms(metric, items) for items in pairs]
            values = [original["results"][task].get(key), value]
            if all(term is not None and _same(term[0], told) for term, told in zip(terms, values, strict=True)):
                label = metric if chosen == "none" else f"{metric}, {chosen}"
                found.append(_comparison(task, label, pairs, terms))
            else:
                left_out.append(f"{task} {metric}")
    return found, left_out


def _paired(original: Sequence[Any], npt: Sequence[Any], metric: str, chosen: str) -> list[list[Any]]:
    """[the base's, the NPT model's] results of the items, in one order."""
    own = [{row["doc_id"]: row for row in rows if row["filter"] == chosen} for rows in (original, npt)]
    if [row["doc_hash"] for row in own[0].values()] != [own[1].get(key, {}).get("doc_hash") for key in own[0]]:
        raise ValueError("the harness gave both models different items of a task")
    return [[rows[key].get(metric) for key in own[0]] for rows in own]


def _terms(metric: str, items: Sequence[Any]) -> tuple[float, np.ndarray] | None:
    """(value, what each item adds to it to first order) of a metric; None where it is no mean or perplexity.

    Items are numbers, or (log-likelihood, words or bytes) for a perplexity per word or byte. The additions of n items have
    the value's standard error as their standard deviation over sqrt(n).
    """
    try:
        table = np.asarray(items, dtype=float)
    except (TypeError, ValueError):  # text, nothing, or lists of several lengths
        return None
    weighted = metric in (*PERPLEXITIES[1:], "bits_per_byte")
    if table.size == 0 or table.shape[1:] != ((2,) if weighted else ()):
        return None
    numbers, weights = (table[:, 0], table[:, 1]) if weighted else (table, np.ones(len(table)))
    mean = numbers.sum() / weights.sum()
    additions = (numbers - mean * weights) / weights.mean()
    if metric in PERPLEXITIES:
        perplexity = float(np.exp(-mean))
        return perplexity, -perplexity * additions
    if metric == "bits_per_byte":
        return float(-mean / math.log(2)), -additions / math.log(2)
    return float(mean), additions


def _same(value: float, told: Any) -> bool:
    """True where the harness's own figure is this one."""
    return isinstance(told, (int, float)) and math.isclose(value, told, rel_tol=1e-6, abs_tol=1e-9)


def _comparison(task: str, metric: str, pairs: list[list[Any]], terms: list[Any]) -> Comparison:
    (original, of_original), (npt, of_npt) = terms
    return Comparison(
        task=task,
        metric=metric,
        items=len(of_npt),
        original=Figure(original, _error(of_original)),
        npt=Figure(npt, _error(of_npt)),
        difference=Figure(npt - original, _error(of_npt - of_original)),
        changed=sum(one != other for one, other in zip(*pairs, strict=True)),
    )


def _error(additions: np.ndarray) -> float | None:
    return float(additions.std(ddof=1) / math.sqrt(len(additions))) if len(additions) > 1 else None


def comparison_tables(found: Sequence[Comparison]) -> Iterator[Table]:
    """A table for each task, one row for each metric."""
    for task in dict.fromkeys(each.task for each in found):
        rows = [each for each in found if each.task == task]
        table = Table(title=f"{escape(visible(task))}, {rows[0].items} items", title_justify="left")
        table.add_column("")
        for name in ("original", "NPT", "NPT - original", "changed"):
            table.add_column(name, justify="right")
        for each in rows:
            figures = (_shown(each.original, ""), _shown(each.npt, ""), _shown(each.difference, "+"))
            table.add_row(escape(visible(each.metric)), *figures, str(each.changed))
        yield table


def _shown(figure: Figure, sign: str) -> str:
    return f"{figure.value:{sign}.4g}" + ("" if figure.error is None else f" ± {figure.error:.2g}")
