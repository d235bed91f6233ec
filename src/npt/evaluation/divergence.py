"""How far the NPT model's next-token distributions are from the original's, token by token.

The figures follow the convention of quantisation work (llama.cpp's --kl-divergence): perplexities of both, KL of the
full distributions and its percentiles, agreement of the top token, change of the right token's probability.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from npt.attach import layer_mode
from npt.data.batches import batches_of, scored_positions
from npt.errors import DataError
from npt.tuner import active_layers, device_of, eval_mode

#: Bytes one batch of float32 logits may take; a longer batch is split by sequences.
LOGIT_BUDGET = 256 * 2**20
#: Entries of float64 distributions compared at once.
CHUNK_ENTRIES = 2**22


@torch.no_grad()
def token_divergences(
    model: Any, blocks: Any, *, batch_size: int = 16, progress: bool = False
) -> dict[str, np.ndarray]:
    """Per scored token, as float64 arrays (tokens,): kl, npt_nll, original_nll, same_top, delta_p; and block, its block.

    Raises:
        DataError: not one token counts.
    """
    layers, device = active_layers(model), device_of(model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    length = len(blocks[0]["input_ids"]) if len(blocks) else 1
    batch_size = max(1, min(batch_size, LOGIT_BUDGET // (4 * vocabulary * length)))
    parts: list[Tensor] = []
    first = 0
    batches = batches_of(blocks, batch_size, device)
    total = -(-len(blocks) // batch_size)
    with eval_mode(model):
        for batch in track(batches, "evaluating", total=total, transient=True, disable=not progress):
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
            counted = scored_positions(batch["labels"])
            with layer_mode(layers, override="bypass"):
                teacher = model(**inputs).logits[:, :-1][counted]
            student = model(**inputs).logits[:, :-1][counted]
            target = batch["input_ids"][:, 1:][counted]
            row = torch.arange(len(counted), device=device)[:, None].expand_as(counted)[counted] + first
            first += len(counted)
            for chunk in torch.arange(len(target), device=device).split(max(1, CHUNK_ENTRIES // vocabulary)):
                figures = compare(teacher[chunk], student[chunk], target[chunk])
                parts.append(torch.cat([figures, row[chunk, None].double()], -1).cpu())
    table = torch.cat(parts).numpy() if parts else np.zeros((0, 6))
    if not len(table):
        raise DataError("evaluation text holds no token that counts: every block is padding or a single token")
    return dict(zip(("kl", "npt_nll", "original_nll", "same_top", "delta_p", "block"), table.T, strict=True))


def compare(teacher_logits: Tensor, student_logits: Tensor, target: Tensor) -> Tensor:
    """(tokens, 5) float64: KL(teacher || student), both NLLs, same top token, change of the target's probability."""
    teacher = teacher_logits.double().log_softmax(-1)
    student = student_logits.double().log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1).clamp_min(0)
    original_nll = -teacher.gather(-1, target[:, None])[:, 0]
    npt_nll = -student.gather(-1, target[:, None])[:, 0]
    same = (teacher.argmax(-1) == student.argmax(-1)).double()
    return torch.stack([kl, npt_nll, original_nll, same, torch.exp(-npt_nll) - torch.exp(-original_nll)], -1)


def summarize(tokens: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The report's `perplexity` and `divergence` sections; standard errors are over blocks, not tokens."""
    npt_mean, original_mean = tokens["npt_nll"].mean(), tokens["original_nll"].mean()
    ratio = float(np.exp(npt_mean - original_mean))
    kl = tokens["kl"]
    return {
        "perplexity": {
            "npt_perplexity": float(np.exp(npt_mean)),
            "original_perplexity": float(np.exp(original_mean)),
            "perplexity_ratio": ratio,
            "perplexity_ratio_standard_error": ratio * block_error(tokens["npt_nll"] - tokens["original_nll"], tokens),
            "perplexity_difference": float(np.exp(npt_mean) - np.exp(original_mean)),
        },
        "divergence": {
            "mean_kl": float(kl.mean()),
            "mean_kl_standard_error": block_error(kl, tokens),
            "median_kl": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_p999": float(np.quantile(kl, 0.999)),
            "max_kl": float(kl.max()),
            "top1_agreement": float(tokens["same_top"].mean()),
            "rms_delta_p": float(np.sqrt(np.square(tokens["delta_p"]).mean())),
        },
    }


def block_error(values: np.ndarray, tokens: dict[str, np.ndarray]) -> float:
    """Standard error of a token mean, blocks being the independent units (a ratio estimator's linearisation)."""
    _, rows = np.unique(tokens["block"], return_inverse=True)
    sums, counts = np.bincount(rows, values), np.bincount(rows)
    n = len(counts)
    if n < 2:
        return float("nan")
    residual = sums - values.mean() * counts
    return float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / counts.sum())
