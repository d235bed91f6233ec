"""Closed-form calibration: one pass of the frozen model over text, no gradient step (docs/maths.md, section 4).

Per converted block, with h and a from the unconverted model and D = Norm2(h + a) - z:

1. on a first chunk of tokens: gain and carry, least squares of D on what they can write;
2. over all text, in float64: S = a^T a and T = a^T R, where R is what step 1 leaves of D (and of a, for down);
3. a reduced-rank regression of R on a.

Tokens are weighted so that a few extreme ones (attention sinks, massive activations) cannot dominate the fit. The
formulas are in `npt.equivalence.closed_form`; this module passes the text and puts the solutions into the components.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from npt.block.component import NPComponent
from npt.block.layer import BlockRecord, NPTLayer
from npt.block.modes import Mode, running_as, watching
from npt.common.precision import wide_dtype
from npt.common.processes import gather, total, world
from npt.common.progress import tracked
from npt.common.sharded import full_tensor, gathered, like, same_everywhere
from npt.data.batches import with_mask
from npt.data.inputs import as_batches
from npt.equivalence.closed_form import (
    Regression,
    alternate,
    best_regression,
    channel_products,
    outlier_cutoff,
    outlier_weights,
    reduced_rank_regression,
    token_product,
    token_sizes,
)
from npt.errors import REMEDY, NPTError, RunError
from npt.tuner.checks import renew_record
from npt.tuner.converted import (
    ConvertedModel,
    active_layers,
    adapter_config,
    base_of,
    check_batch,
    context_length_of,
    device_of,
    eval_mode,
    run_backbone,
)
from npt.tuner.nonfinite import find_nonfinite

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Tokens kept per block for step 1: at least so many, and so many per channel of the hidden state, each of which has
#: a coefficient in the regression of the norm.
CHUNK_TOKENS, CHUNK_TOKENS_PER_CHANNEL = 8_192, 4
#: Tokens whose temporaries are in memory at once, and tokens on which a block's error is measured.
SLICE_TOKENS, PROBE_TOKENS = 1024, 512


@torch.no_grad()
def calibrate(
    model: ConvertedModel,
    batches: Any,
    *,
    tokenizer: Any = None,
    chunk_tokens: int | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Fits the active adapter of a converted model to the model it was made from, in place.

    Several processes share the batches, and their sums are added: the fit is that of one process. All call it with the
    same batches; a sharded model's inside `npt.common.sharded.through`.

    Args:
        model: a PEFT model with an active NPT adapter; its base is not changed.
        batches: of {"input_ids" (batch, tokens), "attention_mask" (the same; optional)}; padding is left out. Or what
            `npt.data.inputs` lists: text, with its `tokenizer`, in blocks of 256 tokens or of the model's context.
        chunk_tokens: tokens per block kept in memory for gain and carry; None for 8,192, or 4 d where that is more.
        progress: shows a bar.

    Returns:
        For each block, as `layer_<i>`, its error_before, error_after (of y - h, relative, root of summed squares) and tokens.

    Raises:
        NPTError: no text, text without a tokenizer or beyond the model's limits, or so degenerate that the fit is not finite.
        RunError: the model's own hidden states are not finite.
    """
    layers = [layer for layer in active_layers(model) if layer.own.spec.is_calibrated]
    batches = as_batches(batches, tokenizer, min(256, context_length_of(model) or 256), "calibrate(batches=...)")
    with _whole_components(layers):
        fits = {layer.index: BlockFit(layer, chunk_tokens or first_tokens(layer.shape("up")[0])) for layer in layers}
        seen = _collect(model, fits, batches, progress)
        if not seen:
            raise NPTError("calibration got no text: pass at least one batch with real tokens")
        logger.info("calibrating on %d tokens", seen)
        figures = {f"layer_{index}": fit.finish() for index, fit in fits.items()}
        # Two kinds of processors may solve the same equations to other last digits.
        same_everywhere({f"{layer.index}.{n}": p for layer in layers for n, p in layer.own.named_parameters()})
    renew_record(base_of(model), adapter_config(model))
    return figures


