"""report.html, npt compare and npt watch show whole, damaged and hostile folders without harm."""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from npt.cli import main
from npt.errors import NPTError
from npt.report.page import PARTS, write_page
from npt.report.watch import sparkline, watch_run
from tests.helpers import visit
from tests.report.runs import ROWS, write

SECTIONS = ("verdict", "divergence", "plots", "layers", "weight-delta", "worst-tokens", "generation", "protocol")
PICTURES = (
    "perplexity_ratio", "loss", "kl_histogram", "kl_by_position", "layer_error", "residual_stream", "weight_delta",
    "delta_distribution", "learning_rate",
)  # fmt: skip
HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31mred\u202eevil {{ 7 * 7 }} $\\frac{"


def test_the_page_holds_every_section_picture_and_figure(report: dict[str, Any], tmp_path: Path) -> None:
    text = write_page(write(tmp_path, report)).read_text(encoding="utf-8")
    for section in SECTIONS:
        assert f'<section id="{section}"' in text
    assert 'id="missing"' not in text and "not measured" not in text
    assert [name for name in PICTURES if f'id="plot-{name}"' not in text] == []
    figures = report["evaluations"]["divergence"]
    assert f"{figures['mean_kl']:.5f} ±\N{NO-BREAK SPACE}{figures['mean_kl_standard_error']:.5f}" in text
    assert text.count('<th scope="col">home</th>') == text.count('<th scope="col">away</th>') == 3
    assert html.escape(report["grade"]["text"]) in text
    assert "<script" not in text and 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in text
    assert text.count("<img") == text.count("alt=") == len(PICTURES)


def test_the_same_files_give_the_same_page(report: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, report)
    assert write_page(folder).read_bytes() == write_page(folder).read_bytes()


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_in_a_browser(report: dict[str, Any], tmp_path: Path, browser: Any, width: int, scheme: str) -> None:
    page, said, asked = visit(browser, write_page(write(tmp_path, report)), width, scheme)
    assert said == [] and asked == []
    for section in SECTIONS:
        assert page.locator(f"section#{section}").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page must not scroll sideways"
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).length"
    assert page.evaluate(broken) == 0 and page.evaluate("document.images.length") == len(PICTURES)
    colours = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    ink, paper = (sum(map(int, c[4:-1].split(","))) for c in page.evaluate(colours))
    assert (ink > paper) is (scheme == "dark") and abs(ink - paper) > 450
    picture = tmp_path / "page.png"
    page.screenshot(path=str(picture), full_page=True)
    assert picture.stat().st_size > 50_000
    page.emulate_media(media="print")
    assert "rgb(255, 255, 255)" in page.evaluate(colours)


