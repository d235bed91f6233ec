"""The PEFT method: `NPTConfig` and `NPTModel`, so that an NPT model is used like a LoRA one."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from npt.block.contract import check_contract
from npt.block.families import blocks_of, family_of, resolve_layers
from npt.block.layer import NPTLayer
from npt.block.probing import projection_shape
from npt.common.fingerprint import base_record, difference
from npt.errors import ConversionError
from npt.tuner.config import LAYER_NAME, PEFT_TYPE, NPTConfig
from npt.tuner.converted import npt_layers

logger = logging.getLogger(__name__)


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
        peft_config.begin_record(self.model.get_input_embeddings().weight.shape[0])
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
