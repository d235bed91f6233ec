"""The processes of a launch (torchrun, accelerate, srun): counted, told of, and the base spread over them."""

from __future__ import annotations

import logging
import os
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp2_prepare_model
from transformers import TrainingArguments

from npt.block.families import blocks_of
from npt.common.processes import env_flag, world
from npt.errors import NPTError

logger = logging.getLogger(__name__)

#: Where launchers say how many processes they start: torchrun and accelerate, Open MPI, other MPIs, srun.
LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def check_launch() -> None:
    """What a launcher's variables say, before anything waits for the other processes.

    Raises:
        NPTError: several processes without what they need to find one another.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if count > 1 and missing:
        raise NPTError(
            f"WORLD_SIZE={count}, but {', '.join(missing)} is not set: start the processes with torchrun --nproc-per-node "
            f"{count} or accelerate launch, or unset WORLD_SIZE for a single one"
        )
    # accelerate launch --cpu --num_processes 2 sets these for an mpirun that it does not call itself.
    if count == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ) and not _asked():
        raise NPTError(
            "accelerate was asked for several processes and started one (MASTER_ADDR is set, WORLD_SIZE is not): on CPUs use "
            "torchrun --nproc-per-node 2, or accelerate launch --multi_gpu --num_processes 2, which starts CPU processes too"
        )


def start_processes(args: TrainingArguments) -> None:
    """Joins the processes of this launch, as TrainingArguments do it.

    Raises:
        NPTError: fewer than the launcher was asked for; each would train alone and overwrite the others' files.
    """
    _ = args.device  # starts torch.distributed where a launcher's variables are set
    count = world()[1]
    asked = _asked()
    name = max(asked, key=lambda key: asked[key], default="")
    if name and asked[name] > count:
        raise NPTError(
            f"{name}={asked[name]}: that many processes were asked for and this one is in a group of {count}; start them "
            f"with torchrun --nproc-per-node {asked[name]} or accelerate launch, or unset {name} for a single process"
        )


def tell_processes(args: TrainingArguments) -> None:
    """Logs the number of processes there really are, and what a step takes in."""
    count, size = world()[1], args.per_device_train_batch_size * args.gradient_accumulation_steps
    plural = "es" if count > 1 else ""
    logger.info("%d process%s on %s, %d blocks a step", count, plural, args.device.type, count * size)


def _asked() -> dict[str, int]:
    """{variable: number of processes} of every launcher that speaks of more than one."""
    found = {name: os.environ.get(name, "") for name in LAUNCHERS}
    return {name: int(value) for name, value in found.items() if value.isdigit() and int(value) > 1}


def shards_base(asked: bool) -> bool:
    """Whether the base is to be spread over the processes: the configuration asks for it, or accelerate's does.

    Raises:
        NPTError: there is but one process.
    """
    asked = asked or env_flag("ACCELERATE_USE_FSDP")
    if asked and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise NPTError(
            "optimization.fsdp=true (or ACCELERATE_USE_FSDP): there is one process, and nothing to shard over; start "
            "several with torchrun or accelerate launch, or set it to false"
        )
    return asked


def shard_base(model: Any, args: TrainingArguments) -> None:
    """Cuts a converted model over the processes with FSDP2, in place, before any text goes through it.

    Trainer would do it as training starts, with the same functions of accelerate; a model that is cut already stays as it
    is.

    Raises:
        NPTError: FSDP's first version.
    """
    accelerator = fsdp_accelerator(args)
    blocks: Any = blocks_of(model.get_base_model())
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})
    fsdp2_prepare_model(accelerator, model)
    logger.info("the model is sharded over %d processes (FSDP2)", accelerator.num_processes)


def fsdp_accelerator(args: TrainingArguments) -> Accelerator:
    """The accelerator of a run with FSDP2, as TrainingArguments or accelerate's configuration describe it.

    On CPUs accelerate passes FSDP over and would fall back to DDP without a word; torch shards there as well.

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
