"""The report of a fine-tuning: every method's figures beside the base's, as finetune_report.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npt.adapters.folder import RUN_CONFIG
from npt.adapters.settings import as_recorded
from npt.builtin import name_of
from npt.common.distribution import versions
from npt.common.files import write_json
from npt.common.processes import world
from npt.config import RunConfig, save_config
from npt.evaluation.evaluate import REPORTED_OPTIONS
from npt.report.page import write_page
from npt.report.run_files import FINETUNE_JSON, METRICS, read_json_lines
from npt.runs.corpora import Corpus
from npt.tuner.converted import active_layers, adapter_config, device_of, parameter_counts


@dataclass
class Arm:
    """One method of a fine-tuning, and what came of it.

    name: npt, lora or dora. trained: parameters that it trains. rank: of it. blocks: indices. places: the
    projections of another method.
    learning_rate: of its training, before the schedule.
    figures, base: {corpus: figures} of the model and of the base beside it (`npt.finetuning.figures`). seconds: of training
    in this process. steps: taken. samples: texts of both models. model, protocol: the parts of the report that the
    converted model decides.
    """

    name: str
    trained: int
    rank: int
    blocks: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    learning_rate: float = 0.0
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """{name: value} of what decides the training of another method."""
        return {"finetuning.compare (method, rank, places)": [self.name, self.rank, *self.places]}

    def keep(self, model: Any, tokenizer: Any, config: RunConfig) -> None:
        """Notes the figures of the converted model that the report gives, and completes its adapter's folder."""
        own, base = parameter_counts(model)
        layers, adapter = active_layers(model), adapter_config(model)
        self.model = {
            "base_model": name_of(adapter.base_model_name_or_path),
            "npt_layers": [layer.index for layer in layers],
            **{name: getattr(adapter, name) for name in REPORTED_OPTIONS},
            "rank": adapter.rank,
            "adapter_parameters": own,
            "base_parameters": base,
        }
        self.protocol = {
            "dtype": str(layers[0].weight.dtype).removeprefix("torch."),
            "device": str(device_of(model)),
            "versions": versions(),
        }
        best = Path(config.paths.checkpoint_dir) / "best_model"
        save_config(as_recorded(config), best / RUN_CONFIG)
        tokenizer.save_pretrained(str(best))


def write_report(config: RunConfig, arms: Sequence[Arm], corpus: Corpus) -> dict[str, Any]:
    """Writes finetune_report.json and report.html of the run's folder; returns the report.

    Args:
        arms: the methods, NPT first.
    """
    output, npt = Path(config.paths.output_dir), arms[0]
    report = {
        "model_config": npt.model,
        "start": start_of(output, config),
        "protocol": {**protocol_of(config, arms, corpus), **npt.protocol},
        "methods": {"base": {"figures": npt.base}, **{arm.name: figures_of(arm, output, config) for arm in arms}},
        "generation_samples": npt.samples,
        "notes": [*notes_of(config, arms), *corpus.unseen.notes],
    }
    write_json(output / FINETUNE_JSON, report)
    write_page(output)
    return report


def start_of(output: Path, config: RunConfig) -> dict[str, Any]:
    """The first step's loss beside the base's on the same tokens, and the adapter that training began from."""
    rows = read_json_lines(output / METRICS)
    first = next((row for row in rows if "base_loss" in row and "language_loss" in row), {})
    return {
        "adapter": config.finetuning.adapter,
        "first_loss": first.get("language_loss"),
        "first_base_loss": first.get("base_loss"),
    }


def protocol_of(config: RunConfig, arms: Sequence[Arm], corpus: Corpus) -> dict[str, Any]:
    """The settings that all methods share."""
    t, f = config.training, config.finetuning
    scored = corpus.scored(config.data.dataset_name)
    return {
        "context_length": config.data.max_length,
        "score": config.data.score,
        "held_out": config.data.dataset_name,
        "corpora": {name: len(blocks) for name, blocks in scored.items()},
        "training_blocks": corpus.trained_blocks or None,
        "steps": arms[0].steps,
        "tokens_per_step": config.data.max_length * t.batch_size * t.gradient_accumulation_steps * world()[1],
        "learning_rate": t.learning_rate,
        "lr_scheduler_type": t.lr_scheduler_type,
        "warmup_steps": t.warmup_steps,
        "mixed_precision": config.optimization.mixed_precision,
        "seed": t.seed,
        "anchor_weight": f.anchor_weight,
        "anchor_blocks": f.num_anchor_samples if f.anchor_weight else 0,
    }


def figures_of(arm: Arm, output: Path, config: RunConfig) -> dict[str, Any]:
    """The figures and the adapter of one method, as the report holds them."""
    folder = Path(config.paths.checkpoint_dir)
    best = (folder if arm.name == "npt" else folder / arm.name) / "best_model"
    chosen = json.loads((best / "best.json").read_text(encoding="utf-8"))
    return {
        "trained_parameters": arm.trained,
        "rank": arm.rank,
        "places": arm.places,
        "learning_rate": arm.learning_rate,
        "best_step": chosen["step"],
        "steps": arm.steps,
        "seconds": arm.seconds,
        "adapter": str(best),
        "figures": arm.figures,
    }


def notes_of(config: RunConfig, arms: Sequence[Arm]) -> list[str]:
    """Warnings about figures that a reader might misread."""
    found = [f"{arm.name}: {note}" for arm in arms for note in arm.notes]
    if not config.data.eval_texts:
        found.append("data.eval_texts names no general text: what was lost there is not measured")
    return found
