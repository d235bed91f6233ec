"""The equation of the weight delta: the neuro-plastic component of one block, without any model around it.

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
per token, except by `WeightDelta.matrix`, on request, for one token. W_t is never multiplied here: a term inside
W_t (...) is added to z, and reaches gate and up through their own weights (`MLP_INPUT`). The values v are the equations of
`NPComponent` below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from npt.block.scale import LARGEST_LOG_SCALE, HiddenUnits, norm_ratio, scale_of_norm
from npt.block.spec import ComponentSpec
from npt.block.terms import MLP_INPUT, InputValues, Term, has_key, sums
from npt.common.precision import cast, wide_dtype

if TYPE_CHECKING:  # and in tests, which check the shapes
    from jaxtyping import Float

#: Keeps the division by the norm's weight finite where a weight is (close to) zero.
NORM_WEIGHT_EPSILON = 1e-6

T = TypeVar("T")


class NPComponent(nn.Module):
    """Generates dW from the attention output of the same token. Equations, with the shapes above:

        m      = s tanh(a A)                                     (..., r)
        g      = k0 + k1 |a|^2/d + k2 <zhat, a>/d                (..., 1)   gain
        w      = 1  + l1 |a|^2/d + l2 <zhat, a>/d                (..., 1)   gain on the carry
        v_t    = W_t (m B_in + w (c * a) + g (z - b))            (..., f)   low_rank_at = input
        v_t    = m B_t + W_t (w (c * a) + g (z - b))             (..., f)   low_rank_at = projection
        v_down = m B_down + e * a                                (..., d)

    With gain `norm`, k2 = l2 = 0. Gain `state` writes the norm's own formula instead of its first order,

        sigma = exp(b0 + u . (z - b) + gelu((z - b) W + b1) . v)
        q     = (1 + 2 sigma <zhat, a>/d + sigma^2 |a|^2/d)^(-1/2)
        g     = k0 (q - 1)               w = sigma q

    where sigma estimates 1 / rms(h), the one number about h that z does not show, from z itself; k0 = 1 is that formula.
    W, b1 and v are `gain_units` = n hidden units, left out where n is 0.
    Gain `denominator` reads that number: sigma is one over Norm2's own denominator at this token. With c = the norm's weight,
    k0 = 1 and e = 1, its start, the component is then exact.

    zhat is z without the norm's weight and bias, b that bias (zero for RMSNorm; the norm's denominator scales
    zhat, never the bias). For LayerNorm `a` is centred first, except in e * a: the residual stream takes the mean
    too. With key `tied` or `learned`, m becomes (x C) * m with C = A or a matrix of its own. `exact` sets
    v_t = W_t (Norm2(h + a) - z) and v_down = a and has no parameters.

    | parameter                    | shape        | before calibration            |
    |------------------------------|--------------|-------------------------------|
    | A                            | (d, r)       | normal, std 1/sqrt(d)         |
    | B_in, B_gate, B_up, B_down   | (r, d or f)  | zero                          |
    | C_in, C_gate, C_up, C_down   | (in, r)      | normal, std 1/sqrt(in)        |
    | c                            | (d,)         | zero; one where MLP reads h+a;|
    |                              |              | the norm's weight where the   |
    |                              |              | gain is `denominator`         |
    | e                            | (d,)         | one                           |
    | gain (k0, k1, k2)            | (1,) to (3,) | zero; one for `denominator`   |
    | carry_gain (l1, l2)          | (2,) or (1,) | zero                          |
    | log_scale b0, scale_direction u | (1,), (d,) | zero                         |
    | scale_hidden W               | (d, n)       | normal, std 1/sqrt(d)         |
    | scale_bias b1, scale_out v   | (n,), (n,)   | zero                          |

    Args:
        spec: the options and sizes.
        norm_weight: (d,) weight of Norm2, None for one without.
        norm_bias: (d,) its bias or None.
        like: gives dtype and device where there is no norm_weight.
        seed: of the random start; None for torch's own state.
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
            if spec.gain == "denominator":  # exact, and zero where a channel's weight is, which z does not show
                inverse = torch.where(norm_weight == 0, norm_weight, 1 / norm_weight)
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
        self.reads_denominator = self.has_gain and spec.gain == "denominator"
        if self.has_carry:
            start = torch.full((d,), float(spec.reads == "h + a" or self.reads_denominator), **self._new)
            self.c = nn.Parameter(start * norm_weight if self.reads_denominator and norm_weight is not None else start)
        if spec.carry == "diagonal" and "down" in spec.projections:
            self.e = nn.Parameter(torch.ones(d, **self._new))
        if self.reads_denominator:
            self.gain = nn.Parameter(torch.ones(1, **self._new))
        elif self.has_gain and spec.gain == "state":
            self.gain = nn.Parameter(torch.zeros(1, **self._new))
            self.log_scale = nn.Parameter(torch.zeros(1, **self._new))
            self.scale_direction = nn.Parameter(torch.zeros(d, **self._new))
            self._add_hidden_units(generator)
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
            sites = dict.fromkeys(spec.input_projections, (d, f))
        if "down" in spec.projections:
            sites["down"] = (f, d)
        self.A = nn.Parameter(torch.randn(d, spec.rank, generator=generator, **self._new) / d**0.5)
        for name, (size_in, size_out) in sites.items():
            self.register_parameter(f"B_{name}", nn.Parameter(torch.zeros(spec.rank, size_out, **self._new)))
            if spec.key == "learned":
                matrix = torch.randn(size_in, spec.rank, generator=generator, **self._new) / size_in**0.5
                self.register_parameter(f"C_{name}", nn.Parameter(matrix))
        return tuple(sites)

    def _add_hidden_units(self, generator: torch.Generator | None) -> None:
        d, n = self.spec.hidden_size, self.spec.gain_units
        if n:
            self.scale_hidden = nn.Parameter(torch.randn(d, n, generator=generator, **self._new) / d**0.5)
            self.scale_bias = nn.Parameter(torch.zeros(n, **self._new))
            self.scale_out = nn.Parameter(torch.zeros(n, **self._new))

    # -- the two entry points ----------------------------------------------------------------------------------------

    def input_values(
        self,
        attention: Float[Tensor, "*tokens d"],
        z: Float[Tensor, "*tokens d"],
        exact_input: Float[Tensor, "*tokens d"] | None = None,
        scale: Float[Tensor, "*tokens 1"] | None = None,
    ) -> InputValues:
        """The values of gate and up.

        Args:
            attention: a.
            z: the MLP's input.
            exact_input: Norm2(h + a), which carry "exact" needs.
            scale: sigma of gain "denominator", see `norm_scale`.

        Raises:
            ValueError: carry "exact" without `exact_input`, or gain "denominator" without `scale`.
        """
        values: InputValues = self(self._input_values, attention, z, exact_input, scale)
        return values

    def down_value(
        self,
        attention: Float[Tensor, "*tokens d"],
        inner: Float[Tensor, "*tokens f"],
        modulation: Float[Tensor, "*tokens r"] | None = None,
    ) -> Float[Tensor, "*tokens d"] | None:
        """v_down, or None where down receives no delta.

        Args:
            attention: a.
            inner: i, the input of down.
            modulation: m of `input_values` on the same tokens, to save a product.
        """
        value: Tensor | None = self(self._down_value, attention, inner, modulation)
        return value

    def forward(self, compute: Callable[..., T], *inputs: Tensor | None) -> T:
        """Runs an entry point inside the module's call, so that hooks on the component (sharding) fire around it."""
        return compute(*inputs)

    def _input_values(
        self, attention: Tensor, z: Tensor, exact_input: Tensor | None, scale: Tensor | None
    ) -> InputValues:
        if not self.spec.input_projections:
            return InputValues()
        m = self.modulation(attention)
        found, mask = sums(self.input_terms(attention, z, m, exact_input, scale)), has_key(z, z)
        values = {place: cast(value * mask, z.dtype) for place, value in found.items()}
        return InputValues(values.pop(MLP_INPUT, None), values, m)

    def _down_value(self, attention: Tensor, inner: Tensor, m: Tensor | None) -> Tensor | None:
        value = sums(self.down_terms(attention, inner, m)).get("down")
        return None if value is None else cast(value * has_key(inner, value), attention.dtype)

    # -- the terms, of which both the forward and dW (`npt.block.deltas`) are made -------------------------------------------

    def input_terms(
        self, attention: Tensor, z: Tensor, m: Tensor | None, exact_input: Tensor | None, scale: Tensor | None
    ) -> list[Term]:
        """The terms added to z, or to the outputs of gate and up."""
        if self.spec.carry == "exact":
            if exact_input is None:
                raise ValueError("carry 'exact' needs exact_input, Norm2(h + a)")
            return [Term(MLP_INPUT, exact_input - z)]
        shift = self.keyed_shift(attention, z, scale)
        return [*([] if shift is None else [Term(MLP_INPUT, shift)]), *self._low_rank_terms("input", z, m)]

    def down_terms(self, attention: Tensor, inner: Tensor, m: Tensor | None) -> list[Term]:
        """The terms added to the output of down."""
        if "down" not in self.spec.projections:
            return []
        if self.spec.carry == "exact":
            return [Term("down", attention)]
        carried = [Term("down", self.e * attention)] if self.spec.carry == "diagonal" else []
        m = self.modulation(attention) if m is None else m  # after the carry, in whose order gradients are summed
        return [*carried, *self._low_rank_terms("down", inner, m)]

    def _low_rank_terms(self, site: str, x: Tensor, m: Tensor | None) -> list[Term]:
        """m B on the input key, or ((x C) * m) B on a key of its own."""
        if m is None:
            return []
        found = []
        for name, (b, c) in self.low_rank_factors(site).items():
            u = m if c is None else (cast(x, m.dtype) @ c) * m
            found.append(Term(MLP_INPUT if name == "in" else name, u @ b, None if c is None else (m, c, b)))
        return found

    # -- its pieces ------------------------------------------------------------------------------------------------

    def norm_scale(
        self, hidden_states: Float[Tensor, "*tokens d"], z: Float[Tensor, "*tokens d"]
    ) -> Float[Tensor, "*tokens 1"] | None:
        """sigma, one over Norm2's denominator, where Norm2 read h and wrote z; None where no gain reads it.

        Zero at h = 0.
        """
        if not self.reads_denominator:
            return None
        dtype = wide_dtype(hidden_states.dtype)
        h, z = self.centered(cast(hidden_states, dtype)), cast(z, dtype)
        return scale_of_norm(h, z if self.norm_bias is None else z - self.norm_bias, self.norm_inverse)

    def features(
        self,
        attention: Float[Tensor, "*tokens d"],
        z: Float[Tensor, "*tokens d"],
        scale: Float[Tensor, "*tokens 1"] | None = None,
    ) -> tuple[Float[Tensor, "*tokens d"], Float[Tensor, "*tokens d"], tuple[Float[Tensor, "*tokens 1"], ...]]:
        """(a, centred where the norm centres; z - b; phi), float32 or better.

        phi holds |a|^2/d and, but for gain `norm`, <zhat, a>/d, and for `denominator` sigma, which is `scale`; it is empty
        without a gain.
        """
        own: Any = (*self._parameters.values(), attention)[0]
        dtype = wide_dtype(own.dtype)
        a, z = self.centered(cast(attention, dtype)), cast(z, dtype)
        z = z if self.norm_bias is None else z - self.norm_bias
        if not self.has_gain:
            return a, z, ()
        # Few distinct kernels: while decoding, the first call of each costs 20 to 30 microseconds.
        per_channel = 1 / a.shape[-1]
        size = (a * a).sum(-1, keepdim=True) * per_channel
        if self.spec.gain == "norm":
            return a, z, (size,)
        overlap = a if self.norm_inverse is None else a * self.norm_inverse
        phi = size, (z * overlap).sum(-1, keepdim=True) * per_channel
        if not self.reads_denominator:
            return a, z, phi
        if scale is None:
            raise ValueError("gain 'denominator' needs scale, one over Norm2's denominator")
        return a, z, (*phi, cast(scale, dtype))

    def gains(
        self, z: Float[Tensor, "*tokens d"], phi: tuple[Float[Tensor, "*tokens 1"], ...]
    ) -> tuple[Float[Tensor, "*tokens 1"], Float[Tensor, "*tokens 1"]]:
        """(g, w): the factor on z - b and the one on c * a. z: z - b, as `features` gives it."""
        if self.spec.gain in ("state", "denominator"):
            size, overlap, *read = phi
            scale = read[0] if read else self.estimated_log_scale(z).exp()
            ratio = norm_ratio(scale, size, overlap, least=1e-12 if read else 1e-4)
            return self.gain * (ratio - 1), scale * ratio
        features = torch.cat(phi, -1)
        g = self.gain[0] + (features * self.gain[1:]).sum(-1, keepdim=True)
        w = 1 + (features * self.carry_gain).sum(-1, keepdim=True) if self.has_carry else torch.ones_like(g)
        return g, w

    def estimated_log_scale(self, z: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens 1"]:
        """log sigma of gain `state`. z: z - b, as `features` gives it."""
        linear = (z * self.scale_direction).sum(-1, keepdim=True) + self.log_scale
        units = self.hidden_units
        return (linear if units is None else linear + units(z)).clamp_max(LARGEST_LOG_SCALE)

    @property
    def hidden_units(self) -> HiddenUnits | None:
        """The non-linear part of the estimate of log sigma."""
        own = self._parameters
        if "scale_hidden" not in own:
            return None
        return HiddenUnits(self.scale_hidden, self.scale_bias, self.scale_out)

    def centered(self, attention: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        """a, its mean taken out where Norm2 would take it out."""
        return attention - attention.mean(-1, keepdim=True) if self.spec.centered else attention

    def modulation(self, attention: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens r"] | None:
        """m = s tanh(a A), or None without a low-rank part."""
        if not self.spec.has_low_rank:
            return None
        to_rank = self.A
        modulation = torch.tanh(self.centered(cast(attention, to_rank.dtype)) @ to_rank)
        return modulation if self.spec.modulation_scale == 1 else self.spec.modulation_scale * modulation

    def keyed_shift(
        self,
        attention: Float[Tensor, "*tokens d"],
        z: Float[Tensor, "*tokens d"],
        scale: Float[Tensor, "*tokens 1"] | None = None,
    ) -> Float[Tensor, "*tokens d"] | None:
        """w (c * a) + g (z - b): the part of the shift that carry and gain make; None when both are off."""
        if not self.has_carry and not self.has_gain:
            return None
        a, z, phi = self.features(attention, z, scale)
        if not self.has_gain:
            return self.c * a
        g, w = self.gains(z, phi)
        return g * z if not self.has_carry else torch.addcmul(g * z, w, self.c * a)

    def low_rank_factors(self, site: str) -> dict[str, tuple[Tensor, Tensor | None]]:
        """{"in" | "gate" | "up" | "down": (B (r, out), C (in, r) or None for the input key)} of one site."""
        own: dict[str, Any] = self._parameters  # past nn.Module's lookup, which a decoding step would feel
        return {name: (own[f"B_{name}"], self._key_matrix(own, name)) for name in self._low_rank_sites[site]}

    def _key_matrix(self, own: Mapping[str, Tensor], name: str) -> Tensor | None:
        return None if self.spec.key == "input" else own["A" if self.spec.key == "tied" else f"C_{name}"]
