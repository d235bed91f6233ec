"""The parameters of a base model, told apart: its own, and those of other methods' adapters that lie inside it.

An adapter inside the base is part of what the base computes while it is at work: enabled, active and not merged. NPT's own
components are neither. Names are as the model would have them without any adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

#: The attribute of an NPT layer that holds its components; no parameter below it is the base's.
COMPONENTS = "npt_components"
#: Parts of a name that wrappers of other methods put in.
_WRAPPERS = ("base_layer", "original_module", "token_adapter")
#: Settings of a tuner layer that say how it is run and trained, not what it computes.
_NO_MATTER = ("ephemeral_gpu_offload", "frozen_peft_weight_names")


@dataclass
class Parts:
    """The parts of a base.

    own: {name: parameter}. adapters: {name: tensor} of the adapters at work inside it. kinds: their methods, "lora" for one.
    layers: where they are and how many at each place. settings: {setting: its values there}.
    """

    own: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, Tensor] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    layers: list[tuple[str, str, int]] = field(default_factory=list)
    settings: dict[str, list[Any]] = field(default_factory=dict)


def parts_of(base: nn.Module) -> Parts:
    """Tells the parameters of a base apart; those of adapters that are not at work belong to nothing."""
    parts, taken = Parts(), set()
    for path, layer in adapter_layers(base):
        available, active = _names(layer)
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            words = name.split(".")
            if words[0] in _WRAPPERS or id(tensor) in taken:
                continue
            taken.add(id(tensor))
            owner = next((word for word in words if word in available), None)
            if active and (owner is None or owner in active):
                place = active.index(owner) if owner in active else 0
                kept = [str(place) if word == owner else word for word in words]
                parts.adapters[_plain(f"{path}.{'.'.join(kept)}")] = tensor
        if active:
            parts.kinds.append(kind_of(layer))
            parts.layers.append((_plain(path), type(layer).__name__, len(active)))
            for setting, values in _settings(layer, active).items():
                parts.settings.setdefault(setting, []).append(values)
    parts.kinds = sorted(set(parts.kinds))
    for name, parameter in base.named_parameters():
        if id(parameter) not in taken and COMPONENTS not in name.split("."):
            parts.own[_plain(name)] = parameter
    return parts


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of every layer that another method's adapters have put into a model."""
    from peft.tuners.tuners_utils import (
        BaseTunerLayer,
    )  # here, as npt.tuner, which peft's import brings, needs this module
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in model.named_modules():
        other = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if other and COMPONENTS not in module.adapter_layer_names:  # type: ignore[operator]
            yield path, module


def kind_of(layer: nn.Module) -> str:
    """The method of a tuner layer, as PEFT names its packages ("lora"); a class name where it is not PEFT's."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(layer, AuxiliaryTrainingWrapper):
        return "modules_to_save"
    words = type(layer).__module__.split(".")
    return words[2] if words[:2] == ["peft", "tuners"] else type(layer).__name__


def short_digest(value: Any) -> str:
    """A short digest of anything JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _names(layer: Any) -> tuple[set[str], list[str]]:
    """(names of the layer's adapters, those at work)."""
    available = set(layer._get_available_adapters())
    idle = layer.disable_adapters or layer.merged_adapters
    return available, [] if idle else [name for name in layer.active_adapters if name in available]


def _settings(layer: nn.Module, active: list[str]) -> dict[str, list[Any]]:
    """{setting: values of the adapters at work}, of the plain values that a layer keeps by adapter name."""
    return {
        setting: [values[name] for name in active]
        for setting, values in vars(layer).items()
        if isinstance(values, dict)
        and setting not in _NO_MATTER
        and all(isinstance(values.get(name), int | float | str) for name in active)
    }


def _plain(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)
