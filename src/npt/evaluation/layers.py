"""Per converted block: how close its output is to the original block's, and how large its weight deltas are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from npt.attach import BlockRecord, NPTLayer, layer_mode
from npt.component import WeightDelta
from npt.modules import execution_device
from npt.tuner import active_layers, run_backbone

Batches = Iterable[dict[str, Tensor]]


@torch.no_grad()
def layer_equivalence(model: Any, batches: Batches) -> dict[str, dict[str, float]]:
    """{"layer_<i>": {mse, cosine_similarity, relative_error, max_absolute_diff}} of block outputs on real tokens.

    Both blocks get the original model's h and a. relative_error is the error's norm over the norm of the update y - h.
    """
    layers = active_layers(model)
    sums: dict[int, dict[str, float]] = {layer.index: defaultdict(float) for layer in layers}
    mask: list[Tensor] = []

    def see(layer: NPTLayer, record: BlockRecord) -> None:
        keep, figures = mask[0], sums[layer.index]
        h, y = record.hidden_states[keep].double(), record.output[keep].double()
        with layer_mode([layer], override=None, on_block=None):
            student = h + layer.update_from(record.hidden_states, record.attention)[keep].double()
        error = student - y
        figures["square"] += float(error.square().sum())
        figures["update"] += float((y - h).square().sum())
        figures["cosine"] += float(torch.cosine_similarity(student, y, dim=-1).sum())
        figures["max"] = max(figures["max"], float(error.abs().max()))
        figures["tokens"] += len(h)
        figures["entries"] += error.numel()

    with layer_mode(layers, override="bypass", on_block=see):
        for batch in batches:
            mask[:] = [batch["attention_mask"].bool()]
            run_backbone(model, batch)
    return {
        f"layer_{index}": {
            "mse": f["square"] / f["entries"],
            "cosine_similarity": f["cosine"] / f["tokens"],
            "relative_error": (f["square"] / max(f["update"], 1e-300)) ** 0.5,
            "max_absolute_diff": f["max"],
        }
        for index, f in sums.items()
    }


@torch.no_grad()
def mean_delta_norms(
    model: Any, batches: Batches, override: str | None = None
) -> dict[int, dict[str, dict[str, float]]]:
    """{block: {projection: {"frobenius", "square", "tokens", "skipped"}}} over real tokens of the model's own stream.

    frobenius is the mean |dW|_F, square the mean |dW|_F^2.

    `override="exact"` measures the exact value's dW instead. `skipped` counts tokens without an input key.
    """
    layers = active_layers(model)
    sums: dict[int, dict[str, list[float]]] = {layer.index: {} for layer in layers}
    mask: list[Tensor] = []

    def see(layer: NPTLayer, deltas: dict[str, WeightDelta]) -> None:
        for name, delta in deltas.items():
            total = sums[layer.index].setdefault(name, [0.0, 0.0, 0.0, 0.0])
            square = delta.frobenius_norm_square()[mask[0]].double()
            total[0] += float(square.sqrt().sum())
            total[1] += float(square.sum())
            total[2] += float(mask[0].sum())
            total[3] += float(delta.skipped[mask[0]].sum())

    with layer_mode(layers, observer=see, override=override):
        for batch in batches:
            mask[:] = [batch["attention_mask"].bool()]
            run_backbone(model, batch)
    return {
        index: {
            name: {
                "frobenius": total / max(count, 1),
                "square": square / max(count, 1),
                "tokens": count,
                "skipped": skipped,
            }
            for name, (total, square, count, skipped) in projections.items()
        }
        for index, projections in sums.items()
    }


@torch.no_grad()
def weight_norm(layer: NPTLayer, name: str) -> float:
    """|W_t|_F of a linear of any kind, from its products with the unit vectors."""
    rows, module, product = layer.shape(name)[0], layer.module(name), layer.product(name)
    parameter, square = next(module.parameters()), 0.0
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    unit = torch.eye(rows, dtype=dtype, device=execution_device(module))
    for chunk in unit.split(512):
        square += float(product(chunk).double().square().sum())
    return square**0.5


def weight_delta_stats(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The report's `weight_delta_stats`: means over real tokens, converted blocks and target projections, in this order.

    frobenius |dW|_F, relative |dW|_F / |W|_F, rms_entry |dW|_F / sqrt(rows columns); `exact` beside on the same tokens.
    """
    own, exact = mean_delta_norms(model, batches), mean_delta_norms(model, batches, override="exact")
    per_layer: dict[str, dict[str, dict[str, float]]] = {}
    for layer in active_layers(model):
        entry = per_layer.setdefault(f"layer_{layer.index}", {})
        for name, figures in own[layer.index].items():
            rows, columns = layer.shape(name)
            norm = figures["frobenius"]
            entry[name] = {
                "frobenius": norm,
                "relative": norm / max(weight_norm(layer, name), 1e-300),
                "rms_entry": norm / (rows * columns) ** 0.5,
                "exact_frobenius": exact[layer.index][name]["frobenius"],
                "tokens_without_key": figures["skipped"],
            }

    def mean(key: str) -> float:
        by_layer = [sum(p[key] for p in entry.values()) / len(entry) for entry in per_layer.values()]
        return sum(by_layer) / len(by_layer)

    return {
        "mean_frobenius": mean("frobenius"),
        "relative_frobenius": mean("relative"),
        "rms_entry": mean("rms_entry"),
        "exact_frobenius": mean("exact_frobenius"),
        "tokens": int(next(iter(next(iter(own.values())).values()))["tokens"]),
        "per_layer": per_layer,
    }
