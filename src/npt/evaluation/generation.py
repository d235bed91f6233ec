"""The same prompts continued by the NPT model and by the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from npt.attach import layer_mode
from npt.tuner import active_layers, device_of, eval_mode

DEFAULT_PROMPTS = (
    "Once upon a time",
    "The little dog ran to",
    "One day, a boy named Tim",
    "The most important thing is",
)


@torch.no_grad()
def continue_text(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 48) -> str:
    """The prompt with its greedy continuation, special tokens left out."""
    inputs = tokenizer(prompt, return_tensors="pt").to(device_of(model))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    tokens = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
    )
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text


def side_by_side(
    model: Any, tokenizer: Any, prompts: Sequence[str] = DEFAULT_PROMPTS, max_new_tokens: int = 48
) -> list[dict[str, str]]:
    """[{"prompt", "npt", "original"}], both greedy."""
    samples = []
    with eval_mode(model):
        for prompt in prompts:
            npt = continue_text(model, tokenizer, prompt, max_new_tokens)
            with layer_mode(active_layers(model), override="bypass"):
                original = continue_text(model, tokenizer, prompt, max_new_tokens)
            samples.append({"prompt": prompt, "npt": npt, "original": original})
    return samples
