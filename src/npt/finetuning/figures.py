"""The figures of a fine-tuned model: its loss on held-out text beside the base's, and how far it went on general text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from npt.common.sharded import through
from npt.evaluation.divergence import Tokens, block_error, summarize, token_divergences


def model_figures(
    model: Any, corpora: Mapping[str, Any], *, batch_size: int = 16, progress: bool = False
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(figures of the model, figures of its base), each {name of a corpus: figures}; all processes call it.

    Args:
        model: a PEFT model with an active adapter.
        corpora: {name: packed blocks}.
        batch_size: blocks in a batch.
        progress: shows bars.

    Raises:
        DataError: no token of a corpus counts. RunError: logits that are not finite.
    """
    own, base = {}, {}
    for name, blocks in corpora.items():
        compare = partial(token_divergences, model, blocks, batch_size=batch_size, progress=progress)
        tokens = through(model, compare)
        own[name], base[name] = figures_of(tokens), base_figures_of(tokens)
    return own, base


def figures_of(tokens: Tokens) -> dict[str, Any]:
    """The figures of one corpus from `token_divergences`; each with `<name>_standard_error`, over blocks.

    loss: mean -log p(token) in nats. loss_difference: paired with the base's; below zero is better. accuracy: share of tokens
    that are the model's most probable ones. mean_kl: KL(base || model) in nats. perplexity_ratio: exp of the loss difference.
    """
    figures = summarize(tokens)
    right = (tokens["npt_top"] == tokens["target"]).astype(float)
    was_right = (tokens["original_top"] == tokens["target"]).astype(float)
    ratio, kl = figures["perplexity"], figures["divergence"]
    return {
        **_means(tokens, loss=tokens["npt_nll"], accuracy=right),
        **_means(
            tokens, loss_difference=tokens["npt_nll"] - tokens["original_nll"], accuracy_difference=right - was_right
        ),
        **{f"mean_kl{end}": kl[f"mean_kl{end}"] for end in ("", "_standard_error")},
        **{f"perplexity_ratio{end}": ratio[f"perplexity_ratio{end}"] for end in ("", "_standard_error")},
        "tokens": len(tokens["kl"]),
    }


def base_figures_of(tokens: Tokens) -> dict[str, Any]:
    """The base's own loss and accuracy on a corpus, as `figures_of` has the model's."""
    right = (tokens["original_top"] == tokens["target"]).astype(float)
    return {**_means(tokens, loss=tokens["original_nll"], accuracy=right), "tokens": len(tokens["kl"])}


def _means(tokens: Tokens, **columns: np.ndarray) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, values in columns.items():
        found[name], found[f"{name}_standard_error"] = float(values.mean()), block_error(values, tokens)
    return found
