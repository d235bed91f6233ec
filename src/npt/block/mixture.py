"""Weight deltas of a mixture of experts, for norms and inspection. The forward pass needs none of this.

A mixture's MLP is a function of z: the shift D of its input reaches the router, every expert and a shared expert alike, and
attention's own part joins its output (docs/maths.md, section 5). So dW of each projection that reads z is (W D) k^T with
k = z / |z|^2, in the router and in the experts that a token is routed to. What joins the output is one value v for each `down`
at work: with routing weights p_e, v = a / (sum of p_e and the shared expert's share), whose sum over experts, weighted, is a;
what the MLP multiplies the experts' sum by counts in p_e and in the share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from npt.block.component import ComponentSpec
from npt.block.families import Family
from npt.block.probing import BlockParts, linear_product
from npt.block.weight_delta import Routing, WeightDelta, inverse_square
from npt.errors import ConversionError


def check_mixture(spec: ComponentSpec) -> None:
    """Checks a component's options for a mixture.

    Raises:
        ConversionError: a key or a site that would need weights of each expert's own.
    """
    if spec.rank > 0 and spec.key != "input":
        raise ConversionError(
            f"key={spec.key!r}: in a mixture of experts the low-rank part would need a key for every expert; use key='input'"
        )
    if spec.rank > 0 and spec.low_rank_at != "input":
        raise ConversionError(
            f"low_rank_at={spec.low_rank_at!r}: in a mixture of experts it would need a matrix for every expert; use "
            "low_rank_at='input'"
        )


def routing_of(args: tuple[Any, ...], mlp: Any) -> Routing:
    """Where a call of the module of experts sends its tokens.

    Args:
        args: of the call: (z, indices, weights); or, in Llama 4, (z of every expert times its weight, experts one below the
            other), with zeros where a token is not routed.
        mlp: the mixture.
    """
    if len(args) == 3:
        return Routing(args[1], args[2])
    router = _router_of(mlp)
    lengths = args[0].reshape(router.num_experts, -1, args[0].shape[-1]).norm(dim=-1).T
    lengths, indices = lengths.topk(router.top_k, -1)
    return Routing(indices, torch.ones_like(lengths), lengths)


def mixture_deltas(
    parts: BlockParts, shift: Tensor, value: Tensor, z: Tensor, routing: Routing | None
) -> dict[str, WeightDelta]:
    """{"up", "down"}: the deltas of all projections at work, stacked, so that their norms are roots of summed squares.

    Args:
        parts: of the block. shift: D (..., d). value: what joins the MLP's output (..., d). z: the MLP's input without D, the
            same. routing: of the pass; None in a dense block of such a model.
    """
    tokens, d = z.reshape(-1, z.shape[-1]), z.shape[-1]
    shifts, seen = shift.reshape(-1, d), (z + shift).reshape(-1, d)
    values: list[Tensor] = []  # W D of every projection at work, (tokens, its rows)
    inverse, share = tokens.new_zeros(len(tokens)), tokens.new_zeros(len(tokens), 1)  # sum of 1 / |i_e|^2, sum of p_e
    mlp = parts.module("mlp")
    if routing is not None:
        weight = _router_weight(_router_of(mlp))
        values.append((shifts.to(weight.dtype) @ weight.T).to(shifts.dtype))
        experts = _Experts(parts.experts)
        for slot in range(routing.indices.shape[1]):
            read = seen
            if routing.lengths is not None:
                read = seen * (routing.lengths[:, slot] / seen.norm(dim=-1))[:, None].to(seen.dtype)
            moved, inner = experts.of_slot(routing.indices[:, slot], shifts, read)
            values.append(moved)
            inverse = inverse + inverse_square(inner)
        share = share + _routed_scale(mlp) * routing.weights.sum(-1, keepdim=True).to(share.dtype)
    for module, shared_gate in _shared(parts, routing is None):
        reads, down = _linears(module)
        values += [linear_product(linear)(shifts) for linear in reads]
        inverse = inverse + inverse_square(_input_of(down, module, seen))
        share = share + (1.0 if shared_gate is None else torch.sigmoid(linear_product(shared_gate)(seen)))
    v = value.reshape(-1, d) / (share * (0.5 if routing is not None and _is_average(parts) else 1.0))
    # An input of this length carries v as all the experts' inputs together do: |dW|^2 = |v|^2 sum of 1 / |i_e|^2.
    length = torch.where(inverse > 0, inverse.clamp_min(1e-300).rsqrt(), 0)[:, None]
    lead = z.shape[:-1]
    return {
        "up": WeightDelta(torch.cat(values, -1).view(*lead, -1), z),
        "down": WeightDelta(v.view(*lead, d), length.view(*lead, 1)),
    }


def _routed_scale(mlp: Any) -> float:
    """The factor on what the experts give together (laguna, minimax_m3); other types have it in the router, in p_e."""
    return float(getattr(mlp, "routed_scaling_factor", 1.0))


def _is_average(parts: BlockParts) -> bool:
    """True where the MLP gives the mean of experts and shared expert, not their sum (cohere2_moe)."""
    has_shared = bool(_shared(parts, dense=False))
    return has_shared and getattr(parts.module("mlp"), "shared_expert_combination_strategy", "sum") == "average"


def _router_of(mlp: Any) -> Any:
    return next(getattr(mlp, name) for name in ("gate", "router") if hasattr(mlp, name))


def _router_weight(router: Any) -> Tensor:
    """(experts, d)."""
    return next(p for p in router.parameters() if p.ndim == 2)


def _shared(parts: BlockParts, dense: bool) -> list[tuple[Any, Any]]:
    """(a shared expert, its gate or None) of a mixture; the MLP itself where the block is dense."""
    mlp = parts.module("mlp")
    if dense:
        return [(mlp, None)]
    if parts.family.beside is not None:
        return [(parts.module("beside"), None)]
    names = ("shared_expert", "shared_experts", "shared_mlp")
    found = next((getattr(mlp, name) for name in names if getattr(mlp, name, None) is not None), None)
    return [] if found is None else [(found, getattr(mlp, "shared_expert_gate", None))]


def _linears(module: Any) -> tuple[list[Any], Any]:
    """(the linears that read a dense MLP's input, the one back)."""
    linears = {name: child for name, child in module.named_children() if hasattr(child, "in_features")}
    down = next(name for name in ("down_proj", "w2", "output_linear") if name in linears)
    return [child for name, child in linears.items() if name != down], linears[down]


def _input_of(linear: Any, module: Any, x: Tensor) -> Tensor:
    """A linear's input in a pass of `module` on x."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        module.forward(x)
    finally:
        handle.remove()
    return seen[0]


class _Experts:
    """A module of transformers' experts: all weights in one tensor (experts, out, in), or (experts, in, out)."""

    def __init__(self, module: Any):
        self.module = module
        self.gated = getattr(module, "has_gate", hasattr(module, "gate_up_proj"))
        name = "gate_up_proj" if self.gated else "up_proj"
        weight: Any = getattr(module, name, None)
        self.weight: Tensor = weight
        self.bias: Tensor | None = getattr(module, f"{name}_bias", None)
        #: (experts, in, out); llama4's, which do not say so, are.
        self.transposed = getattr(module, "is_transposed", not hasattr(module, "has_gate"))
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ConversionError(
                f"{type(module).__name__}: its experts' weights are not one tensor of numbers ({name}), so the norms of their "
                "deltas can't be taken; the model itself runs"
            )

    def of_slot(self, indices: Tensor, shift: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(W_e D, i_e), (tokens, rows) each, of one expert for each token. shift: D; seen: what it reads, (tokens, d)."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        # On shapes alone every token goes to the first expert: as many products, of the same sizes.
        for expert in [0] if indices.is_meta else indices.unique().tolist():
            at = torch.arange(len(seen), device="meta") if indices.is_meta else (indices == expert).nonzero()[:, 0]
            weight = self.weight[expert] if self.transposed else self.weight[expert].T
            out = seen[at] @ weight
            out = out if self.bias is None else out + self.bias[expert]
            found.append((at, shift[at] @ weight, self._activated(out)))
        order = torch.cat([at for at, _, _ in found]).argsort()
        moved, inner = (torch.cat([part[i] for part in found])[order] for i in (1, 2))
        return moved, inner

    def _activated(self, out: Tensor) -> Tensor:
        """down's input, of what gate and up give."""
        if not self.gated:
            return self.module.act_fn(out)
        if hasattr(self.module, "_apply_gate"):
            return self.module._apply_gate(out)
        gate, up = out.chunk(2, -1)
        return self.module.act_fn(gate) * up


def mixture_weight(parts: BlockParts, name: str) -> tuple[float, float]:
    """(|W|_F, number of entries) of the projections that `name` stands for: "up" of router and experts, "down" of experts.

    Of the routed experts it counts as many as a token is sent to, each at the mean.
    """
    mlp = parts.module("mlp")
    square = entries = 0.0
    if parts.experts is not None:
        routed = _Experts(parts.experts)
        weight, used = routed.module.down_proj if name == "down" else routed.weight, _share_used(parts)
        whole = [_router_weight(_router_of(mlp))] if name == "up" else []
        square, entries = used * _square(weight), used * weight.numel()
    else:
        whole = []
    for module, _ in _shared(parts, parts.experts is None):
        reads, down = _linears(module)
        whole += [linear.weight for linear in ([down] if name == "down" else reads)]
    return (square + sum(map(_square, whole))) ** 0.5, entries + sum(weight.numel() for weight in whole)


def _square(weight: Tensor) -> float:
    return float(weight.detach().double().square().sum())


def _share_used(parts: BlockParts) -> float:
    """The share of a block's experts that a token is sent to."""
    mlp, experts = parts.module("mlp"), len(next(parts.experts.parameters()))
    used = getattr(_router_of(mlp), "top_k", None) or getattr(mlp, "top_k", None)
    if used is None:
        raise ConversionError(
            f"{type(mlp).__name__}: neither it nor its router says how many experts a token is sent to (top_k), so what a "
            "token uses can't be told; the model itself runs"
        )
    return int(used) / experts


def unused_parameters(blocks: Iterable[nn.Module], family: Family) -> int:
    """How many parameters of the experts a token does not use; 0 for a dense model."""
    parts = [BlockParts(block, family) for block in blocks]
    return sum(
        round((1 - _share_used(one)) * sum(p.numel() for p in one.experts.parameters()))
        for one in parts
        if one.experts is not None
    )
