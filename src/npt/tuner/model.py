"""The PEFT method: `NPTConfig` and `NPTModel`, so that an NPT model is used like a LoRA one."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from npt.block.contract import check_contract
from npt.block.families import automatic_count, blocks_of, family_of, resolve_layers
from npt.block.layer import NPTLayer
from npt.common.limits import vocabulary_of
from npt.errors import ConversionError, NPTError
from npt.tuner.before import Before, marks_of, set_marks
from npt.tuner.checks import (
    check_base_shape,
    check_fingerprint,
    check_kind,
    check_name,
    check_name_in,
    check_new,
    check_undecided,
    refuse_rows,
    refuse_unsupported,
    renew_record,
)
from npt.tuner.config import LAYER_NAME, PEFT_TYPE, NPTConfig
from npt.tuner.converted import base_of, npt_layers, take_off
from npt.tuner.state import PREFIX, check_read, check_state, embedding_names, own_state, to_model_names, without_others

logger = logging.getLogger(__name__)


class NPTModel(BaseTuner):
    """Turns the chosen blocks of a causal LM into NPT blocks (see `npt.block.component` for the block).

    The base stays frozen and in eval mode whatever a trainer does: `train()` reaches the components only. Adapters of other
    methods inside the base belong to the base: nothing here switches, trains, saves or deletes them.
    """

    prefix = "npt_"
    tuner_layer_cls = NPTLayer
    active_adapter: str | list[str]
    targeted_module_names: list[str]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Converts a model; an error of any kind leaves it as it was.

        Args:
            model: the causal LM.
            peft_config: {adapter_name: an NPTConfig} where a PeftModel holds the adapter; an NPTConfig where it is put into
                the model directly (PEFT's inject_adapter_in_model). It is copied: the caller's stays as it is.
            adapter_name: "default", or one of several.
            *args: of PEFT's BaseTuner.
            **kwargs: of PEFT's BaseTuner.
        """
        self_contained = not isinstance(peft_config, PeftConfig)
        config = peft_config[adapter_name] if self_contained else peft_config
        # transformers' delete_adapter leaves such behind.
        take_off([layer for layer in npt_layers(model) if not layer.npt_components])
        before, marks = Before(model), marks_of(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        try:
            refuse_unsupported(model)
            check_new(model, config, adapter_name, in_peft_model=self_contained)
            # Else PEFT would take the configurations of other adapters for this method's, and write into them.
            set_marks(model, {})
            self._owns = self_contained
            #: {adapter made from a file: (`_versions` of its start, what is wrong with the base unless the file mends it)}
            self._loading: dict[str, tuple[int, str | None]] = {}
            super().__init__(model, {adapter_name: config}, adapter_name, *args, **kwargs)
            if not self_contained:
                if self._from_file:
                    for layer in npt_layers(model):
                        layer.on_frozen = partial(check_read, [model], adapter_name)
                marks["peft_config"] = {**marks.get("peft_config", {}), **self.peft_config}
            set_marks(model, marks)
        except BaseException:
            before.restore()
            raise
        self._marks, self._trained = before.marks, trained

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attaches an adapter and runs the conversion contract on its blocks; leaves no trace when that fails."""
        before = Before(model)
        targeted = list(self.targeted_module_names)
        try:
            check_name(adapter_name)
            check_kind(self.peft_config[adapter_name])
            self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
            if not self.active_adapters:  # the one before was deleted
                self.active_adapter = adapter_name
            # One draw, whatever is converted: a block's random start does not depend on which other blocks there are.
            self._seed = int(torch.randint(2**31, (), device="cpu"))
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            model.eval()
            check_name_in(model, adapter_name)
            check_contract(model, [layer for layer in npt_layers(model) if id(layer) not in before.layers])
            for parameter, flag in before.flags:
                # What was trained goes on being trained, but for the base of a first adapter.
                parameter.requires_grad = flag and bool(before.layers)
            if self._from_file:
                self._loading[adapter_name] = self._versions(adapter_name), self._wrong
        except BaseException:
            before.restore()
            self.peft_config.pop(adapter_name, None)
            self.targeted_module_names = targeted
            raise

    def _prepare_adapter_config(self, peft_config: NPTConfig, model_config: dict[str, Any]) -> NPTConfig:
        blocks, from_file = blocks_of(self.model), peft_config.target_modules is not None
        check_base_shape(peft_config, self.model, len(blocks))
        wrong = check_fingerprint(peft_config, self.model, embeddings_may_come=self._owns and from_file)
        peft_config.begin_record(self.model.get_input_embeddings().weight.shape[0])
        peft_config.undecided = automatic_count(peft_config.npt_layers, len(blocks))
        check_undecided(peft_config)
        peft_config.npt_layers = resolve_layers(peft_config.npt_layers, len(blocks))
        prefix = family_of(self.model).blocks
        peft_config.target_modules = [f"{prefix}.{i}" for i in peft_config.npt_layers]
        self._from_file, self._wrong = from_file, wrong
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
        if layer is None:
            layer = NPTLayer(target, family_of(self.model), int(target_name))
            layer.is_owned = self._owns
        layer.add_component(adapter_name, seed=self._seed + layer.index, **peft_config.component_options())
        setattr(target, LAYER_NAME, layer)

    # -- what PEFT does to every tuner layer it finds, done to NPT's own -----------------------------------------------

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Its modules. Asked by itself it names NPT's layers, and no other tuner's: PEFT reports a model's status so."""
        asked, own = memo is None, {id(layer) for layer in npt_layers(self.model)}
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not asked or not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                yield name, module
                layer: Any = module._modules.get(LAYER_NAME) if asked else None
                if id(layer) in own:
                    yield f"{name}.{LAYER_NAME}", layer

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Nothing: `inject_adapter` says what is trained."""

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """Turns the NPT blocks' adapters on or off: for the calling thread within PEFT's `disable_adapter()`, else for all.

        A server's thread that asks the original model must not turn the adapter off under the others.
        """
        # PEFT's context manager calls what a user may call for good, and leaves no other trace of which of the two it is.
        in_context = sys._getframe(2).f_code.co_name == "disable_adapter"
        layers: Any = npt_layers(self.model)
        for layer in layers:
            layer.hooks.thread.now.disabled = in_context and not enabled
            if not in_context:
                layer.enable_adapters(enabled)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates one adapter, or several of disjoint blocks.

        Raises:
            ConversionError: there is none of that name, or two of them are for one block; nothing has changed.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ConversionError(f"adapter {unknown[0]!r} does not exist; there are {', '.join(self.peft_config)}")
        layers = npt_layers(self.model)
        for layer in layers:
            layer.check_together(names)
        for layer in layers:
            layer.set_adapter(names, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Says whether adapters are trained."""
        layers: Any = npt_layers(self.model)
        for layer in layers:
            layer.set_requires_grad(adapter_names, requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        layers: Any = npt_layers(self.model)
        for layer in layers:
            if adapter_name in layer.npt_components and autocast_adapter_dtype:
                component = layer.npt_components[adapter_name]
                if any(p.dtype in (torch.float16, torch.bfloat16) for p in component.parameters()):
                    component.to(torch.float32)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around a forward of the PeftModel, which does not hand on what a caller wants for every row."""
        refuse_rows(kwargs)
        yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward."""
        refuse_rows(kwargs)
        return self.model(*args, **kwargs)

    # -- weights ---------------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Returns the adapter's own entries of a model's state: the other adapters inside are the base's."""
        base = base_of(model)
        # PEFT saves the embeddings with the adapter where the vocabulary was resized.
        if (config.base_fingerprint or {}).get("config", {}).get("vocab_size") not in (
            None,
            vocabulary_of(base.config),
        ):
            renew_record(base, config)
        return own_state(state_dict, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Checks an adapter's file against the model. Where it does not fit, blocks converted for it alone are as before.

        Raises:
            CheckpointError: see `check_state`.
            ConversionError: the base differs in its embeddings, and the file does not bring them.
        """
        tuner = model.base_model if isinstance(model, PeftModel) else None
        untouched, wrong = tuner._loading.pop(adapter_name, (None, None)) if tuner is not None else (None, None)
        try:
            check_state(model, adapter_name, without_others(state_dict), config)
            if wrong is not None and not embedding_names(model) <= {
                PREFIX + k.removeprefix(PREFIX) for k in state_dict
            }:
                raise ConversionError(wrong)
        except NPTError:
            if tuner is not None and untouched is not None and untouched == tuner._versions(adapter_name):
                tuner._take_back(adapter_name)
            raise
        return to_model_names(model, adapter_name, without_others(state_dict))

    def _versions(self, adapter_name: str) -> int:
        """A number that changes when a parameter of an adapter does."""
        components = [layer.npt_components[adapter_name] for layer in npt_layers(self.model)
                      if adapter_name in layer.npt_components]  # fmt: skip
        return sum(p._version for component in components for p in component.parameters())

    def _take_back(self, adapter_name: str) -> None:
        if list(self.peft_config) == [adapter_name]:
            self.unload()
            self.peft_config.pop(adapter_name)
        else:
            self.delete_adapter(adapter_name)

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
        """Deletes an adapter from every block; a block without any is the original one again."""
        if adapter_name not in self.peft_config:
            raise ConversionError(f"adapter {adapter_name!r} does not exist; there are {', '.join(self.peft_config)}")
        del self.peft_config[adapter_name]
        layers: Any = npt_layers(self.model)
        for layer in layers:
            layer.delete_adapter(adapter_name)
        take_off([layer for layer in layers if not layer.npt_components])
        remaining = [name for layer in layers for name in layer.active_adapters if name in self.peft_config]
        self.active_adapter = list(dict.fromkeys(remaining))

    # -- what an NPT adapter can't do ------------------------------------------------------------------------------------

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: there is no one weight to merge into."""
        raise ConversionError(
            "an NPT adapter can't be merged: its weight delta depends on the input and differs from token to token. "
            "Keep the adapter, or call unload() to get the original model back"
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses, as `merge_and_unload` does."""
        self.merge_and_unload()

    def unmerge_adapter(self) -> NoReturn:
        """Refuses, as `merge_and_unload` does."""
        self.merge_and_unload()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: a component's tanh and its two matrices make the mean of two adapters no adapter."""
        raise ConversionError(
            "NPT adapters can't be added up with weights: what an adapter does is not linear in its parameters. Adapters of "
            "disjoint blocks are joined by npt.merge_adapters(folders, output), or `npt merge-adapters`"
        )

    def unload(self) -> nn.Module:
        """Takes all NPT parts off and returns the base model, which trains what it trained before."""
        for module in self.model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "func", None) is _checkpoint_in_eval:
                module._gradient_checkpointing_func = function.args[1]  # type: ignore[union-attr, assignment]
        take_off(npt_layers(self.model))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = parameter.requires_grad or name in self._trained
        if not self._owns:
            set_marks(self.model, self._marks)
        return self.model


def _checkpoint_in_eval(module: nn.Module, checkpoint: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' checkpoint function of a block, for which the block leaves training mode.

    The recomputed forward takes the mode of the first one: autograd may run it in a thread of its own, and after other passes.
    """
    layer: NPTLayer | None = getattr(module, LAYER_NAME, None)
    again: Callable[[], AbstractContextManager[None]] = nullcontext if layer is None else layer.hooks.again()

    def run(*args: Any, **kwargs: Any) -> Any:
        before, module.training = module.training, False
        try:
            with again():
                return function(*args, **kwargs)
        finally:
            module.training = before

    return checkpoint(run, *args, **kwargs)


def register() -> None:
    """Makes PEFT know the method. peft 0.21 has no public registration for third parties; a contract test holds this."""
    types: Any = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    for mapping, value in zip(types, (NPTConfig, NPTModel, NPTModel.prefix), strict=True):
        mapping[PEFT_TYPE] = value
