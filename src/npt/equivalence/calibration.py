"""Closed-form calibration: one pass of the frozen model over text, no gradient step (docs/maths.md, section 4).

Per converted block, with h and a from the unconverted model and D = Norm2(h + a) - z:

1. on a first chunk of tokens: gain and carry, least squares of D on what they can write;
2. over all text, in float64: S = a^T a and T = a^T R, where R is what step 1 leaves of D (and of a, for down);
3. a reduced-rank regression of R on a: L L^T = S, U from the SVD of L^-1 T, A = L^-T U_r, B = (A^T S A)^-1 A^T T.

Tokens are weighted so that a few extreme ones (attention sinks, massive activations) cannot dominate the fit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from npt.block.component import NPComponent
from npt.block.layer import BlockRecord, NPTLayer
from npt.block.modes import Mode, running_as, watching
from npt.common.processes import gather, total, world
from npt.common.sharded import full_tensor, gathered, like, same_everywhere
from npt.errors import REMEDY, NPTError, RunError
from npt.tuner.converted import active_layers, device_of, eval_mode, run_backbone
from npt.tuner.nonfinite import find_nonfinite

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Tokens kept per block for step 1: at least so many, and so many per channel of the hidden state, each of which has
#: a coefficient in the regression of the norm.
CHUNK_TOKENS, CHUNK_TOKENS_PER_CHANNEL = 8_192, 4
#: Tokens whose temporaries are in memory at once, and tokens on which a block's error is measured.
SLICE_TOKENS, PROBE_TOKENS = 1024, 512
#: A token counts as extreme when its |D|^2 or |a|^2 is this many times the median.
OUTLIER_FACTOR = 10.0
#: Standard deviation of a A: tanh is then linear to 0.3 %.
MODULATION_STD = 0.1
#: Ridge of the low-rank fit, relative to the mean diagonal of a^T a, which is close to singular in real models.
LOW_RANK_RIDGE = 1e-4


@torch.no_grad()
def calibrate(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    chunk_tokens: int | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Fits the active adapter of a converted model to the model it was made from, in place.

    Several processes share the batches, and their sums are added: the fit is that of one process. All call it with the
    same batches; a sharded model's inside `npt.common.processes.through`.

    Args:
        model: a PEFT model with an active NPT adapter; its base is not changed.
        batches: of {"input_ids" (batch, tokens), "attention_mask" (the same; optional)}; padding is left out.
        chunk_tokens: how many tokens per block are kept in memory for gain and carry; the rest only passes through.
            None: 8,192, or 4 d where that is more.
        progress: show a bar.

    Returns:
        {"layer_<i>": {"error_before", "error_after", "tokens"}}: the error of the block's update y - h, relative
        (root of summed squares), on real tokens, before and after.

    Raises:
        NPTError: no text, or text so degenerate that the fit is not finite.
        RunError: the model's own hidden states are not finite.
    """
    layers = [layer for layer in active_layers(model) if layer.component and layer.component.spec.carry != "exact"]
    with _whole_components(layers):
        fits = {layer.index: _BlockFit(layer, chunk_tokens or first_tokens(layer.shape("up")[0])) for layer in layers}
        seen = _collect(model, fits, batches, progress)
        if not seen:
            raise NPTError("calibration got no text: pass at least one batch with real tokens")
        logger.info("calibrating on %d tokens", seen)
        figures = {f"layer_{index}": fit.finish() for index, fit in fits.items()}
        # Two kinds of processors may solve the same equations to other last digits.
        same_everywhere({f"{layer.index}.{n}": p for layer in layers for n, p in layer.component.named_parameters()})  # type: ignore[union-attr]
    return figures


