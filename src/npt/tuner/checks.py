"""Models and adapters that are refused before anything is changed: each would give wrong results silently."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from peft.config import PeftConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from npt.block.families import blocks_of, family_of
from npt.block.probing import projection_shape
from npt.builtin import name_of
from npt.common.display import blocks_text
from npt.common.fingerprint import base_record, difference
from npt.common.inside import adapter_layers, parts_of
from npt.common.options import is_calibrated
from npt.common.sharded import is_sharded
from npt.errors import ConversionError
from npt.tuner.config import NPTConfig
from npt.tuner.converted import npt_layers

logger = logging.getLogger(__name__)


def refuse_unsupported(model: nn.Module) -> None:
    """Refuses what would give wrong results silently.

    Raises:
        ConversionError: a PEFT-wrapped, compiled, DataParallel or tensor-parallel model, one with an encoder, or a family
            that is not in the table.
    """
    if isinstance(model, PeftModel):
        raise ConversionError(
            f"the model is wrapped by PEFT already ({', '.join(model.peft_config)}); convert what is inside: "
            "get_peft_model(model.get_base_model(), NPTConfig(...)), which keeps the other adapter at work"
        )
    if isinstance(model, nn.DataParallel):
        raise ConversionError("nn.DataParallel shares hooks between threads; use DistributedDataParallel (accelerate)")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ConversionError(
            "the model is compiled already, and a compiled model ignores new hooks; convert, then compile"
        )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ConversionError("tensor parallelism splits the MLP that NPT writes to; load the model without tp_plan")
    family_of(model)


def check_new(model: nn.Module, config: Any, name: str, *, in_peft_model: bool) -> None:
    """Checks a first adapter before its conversion.

    Args:
        in_peft_model: a PeftModel holds the adapter; False for PEFT's inject_adapter_in_model, which transformers uses.

    Raises:
        ConversionError: blocks that are NPT blocks already, or other adapters that would not go together with it.
    """
    check_name(name)
    check_kind(config)
    layers = npt_layers(model)
    if layers and (in_peft_model or any(layer.is_owned for layer in layers)):
        names = sorted({adapter for layer in layers for adapter in layer.npt_components})
        raise ConversionError(
            f"this model has NPT blocks already, {blocks_text([layer.index for layer in layers])} (adapter "
            f"{', '.join(names)}); take them off with unload() of their PeftModel, add the new adapter there with "
            "add_adapter(name, config), or load the base anew"
        )
    if any(name in layer.npt_components for layer in layers):
        raise ConversionError(f"the model has an adapter {name!r} already; give the new one another name")
    others = list(adapter_layers(model))
    whole = [path for path, layer in others if isinstance(layer, AuxiliaryTrainingWrapper) and name in layer._adapters]
    if whole:
        raise ConversionError(
            f"the {'.'.join(whole[0].split('.')[-2:])} of this model belongs to another adapter called {name!r} "
            "(modules_to_save), and PEFT would save it with the NPT adapter of that name; give that one a name of its own: "
            "get_peft_model(model, config, adapter_name='npt')"
        )
    if not in_peft_model and getattr(model, "_hf_peft_config_loaded", False) and config.target_modules is None:
        at_work = parts_of(model).kinds
        if at_work:
            raise ConversionError(
                f"add_adapter would switch the {', '.join(at_work)} adapter of this model off, which is part of what the new "
                "one is made for; use get_peft_model(model, NPTConfig(...)), which keeps it at work"
            )


def check_name(name: str) -> None:
    """Checks an adapter's name.

    Raises:
        ConversionError: it can't name a folder, or a module of torch.
    """
    # torch keeps adapters by name in a ModuleDict, beside that class's own attributes; a number could be a block's.
    taken = hasattr(nn.ModuleDict, name) or name in vars(nn.ModuleDict()) or name.isdigit()
    if re.fullmatch(r"\w[\w+ -]*", name) is None or taken:
        raise ConversionError(
            f"adapter name {name!r}: use letters, digits and _ - + only, no bare number and no word of torch's: folders and "
            "modules have it"
        )


def check_name_in(model: nn.Module, name: str) -> None:
    """Checks that an adapter's name is no other part of a parameter's name: PEFT tells adapters apart by that.

    Raises:
        ConversionError: it is one.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in npt_layers(model):
        path = paths[id(layer.get_base_layer())]
        for key, _ in layer.named_parameters():
            words = ["base_model", "model", *path.split("."), *key.split(".")]
            if words.count(name) > (key.split(".")[1] == name):
                raise ConversionError(
                    f"adapter name {name!r}: is part of the name of a weight, {path}...{key}, and PEFT would take one for the "
                    "other; use another name"
                )


