"""Reports of models with 30 and 80 blocks: the page, the plots and the terminal stay legible, on a phone too."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from npt.cli import main
from npt.report.curves import weight_delta
from npt.report.distributions import delta_distribution, layer_error, residual_stream
from npt.report.page import write_page
from npt.report.plots import draw_all
from npt.report.terminal import render_report
from npt.report.watch import watch_run
from tests.helpers import visit
from tests.report.runs import ROWS, with_blocks, write

HALF, ALL, SCATTERED = list(range(15, 30)), list(range(80)), list(range(0, 80, 2))
SNAPSHOT = "/home/someone/.cache/huggingface/hub/models--some--base-135M/snapshots/7e27bd9f95328f0f3b08261d1252705110c8"
PROJECTIONS = ("gate", "up", "down")


@pytest.fixture(scope="module")
def page_of(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[int]], Path]:
    """Writes the page of a calibrated run with these blocks, once."""

    @cache
    def write_once(blocks: tuple[int, ...]) -> Path:
        many, rows = with_blocks(report, blocks, SNAPSHOT)
        return write_page(write(tmp_path_factory.mktemp("run"), many, rows[:2]))

    return lambda blocks: write_once(tuple(blocks))


def shown(show: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    show(console)
    return console.export_text()


# -- words -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, base, headline",
    [
        (HALF, SNAPSHOT, "Blocks 15 to 29 of some/base-135M are neuro-plastic"),
        ([0, 3, *HALF], "/models/stories260k", "Blocks 0, 3 and 15 to 29 of stories260k are neuro-plastic"),
        ([29], "builtin:tiny", "Block 29 of builtin:tiny is neuro-plastic"),
        (SCATTERED, "gpt2", "Blocks 0, 2, 4, 6, 8, 10, 12, 14 and 32 more of gpt2 are neuro-plastic"),
    ],
)  # fmt: skip
def test_the_headline_names_ranges_and_the_model(
    quick_reports: None, report: dict[str, Any], tmp_path: Path, blocks: list[int], base: str, headline: str
) -> None:
    many, rows = with_blocks(report, blocks, base)
    text = write_page(write(tmp_path, many, rows[:1])).read_text(encoding="utf-8")
    assert f"<h1>{headline}</h1>" in text and f"<title>NPT: {headline}</title>" in text
    protocol = text.split('<section id="protocol"')[1]
    assert base in protocol, "the whole path stands in the protocol"
    assert headline in re.sub(r"\s+", " ", shown(lambda console: render_report(many, console)))


def test_the_terminal_fits_80_columns(report: dict[str, Any], tmp_path: Path) -> None:
    many, rows = with_blocks(report, ALL, SNAPSHOT)
    figures = many["evaluations"]["corpora"]
    figures |= {f"corpus {i}": figures["home"] for i in range(4)}
    text = shown(lambda console: render_report(many, console))
    for name in figures:
        column = next(line for line in text.splitlines() if name in line)
        assert "…" not in column
    ratio = f"{figures['home']['perplexity']['perplexity_ratio']:.5f} ± "
    assert text.count(ratio) == 6, "a figure and its error stand on one line"
    assert max(map(len, text.splitlines())) <= 80

    text = shown(lambda console: watch_run(write(tmp_path, many, rows), console, once=True))
    lines = [line for line in text.splitlines() if line.startswith("calibration")]
    assert len(lines) == 2 and "median" in lines[0] and "the largest of 80 blocks" in lines[1]
    after = {name: figures["error_after"] for name, figures in rows[0]["calibration"].items()}
    worst = max(after, key=lambda name: after[name]).removeprefix("layer_")
    assert f"block {worst} " in lines[1] and f"{max(after.values()):.5g}" in lines[1]
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_watch_shows_a_few_blocks_one_by_one(report: dict[str, Any], tmp_path: Path) -> None:
    many, rows = with_blocks(report, [7, 8, 10])
    text = shown(lambda console: watch_run(write(tmp_path, many, rows[:2]), console, once=True))
    assert [line.split()[2] for line in text.splitlines() if line.startswith("calibration")] == ["7", "8", "10"]
    ratio = next(line for line in text.splitlines() if line.startswith("perplexity ratio"))
    assert ratio.rstrip().endswith("1.01"), "one evaluation has no course"


def test_compare_of_80_blocks_in_80_columns(
    report: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = [
        write(tmp_path / name, *with_blocks(report, blocks, base))
        for name, blocks, base in (
            ("one", ALL, SNAPSHOT),
            ("two", HALF, "/models/mine"),
            ("three", [3], "/other/mine"),
        )
    ]
    plot = tmp_path / "c.png"
    assert main(["compare", *map(str, runs), "--output", str(plot)]) == 0
    out = capsys.readouterr().out
    tables = out.partition("plot: ")[0]
    assert "0 to 79" in tables and "15 to 29" in tables and max(map(len, tables.splitlines())) <= 80
    assert "/models/mine" in out and "/other/mine" in out, "two bases of one name are told apart by their folders"
    assert out.count("│ mean KL") == 2 * len(report["evaluations"]["corpora"]), "three runs in two tables"
    assert plot.is_file()
    assert main(["compare", *map(str, runs[:2]), "--output", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "some/base-135M │" in out and "/models/mine" not in out
    plot.unlink()
    for run in runs:
        write(run, report, ROWS[:2])
    assert main(["compare", *map(str, runs), "--output", str(plot)]) == 0
    assert "none of the runs has two evaluations" in capsys.readouterr().out and not plot.exists()


# -- plots -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [layer_error, residual_stream, weight_delta, delta_distribution])
@pytest.mark.parametrize("blocks", [HALF, ALL, SCATTERED], ids=["15 of 30", "80", "every second of 80"])
def test_plots_by_block(report: dict[str, Any], draw: Any, blocks: list[int]) -> None:
    many, rows = with_blocks(report, blocks)
    figure = Figure(figsize=(5, 3), layout="constrained")
    assert draw(figure, rows[:1], many)
    assert figure.get_size_inches()[0] == 5, "as wide as any other plot, however many blocks"
    figure.canvas.draw()
    panels = len(PROJECTIONS) if draw is delta_distribution else 1
    assert len(figure.axes) == panels
    for axes in figure.axes:
        for line in axes.lines:
            there = [round(x) for x in line.get_xdata() if abs(x - round(x)) < 0.3]
            assert there == blocks, "one marker per block, at the block's number"
        for bars in axes.collections:
            assert len(bars.get_segments()) == len(blocks)  # type: ignore[attr-defined]
    labels = [label for label in figure.axes[-1].get_xticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) > 3 and all(a.x1 < b.x0 for a, b in pairwise(boxes)), "ticks do not overlap"


def test_lines_join_neighbours_only(report: dict[str, Any]) -> None:
    many, rows = with_blocks(report, [0, 1, 5])
    figure = Figure()
    assert layer_error(figure, rows[:1], many)
    for line in figure.axes[0].lines:
        assert [x for x, y in zip(*line.get_data(), strict=True) if y != y] == [4.5]
    markers = [line.get_marker() for line in figure.axes[0].lines]
    assert len({*markers}) == len(markers) == 3, "the series can be told apart without their colours"


def test_a_single_point_is_text(report: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    many, rows = with_blocks(report, [3])
    pictures, singles = draw_all(rows[:3], many, png=False)
    assert [single.name for single in singles] == [
        "perplexity_ratio", "loss", "layer_error", "residual_stream", "weight_delta", "learning_rate",
    ]  # fmt: skip
    assert not {p.name for p in pictures} & {single.name for single in singles}
    assert str(singles[0]) == "Perplexity of the NPT model over the original's at step 0: 1.01"
    assert dict(singles[1].values) == {"loss": 0.5, "equivalence loss": 0.4} and singles[1].where == "at step 2"
    assert singles[2].where == "of block 3" and len(singles[2].values) == 3
    text = write_page(write(tmp_path, many, rows[:3])).read_text(encoding="utf-8")
    for single in singles:
        card = text.split(f'id="plot-{single.name}">')[1].split("</li>")[0]
        assert "<img" not in card and single.where in card
    (tmp_path / "evaluation_report.json").unlink()
    assert main(["plot", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "a single point each" in said and "at step 0: 1.01" in said and "train longer" in said


# -- the page in a browser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("blocks", [HALF, ALL], ids=["15 of 30", "80"])
def test_in_a_browser(page_of: Any, browser: Any, blocks: list[int], width: int) -> None:
    page, said, asked = visit(browser, page_of(blocks), width)
    assert said == [] and asked == []
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # A cell is within the window, or within a box that scrolls by itself and does not reach beyond the window.
    outside = """[...document.querySelectorAll('td, th, img, li, p, h1')].filter(e => {
        const box = e.closest('.scroll') || e, r = box.getBoundingClientRect();
        return r.left < 0 || r.right > innerWidth + 0.5}).map(e => e.outerHTML)"""
    assert page.evaluate(outside) == []
    rows = page.locator("section#layers tbody tr")
    assert rows.count() == len(blocks)
    assert page.locator("section#weight-delta details tbody tr").count() >= len(PROJECTIONS) * len(blocks)
    assert page.evaluate("document.querySelector('#worst-tokens table').scrollWidth") <= width
    if width > 1000:
        cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert page.evaluate(cut) == 0, "on a desktop no table scrolls"
        used = "document.querySelector('#layers table').getBoundingClientRect().width"
        assert page.evaluate(used) > 0.9 * (width - 32), "a table takes the width there is"
    else:
        first = page.locator("section#layers tbody th").first
        before = first.bounding_box()["x"]
        page.evaluate("document.querySelector('#layers .scroll').scrollLeft = 200")
        assert first.bounding_box()["x"] == before, "the blocks' numbers stay in sight"
        smallest = "Math.min(...[...document.images].map(i => i.getBoundingClientRect().width / i.naturalWidth))"
        assert page.evaluate(smallest) > 0.7, "a picture's letters are not scaled down to nothing"


def test_long_tables_are_folded_and_open_in_print(page_of: Any, browser: Any) -> None:
    page, *_ = visit(browser, page_of(ALL), 1280)
    folded = page.locator("section#layers tbody tr").last
    assert not folded.is_visible()
    assert "largest" in page.locator("section#layers > p").first.inner_text()
    page.emulate_media(media="print")
    assert folded.is_visible()
