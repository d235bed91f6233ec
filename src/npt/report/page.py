"""`npt report`: report.html, one self-contained page made from a run's files. No script, no network, all text escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeGuard, TypeVar

from jinja2 import ChainableUndefined, Environment, PackageLoader, Undefined
from markupsafe import Markup, escape

from npt.common.display import ranges, visible
from npt.common.files import write_text
from npt.common.places import place
from npt.errors import NPTError
from npt.evaluation.verdict import QUANTISATION_SCALE, SCALE_SOURCE
from npt.report.plots import draw_all
from npt.report.run_files import (
    FINETUNE_JSON,
    METRICS,
    PAGE,
    REPORT_JSON,
    Report,
    Rows,
    read_json_lines,
    read_report,
    section,
)
from npt.report.style import Draw, Picture, Single
from npt.report.terminal import NOT_MEASURED, headline

T = TypeVar("T")

#: {section of the page: the path of its data in evaluation_report.json}. A complete report has all of them.
PARTS = {
    "the models": "model_config",
    "the protocol": "protocol",
    "perplexity": "evaluations.perplexity",
    "divergence": "evaluations.divergence",
    "the expected outcomes": "expected_outcomes",
    "the blocks' errors": "evaluations.layer_equivalence",
    "the residual stream": "evaluations.residual_stream",
    "the weight deltas": "evaluations.weight_delta_stats",
    "KL by position": "evaluations.kl_by_position",
    "the worst tokens": "evaluations.worst_tokens",
    "generated text": "evaluations.generation_samples",
}


def write_page(output_dir: Path, report_path: Path | None = None, destination: Path | None = None) -> Path:
    """Writes <output_dir>/report.html from the files that are there. The page lists what is missing or damaged.

    Args:
        report_path: another evaluation report than the folder's. destination: another file to write.

    Raises:
        NPTError: no such folder, or neither a report nor metrics in it.
    """
    missing: list[str] = []
    output_dir = place(output_dir)
    if report_path is None and (output_dir / FINETUNE_JSON).is_file():
        from npt.report.finetune import write_finetune_page  # here, because it needs this module

        return write_finetune_page(output_dir, destination)
    report_path = output_dir / REPORT_JSON if report_path is None else place(report_path)
    metrics = output_dir / METRICS
    if not report_path.is_file() and not metrics.is_file():
        raise NPTError(
            f"{output_dir}: neither {REPORT_JSON} nor {METRICS} there; run `npt train` or `npt evaluate` first"
        )
    report: Report = _attempt(lambda: read_report(report_path), {}, missing)
    rows: Rows = _attempt(lambda: read_json_lines(metrics), [], missing) if metrics.is_file() else []
    if not report_path.is_file():
        missing.append(f"{report_path.name}: there is none yet; `npt evaluate` writes it")
    if not rows and not missing and metrics.is_file():
        missing.append(f"{METRICS}: holds no step")
    if report:
        missing += [f"{what} ({path} in {report_path.name})" for what, path in PARTS.items() if not _at(report, path)]
    target = output_dir / PAGE if destination is None else place(destination)
    write_text(target, render_page(report, rows, missing))
    return target


def render_page(report: Report, rows: Rows, missing: list[str]) -> str:
    """The page's HTML. missing: the parts that the page lists as missing or damaged."""
    images, singles, missing = plots_of(rows, report, missing)
    template = page_environment().get_template("report.html.j2")
    return template.render(
        **{"model": {}, "evaluations": {}, **report},
        headline=headline(section(report, "model_config")),
        images=images,
        singles=singles,
        missing=missing,
        scale=QUANTISATION_SCALE,
        scale_source=SCALE_SOURCE,
        not_measured=NOT_MEASURED,
    )


def plots_of(
    rows: Rows, report: Report, missing: list[str], plots: Mapping[str, Draw] | None = None
) -> tuple[list[dict[str, str]], list[Single], list[str]]:
    """(pictures as {name, alt, data}, single figures, `missing` with what can't be drawn) of a run; plots: as `draw_all`."""
    pictures: list[Picture] = []
    singles: list[Single] = []
    try:
        pictures, singles = draw_all(rows, report, png=False, plots=plots)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        missing = [*missing, f"plots: a figure in the run's files is malformed ({type(error).__name__}: {error})"]
    return images_of(pictures), singles, missing


