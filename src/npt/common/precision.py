"""Number formats: float32 where half precision has too few digits or the processor no units, checks for NaN and infinity."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from npt.common.display import human_bytes

#: Formats with too few digits for sums and for small differences of large numbers.
HALF = (torch.bfloat16, torch.float16)
#: The share of free memory that weights may take which were half as large.
SHARE = 0.5
#: The attribute of a loaded base that says why its weights have their dtype.
DTYPE_REASON = "npt_dtype_reason"


def has_units(dtype: torch.dtype, device: torch.device) -> bool:
    """False for a CPU that computes a half-precision format by way of float32, which takes about twice float32's time."""
    if device.type != "cpu" or dtype not in HALF:
        return True
    if dtype == torch.bfloat16 and platform.machine().lower() in ("x86_64", "amd64", "x86", "i686"):
        # oneDNN's own answer is yes on every AVX-512, units or not.
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(getattr(torch.cpu, name, bool)()) for name in names)
    if not torch.backends.mkldnn.is_available():
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())


def choose_dtype(own: torch.dtype, device: torch.device, parameters: Callable[[], int]) -> tuple[torch.dtype, str]:
    """(dtype of the weights, why in a few words) where nobody named one.

    Args:
        own: the checkpoint's. parameters: counts the model's numbers; called only where that decides.

    Returns:
        the checkpoint's own dtype; float32 on a CPU without units for it, if the weights then fit half of the free memory.
    """
    name, free = str(own).removeprefix("torch."), int(psutil.virtual_memory().available)
    if has_units(own, device):
        return own, "as the checkpoint"
    size = 4 * parameters()
    taken, given = human_bytes(size), human_bytes(free)
    if size <= SHARE * free:
        return torch.float32, f"this CPU has no {name} units, and {taken} of weights fit the {given} of free memory"
    return (
        own,
        f"as the checkpoint: this CPU has no {name} units, but float32 would take {taken} of {given} of free memory",
    )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where it is float64. Sums and distributions need the digits."""
    # Without the first case, a decoding step would pay for a promotion that changes nothing.
    return dtype if dtype in (torch.float32, torch.float64) else torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """The tensor in float32 or better."""
    return x.to(wide_dtype(x.dtype))


def spacing(one: Tensor, other: Tensor) -> Tensor:
    """How far apart the numbers of their format lie at the larger of two, entry by entry, in float32 or better."""
    return torch.finfo(one.dtype).eps * torch.maximum(wide(one).abs(), wide(other).abs())


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
