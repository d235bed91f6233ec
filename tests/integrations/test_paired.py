"""The paired comparison of two models' results: values, standard errors, and what is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from npt.integrations.paired import Comparison, comparison_tables, comparisons


def result(items: dict[str, list[Any]], **figures: float) -> dict[str, Any]:
    """Results of a task as `simple_evaluate` gives them: items of each metric, and the figures that it reports for them."""
    count = len(next(iter(items.values())))
    rows = [
        {"doc_id": n, "doc_hash": str(n), "filter": "none", **{name: values[n] for name, values in items.items()}}
        for n in range(count)
    ]
    told = {f"{name},none": value for name, value in figures.items()}
    return {"samples": {"task": rows}, "results": {"task": {"alias": "task", **told, "acc_stderr,none": 0.1}}}


def test_the_error_of_a_mean_s_difference_is_that_of_the_items_differences() -> None:
    base, npt = [1, 1, 0, 0, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1, 1, 0]
    found, left_out = comparisons(result({"acc": base}, acc=0.625), result({"acc": npt}, acc=0.625))
    (each,) = found
    assert (each.task, each.metric, each.items, each.changed, left_out) == ("task", "acc", 8, 2, [])
    assert each.original.value == each.npt.value == 0.625 and each.difference.value == 0
    assert each.original.error == pytest.approx(np.std(base, ddof=1) / np.sqrt(8))
    assert each.difference.error == pytest.approx(np.std(np.subtract(npt, base), ddof=1) / np.sqrt(8))


@pytest.mark.parametrize("metric", ["perplexity", "word_perplexity", "bits_per_byte"])
def test_errors_of_perplexities_are_those_of_resampled_items(metric: str) -> None:
    """Items drawn again with replacement, the same for both models, give the spread of each value and of the difference."""
    chance = np.random.default_rng(0)
    weights = np.ones(400) if metric == "perplexity" else chance.integers(1, 20, 400).astype(float)
    base = -chance.gamma(2, 0.5, 400) * weights
    npt = base + 0.1 * chance.normal(size=400) * weights - 0.02

    def value(logs: np.ndarray, chosen: Any = slice(None)) -> float:
        mean = logs[chosen].sum() / weights[chosen].sum()
        return float(-mean / np.log(2) if metric == "bits_per_byte" else np.exp(-mean))

    def items(logs: np.ndarray) -> list[Any]:
        return list(logs) if metric == "perplexity" else list(zip(logs, weights, strict=True))

    results = (result({metric: items(logs)}, **{metric: value(logs)}) for logs in (base, npt))
    ((each,), _) = comparisons(*results)
    draws = [chance.integers(0, 400, 400) for _ in range(4000)]
    spread = {
        "original": np.std([value(base, draw) for draw in draws]),
        "npt": np.std([value(npt, draw) for draw in draws]),
        "difference": np.std([value(npt, draw) - value(base, draw) for draw in draws]),
    }
    for name, expected in spread.items():
        assert getattr(each, name).error == pytest.approx(expected, rel=0.1), name
    assert each.difference.value == pytest.approx(value(npt) - value(base))
    assert each.difference.error < 0.3 * each.npt.error


def test_other_metrics_are_left_out_and_named() -> None:
    """Pairs for an F1, a mean that the harness reports otherwise, text."""
    items = {"f1": [(0, 1), (1, 1)], "odd": [1.0, 2.0], "said": ["a", "b"], "acc": [0, 1]}
    one = result(items, f1=0.5, odd=7.0, said=0.5, acc=0.5)
    found, left_out = comparisons(one, one)
    assert [each.metric for each in found] == ["acc"] and left_out == ["task f1", "task odd", "task said"]


def test_a_single_item_has_no_error() -> None:
    ((each,), _) = comparisons(result({"acc": [0]}, acc=0.0), result({"acc": [1]}, acc=1.0))
    assert each.difference.value == 1 and each.difference.error is None
    assert "±" not in printed([each])


def test_items_are_paired_by_their_number() -> None:
    one, two = (result({"acc": [0, 1, 1, 1]}, acc=0.75) for _ in range(2))
    two["samples"]["task"].reverse()
    ((each,), _) = comparisons(one, two)
    assert each.changed == 0 and each.difference.error == 0
    two["samples"]["task"][0]["doc_hash"] = "another"
    with pytest.raises(ValueError, match="different items"):
        comparisons(one, two)


def printed(found: list[Comparison]) -> str:
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as shown:
        for table in comparison_tables(found):
            console.print(table)
    return shown.get()


def test_a_table_for_each_task() -> None:
    base, npt = [1, 1, 0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]
    found, _ = comparisons(result({"acc": base}, acc=0.625), result({"acc": npt}, acc=0.875))
    text = printed(found)
    assert "task, 8 items" in text
    for words in ("0.625 ± 0.18", "0.875 ± 0.12", "+0.25 ± 0.25", "4"):
        assert words in text, words
