"""The same prompts continued by the NPT model and by the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from npt.block.modes import Mode, running_as
from npt.errors import NPTError
from npt.tuner.converted import ConvertedModel, active_layers, context_length_of, device_of, eval_mode

DEFAULT_PROMPTS = (
    "Once upon a time",
    "The little dog ran to",
    "One day, a boy named Tim",
    "The most important thing is",
)


def check_prompts(prompts: Sequence[str]) -> None:
    """Checks that prompts have text to continue; needs no model.

    Raises:
        NPTError: a prompt is blank or is not Unicode text.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise NPTError(f"prompt {number}, {prompt!r}: is blank; write some text to continue")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise NPTError(f"prompt {number}, {prompt[:40]!r}: is not Unicode text; write it in UTF-8")


def check_context(model: ConvertedModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Checks that prompt and continuation fit the model's context, where its length is known.

    Raises:
        NPTError: a prompt is too long, or has no token.
    """
    positions = context_length_of(model)
    for number, prompt in enumerate(prompts, 1):
        tokens = len(tokenizer(prompt, verbose=False)["input_ids"])
        if tokens == 0:
            raise NPTError(
                f"prompt {number}, {prompt[:40]!r}: has no token of the model's vocabulary; write other text"
            )
        if positions is not None and tokens + max_new_tokens > positions:
            raise NPTError(
                f"prompt {number}, {prompt[:40]!r}: its {tokens} tokens and --max-new-tokens {max_new_tokens} are more "
                f"than the model's context of {positions}; shorten one of them"
            )


@torch.no_grad()
def continue_text(
    model: ConvertedModel, tokenizer: Any, prompt: str, max_new_tokens: int = 48, seed: int | None = None
) -> tuple[str, list[int]]:
    """Returns (the prompt with its continuation, without special tokens; the continuation's token ids).

    Greedy, or sampled at temperature 1 from the whole distribution with `seed`; the caller's random state is left alone.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(device_of(model))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=seed is not None,
        **({} if seed is None else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0 if seed is None else seed)
        tokens = model.get_base_model().generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
        )
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text, tokens[0, inputs["input_ids"].shape[1] :].tolist()


def side_by_side(
    model: ConvertedModel,
    tokenizer: Any,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_new_tokens: int = 48,
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """Continues prompts with both models, greedily, or sampled with `seed`.

    Returns [{"prompt", "npt", "original", "matching_tokens", "tokens", "first_difference"}].

    matching_tokens: new tokens before the first that differs, of `tokens`. first_difference: the index of the first
    character that differs, None where the texts are the same.
    """
    samples = []
    with eval_mode(model):
        for prompt in prompts:
            npt, ids = continue_text(model, tokenizer, prompt, max_new_tokens, seed)
            with running_as(active_layers(model), Mode.ORIGINAL):
                original, original_ids = continue_text(model, tokenizer, prompt, max_new_tokens, seed)
            samples.append(
                {
                    "prompt": prompt,
                    "npt": npt,
                    "original": original,
                    "matching_tokens": _matching(ids, original_ids),
                    "tokens": max(len(ids), len(original_ids)),
                    "first_difference": None if npt == original else _matching(npt, original),
                }
            )
    return samples


def _matching(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Returns the number of items before the first difference."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def generation_section(greedy: Sequence[dict[str, Any]], sampled: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report's `generation_samples`: columns of `side_by_side`, and those of sampled text under `sampled`."""
    names = {"prompt": "prompts", "npt": "npt_generations", "original": "original_generations"}
    keys = ("prompt", "npt", "original", "matching_tokens", "tokens", "first_difference")
    columns = [{names.get(key, key): [s[key] for s in samples] for key in keys} for samples in (greedy, sampled)]
    return {**columns[0], "sampled": columns[1]}
