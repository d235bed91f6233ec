"""Markdown tables of the figures in benchmarks/results: `python -m benchmarks` and `python -m benchmarks.equivalence`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from npt.common.display import markdown

RESULTS = Path(__file__).resolve().parent / "results"
#: {label of a row: its figures} of one model, as `benchmarks.equivalence` keeps them.
Equivalence = Mapping[str, dict[str, Any]]
#: What the CPU time of the command's quick answers is compared with.
REFERENCE = "import typer, rich, pydantic"
TINY, STORIES = "builtin-tiny", "stories260k"
#: (line, part of a model's figures, NPT's contender there)
LINES = (
    ("forward", "forward", "npt"),
    ("prefill", "prefill", "npt"),
    ("decoding with a cache", "decode", "npt"),
    ("compiled forward", "compiled forward", "npt"),
    ("training step, `local`", "training step", "local"),
    ("training step, `local`, teacher targets from disk", "training step", "local, cached"),
    ("training step, `composite`", "training step", "composite"),
    ("training step, `logits`", "training step", "logits"),
    ("calibration", "calibration", "npt"),
    ("divergence of a text", "divergence", "npt"),
    ("whole report of a text, without samples", "report", "npt"),
    ("sampling, over plain greedy decoding", "sampling", "npt"),
)


def kept_equivalence() -> dict[str, Equivalence]:
    """{model: its rows} of every file that `python -m benchmarks.equivalence` left in benchmarks/results."""
    paths = sorted(RESULTS.glob("equivalence-*.json"))
    return {path.stem.removeprefix("equivalence-"): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def equivalence_table(results: Equivalence) -> str:
    """All rows of one model."""
    texts = list(next(iter(results.values()))["texts"])
    head = [
        "NP component",
        "parameters",
        "perplexity ratio",
        "mean KL",
        "same top token",
        *(f"KL on {t}" for t in texts),
    ]
    rows = [
        [label, *equivalence_cells(row), *(f"{row['texts'][t]['mean_kl']:.4f}" for t in texts)]
        for label, row in results.items()
    ]
    return markdown(head, rows)


def outcomes_table(kept: Mapping[str, Equivalence]) -> str:
    """Targets of the original description beside the default's figures on stories260k after 100 steps."""
    row = kept[STORIES]["**default**, 100 KL steps"]
    kl, ratio = (mean(seed[name] for seed in row["seeds"]) for name in ("mean_kl", "perplexity_ratio"))
    norms = row["weight_delta"]
    entry, relative = norms["rms_entry"], norms["mean_frobenius"] / norms["exact_frobenius"]
    small = entry < 0.01 and relative <= 1.1
    return markdown(
        ["outcome", "target", "measured", "met"],
        [
            ["functional fidelity", "mean KL at most 0.01", f"{kl:.4f}", yes_no(kl <= 0.01)],
            [
                "low-magnitude dW",
                "root-mean-square entry below 0.01, and mean norm at most 1.1 times that of `exact`",
                f"{entry:.4f}, and {relative:.3f} times",
                yes_no(small),
            ],
            ["perplexity ratio", "1.0 ± 0.05", f"{ratio:.4f}", yes_no(abs(ratio - 1) <= 0.05)],
        ],
    )


def yes_no(met: bool) -> str:
    """The word for a target that is met or not."""
    return "yes" if met else "no"


def equivalence_cells(row: dict[str, Any]) -> list[str]:
    """Parameters, perplexity ratio, mean KL and agreement of one row, means over its seeds."""
    seeds = row["seeds"]
    ratio, kl, top = (mean(s[k] for s in seeds) for k in ("perplexity_ratio", "mean_kl", "top1_agreement"))
    error = max(s["perplexity_ratio_standard_error"] for s in seeds)
    return [f"{row['trainable_parameters']:,}", f"{ratio:.4f} ± {error:.4f}", f"{kl:.5f}", f"{100 * top:.1f} %"]


def speed_sentence(result: dict[str, Any]) -> str:
    """The README's sentence about speed: the range of each ratio over the models measured."""
    models = [suite for suite in result["suites"].values() if "parameters" in suite]

    def spread(part: str, who: str) -> str:
        ratios = [suite[part]["ratios"][who] for suite in models if part in suite and who in suite[part]["ratios"]]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    return (
        f"Relative to the frozen base, a forward pass takes {spread('forward', 'npt')} times as long (LoRA of the same rank: "
        f"{spread('forward', 'lora')}), a decoding step {spread('decode', 'npt')} ({spread('decode', 'lora')}), and a "
        f"training step of objective `local` takes {spread('training step', 'local')} forward passes "
        f"({spread('training step', 'lora')})."
    )


def speed_table(result: dict[str, Any]) -> str:
    """Ratios to the frozen base for each model, NPT's and LoRA's."""
    models = {name: suite for name, suite in result["suites"].items() if "parameters" in suite}
    head = ["relative to the frozen base", *(f"{name}: {what}" for name in models for what in ("NPT", "LoRA"))]
    rows = []
    for kind in ("time", "memory"):
        for label, part, own in LINES:
            cells = [cell(suite.get(part), who, kind) for suite in models.values() for who in (own, "lora")]
            if any(cells) and not (kind == "memory" and part in ("decode", "prefill", "compiled forward")):
                rows.append([f"{label}, {'time' if kind == 'time' else 'peak memory'}", *cells])
    return markdown(head, rows)