def _collect(model: Any, fits: dict[int, _BlockFit], batches: Iterable[Mapping[str, Tensor]], progress: bool) -> int:
    """Passes the text by the fits, each process its share; the number of tokens of all."""
    device, seen, (rank, count) = device_of(model), 0, world()
    layers = [fit.layer for fit in fits.values()]

    def see(layer: NPTLayer, record: BlockRecord) -> None:
        fits[layer.index].see(record, mask, part)

    with eval_mode(model), running_as(active_layers(model), Mode.ORIGINAL), watching(layers, see):
        for group in _groups(track(batches, "calibrating", transient=True, disable=not progress), count):
            texts = [_text(batch) for batch in group]
            sizes = [int(text["attention_mask"].sum()) for text in texts]
            part = TextPart(seen + sum(sizes[:rank]), seen + sum(sizes), rank < len(group))
            seen += sum(sizes)
            text = {name: value.to(device) for name, value in texts[min(rank, len(group) - 1)].items()}
            mask = text["attention_mask"].bool()
            if not run_backbone(model, text)[mask].isfinite().all():
                where = find_nonfinite(model, text)
                raise RunError(f"calibration, after {seen} tokens: hidden states are not finite, {where}; {REMEDY}")
    return seen


def _text(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ids = torch.as_tensor(batch["input_ids"])
    return {"input_ids": ids, "attention_mask": torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids)))}


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


@contextmanager
def _whole_components(layers: list[NPTLayer]) -> Iterator[None]:
    """Puts whole components in the place of sharded ones, and what was fitted back into the parts."""
    sharded = [layer for layer in layers if isinstance(layer.get_base_layer(), FSDPModule)]
    before: list[tuple[NPTLayer, str, NPComponent]] = []
    for layer in sharded:
        name, component = layer.active_name, layer.component
        whole = layer.new_component(component.spec).requires_grad_(False)  # type: ignore[union-attr]
        whole.load_state_dict({n: full_tensor(p) for n, p in component.named_parameters()})  # type: ignore[union-attr]
        before.append((layer, name, component))  # type: ignore[arg-type]
        layer.npt_components[name] = whole  # type: ignore[index]
    try:
        yield
        for layer, name, component in before:
            fitted: Any = layer.npt_components[name]
            for n, parameter in component.named_parameters():
                parameter.copy_(like(fitted.get_parameter(n), parameter))
    finally:
        for layer, name, component in before:
            layer.npt_components[name] = component


class TextPart(NamedTuple):
    """Where a batch stands in the text: its first token's place, the text up to the end of this round of all processes'
    batches, and whether the batch is more than company for the others' forward."""

    start: int
    end: int
    counts: bool = True


def first_tokens(hidden_size: int) -> int:
    """How many tokens per block `calibrate` keeps in memory for gain and carry."""
    return max(CHUNK_TOKENS, CHUNK_TOKENS_PER_CHANNEL * hidden_size)


