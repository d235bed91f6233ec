"""The fit of gain `state`'s estimate of log sigma, sigma = 1 / rms(h), from z (docs/maths.md, section 4).

Two estimates are fitted on the same tokens: a linear one by ridge regression and, from there, one with hidden units by a few
passes of AdamW, some seconds for a block on the CPU. Tokens that the second did not see decide between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from npt.block.component import NPComponent
from npt.block.layer import NPTLayer
from npt.block.scale import HiddenUnits, scale_sensitivity
from npt.common.processes import gather, total, world
from npt.common.sharded import same_everywhere
from npt.equivalence.closed_form import OUTLIER_FACTOR, Regression, best_regression, outlier_weights, token_sizes
from npt.equivalence.parts import SLICE_TOKENS, Part, held, shift_of, slices, spans

#: The text is cut into so many stretches, of which every so many-th checks the fit to the others.
STRETCHES, CHECKED_EVERY = 64, 8
#: Fewest tokens for each hidden unit: fewer say too little about it.
TOKENS_PER_UNIT = 32
#: Of AdamW: passes over the tokens, fewest steps, tokens of a step, first learning rate (it falls to zero), weight decay of W.
PASSES, FEWEST_STEPS, STEP_TOKENS, LEARNING_RATE, WEIGHT_DECAY = 8, 500, 256, 3e-3, 1.0
#: Standard deviation that the linear estimate's error is scaled to, for which that learning rate is meant.
ERROR_STD = 0.1


class Samples(NamedTuple):
    """Tokens in the order of the text: x = z - b (tokens, d), y = log sigma and its weight (tokens,) each."""

    x: Tensor
    y: Tensor
    weights: Tensor

    def at(self, where: Tensor | slice) -> Samples:
        """Returns the tokens of a mask (tokens,), of indices, or of a slice."""
        return Samples(*(values[where] for values in self))

    def error(self, estimate: Tensor) -> float:
        """Returns the weighted sum of squared errors of an estimate (tokens,)."""
        return float((self.weights * (estimate - self.y).square()).double().sum())


def fit_scale(layer: NPTLayer, component: NPComponent, chunk: list[Part], cutoff: Tensor) -> None:
    """Fits the component's estimate over h and a of all processes' chunks, in place.

    A token's weight is the square of how far an error of its log sigma moves its shift D, at most `OUTLIER_FACTOR` times the
    median, times `outlier_weights`.
    """
    mine = _samples(layer, component, chunk, cutoff)
    # Moments about a point close to the mean lose no digits; the first batch is the same for any number of processes.
    first = next((len(part.h) for part in spans(chunk) if len(part.h)), 0)
    origin = mine.x[:first].mean(0)
    same_everywhere({"origin": origin})
    moved = torch.cat(gather(mine.weights))
    if not float(moved.sum()) > 0:  # attention writes nothing, and any estimate will do
        mine = mine._replace(weights=torch.ones_like(mine.weights))
    elif float(most := OUTLIER_FACTOR * moved.median()) > 0:
        mine = mine._replace(weights=mine.weights.clamp_max(most))
    fitted, checked = _regressions(mine, origin, chunk)
    direction, offset = best_regression(fitted, checked)
    component.scale_direction.copy_(direction)
    component.log_scale.copy_(offset - origin.double() @ direction)
    if component.hidden_units is not None:
        _fit_hidden_units(component, component.hidden_units, _gathered(mine, chunk))


def _samples(layer: NPTLayer, component: NPComponent, chunk: list[Part], cutoff: Tensor) -> Samples:
    """The samples of this process's chunk, in its order; x is made whole once and filled slice by slice."""
    weight, _ = layer.norm_parameters
    x, rest, at = torch.empty(0), list[tuple[Tensor, Tensor]](), 0
    for _, h, a, _ in slices(chunk):
        z, delta = shift_of(layer, h, a)
        weights = outlier_weights(token_sizes(delta, a), cutoff).to(z.dtype)
        a, own, (size, overlap, *_) = component.features(a, z)
        h = component.centered(h.to(own.dtype))
        y = -h.square().mean(-1).clamp_min(1e-30).log() / 2
        carried = a if weight is None else weight.to(a) * a
        moved = scale_sensitivity(own, carried, y.exp()[:, None], size, overlap)
        if not at and not len(x):
            x = own.new_empty(sum(len(part.h) for part in chunk), own.shape[-1])
        x[at : at + len(own)] = own
        at += len(own)
        rest.append((y, (weights * moved)[:, 0]))
    return Samples(x, *(torch.cat(columns) for columns in zip(*rest, strict=True)))


def _regressions(mine: Samples, origin: Tensor, chunk: list[Part]) -> tuple[Regression, Regression]:
    """The moments, about an origin (d,), of all processes' tokens that are fitted to, and of those that check the fit."""
    tokens, fitted, checked, at = held(chunk), Regression(), Regression(), 0
    for part in spans(chunk):
        own = mine.at(slice(at, at + len(part.h)))
        at += len(part.h)
        checks = _checks(torch.arange(part.start, part.start + len(part.h), device=own.x.device), tokens)
        for regression, mask in ((fitted, ~checks), (checked, checks)):
            x, y, weights = own.at(mask)
            regression.add(x - origin, y, weights[:, None])
    fitted.moments, checked.moments = total(fitted.moments), total(checked.moments)
    return fitted, checked


