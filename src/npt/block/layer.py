"""`NPTLayer`: the adapters of one decoder block, with the surface PEFT asks of a tuner layer. The hooks are in `hooks.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from npt.block.component import ComponentSpec, NPComponent
from npt.block.families import Family
from npt.block.hooks import BlockHooks
from npt.block.mixture import check_mixture
from npt.block.outputs import first_tensor
from npt.block.passes import BlockRecord, Mode
from npt.block.probing import BlockParts, probe_norm
from npt.common.processes import from_first, loads_once
from npt.errors import ConversionError

__all__ = ["BlockRecord", "Mode", "NPTLayer", "first_tensor"]


class NPTLayer(nn.Module, BaseTunerLayer):
    """The neuro-plastic part of one decoder block: per adapter one `NPComponent`, and the hooks that apply it.

    Args:
        block: the decoder block. family: where its pieces are. index: its place in the model, 0-based.
    """

    adapter_layer_names = ("npt_components",)
    other_param_names = ()
    _active_adapter: str | list[str]  # PEFT's
    _disable_adapters: bool
    #: The layer belongs to an `NPTModel` that a PeftModel holds: nobody else may switch it.
    is_owned = False
    #: Called when transformers freezes the layer, which it does once it has read an adapter's file into the model.
    on_frozen: Callable[[NPTLayer], None] | None = None

    def __init__(self, block: nn.Module, family: Family, index: int):
        super().__init__()
        self.npt_components = nn.ModuleDict()
        self.index, self.family = index, family
        self.merged_adapters: list[str] = []
        self.parts = BlockParts(block, family)
        self.norm_parameters: tuple[Tensor | None, Tensor | None] = (None, None)
        self.centered = False
        if family.norm is not None:
            like = next(p for p in block.parameters() if p.is_floating_point())
            probed = probe_norm(self.module("norm"), self.shape("up")[0], like)
            weight, bias, self.centered = from_first(probed) if loads_once() else probed
            self.norm_parameters = weight, bias
        self.oracle = NPComponent(self._spec(carry="exact", projections=tuple(family.projections)))
        self.hooks = BlockHooks(self, self.parts)
        self.hooks.attach()

    # -- PEFT's surface ----------------------------------------------------------------------------------------------

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Its modules; an owned layer leaves itself out.

        PEFT's tuners and transformers switch, train, save and delete every tuner layer that they find in a model's modules,
        whatever method it is of. So an NPT model stays what it is when LoRA is put into it.
        """
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if module is not self or not self.is_owned:
                yield name, module

    def get_base_layer(self) -> nn.Module:
        """The decoder block this layer lives in."""
        return self.parts.block

    @property
    def weight(self) -> Tensor:
        """The down projection's weight: PEFT asks a tuner layer's weight for device and dtype."""
        return self.parts.weight

    @property
    def bias(self) -> None:
        """None: an NPT layer has no bias of its own."""
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: dW depends on the input."""
        return False

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activates one adapter.

        Raises:
            ConversionError: two of them have a component in this block, where each would replace attention.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_together(names)
        super().set_adapter(names, inference_mode=inference_mode)

    def check_together(self, names: Sequence[str]) -> None:
        """Checks that at most one of these adapters has a component here.

        Raises:
            ConversionError: two of them have, and each would replace attention.
        """
        here = [name for name in names if name in self.npt_components]
        if len(here) > 1:
            raise ConversionError(f"adapters {here} are both for block {self.index}; activate one of them at a time")

    def enable_adapters(self, enabled: bool) -> None:
        """Switches its adapters on or off, and leaves which of them are trained as it is."""
        self._disable_adapters = not enabled

    def requires_grad_(self, requires_grad: bool = True) -> NPTLayer:
        """Sets the flags, as of any module, and tells `on_frozen`."""
        if self.on_frozen is not None and not requires_grad:
            self.on_frozen(self)
        super().requires_grad_(requires_grad)
        return self

    # -- components --------------------------------------------------------------------------------------------------

    def add_component(self, adapter_name: str, *, seed: int | None = None, **options: Any) -> None:
        """Creates the component of an adapter.

        Args:
            seed: as of `NPComponent`. options: fields of `ComponentSpec`.

        Raises:
            ConversionError: a projection that the family lacks, or a rank above the hidden size.
        """
        projections = tuple(options.pop("projections"))
        missing = [name for name in projections if name not in self.family.projections and name != "gate"]
        present = tuple(name for name in projections if name in self.family.projections)
        if missing or not present:
            raise ConversionError(
                f"target_projections={list(projections)}: this family's MLP has {', '.join(self.family.projections)} only"
            )
        spec = self._spec(projections=present, **options)
        if self.family.experts is not None:
            check_mixture(spec)
        if spec.rank > spec.hidden_size:
            raise ConversionError(
                f"rank={spec.rank} is larger than the model's hidden size {spec.hidden_size}; use a rank up to that"
            )
        component = self.new_component(spec, seed)
        self.npt_components[adapter_name] = component
        if not self.hooks.has_projection_hooks and self.hooks.needs_projection_hooks(component):
            self.hooks.attach()
        self.hooks.hook_norm()

    def new_component(self, spec: ComponentSpec, seed: int | None = None) -> NPComponent:
        """A component for this block, as before calibration; it is not put anywhere."""
        return NPComponent(spec, *self.norm_parameters, like=self.weight, seed=seed)

    def _spec(self, **options: Any) -> ComponentSpec:
        hidden, intermediate = self.shape("up")
        return ComponentSpec(hidden, intermediate, centered=self.centered, reads=self.family.reads, **options)

    def components(self) -> list[NPComponent]:
        """The components of all adapters."""
        return list(self._components().values())

    def _components(self) -> dict[str, NPComponent]:
        # Past nn.Module's and PEFT's lookups: this is asked once per block and decoded token.
        found: dict[str, NPComponent] = self._modules["npt_components"].__dict__["_modules"]
        return found

    @property
    def active_name(self) -> str | None:
        """The active adapter that has a component in this block."""
        active, components = self._active_adapter, self._components()
        for name in [active] if isinstance(active, str) else active:
            if name in components:
                return name
        return None

    @property
    def component(self) -> NPComponent | None:
        """The active adapter's component; None where it has none in this block."""
        name = self.active_name
        return None if name is None else self._components()[name]

    @property
    def own(self) -> NPComponent:
        """The active adapter's component, of a layer that has one (see `npt.tuner.converted.active_layers`).

        Raises:
            ConversionError: it has none in this block.
        """
        component = self.component
        if component is None:
            raise ConversionError(f"block {self.index} has no active NPT adapter; activate one with set_adapter")
        return component

    def active(self, mode: Mode | None = None) -> NPComponent | None:
        """The component to apply in a mode, or None for the original block."""
        if mode is not None:
            return None if mode is Mode.ORIGINAL else self.oracle
        return None if self._disable_adapters or self.hooks.thread.now.disabled else self.component

    @property
    def disable_adapters(self) -> bool:
        """PEFT's: True where the adapters are off, for every thread or for the calling one."""
        return self._disable_adapters or self.hooks.thread.now.disabled

    @property
    def mode(self) -> Mode | None:
        """The calling thread's mode, instead of the active adapter, or None; see `npt.block.modes.running_as`."""
        return self.hooks.thread.now.override

    @mode.setter
    def mode(self, value: Mode | None) -> None:
        self.hooks.set_mode(value)

    def detach(self) -> None:
        """Takes the hooks off; the block is the original one again."""
        self.hooks.detach()

    # -- the block's pieces --------------------------------------------------------------------------------------------

    def module(self, role: str) -> Any:
        """A module of the block by its role, see `BlockParts.module`."""
        return self.parts.module(role)

    def shape(self, name: str) -> tuple[int, int]:
        """(in, out) of a projection, see `BlockParts.shape`."""
        return self.parts.shape(name)

    def product(self, name: str) -> Callable[[Tensor], Tensor]:
        """x -> W_t x of a projection, without bias."""
        return self.parts.product(name)

    def mlp_inputs(self, hidden_states: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """(the MLP's input in the NPT block, that in the original block), (..., d), from h and a."""
        return self.parts.mlp_inputs(hidden_states, attention)

    def update_from(self, hidden_states: Tensor, attention: Tensor, mode: Mode | None = None) -> Tensor:
        """The block's update y - h from given h and a, (..., d): one norm and one MLP, no attention.

        mode: what the block runs as; None is the active adapter. Mode.ORIGINAL adds no delta and ignores `attention`: it gives
            MLP(Norm2(h)). The original block's own update is Mode.EXACT.
        """
        family, now = self.family, self.hooks.start(mode)
        now.attention, now.residual = attention, hidden_states
        try:
            z = hidden_states if family.norm is None else self.module("norm")(hidden_states)
            if family.run is not None:
                return family.run(self.parts.block, z)
            update: Tensor = first_tensor(self.module("mlp")(z))
            if family.beside is not None:
                update = update + self.module("beside")(z)
            return (update if family.out is None else self.module("out")(update)) * now.multiplier
        finally:
            now.clear()
