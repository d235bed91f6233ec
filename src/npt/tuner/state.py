"""The weights of one NPT adapter under their names in its file: from a model, and checked before they go into one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn

from npt.block.layer import NPTLayer
from npt.common.display import blocks_text, one_line
from npt.common.inside import COMPONENTS
from npt.errors import CheckpointError
from npt.tuner.config import LAYER_NAME
from npt.tuner.converted import base_of, npt_layers, take_off

logger = logging.getLogger(__name__)

#: What PEFT puts before the name of a module in a file.
PREFIX = "base_model.model."
_MARK = f".{LAYER_NAME}.{COMPONENTS}."
#: Names given in one message.
_SHOWN = 3


def own_state(state: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """The entries of a model's state that are an NPT adapter's, under their names in the model."""
    return {key: value for key, value in state.items() if f"{_MARK}{adapter}." in key}


def own_names(model: nn.Module, adapter: str) -> dict[str, tuple[str, Tensor]]:
    """{name in a file: (name in the model, parameter)} of an adapter."""
    names: dict[str, tuple[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if f"{_MARK}{adapter}." in name:
            plain = name.replace("_orig_mod.", "").replace(f"{_MARK}{adapter}.", _MARK)
            names[PREFIX + plain.removeprefix(PREFIX)] = name, parameter
    return names


def to_model_names(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's file for `load_state_dict` of a model; other entries keep their names."""
    names = {PREFIX + key.removeprefix(PREFIX): value for key, value in state.items()}
    own = own_names(model, adapter)
    return {own[key][0] if key in own else key: value for key, value in names.items()}


def without_others(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's file without tensors of other methods: npt 0.1.0 saved those of adapters inside the base as well."""
    prefixes = tuple(prefix for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix not in (None, "", "npt_"))
    others = [key for key in state if any(word.startswith(prefixes) for word in key.split("."))]
    if others:
        logger.warning(
            "the adapter's file also holds %d tensors of an adapter inside its base, which are not loaded, first %s",
            len(others), one_line(others[0], 200),
        )  # fmt: skip
    return {key: value for key, value in state.items() if key not in others}


def check_state(model: nn.Module, adapter: str, state: Mapping[str, Tensor], config: Any) -> None:
    """Checks that a file holds an adapter's weights, all of them, in their shapes and finite, and nothing else but embeddings.

    Raises:
        CheckpointError: names what is missing, unknown or of another shape. PEFT would leave it at its random start.
    """
    given = {PREFIX + key.removeprefix(PREFIX): value for key, value in state.items()}
    as_read = {PREFIX + key.removeprefix(PREFIX): key for key in state}
    own = own_names(model, adapter)
    allowed = embedding_names(model)
    wrong = [
        f"size mismatch for {key}: {list(value.shape)} in the file, {list(own[key][1].shape)} wanted"
        for key, value in given.items()
        if key in own and value.shape != own[key][1].shape
    ]
    problems = [
        _listed("missing", sorted(set(own) - set(given))),
        _listed("unknown", sorted(as_read[key] for key in set(given) - set(own) - allowed)),
        "; ".join(wrong[:_SHOWN]),
    ]
    if any(problems):
        raise CheckpointError(
            f"the adapter's weights ({blocks_text(config.npt_layers)}) do not fit its config or this base: "
            f"{'; '.join(problem for problem in problems if problem)}; use the base it was made from, and the adapter's files "
            "as they were saved"
        )
    broken = next((key for key in sorted(given) if not given[key].isfinite().all()), None)
    if broken is not None:
        raise CheckpointError(
            f"the weights hold NaN or infinity in {one_line(broken, 200)}; take an earlier checkpoint"
        )


def check_read(model: list[Any], adapter: str, layer: NPTLayer) -> None:
    """Checks that transformers' load_adapter found all of a block's weights in the adapter's file; it only reports the others.

    Args:
        model: in a list, which copies of the model share with their layers.

    Raises:
        CheckpointError: it did not; the adapter is taken off.
    """
    component, layer.on_frozen = layer._components().get(adapter), None
    parameters = {} if component is None else dict(component.named_parameters())
    unread = [name for name, p in parameters.items() if not getattr(p, "_is_hf_initialized", False)]
    if not unread:
        return
    base, layers = model[0], npt_layers(model[0])
    others: Any = layers
    for other in others:
        other.delete_adapter(adapter)
    take_off([other for other in layers if not other.npt_components])
    base.peft_config.pop(adapter)
    if not base.peft_config:
        del base.peft_config
        base._hf_peft_config_loaded = False
    raise CheckpointError(
        f"the file of adapter {adapter!r} holds no {', '.join(unread[:_SHOWN])} of block {layer.index}: its weights are "
        "missing or have other names; use the adapter's files as they were saved"
    )


def embedding_names(model: Any) -> set[str]:
    """The names, in a file, of the embedding's and the head's weights: PEFT saves them where the vocabulary was resized."""
    base = base_of(model)
    ends = {id(end) for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None}
    return {
        f"{PREFIX}{path}.{name}"
        for path, module in base.named_modules()
        if id(module) in ends
        for name in module.state_dict()
    }


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join(one_line(name, 200) for name in names[:_SHOWN])}{more}"
