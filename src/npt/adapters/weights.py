"""The weights of an adapter: between a model, whole or sharded, and a folder that PEFT can read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from npt.common.files import replace_files
from npt.common.processes import first_does, gather, world
from npt.common.sharded import full_tensor, like
from npt.data.seen import Seen, TextRecord
from npt.errors import CheckpointError
from npt.tuner.converted import component_ids, text_record_of


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """{name in the model: value} of all components, whole, or of all that an adapter of another method trains; all processes
    call it.

    The processes tell one another of the text that each has read, so that the adapter is saved with a record of all of it.
    """
    share_record(model)
    own = component_ids(model)
    return {n: full_tensor(p) for n, p in model.named_parameters() if (id(p) in own if own else p.requires_grad)}


def share_record(model: PeftModel) -> None:
    """Merges all processes' records of the text that was trained on; all processes call it."""
    record = text_record_of(model)
    if record is not None and world()[1] > 1:
        own = record.trained
        parts = gather(torch.from_numpy(np.append(own.hashes, np.uint64(own.level)).view(np.int64)))
        for part in parts:
            values = part.numpy().view(np.uint64)
            own.merge(Seen(own.window, values[:-1], int(values[-1])))


def save_weights(model: PeftModel, folder: str | Path, state: dict[str, Tensor]) -> None:
    """`save_pretrained` of an adapter with the values of `adapter_state`.

    Without save_embedding_layers=False, PEFT would ask the hub whether the vocabulary was resized, which npt never does.
    """
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """`save_pretrained` whose files each replace the old one whole, by the first process; all call it.

    Raises:
        RunError: the disk is full or gone; the folder holds what it held.
    """
    state = adapter_state(model)

    def fill(temporary: Path) -> None:
        if (folder / "README.md").is_file():
            shutil.copy(folder / "README.md", temporary)  # a person's own card stays
        save_weights(model, temporary, state)

    # Weights last: the other files of one run's adapters are alike, but for the record of text, which only grows.
    first_does(lambda: replace_files(folder, fill, last=SAFETENSORS_WEIGHTS_NAME))


def load_weights(model: PeftModel, folder: Path) -> None:
    """Puts the values of the adapter in a folder into the model's active one, sharded or not; all processes call it.

    The text that the adapter there was made with is added to the model's record.

    Raises:
        CheckpointError: the adapter there is for other blocks or options.
    """
    values = load_peft_weights(str(folder), device="cpu")
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    if set(values) != set(wanted):
        odd = sorted(set(values) ^ set(wanted))[0]
        raise CheckpointError(
            f"{folder}: the adapter there is for other blocks or options, first {odd}; name its own base"
        )
    set_peft_model_state_dict(model, {name: like(value, wanted[name]) for name, value in values.items()})
    record, found = text_record_of(model), TextRecord.read(folder)
    if record is not None and found is not None:
        record.merge(found)
