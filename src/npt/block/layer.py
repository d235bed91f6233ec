"""Joins NP components to a decoder block through hooks; the block's own forward is never rewritten.

    tap        on the last module whose output attention adds to the residual: keeps a, returns zeros
    input site on the MLP (or on single projections): z -> z + shift
    values     on gate and up: output + value; on down (or on the norm after it): output + v_down

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

from npt.block.component import INPUT_PROJECTIONS, ComponentSpec, InputValues, NPComponent, WeightDelta
from npt.block.families import Family
from npt.block.probing import find, linear_product, probe_norm, projection_shape
from npt.common.processes import from_first, loads_once
from npt.errors import ConversionError

#: What a hooked block does instead of its adapter; None means the adapter as configured.
BYPASS = "bypass"  # the original block
ZERO = "zero"  # attention and MLP both dropped: the block must be the identity
EXACT = "exact"  # the exact value, no parameters


@dataclass
class BlockRecord:
    """One pass through a block: h, a and the block's output, each (batch, tokens, d)."""

    hidden_states: Tensor
    attention: Tensor
    output: Tensor


Observer = Callable[["NPTLayer", dict[str, WeightDelta]], None]


class _Pass:
    """What the hooks of one block hand to each other during one forward. Not a module: setting a module's attribute
    costs as much as a small kernel."""

    def __init__(self) -> None:
        self.component: NPComponent | None = None
        self.multiplier = 1.0
        self.clear()

    def clear(self) -> None:
        """Lets go of every tensor."""
        self.attention: Tensor | None = None
        self.observed: Tensor | None = None
        self.residual: Tensor | None = None
        self.values: InputValues | None = None
        self.down: Tensor | None = None


