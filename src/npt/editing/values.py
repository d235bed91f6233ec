"""Values: what has to be added to `down`'s output at the key, so that the target follows the prompt. A table of strategies.

Each edit's values are found alone, on the base: they depend on no other edit. A trial adds v (a x) at every token x of a text,
as the finished weight delta will, with a = M k / (k^T M k); so what is tried is what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from npt.block.families import family_of
from npt.block.hooks import first_tensor
from npt.block.probing import find
from npt.common.display import one_line
from npt.common.precision import cast, wide
from npt.editing.bench import Bench
from npt.editing.keys import Place, Target
from npt.editing.requests import Request, continued
from npt.editing.solve import Metric, Pairs, solve
from npt.errors import NPTError, RunError

#: Share of the margin that may be missing at the end: the last steps change little.
_NEAR = 0.05
#: Nats by which the end of the target's last word shall lead a longer word.
_WORD_END = 2.0


@dataclass(frozen=True)
class Settings:
    """How values are found.

    margin: nats by which every token of the target shall lead the log-sum-exp of all others. steps: the most passes.
    decay: share of the value given up in each Newton step. clamp: the value's length, at most, in lengths of the projection's
    own output at that token. terminator: text that shall follow the target; None for whatever does. rate, weight_decay and
    essence: of `optimised`, as ROME names them (Adam's step, the value's own length, KL of "SUBJECT is a"). alpha: of `naive`.
    """

    margin: float = 8.0
    steps: int = 10
    decay: float = 0.05
    clamp: float = 8.0
    terminator: str | None = None
    rate: float = 0.5
    weight_decay: float = 0.5
    essence: float = 0.0625
    alpha: float = 1.0


@dataclass(frozen=True)
class Found:
    """An edit's pairs, and the passes forward and backward that they took."""

    pairs: Pairs
    passes: int


@dataclass(frozen=True)
class Problem:
    """One edit alone.

    key: (f,), the subject's. fixed: (f, m), keys that get no value. metric: M.
    """

    bench: Bench
    request: Request
    settings: Settings
    metric: Metric
    key: Tensor
    fixed: Tensor

    def targets(self) -> list[Target]:
        """Prompt and paraphrases, each with the target and its terminator behind it."""
        terminator = self.settings.terminator
        return [self.bench.prompts.target(prompt, self.request.target, terminator) for prompt in self.request.prompts]

    def pairs(self, keys: Tensor, values: Tensor) -> Pairs:
        """Keys (f, n) with values (d, n), and the fixed keys with none."""
        everything = torch.cat([keys, self.fixed], 1)
        zeros = values.new_zeros(len(values), self.fixed.shape[1])
        return Pairs(everything, self.metric(everything), torch.cat([values, zeros], 1))

    def row(self) -> Tensor:
        """a (f,): the weight delta is v a^T, with a k = 1 and a p = 0 for every fixed key p."""
        return solve(self.pairs(self.key[:, None], self.key.new_ones(1, 1))).delta[0]


