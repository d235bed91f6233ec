"""The terminal's summary and the plots show the report's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from npt.errors import NPTError
from npt.report.plots import plot_run
from npt.report.terminal import render_report

FIGURES = {
    "perplexity": {
        "npt_perplexity": 3.61, "original_perplexity": 3.6, "perplexity_ratio": 1.00278,
        "perplexity_ratio_standard_error": 0.0002, "perplexity_difference": 0.01,
    },
    "divergence": {
        "mean_kl": 0.00123, "mean_kl_standard_error": 0.00002, "median_kl": 0.0004, "kl_p99": 0.0135, "kl_p999": 0.1,
        "max_kl": 0.5, "top1_agreement": 0.984, "rms_delta_p": 0.01,
    },
}  # fmt: skip
REPORT = {
    "model_config": {"base_model": "[red]base", "npt_layers": [2, 3], "rank": 16, "trainable_parameters": 9798},
    "protocol": {"context_length": 256, "stride": 256, "dtype": "float32", "seed": 0},
    "evaluations": {
        **FIGURES,
        "corpora": {"self": {**FIGURES, "tokens": 102000}},
        "layer_equivalence": {"layer_2": {"relative_error": 0.03}, "layer_3": {"relative_error": 0.04}},
        "weight_delta_stats": {
            "mean_frobenius": 0.44, "exact_frobenius": 0.43, "relative_frobenius": 0.03, "rms_entry": 0.004,
        },
        "generation_samples": {"prompts": ["A"], "npt_generations": ["A [b]dog"], "original_generations": ["A cat"]},
    },
    "expected_outcomes": {"perplexity_ratio": {"target": "1.0 +/- 0.05", "value": 1.00278, "met": False}},
}  # fmt: skip


def test_table_shows_figures_verdicts_and_text_as_it_is() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    render_report(REPORT, console)
    text = console.export_text()
    for words in (
        "[red]base",
        "9,798",
        "1.00278 ± 0.00020",
        "0.00123",
        "98.40 %",
        "not met",
        "A [b]dog",
        "different text",
    ):
        assert words in text, words


def test_table_without_optional_parts() -> None:
    evaluations = {k: v for k, v in REPORT["evaluations"].items() if k in ("perplexity", "divergence", "corpora")}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    render_report({**REPORT, "evaluations": evaluations}, console)
    assert "not measured" in console.export_text()


def test_plots_skip_what_has_no_data_and_a_torn_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"step": 1, "loss": 0.5, "learning_rate": 0.1}, {"step": 2, "loss": 0.4, "learning_rate": 0.05}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 3, "lo')
    assert {p.name for p in plot_run(tmp_path)} == {"loss.png", "learning_rate.png"}
    assert "torn" in caplog.text
    (tmp_path / "evaluation_report.json").write_text(json.dumps(REPORT))
    assert {p.name for p in plot_run(tmp_path)} == {"loss.png", "learning_rate.png", "layer_error.png"}


def test_plots_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(NPTError, match=r"no metrics\.jsonl"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(NPTError, match="no logged step"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"a\n{"step": 1, "loss": 2}\n')
    with pytest.raises(NPTError, match="line 1: not JSON"):
        plot_run(tmp_path)
