"""`evaluate`: everything about one converted model, as the dict written to evaluation_report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import datasets
import torch

from npt.builtin import name_of
from npt.data import pack
from npt.data.batches import batches_of
from npt.data.packing import IGNORED
from npt.errors import DataError
from npt.evaluation.divergence import summarize, token_divergences
from npt.evaluation.generation import DEFAULT_PROMPTS, side_by_side
from npt.evaluation.layers import layer_equivalence, weight_delta_stats
from npt.tuner import active_layers, adapter_config, device_of, eval_mode, parameter_counts

#: Blocks used for the per-layer figures and the weight deltas, which cost more per token.
DETAIL_BLOCKS = 32
KL_TARGET, RMS_ENTRY_TARGET, EXACT_FACTOR, RATIO_TOLERANCE = 0.01, 0.01, 1.1, 0.05

#: Documents, or a dataset of packed blocks.
Corpus = Any


def evaluate(
    model: Any,
    tokenizer: Any,
    texts: Corpus | Mapping[str, Corpus],
    *,
    context_length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 16,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Compares a converted model with the model it was made from.

    Args:
        model: a PEFT model with an active NPT adapter. tokenizer: its tokenizer.
        texts: documents, a dataset of packed blocks, or {name: either}; with several corpora the first one's figures
            stand at the top level and `evaluations.corpora` holds each.
        context_length: tokens per block, 256 or the model's context if that is shorter.
        stride: tokens scored per window, None for context_length (no overlap).
        max_tokens: per corpus, at most (rounded down to whole blocks). seed: recorded in the protocol.
        prompts: continued by both models. progress: show bars.

    Returns:
        The report; its fields are listed in docs/report.md.

    Raises:
        DataError: an empty corpus, or a stride that is not in 1 ... context_length.
        ConversionError: the model has no active NPT adapter.
    """
    if context_length is None:
        context_length = min(256, getattr(model.config, "max_position_embeddings", None) or 256)
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise DataError(f"stride={stride}: use 1 to the context length, {context_length}")
    corpora = dict(texts) if isinstance(texts, Mapping) else {"text": texts}
    limit = None if max_tokens is None else max(1, max_tokens // context_length)
    blocks = {name: _blocks(name, corpus, tokenizer, context_length, stride, limit) for name, corpus in corpora.items()}
    layers = active_layers(model)
    results, tokens = {}, {}
    for name, packed in blocks.items():
        figures = token_divergences(model, packed, batch_size=batch_size, progress=progress)
        results[name], tokens[name] = summarize(figures), len(figures["kl"])
    first = next(iter(blocks.values()))
    detail = list(batches_of(first.select(range(min(DETAIL_BLOCKS, len(first)))), batch_size, device_of(model)))
    samples = side_by_side(model, tokenizer, prompts)
    with eval_mode(model):
        blockwise = {
            "layer_equivalence": layer_equivalence(model, detail),
            "weight_delta_stats": weight_delta_stats(model, detail),
        }
    evaluations = {
        **next(iter(results.values())),
        **blockwise,
        "generation_samples": {
            "prompts": [s["prompt"] for s in samples],
            "npt_generations": [s["npt"] for s in samples],
            "original_generations": [s["original"] for s in samples],
        },
        "corpora": {name: {**result, "tokens": tokens[name]} for name, result in results.items()},
    }
    trainable, base = parameter_counts(model)
    config = adapter_config(model)
    return {
        "model_config": {
            "base_model": name_of(config.base_model_name_or_path),
            "npt_layers": [layer.index for layer in layers],
            "rank": config.rank,
            **{name: getattr(config, name) for name in ("key", "carry", "gain", "low_rank_at", "target_projections")},
            "trainable_parameters": trainable,
            "base_parameters": base,
        },
        "protocol": {
            "context_length": context_length,
            "stride": stride,
            "tokens": next(iter(tokens.values())),
            "corpora": list(corpora),
            "dtype": str(layers[0].weight.dtype).removeprefix("torch."),
            "seed": seed,
            "device": str(device_of(model)),
            "versions": {name: version(name) for name in ("npt", "torch", "transformers", "peft")},
        },
        "evaluations": evaluations,
        "expected_outcomes": expected_outcomes(evaluations),
    }


def expected_outcomes(evaluations: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The three outcomes the method promises, each {target, value, met}."""
    kl = evaluations["divergence"]["mean_kl"]
    ratio = evaluations["perplexity"]["perplexity_ratio"]
    delta = evaluations["weight_delta_stats"]
    small = delta["rms_entry"] < RMS_ENTRY_TARGET
    near_exact = delta["mean_frobenius"] <= EXACT_FACTOR * delta["exact_frobenius"]
    return {
        "functional_fidelity": {"target": f"mean KL <= {KL_TARGET}", "value": kl, "met": kl <= KL_TARGET},
        "low_magnitude_delta": {
            "target": f"rms entry < {RMS_ENTRY_TARGET}, mean norm <= {EXACT_FACTOR} x exact",
            "value": delta["rms_entry"],
            "met": small and near_exact,
        },
        "perplexity_ratio": {
            "target": f"1.0 +/- {RATIO_TOLERANCE}",
            "value": ratio,
            "met": abs(ratio - 1) <= RATIO_TOLERANCE,
        },
    }


def _blocks(
    name: str, corpus: Corpus, tokenizer: Any, context_length: int, stride: int, limit: int | None
) -> datasets.Dataset:
    if isinstance(corpus, datasets.Dataset):
        blocks = corpus if limit is None else corpus.select(range(min(limit, len(corpus))))
    else:
        documents = [corpus] if isinstance(corpus, str) else corpus
        blocks = pack(documents, tokenizer, context_length, max_blocks=limit)
    if not len(blocks):
        raise DataError(f"corpus {name!r} is empty: give it at least one document")
    return blocks if stride == context_length else overlapping(blocks, context_length, stride)


def overlapping(blocks: datasets.Dataset, context_length: int, stride: int) -> datasets.Dataset:
    """Windows of context_length that advance by `stride`; after the first, only the last `stride` tokens count."""
    flat = {name: torch.as_tensor(blocks[name][:]).flatten() for name in ("input_ids", "attention_mask", "labels")}
    starts = range(0, max(1, len(flat["input_ids"]) - context_length + 1), stride)
    windows = {name: [values[s : s + context_length].tolist() for s in starts] for name, values in flat.items()}
    for labels in windows["labels"][1:]:
        labels[: context_length - stride] = [IGNORED] * (context_length - stride)
    return datasets.Dataset.from_dict(windows)