def page_environment() -> Environment:
    """The templates of pages: every value is escaped and made visible."""
    found = Environment(
        loader=PackageLoader("npt.report"), autoescape=True, undefined=ChainableUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: value if isinstance(value, Markup | Undefined) else visible(value),
    )  # fmt: skip
    found.filters |= {
        "fig": _figure, "percent": _percent, "error": _error, "marked": _marked, "quoted": _quoted, "ranges": ranges,
        "extremes": _extremes, "rows_of": _rows_of, "by_projection": _by_projection,
    }  # fmt: skip
    return found


def images_of(pictures: Sequence[Picture]) -> list[dict[str, str]]:
    """Pictures as a page holds them: {"name", "alt", "data"}, the data in base 64."""
    return [{"name": p.name, "alt": p.alt, "data": base64.b64encode(p.svg.encode()).decode("ascii")} for p in pictures]


def _attempt(read: Callable[[], T], otherwise: T, missing: list[str]) -> T:
    """The result of `read`; `otherwise` where the file is damaged, which is added to `missing`."""
    try:
        return read()
    except NPTError as error:
        missing.append(str(error))
        return otherwise


def _at(report: Report, path: str) -> Any:
    """The value at a path with dots; None where there is none."""
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figure(value: object, digits: int = 5) -> str:
    """A float with so many significant digits, a whole number in full."""
    if not _is_number(value):
        return NOT_MEASURED
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def _percent(value: object, digits: int = 2) -> str:
    """A share as per cent with so many decimals."""
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%" if _is_number(value) else NOT_MEASURED


def _error(figures: object, key: str, digits: int = 5, percent: bool = False) -> str:
    """A figure with so many decimals, and its standard error where the report has one."""
    found = figures if isinstance(figures, dict) else {}
    value: Any = found.get(key)
    error: Any = found.get(f"{key}_standard_error")
    if not _is_number(value):
        return NOT_MEASURED
    scale, unit = (100, "\N{NO-BREAK SPACE}%") if percent else (1, "")
    return (
        f"{scale * value:.{digits}f}"
        + (f" ±\N{NO-BREAK SPACE}{scale * error:.{digits}f}" if _is_number(error) else "")
        + unit
    )


def _quoted(value: object) -> str:
    """A token in quotes, so that a space or a line break can be seen."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else NOT_MEASURED


def _marked(text: object, first_difference: object) -> Markup:
    """A model's text; the part from the first difference on is marked."""
    whole = str(text)
    at = first_difference if isinstance(first_difference, int) else len(whole)
    head, tail = (escape(visible(part)) for part in (whole[:at], whole[at:]))
    return head + (Markup("<mark>{}</mark>").format(tail) if tail else Markup(""))


def _extremes(layers: Mapping[str, Any], key: str) -> str:
    """The median and the largest of a share over the blocks, with the number of the worst block."""
    found = {name: f[key] for name, f in layers.items() if isinstance(f, Mapping) and _is_number(f.get(key))}
    if not found:
        return NOT_MEASURED
    worst = max(found, key=lambda name: found[name])
    block = worst.removeprefix("layer_")
    return f"median {_percent(median(found.values()))}, largest {_percent(found[worst])} in block {block}"


def _rows_of(per_layer: object) -> list[tuple[str, str, Any]]:
    """(block, projection, figures) of every block's projections."""
    blocks = per_layer.items() if isinstance(per_layer, Mapping) else ()
    return [(layer.removeprefix("layer_"), name, figures) for layer, found in blocks for name, figures in found.items()]


def _by_projection(rows: Sequence[tuple[str, str, Any]]) -> list[dict[str, Any]]:
    """Per projection the means over blocks, and (norm, block) of the smallest and the largest mean norm."""
    table = []
    for name in dict.fromkeys(name for _, name, _ in rows):
        own = [(block, figures) for block, projection, figures in rows if projection == name]
        means: dict[str, Any] = {"name": name}
        for key in ("frobenius", "exact_frobenius", "relative"):
            values = [figures[key] for _, figures in own if _is_number(figures.get(key))]
            means[key] = fmean(values) if values else None
        norms = [(f["frobenius"], block) for block, f in own if _is_number(f.get("frobenius"))] or [(None, "")]
        table.append({**means, "smallest": min(norms), "largest": max(norms)})
    return table
