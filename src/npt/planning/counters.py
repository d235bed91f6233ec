"""Counters for code that runs on tensors, also on the meta device, where tensors have sizes but no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

#: A larger tensor that is copied to the CPU stays on the meta device.
MOST_VALUES = 2**20
#: Fused attention of the CPU, which torch's counter does not know: (its floating point operations, how many of its first
#: arguments they depend on).
_ATTENTION: dict[Any, tuple[Callable[..., int], int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: (sdpa_flop_count, 3),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (sdpa_backward_flop_count, 4),
}


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of tensor storage that are alive at once, beside what was alive on entry.

    live: bytes now. peak: most bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage_id(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if (
                isinstance(tensor, Tensor)
                and _storage_id(tensor) not in known
                and _storage_id(tensor) not in self._seen
            ):
                self._watch(tensor)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage_id(tensor)
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


def _storage_id(tensor: Tensor) -> int:
    """A number that tells storages apart: on the meta device all data addresses are zero, but each storage has one Python
    object for as long as it lives."""
    return id(tensor.untyped_storage())


class PretendValues(TorchDispatchMode):
    """Lets code that reads values run on the meta device: every mask is all true, and every number that is read is one.

    An operator called again with arguments of the same layout gets a new tensor of the layout that it made before: torch
    works most of these out in Python, and the blocks of a model all call the same operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self._layouts: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if not any(isinstance(x, Tensor) and x.is_meta for x in tree_iter(args)):
            return func(*args, **kwargs)
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            mask = args[1][0]
            return args[0].new_empty(mask.numel(), *args[0].shape[mask.dim() :])
        if func is aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        if func is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten._to_copy.default and str(kwargs.get("device", "meta")) == "cpu":
            dtype = kwargs.get("dtype") or args[0].dtype
            # Nobody reads single values of a large tensor, and those of a 70B model would take gigabytes.
            return torch.ones(args[0].shape, dtype=dtype, device="meta" if args[0].numel() > MOST_VALUES else "cpu")
        if func is aten.copy_.default and not args[0].is_meta:
            return args[0].fill_(1)
        return self._remembered(func, args, kwargs) if _is_fresh(func) else func(*args, **kwargs)

    def _remembered(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's result, of which the layout is worked out only once."""
        key = (func, _layout((args, tuple(kwargs.items()))))
        if key in self._layouts:
            size, stride, dtype = self._layouts[key]
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        result = func(*args, **kwargs)
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        # `_unsafe_view` points into its argument, and its schema does not say so.
        if result.is_meta and all(t.is_meta and _storage_id(t) != _storage_id(result) for t in inputs):
            self._layouts[key] = tuple(result.shape), result.stride(), result.dtype
        return result


def _layout(value: Any) -> Any:
    """A key of an argument: sizes, strides and dtype of a tensor; of another value its type too, as 1 and 1.0 are equal."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(_layout(x) for x in value)
    return type(value), value


@cache
def _is_fresh(func: Any) -> bool:
    """True for an operator with one result, a tensor of its own, that writes into no argument."""
    schema = func._schema
    returns = [str(r.type) for r in schema.returns]
    return returns == ["Tensor"] and not any(x.alias_info for x in (*schema.arguments, *schema.returns))


class WorkCounter(TorchDispatchMode):
    """Counts the work of what runs under it.

    flops: floating point operations of products and attention. traffic: bytes that all other operators read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.traffic = 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif func in _ATTENTION:
            count, first = _ATTENTION[func]
            self.flops += (
                count(*(tensor.shape for tensor in args[:first])) / 2
            )  # causal: half of the products are left out
        elif not _is_view(func):
            tensors = [t for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor)]
            self.traffic += sum(t.numel() * t.element_size() for t in tensors)
        return result


def _is_view(func: Any) -> bool:
    """True for an operator whose result only points into its argument, so that no bytes move."""
    return any(r.alias_info for r in func._schema.returns if not r.alias_info or not r.alias_info.is_write)
