"""Closed-form calibration: one pass of the frozen model over text, no gradient step (docs/maths.md, section 4).

Per converted block, with h and a from the unconverted model and D = Norm2(h + a) - z:

1. on a first chunk of tokens: gain and carry, least squares of D on what they can write;
2. over all text, in float64: S = a^T a and T = a^T R, where R is what step 1 leaves of D (and of a, for down);
3. a reduced-rank regression of R on a: L L^T = S, U from the SVD of L^-1 T, A = L^-T U_r, B = (A^T S A)^-1 A^T T.

Tokens are weighted so that a few extreme ones (attention sinks, massive activations) cannot dominate the fit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from npt.attach import EXACT, BlockRecord, NPTLayer, layer_mode
from npt.component import NPComponent
from npt.errors import NPTError
from npt.tuner import active_layers, device_of, eval_mode, run_backbone

logger = logging.getLogger(__name__)

#: Tokens kept per block for step 1.
CHUNK_TOKENS = 16_384
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
    chunk_tokens: int = CHUNK_TOKENS,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Fits the active adapter of a converted model to the model it was made from, in place.

    Args:
        model: a PEFT model with an active NPT adapter; its base is not changed.
        batches: of {"input_ids" (batch, tokens), "attention_mask" (the same; optional)}; padding is left out.
        chunk_tokens: how many tokens per block are kept in memory for gain and carry; the rest only passes through.
        progress: show a bar.

    Returns:
        {"layer_<i>": {"error_before", "error_after", "tokens"}}: the error of the block's update y - h, relative
        (root of summed squares), on real tokens, before and after.

    Raises:
        NPTError: no text, or text so degenerate that the fit is not finite.
    """
    layers = [layer for layer in active_layers(model) if layer.component and layer.component.spec.carry != "exact"]
    fits = {layer.index: _BlockFit(layer, chunk_tokens) for layer in layers}
    mask: list[Tensor] = []

    def see(layer: NPTLayer, record: BlockRecord) -> None:
        fits[layer.index].see(record, mask[0])

    device, seen = device_of(model), 0
    with eval_mode(model), layer_mode(active_layers(model), override="bypass"), layer_mode(layers, on_block=see):
        for batch in track(batches, "calibrating", transient=True, disable=not progress):
            ids = torch.as_tensor(batch["input_ids"]).to(device)
            attention_mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))).to(device)
            mask[:] = [attention_mask.bool()]
            seen += int(attention_mask.sum())
            run_backbone(model, {"input_ids": ids, "attention_mask": attention_mask})
    if not seen:
        raise NPTError("calibration got no text: pass at least one batch with real tokens")
    logger.info("calibrating on %d tokens", seen)
    return {f"layer_{index}": fit.finish() for index, fit in fits.items()}


