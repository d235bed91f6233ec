"""Limits of a model that text has to keep: the positions it was made for, and the tokens that its embedding has."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from npt.common.display import one_line
from npt.errors import DataError


def context_of(config: Any) -> int | None:
    """The number of positions that a model's configuration promises, RoPE scaling included; None where it sets no limit."""
    text = config.get_text_config(decoder=True)
    positions: int | None = getattr(text, "max_position_embeddings", None)
    if positions is None or getattr(text, "alibi", False):
        return None
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    if factor is None:
        return positions
    return max(positions, int(factor * scaling.get("original_max_position_embeddings", positions)))


def vocabulary_of(config: Any) -> int | None:
    """The rows of the embedding that a model's configuration promises."""
    size: int | None = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return size


def check_length(config: Any, tokens: int, named: str) -> None:
    """Checks that a text of so many tokens has its positions in the model.

    Args:
        named: the key or argument that asks for the length.

    Raises:
        DataError: it has not.
    """
    context = context_of(config)
    if context is not None and tokens > context:
        raise DataError(f"{named}={tokens} is above the model's context of {context} tokens; lower it")


def check_ids(ids: Any, vocabulary: int | None, named: str, tokenizer: Any = None) -> None:
    """Checks that token ids have a row in a model's embedding; tensors without memory pass.

    Args:
        ids: a tensor, an array or a list of whole numbers. vocabulary: rows of the embedding; None: unknown, nothing is
            checked. named: the text, for the error. tokenizer: names the token in the error.

    Raises:
        DataError: one has none, as where tokens were added to a tokenizer and the embedding was not resized.
    """
    if vocabulary is None or (isinstance(ids, torch.Tensor) and ids.is_meta):
        return
    if isinstance(ids, torch.Tensor):
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    else:
        array = np.asarray(ids)
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low >= 0 and high < vocabulary:
        return
    odd = low if low < 0 else high
    name = "" if tokenizer is None or low < 0 else f" ({one_line(repr(tokenizer.convert_ids_to_tokens(odd)), 40)})"
    raise DataError(
        f"{named}: token {odd}{name} has no row in the model's embedding of {vocabulary}; use the base's own tokenizer, or "
        "call resize_token_embeddings(len(tokenizer)) on the base, train it, and save both"
    )