def limits_table(result: dict[str, Any]) -> str:
    """Measured time over the limit of its operators (benchmarks/roofline.py), the frozen base's and NPT's."""
    models = {
        n: s
        for n, s in result["suites"].items()
        if any("limits" in part for part in s.values() if isinstance(part, dict))
    }
    head = ["measured over limit", *(f"{name}: {what}" for name in models for what in ("base", "NPT"))]
    rows = []
    for label, part, own in LINES:
        cells = [_over_limit(suite.get(part), who) for suite in models.values() for who in ("base", own)]
        if any(cells):
            rows.append([label, *cells])
    return markdown(head, rows)


def _over_limit(part: dict[str, Any] | None, who: str) -> str:
    if part is None or who not in part.get("limits", {}):
        return ""
    seconds, limit = part["times"][who]["seconds"], part["limits"][who]
    return f"{seconds / limit:.2f} ({1000 * limit:,.0f} ms)"


def cell(part: dict[str, Any] | None, who: str, kind: str) -> str:
    """A ratio with its spread, or "" where it was not measured."""
    if part is None or who not in part["ratios"]:
        return ""
    if kind == "memory":
        return f"{part['peak_ratios'][who]:.2f}" if "peak_ratios" in part else ""
    time, ratio = part["times"][who], part["ratios"][who]
    return f"{ratio:.3f} ± {time['spread'] / time['seconds'] * ratio:.3f}"


def materialized_table(result: dict[str, Any]) -> str:
    """Weight deltas formed per token beside NPT and the frozen base."""
    found = result["suites"].get("materialized")
    if found is None:
        return ""
    rows = [
        [name, f"{1000 * found['times'][key]['seconds']:.0f} ms", f"{found['peaks'][key] / 2**20:.0f} MiB"]
        for name, key in (("frozen base", "base"), ("NPT", "npt"), ("W + dW formed per token", "materialized"))
    ]
    table = markdown([f"forward, d {found['hidden']}, {found['tokens']} tokens", "time", "peak memory"], rows)
    line = f"{found['slower']:.0f} times slower and {found['memory']:.0f} times the memory of NPT, with the same output"
    return f"{table}\n\nFormed: {line} (relative difference {found['difference']:.0e})."


def linear_table(result: dict[str, Any]) -> str:
    """Microseconds per token over rank and sequence length, and the fitted slopes."""
    found = result["suites"].get("linear")
    if found is None:
        return ""
    lengths = list(next(iter(found["microseconds"].values())))
    rows = [
        [rank, *(f"{row[n]:.2f}" for n in lengths), f"{found['exponent'][rank]:.2f}"]
        for rank, row in found["microseconds"].items()
    ]
    fit = found["per_rank"]
    table = markdown(["rank", *(f"{n} tokens" for n in lengths), "exponent of time over tokens"], rows)
    line = f"{fit['intercept']:.2f} + {fit['slope']:.3f} x rank microseconds per token (R^2 {fit['r_square']:.3f})"
    return f"{table}\n\nFitted at 1,024 tokens: {line}."


def command_table(kept: Mapping[str, Mapping[str, float]]) -> str:
    """CPU seconds of the command's quick answers, and how many times the reference of the same run that is."""
    rows = []
    for name in kept["now"]:
        cells = (f"{f[name]:.2f} s ({f[name] / f[REFERENCE]:.1f})" if name in f else "none" for f in kept.values())
        rows.append([f"`{name}`", *cells])
    return markdown(["CPU time (times the first row)", *kept], rows)


def cost_table(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """An edit's cost beside a forward of the frozen base, for each model of benchmarks/results/editing-cost.json."""
    head = [
        "model",
        "blocks",
        "edit: operations",
        "edit: seconds",
        "passes",
        "statistics: seconds",
        "solve of 1,000 edits",
    ]
    rows = [
        [
            f"`{name}`", ", ".join(map(str, found["layers"])),
            f"{found['edit']['products']:.1f} ± {found['edit']['products_standard_error']:.1f} forwards",
            f"{found['edit']['seconds']:.1f} forwards", f"{found['edit']['passes']:.1f}",
            f"{found['statistics']['seconds']:.2f} forwards", f"{found['solve']['seconds']:.2f} s",
        ]
        for name, found in kept.items()
    ]  # fmt: skip
    return markdown(head, rows)


def sharing_table(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """Seconds alone over those with nothing set, and seconds of two at once over those alone, of each model and work."""
    works = list(next(iter(next(iter(kept.values())).values())))
    rows = []
    for model, settings in kept.items():
        reference = next(iter(settings.values()))
        for label, found in settings.items():
            cells = [
                f"{found[work]['alone'] / reference[work]['alone']:.2f}, {found[work]['together'] / found[work]['alone']:.2f}"
                for work in works
            ]
            rows.append([f"`{model}`", label if label == "nothing set" else f"`{label}`", *cells])
    return markdown(["model", "environment", *works], rows)
