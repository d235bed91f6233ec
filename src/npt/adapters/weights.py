"""The weights of an adapter: between a model, whole or sharded, and a folder that PEFT can read."""

from __future__ import annotations

import shutil
from pathlib import Path

from peft import PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from npt.common.files import replace_files
from npt.common.processes import first_does
from npt.common.sharded import full_tensor, like
from npt.errors import CheckpointError
from npt.tuner.converted import component_ids


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """{name in the model: value} of all components, whole; all processes call it."""
    own = component_ids(model)
    return {name: full_tensor(p) for name, p in model.named_parameters() if id(p) in own}


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

    # Weights last: the other files of one run's adapters are alike.
    first_does(lambda: replace_files(folder, fill, last=".safetensors"))


def load_weights(model: PeftModel, folder: Path) -> None:
    """Puts the values of the adapter in a folder into the model's active one, sharded or not; all processes call it.

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
