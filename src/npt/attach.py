"""Joins NP components to a decoder block through hooks; the block's own forward is never rewritten.

    tap        on the last module whose output attention adds to the residual: keeps a, returns zeros
    input site on the MLP (or on single projections): z -> z + shift
    values     on gate and up: output + value; on down: output + v_down

All hooks are methods of one `NPTLayer`, a child of the block, registered once and switched by flags: torch.compile
ignores hooks that are added after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from npt.component import INPUT_PROJECTIONS, ComponentSpec, InputValues, NPComponent, WeightDelta
from npt.errors import ConversionError
from npt.families import Family

#: What a hooked block does instead of its adapter; None means the adapter as configured.
BYPASS = "bypass"  # the original block
ZERO = "zero"  # attention and MLP both dropped: the block must be the identity
EXACT = "exact"  # the exact value, no parameters


@dataclass
class BlockRecord:
    """One pass through a block in bypass mode: h, a and the block's output, each (batch, tokens, d)."""

    hidden_states: Tensor
    attention: Tensor
    output: Tensor


Observer = Callable[["NPTLayer", dict[str, WeightDelta]], None]


class NPTLayer(nn.Module, BaseTunerLayer):
    """The neuro-plastic part of one decoder block: per adapter one `NPComponent`, and the hooks that apply it.

    Args:
        block: the decoder block. family: where its pieces are. index: its place in the model, 0-based.
    """

    adapter_layer_names = ("components",)
    other_param_names = ()

    def __init__(self, block: nn.Module, family: Family, index: int):
        super().__init__()
        self.components = nn.ModuleDict()
        self.index, self.family = index, family
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._block = (block,)  # in a tuple, so that the parent is not registered as a child of its child
        self.override: str | None = None
        self.on_block: Callable[[NPTLayer, BlockRecord], None] | None = None
        self.observer: Observer | None = None
        self._attention: Tensor | None = None
        self._residual: Tensor | None = None
        self._values: InputValues | None = None
        weight, bias, self.centered = probe_norm(block.get_submodule(family.norm))
        self._norm = {"weight": weight, "bias": bias}
        self.oracle = NPComponent(self._spec(carry="exact", projections=tuple(family.projections)))
        self._handles = self._register_hooks()

    # -- PEFT's surface ----------------------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The decoder block this layer lives in."""
        return self._block[0]

    @property
    def weight(self) -> Tensor:
        """The down projection's weight: PEFT asks a tuner layer's weight for device and dtype."""
        return self.module("down").weight

    @property
    def bias(self) -> None:
        """None: an NPT layer has no bias of its own."""
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: dW depends on the input."""
        return False

    def add_component(self, adapter_name: str, **options: Any) -> None:
        """Creates the component of an adapter; `options` are fields of `ComponentSpec`."""
        projections = tuple(options.pop("projections"))
        missing = [name for name in projections if name not in self.family.projections and name != "gate"]
        present = tuple(name for name in projections if name in self.family.projections)
        if missing or not present:
            raise ConversionError(
                f"target_projections={list(projections)}: this family's MLP has {', '.join(self.family.projections)} only"
            )
        spec = self._spec(projections=present, **options)
        if spec.rank > spec.hidden_size:
            raise ConversionError(
                f"rank={spec.rank} is larger than the model's hidden size {spec.hidden_size}; use a rank up to that"
            )
        self.components[adapter_name] = NPComponent(spec, self._norm["weight"], self._norm["bias"])

    def _spec(self, **options: Any) -> ComponentSpec:
        hidden, intermediate = linear_shape(self.module("up"))
        return ComponentSpec(hidden, intermediate, centered=self.centered, **options)

    # -- what is active ----------------------------------------------------------------------------------------------

    def module(self, name: str) -> Any:
        """A module of the block by its role: tap, norm, mlp, gate, up or down."""
        return self.get_base_layer().get_submodule(getattr(self.family, name))

    @property
    def active_name(self) -> str | None:
        """The active adapter that has a component in this block."""
        names: Any = self.active_adapters
        return next((name for name in names if name in self.components), None)

    @property
    def component(self) -> NPComponent | None:
        """The active adapter's component; None where it has none in this block."""
        name = self.active_name
        found: Any = None if name is None else self.components[name]
        return found  # type: ignore[no-any-return]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activates one adapter; two at once in one block would each replace attention, so that is an error."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        here = [name for name in names if name in self.components]
        if len(here) > 1:
            raise ConversionError(f"adapters {here} are both for block {self.index}; activate one of them at a time")
        super().set_adapter(names, inference_mode=inference_mode)

    def active(self) -> NPComponent | None:
        """The component to apply now, or None for the original block."""
        if self.override in (EXACT, ZERO):
            return self.oracle
        if self.override == BYPASS or self._disable_adapters:
            return None
        return self.component

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _register_hooks(self) -> list[Any]:
        projections = {name: self.module(name) for name in self.family.projections}
        handles = [
            self.module("tap").register_forward_hook(self._tap),
            self.module("norm").register_forward_pre_hook(self._keep_residual),
            self.module("mlp").register_forward_pre_hook(self._shift_mlp),
            projections["down"].register_forward_hook(self._add_down),
            self.get_base_layer().register_forward_hook(self._finish, with_kwargs=True, always_call=True),
        ]
        for name, shift, add in (
            ("gate", self._shift_gate, self._add_gate),
            ("up", self._shift_up, self._add_up),
        ):
            if name in projections:
                handles.append(projections[name].register_forward_pre_hook(shift))
                handles.append(projections[name].register_forward_hook(add))
        return handles

    def detach(self) -> None:
        """Takes the hooks off; the block is the original one again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _tap(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        component = self.active()
        if component is None:
            if self.on_block is not None:
                self._attention = output
            return None
        self._attention = output
        return torch.zeros_like(output)

    def _keep_residual(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        component = self.active()
        if component is not None and component.spec.carry == "exact":
            self._residual = args[0]

    def _shift_mlp(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        component = self.active()
        if component is None or self._attention is None or self.override == ZERO:
            return None
        self._values = self._input_values(component, args[0])
        if self._values.shift is None or not self._shares_input(component):
            return None
        return (args[0] + self._values.shift, *args[1:])

    def _shift_gate(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return self._shift_projection("gate", args)

    def _shift_up(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return self._shift_projection("up", args)

    def _shift_projection(self, name: str, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        component, values = self.active(), self._values
        if component is None or values is None or values.shift is None or name not in component.spec.projections:
            return None
        if self._shares_input(component):
            return None
        return (args[0] + values.shift, *args[1:])

    def _add_gate(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self._add_value("gate", output)

    def _add_up(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self._add_value("up", output)

    def _add_value(self, name: str, output: Tensor) -> Tensor | None:
        value = None if self._values is None else self._values.values.get(name)
        return None if value is None else output + value

    def _add_down(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.override == ZERO:
            return torch.zeros_like(output)
        component, values, attention = self.active(), self._values, self._attention
        if component is None or values is None or attention is None:
            return None
        # Let go here, the last use: a recomputed forward under gradient checkpointing never reaches the block's hook.
        self._attention = self._values = self._residual = None
        if self.observer is not None:
            self.observer(self, component.weight_deltas(attention, args[0], "down", {}))
        value = component(attention, args[0], "down", modulation=values.modulation)
        return None if value is None else output + value

    def _finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hands a bypassed pass to `on_block`; always lets go of what was kept, also when a forward died half-way."""
        attention, self._attention = self._attention, None
        self._values = self._residual = None
        if self.on_block is None or attention is None or output is None or self.active() is not None:
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.on_block(self, BlockRecord(hidden_states, attention, first_tensor(output)))

    def _shares_input(self, component: NPComponent) -> bool:
        """Whether one shift of the MLP's input serves every projection that reads it."""
        return all(name in component.spec.projections for name in INPUT_PROJECTIONS if name in self.family.projections)

    def _input_values(self, component: NPComponent, z: Tensor) -> InputValues:
        attention: Any = self._attention
        exact_input = self._exact_input() if component.spec.carry == "exact" else None
        if self.observer is not None:
            names = component.spec.input_projections
            products = {name: linear_product(self.module(name)) for name in names}
            self.observer(self, component.weight_deltas(attention, z, "input", products, exact_input))
        values: InputValues = component(attention, z, "input", exact_input=exact_input)
        return values

    def _exact_input(self) -> Tensor:
        """Norm2(h + a). `forward` is called as a function: its hooks belong to the block's own pass."""
        if self._residual is None or self._attention is None:
            raise ConversionError(f"block {self.index}: the MLP ran before its norm, so carry 'exact' has no h to read")
        output: Tensor = self.module("norm").forward(self._residual + self._attention)
        return output

    # -- a block on its own --------------------------------------------------------------------------------------------

    def update_from(self, hidden_states: Tensor, attention: Tensor) -> Tensor:
        """The NPT block's update y - h from given h and a, (..., d): one norm and one MLP, no attention."""
        self._attention = attention
        try:
            z = self.module("norm")(hidden_states)
            update: Tensor = self.module("mlp")(z)
        finally:
            self._attention = self._values = self._residual = None
        return update


