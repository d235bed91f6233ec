"""Many prompts continued at once: prompts with the same number of tokens share a batch, so no padding is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from npt.common.progress import progress_bar
from npt.editing.bench import chunks
from npt.tuner.converted import base_of, device_of, eval_mode

#: Prompts of a batch.
_ROWS = 256


def continued_many(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, label: str = "", progress: bool = False
) -> list[str]:
    """The text that a causal LM puts behind each prompt, greedily.

    Args:
        model: plain or inside a PEFT model; edits at work count.
        tokenizer: the model's.
        prompts: any number of texts; equal ones are asked once.
        new_tokens: behind each prompt.
        label: of the progress bar.
        progress: show one.
    """
    base, different = base_of(model), list(dict.fromkeys(prompts))
    rows = [tuple(ids) for ids in tokenizer(different, verbose=False)["input_ids"]] if different else []
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    found: dict[str, str] = {}
    with eval_mode(base), progress_bar(label, len(rows), progress, unit="prompts") as advance:
        for group in by_length.values():
            for part in chunks(group, _ROWS):
                new = _greedy(base, torch.tensor([rows[i] for i in part], device=device_of(base)), new_tokens)
                texts = tokenizer.batch_decode(new, skip_special_tokens=True)
                found |= {different[i]: text for i, text in zip(part, texts, strict=True)}
                advance(len(part))
    return [found[prompt] for prompt in prompts]


@torch.no_grad()
def _greedy(base: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """The likeliest tokens behind rows of equal length, one after the other: (rows, new_tokens)."""
    cache, step, new = DynamicCache(config=base.config), ids, list[Tensor]()
    for _ in range(new_tokens):
        logits = base(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        step = logits.argmax(-1, keepdim=True)
        new.append(step)
    return torch.cat(new, 1)
