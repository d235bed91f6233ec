"""The same prompts continued by the NPT model and by the original."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache

from npt.block.modes import Mode, running_as
from npt.common.display import one_line
from npt.common.limits import check_ids
from npt.data.sampling import draw
from npt.errors import NPTError
from npt.tuner.converted import (
    ConvertedModel,
    active_layers,
    base_of,
    context_length_of,
    device_of,
    eval_mode,
    vocabulary_size,
)

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
        ids = tokenizer(prompt, verbose=False)["input_ids"]
        tokens = len(ids)
        if tokens == 0:
            raise NPTError(
                f"prompt {number}, {prompt[:40]!r}: has no token of the model's vocabulary; write other text"
            )
        check_ids(ids, vocabulary_size(model), f"prompt {number}, {prompt[:40]!r}", tokenizer)
        if positions is not None and tokens + max_new_tokens > positions:
            raise NPTError(
                f"prompt {number}, {prompt[:40]!r}: its {tokens} tokens and --max-new-tokens {max_new_tokens} are more "
                f"than the model's context of {positions}; shorten one of them"
            )


def listed_prompts(model: ConvertedModel, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts of a report as a list, a single one too, each checked for room for at least one token after it.

    Raises:
        NPTError: see `check_prompts` and `check_context`.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    check_prompts(listed)
    check_context(model, tokenizer, listed, 1)
    return listed


def room(model: ConvertedModel, prompt_tokens: int, max_new_tokens: int) -> int:
    """The number of new tokens for which the model has positions, at most `max_new_tokens`."""
    positions = context_length_of(model)
    return max_new_tokens if positions is None else max(0, min(max_new_tokens, positions - prompt_tokens))


@torch.no_grad()
def continue_text(
    model: ConvertedModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 48,
    seed: int | None = None,
    enough: Callable[[list[int]], bool] | None = None,
) -> tuple[str, list[int]]:
    """Returns (the prompt with its continuation, without special tokens; the continuation's token ids).

    Greedy, or sampled at temperature 1 from the whole distribution with `seed`. Of the base's generation_config only the
    tokens that end a text count. The global random state is neither read nor changed. `enough` ends the text where it says
    so of the continuation's token ids.
    """
    base = base_of(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device_of(model))
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    count = room(model, ids.shape[1], max_new_tokens)
    uniforms = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    # `generate()` isn't used: it fills whatever a call leaves unset from the base's generation_config.
    cache, options = DynamicCache(config=base.config), _last_logits_only(base)
    ends, step, new = end_tokens(base, tokenizer), ids, list[int]()
    for uniform in uniforms:
        logits = base(input_ids=step, past_key_values=cache, use_cache=True, **options).logits[:, -1]
        token = int(logits.argmax() if seed is None else draw(logits, uniform))
        new.append(token)
        if token in ends or (enough is not None and enough(new)):
            break
        step = ids.new_tensor([[token]])
    return tokenizer.decode([*ids[0].tolist(), *new], skip_special_tokens=True), new


def end_tokens(base: Any, tokenizer: Any) -> set[int]:
    """The ids that end a text: the tokenizer's EOS, and those of the base's generation_config, which may name several."""
    named = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    ids = [*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id]
    return {int(token) for token in ids if token is not None}


def _last_logits_only(base: Any) -> dict[str, int]:
    """The argument that spares a causal LM the logits of all but a prompt's last position, where it has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in signature(type(base).forward).parameters else {}


def own_settings(model: ConvertedModel) -> dict[str, Any]:
    """The settings that the base's generation_config switches on, token ids apart."""
    named = model.get_base_model().generation_config.to_diff_dict()
    plain = ("use_cache", "transformers_version")
    return {
        k: v for k, v in named.items() if v and k not in plain and not k.startswith("_") and not k.endswith("token_id")
    }


@torch.no_grad()
def continue_by_own_settings(
    model: ConvertedModel, tokenizer: Any, prompt: str, max_new_tokens: int = 48, seed: int | None = None
) -> tuple[str, list[int]]:
    """Does what `continue_text` does by the settings of the base's generation_config, its length apart.

    Raises:
        NPTError: `generate` can't follow these settings.
    """
    base = model.get_base_model()
    inputs = tokenizer(prompt, return_tensors="pt").to(device_of(model))
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0 if seed is None else seed)
        try:
            config = copy.deepcopy(base.generation_config)
            count = room(model, inputs["input_ids"].shape[1], max_new_tokens)
            config.max_new_tokens, config.max_length, config.num_return_sequences = count, None, 1
            config.return_dict_in_generate = False
            config.eos_token_id = sorted(end_tokens(base, tokenizer)) or None
            if config.pad_token_id is None:
                config.pad_token_id = tokenizer.pad_token_id
            tokens = base.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config,
                tokenizer=tokenizer,
            )  # fmt: skip
        except (ValueError, TypeError, OSError) as error:
            raise NPTError(
                f"--decoding base: the base's generation_config can't be followed ({one_line(error, 200)}); mend its "
                "generation_config.json, or use --decoding greedy or sampled"
            ) from error
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text, tokens[0, inputs["input_ids"].shape[1] :].tolist()


def side_by_side(
    model: ConvertedModel,
    tokenizer: Any,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_new_tokens: int = 48,
    seed: int | None = None,
    by_own_settings: bool = False,
) -> list[dict[str, Any]]:
    """Continues prompts with both models: greedily, or sampled with `seed`, or as the base's generation_config says.

    Returns [{"prompt", "npt", "original", "matching_tokens", "tokens", "first_difference"}].

    matching_tokens: new tokens before the first that differs, of `tokens`. first_difference: the index of the first
    character that differs, None where the texts are the same.
    """
    samples, write = [], continue_by_own_settings if by_own_settings else continue_text
    with eval_mode(model):
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            npt, ids = write(model, tokenizer, prompt, max_new_tokens, seed)
            with running_as(active_layers(model), Mode.ORIGINAL):
                original, original_ids = write(model, tokenizer, prompt, max_new_tokens, seed)
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
