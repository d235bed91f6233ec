"""The size of the weight deltas, beside the exact value's and the least norm that gives the same block output."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npt.block.layer import BlockRecord, NPTLayer
from npt.block.mixture import mixture_weight
from npt.block.modes import Mode, watching_deltas
from npt.block.probing import execution_device
from npt.block.weight_delta import WeightDelta
from npt.common.sharded import gathered
from npt.evaluation.look import Batch, Observer
from npt.tuner.converted import ConvertedModel, active_layers, chosen_layers, run_backbone

#: Tokens whose dW x is held per projection, for its effective rank.
RANK_TOKENS = 512
LARGEST = 10
PERCENTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass
class DeltaRecord:
    """The weight deltas of one projection over real tokens.

    squares: |dW|_F^2 (tokens,). skipped: tokens without an input key. effects: dW x of the first ones, (tokens, out).
    """

    squares: list[Tensor] = field(default_factory=list)
    skipped: float = 0.0
    effects: list[Tensor] = field(default_factory=list)

    def norms(self) -> np.ndarray:
        """|dW|_F, (tokens,)."""
        found: np.ndarray = torch.cat(self.squares).sqrt().numpy()
        return found


Figures = dict[str, Any]
#: {block: {projection: record}}.
Records = dict[int, dict[str, DeltaRecord]]


class WeightDeltas(Observer):
    """The weight deltas of every token: the adapter's on its own stream, and the exact value's on the original's.

    Args:
        effect_tokens: the number of tokens whose dW x is kept; 0 where only norms are wanted.
    """

    def __init__(self, model: ConvertedModel, *, effect_tokens: int = RANK_TOKENS):
        self.model = model
        self.own: Records = {layer.index: {} for layer in active_layers(model)}
        self.exact: Records = {index: {} for index in self.own}
        self.effect_tokens = effect_tokens
        self.rows: list[tuple[Tensor, Tensor]] = []

    def begin(self, batch: Batch) -> None:
        """Keeps the batch's ids and which tokens are real."""
        self.mask = batch["attention_mask"].bool()
        self.rows += zip(batch["input_ids"].cpu(), self.mask.cpu(), strict=True)

    def see_original(self, layer: NPTLayer, record: BlockRecord) -> None:
        """Takes the exact value's deltas: those that give the block the original's output."""
        with watching_deltas([layer], partial(self._add, self.exact)):
            layer.update_from(record.hidden_states, record.attention, Mode.EXACT)

    def see_deltas(self, layer: NPTLayer, deltas: dict[str, WeightDelta]) -> None:
        """Takes the adapter's deltas."""
        self._add(self.own, layer, deltas)

    def _add(self, records: Records, layer: NPTLayer, deltas: dict[str, WeightDelta]) -> None:
        for name, delta in deltas.items():
            record = records[layer.index].setdefault(name, DeltaRecord())
            record.squares.append(delta.frobenius_norm_square()[self.mask].double().cpu())
            record.skipped += float(delta.skipped[self.mask].sum())
            room = self.effect_tokens - sum(map(len, record.effects))
            if room > 0:
                record.effects.append(delta.apply()[self.mask][:room].float().cpu())

    def figures(self, tokenizer: Any = None, blocks: Collection[int] | None = None) -> Figures:
        """The report's `weight_delta_stats` without `least_joint_norm`.

        Means over real tokens, converted blocks and target projections, in this order: frobenius |dW|_F, relative
        |dW|_F / |W|_F, rms_entry |dW|_F / sqrt(rows columns); `exact` beside on the same tokens. With a tokenizer, also the
        tokens that write the largest deltas.

        Args:
            blocks: converted blocks; None for all.
        """
        per_layer = {
            f"layer_{layer.index}": {
                name: _projection_figures(layer, name, record, self.exact[layer.index][name])
                for name, record in self.own[layer.index].items()
            }
            for layer in chosen_layers(self.model, blocks)
        }

        def mean(key: str) -> float:
            if not any(per_layer.values()):  # the adapter is disabled: there is no dW
                return 0.0
            return fmean(fmean(figures[key] for figures in entry.values()) for entry in per_layer.values())

        tokens = sum(int(mask.sum()) for _, mask in self.rows)
        squares = (np.square(r.norms()) for entry in self.own.values() for r in entry.values())
        joint = np.sqrt(sum(squares, np.zeros(tokens)))
        return {
            "mean_frobenius": mean("frobenius"),
            "relative_frobenius": mean("relative"),
            "rms_entry": mean("rms_entry"),
            "exact_frobenius": mean("exact_frobenius"),
            "tokens": tokens,
            "effective_rank_tokens": min(self.effect_tokens, tokens),
            "largest": [] if tokenizer is None else _largest(joint, self.rows, tokenizer),
            "per_layer": per_layer,
        }


