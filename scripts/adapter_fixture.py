"""Writes the adapters that every later version has to read: python -m scripts.adapter_fixture tests/fixtures/adapters/v2

Each is a small adapter of builtin:tiny with random values, and expected.json, logits of the converted model. Run once per
`FORMAT_VERSION`; what was written is never written again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from npt import NPTConfig
from npt.builtin import source_of
from npt.tuner.converted import active_layers

#: What an adapter's files may differ in.
ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {"npt_layers": [4, 5], "rank": 2},
    "original": {
        "npt_layers": [3], "rank": 2, "key": "tied", "carry": "none", "gain": "none", "low_rank_at": "projection",
        "target_projections": ["gate"],
    },
    "learned-overlap": {"npt_layers": [5], "rank": 1, "key": "learned", "gain": "overlap"},
    "norm-no-rank": {"npt_layers": [2], "rank": 0, "gain": "norm", "modulation_scale": 0.5},
    "exact": {"npt_layers": "upper_half", "carry": "exact"},
}  # fmt: skip
IDS = torch.arange(5, 45).reshape(2, 20)


def logits(model: Any) -> list[list[float]]:
    """Those of the last token, every 64th entry."""
    with torch.no_grad():
        return [[float(x) for x in row] for row in model(input_ids=IDS).logits[:, -1, ::64]]


def main(folder: Path) -> None:
    """Writes every adapter that is not there."""
    for name, options in ADAPTERS.items():
        if (folder / name).exists():
            print(f"{folder / name} is there already and stays")
            continue
        base = AutoModelForCausalLM.from_pretrained(source_of("builtin:tiny"), dtype=torch.float32)
        model = get_peft_model(base, NPTConfig(**options)).eval()
        model.peft_config["default"].base_model_name_or_path = "builtin:tiny"
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in active_layers(model):
                for parameter in layer.component.parameters():  # type: ignore[union-attr]
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(folder / name))
        (folder / name / "README.md").unlink()
        (folder / name / "expected.json").write_text(json.dumps(logits(model)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
