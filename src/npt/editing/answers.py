"""Text that a model writes behind many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from npt.common.progress import progress_bar
from npt.data.sampling import draw
from npt.evaluation.generation import end_tokens
from npt.tuner.converted import device_of, eval_mode

#: Prompts that are continued together, and the shortest beginning of theirs that is read once for all of them.
ROWS, PREFIX = 32, 8


@torch.no_grad()
def continued(
    base: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    over: Callable[[list[int]], bool],
    *,
    seed: int | None = None,
    temperature: float = 1.0,
    label: str = "Answering",
    progress: bool = False,
) -> list[list[int]]:
    """Token ids that a causal LM writes behind each prompt, the one that ends a text included.

    Prompts of different lengths go through the model side by side without padding: all begin together, and a row whose prompt
    is longer reads on while others write.

    Args:
        base: the causal LM.
        tokenizer: the model's.
        prompts: token ids, at least one each.
        counts: the most tokens that are written behind each prompt; a prompt with 0 is not read.
        over: says of the ids written so far if the text is over.
        seed: draws from the distribution; None takes the likeliest token.
        temperature: of the draws.
        label: names the work.
        progress: show a progress bar.
    """
    order = sorted((i for i, count in enumerate(counts) if count), key=lambda i: (len(prompts[i]), i))
    found: list[list[int]] = [[] for _ in prompts]
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    ends = end_tokens(base, tokenizer)
    with eval_mode(base), progress_bar(label, len(order), progress, unit="texts") as advance:
        for start in range(0, len(order), ROWS):
            part = order[start : start + ROWS]
            uniforms = torch.rand(
                len(part), max(1, *(counts[i] for i in part)), generator=generator, dtype=torch.float64
            )
            written = _batch(
                base, [prompts[i] for i in part], [counts[i] for i in part], lambda ids: ids[-1] in ends or over(ids),
                None if seed is None else uniforms, temperature,
            )  # fmt: skip
            for i, ids in zip(part, written, strict=True):
                found[i] = ids
            advance(len(part))
    return found


def _batch(
    base: Any,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    over: Callable[[list[int]], bool],
    uniforms: Tensor | None,
    temperature: float,
) -> list[list[int]]:
    """`continued` for the prompts of one batch."""
    device, cache = device_of(base), DynamicCache(config=base.config)
    written: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    shortest = min(map(len, prompts))
    shared = next((n for n in range(shortest - 1) if len({row[n] for row in prompts}) > 1), shortest - 1)
    if len(prompts) > 1 and shared >= PREFIX and all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        base(input_ids=torch.tensor([list(prompts[0][:shared])], device=device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
    else:
        shared = 0
    step = torch.tensor([list(row[shared:shortest]) for row in prompts], device=device)
    at = shortest
    while not all(done):
        logits = base(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
        likeliest = logits.argmax(-1).tolist()
        tokens = []
        for i, row in enumerate(prompts):
            if at < len(row):
                tokens.append(row[at])
                continue
            token = likeliest[i]
            if uniforms is not None and not done[i]:
                token = int(draw(logits[i : i + 1] / temperature, uniforms[i, len(written[i]), None]))
            tokens.append(token)
            if not done[i]:
                written[i].append(token)
                done[i] = len(written[i]) >= counts[i] or over(written[i])
        step = torch.tensor(tokens, device=device)[:, None]
        at += 1
    return written