class _BlockFit:
    """Accumulates what one block's fit needs, batch by batch."""

    def __init__(self, layer: NPTLayer, chunk_tokens: int):
        self.layer, self.chunk_tokens = layer, chunk_tokens
        self.component: NPComponent = layer.component  # type: ignore[assignment]
        self.dtype = next(self.component.parameters(), torch.empty(0)).dtype
        self.component.to(torch.promote_types(self.dtype, torch.float32))
        self.chunk: list[Part] = []  # what gain and carry are fitted on
        self.later: list[Part] = []  # what other processes' share of it came with
        self.tokens = 0
        self.cutoff: Any = None
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.total_weight = 0.0

    def see(self, record: BlockRecord, mask: Tensor, text: TextPart | None = None) -> None:
        """Takes one batch of (batch, tokens, d) hidden states; mask (batch, tokens) marks the real ones.

        text: where it stands; None in a single process, after what came before.
        """
        unpadded = bool(mask.all())
        h, a = (x.flatten(0, 1) if unpadded else x[mask] for x in (record.hidden_states, record.attention))
        text = TextPart(self.tokens, self.tokens + len(h)) if text is None else text
        self.tokens = text.end
        part = Part(text.start, h, a) if text.counts else Part(text.start, h[:0], a[:0])
        if self.cutoff is not None:
            self._accumulate([part])
            return
        (self.chunk if text.start < self.chunk_tokens else self.later).append(part)
        if text.end >= self.chunk_tokens:
            self._fit_chunk()

    def finish(self) -> dict[str, float]:
        """Solves for the low-rank part and measures the block's error before and after."""
        with gathered(self.layer.get_base_layer()):
            if self.cutoff is None:
                self._fit_chunk()
            gram, cross = (x if isinstance(x, float) else total(x) for x in (self.gram, self.cross))
            weight = float(total(torch.tensor(self.total_weight, dtype=torch.float64)))
            _fit_low_rank(self.layer, self.component, gram, cross, weight)
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
        medians = torch.cat(gather(sizes)).median(0).values
        self.cutoff = torch.where(medians > 0, OUTLIER_FACTOR * medians, torch.inf)
        if self.component.spec.input_projections:
            fit_gain_and_carry(self.layer, self.component, chunk, self.cutoff)
        self._accumulate([*chunk, *later])

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

    def _accumulate(self, chunk: list[Part]) -> None:
        component, spec = self.component, self.component.spec
        parts = _low_rank_targets(component)
        if not spec.has_low_rank or spec.key != "input" or not parts:
            return
        for _, h, a in _slices(chunk):
            z, delta = _delta(self.layer, h, a)
            weights = outlier_weights(token_sizes(delta, a), self.cutoff)
            shift = component.keyed_shift(a, z) if "in" in parts else None
            rest = {"in": delta if shift is None else delta - shift, "down": a.to(z.dtype)}
            features = component.centered(a.to(z.dtype))
            weighted = weights.to(z.dtype) * features
            self.total_weight += float(weights.sum())
            self.gram = self.gram + _product(weighted, features)
            self.cross = self.cross + torch.cat([_product(weighted, rest[name]) for name in parts], -1)

    def _update_error(self) -> float:
        h, a, target = self.probe
        update = self.layer.update_from(h[None], a[None])[0]
        return float((update - target).double().norm() / target.double().norm().clamp_min(1e-300))


class Part(NamedTuple):
    """h and a, (tokens, d) each, of consecutive tokens of the text, and the place of the first."""

    start: int
    h: Tensor
    a: Tensor

    def cut(self, first: int, end: int | None = None) -> Part:
        """Its tokens from `first` to before `end`; at first none."""
        end = first if end is None else end
        return Part(self.start + first, self.h[first:end], self.a[first:end])


def _slices(chunk: list[Part]) -> Iterator[Part]:
    """In parts whose temporaries stay small; an empty part is one of them."""
    for part in chunk:
        for first in range(0, max(1, len(part.h)), SLICE_TOKENS):
            yield part.cut(first, first + SLICE_TOKENS)


def _held(chunk: list[Part]) -> int:
    """Tokens of all processes' chunks."""
    return int(total(torch.tensor(sum(len(part.h) for part in chunk))))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x^T y (d, e) of one slice (tokens, d), (tokens, e), in float64 for the sum over slices.

    On the CPU the slice itself is multiplied in float32 or better, twice as fast; a GPU may be set to TF32, which would
    not do, so there it is float64.
    """
    return x.double().T @ y.double() if x.is_cuda else (x.T @ y).double()


def _delta(layer: NPTLayer, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(z, D), each (tokens, d), float32 or better."""
    z, original = (x.to(torch.promote_types(h.dtype, torch.float32)) for x in layer.mlp_inputs(h, a))
    return z, original - z


def token_sizes(delta: Tensor, attention: Tensor) -> Tensor:
    """(tokens, 2) float64: |D|^2, which the fit explains, and |a|^2, which it explains it with."""
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=delta.dtype).double() for x in (delta, attention)]
    return torch.stack(norms, -1).square()


def outlier_weights(sizes: Tensor, cutoff: Tensor) -> Tensor:
    """(tokens, 1) float64: one, but (cutoff / size)^2 for tokens beyond a cutoff (2,).

    The square because the gain's own features grow with |a|^2: a token's pull on the fit would else still grow.
    """
    return (cutoff / sizes.clamp_min(1e-300)).clamp_max(1).amin(-1, keepdim=True).square()


