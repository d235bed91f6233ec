"""The divergence of the NPT model's next-token distributions from the original's, token by token.

The figures follow the convention of quantisation work (llama.cpp's --kl-divergence): perplexities of both and their
correlation, KL of the full distributions and its percentiles, agreement of the top token, change of the right token's
probability. Definitions: docs/report.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npt.common.processes import gather, share, world
from npt.common.progress import tracked
from npt.common.sharded import is_sharded
from npt.data.batches import batches_of, collated, scored_positions
from npt.errors import REMEDY, DataError, RunError
from npt.evaluation.look import STREAM_ROWS, Batch, Observer, look
from npt.tuner.converted import ConvertedModel, as_original, base_of, device_of, eval_mode
from npt.tuner.nonfinite import find_nonfinite

#: Bytes one batch of float32 logits may take; a longer batch is split by sequences.
LOGIT_BUDGET = 256 * 2**20
#: Entries of float64 distributions compared at once: on a CPU few enough that they stay in its cache.
CHUNK_ENTRIES = {"cpu": 2**17}
LARGEST_CHUNK = 2**20
#: The figures kept of a scored token, a float64 each.
COLUMNS = (
    "kl", "npt_nll", "original_nll", "same_top", "delta_p", "npt_top", "original_top", "target", "block", "position"
)  # fmt: skip
Tokens = dict[str, np.ndarray]


@torch.no_grad()
def token_divergences(
    model: ConvertedModel,
    blocks: Any,
    *,
    batch_size: int = 16,
    progress: bool = False,
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    observers: Sequence[Observer] = (),
    observed: int = 0,
) -> Tokens:
    """Compares both models on every scored token. Returns {name of `COLUMNS`: float64 (tokens,)}.

    kl in nats; *_nll of the right token in nats; same_top 0 or 1; delta_p the change of the right token's probability;
    npt_top, original_top and target are token ids; block and position say where the scored token stands. Several processes
    share the batches and each gets all of the table, in the order of the text: all call it.

    Args:
        collate: makes a batch of tensors from rows that may differ in length; without it they have one.
        observers: see the passes of the first `observed` blocks; those of one process see its own share alone.

    Raises:
        DataError: not one token counts.
        RunError: a model's logits are not finite.
    """
    as_original(model)  # a readable error for a model without an adapter
    device = device_of(model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    length = max(
        (len(blocks[i]["input_ids"]) for i in range(len(blocks) if collate else min(1, len(blocks)))), default=1
    )
    batch_size = max(1, min(batch_size, LOGIT_BUDGET // (4 * vocabulary * length)))
    entries = CHUNK_ENTRIES.get(device.type, LARGEST_CHUNK)
    few = min(observed, len(blocks)) if observers else 0
    parts = [*_parts(0, few, min(batch_size, STREAM_ROWS)), *_parts(few, len(blocks), batch_size)]
    own = list(share(parts, is_sharded(model)))
    # One table from the start: small tensors kept between large ones that come and go would leave the heap in pieces.
    table, filled = np.empty((len(own) * batch_size * (length - 1), len(COLUMNS))), 0
    with eval_mode(model):
        for _, part, counts in tracked(own, "Evaluating", progress, unit="batches"):
            rows = [blocks[i] for i in part]
            batch = next(batches_of(rows, batch_size, device)) if collate is None else collated(rows, collate, device)
            watching = observers if part.stop <= few else ()
            teacher, student = (logits.flatten(0, 1) for logits in look(model, batch, watching, _logits))
            row, position = scored_positions(batch["labels"]).nonzero().T
            place = torch.stack([part.start + row, position + 1], -1).double()
            target, at = batch["input_ids"][row, position + 1], row * batch["input_ids"].shape[1] + position
            for chunk in torch.arange(len(target), device=device).split(max(1, entries // vocabulary)):
                figures = compare(teacher[at[chunk]], student[at[chunk]], target[chunk])
                end = filled + len(chunk)
                table[filled:end] = torch.cat([figures, place[chunk]], -1).cpu().numpy()
                if not np.isfinite(table[filled:end]).all():
                    raise RunError(f"evaluation: the logits are not finite, {find_nonfinite(model, batch)}; {REMEDY}")
                filled = end if counts else filled
            del teacher, student  # else a batch's logits would stay in memory while the next one's are computed
    table = _of_all(table[:filled])
    if not len(table):
        raise DataError(
            "evaluation text holds no token that counts: every block is padding or a single token; give more text"
        )
    return dict(zip(COLUMNS, table.T, strict=True))


def _logits(model: ConvertedModel, batch: Batch) -> Tensor:
    """Logits (rows, tokens, vocabulary)."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    logits: Tensor = base_of(model)(**inputs).logits
    return logits


