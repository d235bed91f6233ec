"""The low-rank part of an adapter: the parameters that fine-tuning trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from npt.errors import NPTError
from npt.tuner.converted import ConvertedModel, active_layers


def low_rank_parameters(model: ConvertedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (name, parameter) of A, the B and the C of every converted block, in depth order."""
    for layer in active_layers(model):
        for name, parameter in layer.own.named_parameters():
            if name == "A" or name.startswith(("B_", "C_")):
                yield f"block {layer.index}: {name}", parameter


def train_low_rank(model: Any) -> int:
    """Trains the low-rank part of the active adapter and freezes all else; returns its number of parameters.

    Carry and gain make the converted model equivalent to the original and stay as they are.

    Raises:
        NPTError: the adapter has no low-rank part.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    count = 0
    for _, parameter in low_rank_parameters(model):
        parameter.requires_grad_(True)
        count += parameter.numel()
    if not count:
        raise NPTError(
            "the adapter has no low-rank part to train (rank 0, or carry exact); take one with model.rank above 0"
        )
    return count