def fit_gain_and_carry(layer: NPTLayer, component: NPComponent, chunk: list[Part], cutoff: Tensor) -> None:
    """Weighted least squares of D on gain and carry, over h and a of all processes' chunks.

    Per channel, all that gain and carry can write is k . Z + c (A_0 + l . A_1...): Z is z - b and A is a, each times a
    few numbers per token. Their products with one another and with D, summed over tokens, are all the fit needs.
    """
    if component.has_gain and component.spec.gain == "state":
        _fit_scale(layer, component, chunk, cutoff)
    gram: Any = 0.0
    for _, h, a in _slices(chunk):
        z, delta = _delta(layer, h, a)
        weights = outlier_weights(token_sizes(delta, a), cutoff).to(z.dtype)
        of_z, of_a = _basis(component, *component.features(a, z))
        gram = gram + _channel_products([*of_z, *of_a, delta], weights)
    if not of_z and not of_a:
        return
    gain, slope, c = _alternate(total(gram), len(of_z), len(of_a))
    if component.has_carry:
        component.c.copy_(c)
    if component.has_gain:
        component.gain.copy_(gain)
    if component.has_gain and len(slope):
        component.carry_gain.copy_(slope)


def _basis(component: NPComponent, a: Tensor, z: Tensor, phi: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(Z, A): what the gain's and the carry's coefficients multiply, each (tokens, d)."""
    if not component.has_gain:
        return [], [a] if component.has_carry else []
    if component.spec.gain == "state":
        component.gain.fill_(1)
        g, w = component.gains(z, phi)
        return [g * z], [w * a] if component.has_carry else []
    of_z, of_a = ([x, *(feature * x for feature in phi)] for x in (z, a))
    return of_z, of_a if component.has_carry else []


def _channel_products(columns: list[Tensor], weights: Tensor) -> Tensor:
    """(d, n, n) float64: weighted sums over tokens of the products of n columns (tokens, d)."""
    n = len(columns)
    products = columns[0].new_zeros(columns[0].shape[-1], n, n, dtype=torch.float64)
    for i, column in enumerate(columns):
        weighted = weights * column
        for j in range(i, n):
            products[:, i, j] = products[:, j, i] = (weighted * columns[j]).sum(0)
    return products


def _alternate(gram: Tensor, count_z: int, count_a: int) -> tuple[Tensor, Tensor, Tensor]:
    """(k, l, c) from products (d, n, n) of [Z, A, D]: by turns c given (k, l), then (k, l) given c."""
    gram, right = gram[:, :-1, :-1], gram[:, :-1, -1]
    gain, slope, c = gram.new_zeros(count_z), gram.new_zeros(max(0, count_a - 1)), gram.new_zeros(len(gram))
    shared = [i for i in range(count_z + count_a) if i != count_z or not count_a]
    for _ in range(10):
        if count_a:
            v = F.pad(slope, (1, 0), value=1.0)
            rest = right[:, count_z:] - gram[:, count_z:, :count_z] @ gain
            square = v @ gram[:, count_z:, count_z:] @ v
            c = torch.where(square > 0, rest @ v / square, 0)
        if count_z:
            scale = torch.stack([torch.ones_like(c)] * count_z + [c] * len(slope), -1)
            rest = right[:, shared] - (c[:, None] * gram[:, shared, count_z] if count_a else 0)
            products = (scale[:, :, None] * scale[:, None] * gram[:, shared][:, :, shared]).sum(0)
            gain, slope = solve_ridge(products, (scale * rest).sum(0), 1e-10).split([count_z, len(slope)])
    return gain, slope, c


def _fit_scale(layer: NPTLayer, component: NPComponent, chunk: list[Part], cutoff: Tensor) -> None:
    """Ridge regression of -log rms(h) on z - b, the ridge chosen on the last quarter of the tokens."""
    tokens, origin = _held(chunk), None
    fitted, checked = _Regression(), _Regression()
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
    errors = [(checked.error(*fitted.solve(ridge)), ridge) for ridge in (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e8)]
    direction, offset = fitted.joined(checked).solve(min(errors)[1])
    component.scale_direction.copy_(direction)
    component.log_scale.copy_(offset - origin.double() @ direction)  # type: ignore[union-attr]


class _Regression:
    """Weighted moments of [x, 1, y], in float64: enough for any ridge regression of y on x and for its error elsewhere."""

    def __init__(self) -> None:
        self.moments: Any = 0.0

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """x (tokens, d), y (tokens,), weights (tokens, 1)."""
        columns = torch.cat([x, torch.ones_like(weights), y[:, None]], -1)
        self.moments = self.moments + _product(weights * columns, columns)

    def joined(self, other: _Regression) -> _Regression:
        """Both."""
        both = _Regression()
        both.moments = self.moments + other.moments
        return both

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(direction (d,), offset ()), the ridge relative to the mean variance of x."""
        xx, x1, xy = self.moments[:-2, :-2], self.moments[:-2, -2], self.moments[:-2, -1]
        weight, y1 = self.moments[-2, -2], self.moments[-2, -1]
        mean, mean_y = x1 / weight, y1 / weight
        direction = solve_ridge(xx - torch.outer(mean, x1), xy - mean * y1, ridge)
        return direction, mean_y - mean @ direction

    def error(self, direction: Tensor, offset: Tensor) -> float:
        """Weighted sum of squared errors of a solution."""
        coefficients = torch.cat([direction, offset[None], -torch.ones_like(offset)[None]])
        return float(coefficients @ self.moments @ coefficients)


def _low_rank_targets(component: NPComponent) -> list[str]:
    """What the low-rank part has to explain: "in" for gate and up; "down" where no carry brings a itself."""
    spec = component.spec
    down = "down" in spec.projections and spec.carry != "diagonal"
    return ["in"] * bool(spec.input_projections) + ["down"] * down


def _fit_low_rank(layer: NPTLayer, component: NPComponent, gram: Any, cross: Any, total: float) -> None:
    """Reduced-rank regression from S = a^T a (d, d) and T = a^T R (d, d per target) of `total` weighted tokens."""
    spec = component.spec
    if not isinstance(gram, Tensor) or not float(gram.diagonal().sum()) > 0:
        return
    d, scale = spec.hidden_size, gram.diagonal().mean()
    ridged = gram + LOW_RANK_RIDGE * scale * torch.eye(d, dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky(ridged)
    whitened = torch.linalg.solve_triangular(lower, cross, upper=False)
    # Input and down targets have different units: each is scaled to unit energy before directions are chosen.
    whitened = torch.cat([part / part.norm().clamp_min(1e-300) for part in whitened.split(d, -1)], -1)
    # The leading left singular vectors, from a matrix a quarter the size where there are two targets.
    directions = torch.linalg.eigh(whitened @ whitened.T)[1][:, -spec.rank :].flip(-1)
    # Of either sign; rounding must not choose.
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    a_matrix = torch.linalg.solve_triangular(lower.T, directions, upper=True)
    a_matrix = a_matrix * (MODULATION_STD * total**0.5)  # A^T S A = I so far: a A has mean square 1 / total
    fitted = solve_ridge(a_matrix.T @ gram @ a_matrix, a_matrix.T @ cross, 1e-8) / spec.modulation_scale
    component.A.copy_(a_matrix)
    found = dict(zip(_low_rank_targets(component), fitted.split(d, -1), strict=True))
    for name, (b, _) in component.low_rank_factors("input").items():
        b.copy_(found["in"] if name == "in" else layer.product(name)(found["in"].to(layer.weight.dtype)))
    if "down" in spec.projections:
        component.low_rank_factors("down")["down"][0].copy_(found.get("down", torch.zeros(())))


def solve_ridge(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(gram + ridge mean(diag gram) I)^-1 right; zero where gram is zero."""
    scale = gram.diagonal().mean()
    if not float(scale) > 0:
        return torch.zeros_like(right)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * scale * identity, right)