class _BlockFit:
    """Accumulates what one block's fit needs, batch by batch."""

    def __init__(self, layer: NPTLayer, chunk_tokens: int):
        self.layer, self.chunk_tokens = layer, chunk_tokens
        self.component: NPComponent = layer.component  # type: ignore[assignment]
        self.dtype = next(self.component.parameters(), torch.empty(0)).dtype
        self.component.double()
        self.chunk: list[tuple[Tensor, Tensor]] = []
        self.held = self.tokens = 0
        self.cutoff: Any = None
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.total_weight = 0.0

    def see(self, record: BlockRecord, mask: Tensor) -> None:
        """Takes one batch of (batch, tokens, d) hidden states; mask (batch, tokens) marks the real ones."""
        h, a = record.hidden_states[mask], record.attention[mask]
        self.tokens += len(h)
        if self.cutoff is not None:
            self._accumulate(h, a)
            return
        self.chunk.append((h, a))
        self.held += len(h)
        if self.held >= self.chunk_tokens:
            self._fit_chunk()

    def finish(self) -> dict[str, float]:
        """Solves for the low-rank part and measures the block's error before and after."""
        if self.cutoff is None:
            self._fit_chunk()
        _fit_low_rank(self.layer, self.component, self.gram, self.cross, self.total_weight)
        self.component.to(self.dtype)
        for name, parameter in self.component.named_parameters():
            if not parameter.isfinite().all():
                raise NPTError(
                    f"calibration of block {self.layer.index} gave a non-finite {name}: the text is degenerate or the "
                    "model overflows; use more varied calibration text or model.dtype=float32"
                )
        return {"error_before": self.error_before, "error_after": self._update_error(), "tokens": self.tokens}

    def _fit_chunk(self) -> None:
        h, a = (torch.cat(parts) for parts in zip(*self.chunk, strict=True))
        self.chunk = []
        self.probe = (h[:4096], a[:4096])
        self.error_before = self._update_error()
        sizes = token_sizes(_delta(self.layer, h, a)[1], a)
        medians = sizes.median(0).values
        self.cutoff = torch.where(medians > 0, OUTLIER_FACTOR * medians, torch.inf)
        if self.component.spec.input_projections:
            fit_gain_and_carry(self.layer, self.component, h, a, outlier_weights(sizes, self.cutoff))
        for start in range(0, len(h), 4096):
            self._accumulate(h[start : start + 4096], a[start : start + 4096])

    def _accumulate(self, h: Tensor, a: Tensor) -> None:
        component = self.component
        if not component.spec.has_low_rank or component.spec.key != "input":
            return
        z, delta = _delta(self.layer, h, a)
        weights = outlier_weights(token_sizes(delta, a), self.cutoff)
        shift = component.keyed_shift(a, z)
        rest = delta if shift is None else delta - shift
        down = torch.zeros_like(a) if component.spec.carry == "diagonal" else a
        features = component.centered(a.double())
        self.total_weight += float(weights.sum())
        self.gram = self.gram + features.T @ (weights * features)
        self.cross = self.cross + (weights * features).T @ torch.cat([rest, down], -1).double()

    def _update_error(self) -> float:
        h, a = self.probe
        layer = self.layer
        with layer_mode([layer], on_block=None, override=EXACT):
            target = layer.update_from(h[None], a[None])[0]
        with layer_mode([layer], on_block=None, override=None):
            update = layer.update_from(h[None], a[None])[0]
        return float((update - target).double().norm() / target.double().norm().clamp_min(1e-300))


