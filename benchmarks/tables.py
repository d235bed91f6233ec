"""Markdown tables of what `python -m benchmarks` measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
)


def speed_table(result: dict[str, Any]) -> str:
    """Ratios to the frozen base for each model, NPT's and LoRA's, and the strawman."""
    models = {name: suite for name, suite in result["suites"].items() if "parameters" in suite}
    head = ["relative to the frozen base", *(f"{name}: {what}" for name in models for what in ("NPT", "LoRA"))]
    rows = []
    for kind in ("time", "memory"):
        for label, part, own in LINES:
            cells = [cell(suite.get(part), who, kind) for suite in models.values() for who in (own, "lora")]
            if any(cells) and not (kind == "memory" and part in ("decode", "prefill", "compiled forward")):
                rows.append([f"{label}, {'time' if kind == 'time' else 'peak memory'}", *cells])
    return markdown(head, rows)


def cell(part: dict[str, Any] | None, who: str, kind: str) -> str:
    """A ratio with its spread, "" where it was not measured."""
    if part is None or who not in part["ratios"]:
        return ""
    if kind == "memory":
        return f"{part['peak_ratios'][who]:.2f}" if "peak_ratios" in part else ""
    time, ratio = part["times"][who], part["ratios"][who]
    return f"{ratio:.3f} ± {time['spread'] / time['seconds'] * ratio:.3f}"


def materialized_table(result: dict[str, Any]) -> str:
    """The strawman beside NPT and the frozen base."""
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


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