class Trial:
    """Texts with a target behind them, and what the model says of them when v is written at the key.

    Args:
        problem: the edit. rows: prompts with their targets. extra: other texts, whose last token is asked too. only: the
            one token of each row and other text at which v is added, whole, as ROME and MEMIT try it; without them it is
            added as the finished weight delta will.
    """

    def __init__(
        self,
        problem: Problem,
        rows: Sequence[Target],
        extra: Sequence[Place] = (),
        only: Sequence[int] | None = None,
    ):
        bench = problem.bench
        self.bench, self.rows = bench, rows
        self.inside = bench.inside([*(row.ids for row in rows), *(place.ids for place in extra)], whole=False)
        adapter, self.margin = bench.adapter, problem.settings.margin
        # Indices stay on the CPU, from where they serve logits on any device.
        spots = [(i, row.start - 1 + t, token) for i, row in enumerate(rows) for t, token in enumerate(row.targets)]
        self.row_of, self.at, self.target = (torch.tensor(part) for part in zip(*spots, strict=True))
        # Without a terminator, the word must end behind a target that ends in a letter: "Oxford" is not "Oxfordshire".
        words = [i for i, row in enumerate(rows) if row.in_word and row.words == len(row.targets)]
        self.last = (
            torch.tensor(words, dtype=torch.long),
            torch.tensor([len(rows[i].ids) - 1 for i in words], dtype=torch.long),
        )
        self.ends = torch.tensor([len(place.ids) - 1 for place in extra], dtype=torch.long)
        # Logits are made at these tokens alone; places in them are indices among these.
        self._asked = torch.cat([self.at, self.last[1], self.ends]).unique()
        self._at = torch.searchsorted(self._asked, self.at)
        self.last = (self.last[0], torch.searchsorted(self._asked, self.last[1]))
        self.ends = torch.searchsorted(self._asked, self.ends)
        if only is None:
            self.a = problem.row().to(device=adapter.device, dtype=adapter.dtype)
            self._spots: Tensor | None = None
            # The key itself is at the first row's token that is moved most.
            place = int(self.scores(self.inside.inputs[0]).abs()[: rows[0].start].argmax())
        else:
            one = torch.zeros(self.inside.inputs.shape[:2], dtype=adapter.dtype)
            one[torch.arange(len(only)), torch.tensor(only)] = 1
            self._spots, place = one.to(adapter.device), only[0]
        self.length = float(wide(self.inside.outputs[0, place]).norm())

    def scores(self, inputs: Tensor) -> Tensor:
        """The share of v that each token gets, of the projection's inputs (..., f): a x, or 1 at its spot alone."""
        if self._spots is not None:
            return self._spots.reshape(inputs.shape[:-1])
        return cast(inputs, self.a.dtype) @ self.a

    def logits(self, value: Tensor) -> Tensor:
        """Logits (rows, tokens asked for, vocabulary) with v (d,)."""
        with self.bench.adapter.trying(lambda x: self.scores(x)[..., None] * value):
            return self.again()

    def again(self) -> Tensor:
        """The same with what is at work."""
        return self.bench.again(self.inside.recording, self._asked)

    def aimed(self, logits: Tensor) -> Tensor:
        """Logits (targets, vocabulary) where a target is to be predicted."""
        return wide(logits[self.row_of, self._at])

    def margins(self, logits: Tensor) -> Tensor:
        """Nats by which each target leads the log-sum-exp of all other tokens, (targets,).

        Behind them, for each text without a terminator: how far the end of the last word leads its going on, raised so that
        `_WORD_END` nats of it count as the whole margin.
        """
        found = margins(self.aimed(logits), self.target)
        if not len(self.last[0]):
            return found
        ends = word_ends(wide(logits[self.last]), self.bench.prompts.continuing)
        return torch.cat([found, ends + max(0.0, self.margin - _WORD_END)])


def margins(logits: Tensor, target: Tensor) -> Tensor:
    """Logit of the target less the log-sum-exp of all others, (rows,), of logits (rows, vocabulary)."""
    target = target.to(logits.device)[:, None]
    own = logits.gather(-1, target)
    others = logits.scatter(-1, target, float("-inf"))
    return own[:, 0] - others.logsumexp(-1)


def word_ends(logits: Tensor, continuing: Tensor) -> Tensor:
    """Nats by which tokens that end a word lead those that go on with it, (rows,), of logits (rows, vocabulary)."""
    mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
    mask[: len(continuing)] = continuing
    mask = mask.to(logits.device)
    minus = float("-inf")
    return logits.masked_fill(mask, minus).logsumexp(-1) - logits.masked_fill(~mask, minus).logsumexp(-1)


def _start(problem: Problem) -> Tensor:
    adapter = problem.bench.adapter
    return torch.zeros(problem.bench.size, device=adapter.device, dtype=adapter.dtype, requires_grad=True)


def _at_most(value: Tensor, length: float) -> Tensor:
    norm = float(value.norm())
    return value * (length / norm) if norm > length > 0 else value


def _checked(value: Tensor, problem: Problem) -> Tensor:
    if not bool(value.isfinite().all()):
        raise RunError(
            f"{one_line(repr(problem.request.prompt), 60)}: the value became not finite; use a model in float32, another "
            "layer or fewer steps"
        )
    return value.detach().cpu().double()


def newton(problem: Problem) -> Found:
    """Damped, clamped Gauss-Newton steps on the least margin m: v <- (1 - decay) v + g (goal - m) / |g|^2.

    A step that loses margin is halved, from where it began.
    """
    settings, trial, value = problem.settings, Trial(problem, problem.targets()), _start(problem)
    kept, reached, step = value, float("-inf"), torch.zeros_like(value)
    passes, near = 0, _NEAR * settings.margin
    for _ in range(settings.steps):
        least = -torch.logsumexp(-trial.margins(trial.logits(value)), 0)
        found = float(least.detach())
        passes += 1
        if found >= reached - near:
            kept, reached = value.detach(), found
            if settings.margin - found <= near:
                break
            (gradient,) = torch.autograd.grad(least, value)
            step = gradient * ((settings.margin - found) / gradient.square().sum().clamp_min(1e-12))
        else:
            step = step / 2
        value = _at_most((1 - settings.decay) * kept + step, settings.clamp * trial.length).requires_grad_()
    return Found(problem.pairs(problem.key[:, None], _checked(kept, problem)[:, None]), passes)


def optimised(problem: Problem) -> Found:
    """ROME's v*, tried as it will be written: at every token, by its share of the key."""
    request, prompts = problem.request, problem.bench.prompts
    essence = [] if request.subject is None else [prompts.place(f"{request.subject} is a", None)]
    value, passes = descend(problem, Trial(problem, problem.targets(), essence))
    return Found(problem.pairs(problem.key[:, None], value[:, None]), passes)


