"""The objectives of equivalence pre-training. Every loss is a sum over the tokens that count, divided by `items`.

    local      per converted block, |update_NPT(h, a) - update(h, a)|^2 / (d c_l) with the original's h and a; c_l is the
               mean square of the original update, so that blocks weigh alike. No gradient crosses attention or another
               block, and one block's activations live at a time.
    composite  the same without c_l: the original description's MSE between block outputs.
    logits     KL(original || NPT) over next tokens, end to end, in chunks of positions.

`items` is the number of counted tokens of the whole optimiser step, so the split into micro-batches changes nothing.
`local` and `composite` report the mean over blocks, but hand each block the gradient of its own loss. That gradient does not
depend on which other blocks are converted, so blocks may be trained by separate jobs (`npt.adapters.join`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from npt.block.layer import BlockRecord, NPTLayer
from npt.block.modes import Mode, running_as, watching, watching_deltas
from npt.block.probing import logit_head
from npt.block.weight_delta import WeightDelta
from npt.common.precision import HALF, wide
from npt.common.sharded import gathered, through
from npt.data.batches import scored_positions
from npt.equivalence.teacher import ROW, TeacherCache, grouped
from npt.errors import REMEDY, NPTError, RunError
from npt.tuner.converted import ConvertedModel, active_layers, run_backbone
from npt.tuner.nonfinite import find_nonfinite
from npt.tuner.trunk import shared_trunk

OBJECTIVES = ("local", "logits", "composite")
REGULARIZERS = ("factors", "delta")
#: Positions whose full next-token distributions are in memory at once.
POSITION_CHUNK = 1024
#: Least number of tokens that `local` and `composite` put through a block at once; fewer would starve the processor.
TOKEN_CHUNK = 512


class Losses(NamedTuple):
    """One micro-batch's share of the step's losses, as scalars. Only `total` carries a gradient."""

    total: Tensor
    equivalence: Tensor
    regularization: Tensor


@dataclass
class Objective:
    """An objective with its weights. `Objective(name)` makes a `BlockObjective` or a `LogitsObjective`.

    Args:
        name: one of `OBJECTIVES`.
        equivalence_weight: alpha.
        regularization_weight: beta.
        regularizer: one of `REGULARIZERS`: `factors` is |A|_F + |B|_F, `delta` the mean |dW|_F^2 over real tokens.
        scales: {block index: c_l}, needed by `local` (see `update_scales`).
        teacher: the original's side from disk, for batches that say which rows they are (`npt.equivalence.teacher`).

    Attributes:
        per_block: True where each block has a loss and a gradient of its own.
        teacher_kind: the targets on disk it reads, one of `npt.equivalence.teacher.TARGETS`.
        names: the names that the class takes.
    """

    name: str = "logits"
    equivalence_weight: float = 1.0
    regularization_weight: float = 0.0
    regularizer: str = "delta"
    scales: dict[int, float] = field(default_factory=dict)
    teacher: TeacherCache | None = None

    per_block: ClassVar[bool]
    teacher_kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]] = OBJECTIVES

    def __new__(cls, name: str = "logits", *args: Any, **kwargs: Any) -> Objective:
        """Picks the class by the name; `__post_init__` refuses a name that has none."""
        found = next((c for c in (BlockObjective, LogitsObjective) if name in c.names), cls)
        return super().__new__(found if cls is Objective else cls)

    def __post_init__(self) -> None:
        for value, allowed, what in (
            (self.name, self.names, "objective"),
            (self.regularizer, REGULARIZERS, "regularizer"),
        ):
            if value not in allowed:
                raise NPTError(f"training.{what}={value!r}: use one of {', '.join(allowed)}")

    def __call__(self, model: ConvertedModel, inputs: dict[str, Tensor], items: Tensor | float) -> Losses:
        """The losses of one micro-batch {"input_ids", "attention_mask", "labels"}, each (batch, tokens)."""
        counted = torch.nn.functional.pad(scored_positions(inputs["labels"]), (0, 1))
        losses = self._losses(model, inputs, counted, items)
        if self.regularizer == "factors":
            norm = factor_norm(active_layers(model), apart=self.per_block)
            factors = norm * (counted.sum().to(norm.dtype) / items)
            total = losses.total + self.regularization_weight * factors
            losses = losses._replace(total=total, regularization=factors.detach())
        return losses

    def prepare(self, model: ConvertedModel, first: dict[str, Tensor]) -> None:
        """Checks the model and measures the constants that the losses need. All processes call it before training.

        Args:
            first: a batch of the first blocks of the text, the same on every process.
        """

    def _losses(
        self, model: ConvertedModel, inputs: dict[str, Tensor], counted: Tensor, items: Tensor | float
    ) -> Losses:
        """The losses with the `delta` regulariser. counted (batch, tokens): the positions whose predictions count."""
        raise NotImplementedError

    @property
    def _needs_deltas(self) -> bool:
        return self.regularizer == "delta" and self.regularization_weight > 0


@dataclass
class BlockObjective(Objective):
    """`local` and `composite`: each block is compared with its original on the original's own h and a."""

    name: str = "local"
    per_block: ClassVar[bool] = True
    teacher_kind: ClassVar[str] = "hidden"
    names: ClassVar[tuple[str, ...]] = ("local", "composite")

    @property
    def _is_scaled(self) -> bool:
        """True where each block's error is divided by its c_l."""
        return self.name == "local"

    def prepare(self, model: ConvertedModel, first: dict[str, Tensor]) -> None:
        """Measures c_l of every block, unless it is given."""
        if self._is_scaled and not self.scales:
            self.scales = through(model, lambda: update_scales(model, first))

    def _losses(
        self, model: ConvertedModel, inputs: dict[str, Tensor], counted: Tensor, items: Tensor | float
    ) -> Losses:
        layers = active_layers(model)
        gradients: dict[Tensor, Tensor] = {}
        sums = [wide(torch.zeros((), dtype=layers[0].weight.dtype, device=counted.device)) for _ in range(2)]

        def see(layer: NPTLayer, record: BlockRecord) -> None:
            own = [p for p in layer.own.parameters() if p.requires_grad]
            for part, mask in _token_chunks(record, counted):
                with torch.enable_grad():
                    equivalence, delta = self._block_loss(layer, part, mask)
                    equivalence, delta = equivalence / items, delta / items
                    loss = self.equivalence_weight * equivalence + self.regularization_weight * delta
                    if own and loss.requires_grad:
                        factor = self._factor(layer, part.hidden_states, items)
                        found = torch.autograd.grad(factor * loss, own, allow_unused=True)
                        for p, g in zip(own, found, strict=True):
                            g = torch.zeros_like(p) if g is None else g / factor
                            gradients[p] = gradients[p] + g if p in gradients else g
                sums[0] += equivalence.detach()
                sums[1] += delta.detach()

        if self.teacher is not None and ROW in inputs:
            for layer in layers:
                with gathered(layer.get_base_layer()):
                    see(layer, self.teacher.record(layer.index, inputs[ROW], counted.device))
        else:
            with torch.no_grad(), running_as(layers, Mode.ORIGINAL), watching(layers, see):
                run_backbone(model, inputs)
        sums = [value / len(layers) for value in sums]
        total = self.equivalence_weight * sums[0] + self.regularization_weight * sums[1]
        if gradients and torch.is_grad_enabled():
            total = _WithGradients.apply(total, list(gradients.values()), *gradients)
        return Losses(total, sums[0], sums[1])

    def _factor(self, layer: NPTLayer, h: Tensor, items: Tensor | float) -> float:
        """The factor, a power of two, on a loss where its gradient is taken.

        In float16 the gradient of a mean over a step's tokens would fall below the least number; that of a sum does not.
        """
        kind, formats = h.device.type, [h.dtype]
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            formats.append(torch.get_autocast_dtype(kind))
        if torch.float16 not in formats:
            return 1.0
        scale = self.scales[layer.index] if self._is_scaled else 1.0
        return 2.0 ** round(math.log2(max(float(items), 1.0) * max(scale, 1.0)))

    def _block_loss(self, layer: NPTLayer, record: BlockRecord, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the counted tokens: (mean square error of the update, mean |dW|^2 over projections)."""
        h, a, y = (x.detach()[counted] for x in (record.hidden_states, record.attention, record.output))
        target, norms = original_update(layer, h, a, y), _DeltaSquares()
        with watching_deltas([layer], norms.see if self._needs_deltas else None):
            update = layer.update_from(h[None], a[None])[0]
        error = (wide(update) - target).square().mean(-1).sum()
        scale = self.scales[layer.index] if self._is_scaled else 1.0
        return error / scale, norms.mean_square(error)


@dataclass
class LogitsObjective(Objective):
    """`logits`: the KL divergence of next-token distributions, end to end."""

    per_block: ClassVar[bool] = False
    teacher_kind: ClassVar[str] = "logits"
    names: ClassVar[tuple[str, ...]] = ("logits",)

    def prepare(self, model: ConvertedModel, first: dict[str, Tensor]) -> None:
        """Checks that the logits can be computed from the last hidden states."""
        through(model, lambda: check_logit_head(model, first["input_ids"][:1, :8]))

    def _losses(
        self, model: ConvertedModel, inputs: dict[str, Tensor], counted: Tensor, items: Tensor | float
    ) -> Losses:
        layers, head = active_layers(model), logit_head(model)
        norms = _DeltaSquares(counted)
        teacher = self.teacher if ROW in inputs else None
        with shared_trunk(model) if teacher is None else nullcontext():
            if teacher is not None:
                target = [x[counted] for x in teacher.log_probabilities(inputs[ROW], counted.device)]
            else:
                with torch.no_grad(), running_as(layers, Mode.ORIGINAL):
                    target = [run_backbone(model, inputs)[counted]]
            with watching_deltas(layers, norms.see if self._needs_deltas else None):
                student = run_backbone(model, inputs)[counted]
        kl = divergence_sum(head, student, target)
        equivalence = kl / items
        delta = norms.mean_square(kl) / (items * len(layers))
        total = self.equivalence_weight * equivalence + self.regularization_weight * delta
        return Losses(total, equivalence.detach(), delta.detach())


def objective_class(name: str) -> type[Objective]:
    """The class of an objective, by its name: one of `OBJECTIVES`."""
    return LogitsObjective if name in LogitsObjective.names else BlockObjective


def _token_chunks(record: BlockRecord, counted: Tensor) -> Iterator[tuple[BlockRecord, Tensor]]:
    """Yields (record of (tokens, d), mask (tokens,)) of the parts of a pass through a block.

    A part is a quarter of the tokens, at least `TOKEN_CHUNK`, so that training a block holds little more than the frozen
    forward does.
    """
    parts = [x.flatten(0, 1) for x in (record.hidden_states, record.attention, record.output)]
    mask = counted.flatten()
    size = max(TOKEN_CHUNK, -(-len(mask) // 4))
    for start in range(0, len(mask), size):
        part = slice(start, start + size)
        yield BlockRecord(*(x[part] for x in parts)), mask[part]


class _DeltaSquares:
    """Sums |dW|_F^2 over tokens as it watches a forward; the sums keep their gradient.

    Args:
        counted: the mask of the tokens that count; None where all do.
    """

    def __init__(self, counted: Tensor | None = None):
        self.counted = counted
        self.per_layer: dict[int, list[Tensor]] = {}

    def see(self, layer: NPTLayer, deltas: dict[str, WeightDelta]) -> None:
        """Takes the deltas of one pass through a block."""
        for delta in deltas.values():
            square = delta.frobenius_norm_square()
            square = square.flatten() if self.counted is None else square[self.counted]
            self.per_layer.setdefault(layer.index, []).append(wide(square).sum())

    def mean_square(self, like: Tensor) -> Tensor:
        """The sum over tokens and blocks of the mean over projections; zero where nothing was observed."""
        means = [torch.stack(values).mean() for values in self.per_layer.values()]
        return torch.stack(means).sum() if means else torch.zeros_like(like)


class _WithGradients(torch.autograd.Function):
    """Hands gradients that are computed already to autograd, which scales and accumulates them as any others."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return (None, None, *(upstream * gradient for gradient in ctx.gradients))


def divergence_sum(
    head: Callable[[Tensor], Tensor], student: Tensor, target: Sequence[Tensor], weights: Tensor | None = None
) -> Tensor:
    """Sum over positions of KL(teacher || student) in nats, each times its weight, in chunks of positions.

    Args:
        head: hidden states to logits.
        student: last hidden states (positions, d).
        target: the teacher's; or ids and log-probabilities of outcomes, as `grouped` gives them.
        weights: (positions,); None for ones.
    """
    kl = wide(student.new_zeros(()))
    for chunk in torch.arange(len(student), device=student.device).split(POSITION_CHUNK):
        part = None if weights is None else weights[chunk]
        kl = kl + checkpoint(_chunk_kl, head, part, student[chunk], *(x[chunk] for x in target), use_reentrant=False)
    return kl


def _chunk_kl(head: Callable[[Tensor], Tensor], weights: Tensor | None, student: Tensor, *target: Tensor) -> Tensor:
    """`divergence_sum` of one chunk."""
    own = wide(head(student)).log_softmax(-1)
    if len(target) == 2:
        ids, expected = target
        own = grouped(own, ids)
    else:
        with torch.no_grad():
            expected = wide(head(target[0])).log_softmax(-1)
    divergence = expected.exp() * (expected - own)
    return divergence.sum() if weights is None else (weights * divergence.sum(-1)).sum()


@torch.no_grad()
def check_logit_head(model: ConvertedModel, input_ids: Tensor) -> None:
    """Checks that `logit_head` on the backbone gives this model's own logits.

    Raises:
        NPTError: it does not, so the `logits` objective would train towards something else.
        RunError: the hidden states are not finite.
    """
    hidden = run_backbone(model, {"input_ids": input_ids})
    if not hidden.isfinite().all():
        where = find_nonfinite(model, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
        raise RunError(f"before step 1: the model's hidden states are not finite, {where}; {REMEDY}")
    logits = model(input_ids=input_ids, use_cache=False).logits
    error = (logit_head(model)(hidden).float() - logits.float()).abs().max() / logits.float().abs().max()
    if not error < 1e-2:
        raise NPTError(
            f"{type(model).__name__} transforms its logits in a way npt does not know (relative difference "
            f"{error:.3g}); use training.objective=local, which needs no logits"
        )


@torch.no_grad()
def original_update(layer: NPTLayer, h: Tensor, a: Tensor, y: Tensor) -> Tensor:
    """The original's update y - h of a block, (tokens, d) as h, a and y are, in float32 or better.

    In half precision it is that of the exact value: y is rounded, at massive activations by more than what is to be learnt.
    """
    if h.dtype not in HALF:
        return wide(y - h)
    with watching_deltas([layer], None):
        return wide(layer.update_from(h[None], a[None], Mode.EXACT)[0])


@torch.no_grad()
def update_scales(model: ConvertedModel, inputs: dict[str, Tensor]) -> dict[int, float]:
    """{block index: mean square of the original update y - h over real tokens}: the constants of `local`."""
    layers, scales, mask = active_layers(model), {}, inputs["attention_mask"].bool()

    def see(layer: NPTLayer, record: BlockRecord) -> None:
        update = original_update(layer, *(x[mask] for x in (record.hidden_states, record.attention, record.output)))
        scales[layer.index] = max(float(update.square().mean()), 1e-12)

    with running_as(layers, Mode.ORIGINAL), watching(layers, see):
        run_backbone(model, inputs)
    return scales


def factor_norm(layers: list[NPTLayer], *, apart: bool = False) -> Tensor:
    """The mean over blocks of |A|_F + sum |B|_F, the original description's regulariser.

    Args:
        apart: gives each block the gradient of its own norm, not of the mean.
    """
    norms: list[Tensor] = []
    gradients: dict[Tensor, Tensor] = {}
    for layer in layers:
        with gathered(layer.get_base_layer()), torch.enable_grad():
            matrices = [p for n, p in layer.own.named_parameters() if n == "A" or n.startswith("B_")]
            # A zero matrix has no gradient direction; the epsilon keeps sqrt'(0) finite.
            norm = sum(((m.square().sum() + 1e-24).sqrt() for m in matrices), layer.weight.new_zeros(()))
            trained = [m for m in matrices if m.requires_grad]
            if trained:
                found = torch.autograd.grad(norm / (1 if apart else len(layers)), trained)
                gradients |= dict(zip(trained, found, strict=True))
        norms.append(norm.detach())
    mean = torch.stack(norms).mean()
    if gradients and torch.is_grad_enabled():
        mean = _WithGradients.apply(mean, list(gradients.values()), *gradients)
    return mean
