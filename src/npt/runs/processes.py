"""The processes of a run: joined, told of, and the base sharded over them."""

from __future__ import annotations

import logging

from accelerate.utils import fsdp2_prepare_model
from peft import PeftModel
from transformers import TrainingArguments

from npt.block.families import blocks_of
from npt.common.launch import asked_processes, world_size
from npt.common.processes import env_flag, world
from npt.common.sharded import fsdp_accelerator
from npt.errors import NPTError

logger = logging.getLogger(__name__)


def start_processes(args: TrainingArguments) -> None:
    """Joins the process group of this launch, as TrainingArguments do it.

    Raises:
        NPTError: the group is smaller than the launcher was asked for: each process would train alone and overwrite the
            others' files.
    """
    _ = args.device  # starts torch.distributed where a launcher's variables are set
    count = world()[1]
    asked = asked_processes()
    name = max(asked, key=lambda key: asked[key], default="")
    if name and asked[name] > count:
        raise NPTError(
            f"{name}={asked[name]}: that many processes were asked for and this one is in a group of {count}; start them "
            f"with torchrun --nproc-per-node {asked[name]} or accelerate launch, or unset {name} for a single process"
        )


def tell_processes(args: TrainingArguments) -> None:
    """Logs the number of processes in the group, and the blocks that a step takes."""
    count, size = world()[1], args.per_device_train_batch_size * args.gradient_accumulation_steps
    plural = "es" if count > 1 else ""
    logger.info("%d process%s on %s, %d blocks a step", count, plural, args.device.type, count * size)


def shards_base(asked: bool) -> bool:
    """True where the base is to be sharded over the processes.

    Args:
        asked: `optimization.fsdp` of the configuration; accelerate's own configuration may ask for it too.

    Raises:
        NPTError: there is one process only.
    """
    asked = asked or env_flag("ACCELERATE_USE_FSDP")
    if asked and world_size() < 2:
        raise NPTError(
            "optimization.fsdp=true (or ACCELERATE_USE_FSDP): there is one process, and nothing to shard over; start "
            "several with torchrun or accelerate launch, or set it to false"
        )
    return asked


def shard_base(model: PeftModel, args: TrainingArguments) -> None:
    """Shards a converted model over the processes with FSDP2, in place, before any text goes through it.

    Trainer would do it with the same functions of accelerate, but only as training starts. It leaves a model alone that is
    sharded already.

    Raises:
        NPTError: accelerate's configuration asks for FSDP's first version.
    """
    accelerator = fsdp_accelerator(args)
    names = {type(block).__name__ for block in blocks_of(model.get_base_model())}
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(names)
    fsdp2_prepare_model(accelerator, model)
    logger.info("the model is sharded over %d processes (FSDP2)", accelerator.num_processes)
