"""Many prompts continued at once, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npt.editing.answers import continued
from npt.tuner.converted import base_of


def continued_many(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, label: str = "", progress: bool = False
) -> list[str]:
    """The text that a causal LM puts behind each prompt, greedily, to its end of text.

    Args:
        model: plain or inside a PEFT model; edits at work count.
        tokenizer: the model's.
        prompts: any number of texts; equal ones are asked once.
        new_tokens: the most behind each prompt.
        label: of the progress bar.
        progress: show one.
    """
    different = list(dict.fromkeys(prompts))
    rows = tokenizer(different, verbose=False)["input_ids"] if different else []
    counts = [new_tokens] * len(rows)
    new = continued(base_of(model), tokenizer, rows, counts, lambda ids: False, label=label, progress=progress)
    texts = {text: tokenizer.decode(ids, skip_special_tokens=True) for text, ids in zip(different, new, strict=True)}
    return [texts[prompt] for prompt in prompts]
