"""`evaluate`: a converted model against its original, as the dict written to evaluation_report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch

from npt.block.layer import NPTLayer
from npt.block.modes import watching
from npt.builtin import name_of
from npt.common.distribution import versions
from npt.common.limits import check_ids, check_length
from npt.common.options import is_calibrated
from npt.common.precision import DTYPE_REASON, matmul_precision
from npt.common.processes import world
from npt.data import pack
from npt.data.batches import batches_of
from npt.data.inputs import documents_or_blocks
from npt.data.packing import IGNORED
from npt.data.seen import RECORD, TextRecord
from npt.errors import DataError
from npt.evaluation.details import Details
from npt.evaluation.divergence import Tokens, kl_by_position, summarize, token_divergences, worst_tokens
from npt.evaluation.generation import DEFAULT_PROMPTS, generation_section, listed_prompts, side_by_side_with_seeds
from npt.evaluation.look import observe
from npt.evaluation.verdict import UNKNOWN_SHARE, expected_outcomes, grade
from npt.tuner.config import NPTConfig
from npt.tuner.converted import (
    ConvertedModel,
    active_layers,
    adapter_config,
    context_length_of,
    device_of,
    eval_mode,
    parameter_counts,
    run_backbone,
    vocabulary_size,
)

#: Blocks used for the per-layer figures and the weight deltas, which cost more per token.
DETAIL_BLOCKS = 32
#: Bins of positions per context length.
POSITION_BINS = 8

#: Documents, or a dataset of packed blocks.
Corpus = Any


def evaluate(
    model: ConvertedModel,
    tokenizer: Any,
    texts: Corpus | Mapping[str, Corpus],
    *,
    context_length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 16,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    begin_with_bos: bool = False,
    detail_blocks: int = DETAIL_BLOCKS,
    score: str = "all",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Compares a converted model with the model it was made from.

    Args:
        model: a PEFT model with an active NPT adapter.
        tokenizer: its tokenizer.
        texts: documents, blocks (`npt.data.inputs` lists what is taken for what), or {name: either}; with several corpora the
            first one's figures stand at the top level and `evaluations.corpora` holds each.
        context_length: tokens per block, 256 or the model's context if that is shorter.
        stride: tokens scored per window, None for context_length (no overlap).
        max_tokens: per corpus, at most (rounded down to whole blocks).
        batch_size: blocks in a batch.
        prompts: continued by both models, greedily and sampled.
        begin_with_bos: of blocks made here, as `npt.data.pack` takes it.
        score: the same, "all" or "replies".
        detail_blocks: most blocks, of the first corpus, for the figures per converted block and position.
        seed: of the sampled text.
        progress: shows bars.

    Returns:
        The report; docs/report.md lists its fields.

    Raises:
        DataError: a corpus that is empty or no text, beyond the model's limits, or a stride not in 1 ... context_length.
        ConversionError: the model has no active NPT adapter.
    """
    context_length, stride = _window(model, context_length, stride)
    corpora = dict(texts) if isinstance(texts, Mapping) and "input_ids" not in texts else {"text": texts}
    window = context_length, stride, None if max_tokens is None else max_tokens // context_length, begin_with_bos
    blocks = {name: _blocks(name, corpus, tokenizer, model, window, score) for name, corpus in corpora.items()}
    prompts = listed_prompts(model, tokenizer, prompts)
    details, detail = Details(model), _first_rows(next(iter(blocks.values())), detail_blocks)
    results = _of_corpora(model, tokenizer, blocks, batch_size, progress, details, detail)
    evaluations: dict[str, Any] = {
        **{name: x for name, x in next(iter(results.values())).items() if name not in ("tokens", "unknown_tokens")},
        **details.figures(tokenizer),
        "kl_by_position": _by_position(model, detail, context_length, batch_size),
        "generation_samples": _samples(model, tokenizer, prompts, seed),
        "corpora": results,
    }
    return _report(model, tokenizer, blocks, evaluations, _positions(context_length, stride, score), seed)


