"""A model as it was before a conversion, to put it back."""

from __future__ import annotations

from typing import Any

from torch import nn

from npt.tuner.converted import npt_layers, take_off

#: Where a module keeps its hooks.
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip
#: Attributes that PEFT and transformers set on a model with adapters.
_MARKS = ("peft_config", "_hf_peft_config_loaded")


class Before:
    """Remembers hooks, NPT layers, adapters, flags of gradients and of training, and PEFT's marks on a model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.hooks = [(module, {name: set(getattr(module, name)) for name in _HOOKS}) for module in model.modules()]
        self.training = [(module, module.training) for module in model.modules()]
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.layers = {
            id(layer): (set(layer.npt_components), layer._active_adapter, layer._disable_adapters)
            for layer in npt_layers(model)
        }
        self.marks = marks_of(model)
        # transformers' add_adapter sets its mark before it asks PEFT for anything.
        if "peft_config" not in self.marks and self.marks.get("_hf_peft_config_loaded"):
            del self.marks["_hf_peft_config_loaded"]

    def restore(self) -> None:
        """Puts everything back."""
        layers = npt_layers(self.model)
        take_off([layer for layer in layers if id(layer) not in self.layers])
        for layer in layers:
            layer.detach()
        for module, kept in self.hooks:  # also those of a layer whose making was cut short
            for name, keys in kept.items():
                hooks = getattr(module, name)
                for key in set(hooks) - keys:
                    del hooks[key]
        for layer in layers:
            if id(layer) in self.layers:
                components, active, disabled = self.layers[id(layer)]
                for name in set(layer.npt_components) - components:
                    del layer.npt_components[name]
                layer._active_adapter, layer._disable_adapters = active, disabled
                layer.hooks.attach()
        for parameter, flag in self.flags:
            parameter.requires_grad = flag
        for module, training in self.training:
            module.training = training
        set_marks(self.model, self.marks)


def marks_of(model: nn.Module) -> dict[str, Any]:
    """The attributes of `_MARKS` that the model itself has."""
    return {name: vars(model)[name] for name in _MARKS if name in vars(model)}


def set_marks(model: nn.Module, marks: dict[str, Any]) -> None:
    """Gives the model these of `_MARKS` and no other."""
    for name in _MARKS:
        if name in marks:
            setattr(model, name, marks[name])
        elif name in vars(model):
            delattr(model, name)