class NPTLayer(nn.Module, BaseTunerLayer):
    """The neuro-plastic part of one decoder block: per adapter one `NPComponent`, and the hooks that apply it.

    Args:
        block: the decoder block. family: where its pieces are. index: its place in the model, 0-based.
    """

    adapter_layer_names = ("npt_components",)
    other_param_names = ()

    def __init__(self, block: nn.Module, family: Family, index: int):
        super().__init__()
        self.npt_components = nn.ModuleDict()
        self.index, self.family = index, family
        self.merged_adapters: list[str] = []
        self._block = (block,)  # in a tuple, so that the parent is not registered as a child of its child
        self._override: str | None = None
        self._norm_hook: Any = None
        self.on_block: Callable[[NPTLayer, BlockRecord], None] | None = None
        self.observer: Observer | None = None
        self._pass = _Pass()
        self._norm: tuple[Tensor | None, Tensor | None] = (None, None)
        self.centered = False
        if family.norm is not None:
            like = next(p for p in block.parameters() if p.is_floating_point())
            probed = probe_norm(self.module("norm"), self.shape("up")[0], like)
            *self._norm, self.centered = from_first(probed) if loads_once() else probed  # type: ignore[assignment]
        self.oracle = NPComponent(self._spec(carry="exact", projections=tuple(family.projections)))
        self._handles: list[Any] = []
        self._sites: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._register_hooks()

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

    def add_component(self, adapter_name: str, *, seed: int | None = None, **options: Any) -> None:
        """Creates the component of an adapter; `options` are fields of `ComponentSpec`, `seed` is `NPComponent`'s."""
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
        component = self.new_component(spec, seed)
        self.npt_components[adapter_name] = component
        if not self._hooks_projections and self._needs_projection_hooks(component):
            self.detach()
            self._register_hooks()
        self._hook_norm()

    def new_component(self, spec: ComponentSpec, seed: int | None = None) -> NPComponent:
        """A component for this block, as before calibration; it is not put anywhere."""
        return NPComponent(spec, *self._norm, like=self.weight, seed=seed)

    def _spec(self, **options: Any) -> ComponentSpec:
        hidden, intermediate = self.shape("up")
        return ComponentSpec(hidden, intermediate, centered=self.centered, reads=self.family.reads, **options)

    # -- what is active ----------------------------------------------------------------------------------------------

    def module(self, name: str) -> Any:
        """A module of the block by its role: tap, norm, mlp, gate, up, down or out."""
        return find(self.get_base_layer(), self.family, name)

    def shape(self, name: str) -> tuple[int, int]:
        """(in, out) of a projection; of its own half where gate and up are one."""
        return projection_shape(self.get_base_layer(), self.family, name)

    def product(self, name: str) -> Callable[[Tensor], Tensor]:
        """x -> W_t x of a projection, without bias."""
        product = linear_product(self.module(name))
        if not self.family.fused or name == "down":
            return product
        half = INPUT_PROJECTIONS.index(name)
        return lambda x: product(x).chunk(2, -1)[half]

    @property
    def multiplier(self) -> float:
        """What the block scales attention's and the MLP's output by; npt keeps a as it joins the residual stream."""
        name = self.family.multiplier
        return 1.0 if name is None else float(getattr(self.get_base_layer(), name))

    def mlp_inputs(self, hidden_states: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """(the MLP's input in the NPT block, that in the original block), (..., d), from h and a."""
        norm: Any = (lambda x: x) if self.family.norm is None else self.module("norm").forward
        z = norm(hidden_states)
        return z, z if self.family.parallel else norm(hidden_states + attention)

    @property
    def override(self) -> str | None:
        """Instead of the active component: BYPASS the original block, EXACT the oracle, ZERO no attention and no MLP."""
        return self._override

    @override.setter
    def override(self, value: str | None) -> None:
        self._override = value
        self._hook_norm()

    @property
    def active_name(self) -> str | None:
        """The active adapter that has a component in this block."""
        # Past nn.Module's and PEFT's lookups: this is asked once per block and decoded token.
        active: Any = self._active_adapter
        components = self._modules["npt_components"]._modules  # type: ignore[union-attr]
        if isinstance(active, str):
            return active if active in components else None
        return next((name for name in active if name in components), None)

    @property
    def component(self) -> NPComponent | None:
        """The active adapter's component; None where it has none in this block."""
        name = self.active_name
        found: Any = None if name is None else self._modules["npt_components"]._modules[name]  # type: ignore[union-attr]
        return found  # type: ignore[no-any-return]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activates one adapter; two at once in one block would each replace attention, so that is an error."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        here = [name for name in names if name in self.npt_components]
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

    def _register_hooks(self) -> None:
        family, block = self.family, self.get_base_layer()
        hooks: list[tuple[str, bool, Any]] = [("tap", False, self._tap), ("down", False, self._add_down)]
        hooks.append(("mlp" if family.mlp else "up", True, self._shift_mlp))
        if family.out is not None:
            hooks.append(("out", False, self._add_out))
        components: Any = self.npt_components.values()
        self._hooks_projections = any(map(self._needs_projection_hooks, components))
        if self._hooks_projections and family.fused:
            hooks.append(("up", False, self._add_fused))
        elif self._hooks_projections:
            hooks += [("up", True, self._shift_up), ("up", False, self._add_up)]
            if family.gate is not None:
                hooks += [("gate", True, self._shift_gate), ("gate", False, self._add_gate)]
        for role, before, hook in hooks:
            module = self.module(role)
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            self._handles.append(register(hook))
            self._follow(module)
        if family.norm is not None:
            self._follow(self.module("norm"))
            self._hook_norm()
        self._handles.append(block.register_forward_pre_hook(self._begin))
        self._handles.append(block.register_forward_hook(self._finish, with_kwargs=True, always_call=True))

    def _follow(self, module: nn.Module) -> None:
        """Remembers where a hooked module stands, see `_begin`."""
        inside = self.get_base_layer().modules()
        self._sites += [(m._modules, n, c) for m in inside for n, c in m.named_children() if c is module]

    def _hook_norm(self) -> None:
        """Only the exact value reads h, which the norm sees; the hook is there while it is wanted."""
        components: Any = self.npt_components.values()
        wanted = self._override == EXACT or any(component.spec.carry == "exact" for component in components)
        wanted = wanted and self.family.norm is not None and not self.family.parallel
        if wanted and self._norm_hook is None:
            self._norm_hook = self.module("norm").register_forward_pre_hook(self._keep_residual)
        elif not wanted and self._norm_hook is not None:
            self._norm_hook.remove()
            self._norm_hook = None

    def detach(self) -> None:
        """Takes the hooks off; the block is the original one again."""
        for handle in [*self._handles, *([] if self._norm_hook is None else [self._norm_hook])]:
            handle.remove()
        self._handles, self._sites, self._norm_hook = [], [], None

    def _begin(self, module: nn.Module, args: Any) -> None:
        """Moves the hooks where a module was wrapped after conversion, as LoRA wraps linears; settles what is active."""
        for children, name, hooked in self._sites:
            if children[name] is not hooked:
                self.detach()
                self._register_hooks()
                break
        self._start()

    def _start(self) -> _Pass:
        now = self._pass
        now.component = self.active()
        if self.family.multiplier is not None:
            now.multiplier = self.multiplier
        return now

    def _tap(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        now, observed = self._pass, self.on_block is not None
        if now.component is None and not observed:
            return None
        now.attention = output if now.multiplier == 1 else output * now.multiplier
        now.observed = now.attention if observed else None
        return None if now.component is None else torch.zeros_like(output)

    def _keep_residual(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        now = self._pass
        if now.component is not None and now.component.spec.carry == "exact":
            now.residual = args[0]

    def _shift_mlp(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        now = self._pass
        if now.component is None or now.attention is None or self.override == ZERO:
            return None
        # Some models flatten batch and tokens before the MLP: the maths keeps the shape attention had.
        now.values = self._input_values(now.component, _shaped(args[0], now.attention))
        if now.values.shift is None or not self._shares_input(now.component):
            return None
        return (args[0] + now.values.shift.view_as(args[0]), *args[1:])

    def _shift_gate(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return self._shift_projection("gate", args)

    def _shift_up(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return self._shift_projection("up", args)

    def _shift_projection(self, name: str, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        component, values = self._pass.component, self._pass.values
        if component is None or values is None or values.shift is None or name not in component.spec.projections:
            return None
        if self._shares_input(component):
            return None
        return (args[0] + values.shift.view_as(args[0]), *args[1:])

    def _add_gate(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self._add_value("gate", output)

    def _add_up(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self._add_value("up", output)

    def _add_value(self, name: str, output: Tensor) -> Tensor | None:
        values = self._pass.values
        value = None if values is None else values.values.get(name)
        return None if value is None else output + value.view_as(output)

    def _add_fused(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        component, values = self._pass.component, self._pass.values
        if component is None or values is None:
            return None
        halves = list(output.chunk(2, -1))
        for i, name in enumerate(INPUT_PROJECTIONS):
            if name in values.values:
                halves[i] = halves[i] + values.values[name].view_as(halves[i])
            if name in component.spec.projections and values.shift is not None and not self._shares_input(component):
                halves[i] = halves[i] + self.product(name)(values.shift).view_as(halves[i])
        return torch.cat(halves, -1)

    def _add_down(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.override == ZERO:
            return torch.zeros_like(output)
        now = self._pass
        component, values, attention = now.component, now.values, now.attention
        if component is None or values is None or attention is None:
            return None
        # Let go here, the last use: a recomputed forward under gradient checkpointing never reaches the block's hook.
        now.attention = now.values = now.residual = None
        inputs = _shaped(args[0], attention)
        if self.observer is not None:
            deltas = component.weight_deltas(attention, inputs, "down", {})
            self.observer(self, {name: delta.scaled(1 / now.multiplier) for name, delta in deltas.items()})
        value = component(attention, inputs, "down", modulation=values.modulation)
        if value is not None and now.multiplier != 1:
            value = value / now.multiplier
        if self.family.out is not None:
            now.down = value
            return None
        return None if value is None else output + value.view_as(output)

    def _add_out(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Where a norm follows the MLP, `down`'s value joins after it."""
        if self.override == ZERO:
            return torch.zeros_like(output)
        value, self._pass.down = self._pass.down, None
        return None if value is None else output + value.view_as(output)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hands a pass to `on_block`; always lets go of what was kept, also when a forward died half-way."""
        attention = self._pass.observed
        self._pass.clear()
        if self.on_block is None or attention is None or output is None:
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.on_block(self, BlockRecord(hidden_states, attention, first_tensor(output)))

    def _shares_input(self, component: NPComponent) -> bool:
        """Whether one shift of the MLP's input serves every projection that reads it."""
        return all(name in component.spec.projections for name in INPUT_PROJECTIONS if name in self.family.projections)

    def _needs_projection_hooks(self, component: NPComponent) -> bool:
        """Whether gate or up get something of their own. A hook that does nothing still costs a decoding step time; one
        that comes with a new adapter is seen by torch.compile, which traces again when the active adapter changes."""
        return component.spec.low_rank_at == "projection" or not self._shares_input(component)

    def _input_values(self, component: NPComponent, z: Tensor) -> InputValues:
        attention: Any = self._pass.attention
        exact_input = self._exact_input(z) if component.spec.carry == "exact" else None
        if self.observer is not None:
            products = {name: self.product(name) for name in component.spec.input_projections}
            self.observer(self, component.weight_deltas(attention, z, "input", products, exact_input))
        values: InputValues = component(attention, z, "input", exact_input=exact_input)
        return values

    def _exact_input(self, z: Tensor) -> Tensor:
        """The original block's MLP input, from h: what the norm read, or z itself where there is no norm."""
        attention: Any = self._pass.attention
        if self.family.parallel:
            return z
        residual = z if self.family.norm is None else self._pass.residual
        if residual is None:
            raise ConversionError(f"block {self.index}: the MLP ran before its norm, so carry 'exact' has no h to read")
        return self.mlp_inputs(_shaped(residual, attention), attention)[1]

    # -- a block on its own --------------------------------------------------------------------------------------------

    def update_from(self, hidden_states: Tensor, attention: Tensor) -> Tensor:
        """The NPT block's update y - h from given h and a, (..., d): one norm and one MLP, no attention."""
        family, block = self.family, self.get_base_layer()
        now = self._start()
        now.attention = attention
        try:
            z = hidden_states if family.norm is None else self.module("norm")(hidden_states)
            if family.run is not None:
                return family.run(block, z)
            update: Tensor = self.module("mlp")(z)
            return (update if family.out is None else self.module("out")(update)) * now.multiplier
        finally:
            now.clear()


def first_tensor(output: Any) -> Tensor:
    """A block's hidden states: its output, or the first entry of the tuple it returns."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _shaped(x: Tensor, like: Tensor) -> Tensor:
    """x with the leading dimensions of `like`."""
    return x.view(*like.shape[:-1], x.shape[-1])


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
