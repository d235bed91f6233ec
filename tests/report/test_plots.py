"""Plots of a run show what there is, from partial and damaged files too."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from npt.errors import NPTError
from npt.report.curves import loss, perplexity_ratio, weight_delta
from npt.report.distributions import layer_error
from npt.report.plots import plot_run
from npt.report.run_files import curve, read_json_lines

CALIBRATION = {f"layer_{i}": {"error_before": 0.3, "error_after": 0.03} for i in (9, 10)}
ROWS: list[dict[str, Any]] = [
    {"step": 0, "calibration": CALIBRATION},
    {"step": 0, "eval_perplexity_ratio": 1.01},
    {"step": 10, "loss": 0.5, "equivalence_loss": 0.4, "regularization_loss": 0.0, "learning_rate": 0.1,
     "mean_delta_norm": 0.5},
    {"step": 20, "loss": 0.4, "equivalence_loss": 0.3, "regularization_loss": 0.0, "learning_rate": 0.05,
     "mean_delta_norm": 0.6},
    {"step": 20, "eval_perplexity_ratio": 1.004},
]  # fmt: skip
REPORT = {
    "evaluations": {
        "layer_equivalence": {"layer_9": {"relative_error": 0.02}, "layer_10": {"relative_error": 0.01}},
        "weight_delta_stats": {
            "mean_frobenius": 0.5,
            "exact_frobenius": 0.4,
            "per_layer": {
                "layer_9": {"up": {"frobenius": 0.2, "exact_frobenius": 0.1}, "down": {"frobenius": 0.4}},
                "layer_10": {"up": {"frobenius": 0.6, "exact_frobenius": 0.5}},
            },
        },
    }
}
ALL = {"loss", "perplexity_ratio", "weight_delta", "learning_rate", "layer_error"}


def write(folder: Path, rows: list[dict[str, Any]], report: Any = None) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if report is not None:
        (folder / "evaluation_report.json").write_text(json.dumps(report))


def drawn(draw: Any, rows: list[dict[str, Any]], report: dict[str, Any]) -> Figure:
    figure = Figure()
    assert draw(figure, rows, report)
    return figure


def test_all_plots_are_pictures_in_the_plots_folder(tmp_path: Path) -> None:
    write(tmp_path, ROWS, REPORT)
    paths = plot_run(tmp_path)
    assert {path.stem for path in paths} == ALL
    assert all(path.parent == tmp_path / "plots" and path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    other = plot_run(tmp_path, tmp_path / "elsewhere" / "deep")
    assert {path.parent for path in other} == {tmp_path / "elsewhere" / "deep"}


def test_no_figure_stays_open_and_the_backend_is_left_alone(tmp_path: Path) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    before = matplotlib.rcParams["backend"]
    write(tmp_path, ROWS, REPORT)
    plot_run(tmp_path)
    assert plt.get_fignums() == [] and matplotlib.rcParams["backend"] == before


def test_what_has_no_data_is_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, ROWS[:2])  # calibration only
    with caplog.at_level(logging.INFO, logger="npt"):
        assert {path.stem for path in plot_run(tmp_path)} == {"layer_error"}
    assert {record.args[0] for record in caplog.records if record.args} >= {"loss", "weight_delta", "learning_rate"}
    assert "Perplexity of the NPT model over the original's at step 0: 1.01" in caplog.text, (
        "a single point has no plot"
    )


def test_a_loss_that_is_zero_has_no_curve_on_the_logarithmic_axis() -> None:
    figure = drawn(loss, ROWS, {})
    assert [line.get_label() for line in figure.axes[0].lines] == ["loss", "equivalence loss"]
    assert figure.axes[0].get_yscale() == "log"


def test_ratio_has_the_target_band() -> None:
    axes = drawn(perplexity_ratio, ROWS, {}).axes[0]
    assert axes.get_legend_handles_labels()[1] == ["target, 1.0 ± 0.05", "NPT / original"]
    low, high = axes.get_ylim()
    assert low < 0.95 < 1.05 < high


def test_a_step_logged_twice_counts_once_the_later_time() -> None:
    rows = [*ROWS, {"step": 10, "loss": 0.45}, {"step": None, "loss": None}]
    assert curve(rows, "loss") == ([10, 20], [0.45, 0.4])


def test_weight_delta_stands_beside_exact_over_steps_and_per_block() -> None:
    over_steps, per_block = drawn(weight_delta, ROWS, REPORT).axes
    assert "exact, evaluation text" in over_steps.get_legend_handles_labels()[1]
    exact, own = per_block.lines
    assert list(own.get_xdata()) == list(exact.get_xdata()) == [9, 10], "by number, not by letter"
    assert list(own.get_ydata()) == pytest.approx([0.3, 0.6])  # means over projections
    assert list(exact.get_ydata()) == pytest.approx([0.1, 0.5])
    assert len(drawn(weight_delta, ROWS, {}).axes) == 1


def test_a_block_that_was_not_calibrated_keeps_its_place() -> None:
    rows = [{"step": 0, "calibration": {"layer_10": {"error_before": 0.3, "error_after": 0.03}}}]
    axes = drawn(layer_error, rows, REPORT).axes[0]
    assert list(axes.get_xticks()) == [9, 10]
    before, _, end = axes.lines
    assert list(before.get_xdata()) == [10] and list(end.get_xdata()) == [9, 10]


def test_torn_last_line_is_left_out_any_other_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert read_json_lines(path) == [{"step": 1, "loss": 2}] and "torn" in caplog.text
    path.write_text('[1]\n{"step": 1}\n')
    with pytest.raises(NPTError, match="line 1: not a JSON object but list"):
        read_json_lines(path)


def test_missing_and_broken_files_are_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(NPTError, match="run `npt train` first") as error:
        plot_run(tmp_path / "nowhere")
    assert "\n" not in str(error.value)
    write(tmp_path, ROWS)
    (tmp_path / "evaluation_report.json").write_text("{")
    with pytest.raises(NPTError, match="evaluation_report.json: not JSON"):
        plot_run(tmp_path)
