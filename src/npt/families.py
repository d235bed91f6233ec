"""Where the pieces of a block are, one line per model family.

A new family is one call: `register_family("my_type", Family(...))`. The conversion contract (`attach.py`) runs at
conversion and rejects a wrong line, so a typo here can't produce wrong results silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from npt.errors import ConversionError


@dataclass(frozen=True)
class Family:
    """Paths of modules, relative to the causal LM (`blocks`) or to one block (the others).

    tap: the last module whose output attention adds to the residual stream.
    norm: Norm2, which reads the residual stream after attention. mlp: the module from Norm2's output to the update.
    up, down, gate: the MLP's projections (Linear or Conv1D); gate is None where there is none.
    """

    blocks: str
    tap: str
    norm: str
    mlp: str
    up: str
    down: str
    gate: str | None = None

    @property
    def projections(self) -> dict[str, str]:
        """{"gate" | "up" | "down": path}, the ones this family has."""
        paths = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: path for name, path in paths.items() if path is not None}


_GATED = {"mlp": "mlp", "up": "mlp.up_proj", "down": "mlp.down_proj", "gate": "mlp.gate_proj"}
_LLAMA = Family("model.layers", "self_attn.o_proj", "post_attention_layernorm", **_GATED)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Family("transformer.h", "attn.resid_dropout", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj"),
}


def register_family(model_type: str, family: Family) -> None:
    """Teach npt a model family: `model_type` as in the model's config.json."""
    FAMILIES[model_type] = family


def family_of(model: nn.Module) -> Family:
    """The family of a causal LM.

    Raises:
        ConversionError: the model has no `config.model_type`, or one that isn't in the table.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ConversionError(
            f"model type {model_type!r} of {type(model).__name__} is not supported; known: {', '.join(sorted(FAMILIES))}. "
            "Add one with npt.families.register_family(model_type, Family(...))"
        )
    return FAMILIES[model_type]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal LM, in depth order."""
    blocks: Any = model.get_submodule(family_of(model).blocks)
    return blocks


def resolve_layers(choice: str | list[int], num_blocks: int) -> list[int]:
    """Block indices, ascending, of "all", "upper_half" (n//2 ... n-1), "lower_half" or a list (negatives from the end).

    Raises:
        ConversionError: an unknown word, an index out of range, a duplicate or an empty list.
    """
    words = {
        "all": range(num_blocks),
        "upper_half": range(num_blocks // 2, num_blocks),
        "lower_half": range(num_blocks // 2),
    }
    if isinstance(choice, str):
        if choice not in words:
            raise ConversionError(f"npt_layers={choice!r} is unknown; use {', '.join(words)} or a list of indices")
        layers = list(words[choice])
    else:
        wrong = [
            i for i in choice if not isinstance(i, int) or isinstance(i, bool) or not -num_blocks <= i < num_blocks
        ]
        if wrong:
            raise ConversionError(
                f"npt_layers={list(choice)} names {wrong}, but the model has {num_blocks} blocks: "
                f"use {-num_blocks} to {num_blocks - 1}"
            )
        layers = sorted(i % num_blocks for i in choice)
        if len(set(layers)) != len(layers):
            raise ConversionError(f"npt_layers={list(choice)} names a block twice; name each once")
    if not layers:
        raise ConversionError(f"npt_layers={choice!r} selects no block of {num_blocks}; name at least one")
    return layers
