"""Values: what has to be added to `down`'s output at the key, so that the target follows the prompt. A table of strategies.

Each edit's values are found alone, on the base: they depend on no other edit. Where several blocks are edited, all values are
found together: keys are the base's, so they depend on no value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from npt.block.families import family_of
from npt.block.outputs import first_tensor
from npt.block.probing import find
from npt.common.display import one_line
from npt.common.precision import wide
from npt.editing.requests import continued
from npt.editing.solve import Pairs
from npt.editing.trial import Problem, Settings, Trial, margins
from npt.errors import NPTError, RunError

#: Share of the margin that may be missing at the end: the last steps change little.
_NEAR = 0.05
#: Settings that are whole numbers, and the least one.
_LEAST = {"steps": 1, "contexts": 0, "further": 0}
#: Settings that are above 0.
_POSITIVE = ("stride", "reach")


@dataclass(frozen=True)
class Found:
    """An edit's pairs, {block: keys and values}, and the passes forward and backward that they took."""

    pairs: dict[int, Pairs]
    passes: int


def _start(problem: Problem) -> Tensor:
    """No value, (blocks, d)."""
    sites, adapter = problem.bench.sites, problem.bench.adapter
    return torch.zeros(len(sites), sites[0].size, device=adapter.device, dtype=adapter.dtype, requires_grad=True)


def _at_most(values: Tensor, lengths: Tensor) -> Tensor:
    """Values (blocks, d), each no longer than its length."""
    norms = values.norm(dim=1)
    lengths = lengths.to(norms)
    longer = (norms > lengths) & (lengths > 0)
    return values * torch.where(longer, lengths / norms.clamp_min(1e-30), torch.ones_like(norms))[:, None]


def _checked(values: Tensor, problem: Problem) -> Tensor:
    if not bool(values.isfinite().all()):
        raise RunError(
            f"{one_line(repr(problem.request.prompt), 60)}: the value became not finite; use a model in float32, another "
            "layer or fewer steps"
        )
    return values.detach().cpu().double()


def newton(problem: Problem) -> Found:
    """Gauss-Newton steps on the least margin; where they end and a token of the target does not lead, Adam goes on there.

    Adam's step is as long along every coordinate, whatever the gradient: it leaves places where the gradient is small or turns
    at each step. Its values are longer, so it is for those edits alone.
    """
    trial = Trial(problem, problem.targets())
    values, leads, passes = _stepped(problem, trial)
    if not leads and problem.settings.further:
        values, more = _climbed(problem, trial, values)
        passes += more
    return Found(problem.at_keys(_checked(values, problem)), passes)


def _least(margins: Tensor) -> Tensor:
    """A smooth least one, below them all: -log sum exp(-m)."""
    return -torch.logsumexp(-margins, 0)


def _stepped(problem: Problem, trial: Trial) -> tuple[Tensor, bool, int]:
    """(v (blocks, d), whether every token of the target leads, passes) by damped, clamped Gauss-Newton steps on the least
    margin m: v <- (1 - decay) v + g (goal - m) / |g|^2.

    A step that loses margin is halved, from where it began. It ends at the goal, or above half of it where decay lets no
    step gain more. The last pass only looks.
    """
    settings, values = problem.settings, _start(problem)
    kept, reached, leads, step = values.detach(), float("-inf"), False, torch.zeros_like(values)
    passes, near = 0, _NEAR * settings.margin
    while passes < settings.steps:
        all_margins = trial.margins(trial.logits(values))
        least = _least(all_margins)
        found = float(least.detach())
        passes += 1
        if found >= reached - near:
            # Decay holds the margin below its goal.
            done = settings.margin - found <= near or (found > settings.margin / 2 and abs(found - reached) <= near)
            kept, reached, leads = values.detach(), found, trial.leads(all_margins)
            if done:
                break
            if passes < settings.steps:
                (gradient,) = torch.autograd.grad(least, values)
                step = gradient * ((settings.margin - found) / gradient.square().sum().clamp_min(1e-12))
        else:
            step = step / 2
        values = _at_most((1 - settings.decay) * kept + step, settings.clamp * trial.lengths).requires_grad_()
    return kept, leads, passes