def _delta(layer: NPTLayer, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(z, D), each (tokens, d), float32 or better."""
    z, original = (x.to(torch.promote_types(h.dtype, torch.float32)) for x in layer.mlp_inputs(h, a))
    return z, original - z


def token_sizes(delta: Tensor, attention: Tensor) -> Tensor:
    """(tokens, 2) float64: |D|^2, which the fit explains, and |a|^2, which it explains it with."""
    return torch.stack([delta.double().square().sum(-1), attention.double().square().sum(-1)], -1)


def outlier_weights(sizes: Tensor, cutoff: Tensor) -> Tensor:
    """(tokens, 1): one, but (cutoff / size)^2 for tokens beyond a cutoff (2,).

    The square because the gain's own features grow with |a|^2: a token's pull on the fit would else still grow.
    """
    return (cutoff / sizes.clamp_min(1e-300)).clamp_max(1).amin(-1, keepdim=True).square()


def fit_gain_and_carry(layer: NPTLayer, component: NPComponent, h: Tensor, a: Tensor, weights: Tensor) -> None:
    """Least squares of D (tokens, d) on gain and carry, weighted per token, in float64."""
    z, delta = _delta(layer, h, a)
    spec = component.spec
    delta, weights = delta.double(), weights.double()
    a, z, phi = component.features(a, z)
    if component.has_gain and spec.gain == "state":
        mean_square = h.double().square().mean(-1) if not spec.centered else h.double().var(-1, unbiased=False)
        _fit_scale(component, z, -mean_square.clamp_min(1e-30).log() / 2, weights)
        component.gain.fill_(1)
        g, w = component.gains(z, phi)
        for _ in range(3):
            if component.has_carry:
                component.c.copy_(_diagonal(delta - component.gain * g * z, w * a, weights))
            rest = delta - component.c * w * a if component.has_carry else delta
            square = (weights * (g * z).square()).sum()
            if float(square) > 0:
                component.gain.copy_((weights * rest * g * z).sum() / square)
        return
    if component.has_carry:
        component.c.copy_(_diagonal(delta, a, weights))
    for _ in range(10 if component.has_gain else 0):
        _fit_linear_gain(component, delta, a, z, phi, weights)


def _fit_linear_gain(component: NPComponent, delta: Tensor, a: Tensor, z: Tensor, phi: Any, weights: Tensor) -> None:
    """One round of alternating least squares: (k, l) given c, then c given (k, l)."""
    carried = component.c * a if component.has_carry else torch.zeros_like(a)
    columns = [z, *(feature * z for feature in phi)]
    if component.has_carry:
        columns += [feature * carried for feature in phi]
    gram = torch.stack([torch.stack([(weights * x * y).sum() for y in columns]) for x in columns])
    right = torch.stack([(weights * x * (delta - carried)).sum() for x in columns])
    solution = solve_ridge(gram, right, 1e-10)
    component.gain.copy_(solution[: 1 + len(phi)])
    if component.has_carry:
        component.carry_gain.copy_(solution[1 + len(phi) :])
        g, w = component.gains(z, phi)
        component.c.copy_(_diagonal(delta - g * z, w * a, weights))


def _fit_scale(component: NPComponent, z: Tensor, target: Tensor, weights: Tensor) -> None:
    """Ridge regression of -log rms(h) (tokens,) on z - b, the ridge chosen on the last quarter of the tokens."""
    mean_z = (weights * z).sum(0) / weights.sum()
    mean_t = (weights[:, 0] * target).sum() / weights.sum()
    x, y = z - mean_z, target - mean_t
    split = max(1, len(x) * 3 // 4)
    fits = []
    for ridge in (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e8):
        u = _ridge_direction(x[:split], y[:split], weights[:split], ridge)
        error = (weights[split:, 0] * (y[split:] - x[split:] @ u).square()).sum()
        fits.append((float(error), ridge))
    direction = _ridge_direction(x, y, weights, min(fits)[1])
    component.scale_direction.copy_(direction)
    component.log_scale.copy_(mean_t - mean_z @ direction)


def _ridge_direction(x: Tensor, y: Tensor, weights: Tensor, ridge: float) -> Tensor:
    return solve_ridge(x.T @ (weights * x), x.T @ (weights[:, 0] * y), ridge)


def _diagonal(target: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """(d,): per channel, the factor that brings source (tokens, d) closest to target."""
    square = (weights * source.square()).sum(0)
    return torch.where(square > 0, (weights * target * source).sum(0) / square.clamp_min(1e-300), 0)


def _fit_low_rank(layer: NPTLayer, component: NPComponent, gram: Any, cross: Any, total: float) -> None:
    """Reduced-rank regression from S = a^T a (d, d) and T = a^T [R_in | R_down] (d, 2 d) of `total` weighted tokens."""
    spec = component.spec
    if not isinstance(gram, Tensor) or not float(gram.diagonal().sum()) > 0:
        return
    d, scale = spec.hidden_size, gram.diagonal().mean()
    ridged = gram + LOW_RANK_RIDGE * scale * torch.eye(d, dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky(ridged)
    whitened = torch.linalg.solve_triangular(lower, cross, upper=False)
    # Input and down targets have different units: each is scaled to unit energy before directions are chosen.
    parts = [part / part.norm().clamp_min(1e-300) for part in whitened.split(d, -1)]
    wanted = [bool(spec.input_projections), "down" in spec.projections and spec.carry != "diagonal"]
    whitened = torch.cat([part * use for part, use in zip(parts, wanted, strict=True)], -1)
    directions = torch.linalg.svd(whitened, full_matrices=False)[0][:, : spec.rank]
    a_matrix = torch.linalg.solve_triangular(lower.T, directions, upper=True)
    a_matrix = a_matrix * (MODULATION_STD * total**0.5)  # A^T S A = I so far: a A has mean square 1 / total
    fitted = solve_ridge(a_matrix.T @ gram @ a_matrix, a_matrix.T @ cross, 1e-8) / spec.modulation_scale
    component.A.copy_(a_matrix)
    b_in, b_down = fitted.split(d, -1)
    for name, (b, _) in component.low_rank_factors("input").items():
        b.copy_(b_in if name == "in" else layer.product(name)(b_in.to(layer.weight.dtype)))
    if "down" in spec.projections:
        component.low_rank_factors("down")["down"][0].copy_(b_down)


def solve_ridge(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(gram + ridge mean(diag gram) I)^-1 right; zero where gram is zero."""
    scale = gram.diagonal().mean()
    if not float(scale) > 0:
        return torch.zeros_like(right)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * scale * identity, right)
