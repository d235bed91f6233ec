"""Models whose weights lie in parts on several processes (FSDP2, ZeRO-3): whole tensors, and work inside a wrapped forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from npt.common.processes import wire_device, world
from npt.errors import NPTError

if TYPE_CHECKING:
    from transformers import TrainingArguments

T = TypeVar("T")


def through(model: nn.Module, function: Callable[[], T]) -> T:
    """Runs a function inside the forward of a wrapped model, so that the wrapper's own hooks gather the weights before it and
    reduce the gradients after it. All processes call it.

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
    """True for a model in a wrapper (DDP, FSDP2, DeepSpeed) that has to see every forward."""
    return isinstance(model, FSDPModule | DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine"


def is_sharded(model: nn.Module) -> bool:
    """True for a model whose weights FSDP2 keeps in parts."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Frees gathered weights; without a backward, FSDP2 keeps those of the root module."""
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
    """The whole parameter, detached; all processes call it."""
    if isinstance(parameter, DTensor):
        whole: Tensor = parameter.full_tensor()
        return whole.detach()
    if hasattr(parameter, "ds_id"):  # ZeRO-3 keeps a part of it
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, cut into parts where the parameter (or a state of it) is kept in parts; all processes call it."""
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


def fsdp_accelerator(args: TrainingArguments) -> Accelerator:
    """The accelerator of a run with FSDP2, as TrainingArguments or accelerate's configuration describe it.

    On CPUs accelerate would ignore FSDP and fall back to DDP without a word, though torch can shard there as well.

    Raises:
        NPTError: FSDP's first version.
    """
    options = args.fsdp_plugin_args
    plugin = FullyShardedDataParallelPlugin(**(options or {}))
    accelerator = Accelerator(fsdp_plugin=plugin)
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if not accelerator.is_fsdp2:
        raise NPTError("fsdp_version=1 in accelerate's configuration: npt shards with FSDP2; set fsdp_version: 2")
    return accelerator
