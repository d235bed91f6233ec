"""Nested training state (optimiser, scheduler, random generators) in one safetensors file: no pickle is written or read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from npt.errors import CheckpointError

_KEY = "state"
#: The key of an object that stands for a value of a kind that JSON does not have.
_TENSOR, _ARRAY, _TUPLE, _ITEMS = "$tensor", "$array", "$tuple", "$items"


def save_state(path: Path, state: Any) -> None:
    """Writes dicts, lists and tuples of tensors, arrays, numbers, text, booleans and None, exactly.

    Raises:
        TypeError: anything else is in it.
    """
    tensors: dict[str, torch.Tensor] = {}
    layout = json.dumps(_pack(state, tensors))
    save_file(tensors or {"empty": torch.zeros(1)}, path, metadata={_KEY: layout})


def load_state(path: Path) -> Any:
    """Returns the state that `save_state` wrote, tensors on the CPU.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            layout = json.loads((file.metadata() or {})[_KEY])
            return _unpack(layout, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); resume from an earlier checkpoint") from error


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        name = str(len(tensors))
        tensors[name] = torch.as_tensor(value).detach().cpu().contiguous().clone()
        return {_TENSOR if isinstance(value, torch.Tensor) else _ARRAY: name}
    if isinstance(value, dict):
        # As pairs: an optimiser's state is keyed by numbers.
        return {_ITEMS: [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} in training state: {value!r}")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == _ARRAY:
        return tensors[content].numpy()
    if kind == _TUPLE:
        return tuple(_unpack(item, tensors) for item in content)
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
