"""Markdown tables of benchmarks/results/law-*.json: `python -m benchmarks.law`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.tables import RESULTS

Results = Mapping[str, Mapping[str, Any]]
#: {stem of a results file: (the model's name, its parameters)}
NAMES = {
    "builtin-smollm2-135m": ("`builtin:smollm2-135m`", "135 million"),
    "builtin-tiny": ("`builtin:tiny`", "3.05 million"),
    "stories260k": ("stories260k", "0.26 million"),
}
#: The model of the README's table.
README_MODEL = "builtin-smollm2-135m"
HEAD = "| model | blocks | rank | text | predicted KL | measured KL | measured / predicted |"


def kept_laws() -> Results:
    """{model: its figures} of every file that `python -m benchmarks.law` left in benchmarks/results."""
    paths = sorted(RESULTS.glob("law-*.json"))
    return {path.stem.removeprefix("law-"): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def law_table(kept: Results) -> str:
    """Predicted and measured mean KL of every set of blocks."""
    lines = [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
    for stem, found in kept.items():
        for row in sorted(found.get("rows", []), key=lambda row: row["rank"]):
            predicted = f"{row['predicted']:.2e} ± {row['predicted_standard_error']:.0e}"
            measured = f"{row['mean_kl']:.2e} ± {row['mean_kl_standard_error']:.0e}"
            lines.append(
                f"| {NAMES.get(stem, (stem,))[0]} | {row['set']} | {row['rank']} | {row['text']} | {predicted} | {measured} | "
                f"{row['mean_kl'] / row['predicted']:.2f} |"
            )
    return "\n".join(lines)


def law_readme(found: Mapping[str, Any]) -> str:
    """The README's rows: one model, rank 16."""
    head = "| blocks converted | after | scored tokens | perplexity ratio | mean KL | same top token |"
    return "\n".join([head, "|" + "---|" * 6, *_readme_rows(found)])


def _readme_rows(found: Mapping[str, Any]) -> Iterator[str]:
    count, first = found["blocks"], found["rows"][0]["text"]
    rows = {row["set"]: row for row in found["rows"] if row["rank"] == 16 and row["text"] == first}
    half = count - count // 2
    names = {
        "upper half": f"upper half ({half} of {count})",
        "auto": f"`auto` ({half} of {count})",
        "all": f"all {count}",
    }
    for name, label in names.items():
        yield _row(label, "calibration only", rows[name])
        if f"trained {name}" in found:
            yield _row(label, f"{found['steps']} KL steps", found[f"trained {name}"][first])
    if "denominator" in found:
        yield _row(f"all {count}, gain `denominator`", "nothing", found["denominator"])


def _row(label: str, after: str, row: Mapping[str, Any]) -> str:
    ratio = f"{row['perplexity_ratio']:.4f} ± {row['perplexity_ratio_standard_error']:.4f}"
    kl = f"{max(0.0, row['mean_kl']):.5f} ± {row['mean_kl_standard_error']:.5f}"  # below zero by rounding alone
    return f"| {label} | {after} | {row['tokens']:,} | {ratio} | {kl} | {100 * row['top1_agreement']:.1f} % |"