def check_kind(config: Any) -> None:
    """Checks that an adapter is an NPT one.

    Raises:
        ConversionError: it is of another method.
    """
    if not isinstance(config, NPTConfig):
        kind = type(config).__name__ if isinstance(config, PeftConfig) else repr(config)
        raise ConversionError(f"{kind} can't be added to an NPT model; load it with NPTConfig")


def check_base_shape(config: NPTConfig, model: nn.Module, num_blocks: int) -> None:
    """Checks sizes against those of the base the adapter was made for, and writes them into its configuration.

    Raises:
        ConversionError: they differ.
    """
    hidden, intermediate = projection_shape(blocks_of(model)[0], family_of(model), "up")
    here = [hidden, intermediate, num_blocks]
    if config.base_shape not in (None, here):
        made, got = (f"hidden size {h}, intermediate size {i}, {n} blocks" for h, i, n in (config.base_shape, here))
        raise ConversionError(
            f"the adapter was made for a base with {made}; this one has {got}. Load it on {base_name(config)}"
        )
    config.base_shape = here


def base_name(config: NPTConfig) -> str:
    """The base that an adapter was made for, as a message names it."""
    name = name_of(config.base_model_name_or_path)
    return repr(name) if name else "the base it was made for, of which it has no name"


def check_fingerprint(config: NPTConfig, model: Any, *, embeddings_may_come: bool) -> str | None:
    """Checks the base against the one the adapter was made for, and writes its record into the configuration.

    Args:
        embeddings_may_come: the adapter's file is read next, and may hold the embeddings of a base that was resized.

    Returns:
        what is wrong unless the file brings the embeddings; None where all is right.

    Raises:
        ConversionError: it is another base.
    """
    here = base_record(model)
    if here is None:
        logger.info("the base's weights are not at hand, so whether the adapter was made for them is not checked")
        return None
    made_for = config.base_fingerprint
    other = None if made_for is None else difference(made_for, here)
    if made_for is not None and "inside" not in made_for and here["inside"] is not None:
        logger.warning(
            "the base holds %s adapters at work, and the NPT adapter, of an older npt, does not say whether it was made for "
            "them", ", ".join(here["inside"]["kinds"]),
        )  # fmt: skip
    if other is None or config.allow_other_base:
        config.base_fingerprint = here
        return None
    told = another_base(config, other)
    if (
        embeddings_may_come
        and made_for
        and made_for.get("body")
        and difference(made_for, here, embeddings=False) is None
    ):
        return told
    raise ConversionError(told)


def renew_record(base: Any, config: NPTConfig) -> None:
    """Writes the base as it is now into an adapter's configuration, where its weights are at hand and whole."""
    if is_sharded(base) or any(hasattr(p, "ds_id") for p in base.parameters()):
        return
    config.base_fingerprint = base_record(base) or config.base_fingerprint


def refuse_rows(arguments: Mapping[str, Any]) -> None:
    """Refuses what PEFT lets a forward choose for every row of a batch.

    Raises:
        ConversionError: adapters by row.
    """
    for name in ("adapter_names", "alora_offsets"):
        if arguments.get(name) is not None:
            raise ConversionError(
                f"{name}: the blocks of an NPT model run one adapter for all rows of a batch; choose it with "
                "set_adapter(name), and give each adapter's rows in a call of their own"
            )


def another_base(config: NPTConfig, difference: str) -> str:
    """The message on a base that differs from the adapter's."""
    rows = ((config.base_fingerprint or {}).get("config") or {}).get("vocab_size")
    if difference.startswith("vocab_size is "):
        remedy = (
            f"Load it on {base_name(config)}, after model.resize_token_embeddings({rows}) where the embeddings come with the "
            "adapter"
        )
    elif "inside it" in difference:
        remedy = "Load the other adapters first as they were, or merge or unload them as they were"
    else:
        remedy = f"Load it on {base_name(config)}"
    return (
        f"the adapter was made for another base: {difference}. {remedy}, or set "
        "allow_other_base (NPTConfig.allow_other_base=True, in a run model.allow_other_base=true)"
    )


def check_undecided(config: NPTConfig) -> None:
    """Checks that blocks to be chosen by calibration are calibrated.

    Raises:
        ConversionError: they are exact from the start.
    """
    if config.undecided is not None and not is_calibrated(config.carry, config.gain):
        raise ConversionError(
            f"npt_layers={config.npt_layers!r} chooses blocks by what each one costs, which is nothing with carry="
            f"{config.carry!r} and gain={config.gain!r}; use upper_half, lower_half, all or a list of indices"
        )
