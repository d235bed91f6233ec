"""The closed-form fit of one block's component, from h and a that `npt.equivalence.calibration` shows it batch by batch.

The formulas are in `npt.equivalence.closed_form` and `npt.equivalence.scale`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npt.block.component import NPComponent
from npt.block.layer import BlockRecord, NPTLayer
from npt.block.modes import Mode
from npt.common.precision import wide_dtype
from npt.common.processes import gather, total
from npt.common.sharded import gathered
from npt.equivalence.closed_form import (
    alternate,
    channel_products,
    outlier_cutoff,
    outlier_weights,
    reduced_rank_regression,
    token_product,
    token_sizes,
)
from npt.equivalence.parts import Part, TextPart, held, shift_of, slices
from npt.equivalence.scale import fit_scale
from npt.equivalence.spill import Spill
from npt.errors import NPTError

#: Tokens kept per block for gain and carry: at least so many, and so many per channel of the hidden state, each of which has a
#: coefficient in the regression of the norm.
CHUNK_TOKENS, CHUNK_TOKENS_PER_CHANNEL = 8_192, 4
#: With hidden units, which learn from more: up to so many, as long as h and a take no more than so many bytes. Nothing here
#: depends on which other blocks are converted: blocks fitted by separate jobs are those of one.
UNIT_TOKENS, UNIT_BYTES = 65_536, 2**27
#: Tokens on which a block's error is measured.
PROBE_TOKENS = 512


def first_tokens(layers: Sequence[NPTLayer]) -> int:
    """Returns how many tokens per block `calibrate` keeps for gain and carry, in a temporary file."""
    hidden, weight = layers[0].shape("up")[0], layers[0].weight
    least = max(CHUNK_TOKENS, CHUNK_TOKENS_PER_CHANNEL * hidden)
    if all(layer.own.hidden_units is None for layer in layers):
        return least
    itemsize = weight.dtype.itemsize if weight.is_floating_point() else 4
    room: int = UNIT_BYTES // (2 * hidden * itemsize)
    return max(least, min(UNIT_TOKENS, room))


def first_bytes(layers: Sequence[NPTLayer], tokens: int, at_once: int, dtype: torch.dtype) -> int:
    """Returns the bytes of the temporary files of all processes together.

    Args:
        tokens: of the text. at_once: of a batch, of all processes together; the last one is kept whole. dtype: of h and a.
    """
    return len(layers) * 2 * layers[0].shape("up")[0] * dtype.itemsize * min(tokens, first_tokens(layers) + at_once)


class BlockFit:
    """Accumulates what one block's fit needs, batch by batch."""

    def __init__(self, layer: NPTLayer, chunk_tokens: int):
        self.layer, self.chunk_tokens = layer, chunk_tokens
        self.component = layer.own
        self.dtype = next(self.component.parameters(), torch.empty(0)).dtype
        self.component.to(wide_dtype(self.dtype))
        self.chunk = Spill()  # this process's share of the first chunk, for gain and carry
        self.later: list[Part] = []  # batches beyond the chunk, from the round in which other processes completed it
        self.tokens = 0
        self.cutoff: Tensor | None = None
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.total_weight = 0.0

    def see(self, record: BlockRecord, mask: Tensor, text: TextPart | None = None) -> None:
        """Takes one batch of (batch, tokens, d) hidden states; mask (batch, tokens) marks the real ones.

        text: its place; None in a single process, where it follows the batch before.
        """
        unpadded = bool(mask.all())
        h, a = (x.flatten(0, 1) if unpadded else x[mask] for x in (record.hidden_states, record.attention))
        text = TextPart(self.tokens, self.tokens + len(h)) if text is None else text
        self.tokens = text.end
        part = Part(text.start, h, a) if text.counts else Part(text.start, h[:0], a[:0])
        if self.cutoff is not None:
            self._accumulate([part], self.cutoff)
            return
        if text.start < self.chunk_tokens:
            self.chunk.add(part)
        else:
            self.later.append(part)
        if text.end >= self.chunk_tokens:
            self._fit_chunk()

    def finish(self) -> dict[str, float]:
        """Solves for the low-rank part and measures the block's error before and after."""
        with gathered(self.layer.get_base_layer()):
            if self.cutoff is None:
                self._fit_chunk()
            weight = torch.tensor(self.total_weight, dtype=torch.float64)
            if isinstance(self.gram, Tensor) and isinstance(self.cross, Tensor):
                gram, cross = total(self.gram), total(self.cross)
                _fit_low_rank(self.layer, self.component, gram, cross, float(total(weight)))
            self.component.to(self.dtype)
            error = self._update_error()
        for name, parameter in self.component.named_parameters():
            if not parameter.isfinite().all():
                raise NPTError(
                    f"calibration of block {self.layer.index} gave a non-finite {name}: the text is degenerate or the "
                    "model overflows; use more varied calibration text or model.dtype=float32"
                )
        return {"error_before": self.error_before, "error_after": error, "tokens": self.tokens}

    def _fit_chunk(self) -> None:
        chunk, later = self.chunk.parts() or [self.later[0].cut(0)], self.later
        self.chunk, self.later = Spill(), []
        h, a = self._choose_probe(chunk)
        self.probe = (h, a, self.layer.update_from(h[None], a[None], Mode.EXACT)[0])
        self.error_before = self._update_error()
        sizes = torch.cat([token_sizes(shift_of(self.layer, h, a)[1], a) for _, h, a, _ in slices(chunk)])
        self.cutoff = outlier_cutoff(torch.cat(gather(sizes)))
        if self.component.spec.input_projections:
            fit_gain_and_carry(self.layer, self.component, chunk, self.cutoff)
        self._accumulate([*chunk, *later], self.cutoff)

    def _choose_probe(self, chunk: list[Part]) -> tuple[Tensor, Tensor]:
        """h and a, (`PROBE_TOKENS`, d) each, of tokens from all processes' chunks, in the order of the text."""
        held_tokens = held(chunk)
        # Not every n-th token: that may be the first of every text.
        mask = torch.randperm(held_tokens, generator=torch.Generator().manual_seed(0)) < PROBE_TOKENS
        # Places, not the mask: npt memory runs this on shapes alone, where nothing knows how many a mask picks.
        places = [mask[part.start : part.start + len(part.h)].nonzero().flatten() for part in chunk]
        picked = [part.at(i.to(part.h.device)).loaded()[1:3] for part, i in zip(chunk, places, strict=True)]
        order = torch.cat(gather(torch.cat([i + part.start for i, part in zip(places, chunk, strict=True)]))).argsort()
        h, a = (torch.cat(gather(torch.cat(parts)))[order.to(parts[0].device)] for parts in zip(*picked, strict=True))
        return h, a

    def _accumulate(self, chunk: list[Part], cutoff: Tensor) -> None:
        """Adds tokens to S, T and the total weight."""
        component, spec = self.component, self.component.spec
        parts = _low_rank_targets(component)
        if not spec.has_low_rank or spec.key != "input" or not parts:
            return
        for _, h, a, _ in slices(chunk):
            z, delta = shift_of(self.layer, h, a)
            weights = outlier_weights(token_sizes(delta, a), cutoff)
            shift = component.keyed_shift(a, z, component.norm_scale(h, z)) if "in" in parts else None
            rest = {"in": delta if shift is None else delta - shift, "down": a.to(z.dtype)}
            features = component.centered(a.to(z.dtype))
            weighted = weights.to(z.dtype) * features
            self.total_weight += float(weights.sum())
            self.gram = self.gram + token_product(weighted, features)
            self.cross = self.cross + torch.cat([token_product(weighted, rest[name]) for name in parts], -1)

    def _update_error(self) -> float:
        h, a, target = self.probe
        update = self.layer.update_from(h[None], a[None])[0]
        return float((update - target).double().norm() / target.double().norm().clamp_min(1e-300))