def _collect(
    model: ConvertedModel, fits: dict[int, BlockFit], batches: Iterable[Mapping[str, Tensor]], progress: bool
) -> int:
    """Shows the text to the fits, each process its share, and to the adapter's record. Returns all processes' tokens."""
    device, seen, (rank, count), record = device_of(model), 0, world(), adapter_config(model).text_record
    layers = [fit.layer for fit in fits.values()]

    def see(layer: NPTLayer, record: BlockRecord) -> None:
        fits[layer.index].see(record, mask, part)

    with eval_mode(model), running_as(active_layers(model), Mode.ORIGINAL), watching(layers, see):
        for group in _groups(tracked(batches, "Calibrating", progress, unit="batches"), count):
            texts = [with_mask(batch) for batch in group]
            for text in texts:
                check_batch(model, text["input_ids"], "calibration text")
                if record is not None:
                    record.add_batch(text)
            sizes = [int(text["attention_mask"].sum()) for text in texts]
            part = TextPart(seen + sum(sizes[:rank]), seen + sum(sizes), rank < len(group))
            seen += sum(sizes)
            text = {name: x.to(device) for name, x in texts[min(rank, len(group) - 1)].items() if name != "labels"}
            mask = text["attention_mask"].bool()
            if not run_backbone(model, text)[mask].isfinite().all():
                where = find_nonfinite(model, text)
                raise RunError(f"calibration, after {seen} tokens: hidden states are not finite, {where}; {REMEDY}")
    return seen


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


@contextmanager
def _whole_components(layers: list[NPTLayer]) -> Iterator[None]:
    """Puts whole components in the place of sharded ones; at the end, cuts the fitted values into the shards again."""
    before: list[tuple[NPTLayer, str, NPComponent]] = []
    for layer in layers:
        name, component = layer.active_name, layer.own
        if name is None or not isinstance(layer.get_base_layer(), FSDPModule):
            continue
        whole = layer.new_component(component.spec).requires_grad_(False)
        whole.load_state_dict({n: full_tensor(p) for n, p in component.named_parameters()})
        before.append((layer, name, component))
        layer.npt_components[name] = whole
    try:
        yield
        for layer, name, component in before:
            fitted = layer.npt_components[name]
            for n, parameter in component.named_parameters():
                parameter.copy_(like(fitted.get_parameter(n), parameter))
    finally:
        for layer, name, component in before:
            layer.npt_components[name] = component


class TextPart(NamedTuple):
    """The place of a batch in the text.

    start: of its first token. end: of the first token after this round, in which each process has one batch. counts:
    False for a filler batch that only keeps the processes' forwards in step.
    """

    start: int
    end: int
    counts: bool = True


def first_tokens(hidden_size: int) -> int:
    """Returns how many tokens per block `calibrate` keeps in memory for gain and carry."""
    return max(CHUNK_TOKENS, CHUNK_TOKENS_PER_CHANNEL * hidden_size)


class BlockFit:
    """Accumulates what one block's fit needs, batch by batch."""

    def __init__(self, layer: NPTLayer, chunk_tokens: int):
        self.layer, self.chunk_tokens = layer, chunk_tokens
        self.component = layer.own
        self.dtype = next(self.component.parameters(), torch.empty(0)).dtype
        self.component.to(wide_dtype(self.dtype))
        self.chunk: list[Part] = []  # this process's share of the first chunk, for gain and carry
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
        (self.chunk if text.start < self.chunk_tokens else self.later).append(part)
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
        chunk, later = self.chunk or [self.later[0].cut(0)], self.later
        self.chunk, self.later = [], []
        h, a = self._choose_probe(chunk)
        self.probe = (h, a, self.layer.update_from(h[None], a[None], Mode.EXACT)[0])
        self.error_before = self._update_error()
        sizes = torch.cat([token_sizes(_delta(self.layer, h, a)[1], a) for _, h, a in _slices(chunk)])
        self.cutoff = outlier_cutoff(torch.cat(gather(sizes)))
        if self.component.spec.input_projections:
            fit_gain_and_carry(self.layer, self.component, chunk, self.cutoff)
        self._accumulate([*chunk, *later], self.cutoff)

    def _choose_probe(self, chunk: list[Part]) -> tuple[Tensor, Tensor]:
        """h and a, (`PROBE_TOKENS`, d) each, of tokens from all processes' chunks, in the order of the text."""
        held = _held(chunk)
        # Not every n-th token: that may be the first of every text.
        mask = torch.randperm(held, generator=torch.Generator().manual_seed(0)) < PROBE_TOKENS
        # Places, not the mask: npt memory runs this on shapes alone, where nothing knows how many a mask picks.
        places = [mask[start : start + len(h)].nonzero().flatten() for start, h, _ in chunk]
        picked = [[x[i.to(x.device)] for x in (h, a)] for (_, h, a), i in zip(chunk, places, strict=True)]
        order = torch.cat(gather(torch.cat([i + part.start for i, part in zip(places, chunk, strict=True)]))).argsort()
        h, a = (torch.cat(gather(torch.cat(parts)))[order.to(parts[0].device)] for parts in zip(*picked, strict=True))
        return h, a

    def _accumulate(self, chunk: list[Part], cutoff: Tensor) -> None:
        """Adds tokens to S, T and the total weight."""
        component, spec = self.component, self.component.spec
        parts = _low_rank_targets(component)
        if not spec.has_low_rank or spec.key != "input" or not parts:
            return
        for _, h, a in _slices(chunk):
            z, delta = _delta(self.layer, h, a)
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