def _report(
    model: ConvertedModel,
    tokenizer: Any,
    blocks: Mapping[str, datasets.Dataset],
    evaluations: dict[str, Any],
    positions: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """The whole report, once its figures are there."""
    layers, config = active_layers(model), adapter_config(model)
    first = next(iter(evaluations["corpora"].values()))
    return {
        "model_config": _model_config(model, config, layers),
        "protocol": {
            **positions,
            "tokens": first["tokens"],
            **_beginnings(tokenizer, blocks),
            **_surroundings(model, layers, next(iter(blocks.values())), seed),
        },
        "evaluations": evaluations,
        "expected_outcomes": expected_outcomes(evaluations),
        "grade": grade(evaluations["divergence"]["mean_kl"], first["unknown_tokens"]),
        "notes": [
            *_notes(is_calibrated(config.carry, config.gain), evaluations),
            *seen_notes(config.text_record, blocks),
        ],
    }


def _samples(model: ConvertedModel, tokenizer: Any, prompts: Sequence[str], seed: int) -> dict[str, Any]:
    return generation_section(*side_by_side_with_seeds(model, tokenizer, prompts, seeds=(None, seed)))


def _first_rows(blocks: datasets.Dataset, count: int) -> datasets.Dataset:
    return blocks.select(range(min(count, len(blocks))))


def _window(model: ConvertedModel, context_length: int | None, stride: int | None) -> tuple[int, int]:
    """(tokens per block, tokens scored per window), with the defaults of `evaluate`."""
    if context_length is None:
        context_length = min(256, context_length_of(model) or 256)
    check_length(model.config, context_length, "context_length")
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise DataError(f"stride={stride}: use 1 to the context length, {context_length}")
    return context_length, stride


def _positions(context_length: int, stride: int, score: str) -> dict[str, Any]:
    """The part of the report's `protocol` that says which positions of a window are scored."""
    scored = f"the last {stride} tokens of each window" if stride < context_length else "all tokens but the first"
    scored += ", of chats the assistant's replies alone" if score == "replies" else ""
    return {"context_length": context_length, "stride": stride, "scored": scored}


def _surroundings(
    model: ConvertedModel, layers: Sequence[NPTLayer], blocks: datasets.Dataset, seed: int
) -> dict[str, Any]:
    """The part of the report's `protocol` that npt does not decide alone: number formats, device, versions."""
    settings = model.get_base_model().config
    quantization: Any = getattr(settings, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    weight = layers[0].weight
    if not weight.is_floating_point():  # quantised: the rest of the base says what it computes in
        weight = model.get_base_model().get_input_embeddings().weight
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "dtype_reason": getattr(model.get_base_model(), DTYPE_REASON, None),
        "computed_in": _computed_in(model, layers, blocks),
        "matmul_precision": matmul_precision(device_of(model)),
        "attention": settings._attn_implementation,
        "quantization": None if method is None else str(getattr(method, "value", method)),
        "seed": seed,
        "device": str(device_of(model)),
        "versions": versions(),
    }


@torch.no_grad()
def _computed_in(model: ConvertedModel, layers: Sequence[NPTLayer], blocks: datasets.Dataset) -> str:
    """The dtype that a converted block's matrix products come out in; autocast and FSDP may have another than the weights."""
    found: list[torch.dtype] = []
    first = next(batches_of(blocks, 1, device_of(model)))["input_ids"][:, :1]
    with eval_mode(model), watching(layers[:1], lambda _, record: found.append(record.attention.dtype)):
        run_backbone(model, {"input_ids": first})
    return str(found[0]).removeprefix("torch.")


def _of_corpora(
    model: ConvertedModel,
    tokenizer: Any,
    corpora: Mapping[str, datasets.Dataset],
    batch_size: int,
    progress: bool,
    details: Details,
    detail: datasets.Dataset,
) -> dict[str, dict[str, Any]]:
    """{name: figures of a corpus}. details: see the passes of `detail`, the first blocks of the first corpus."""
    if world()[1] > 1:  # several processes share the batches of a corpus, and each of them sees all details
        with eval_mode(model):
            observe(model, batches_of(detail, batch_size, device_of(model)), details.observers)
    observers = details.observers if world()[1] == 1 else []
    found: dict[str, dict[str, Any]] = {}
    for name, blocks in corpora.items():
        seen: dict[str, Any] = {} if found else {"observers": observers, "observed": len(detail)}
        figures = token_divergences(model, blocks, batch_size=batch_size, progress=progress, **seen)
        found[name] = _of_corpus(figures, tokenizer, blocks)
    return found


def _of_corpus(figures: Tokens, tokenizer: Any, blocks: datasets.Dataset) -> dict[str, Any]:
    """The figures of one corpus: perplexity, divergence, the worst tokens, the number of scored tokens and the share of them
    that is the unknown token.
    """
    worst, unknown = worst_tokens(figures, blocks, tokenizer), getattr(tokenizer, "unk_token_id", None)
    # GPT-2's end of text goes by the name of unknown token too, and stands for nothing unknown.
    if unknown in (getattr(tokenizer, name, None) for name in ("eos_token_id", "bos_token_id")):
        unknown = None
    share = 0.0 if unknown is None else float((figures["target"] == unknown).mean())
    return {**summarize(figures), "worst_tokens": worst, "tokens": len(figures["kl"]), "unknown_tokens": share}


def _beginnings(tokenizer: Any, corpora: Mapping[str, datasets.Dataset]) -> dict[str, Any]:
    """The part of the report's `protocol` that names the corpora and counts their blocks, and those that begin with BOS."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return {
        "corpora": list(corpora),
        "blocks": {name: len(blocks) for name, blocks in corpora.items()},
        "blocks_beginning_with_bos": {
            name: sum(row["input_ids"][0] == bos for row in blocks) if bos is not None else 0
            for name, blocks in corpora.items()
        },
    }


REPORTED_OPTIONS = ("key", "carry", "gain", "gain_units", "low_rank_at", "target_projections", "modulation_scale")


def _model_config(model: ConvertedModel, config: NPTConfig, layers: Sequence[NPTLayer]) -> dict[str, Any]:
    """The report's `model_config`: the base, the adapter's options and the numbers of parameters."""
    trainable, base = parameter_counts(model)
    return {
        "base_model": name_of(config.base_model_name_or_path),
        "npt_layers": [layer.index for layer in layers],
        "rank": config.rank,
        **{name: getattr(config, name) for name in REPORTED_OPTIONS},
        "trainable_parameters": trainable,
        "base_parameters": base,
    }


def _notes(calibrated: bool, evaluations: dict[str, Any]) -> list[str]:
    """Warnings about figures that a reader might misread. calibrated: False for an adapter that is exact from the start."""
    found = []
    if evaluations["weight_delta_stats"]["mean_frobenius"] == 0:
        found.append("the adapter's weight delta is zero everywhere: the converted blocks just drop their attention")
    if calibrated and evaluations["divergence"]["max_kl"] == 0:
        found.append("both models give the very same distributions: the adapter changes nothing (is it active?)")
    for name, figures in evaluations["corpora"].items():
        if figures["unknown_tokens"] > UNKNOWN_SHARE:
            found.append(
                f"{100 * figures['unknown_tokens']:.2g} % of the scored tokens of {name} are the unknown token: the "
                "vocabulary does not have this text's characters or words, and its figures say little"
            )
    return found


def seen_notes(record: TextRecord | None, corpora: Mapping[str, datasets.Dataset]) -> list[str]:
    """Notes on scored blocks that an adapter's own record names as text it was trained on."""
    if record is None:
        return [
            f"the adapter has no record of its training text ({RECORD}): it can't be told whether scored text was trained on"
        ]
    found = {name: int(record.trained.covers(blocks).sum()) for name, blocks in corpora.items()}
    return [f"{n} of {len(corpora[name])} scored blocks of {name} were trained on" for name, n in found.items() if n]


def _by_position(model: ConvertedModel, blocks: Any, context_length: int, batch_size: int) -> dict[str, Any]:
    """Mean KL by position, to twice the context length where the model's own is that long (blocks joined in pairs)."""
    limit = context_length_of(model) or 0
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
    name: str,
    corpus: Corpus,
    tokenizer: Any,
    model: ConvertedModel,
    window: tuple[int, int, int | None, bool],
    score: str,
) -> datasets.Dataset:
    """The blocks of a corpus to score.

    Args:
        window: tokens per block, tokens scored of each, the most blocks before they overlap, whether all begin with BOS.
        score: as of `evaluate`.
    """
    context_length, stride, most, bos = window
    limit = None if most is None else max(1, most)
    found = documents_or_blocks(corpus, f"evaluate: corpus {name!r}")
    if isinstance(found, datasets.Dataset):
        blocks = found if limit is None else _first_rows(found, limit)
    else:
        blocks = pack(found, tokenizer, context_length, max_blocks=limit, begin_with_bos=bos, score=score)
    if not len(blocks):
        raise DataError(f"corpus {name!r} is empty: give it at least one document")
    for batch in blocks.select_columns(["input_ids"]).iter(1024):
        for row in batch["input_ids"]:
            check_length(model.config, len(row), f"corpus {name!r}: a block")
            check_ids(row, vocabulary_size(model), f"corpus {name!r}", tokenizer)
    return blocks if stride == context_length else overlapping(blocks, context_length, stride)


def overlapping(blocks: datasets.Dataset, context_length: int, stride: int) -> datasets.Dataset:
    """Windows of context_length that advance by `stride`; after the first, only the last `stride` tokens count."""
    names = ("input_ids", "attention_mask", "labels", *(["starts"] if "starts" in blocks.column_names else []))
    flat = {name: torch.as_tensor(blocks[name][:]).flatten() for name in names}
    starts = range(0, max(1, len(flat["input_ids"]) - context_length + 1), stride)
    windows = {name: [values[s : s + context_length].tolist() for s in starts] for name, values in flat.items()}
    for labels in windows["labels"][1:]:
        labels[: context_length - stride] = [IGNORED] * (context_length - stride)
    return datasets.Dataset.from_dict(windows)
