"""The modules of a block: where they are, their sizes, products and norms. They are called, never read by attribute name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from npt.block.families import Family
from npt.common.precision import wide_dtype
from npt.errors import ConversionError


def linear_shape(module: Any) -> tuple[int, int]:
    """(in_features, out_features) of a Linear, a Conv1D or a quantised linear."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    if hasattr(module, "nf"):  # transformers' Conv1D keeps its weight as (in, out)
        return int(module.nx), int(module.nf)
    raise ConversionError(f"{type(module).__name__} is neither Linear nor Conv1D; NPT can't read its sizes")


def find(block: nn.Module, family: Family, role: str) -> Any:
    """Returns a module of a block by its role in the family's line: tap, norm, mlp, gate, up, down, out or beside.

    Raises:
        ConversionError: the block has none at the path.
    """
    paths = getattr(family, role)
    for path in paths if isinstance(paths, tuple) else (paths,):
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    raise ConversionError(
        f"{type(block).__name__} has no {role} at {paths!r}, where the family's line says it is: a mixture of experts, or "
        "another architecture under this model type"
    )


def projection_shape(block: nn.Module, family: Family, name: str) -> tuple[int, int]:
    """(in, out) of a block's projection; of its own half where gate and up are one; of a mixture's whole MLP."""
    if family.experts is not None:
        norm = find(block, family, "norm" if family.norm is not None else "out")
        return (len(norm.weight),) * 2
    size_in, size_out = linear_shape(find(block, family, name))
    return size_in, size_out // (2 if family.fused and name != "down" else 1)


def linear_product(module: Any) -> Callable[[Tensor], Tensor]:
    """x -> W x without bias. The linear is called, never its raw weight, so that quantised and offloaded ones work too."""
    if getattr(module, "bias", None) is None:
        forward: Callable[[Tensor], Tensor] = module.forward
        return forward
    return lambda x: module.forward(x) - module.forward(torch.zeros_like(x[..., :1, :]))


def execution_device(module: nn.Module) -> torch.device:
    """The device a module computes on: its weights', or the one accelerate brings them to when it keeps them elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "execution_device", None) is not None:
            return torch.device(part.execution_device)
    return next(module.parameters()).device


def probe_norm(norm: Any, d: int, like: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """(weight (d,), bias (d,) or None, whether it centres) of a norm, measured by calling it; a weightless one has ones.

    Two inputs x and -x of unit variance and zero mean, scaled up so that the norm's epsilon vanishes, give
    weight = (f(x) - f(-x)) / 2x and bias = (f(x) + f(-x)) / 2, whatever the class calls them.
    """
    parameter, scale = next(iter(norm.parameters()), like), 4096.0
    sign = torch.ones(d, device=parameter.device, dtype=parameter.dtype)
    sign[1::2] = -1
    with torch.no_grad():
        plus, minus = norm.forward((sign * scale)[None])[0], norm.forward((-sign * scale)[None])[0]
        constant = norm.forward(torch.full_like(sign, scale)[None])[0]
    dtype = wide_dtype(parameter.dtype)
    bias = (plus.to(dtype) + minus.to(dtype)) / 2
    weight = (plus.to(dtype) - minus.to(dtype)) / 2 * sign
    if parameter.is_meta:
        return weight, None if getattr(norm, "bias", None) is None else bias, isinstance(norm, nn.LayerNorm)
    centered = bool((constant.to(dtype) - bias).abs().max() < weight.abs().max() / 2)
    return weight, bias if bool(bias.any()) else None, centered


def logit_head(model: Any) -> Callable[[Tensor], Tensor]:
    """last hidden state (..., d) -> logits (..., vocabulary), with what some families do before and after the last product."""
    config = model.config.get_text_config(decoder=True)  # of a composite model, the part that writes
    unembed = model.get_output_embeddings()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    before = model.lm_head if config.model_type == "modernbert-decoder" else _identity  # a layer and a norm
    multiplier = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0

    def head(hidden: Tensor) -> Tensor:
        logits = unembed(before(hidden)) * (multiplier / divisor)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    return head


class BlockParts:
    """A decoder block and where its family says its pieces are.

    Args:
        block: the decoder block. family: its line of the table.
    """

    def __init__(self, block: nn.Module, family: Family):
        self._block = (block,)  # in a tuple: a module that holds this must not register the block as its child
        self.family = family

    @property
    def block(self) -> nn.Module:
        """The decoder block."""
        return self._block[0]

    def module(self, role: str) -> Any:
        """A module of the block by its role: tap, norm, mlp, gate, up, down, out or beside."""
        return find(self.block, self.family, role)

    def shape(self, name: str) -> tuple[int, int]:
        """(in, out) of a projection; of its own half where gate and up are one."""
        return projection_shape(self.block, self.family, name)

    @property
    def experts(self) -> Any:
        """The module of a mixture's experts; None in a dense block."""
        try:
            return None if self.family.experts is None else self.block.get_submodule(self.family.experts)
        except AttributeError:
            return None

    @property
    def weight(self) -> Tensor:
        """The down projection's weight; of a mixture the first one of its MLP that is not quantised."""
        if self.family.experts is None:
            weight: Tensor = self.module("down").weight
            return weight
        own = list(self.module("mlp").parameters())
        return next((p for p in own if p.is_floating_point()), own[0])

    def product(self, name: str) -> Callable[[Tensor], Tensor]:
        """x -> W_t x of a projection, without bias.

        Raises:
            ConversionError: of a mixture, which has one for each expert.
        """
        if self.family.experts is not None:
            raise ConversionError(
                f"{name} of {type(self.block).__name__} is a mixture of experts, which is no one product"
            )
        product = linear_product(self.module(name))
        if not self.family.fused or name == "down":
            return product
        half = ("gate", "up").index(name)
        return lambda x: product(x).chunk(2, -1)[half]

    @property
    def multiplier(self) -> float:
        """The factor of attention's and the MLP's output in the residual stream; npt keeps a as it joins the stream."""
        name = self.family.multiplier
        return 1.0 if name is None else float(getattr(self.block, name))

    def mlp_inputs(self, hidden_states: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """(the MLP's input in the NPT block, that in the original block), (..., d), from h and a."""
        norm: Callable[[Tensor], Tensor] = _identity if self.family.norm is None else self.module("norm").forward
        z = norm(hidden_states)
        return z, z if self.family.parallel else norm(hidden_states + attention)


def _identity(x: Tensor) -> Tensor:
    return x