def fit_gain_and_carry(layer: NPTLayer, component: NPComponent, chunk: list[Part], cutoff: Tensor) -> None:
    """Weighted least squares of D on gain and carry, over h and a of all processes' chunks.

    Per channel, gain and carry can write k . Z + c (A_0 + l . A_1...), where Z is z - b and A is a, each times a few
    numbers per token. The fit needs only the products of Z, A and D with one another, summed over tokens.
    """
    if component.has_gain and component.spec.gain == "state":
        fit_scale(layer, component, chunk, cutoff)
    gram = torch.zeros(())
    for _, h, a, _ in slices(chunk):
        z, delta = shift_of(layer, h, a)
        weights = outlier_weights(token_sizes(delta, a), cutoff).to(z.dtype)
        of_z, of_a = _basis(component, *component.features(a, z, component.norm_scale(h, z)))
        gram = gram + channel_products([*of_z, *of_a, delta], weights)
    if not of_z and not of_a:
        return
    gain, slope, c = alternate(total(gram), len(of_z), len(of_a))
    if component.has_carry:
        component.c.copy_(c)
    if component.has_gain:
        component.gain.copy_(gain)
    if component.has_gain and len(slope):
        component.carry_gain.copy_(slope)


def _basis(component: NPComponent, a: Tensor, z: Tensor, phi: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns (Z, A), the columns that the gain's and the carry's coefficients multiply, each (tokens, d)."""
    if not component.has_gain:
        return [], [a] if component.has_carry else []
    if component.spec.gain in ("state", "denominator"):
        component.gain.fill_(1)
        g, w = component.gains(z, phi)
        return [g * z], [w * a] if component.has_carry else []
    of_z, of_a = ([x, *(feature * x for feature in phi)] for x in (z, a))
    return of_z, of_a if component.has_carry else []


def _low_rank_targets(component: NPComponent) -> list[str]:
    """The targets of the low-rank part: "in" for gate and up; "down" where no carry brings a itself."""
    spec = component.spec
    down = "down" in spec.projections and spec.carry != "diagonal"
    return ["in"] * bool(spec.input_projections) + ["down"] * down


def _fit_low_rank(layer: NPTLayer, component: NPComponent, gram: Tensor, cross: Tensor, weight: float) -> None:
    """Sets A and B from S = a^T a (d, d) and T = a^T R (d, d per target) over tokens whose weights sum to `weight`."""
    spec = component.spec
    if not float(gram.diagonal().sum()) > 0:
        return
    a_matrix, fitted = reduced_rank_regression(gram, cross, weight, spec.rank)
    component.A.copy_(a_matrix)
    parts = (fitted / spec.modulation_scale).split(spec.hidden_size, -1)
    found = dict(zip(_low_rank_targets(component), parts, strict=True))
    for name, (b, _) in component.low_rank_factors("input").items():
        b.copy_(found["in"] if name == "in" else layer.product(name)(found["in"].to(layer.weight.dtype)))
    if "down" in spec.projections:
        component.low_rank_factors("down")["down"][0].copy_(found.get("down", torch.zeros(())))
