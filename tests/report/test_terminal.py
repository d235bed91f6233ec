"""The terminal's tables show every figure, what is missing, and text that looks like markup as text."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from npt.planning.formed_deltas import MemoryRow
from npt.planning.tables import render_memory
from npt.report.terminal import render_report

FIGURES: dict[str, Any] = {
    "perplexity": {"npt_perplexity": 3.6123, "original_perplexity": 3.6, "perplexity_ratio": 1.00342},
    "divergence": {"mean_kl": 0.00123, "median_kl": 0.0004, "kl_p99": 0.0135, "top1_agreement": 0.984},
}
OTHER: dict[str, Any] = {
    "perplexity": {"npt_perplexity": 20.5, "original_perplexity": 20.0, "perplexity_ratio": 1.025},
    "divergence": {"mean_kl": 0.0777},
    "tokens": 1234,
}
REPORT: dict[str, Any] = {
    "model_config": {
        "base_model": "some/base", "npt_layers": [2, 3], "rank": 16, "trainable_parameters": 9798,
        "base_parameters": 260_000,
    },
    "protocol": {"context_length": 256, "stride": 128, "dtype": "float32", "seed": 7},
    "evaluations": {
        **FIGURES,
        "corpora": {"self": {**FIGURES, "tokens": 102_000}, "grimm": OTHER},
        "weight_delta_stats": {
            "mean_frobenius": 0.4412, "exact_frobenius": 0.4311, "relative_frobenius": 0.0321, "rms_entry": 0.0042,
        },
        "generation_samples": {
            "prompts": ["a", "b", "c"], "npt_generations": ["one", "two", "three"],
            "original_generations": ["one", "zwei", "drei"],
        },
    },
    "expected_outcomes": {
        "functional_fidelity": {"target": "mean KL <= 0.01", "value": 0.00123, "met": True},
        "low_magnitude_delta": {"target": "rms entry < 0.01", "value": 0.0042, "met": True},
        "perplexity_ratio": {"target": "1.0 +/- 0.05", "value": 1.00342, "met": False},
    },
}  # fmt: skip


def shown(report: dict[str, Any]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    render_report(report, console)
    return console.export_text()


@pytest.mark.parametrize(
    "words",
    ["Blocks 2 and 3 of some/base are neuro-plastic",
     "9,798 new parameters (3.77 %)", "102,000", "3.6123", "1.00342", "0.00123", "0.00040",
     "0.0135", "98.40 %", "0.4412 (exact reference 0.4311), 3.21 %", "entry 0.0042", "context 256, stride 128",
     "grimm", "1.02500", "0.07770"],
)  # fmt: skip
def test_every_figure_is_there(words: str) -> None:
    assert words in shown(REPORT)


def test_each_outcome_has_its_verdict() -> None:
    lines = {line.split()[0]: line.rstrip() for line in shown(REPORT).splitlines() if "target" in line}
    assert list(lines) == list(REPORT["expected_outcomes"])
    assert lines["functional_fidelity"].endswith("mean KL <= 0.01: met")
    assert lines["perplexity_ratio"].endswith("1.0 +/- 0.05: not met") and "1.0034" in lines["perplexity_ratio"]


def test_text_of_the_first_two_prompts_side_by_side() -> None:
    text = shown(REPORT)
    assert "the same text" in text and "zwei" in text and "different text" in text
    assert "three" not in text


def test_text_of_a_model_is_never_markup() -> None:
    report = copy.deepcopy(REPORT)
    report["model_config"]["base_model"] = "[red]base"
    report["evaluations"]["corpora"] = {"[b]corpus": OTHER}
    samples = report["evaluations"]["generation_samples"]
    samples["npt_generations"], samples["original_generations"] = ["x [/bold] [link=y]z\\"], ["[/] \\"]
    text = shown(report)
    for words in ("[red]base", "[b]corpus", "x [/bold] [link=y]z\\", "[/] \\"):
        assert words in text


@pytest.mark.parametrize("part", ["model_config", "protocol", "evaluations", "expected_outcomes"])
def test_a_missing_part_is_no_error(part: str) -> None:
    assert shown({name: value for name, value in REPORT.items() if name != part})


def test_missing_figures_are_called_not_measured() -> None:
    assert "share not measured" in shown({**REPORT, "model_config": {"trainable_parameters": 9798}})
    line = next(line for line in shown(REPORT).splitlines() if "KL, 99 %" in line)
    assert "0.0135" in line and "not measured" in line  # the second corpus lacks it
    report = copy.deepcopy(REPORT)
    del report["evaluations"]["weight_delta_stats"]["relative_frobenius"]
    report["expected_outcomes"]["functional_fidelity"] = {"target": "mean KL <= 0.01", "value": None, "met": None}
    text = shown(report)
    assert "not measured of the weight's" in text
    assert "not met" not in next(line for line in text.splitlines() if "functional_fidelity" in line)


def test_a_report_without_corpora_shows_its_own_figures() -> None:
    report = copy.deepcopy(REPORT)
    del report["evaluations"]["corpora"]
    assert "1.00342" in shown(report)


def test_memory_rows() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    render_memory([MemoryRow("[x] of one block", 3 * 2**29, "measured"), MemoryRow("y", 12, "computed")], console)
    text = console.export_text()
    assert "[x] of one block" in text and "1.50 GiB" in text and "12 B" in text and "measured" in text