@torch.no_grad()
def delta_records(model: ConvertedModel, batches: Iterable[Batch], *, effect_tokens: int = RANK_TOKENS) -> Records:
    """The weight deltas of the model as it runs, on its own stream, without the original's pass.

    Args:
        effect_tokens: as of `WeightDeltas`.
    """
    deltas = WeightDeltas(model, effect_tokens=effect_tokens)
    with watching_deltas(active_layers(model), deltas.see_deltas):
        for batch in batches:
            deltas.begin(batch)
            run_backbone(model, batch)
    return deltas.own


def effective_rank(rows: Tensor) -> float:
    """Returns exp of the entropy of the normalised singular values of (tokens, out) (Roy and Vetterli, EUSIPCO 2007)."""
    rows = rows.double()  # the Gram matrix squares the rounding
    values = torch.linalg.eigvalsh(rows @ rows.T).clamp_min(0).sqrt()
    if not values.sum():
        return 0.0
    share = values[values > 1e-6 * values.max()] / values.sum()
    return float(torch.exp(-(share * share.log()).sum()))


@torch.no_grad()
def weight_size(layer: NPTLayer, name: str) -> tuple[float, float]:
    """Returns (|W_t|_F, number of entries); of a mixture those at work for a token."""
    if layer.family.experts is not None:
        with gathered(layer.get_base_layer()):
            return mixture_weight(layer.parts, name)
    rows, columns = layer.shape(name)
    return weight_norm(layer, name), float(rows * columns)


@torch.no_grad()
def weight_norm(layer: NPTLayer, name: str) -> float:
    """Returns |W_t|_F of a linear of any kind, from its products with the unit vectors."""
    rows, module, product = layer.shape(name)[0], layer.module(name), layer.product(name)
    parameter, square = next(module.parameters()), 0.0
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    unit = torch.eye(rows, dtype=dtype, device=execution_device(module))
    with gathered(layer.get_base_layer()):
        for chunk in unit.split(512):
            square += float(product(chunk).double().square().sum())
    return square**0.5


def _projection_figures(layer: NPTLayer, name: str, own: DeltaRecord, exact: DeltaRecord) -> dict[str, Any]:
    weight, entries = weight_size(layer, name)
    figures: dict[str, Any] = {}
    for prefix, record in (("", own), ("exact_", exact)):
        norm = float(record.norms().mean())
        figures |= {
            f"{prefix}frobenius": norm,
            f"{prefix}relative": norm / max(weight, 1e-300),
            f"{prefix}rms_entry": norm / entries**0.5,
            f"{prefix}distribution": _distribution(record.norms()),
            f"{prefix}effective_rank": effective_rank(torch.cat(record.effects)),
        }
    return {**figures, "weight_frobenius": weight, "tokens_without_key": own.skipped}


def _distribution(norms: np.ndarray) -> dict[str, float]:
    percentiles = {name: float(np.quantile(norms, share)) for name, share in PERCENTILES.items()}
    return {
        "standard_deviation": float(norms.std()),
        "min": float(norms.min()),
        **percentiles,
        "max": float(norms.max()),
    }


def _largest(norms: np.ndarray, text: Sequence[tuple[Tensor, Tensor]], tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens with the largest joint norm over all converted blocks and projections, and the text before each.

    text: (ids (tokens,), whether each is real) of every sequence.
    """
    rows = [(ids[real], real.nonzero()[:, 0]) for ids, real in text]
    owner = np.repeat(np.arange(len(rows)), [len(ids) for ids, _ in rows])
    within = np.concatenate([np.arange(len(ids)) for ids, _ in rows])
    found = []
    for i in np.argsort(-norms, kind="stable")[:LARGEST]:
        ids, place = rows[owner[i]][0].tolist(), int(within[i])
        found.append(
            {
                "joint_norm": float(norms[i]),
                "token": tokenizer.decode([ids[place]]),
                "text_before": tokenizer.decode(ids[max(0, place - 12) : place]),
                "block": int(owner[i]),
                "position": int(rows[owner[i]][1][place]),
            }
        )
    return found
