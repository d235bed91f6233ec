"""The PEFT method: `NPTConfig` and `NPTModel`, so that an NPT model is used like a LoRA one."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from npt.block import component as maths
from npt.block.component import WeightDelta
from npt.block.contract import check_contract
from npt.block.families import blocks_of, family_of, resolve_layers
from npt.block.layer import NPTLayer, layer_mode
from npt.block.probing import execution_device, projection_shape
from npt.common.fingerprint import base_record, difference
from npt.errors import ConversionError
from npt.tuner.card import write_model_card

logger = logging.getLogger(__name__)


class Method(str, Enum):
    """Our name among PEFT's methods; an enum, because transformers and TRL ask a config's `peft_type` for its `.value`."""

    NPT = "NPT"
    __str__ = str.__str__


PEFT_TYPE = Method.NPT
#: The attribute of a decoder block that holds its NPTLayer. The prefix "npt_" stands in `NPTLayer.npt_components` alone:
#: PEFT and transformers put the adapter's name right after the word that begins with it.
LAYER_NAME = "neuroplastic"


#: Of an adapter's files. An adapter of an older format is read for ever (tests/fixtures/adapters).
FORMAT_VERSION = 1

#: The fields a person chooses; the `model` section of a run configuration has them under the same names.
OPTIONS = ("npt_layers", "rank", "modulation_scale", "key", "carry", "gain", "low_rank_at", "target_projections")


@dataclass
class NPTConfig(PeftConfig):
    """Which blocks become neuro-plastic, and how their weight delta is generated.

    Args:
        npt_layers: "upper_half" (n//2 ... n-1), "lower_half", "all", or indices (negatives from the end).
        rank: columns of A; 0 for no low-rank part. modulation_scale: s in s tanh(a A).
        key: "input" (least norm), "tied" (the low-rank part reads z through A) or "learned".
        carry: "none", "diagonal" or "exact" (no parameters: the oracle, reads h). gain: "none", "norm" (reads the
            attention output alone), "overlap" (also its agreement with the token's own normalised state) or "state"
            (the norm's own formula, with 1 / rms(h) estimated from that state).
        low_rank_at: "input" or "projection". target_projections: subset of gate, up, down; a name the family does not
            have is an error, except gate, which plain MLPs lack by nature.
        target_modules: filled in by npt with the converted blocks' names; leave it alone.
        base_shape, base_fingerprint: filled in by npt: [hidden size, intermediate size, number of blocks] of the base it was
            made for, and what else it is recognised by (`npt.common.fingerprint.base_record`).
        allow_other_base: load it on another base of the same sizes all the same; it is never saved as true.
        format_version: of the adapter's files; `FORMAT_VERSION` is written.
    """

    npt_layers: str | list[int] = "upper_half"
    rank: int = 16
    modulation_scale: float = 1.0
    key: str = "input"
    carry: str = "diagonal"
    gain: str = "state"
    low_rank_at: str = "input"
    target_projections: list[str] = field(default_factory=lambda: ["gate", "up", "down"])
    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    base_shape: list[int] | None = None
    base_fingerprint: dict[str, Any] | None = None
    allow_other_base: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Validates everything that can be without the model.

        Raises:
            ConversionError: names every wrong option, its value and what is allowed.
        """
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.task_type = self.task_type or "CAUSAL_LM"  # type: ignore[has-type]
        problems = []
        if not isinstance(self.format_version, int) or self.format_version > FORMAT_VERSION:
            raise ConversionError(
                f"format_version={self.format_version!r}: the adapter was written by a newer npt, this one reads up to "
                f"{FORMAT_VERSION}; upgrade with pip install -U npt"
            )
        if not isinstance(self.base_fingerprint, dict | None):
            problems.append(
                f"base_fingerprint={self.base_fingerprint!r}: npt writes it itself; restore the adapter's file"
            )
        for name, allowed in (
            ("key", maths.KEYS),
            ("carry", maths.CARRIES),
            ("gain", maths.GAINS),
            ("low_rank_at", maths.LOW_RANK_SITES),
        ):
            if getattr(self, name) not in allowed:
                problems.append(f"{name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 0:
            problems.append(f"rank={self.rank!r}: use a whole number from 0 up")
        unknown = [name for name in self.target_projections if name not in maths.PROJECTIONS]
        if unknown or not self.target_projections:
            problems.append(
                f"target_projections={self.target_projections!r}: use some of {', '.join(maths.PROJECTIONS)}"
            )
        if self.key == "tied" and "down" in self.target_projections and self.rank > 0 and self.carry != "exact":
            problems.append(
                "key='tied' with target_projections including 'down': A has as many rows as the hidden size, the down "
                "projection's input is wider; use target_projections=['gate', 'up'] or key='input'"
            )
        if problems:
            raise ConversionError("; ".join(problems))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json, and the model card beside it unless a person's own is there."""
        allowed, self.allow_other_base = self.allow_other_base, False
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.allow_other_base = allowed
        write_model_card(save_directory, self)

    def component_options(self) -> dict[str, Any]:
        """The fields of `ComponentSpec` this config fixes."""
        options = {name: getattr(self, name) for name in OPTIONS}
        del options["npt_layers"]
        return {"projections": tuple(options.pop("target_projections")), **options}

    @classmethod
    def from_options(cls, source: Any) -> NPTConfig:
        """A new adapter's configuration from anything with the fields `OPTIONS`."""
        return cls(**copy.deepcopy({name: getattr(source, name) for name in OPTIONS}))


class NPTModel(BaseTuner):
    """Turns the chosen blocks of a causal LM into NPT blocks (see `npt.block.component` for the block).

    The base stays frozen and in eval mode whatever a trainer does: `train()` reaches the components only.
    """

    prefix = "npt_"
    tuner_layer_cls = NPTLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attaches an adapter and runs the conversion contract on its blocks; leaves no trace when that fails."""
        if re.fullmatch(r"[\w][\w.+ -]*", adapter_name) is None:
            raise ConversionError(
                f"adapter name {adapter_name!r}: use letters, digits and _ - + only; folders are named so"
            )
        refuse_unsupported(model)
        before = {id(layer) for layer in npt_layers(model)}
        # One draw, whatever is converted: a block's random start does not depend on which other blocks there are.
        self._seed = int(torch.randint(2**31, (), device="cpu"))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        model.eval()
        layers = [layer for layer in npt_layers(model) if id(layer) not in before]
        try:
            check_contract(model, layers)
        except ConversionError:
            self._remove(layers)
            raise

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if not isinstance(config, NPTConfig):
            raise ConversionError(f"{type(config).__name__} can't be added to an NPT model; load it with NPTConfig")

    def _prepare_adapter_config(self, peft_config: NPTConfig, model_config: dict[str, Any]) -> NPTConfig:
        blocks = blocks_of(self.model)
        _check_base_shape(peft_config, self.model, len(blocks))
        _check_fingerprint(peft_config, self.model)
        peft_config.npt_layers = resolve_layers(peft_config.npt_layers, len(blocks))
        prefix = family_of(self.model).blocks
        peft_config.target_modules = [f"{prefix}.{i}" for i in peft_config.npt_layers]
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: NPTConfig, key: str) -> bool:
        return key in (peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: NPTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer: Any = getattr(target, LAYER_NAME, None)
        is_new = layer is None
        if is_new:
            layer = NPTLayer(target, family_of(self.model), int(target_name))
        try:
            layer.add_component(adapter_name, seed=self._seed + layer.index, **peft_config.component_options())
        except ConversionError:
            if is_new:
                layer.detach()
            raise
        if is_new:
            setattr(target, LAYER_NAME, layer)

    def train(self, mode: bool = True) -> NPTModel:
        """Puts the components in training mode; the base never leaves eval mode (dropout stays off).

        A block under gradient checkpointing carries the flag itself, since transformers checkpoints in training only; it
        drops the flag inside its forward, where some families read it for dropout.
        """
        self.training = mode
        self.model.eval()
        for layer in npt_layers(self.model):
            layer.train(mode)
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = mode
                function = getattr(module, "_gradient_checkpointing_func", None)
                if function is not None and getattr(function, "func", None) is not _checkpoint_in_eval:
                    module._gradient_checkpointing_func = partial(_checkpoint_in_eval, module, function)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter from every block."""
        if adapter_name not in self.peft_config:
            raise ConversionError(f"adapter {adapter_name!r} does not exist; there are {', '.join(self.peft_config)}")
        del self.peft_config[adapter_name]
        layers: Any = npt_layers(self.model)
        for layer in layers:
            layer.delete_adapter(adapter_name)
        remaining = [name for layer in layers for name in layer.active_adapters if name in self.peft_config]
        self.active_adapter = list(dict.fromkeys(remaining))

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuses: there is no one weight to merge into."""
        raise ConversionError(
            "an NPT adapter can't be merged: its weight delta depends on the input and differs from token to token. "
            "Keep the adapter, or call unload() to get the original model back"
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuses, as `merge_and_unload` does."""
        self.merge_and_unload()

    def unload(self) -> nn.Module:
        """Takes all NPT parts off and returns the base model."""
        for module in self.model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "func", None) is _checkpoint_in_eval:
                module._gradient_checkpointing_func = function.args[1]  # type: ignore[union-attr, assignment]
        self._remove(npt_layers(self.model))
        return self.model

    def _remove(self, layers: Sequence[NPTLayer]) -> None:
        for layer in layers:
            layer.detach()
            delattr(layer.get_base_layer(), LAYER_NAME)


def _checkpoint_in_eval(module: nn.Module, checkpoint: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' checkpoint function of a block, for which the block leaves training mode."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before, module.training = module.training, False
        try:
            return function(*args, **kwargs)
        finally:
            module.training = before

    return checkpoint(run, *args, **kwargs)


def _check_base_shape(config: NPTConfig, model: nn.Module, num_blocks: int) -> None:
    hidden, intermediate = projection_shape(blocks_of(model)[0], family_of(model), "up")
    here = [hidden, intermediate, num_blocks]
    if config.base_shape not in (None, here):
        made, got = (f"hidden size {h}, intermediate size {i}, {n} blocks" for h, i, n in (config.base_shape, here))
        raise ConversionError(
            f"the adapter was made for a base with {made}; this one has {got}. Load it on {config.base_model_name_or_path!r}"
        )
    config.base_shape = here


def _check_fingerprint(config: NPTConfig, model: Any) -> None:
    here = base_record(model)
    if here is None:
        logger.info("the base's weights are not at hand, so whether the adapter was made for them is not checked")
        return
    other = None if config.base_fingerprint is None else difference(config.base_fingerprint, here)
    if other is not None and not config.allow_other_base:
        raise ConversionError(
            f"the adapter was made for another base: {other}. Load it on {config.base_model_name_or_path!r}, or set "
            "allow_other_base (NPTConfig.allow_other_base=True, in a run model.allow_other_base=true)"
        )
    config.base_fingerprint = here


def npt_layers(model: nn.Module) -> list[NPTLayer]:
    """The NPT layers of a model, in depth order; empty for an unconverted one."""
    return sorted((m for m in model.modules() if isinstance(m, NPTLayer)), key=lambda layer: layer.index)


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


def adapter_config(model: Any) -> NPTConfig:
    """The active adapter's config."""
    config: NPTConfig = model.peft_config[active_layers(model)[0].active_name]
    return config


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


def register() -> None:
    """Makes PEFT know the method. peft 0.21 has no public registration for third parties; a contract test holds this."""
    types: Any = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    for mapping, value in zip(types, (NPTConfig, NPTModel, NPTModel.prefix), strict=True):
        mapping[PEFT_TYPE] = value


@torch.no_grad()
def weight_delta(
    model: Any, input_ids: torch.Tensor, layer: int, token: tuple[int, int], attention_mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """dW of one token in one converted block, formed: {projection: (out, in)}, for inspection and permanent updates.

    Args:
        input_ids: (batch, tokens). layer: the block's index. token: (row, position), negatives from the end.

    Raises:
        ConversionError: the block is not converted.
    """
    layers = {found.index: found for found in active_layers(model)}
    if layer not in layers:
        raise ConversionError(f"layer={layer} is not a converted block; use one of {sorted(layers)}")
    matrices: dict[str, torch.Tensor] = {}

    def see(_: NPTLayer, deltas: dict[str, WeightDelta]) -> None:
        matrices.update({name: delta.matrix(*token) for name, delta in deltas.items()})

    with layer_mode([layers[layer]], observer=see):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return matrices


def component_ids(model: nn.Module) -> set[int]:
    """The `id` of every parameter of a component, of any adapter."""
    return {id(p) for layer in npt_layers(model) for p in layer.parameters()}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(parameters of the active adapter, parameters of the base)."""
    own = component_ids(model)
    active = sum(p.numel() for layer in npt_layers(model) if layer.component for p in layer.component.parameters())
    base = sum(p.numel() for p in model.parameters() if id(p) not in own)
    return active, base


def run_backbone(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states (batch, tokens, d) of {"input_ids", "attention_mask"}, without the language-model head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(base, base.base_model_prefix, base)
    output = decoder(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block; the mode it was in comes back, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def device_of(model: nn.Module) -> torch.device:
    """The device inputs go to: that of the input embedding."""
    return execution_device(model.get_input_embeddings())  # type: ignore[operator]
