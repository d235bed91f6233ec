"""The neuro-plastic component: the maths of one NPT block, without any model around it.

    transformer block                      NPT block
    a = Attn(Norm1(h))                     a = Attn(Norm1(h))
    h' = h + a                             z = Norm2(h)                  # no h + a anywhere
    y = h' + MLP_W(Norm2(h'))              y = h + MLP_{W + dW(a)}(z)

For one token only the product dW x matters (x is the input of a projection), so a per-token weight
delta is a *value* v and a *key* k with k.x = 1:  dW = v k^T, dW x = v, |dW|_F = |v| |k|. The least norm
for a given v is |v| / |x|, reached by the input key k = x / |x|^2 alone (docs/maths.md, Eq. 1).

Symbols, in code and docstrings: d hidden size, f MLP width, r rank, a attention output (..., d),
z = Norm2(h) the MLP's input (..., d), i the MLP's intermediate, the input of `down` (..., f).
A projection's weight W_t is (f, d) for gate and up, (d, f) for down; nothing of that size is ever formed
per token, except by `WeightDelta.matrix`, on request, for one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

INPUT_PROJECTIONS = ("gate", "up")
PROJECTIONS = ("gate", "up", "down")
KEYS = ("input", "tied", "learned")
CARRIES = ("none", "diagonal", "exact")
GAINS = ("none", "norm", "overlap", "state")
LOW_RANK_SITES = ("input", "projection")
#: Keeps the division by the norm's weight finite where a weight is (close to) zero.
NORM_WEIGHT_EPSILON = 1e-6


@dataclass(frozen=True)
class ComponentSpec:
    """Everything that fixes a component's parameters and shapes.

    `hidden_size` d, `intermediate_size` f; `projections` is the subset of gate, up, down that receives a delta;
    `centered` says that Norm2 subtracts the mean (LayerNorm), so the mean of `a` is taken out too. `reads` is what the
    original MLP reads: "norm(h + a)", "h + a" (no norm before the MLP: no gain) or "h" (a parallel block: attention
    leaves the MLP's input alone, so gate and up need no carry either).
    """

    hidden_size: int
    intermediate_size: int
    projections: tuple[str, ...] = PROJECTIONS
    rank: int = 16
    modulation_scale: float = 1.0
    key: str = "input"
    carry: str = "diagonal"
    gain: str = "state"
    low_rank_at: str = "input"
    centered: bool = False
    reads: str = "norm(h + a)"

    @cached_property
    def input_projections(self) -> tuple[str, ...]:
        """The targeted projections that read z."""
        return tuple(name for name in INPUT_PROJECTIONS if name in self.projections)

    @cached_property
    def has_low_rank(self) -> bool:
        """Whether there is a low-rank part at all (`exact` has none)."""
        return self.rank > 0 and self.carry != "exact"


@dataclass
class WeightDelta:
    """dW of one projection for a batch of tokens, in factors: dW = value k^T + B^T diag(m) C^T.

    value (..., out) is carried by the input key k = x / |x|^2; inputs x (..., in); low_rank is (m (..., r), C (in, r),
    B (r, out)), or None when the low-rank part rides on the input key.
    Tokens with x = 0 have no input key: their `value` is zero and `skipped` counts them.
    """

    value: Tensor
    inputs: Tensor
    low_rank: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def skipped(self) -> Tensor:
        """(...) bool: tokens whose input is all zero, so that no input key exists."""
        return self.inputs.square().sum(-1) == 0

    def apply(self) -> Tensor:
        """dW x, (..., out)."""
        return self.value if self.low_rank is None else self.value + self._low_rank_product(*self.low_rank)

    def frobenius_norm(self) -> Tensor:
        """|dW|_F per token, (...), without forming dW."""
        return self.frobenius_norm_square().sqrt()

    def frobenius_norm_square(self) -> Tensor:
        """|dW|_F^2 per token, (...) (docs/maths.md, Eq. 3)."""
        input_square = self.inputs.square().sum(-1)
        inverse = torch.where(input_square > 0, 1 / input_square.clamp_min(torch.finfo(input_square.dtype).tiny), 0)
        square = self.value.square().sum(-1) * inverse
        if self.low_rank is not None:
            m, c, b = self.low_rank
            gram = (c.T @ c) * (b @ b.T)
            square = square + ((m @ gram) * m).sum(-1)
            square = square + 2 * (self.value * self._low_rank_product(m, c, b)).sum(-1) * inverse
        return square.clamp_min(0)

    def scaled(self, factor: float) -> WeightDelta:
        """factor * dW."""
        if factor == 1:
            return self
        low_rank = None if self.low_rank is None else (factor * self.low_rank[0], *self.low_rank[1:])
        return WeightDelta(factor * self.value, self.inputs, low_rank)

    def matrix(self, *token: int) -> Tensor:
        """dW of the token at index `token` of the leading dimensions, as an (out, in) matrix."""
        value, x = self.value[token], self.inputs[token]
        square = x.square().sum()
        key = x / square if square > 0 else torch.zeros_like(x)
        delta = torch.outer(value, key)
        if self.low_rank is not None:
            m, c, b = self.low_rank
            delta = delta + (b.T * m[token]) @ c.T
        return delta

    def _low_rank_product(self, m: Tensor, c: Tensor, b: Tensor) -> Tensor:
        return ((self.inputs @ c) * m) @ b


@dataclass
class InputValues:
    """What gate and up receive for one batch of tokens.

    shift (..., d): added to z before the projections (carry, gain and a low rank at the input, Eq. 2), or None.
    values: per projection (..., f), added to its output (a low rank at the projection).
    modulation m (..., r), shared with the down projection, or None.
    """

    shift: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    modulation: Tensor | None = None


class NPComponent(nn.Module):
    """Generates dW from the attention output of the same token. Equations, with the shapes above:

        m      = s tanh(a A)                                     (..., r)
        g      = k0 + k1 |a|^2/d + k2 <zhat, a>/d                (..., 1)   gain
        w      = 1  + l1 |a|^2/d + l2 <zhat, a>/d                (..., 1)   gain on the carry
        v_t    = W_t (m B_in + w (c * a) + g (z - b))            (..., f)   low_rank_at = input
        v_t    = m B_t + W_t (w (c * a) + g (z - b))             (..., f)   low_rank_at = projection
        v_down = m B_down + e * a                                (..., d)

    With gain `norm`, k2 = l2 = 0. Gain `state` writes the norm's own formula instead of its first order,

        sigma = exp(b0 + u . (z - b))    q = (1 + 2 sigma <zhat, a>/d + sigma^2 |a|^2/d)^(-1/2)
        g     = k0 (q - 1)               w = sigma q

    where sigma estimates 1 / rms(h), the one number about h that z does not show, from z itself; k0 = 1 is that formula.

    zhat is z without the norm's weight and bias, b that bias (zero for RMSNorm; the norm's denominator scales
    zhat, never the bias). For LayerNorm `a` is centred first, except in e * a: the residual stream takes the mean
    too. With key `tied` or `learned`, m becomes (x C) * m with C = A or a matrix of its own. `exact` sets
    v_t = W_t (Norm2(h + a) - z) and v_down = a and has no parameters.

    | parameter                    | shape        | before calibration            |
    |------------------------------|--------------|-------------------------------|
    | A                            | (d, r)       | normal, std 1/sqrt(d)         |
    | B_in, B_gate, B_up, B_down   | (r, d or f)  | zero                          |
    | C_in, C_gate, C_up, C_down   | (in, r)      | normal, std 1/sqrt(in)        |
    | c                            | (d,)         | zero; one where MLP reads h+a |
    | e                            | (d,)         | one                           |
    | gain (k0, k1, k2)            | (1,) to (3,) | zero                          |
    | carry_gain (l1, l2)          | (2,) or (1,) | zero                          |
    | log_scale, scale_direction   | (1,), (d,)   | zero                          |

    Args:
        spec: the options and sizes.
        norm_weight: (d,) weight of Norm2, None for one without. norm_bias: (d,) its bias or None.
        like: gives dtype and device where there is no norm_weight. seed: of the random start; None for torch's own state.
    """

    def __init__(
        self,
        spec: ComponentSpec,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        like: Tensor | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        self.spec = spec
        d, like = spec.hidden_size, like if norm_weight is None else norm_weight
        self._new: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
        device = torch.device(self._new.get("device", "cpu"))
        generator = None if seed is None or device.type == "meta" else torch.Generator(device).manual_seed(seed)
        inverse = None
        if norm_weight is not None:
            inverse = norm_weight / (norm_weight.square() + NORM_WEIGHT_EPSILON)
        self.norm_inverse: Tensor | None
        self.norm_bias: Tensor | None
        self.register_buffer("norm_inverse", inverse, persistent=False)
        self.register_buffer("norm_bias", norm_bias, persistent=False)
        names = self._add_low_rank(generator) if spec.has_low_rank else ()
        down = tuple(name for name in names if name == "down")
        self._low_rank_sites = {"input": tuple(name for name in names if name != "down"), "down": down}
        reads_attention = bool(spec.input_projections) and spec.reads != "h"
        self.has_carry = spec.carry == "diagonal" and reads_attention
        self.has_gain = spec.gain != "none" and spec.carry != "exact" and reads_attention and spec.reads != "h + a"
        if self.has_carry:
            self.c = nn.Parameter(torch.full((d,), float(spec.reads == "h + a"), **self._new))
        if spec.carry == "diagonal" and "down" in spec.projections:
            self.e = nn.Parameter(torch.ones(d, **self._new))
        if self.has_gain and spec.gain == "state":
            self.gain = nn.Parameter(torch.zeros(1, **self._new))
            self.log_scale = nn.Parameter(torch.zeros(1, **self._new))
            self.scale_direction = nn.Parameter(torch.zeros(d, **self._new))
        elif self.has_gain:
            num_features = {"norm": 1, "overlap": 2}[spec.gain]
            self.gain = nn.Parameter(torch.zeros(1 + num_features, **self._new))
            if self.has_carry:
                self.carry_gain = nn.Parameter(torch.zeros(num_features, **self._new))

    def _add_low_rank(self, generator: torch.Generator | None) -> tuple[str, ...]:
        spec, d, f = self.spec, self.spec.hidden_size, self.spec.intermediate_size
        sites = {}
        if spec.input_projections and spec.low_rank_at == "input":
            sites["in"] = (d, d)
        elif spec.input_projections:
            sites |= dict.fromkeys(spec.input_projections, (d, f))
        if "down" in spec.projections:
            sites["down"] = (f, d)
        self.A = nn.Parameter(torch.randn(d, spec.rank, generator=generator, **self._new) / d**0.5)
        for name, (size_in, size_out) in sites.items():
            self.register_parameter(f"B_{name}", nn.Parameter(torch.zeros(spec.rank, size_out, **self._new)))
            if spec.key == "learned":
                matrix = torch.randn(size_in, spec.rank, generator=generator, **self._new) / size_in**0.5
                self.register_parameter(f"C_{name}", nn.Parameter(matrix))
        return tuple(sites)

    # -- the forward pass ------------------------------------------------------------------------------------------

    def forward(
        self,
        attention: Tensor,
        inputs: Tensor,
        site: str,
        *,
        modulation: Tensor | None = None,
        exact_input: Tensor | None = None,
    ) -> InputValues | Tensor | None:
        """The value at one site of the MLP; both go through `__call__`, so that sharding hooks fire.

        Args:
            attention: a (..., d). inputs: z (..., d) at site "input", i (..., f) at site "down".
            site: "input" -> `InputValues` for gate and up; "down" -> v_down (..., d), or None when not targeted.
            modulation: m of an earlier call on the same tokens, to save a product.
            exact_input: Norm2(h + a) (..., d), needed by carry "exact" at site "input".
        """
        if site == "input":
            return self._input_values(attention, inputs, exact_input)
        value = self._down_value(attention, inputs, modulation)
        return None if value is None else _cast(value * _has_key(inputs, value), attention.dtype)

    def _input_values(self, attention: Tensor, z: Tensor, exact_input: Tensor | None) -> InputValues:
        spec, dtype = self.spec, z.dtype
        if not spec.input_projections:
            return InputValues()
        if spec.carry == "exact":
            if exact_input is None:
                raise ValueError("carry 'exact' needs exact_input, Norm2(h + a)")
            return InputValues(shift=(exact_input - z) * _has_key(z, z))
        m = self.modulation(attention)
        shift, mask = self.keyed_shift(attention, z), _has_key(z, z)
        values = {}
        if m is not None:
            for name, (b, c) in self.low_rank_factors("input").items():
                u = m if c is None else (_cast(z, m.dtype) @ c) * m
                if name == "in":
                    shift = u @ b if shift is None else shift + u @ b
                else:
                    values[name] = _cast(u @ b * mask, dtype)
        return InputValues(None if shift is None else _cast(shift * mask, dtype), values, m)

    def _down_value(self, attention: Tensor, inputs: Tensor, m: Tensor | None) -> Tensor | None:
        spec = self.spec
        if "down" not in spec.projections:
            return None
        if spec.carry == "exact":
            return attention
        value = None
        if spec.carry == "diagonal":
            value = self.e * attention
        if spec.has_low_rank:
            m = self._modulation(attention) if m is None else m
            b, c = self.low_rank_factors("down")["down"]
            low_rank = (m if c is None else (_cast(inputs, m.dtype) @ c) * m) @ b
            value = low_rank if value is None else value + low_rank
        return value

    # -- its pieces ------------------------------------------------------------------------------------------------

    def features(self, attention: Tensor, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(a centred where the norm centres, (..., d); z - b, (..., d); phi), float32 or better.

        phi holds |a|^2/d and, but for gain `norm`, <zhat, a>/d, each (..., 1); it is empty without a gain.
        """
        own = next(iter(self._parameters.values()), None)
        dtype = _wide(attention if own is None else own)
        a, z = self.centered(_cast(attention, dtype)), _cast(z, dtype)
        z = z if self.norm_bias is None else z - self.norm_bias
        if not self.has_gain:
            return a, z, ()
        # Few kinds of kernels: in a decoding step each comes from cold memory, at 20 to 30 microseconds.
        per_channel = 1 / a.shape[-1]
        size = (a * a).sum(-1, keepdim=True) * per_channel
        if self.spec.gain == "norm":
            return a, z, (size,)
        overlap = a if self.norm_inverse is None else a * self.norm_inverse
        return a, z, (size, (z * overlap).sum(-1, keepdim=True) * per_channel)

    def gains(self, z: Tensor, phi: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(g, w), each (..., 1): the factor on z - b and the one on c * a."""
        if self.spec.gain == "state":
            size, overlap = phi
            scale = torch.exp((z * self.scale_direction).sum(-1, keepdim=True) + self.log_scale)
            norm_ratio = (scale * torch.add(scale * size, overlap, alpha=2) + 1).clamp_min(1e-4).rsqrt()
            return self.gain * (norm_ratio - 1), scale * norm_ratio
        features = torch.cat(phi, -1)
        g = self.gain[0] + (features * self.gain[1:]).sum(-1, keepdim=True)
        w = 1 + (features * self.carry_gain).sum(-1, keepdim=True) if self.has_carry else torch.ones_like(g)
        return g, w

    def centered(self, attention: Tensor) -> Tensor:
        """a (..., d), its mean taken out where Norm2 would take it out."""
        return attention - attention.mean(-1, keepdim=True) if self.spec.centered else attention

    def modulation(self, attention: Tensor) -> Tensor | None:
        """m = s tanh(a A), (..., r), or None without a low-rank part."""
        return self._modulation(attention) if self.spec.has_low_rank else None

    def _modulation(self, attention: Tensor) -> Tensor:
        to_rank = self.A
        modulation = torch.tanh(self.centered(_cast(attention, to_rank.dtype)) @ to_rank)
        return modulation if self.spec.modulation_scale == 1 else self.spec.modulation_scale * modulation

    def keyed_shift(self, attention: Tensor, z: Tensor) -> Tensor | None:
        """w (c * a) + g (z - b), (..., d): what carry and gain add to z; None when both are off."""
        if not self.has_carry and not self.has_gain:
            return None
        a, z, phi = self.features(attention, z)
        if not self.has_gain:
            return self.c * a
        g, w = self.gains(z, phi)
        return g * z if not self.has_carry else torch.addcmul(g * z, w, self.c * a)

    def low_rank_factors(self, site: str) -> dict[str, tuple[Tensor, Any]]:
        """{"in" | "gate" | "up" | "down": (B (r, out), C (in, r) or None for the input key)} of one site."""
        return {name: (getattr(self, f"B_{name}"), self._key_matrix(name)) for name in self._low_rank_sites[site]}

    def _key_matrix(self, name: str) -> Tensor | None:
        if self.spec.key == "input":
            return None
        return self.A if self.spec.key == "tied" else getattr(self, f"C_{name}")

    # -- dW itself, for norms and inspection -------------------------------------------------------------------------

    def weight_deltas(
        self,
        attention: Tensor,
        inputs: Tensor,
        site: str,
        products: dict[str, Callable[[Tensor], Tensor]],
        exact_input: Tensor | None = None,
    ) -> dict[str, WeightDelta]:
        """dW of every targeted projection at a site, in factors.

        `products[t]` maps (..., d) to W_t applied to it, without bias, for t in gate and up; arguments as `forward`.
        """
        spec = self.spec
        mask = _has_key(inputs, inputs)
        if site == "down":
            if "down" not in spec.projections:
                return {}
            factors = None if spec.key == "input" or not spec.has_low_rank else self.low_rank_factors("down")["down"]
            if factors is None:
                down = self._down_value(attention, inputs, None)
                return {"down": WeightDelta(torch.zeros_like(attention) if down is None else down * mask, inputs)}
            value = self.e * attention * mask if spec.carry == "diagonal" else torch.zeros_like(attention)
            return {"down": WeightDelta(value, inputs, (self._modulation(attention), factors[1], factors[0]))}
        return {t: self._input_delta(t, attention, inputs, products[t], exact_input) for t in spec.input_projections}

    def _input_delta(
        self, t: str, attention: Tensor, z: Tensor, product: Callable[[Tensor], Tensor], exact_input: Tensor | None
    ) -> WeightDelta:
        spec = self.spec
        if spec.key == "input" or not spec.has_low_rank:
            out = self._input_values(attention, z, exact_input)
            value = None if out.shift is None else product(out.shift)
            if t in out.values:
                value = out.values[t] if value is None else value + out.values[t]
            return WeightDelta(z.new_zeros(*z.shape[:-1], spec.intermediate_size) if value is None else value, z)
        shift = self.keyed_shift(attention, z)
        value = z.new_zeros(*z.shape[:-1], spec.intermediate_size) if shift is None else product(shift * _has_key(z, z))
        factors = self.low_rank_factors("input")
        b, c = factors.get("in") or factors[t]
        return WeightDelta(value, z, (self._modulation(attention), c, product(b) if "in" in factors else b))


def _has_key(x: Tensor, like: Tensor) -> Tensor:
    """(..., 1) one where |x|^2 > 0 (so that the input key exists), else zero, in `like`'s dtype."""
    x = x.detach() if x.requires_grad else x
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    return _cast(norm.sign(), like.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """x's dtype, float32 at least."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.promote_types(x.dtype, torch.float32)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype: `x.to` costs a decoding step time even where it has nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)
