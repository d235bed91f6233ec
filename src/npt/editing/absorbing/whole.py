"""Both models on texts by whole passes: where several blocks are patched, no pass can begin above them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from npt.editing.bench import chunks, written
from npt.editing.keys import Prompts
from npt.editing.measure import Preview, divergences
from npt.editing.statistics import padded, token_rows
from npt.tuner.converted import device_of, eval_mode, vocabulary_size

#: Leaves the edits out within a `with` block.
Off = Callable[[], AbstractContextManager[None]]


@torch.no_grad()
def previewed_whole(base: Any, tokenizer: Any, off: Off, text: str, new_tokens: int) -> Preview:
    """Both models on one text.

    Args:
        base: the causal LM.
        tokenizer: the model's.
        off: leaves the edits out.
        text: the text.
        new_tokens: tokens that are written behind it.

    Raises:
        DataError: a text without a token, or longer than the model's window.
    """
    row = Prompts(tokenizer, base.config, vocabulary_size(base)).ids(text)
    batch = padded([row], device_of(base))
    with off(), eval_mode(base):
        plain = base(**batch, use_cache=False).logits[0]
        before = written(base, tokenizer, text, new_tokens)
    with eval_mode(base):
        logits = base(**batch, use_cache=False).logits[0]
    kl = float(divergences(plain, logits).mean())
    return Preview(text, before, written(base, tokenizer, text, new_tokens), kl, logits)


@torch.no_grad()
def mean_kl_whole(base: Any, tokenizer: Any, off: Off, texts: Sequence[str]) -> float:
    """Mean divergence of the edited model from the base over all tokens of texts, in nats.

    Args:
        base: the causal LM.
        tokenizer: the model's.
        off: leaves the edits out.
        texts: at least one with a token.
    """
    total, tokens = 0.0, 0
    for part in chunks(token_rows(tokenizer, texts, "texts"), 8):
        batch = padded(part, device_of(base))
        with eval_mode(base):
            edited = base(**batch, use_cache=False).logits
            with off():
                plain = base(**batch, use_cache=False).logits
        for i, row in enumerate(part):
            total += float(divergences(plain[i, : len(row)], edited[i, : len(row)]).sum())
            tokens += len(row)
    return total / tokens