def _parts(start: int, end: int, size: int) -> list[range]:
    """The rows start ... end - 1 in batches of `size`."""
    return [range(first, min(first + size, end)) for first in range(start, end, size)]


def _of_all(table: np.ndarray) -> np.ndarray:
    """Returns the rows of all processes, in the order of the text."""
    if world()[1] == 1:
        return table
    rows = torch.cat(gather(torch.from_numpy(table))).numpy()
    block, position = (rows[:, COLUMNS.index(name)] for name in ("block", "position"))
    found: np.ndarray = rows[np.lexsort((position, block))]
    return found


def compare(teacher_logits: Tensor, student_logits: Tensor, target: Tensor) -> Tensor:
    """(tokens, 8) float64, the first eight of `COLUMNS`, from logits (tokens, vocabulary) and token ids (tokens,).

    With t and s the logits and p the teacher's probabilities, KL = E_p[t - s] - log sum exp t + log sum exp s: three passes of
    float64 over the vocabulary instead of those of two log_softmax.
    """
    teacher, student = teacher_logits.double(), student_logits.double()
    difference = teacher - student
    at_target = [x.gather(-1, target[:, None])[:, 0] for x in (teacher, student)]
    original_log_sum, original_top, weights = _log_sum(teacher)
    npt_log_sum, npt_top, _ = _log_sum(student)
    mean = difference.mul_(weights).sum(-1) / weights.sum(-1)
    kl = (mean - original_log_sum + npt_log_sum).clamp_min(0)
    original_nll, npt_nll = original_log_sum - at_target[0], npt_log_sum - at_target[1]
    same, delta_p = (original_top == npt_top).double(), torch.exp(-npt_nll) - torch.exp(-original_nll)
    ids = [npt_top.double(), original_top.double(), target.double()]
    return torch.stack([kl, npt_nll, original_nll, same, delta_p, *ids], -1)


def _log_sum(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log sum exp (tokens,), index of the largest (tokens,), exp(logits - largest)) of (tokens, vocabulary), in its place."""
    largest, top = logits.max(-1, keepdim=True)
    weights = logits.sub_(largest).exp_()
    return weights.sum(-1).log() + largest[:, 0], top[:, 0], weights


#: Name of a percentile in the report -> its share.
KL_PERCENTILES = {
    "kl_p1": 0.01, "kl_p5": 0.05, "kl_p10": 0.1, "median_kl": 0.5, "kl_p90": 0.9, "kl_p95": 0.95, "kl_p99": 0.99,
    "kl_p999": 0.999,
}  # fmt: skip
DELTA_P_PERCENTILES = {
    "p0_1": 0.001, "p1": 0.01, "p5": 0.05, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9,
    "p95": 0.95, "p99": 0.99, "p99_9": 0.999,
}  # fmt: skip


def summarize(tokens: Tokens) -> dict[str, dict[str, Any]]:
    """The report's `perplexity` and `divergence` sections; standard errors are over blocks, not tokens."""
    npt, original, kl, delta_p = (tokens[key] for key in ("npt_nll", "original_nll", "kl", "delta_p"))
    ratio = float(np.exp(npt.mean() - original.mean()))
    spread = npt.std() * original.std()
    mean_square = float(np.square(delta_p).mean())
    rms = mean_square**0.5
    return {
        "perplexity": {
            "npt_perplexity": float(np.exp(npt.mean())),
            "npt_perplexity_standard_error": _scaled(float(np.exp(npt.mean())), block_error(npt, tokens)),
            "original_perplexity": float(np.exp(original.mean())),
            "original_perplexity_standard_error": _scaled(
                float(np.exp(original.mean())), block_error(original, tokens)
            ),
            "npt_log_perplexity": float(npt.mean()),
            "original_log_perplexity": float(original.mean()),
            "log_perplexity_correlation": float(np.cov(npt, original, bias=True)[0, 1] / spread) if spread else 1.0,
            "perplexity_ratio": ratio,
            "perplexity_ratio_standard_error": _scaled(ratio, block_error(npt - original, tokens)),
            "perplexity_difference": float(np.exp(npt.mean()) - np.exp(original.mean())),
        },
        "divergence": {
            "mean_kl": float(kl.mean()),
            "mean_kl_standard_error": block_error(kl, tokens),
            "min_kl": float(kl.min()),
            **{name: float(np.quantile(kl, share)) for name, share in KL_PERCENTILES.items()},
            "max_kl": float(kl.max()),
            "top1_agreement": float(tokens["same_top"].mean()),
            "top1_agreement_standard_error": block_error(tokens["same_top"], tokens),
            "mean_delta_p": float(delta_p.mean()),
            "mean_delta_p_standard_error": block_error(delta_p, tokens),
            "rms_delta_p": rms,
            # d sqrt(m) = dm / (2 sqrt(m))
            "rms_delta_p_standard_error": _scaled(
                1 / (2 * rms) if rms else 0.0, block_error(np.square(delta_p), tokens)
            ),
            "delta_p": {
                "min": float(delta_p.min()),
                **{name: float(np.quantile(delta_p, share)) for name, share in DELTA_P_PERCENTILES.items()},
                "max": float(delta_p.max()),
            },
            "kl_histogram": kl_histogram(kl),
        },
    }