def _climbed(problem: Problem, trial: Trial, start: Tensor) -> tuple[Tensor, int]:
    """(v (blocks, d), passes) by Adam on the least margin, until every token of the target leads by half the margin. The last
    pass only looks.

    Args:
        start: v to begin at. Where no pass gains on it, it is what comes out.
    """
    settings, value = problem.settings, start.clone().requires_grad_()
    lengths = trial.lengths.to(value)
    longest = max(settings.reach, settings.clamp) * lengths
    # Along each of d coordinates, so that a step is `stride` lengths at most.
    rates = settings.stride * lengths[:, None] / value.shape[1] ** 0.5
    optimizer = torch.optim.Adam([value], lr=1.0)
    kept, best = start, (False, float("-inf"))
    for passes in range(1, settings.further + 1):
        all_margins = trial.margins(trial.logits(value))
        least = _least(all_margins)
        done = trial.leads(all_margins, settings.margin / 2)
        # The smooth least one of many margins that all lead may lie below that of one that does not and others far ahead.
        found = (trial.leads(all_margins), float(least.detach()))
        if done or found > best:
            kept, best = value.detach().clone(), found
        if done or passes == settings.further:
            break
        before = value.detach().clone()
        (value.grad,) = torch.autograd.grad(-least, value)
        if not bool(value.grad.isfinite().all()):  # of half precision; what was best so far comes out
            break
        optimizer.step()
        with torch.no_grad():
            value.copy_(_at_most(before + rates * (value - before).clamp(-1, 1), longest))
    return kept, passes


def optimised(problem: Problem) -> Found:
    """ROME's v*, tried as it will be written: at every token, by its share of the key."""
    request, prompts = problem.request, problem.bench.prompts
    weighed = request.subject is not None and problem.settings.essence > 0
    essence = [prompts.place(f"{request.subject} is a", None)] if weighed else []
    values, passes = descend(problem, Trial(problem, problem.targets(), essence))
    return Found(problem.at_keys(values), passes)


def descend(problem: Problem, trial: Trial) -> tuple[Tensor, int]:
    """(v (blocks, d) float64, passes) by Adam: the target's negative log-likelihood, the KL of other texts, v's length.

    The objective of ROME (arXiv 2202.05262, equation 4) with the weight decay and clamp of its authors. The last pass only
    looks, and so does one whose loss is below `enough`.
    """
    settings, value, before = problem.settings, _start(problem), None
    rows = torch.arange(len(trial.rows), len(trial.rows) + len(trial.ends))
    lengths = trial.lengths.to(value.device)
    optimizer = torch.optim.Adam([value], lr=settings.rate)
    passes = 0
    for step in range(settings.steps):
        logits = trial.logits(value)
        aimed = trial.aimed(logits).log_softmax(-1)
        loss = -aimed.gather(-1, trial.target.to(aimed.device)[:, None]).mean()
        if len(rows):
            now = wide(logits[rows, trial.ends]).log_softmax(-1)
            before = now.detach() if before is None else before  # the first value is 0
            loss = loss + settings.essence * (before.exp() * (before - now)).sum(-1).mean()
        loss = loss + settings.weight_decay * (value.norm(dim=1) / lengths.clamp_min(1e-6) ** 2).sum()
        passes += 1
        if float(loss.detach()) < settings.enough or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        value.grad = torch.autograd.grad(loss, value)[0].nan_to_num()
        optimizer.step()
        with torch.no_grad():
            value.copy_(_at_most(value, settings.clamp * lengths))
    return _checked(value, problem), passes


