"""Number formats: float32 where a half-precision model's own has too few digits, and checks for NaN and infinity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where it is float64. Sums and distributions need the digits."""
    # Without the first case, a decoding step would pay for a promotion that changes nothing.
    return dtype if dtype in (torch.float32, torch.float64) else torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """The tensor in float32 or better."""
    return x.to(wide_dtype(x.dtype))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype. `x.to` costs a decoding step time even where it changes nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def matmul_precision(device: torch.device) -> str:
    """The format that float32 matrix products of a device are computed in: "ieee" (float32), "tf32" or "bf16".

    Other libraries and environment variables lower it for the whole process.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    found = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if found is None:  # torch before 2.9
        found = {"highest": "ieee", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]
    return "ieee" if found == "none" else str(found)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """True where every entry is finite; takes one transfer from the device. Norms overflow only past 1e19 in float32."""
    if not tensors:
        return True
    norms = torch._foreach_norm([wide(t.detach()) for t in tensors])
    return bool(torch.stack(list(norms)).isfinite().all())