def descend(problem: Problem, trial: Trial) -> tuple[Tensor, int]:
    """(v (d,) float64, passes) by Adam: the target's negative log-likelihood, the KL of the trial's other texts, v's length.

    The objective of ROME (arXiv 2202.05262, equation 4) with the weight decay and clamp of its authors. The last pass only
    looks, and so does one whose loss is below 0.05.
    """
    settings, value, before = problem.settings, _start(problem), None
    rows = torch.arange(len(trial.rows), len(trial.rows) + len(trial.ends))
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
        loss = loss + settings.weight_decay * value.norm() / max(trial.length, 1e-6) ** 2
        passes += 1
        if float(loss.detach()) < 5e-2 or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        value.grad = torch.autograd.grad(loss, value)[0].nan_to_num()
        optimizer.step()
        with torch.no_grad():
            value.copy_(_at_most(value, settings.clamp * trial.length))
    return _checked(value, problem), passes


def margin(problem: Problem) -> Found:
    """The last block's values in closed form: each token that predicts a part of the target has a key of its own. Behind the
    block there is only a norm and the head, whose gradient takes no pass through the model.

    Raises:
        NPTError: another block than the last one.
    """
    bench, settings = problem.bench, problem.settings
    if bench.layer != len(bench.blocks) - 1:
        raise NPTError(
            f"values='margin' is for the last block, layer={len(bench.blocks) - 1}, and the store edits block {bench.layer}; "
            "use that layer, or values='newton'"
        )
    (row,) = [bench.prompts.target(problem.request.prompt, problem.request.target, settings.terminator)]
    inside = bench.inside([row.ids], whole=False)
    at, target = torch.arange(row.start - 1, len(row.ids) - 1), torch.tensor(row.targets)
    values = torch.zeros(len(at), bench.size, device=bench.adapter.device, dtype=bench.adapter.dtype)
    for _ in range(4):  # the norm's denominator moves with the value
        values.requires_grad_()
        whole = values.new_zeros(inside.inputs.shape[1], bench.size).index_copy(0, at.to(values.device), values)
        with bench.adapter.trying(lambda x, whole=whole: whole):  # type: ignore[misc]
            found = margins(wide(bench.again(inside.recording, at)[0]), target)
        (gradient,) = torch.autograd.grad(found.sum(), values)
        gap = (settings.margin - found.detach()).clamp_min(0)
        step = gradient * (gap / gradient.square().sum(-1).clamp_min(1e-12))[:, None]
        values = values.detach() + step
    keys = inside.inputs[0, at].cpu().double().T
    return Found(problem.pairs(keys, _checked(values, problem).T), 0)


def naive(problem: Problem) -> Found:
    """The earlier authors' rule, W += alpha dW: the transient weight delta of the statement's last token, made permanent.

    A documented negative: its key is that of the statement's end, which no prompt has.
    """
    bench, request = problem.bench, problem.request
    ids = bench.prompts.ids(continued(request.prompt, request.target))
    seen: list[Tensor] = []
    tap = find(bench.blocks[bench.layer], family_of(bench.base), "tap")
    handle = tap.register_forward_hook(lambda module, args, output: seen.append(first_tensor(output)), prepend=True)
    try:
        inside = bench.inside([ids], whole=False)
    finally:
        handle.remove()
    attention = seen[-1].reshape(len(ids), -1)[-1].cpu().double()
    key = inside.inputs[0, -1].cpu().double()
    return Found(problem.pairs(key[:, None], problem.settings.alpha * attention[:, None]), 0)


STRATEGIES: dict[str, Callable[[Problem], Found]] = {
    "newton": newton,
    "optimised": optimised,
    "margin": margin,
    "naive": naive,
}


def settings_of(name: str, given: dict[str, Any]) -> Settings:
    """The settings of a strategy: its defaults, and those that are given.

    Raises:
        NPTError: an unknown strategy or setting, or a value out of range.
    """
    if name not in STRATEGIES:
        raise NPTError(f"values={name!r} is unknown; use {', '.join(STRATEGIES)}")
    start = Settings(steps=25, clamp=4.0) if name == "optimised" else Settings()
    known = Settings.__dataclass_fields__
    for key, value in given.items():
        if key not in known:
            raise NPTError(f"{key}={value!r}: no setting of values has that name; use {', '.join(known)}")
        if key == "terminator":
            if not (value is None or (isinstance(value, str) and value)):
                raise NPTError(f"terminator={value!r}: use text, or None for whatever follows")
        elif key == "steps":
            if type(value) is not int or value < 1:
                raise NPTError(f"steps={value!r}: use a whole number from 1")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise NPTError(f"{key}={value!r}: use a number from 0")
    return replace(start, **given)
