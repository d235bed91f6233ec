"""Measures the equivalence of converted models: python -m benchmarks.equivalence [--model FOLDER] [--text FILE ...]

Every row is one `npt train` on the model's own text, then an evaluation on held-out text of three seeds (the model's own)
and on each --text. --prose files are mixed into the calibration text of one row only. Writes
benchmarks/results/equivalence-<model>.json and that model's table in docs/results.md, where the page has its markers.
--tables writes the tables from the figures that are kept and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.tables import RESULTS, equivalence_table, kept_equivalence, outcomes_table
from npt.config import RunConfig, load_config
from npt.runs.evaluate import run_evaluation
from npt.runs.train import run_training
from scripts.marked import ROOT, write_section

SEEDS = (0, 1, 2)

ORIGINAL = [
    "model.carry=none", "model.gain=none", "model.key=tied", "model.target_projections=[gate]",
    "model.low_rank_at=projection", "training.learning_rate=1e-2", "training.num_epochs=5",
]  # fmt: skip
CALIBRATED = ["training.num_train_steps=0"]
TRAINED = ["training.num_train_steps=100"]

#: (label, overrides, whether --prose joins the calibration text)
ROWS: list[tuple[str, list[str], bool]] = [
    ("the original code's form (key tied, gate only), 500 KL steps", ORIGINAL, False),
    ("gain `norm`, calibration only", ["model.gain=norm", *CALIBRATED], False),
    ("gain `norm`, 100 KL steps", ["model.gain=norm", *TRAINED], False),
    ("gain `overlap`, calibration only", ["model.gain=overlap", *CALIBRATED], False),
    ("gain `overlap`, 100 KL steps", ["model.gain=overlap", *TRAINED], False),
    ("**default** (gain `state`), calibration only", CALIBRATED, False),
    ("**default**, 100 KL steps", TRAINED, False),
    ("default, all blocks, calibration only", ["model.npt_layers=all", *CALIBRATED], False),
    ("default, all blocks, 100 KL steps", ["model.npt_layers=all", *TRAINED], False),
    ("default, 100 KL steps, mixed calibration text", TRAINED, True),
    ("carry `exact` (the reference, no parameters)", ["model.carry=exact"], False),
]


def run_row(model: str, overrides: list[str], texts: list[str], prose: list[Path], cache: Path) -> dict[str, Any]:
    """One training and its evaluations: {"seeds": [report figures], "texts": {name: figures}, ...}."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            ROOT / "config.yaml",
            [
                f"model.base_model_name={model}",
                f"paths.output_dir={folder}/outputs",
                f"paths.checkpoint_dir={folder}/checkpoints",
                f"paths.cache_dir={cache}",
                "data.eval_texts=[]",
                "data.num_train_samples=1632",  # 100 steps read each block once
                *overrides,
                *([f"data.calibration_files=[{','.join(map(str, prose))}]"] if prose else []),
            ],
        )
        run_training(config)
        best = Path(folder) / "checkpoints" / "best_model"
        reports = []
        for seed in SEEDS:
            texts_now = texts if seed == SEEDS[0] else []
            seeded = with_seed(config, seed)
            reports.append(run_evaluation(seeded, best, Path(folder) / "report.json", more_text=texts_now))
    return {
        "trainable_parameters": reports[0]["model_config"]["trainable_parameters"],
        "seeds": [figures_of(report["evaluations"]) for report in reports],
        "tokens": [report["protocol"]["tokens"] for report in reports],
        "texts": {name: figures_of(c) for name, c in reports[0]["evaluations"]["corpora"].items() if name != "self"},
        "weight_delta": {k: v for k, v in reports[0]["evaluations"]["weight_delta_stats"].items() if k != "per_layer"},
        "versions": reports[0]["protocol"]["versions"],
    }


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The configuration with another evaluation seed."""
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})


def figures_of(evaluations: dict[str, Any]) -> dict[str, float]:
    """The figures of one corpus that the table shows."""
    return {
        **{k: evaluations["perplexity"][k] for k in ("perplexity_ratio", "perplexity_ratio_standard_error")},
        **{k: evaluations["divergence"][k] for k in ("mean_kl", "mean_kl_standard_error", "top1_agreement")},
    }


def write_tables() -> None:
    """Writes the tables of docs/results.md from the figures kept in benchmarks/results."""
    kept = kept_equivalence()
    for name, results in kept.items():
        write_section("docs/results.md", f"equivalence {name}", equivalence_table(results))
    write_section("docs/results.md", "outcomes", outcomes_table(kept))


def main() -> None:
    """Parses the arguments, runs every row and writes figures and tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:tiny", help="builtin:tiny, a model folder or a hub id")
    parser.add_argument("--text", action="append", help="evaluated beside the model's own text; builtin:python-docs")
    parser.add_argument("--prose", type=Path, action="append", default=[], help="mixed into one row's calibration text")
    parser.add_argument("--only", default="", help="run only rows whose label contains this; the others are kept")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables of what is kept")
    arguments = parser.parse_args()
    if arguments.tables:
        write_tables()
        return
    name = Path(arguments.model.replace(":", "-")).name
    path = RESULTS / f"equivalence-{name}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for label, overrides, mixed in ROWS:
            if arguments.only in label and (arguments.prose or not mixed):
                prose = arguments.prose if mixed else []
                results[label] = run_row(
                    arguments.model, overrides, arguments.text or ["builtin:python-docs"], prose, Path(cache)
                )
                print(label, json.dumps(results[label]["seeds"][0]), flush=True)
                ordered = {row: results[row] for row, _, _ in ROWS if row in results}
                path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
                write_tables()


if __name__ == "__main__":
    main()