def _checks(places: Tensor, tokens: int) -> Tensor:
    """Returns which places of a text of so many tokens check the fit to the others: of few tokens the last quarter."""
    if tokens < STRETCHES:
        return places >= max(1, tokens * 3 // 4)
    return places * STRETCHES // tokens % CHECKED_EVERY == CHECKED_EVERY - 1


def _gathered(mine: Samples, chunk: list[Part]) -> Samples:
    """All processes' samples in the order of the text, so that the fit is that of one process, whose chunk has that order."""
    if world()[1] == 1:
        return mine
    device = mine.x.device
    places = [torch.arange(part.start, part.start + len(part.h), device=device) for part in spans(chunk)]
    order = torch.cat(gather(torch.cat(places))).argsort()
    return Samples(*(torch.cat(gather(column))[order] for column in mine))


def _fit_hidden_units(component: NPComponent, units: HiddenUnits, samples: Samples) -> None:
    """Fits the units; v stays zero where they do not help on the checked tokens."""
    units.out.zero_()
    tokens = len(samples.y)
    if tokens < TOKENS_PER_UNIT * len(units.bias):
        return
    checks = _checks(torch.arange(tokens, device=samples.x.device), tokens)
    fitted, checked = (~checks).nonzero()[:, 0], samples.at(checks)
    direction, offset, found = _train(samples, fitted, component.scale_direction, component.log_scale, len(units.bias))
    # The linear estimate has seen the checked tokens too, which is in its favour.
    linear = checked.error(checked.x @ component.scale_direction + component.log_scale)
    if checked.error(checked.x @ direction + offset + found(checked.x)[:, 0]) < linear:
        component.scale_direction.copy_(direction)
        component.log_scale.copy_(offset)
        for parameter, value in zip(units, found, strict=True):
            parameter.copy_(value)


def _train(
    samples: Samples, chosen: Tensor, direction: Tensor, offset: Tensor, count: int
) -> tuple[Tensor, Tensor, HiddenUnits]:
    """Returns (direction, offset, units) of an estimate that starts as the linear one and learns by AdamW.

    Inputs are centred and scaled to unit root mean square, the target to an error of `ERROR_STD`. Of x there is no second
    copy: each step scales the tokens that it takes.

    Args:
        samples: all tokens. chosen: indices of those to learn from. direction, offset: the linear estimate. count: units.
    """
    x, weights = samples.x, samples.weights[chosen]
    weights = weights / weights.mean()
    center = torch.zeros_like(samples.weights).index_copy(0, chosen, weights) @ x / len(chosen)
    squares = [(x[part] - center).square().sum(dtype=torch.float64) for part in chosen.split(SLICE_TOKENS)]
    size = (torch.stack(squares).sum() / (len(chosen) * x.shape[1])).sqrt().clamp_min(1e-12).to(x.dtype)
    error = (samples.y - x @ direction - offset)[chosen]
    unit = ((weights * error.square()).mean().sqrt() / ERROR_STD).clamp_min(1e-12)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(x.shape[1], count, generator=generator).to(x) / x.shape[1] ** 0.5
    target, correction = error / unit, torch.zeros_like(direction)
    parameters = [hidden, x.new_zeros(count), x.new_zeros(count), correction, x.new_zeros(1)]

    def inputs(at: Tensor) -> Tensor:
        return (x[chosen[at]] - center) / size

    with torch.enable_grad():
        parameters = [p.requires_grad_() for p in parameters]
        # On shapes alone every step is like the first.
        descend(parameters, inputs, target, weights, generator, 1 if x.is_meta else step_count(len(chosen)))
    hidden, bias, out, correction, shift = (p.detach() for p in parameters)
    correction = correction * unit / size
    shift = offset + shift * unit - center @ correction
    # gelu((x - center) W / size + b) v = gelu(x W' + b') v'
    return direction + correction, shift, HiddenUnits(hidden / size, bias - center @ (hidden / size), out * unit)


def step_count(tokens: int) -> int:
    """Returns how many steps the hidden units are trained for on so many tokens."""
    return max(FEWEST_STEPS, PASSES * (tokens // STEP_TOKENS))


def descend(
    parameters: list[Tensor],
    inputs: Callable[[Tensor], Tensor],
    target: Tensor,
    weights: Tensor,
    generator: torch.Generator,
    steps: int,
) -> None:
    """Minimises the weighted squared error of gelu(x W + b) v + x c + s by AdamW, in place.

    Args:
        parameters: W, b, v, c, s. inputs: x (n, d) of n indices. target, weights: of all tokens, (tokens,) each.
        generator: of the order of tokens. steps: of AdamW.
    """
    hidden, bias, out, correction, shift = parameters
    slow = {"params": [correction, shift], "lr": LEARNING_RATE / 10}
    groups: list[dict[str, Any]] = [{"params": [hidden], "weight_decay": WEIGHT_DECAY}, {"params": [bias, out]}, slow]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0)
    a_pass = max(1, len(target) // STEP_TOKENS)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        if step % a_pass == 0:
            order = torch.randperm(len(target), generator=generator)
        at = order[step % a_pass * STEP_TOKENS :][:STEP_TOKENS].to(target.device)
        x = inputs(at)
        found = F.gelu(x @ hidden + bias) @ out + x @ correction + shift
        loss = (weights[at] * (found - target[at]).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
