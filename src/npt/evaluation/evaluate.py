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
from npt.evaluation.block_errors import layer_equivalence, residual_stream
from npt.evaluation.divergence import kl_by_position, summarize, token_divergences, worst_tokens
from npt.evaluation.generation import DEFAULT_PROMPTS, generation_section, side_by_side
from npt.evaluation.verdict import expected_outcomes, grade
from npt.evaluation.weight_deltas import weight_delta_stats
from npt.tuner.converted import active_layers, adapter_config, device_of, eval_mode, parameter_counts

#: Blocks used for the per-layer figures and the weight deltas, which cost more per token.
DETAIL_BLOCKS = 32
#: Bins of positions per context length.
POSITION_BINS = 8

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
        max_tokens: per corpus, at most (rounded down to whole blocks). seed: of the sampled text.
        prompts: continued by both models, greedily and sampled. progress: show bars.

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
        results[name] = {**summarize(figures), "worst_tokens": worst_tokens(figures, packed, tokenizer)}
        tokens[name] = len(figures["kl"])
    first: Any = next(iter(blocks.values()))
    detail = first.select(range(min(DETAIL_BLOCKS, len(first))))
    batches = list(batches_of(detail, batch_size, device_of(model)))
    samples = [side_by_side(model, tokenizer, prompts, seed=s) for s in (None, seed)]
    with eval_mode(model):
        evaluations: dict[str, Any] = {
            **next(iter(results.values())),
            "layer_equivalence": layer_equivalence(model, batches),
            "residual_stream": residual_stream(model, batches),
            "weight_delta_stats": weight_delta_stats(model, batches, tokenizer),
            "kl_by_position": _by_position(model, detail, context_length, batch_size),
            "generation_samples": generation_section(*samples),
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
            "scored": f"the last {stride} tokens of each window"
            if stride < context_length
            else "all tokens but the first",
            "tokens": next(iter(tokens.values())),
            "corpora": list(corpora),
            "dtype": str(layers[0].weight.dtype).removeprefix("torch."),
            "seed": seed,
            "device": str(device_of(model)),
            "versions": {name: version(name) for name in ("npt", "torch", "transformers", "peft")},
        },
        "evaluations": evaluations,
        "expected_outcomes": expected_outcomes(evaluations),
        "grade": grade(evaluations["divergence"]["mean_kl"]),
        "notes": _notes(config.carry, evaluations),
    }


def _notes(carry: str, evaluations: dict[str, Any]) -> list[str]:
    """What the figures say that a reader might take for something else."""
    found = []
    if evaluations["weight_delta_stats"]["mean_frobenius"] == 0:
        found.append("the adapter's weight delta is zero everywhere: the converted blocks just drop their attention")
    if carry != "exact" and evaluations["divergence"]["max_kl"] == 0:
        found.append("both models give the very same distributions: the adapter changes nothing (is it active?)")
    return found


def _by_position(model: Any, blocks: Any, context_length: int, batch_size: int) -> dict[str, Any]:
    """Mean KL over positions, to twice the context length where the model reaches that far (blocks joined in pairs)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    longer = limit >= 2 * context_length and len(blocks) > 1
    if longer:
        pairs = range(0, len(blocks) - 1, 2)
        names = [name for name in ("input_ids", "attention_mask", "labels") if name in blocks.column_names]
        rows: Any = blocks
        blocks = datasets.Dataset.from_dict({n: [[*rows[i][n], *rows[i + 1][n]] for i in pairs] for n in names})
    figures = token_divergences(model, blocks, batch_size=batch_size)
    length = 2 * context_length if longer else context_length
    bins = kl_by_position(figures, max(1, context_length // POSITION_BINS))
    return {"context_length": length, "calibration_length": context_length, **bins}


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
