"""Questions to a converted model: its active layers, its own parameters, its last hidden states, one token's weight delta."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn

from npt.block.families import decoder_of
from npt.block.layer import NPTLayer
from npt.block.modes import Mode, running_as, watching_deltas
from npt.block.probing import execution_device
from npt.block.weight_delta import WeightDelta
from npt.common.limits import check_ids, check_length, context_of
from npt.errors import ConversionError
from npt.tuner.config import LAYER_NAME, NPTConfig

if TYPE_CHECKING:
    from npt.data.seen import TextRecord

    class ConvertedModel(nn.Module):
        """A PEFT model with an NPT adapter: the attributes npt asks of it, which peft does not type."""

        config: Any
        dtype: torch.dtype
        device: torch.device
        peft_config: dict[str, NPTConfig]

        def get_base_model(self) -> Any: ...
        def get_output_embeddings(self) -> Any: ...
        def get_input_embeddings(self) -> nn.Module: ...
        def disable_adapter(self) -> AbstractContextManager[None]: ...
        def save_pretrained(self, folder: str, **kwargs: Any) -> None: ...

else:
    ConvertedModel = PeftModel


def npt_layers(model: nn.Module) -> list[NPTLayer]:
    """The NPT layers of a model, in depth order; empty for an unconverted one."""
    found = (module._modules.get(LAYER_NAME) for module in model.modules())  # they hide, see NPTLayer.named_modules
    return sorted((m for m in found if isinstance(m, NPTLayer)), key=lambda layer: layer.index)


def take_off(layers: Sequence[NPTLayer]) -> None:
    """Makes NPT blocks the original ones again."""
    for layer in layers:
        layer.detach()
        delattr(layer.get_base_layer(), LAYER_NAME)


def active_layers(model: nn.Module) -> list[NPTLayer]:
    """The NPT layers whose active adapter has a component.

    Raises:
        ConversionError: there is none.
    """
    layers = [layer for layer in npt_layers(model) if layer.component is not None]
    if not layers:
        raise ConversionError(
            f"{type(model).__name__} has no active NPT adapter; convert it first: get_peft_model(model, NPTConfig(...))"
        )
    return layers


def keep_blocks(model: ConvertedModel, blocks: Collection[int]) -> None:
    """Makes the active adapter's other blocks the original ones again, and its configuration one of these blocks."""
    config = adapter_config(model)
    for layer in active_layers(model):
        if layer.index not in blocks:
            # PEFT's delete_adapter would activate another adapter of the block in its place.
            del layer.npt_components[layer.active_name or ""]
    take_off([layer for layer in npt_layers(model) if not layer.npt_components])
    kept = sorted(blocks)
    dropped = {name for name in config.target_modules or () if int(name.rpartition(".")[2]) not in blocks}
    config.npt_layers, config.undecided = kept, None
    config.target_modules = [name for name in config.target_modules or () if name not in dropped]
    targeted = getattr(getattr(model, "base_model", None), "targeted_module_names", None)
    if targeted is not None:
        targeted[:] = [name for name in targeted if name not in dropped]


def chosen_layers(model: ConvertedModel, blocks: Collection[int] | None) -> list[NPTLayer]:
    """The active layers of some blocks, in the model's order; all of them for None.

    Raises:
        ConversionError: a block that is not converted.
    """
    layers = active_layers(model)
    if blocks is None:
        return layers
    converted = [layer.index for layer in layers]
    if missing := sorted(set(blocks) - set(converted)):
        raise ConversionError(f"blocks={list(blocks)}: {missing} are not converted; choose from {converted}")
    return [layer for layer in layers if layer.index in blocks]


def adapter_config(model: ConvertedModel) -> NPTConfig:
    """The active adapter's config."""
    return model.peft_config[active_layers(model)[0].active_name or ""]


def as_original(model: Any) -> AbstractContextManager[None]:
    """Runs a PEFT model as its base within a `with` block, whatever method its adapter is of.

    Raises:
        ConversionError: the model has neither an active NPT adapter nor one of another method.
    """
    other = isinstance(model, PeftModel) and not npt_layers(model)
    return model.disable_adapter() if other else running_as(active_layers(model), Mode.ORIGINAL)


def text_record_of(model: Any) -> TextRecord | None:
    """The record of the text that the active NPT adapter was made with; None for an adapter of another method."""
    return adapter_config(model).text_record if npt_layers(model) else None


def base_of(model: Any) -> Any:
    """The causal LM: what a PeftModel holds, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def context_length_of(model: ConvertedModel) -> int | None:
    """The number of positions that the model was made for; None where its configuration does not say."""
    return context_of(model.config)


def check_batch(model: ConvertedModel, ids: torch.Tensor, named: str) -> None:
    """Checks that token ids (rows, tokens) have rows in the model's embedding, and its context places for them.

    Raises:
        DataError: not so; transformers would end in an IndexError, or go on without a word where positions are computed.
    """
    check_length(model.config, ids.shape[-1], f"{named}: a length")
    check_ids(ids, vocabulary_size(model), named)


def vocabulary_size(model: ConvertedModel) -> int:
    """The rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


@torch.no_grad()
def weight_delta(
    model: ConvertedModel,
    input_ids: torch.Tensor,
    layer: int,
    token: tuple[int, int],
    attention_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Forms dW of one token in one converted block, for inspection and permanent updates: {projection: (out, in)}.

    Args:
        model: a PEFT model with an active NPT adapter.
        input_ids: (batch, tokens).
        layer: the block's index.
        token: (row, position), negatives from the end.
        attention_mask: (batch, tokens), 0 for padding; None for none.

    Raises:
        ConversionError: the block is not converted.
    """
    layers = {found.index: found for found in active_layers(model)}
    if layer not in layers:
        raise ConversionError(f"layer={layer} is not a converted block; use one of {sorted(layers)}")
    matrices: dict[str, torch.Tensor] = {}

    def see(_: NPTLayer, deltas: dict[str, WeightDelta]) -> None:
        matrices.update({name: delta.matrix(*token) for name, delta in deltas.items()})

    with watching_deltas([layers[layer]], see):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return matrices


def own_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all components, of every adapter. A set of parameters compares them by identity."""
    return {p for layer in npt_layers(model) for p in layer.parameters()}


def component_ids(model: nn.Module) -> set[int]:
    """The `id` of each of `own_parameters`."""
    return {id(p) for p in own_parameters(model)}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(parameters of the active adapter, parameters of the base)."""
    own = own_parameters(model)
    active = sum(p.numel() for layer in npt_layers(model) if layer.component for p in layer.component.parameters())
    base = sum(p.numel() for p in model.parameters() if p not in own)
    return active, base


def run_backbone(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states (batch, tokens, d) of {"input_ids", "attention_mask"}, without the language-model head."""
    base = base_of(model)
    output = decoder_of(base)(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode within a `with` block, and back into the mode before, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def device_of(model: nn.Module) -> torch.device:
    """The device that inputs go to: the one on which the input embedding computes."""
    return execution_device(model.get_input_embeddings())  # type: ignore[operator]


def hidden_dtype(model: nn.Module) -> torch.dtype:
    """The format of a model's hidden states, quantised weights or not: that of the input embedding."""
    found: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator,union-attr]
    return found
