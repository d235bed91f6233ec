"""Models whose weights lie in parts on several processes (FSDP2, ZeRO-3): whole tensors, and work inside a wrapped forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from npt.common.processes import wire_device, world

T = TypeVar("T")


def through(model: nn.Module, function: Callable[[], T]) -> T:
    """Runs a function inside the forward of a wrapped model, so that the wrapper's own hooks gather weights before and
    reduce gradients after, as they would for its forward. All processes call it.

    Lightning and TRL redirect a forward in the same way.
    """
    if not is_wrapped(model):
        return function()
    inner: Any = model if isinstance(model, FSDPModule) else model.module
    before = inner.__dict__.get("forward")

    def forward(_: Any) -> T:
        restore()
        return function()

    def restore() -> None:
        if before is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.__dict__["forward"] = before

    inner.__dict__["forward"] = forward
    try:
        result: T = model(0)  # an argument, because wrappers move their first one to the device
    finally:
        restore()
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        reshard(model)
    return result


def is_wrapped(model: nn.Module) -> bool:
    """Whether a wrapper of several processes has to see a forward."""
    return isinstance(model, FSDPModule | DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine"


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 keeps the model's weights in parts."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Lets go of gathered weights; without a backward FSDP2 keeps those of the root."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Whole weights of a block that is used outside its own forward; all processes enter together."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def full_tensor(parameter: Tensor) -> Tensor:
    """A parameter whole, detached; all processes call it."""
    if isinstance(parameter, DTensor):
        whole: Tensor = parameter.full_tensor()
        return whole.detach()
    if hasattr(parameter, "ds_id"):  # ZeRO-3 keeps a part of it
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the parameter (or a state of it) is kept: in parts, where that is; all processes call it."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
    return whole


def same_everywhere(tensors: Mapping[str, Tensor]) -> None:
    """Gives every process the first one's values, in place; all call it."""
    if world()[1] == 1:
        return
    for _, tensor in sorted(tensors.items()):
        wire = tensor.detach().to(wire_device()).contiguous()
        dist.broadcast(wire, src=0)
        with torch.no_grad():
            tensor.copy_(wire)
