"""The processes of a launch (torchrun, accelerate, srun): counted, told of, and the base spread over them."""

from __future__ import annotations

import logging
import os
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp2_prepare_model
from transformers import TrainingArguments

from npt.distributed import env_flag, world
from npt.errors import NPTError
from npt.families import blocks_of

logger = logging.getLogger(__name__)

#: Where launchers say how many processes they start: torchrun and accelerate, Open MPI, other MPIs, srun.
LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def start_processes(args: TrainingArguments) -> None:
    """Joins the processes of this launch, as TrainingArguments do it, and says how many there are.

    Raises:
        NPTError: fewer than the launcher was asked for.
    """
    _ = args.device  # starts torch.distributed where a launcher's variables are set
    check_world()
    count, size = world()[1], args.per_device_train_batch_size * args.gradient_accumulation_steps
    logger.info(
        "%d process%s on %s, %d blocks a step", count, "es" if count > 1 else "", args.device.type, count * size
    )


def check_world() -> None:
    """That the processes a launcher started have found one another.

    Raises:
        NPTError: fewer than were asked for; each would train alone and overwrite the others' files.
    """
    asked = {name: int(os.environ[name]) for name in LAUNCHERS if os.environ.get(name, "").isdigit()}
    name = max(asked, key=lambda key: asked[key], default="")
    count = world()[1]
    if name and asked[name] > count:
        raise NPTError(
            f"{name}={asked[name]}: that many processes were asked for and this one is in a group of {count}; start them "
            f"with torchrun --nproc-per-node {asked[name]} or accelerate launch, or unset {name} for a single process"
        )
    # accelerate launch --cpu --num_processes 2 sets these for an mpirun that it then does not call.
    if count == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and not name:
        raise NPTError(
            "accelerate was asked for several processes and started one: MASTER_ADDR is set, WORLD_SIZE is not. On CPUs "
            "use torchrun --nproc-per-node 2, or accelerate launch --multi_gpu --num_processes 2, which also counts CPUs"
        )


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