class Part(NamedTuple):
    """h and a, (tokens, d) each, of consecutive tokens of the text; start is the place of the first one."""

    start: int
    h: Tensor
    a: Tensor

    def cut(self, first: int, end: int | None = None) -> Part:
        """Returns its tokens from `first` to before `end`; none where `end` is None."""
        end = first if end is None else end
        return Part(self.start + first, self.h[first:end], self.a[first:end])


def _slices(chunk: list[Part]) -> Iterator[Part]:
    """Yields parts of at most `SLICE_TOKENS`, whose temporaries stay small. An empty part gives one empty slice."""
    for part in chunk:
        for first in range(0, max(1, len(part.h)), SLICE_TOKENS):
            yield part.cut(first, first + SLICE_TOKENS)


def _held(chunk: list[Part]) -> int:
    """Returns the number of tokens in all processes' chunks."""
    return int(total(torch.tensor(sum(len(part.h) for part in chunk))))


def _delta(layer: NPTLayer, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(z, D), each (tokens, d), float32 or better."""
    z, original = (x.to(wide_dtype(h.dtype)) for x in layer.mlp_inputs(h, a))
    return z, original - z


def fit_gain_and_carry(layer: NPTLayer, component: NPComponent, chunk: list[Part], cutoff: Tensor) -> None:
    """Weighted least squares of D on gain and carry, over h and a of all processes' chunks.

    Per channel, gain and carry can write k . Z + c (A_0 + l . A_1...), where Z is z - b and A is a, each times a few
    numbers per token. The fit needs only the products of Z, A and D with one another, summed over tokens.
    """
    if component.has_gain and component.spec.gain == "state":
        _fit_scale(layer, component, chunk, cutoff)
    gram = torch.zeros(())
    for _, h, a in _slices(chunk):
        z, delta = _delta(layer, h, a)
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


def _fit_scale(layer: NPTLayer, component: NPComponent, chunk: list[Part], cutoff: Tensor) -> None:
    """Ridge regression of -log rms(h) on z - b, the ridge chosen on the last quarter of the tokens."""
    tokens, origin = _held(chunk), None
    fitted, checked = Regression(), Regression()
    for start, h, a in _slices(chunk):
        z, delta = _delta(layer, h, a)
        weights = outlier_weights(token_sizes(delta, a), cutoff).to(z.dtype)
        x = component.features(a, z)[1]
        if origin is None:
            origin = x.mean(0)  # moments about a point close to the mean lose no digits
            same_everywhere({"origin": origin})
        h = component.centered(h.to(x.dtype))
        target = -h.square().mean(-1).clamp_min(1e-30).log() / 2
        cut = min(max(0, max(1, tokens * 3 // 4) - start), len(h))
        fitted.add(x[:cut] - origin, target[:cut], weights[:cut])
        checked.add(x[cut:] - origin, target[cut:], weights[cut:])
    fitted.moments, checked.moments = total(fitted.moments), total(checked.moments)
    direction, offset = best_regression(fitted, checked)
    component.scale_direction.copy_(direction)
    if origin is not None:
        component.log_scale.copy_(offset - origin.double() @ direction)


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