def hostile(value: Any) -> Any:
    """The same structure with hostile text for every text."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_text_of_models_and_data_stays_text(report: dict[str, Any], tmp_path: Path, browser: Any) -> None:
    damaged = hostile(copy.deepcopy(report))
    corpora = damaged["evaluations"]["corpora"]
    corpora[HOSTILE] = corpora.pop("away")
    page_path = write_page(write(tmp_path, damaged))
    text = page_path.read_text(encoding="utf-8")
    assert "<script" not in text and "onerror=alert" not in text.replace("onerror=alert(2)&gt;", "")
    assert "\x1b" not in text and "\u202e" not in text and "49" not in text.split("<h1>")[1].split("</h1>")[0]
    page, said, asked = visit(browser, page_path, 1280)
    assert said == [] and asked == []
    assert page.evaluate("document.scripts.length") == 0
    assert "<img src=x onerror=alert(2)>" in page.locator("h1").inner_text(), "shown as it is"


def test_hostile_text_does_not_reach_the_terminal(report: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    damaged = hostile(copy.deepcopy(report))
    damaged["evaluations"]["corpora"][HOSTILE] = damaged["evaluations"]["corpora"].pop("away")
    folder = write(tmp_path / "run", damaged)
    assert main(["compare", str(folder), str(folder), "--output", str(tmp_path / "c.png")]) == 0
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out and "\u202e" not in out and "x1b" in out


def broken_reports() -> list[tuple[str, Callable[[dict[str, Any]], Any], str]]:
    def without(path: str) -> Callable[[dict[str, Any]], Any]:
        def remove(report: dict[str, Any]) -> Any:
            *parents, last = path.split(".")
            target = report
            for key in parents:
                target = target[key]
            del target[last]
            return report

        return remove

    def emptied(report: dict[str, Any]) -> Any:
        report["evaluations"] = {}
        return report

    def nulled(report: dict[str, Any]) -> Any:
        for key in report["evaluations"]:
            report["evaluations"][key] = None
        return report

    def wrong_types(report: dict[str, Any]) -> Any:
        report["evaluations"]["kl_by_position"] = {"mean_kl": "x"}
        report["evaluations"]["divergence"] = [1]
        report["expected_outcomes"] = {"perplexity_ratio": {"value": "high", "met": None}}
        return report

    cases = [(path, without(path), what) for what, path in PARTS.items()]
    return [*cases, ("empty", emptied, "perplexity"), ("null", nulled, "divergence"), ("types", wrong_types, "plots")]


@pytest.mark.parametrize(
    "name, damage, missing", broken_reports(), ids=lambda part: part if isinstance(part, str) else ""
)
def test_a_page_of_pieces_says_what_is_missing(
    report: dict[str, Any], tmp_path: Path, name: str, damage: Callable[[dict[str, Any]], Any], missing: str
) -> None:
    text = write_page(write(tmp_path, damage(copy.deepcopy(report)))).read_text(encoding="utf-8")
    section = text.split('<section id="missing"')[1].split("</section>")[0]
    assert missing in html.unescape(section)


def test_torn_and_absent_files(report: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "a", report)
    whole = (folder / "evaluation_report.json").read_text()
    (folder / "evaluation_report.json").write_text(whole[:500])
    text = write_page(folder).read_text(encoding="utf-8")
    assert "evaluation_report.json: not JSON" in html.unescape(text) and 'id="plot-loss"' in text
    (folder / "evaluation_report.json").unlink()
    assert "evaluation_report.json: there is none yet" in html.unescape(write_page(folder).read_text(encoding="utf-8"))
    (folder / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2}\n')
    assert "line 1: not JSON" in html.unescape(write_page(folder).read_text(encoding="utf-8"))
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(NPTError, match="neither evaluation_report.json nor metrics.jsonl"):
        write_page(folder)
    only = tmp_path / "b"
    only.mkdir()
    (only / "evaluation_report.json").write_text(whole)
    assert 'id="missing"' not in write_page(only).read_text(encoding="utf-8"), (
        "no training, no curves: nothing is missing"
    )


def test_report_and_plot_commands(report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run", report)
    assert main(["report", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out.replace("\n", "")
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    (folder / "evaluation_report.json").unlink()
    assert main(["plot", str(folder)]) == 0, "from metrics.jsonl alone"
    assert (folder / "plots" / "loss.svg").read_text().startswith("<svg")


def test_compare_shows_options_that_differ_and_figures(report: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    other = copy.deepcopy(report)
    other["model_config"]["rank"] = 5
    other["evaluations"]["corpora"]["home"]["divergence"]["mean_kl"] = 0.12345
    runs = [write(tmp_path / "first", report), write(tmp_path / "second", other)]
    third = tmp_path / "third"
    third.mkdir()
    (third / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    plot = tmp_path / "plots" / "c.png"
    assert main(["compare", *map(str, [*runs, third]), "--output", str(plot)]) == 0
    out = capsys.readouterr().out
    rank = next(line for line in out.splitlines() if line.startswith("│ rank"))
    assert "3" in rank and "5" in rank and "0.12345" in out and "not measured" in out
    assert not any(line.startswith("│ carry") for line in out.splitlines())
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert main(["compare", str(runs[0]), str(tmp_path / "nowhere")]) == 2
    assert "nowhere: neither" in capsys.readouterr().err


def test_watch_follows_a_run_until_its_report(report: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, report, ROWS[:3])
    (folder / "evaluation_report.json").unlink()
    (folder / "config.yaml").write_text("training: {num_train_steps: 4}\n")
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    looks = []

    def later(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(ROWS[3]) + '\n{"step": 5, "lo')  # half-written, as a live run's last line may be
        else:
            write(folder, report)

    watch_run(folder, console, interval=0.5, sleep=later)
    assert looks == [0.5, 0.5]
    watch_run(folder, console, once=True)
    text = console.export_text()
    assert "step 4 of 4, finished" in text and "1.004" in text and "calibration, block 2" in text
    with pytest.raises(NPTError, match="no metrics.jsonl"):
        watch_run(tmp_path / "nowhere", console)


def test_sparkline() -> None:
    assert sparkline([1, 2, 3]) == "▁▄█" and sparkline([2, 2]) == "▁▁" and len(sparkline(list(range(100)))) == 32
