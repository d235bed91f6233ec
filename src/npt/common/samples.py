"""A few entries of every tensor of a model, by which the same weights are recognised in another dtype."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npt.common.inside import short_digest

#: Entries of each tensor.
_EACH = 4
#: Rounding by one cast is at most half a unit in the last place; a second cast may add to it.
_SLACK = 1.25
#: Half the distance of float16's smallest numbers, twice.
_ABSOLUTE = 2.0**-24


@torch.no_grad()
def sample_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """{"names": digest of the tensors' names, "values": `_EACH` float32 of each in the order of their names, base64}.

    A quantised tensor's entries are codes and count as NaN.
    """
    names = sorted(tensors)
    values = [_entries(tensors[name]) for name in names]
    packed = np.concatenate([np.empty(0, np.float32), *values]).astype("<f4").tobytes()
    return {"names": short_digest(names), "values": base64.b64encode(packed).decode()}


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> int:
    """The number of tensors that differ by more than a cast explains; 0 where the two are of tensors with other names."""
    if one["names"] != other["names"]:
        return 0
    a, b = (_values(part) for part in (one, other))
    if a.shape != b.shape:
        return 1
    allowed = _SLACK * (_half_unit(a) + _half_unit(b)) + _ABSOLUTE
    with np.errstate(invalid="ignore"):
        wrong = np.abs(a - b) > allowed  # False where one of them is a code
    return int(wrong.reshape(-1, _EACH).any(1).sum())


def has_codes(samples: Mapping[str, str]) -> bool:
    """True where a tensor was quantised."""
    return bool(np.isnan(_values(samples)).any())


def are_samples(value: Any) -> bool:
    """True for a value of a file that has the form of `sample_tensors`'."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("names", "values")):
        return False
    try:
        return len(base64.b64decode(value["values"], validate=True)) % (4 * _EACH) == 0
    except (binascii.Error, ValueError):
        return False


def is_quantized(tensor: Tensor) -> bool:
    """True for a tensor whose entries are codes: integers, or floats of eight bits with a scale elsewhere."""
    return not tensor.is_floating_point() or tensor.element_size() == 1


def _entries(tensor: Tensor) -> np.ndarray:
    if is_quantized(tensor) or not tensor.numel():
        return np.full(_EACH, np.nan, np.float32)
    flat = tensor.detach().reshape(-1)
    # The golden ratio's multiples, so that no two places of a matrix share a column because of its width.
    places = [int((0.31 + 0.6180339887 * i) % 1 * len(flat)) for i in range(_EACH)]
    entries: np.ndarray = flat[torch.tensor(places, device=flat.device)].float().cpu().numpy()
    return entries


def _values(samples: Mapping[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(samples["values"]), "<f4").astype(np.float32)


def _half_unit(values: np.ndarray) -> np.ndarray:
    """Half a unit in the last place of each value, in the coarsest dtype that holds it exactly."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        half = values.astype(np.float16).astype(np.float32) == values
    relative = np.where(bits & 0xFFFF == 0, 2.0**-8, np.where(half, 2.0**-11, 2.0**-24))  # bfloat16, float16, float32
    units: np.ndarray = np.ldexp(relative, np.frexp(values)[1] - 1)
    return units