def margin(problem: Problem) -> Found:
    """The last block's values in closed form: each token that predicts a part of the target has a key of its own. Behind the
    block there is only a norm and the head, whose gradient takes no pass through the model.

    Raises:
        NPTError: another block than the last one.
    """
    bench, settings = problem.bench, problem.settings
    if bench.layers != (len(bench.blocks) - 1,):
        named = " ".join(map(str, bench.layers))
        raise NPTError(
            f"values='margin' is for the last block, layer={len(bench.blocks) - 1}, and the store edits block {named}; "
            "use that layer, or values='newton'"
        )
    (row,) = [bench.prompts.target(problem.request.prompt, problem.request.target, settings.terminator)]
    inside = bench.inside([row.ids], whole=False)
    at, target = torch.arange(row.start - 1, len(row.ids) - 1), torch.tensor(row.targets)
    values = torch.zeros(len(at), bench.first.size, device=bench.adapter.device, dtype=bench.adapter.dtype)
    for _ in range(4):  # the norm's denominator moves with the value
        values.requires_grad_()
        whole = values.new_zeros(inside.inputs[0].shape[1], bench.first.size).index_copy(
            0, at.to(values.device), values
        )
        with bench.adapter.trying(lambda x, whole=whole: whole):  # type: ignore[misc]
            found = margins(wide(bench.again(inside.recording, at)[0]), target)
        (gradient,) = torch.autograd.grad(found.sum(), values)
        gap = (settings.margin - found.detach()).clamp_min(0)
        step = gradient * (gap / gradient.square().sum(-1).clamp_min(1e-12))[:, None]
        values = values.detach() + step
    keys = inside.inputs[0][0, at].cpu().double().T
    return Found(problem.pairs([keys], [_checked(values, problem).T]), 0)


def naive(problem: Problem) -> Found:
    """The earlier authors' rule, W += alpha dW: the transient weight delta of the statement's last token, made permanent.

    A documented negative: its key is that of the statement's end, which no prompt has.

    Raises:
        NPTError: more than one block.
    """
    bench, request = problem.bench, problem.request
    if len(bench.layers) > 1:
        raise NPTError(
            f"values='naive' is for one block, and the store edits {' '.join(map(str, bench.layers))}; name one layer"
        )
    ids = bench.prompts.ids(continued(request.prompt, request.target))
    seen: list[Tensor] = []
    tap = find(bench.blocks[bench.layers[0]], family_of(bench.base), "tap")
    handle = tap.register_forward_hook(lambda module, args, output: seen.append(first_tensor(output)), prepend=True)
    try:
        inside = bench.inside([ids], whole=False)
    finally:
        handle.remove()
    attention = seen[-1].reshape(len(ids), -1)[-1].cpu().double()
    key = inside.inputs[0][0, -1].cpu().double()
    return Found(problem.pairs([key[:, None]], [problem.settings.alpha * attention[:, None]]), 0)


STRATEGIES: dict[str, Callable[[Problem], Found]] = {
    "newton": newton,
    "optimised": optimised,
    "margin": margin,
    "naive": naive,
}

#: Defaults of a strategy's own.
_OWN = {
    "optimised": Settings(steps=25, clamp=4.0, contexts=1),
    "margin": Settings(margin=8.0, contexts=0),
    "naive": Settings(contexts=0),
}
#: Strategies whose facts several blocks can share.
SHARING = ("newton", "optimised")


def settings_of(name: str, given: dict[str, Any]) -> Settings:
    """The settings of a strategy: its defaults, and those that are given.

    Raises:
        NPTError: an unknown strategy or setting, or a value out of range.
    """
    if name not in STRATEGIES:
        raise NPTError(f"values={name!r} is unknown; use {', '.join(STRATEGIES)}")
    start = _OWN.get(name, Settings())
    known = Settings.__dataclass_fields__
    for key, value in given.items():
        if key not in known:
            raise NPTError(f"{key}={value!r}: no setting of values has that name; use {', '.join(known)}")
        if key == "terminator":
            if not (value is None or (isinstance(value, str) and value)):
                raise NPTError(f"terminator={value!r}: use text, or None for whatever follows")
        elif key in _LEAST:
            if type(value) is not int or value < _LEAST[key]:
                raise NPTError(f"{key}={value!r}: use a whole number from {_LEAST[key]}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise NPTError(f"{key}={value!r}: use a number from 0")
        elif key in _POSITIVE and value == 0:
            raise NPTError(f"{key}={value!r}: use a number above 0; further=0 takes no pass of Adam")
    return replace(start, **given)