def first_tensor(output: Any) -> Tensor:
    """A block's hidden states: its output, or the first entry of the tuple it returns."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def linear_shape(module: Any) -> tuple[int, int]:
    """(in_features, out_features) of a Linear, a Conv1D or a quantised linear."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    if hasattr(module, "nf"):  # transformers' Conv1D keeps its weight as (in, out)
        return int(module.nx), int(module.nf)
    raise ConversionError(f"{type(module).__name__} is neither Linear nor Conv1D; NPT can't read its sizes")


def linear_product(module: Any) -> Callable[[Tensor], Tensor]:
    """x -> W x without bias. The linear is called, never its raw weight, so that quantised and offloaded ones work too."""
    if getattr(module, "bias", None) is None:
        return module.forward  # type: ignore[no-any-return]
    return lambda x: module.forward(x) - module.forward(torch.zeros_like(x[..., :1, :]))


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings them when it keeps them elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "execution_device", None) is not None:
            return torch.device(part.execution_device)
    return next(module.parameters()).device


def probe_norm(norm: Any) -> tuple[Tensor, Tensor | None, bool]:
    """(weight (d,), bias (d,) or None, whether it centres) of a norm, measured by calling it.

    Two inputs x and -x of unit variance and zero mean, scaled up so that the norm's epsilon vanishes, give
    weight = (f(x) - f(-x)) / 2x and bias = (f(x) + f(-x)) / 2, whatever the class calls them.
    """
    parameter = next(iter(norm.parameters()), None)
    if parameter is None:
        raise ConversionError(f"{type(norm).__name__} has no weight, so its size is unknown; register its family first")
    d, scale = parameter.shape[-1], 4096.0
    sign = torch.ones(d, device=parameter.device, dtype=parameter.dtype)
    sign[1::2] = -1
    with torch.no_grad():
        plus, minus = norm.forward((sign * scale)[None])[0], norm.forward((-sign * scale)[None])[0]
        constant = norm.forward(torch.full_like(sign, scale)[None])[0]
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    bias = (plus.to(dtype) + minus.to(dtype)) / 2
    weight = (plus.to(dtype) - minus.to(dtype)) / 2 * sign
    if parameter.is_meta:
        return weight, None if getattr(norm, "bias", None) is None else bias, isinstance(norm, nn.LayerNorm)
    centered = bool((constant.to(dtype) - bias).abs().max() < weight.abs().max() / 2)
    return weight, bias if bool(bias.any()) else None, centered


@contextmanager
def layer_mode(layers: list[NPTLayer], **flags: Any) -> Iterator[None]:
    """Sets `override`, `on_block` or `observer` on layers for the length of a block, and puts them back."""
    before = [{name: getattr(layer, name) for name in flags} for layer in layers]
    try:
        for layer in layers:
            for name, value in flags.items():
                setattr(layer, name, value)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            for name, value in old.items():
                setattr(layer, name, value)