def _scaled(factor: float, error: float | None) -> float | None:
    return None if error is None else factor * error


def kl_histogram(kl: np.ndarray) -> dict[str, list[float]]:
    """Tokens per third of a decade of KL: {"edges" (n + 1,), "counts" (n,)}; the first bin takes all that is below it."""
    edges = 10.0 ** (np.arange(-30, 10) / 3)
    inside = np.clip(kl, edges[0], np.nextafter(edges[-1], 0))
    counts, _ = np.histogram(inside, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def kl_by_position(tokens: Tokens, width: int) -> dict[str, list[float]]:
    """Mean KL of tokens in bins of `width` positions: {"from" (n,), "mean_kl" (n,), "tokens" (n,)}."""
    bins = (tokens["position"] // width).astype(int)
    counts, sums = np.bincount(bins), np.bincount(bins, tokens["kl"])
    found = np.flatnonzero(counts)
    return {
        "from": (found * width).tolist(),
        "mean_kl": (sums[found] / counts[found]).tolist(),
        "tokens": counts[found].tolist(),
    }


def worst_tokens(
    tokens: Tokens, blocks: Any, tokenizer: Any, count: int = 20, before: int = 24
) -> list[dict[str, Any]]:
    """The tokens with the highest KL, each with the text before it, both models' top tokens, its probabilities and its KL."""
    order = np.argsort(-tokens["kl"], kind="stable")[:count]
    found = []
    for i in order:
        block, position = int(tokens["block"][i]), int(tokens["position"][i])
        ids = blocks[block]["input_ids"]
        word = {key: tokenizer.decode([int(tokens[key][i])]) for key in ("npt_top", "original_top", "target")}
        found.append(
            {
                "kl": float(tokens["kl"][i]),
                "block": block,
                "position": position,
                "text_before": tokenizer.decode(ids[max(0, position - before) : position]),
                "token": word["target"],
                "npt_wanted": word["npt_top"],
                "original_wanted": word["original_top"],
                "npt_probability": float(np.exp(-tokens["npt_nll"][i])),
                "original_probability": float(np.exp(-tokens["original_nll"][i])),
            }
        )
    return found


def block_error(values: np.ndarray, tokens: Tokens) -> float | None:
    """Standard error of a token mean, blocks being the independent units (a ratio estimator's linearisation).

    None with fewer than two blocks.
    """
    _, rows = np.unique(tokens["block"], return_inverse=True)
    sums, counts = np.bincount(rows, values), np.bincount(rows)
    n = len(counts)
    if n < 2:
        return None
    residual = sums - values.mean() * counts
    return float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / counts.sum())
