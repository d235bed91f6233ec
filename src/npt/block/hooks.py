"""The hooks of one NPT block, in the order in which they fire. The block's own forward is never rewritten.

    transformer block                      NPT block
    a = Attn(Norm1(h))                     a = Attn(Norm1(h))
    h' = h + a                             z = Norm2(h)                  # no h + a anywhere
    y = h' + MLP_W(Norm2(h'))              y = h + MLP_{W + dW(a)}(z)

| hook           | on                   | reads                    | writes                                        |
|----------------|----------------------|--------------------------|-----------------------------------------------|
| `begin`        | block, before        | mode, active adapter     | pass: component, multiplier, mode             |
| `tap`          | tap, after           | its output, a            | pass: attention; the residual stream gets 0   |
| `keep_residual`| norm, before         | h                        | pass: residual, for carry `exact` and gain    |
|                |                      |                          | `denominator`                                 |
| `shift_mlp`    | mlp (or up), before  | z, pass: attention       | pass: values, beside; z + shift               |
| `shift_gate`,  | gate, up, before     | pass: values             | z + shift, where only one of the two has a    |
| `shift_up`     |                      |                          | delta                                         |
| `add_gate`,    | gate, up, after      | pass: values             | output + v_t (low rank at the projection)     |
| `add_up`       |                      |                          |                                               |
| `add_fused`    | gate and up as one,  | pass: values             | both of the above, on the halves of the output|
|                | after                |                          |                                               |
| `add_down`     | down, after          | its input i,             | output + v_down, or pass: down where a norm   |
|                |                      | pass: attention, values  | follows the MLP                               |
| `shift_beside`,| beside, before and   | pass: beside             | z + shift                                     |
| `drop_beside`  | after                |                          |                                               |
| `add_out`      | out, after           | pass: down               | output + v_down; pass: added, for observers   |
| `see_experts`  | a mixture's experts, | experts, their weights   | pass: routing, where weight deltas are wanted |
|                | before               |                          |                                               |
| `finish`       | block, after         | pass: observed, added    | nothing; empties the pass, tells `on_block`   |

tap: the last module whose output attention adds to the residual stream. out: the norm after the MLP, where there is one.
beside: a second MLP of the same input, called behind the first.
Modes change what the pass holds, never the hooks: torch.compile ignores a hook that is added after it. Hooks change where an
adapter is added that needs others, where a module was wrapped, and on the norm while the exact value is wanted.

The pass belongs to the thread that runs it: threads that call one model at the same time never see each other's tensors, modes
or observers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from npt.block.component import NPComponent
from npt.block.deltas import down_deltas, input_deltas
from npt.block.mixture import mixture_deltas, routing_of
from npt.block.outputs import first_tensor, shaped, with_first
from npt.block.passes import BlockRecord, Mode, Pass, ThreadState
from npt.block.probing import BlockParts
from npt.block.spec import INPUT_PROJECTIONS
from npt.block.terms import InputValues
from npt.block.weight_delta import WeightDelta
from npt.errors import ConversionError

if TYPE_CHECKING:
    from npt.block.layer import NPTLayer


#: Held while hooks are put on or taken off, which any thread's forward may come to do.
_CHANGING = threading.RLock()


class BlockHooks:
    """The hooks of one block, see the table above.

    Args:
        layer: decides which component is active. parts: the block's modules.
    """

    def __init__(self, layer: NPTLayer, parts: BlockParts):
        self.layer, self.parts, self.family = layer, parts, parts.family
        self.thread = ThreadState()
        self._in_exact = 0  # threads whose mode is EXACT
        self.handles: list[RemovableHandle] = []  # of the modules inside the block
        self._outer: list[RemovableHandle] = []  # of the block itself
        self._norm_handle: RemovableHandle | None = None
        self._places: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []

    # -- the hooks, in firing order ----------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: object) -> None:
        """Settles what is active. First moves the hooks where a module was wrapped after conversion, as LoRA wraps linears."""
        for children, name, hooked in self._places:
            if children[name] is not hooked:
                self._follow()
                break
        self.start(self.thread.now.override)

    def start(self, mode: Mode | None) -> Pass:
        """Begins a pass; returns what its hooks share.

        What an earlier pass left goes: a recomputed forward ends as soon as it has what a gradient needs.
        """
        now = self.thread.now
        now.clear()
        now.mode, now.component = mode, self.layer.active(mode)
        if self.family.multiplier is not None:
            now.multiplier = self.parts.multiplier
        return now

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """A context in which any thread, at any time, runs the block as the calling thread does now.

        For a forward that gradient checkpointing recomputes: `begin` may not fire there, other passes may have come between,
        and autograd runs it in a thread of its own where the model is on an accelerator.
        """
        now = self.thread.now
        mode, disabled, on_deltas = now.override, now.disabled, now.on_deltas

        @contextmanager
        def context() -> Iterator[None]:
            now = self.thread.now
            before = now.override, now.disabled, now.on_deltas
            changes = before != (mode, disabled, on_deltas)
            if changes:
                self.set_mode(mode)
                now.disabled, now.on_deltas = disabled, on_deltas
            self.start(mode)
            try:
                yield
            finally:
                now.drop()
                if changes:
                    self.set_mode(before[0])
                    _, now.disabled, now.on_deltas = before

        return context

    def tap(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        """Keeps the attention output a, as it would join the residual stream, and gives the stream zeros."""
        now = self.thread.now
        observed = now.on_block is not None
        if now.component is None and not observed:
            return None
        now.attention = output if now.multiplier == 1 else output * now.multiplier
        now.observed = now.attention if observed else None
        return None if now.component is None else torch.zeros_like(output)

    def keep_residual(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keeps h, which the norm reads, for the exact value or for the norm's denominator."""
        now = self.thread.now
        if now.component is not None and _reads_residual(now.component):
            now.residual = args[0]

    def shift_mlp(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Makes the values of gate and up from a and z, and adds the shift to z where both take it."""
        now = self.thread.now
        if now.component is None or now.attention is None or now.mode is Mode.ZERO:
            return None
        # Some models flatten batch and tokens before the MLP: the maths keeps the shape attention had.
        now.values = self._input_values(now.component, now.attention, shaped(args[0], now.attention))
        if now.values.shift is None or not self._shares_input(now.component):
            return None
        if self.family.beside is not None:
            now.beside = now.values.shift
        return (args[0] + now.values.shift.view_as(args[0]), *args[1:])

    def shift_beside(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """z + shift for the MLP beside the first."""
        shift, self.thread.now.beside = self.thread.now.beside, None
        return None if shift is None else (args[0] + shift.view_as(args[0]), *args[1:])

    def drop_beside(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        """Zeros while the MLP is dropped."""
        return torch.zeros_like(output) if self.thread.now.mode is Mode.ZERO else None

    def shift_gate(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """z + shift for gate alone."""
        return self._shift_projection("gate", args)

    def shift_up(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """z + shift for up alone."""
        return self._shift_projection("up", args)

    def add_gate(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        """Adds gate's own value to its output."""
        return self._add_value("gate", output)

    def add_up(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        """Adds up's own value to its output."""
        return self._add_value("up", output)

    def add_fused(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        """Where gate and up are one projection: adds each one's value, and W_t shift where only one takes the shift."""
        now = self.thread.now
        component, values = now.component, now.values
        if component is None or values is None:
            return None
        halves = list(output.chunk(2, -1))
        for i, name in enumerate(INPUT_PROJECTIONS):
            if name in values.values:
                halves[i] = halves[i] + values.values[name].view_as(halves[i])
            if name in component.spec.projections and values.shift is not None and not self._shares_input(component):
                halves[i] = halves[i] + self.parts.product(name)(values.shift).view_as(halves[i])
        return torch.cat(halves, -1)

    def add_down(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        """Makes v_down from a, and adds it to down's output unless a norm follows."""
        now = self.thread.now
        if now.mode is Mode.ZERO:
            return with_first(output, torch.zeros_like)
        component, values, attention = now.component, now.values, now.attention
        if component is None or values is None or attention is None:
            return None
        # Let go here, the last use: a recomputed forward under gradient checkpointing never reaches the block's hook.
        now.attention = now.values = now.residual = None
        inner = shaped(args[0], attention)
        value = component.down_value(attention, inner, values.modulation)
        if now.on_deltas is not None:
            deltas = self._down_deltas(component, attention, inner, value, values)
            now.on_deltas(self.layer, {name: delta.scaled(1 / now.multiplier) for name, delta in deltas.items()})
        if value is not None and now.multiplier != 1:
            value = value / now.multiplier
        if self.family.out is not None:
            now.down = value
            return None
        return None if value is None else with_first(output, lambda x: x + value.view_as(x))

    def see_experts(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keeps which experts a mixture's tokens go to, and by what weights."""
        now = self.thread.now
        if now.on_deltas is not None and now.component is not None:
            now.routing = routing_of(args, self.parts.module("mlp"))

    def add_out(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        """Where a norm follows the MLP, v_down joins after it."""
        now = self.thread.now
        if now.mode is Mode.ZERO:
            return torch.zeros_like(output)
        value, now.down = now.down, None
        output = output if value is None else output + value.view_as(output)
        if self.family.tail is not None and now.observed is not None:
            now.added = output
        return None if value is None else output

    def finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hands the pass to `on_block`; lets go of all that was kept, also when a forward died half-way."""
        now = self.thread.now
        attention, added, converted = now.observed, now.added, now.component is not None
        now.clear()
        if now.on_block is None or attention is None or output is None:
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        behind = first_tensor(output)
        if added is not None:  # the block does more with the stream behind the MLP
            behind = (hidden_states if converted else hidden_states + attention) + added
        now.on_block(self.layer, BlockRecord(hidden_states, attention, behind))

    # -- their pieces --------------------------------------------------------------------------------------------------

    def _input_values(self, component: NPComponent, attention: Tensor, z: Tensor) -> InputValues:
        exact_input = self._exact_input(z, attention) if component.spec.carry == "exact" else None
        scale = component.norm_scale(self._residual(z, attention), z) if component.reads_denominator else None
        on_deltas = self.thread.now.on_deltas
        if on_deltas is not None and self.family.experts is None:
            products = {name: self.parts.product(name) for name in component.spec.input_projections}
            on_deltas(self.layer, input_deltas(component, attention, z, products, exact_input, scale))
        return component.input_values(attention, z, exact_input, scale)

    def _down_deltas(
        self, component: NPComponent, attention: Tensor, inner: Tensor, value: Tensor | None, values: InputValues
    ) -> dict[str, WeightDelta]:
        """dW of down; of a mixture, where `inner` is the input of the whole MLP, of all its projections."""
        if self.family.experts is None:
            return down_deltas(component, attention, inner)
        shift = torch.zeros_like(inner) if values.shift is None else values.shift
        value = torch.zeros_like(inner) if value is None else value
        found = mixture_deltas(self.parts, shift, value, inner - shift, self.thread.now.routing)
        targets = ["up"] * bool(component.spec.input_projections) + ["down"] * ("down" in component.spec.projections)
        # What reads z is not scaled by the block's multiplier, and add_down scales all that it is given.
        return {name: found[name].scaled(self.thread.now.multiplier if name == "up" else 1.0) for name in targets}

    def _exact_input(self, z: Tensor, attention: Tensor) -> Tensor:
        """The original block's MLP input, from h: what the norm read, or z itself where there is no norm."""
        return z if self.family.parallel else self.parts.mlp_inputs(self._residual(z, attention), attention)[1]

    def _residual(self, z: Tensor, attention: Tensor) -> Tensor:
        """h, as the norm read it; z itself where there is no norm."""
        residual = z if self.family.norm is None else self.thread.now.residual
        if residual is None:
            raise ConversionError(
                f"block {self.layer.index}: the MLP ran before its norm, so there is no h for carry 'exact' or gain "
                "'denominator' to read"
            )
        return shaped(residual, attention)

    def _shift_projection(self, name: str, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        now = self.thread.now
        component, values = now.component, now.values
        if component is None or values is None or values.shift is None or name not in component.spec.projections:
            return None
        if self._shares_input(component):
            return None
        return (args[0] + values.shift.view_as(args[0]), *args[1:])

    def _add_value(self, name: str, output: Tensor) -> Tensor | None:
        values = self.thread.now.values
        value = None if values is None else values.values.get(name)
        return None if value is None else output + value.view_as(output)

    def _shares_input(self, component: NPComponent) -> bool:
        """True where one shift of the MLP's input serves every projection that reads it."""
        return all(name in component.spec.projections for name in INPUT_PROJECTIONS if name in self.family.projections)

    def needs_projection_hooks(self, component: NPComponent) -> bool:
        """True where gate or up get something of their own.

        A hook that does nothing still costs a decoding step time; one that comes with a new adapter is seen by torch.compile,
        which traces again when the active adapter changes.
        """
        return component.spec.low_rank_at == "projection" or not self._shares_input(component)

    # -- putting them on and taking them off -------------------------------------------------------------------------

    def attach(self) -> None:
        """Puts the hooks of the table on, or anew on the modules inside the block where an adapter needs others."""
        with _CHANGING:
            if not self._outer:
                block = self.parts.block
                self._outer.append(block.register_forward_pre_hook(self.begin))
                self._outer.append(block.register_forward_hook(self.finish, with_kwargs=True, always_call=True))
            self._hook_modules()

    def _hook_modules(self) -> None:
        """Moves the hooks inside the block to where its modules stand now."""
        self._unhook_modules()
        family = self.family
        before: list[tuple[str, Callable[..., object]]] = [("mlp" if family.mlp else "up", self.shift_mlp)]
        after: list[tuple[str, Callable[..., object]]] = [("tap", self.tap), ("down", self.add_down)]
        if family.out is not None:
            after.append(("out", self.add_out))
        if family.beside is not None:
            before.append(("beside", self.shift_beside))
            after.append(("beside", self.drop_beside))
        self.has_projection_hooks = any(map(self.needs_projection_hooks, self.layer.components()))
        if self.has_projection_hooks and family.fused:
            after.append(("up", self.add_fused))
        elif self.has_projection_hooks:
            before.append(("up", self.shift_up))
            after.append(("up", self.add_up))
            if family.gate is not None:
                before.append(("gate", self.shift_gate))
                after.append(("gate", self.add_gate))
        roles = [role for role, _ in (*before, *after)] + ["norm"] * (family.norm is not None)
        self.handles += [self.parts.module(role).register_forward_pre_hook(hook) for role, hook in before]
        self.handles += [self.parts.module(role).register_forward_hook(hook) for role, hook in after]
        self.hook_norm()
        if self.parts.experts is not None:
            self.handles.append(self.parts.experts.register_forward_pre_hook(self.see_experts))
        hooked, block = {id(self.parts.module(role)) for role in roles}, self.parts.block
        # Last: until then a thread that comes to `begin` finds the old places, and waits.
        self._places = [(m._modules, n, c) for m in block.modules() for n, c in m.named_children() if id(c) in hooked]

    def _follow(self) -> None:
        """Moves the hooks after the modules; one thread does, the others find it done."""
        with _CHANGING:
            if any(children[name] is not hooked for children, name, hooked in self._places):
                self._hook_modules()

    def set_mode(self, mode: Mode | None) -> None:
        """Sets the calling thread's mode."""
        now = self.thread.now
        with _CHANGING:
            self._in_exact += (mode is Mode.EXACT) - (now.override is Mode.EXACT)
            now.override = mode
            self.hook_norm()

    def hook_norm(self) -> None:
        """Few components read h, which the norm sees: that hook is there while it is wanted."""
        wanted = self._in_exact > 0 or any(map(_reads_residual, self.layer.components()))
        wanted = wanted and self.family.norm is not None and not self.family.parallel
        if wanted and self._norm_handle is None:
            self._norm_handle = self.parts.module("norm").register_forward_pre_hook(self.keep_residual)
        elif not wanted and self._norm_handle is not None:
            self._norm_handle.remove()
            self._norm_handle = None

    def detach(self) -> None:
        """Takes the hooks off; the block is the original one again."""
        with _CHANGING:
            self._unhook_modules()
            for handle in self._outer:
                handle.remove()
            self._outer, self._places = [], []

    def _unhook_modules(self) -> None:
        for handle in [*self.handles, *([] if self._norm_handle is None else [self._norm_handle])]:
            handle.remove()
        self.handles, self._norm_handle = [], None


def _reads_residual(component: NPComponent) -> bool:
    return component.spec.carry == "exact" or component.reads_denominator
