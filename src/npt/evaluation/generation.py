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


def continue_text(
    model: ConvertedModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 48,
    seed: int | None = None,
    enough: Callable[[list[int]], bool] | None = None,
) -> tuple[str, list[int]]:
    """`continue_texts` with one seed."""
    return continue_texts(model, tokenizer, prompt, max_new_tokens, [seed], enough)[0]


@torch.no_grad()
def continue_texts(
    model: ConvertedModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 48,
    seeds: Sequence[int | None] = (None,),
    enough: Callable[[list[int]], bool] | None = None,
) -> list[tuple[str, list[int]]]:
    """For each seed (the prompt with its continuation, without special tokens; the continuation's token ids).

    Greedy where the seed is None, else sampled at temperature 1 from the whole distribution; all are written in one batch. Of
    the base's generation_config only the tokens that end a text count. The global random state is neither read nor changed.
    `enough` ends a text where it says so of the continuation's token ids.
    """
    base = base_of(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device_of(model))
    count = room(model, ids.shape[1], max_new_tokens)
    generators = [torch.Generator().manual_seed(0 if seed is None else seed) for seed in seeds]
    uniforms = [torch.rand(count, 1, generator=generator, dtype=torch.float64) for generator in generators]
    # `generate()` isn't used: it fills whatever a call leaves unset from the base's generation_config.
    cache, options = DynamicCache(config=base.config), _last_logits_only(base)
    ends, step = end_tokens(base, tokenizer), ids.repeat(len(seeds), 1)
    new: list[list[int]] = [[] for _ in seeds]
    written = [False] * len(seeds)
    for place in range(count):
        logits = base(input_ids=step, past_key_values=cache, use_cache=True, **options).logits[:, -1]
        for row, seed in enumerate(seeds):
            if not written[row]:
                one = logits[row : row + 1]
                new[row].append(int(one.argmax() if seed is None else draw(one, uniforms[row][place])))
                written[row] = new[row][-1] in ends or (enough is not None and enough(new[row]))
        if all(written):
            break
        step = ids.new_tensor([row[-1:] for row in new])  # what follows a text that has ended is not looked at
    prompt_ids = ids[0].tolist()
    return [(tokenizer.decode([*prompt_ids, *row], skip_special_tokens=True), row) for row in new]


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
    if not by_own_settings:
        return side_by_side_with_seeds(model, tokenizer, prompts, max_new_tokens, [seed])[0]

    def write(prompt: str) -> list[tuple[str, list[int]]]:
        return [continue_by_own_settings(model, tokenizer, prompt, max_new_tokens, seed)]

    return [found[0] for found in _samples(model, prompts, write)]


def side_by_side_with_seeds(
    model: ConvertedModel,
    tokenizer: Any,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    max_new_tokens: int = 48,
    seeds: Sequence[int | None] = (None,),
) -> list[list[dict[str, Any]]]:
    """For each seed what `side_by_side` returns. A prompt's texts are written in one batch, in little more time than one."""
    found = _samples(model, prompts, lambda prompt: continue_texts(model, tokenizer, prompt, max_new_tokens, seeds))
    return [[of_prompt[i] for of_prompt in found] for i in range(len(seeds))]


def _samples(
    model: ConvertedModel, prompts: Sequence[str], write: Callable[[str], list[tuple[str, list[int]]]]
) -> list[list[dict[str, Any]]]:
    """For each prompt the samples of the texts that `write` returns."""
    found = []
    with eval_mode(model):
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            own = write(prompt)
            with running_as(active_layers(model), Mode.ORIGINAL):
                originals = write(prompt)
            found.append([_sample(prompt, *pair) for pair in zip(own, originals, strict=True)])
    return found


def _sample(prompt: str, own: tuple[str, list[int]], original: tuple[str, list[int]]) -> dict[str, Any]:
    (npt, ids), (text, original_ids) = own, original
    return {
        "prompt": prompt,
        "npt": npt,
        "original": text,
        "matching_tokens": _matching(ids, original_ids),
        "tokens": max(len(ids), len(original_ids)),
        "first_difference": None if npt == text else _matching(npt, text),
    }


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
