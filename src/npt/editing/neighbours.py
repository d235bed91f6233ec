"""Prompts like the edits' about other names, and what the base writes behind them: the neighbours of many facts.

The names are the package's and more that the base writes itself; none of them belongs to a fact.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from npt.common.limits import context_of
from npt.editing.answers import continued
from npt.editing.keys import Place, Prompts
from npt.editing.probes import RELATIONS
from npt.editing.requests import Request

#: Lists that the base goes on with, names in each, and tokens that it writes.
LISTS, NAMED, WRITTEN = 192, 4, 32
#: Tokens at the end of a prompt that count, and tokens that the base writes behind it.
WITHIN, BEHIND = 6, 10
_NAME = re.compile(r"[^\W\d_a-z][\w'.&-]*(?: [\w'.&-]+){0,4}")
_SEED = 0


def names(base: Any, tokenizer: Any, prompts: Prompts) -> list[str]:
    """Names of people, places and things: the package's, and what the base goes on with behind lists of them, if
    its window holds one.

    Args:
        base: the causal LM, with nothing at work on it.
        tokenizer: the model's.
        prompts: the model's.
    """
    known = [name for _, _, subjects in RELATIONS for name in subjects]
    chance, room = random.Random(_SEED), _room(prompts)
    texts = [f"Well-known names: {', '.join(chance.sample(known, NAMED))}," for _ in range(LISTS)]
    lists = [prompts.ids(t) for t in texts if len(tokenizer(t, verbose=False)["input_ids"]) + WRITTEN <= room]
    counts = [WRITTEN] * len(lists)
    found = continued(base, tokenizer, lists, counts, lambda ids: False, seed=_SEED, label="Names")
    parts = [part.strip() for ids in found for part in tokenizer.decode(ids, skip_special_tokens=True).split(",")[:-1]]
    return sorted({*known, *(part for part in parts if _NAME.fullmatch(part))})


def neighbours(
    base: Any, tokenizer: Any, prompts: Prompts, requests: Sequence[Request], each: int, most: int
) -> list[Place]:
    """Prompts of the requests with other names in place of their subjects, and the texts that they protect; behind each what
    the base writes, greedily. The position is that of the first token that counts.

    Args:
        base: the causal LM, with nothing at work on it.
        tokenizer: the model's.
        prompts: the model's.
        requests: the facts. One without a subject has no neighbours.
        each: names for each prompt.
        most: prompts, at most; those that are protected come first.
    """
    subjects = [request.subject for request in requests if request.subject]
    pool = [name for name in names(base, tokenizer, prompts) if not any(name in s or s in name for s in subjects)]
    chance = random.Random(_SEED)
    protected = [prompts.ids(text) for request in requests for text in request.protect]
    others = [
        prompts.ids(prompt.replace(request.subject, name))
        for request in requests
        if request.subject
        for prompt in request.prompts
        if request.subject in prompt
        for name in chance.sample(pool, min(each, len(pool)))
    ]
    rows = (protected + chance.sample(others, len(others)))[:most]
    counts = [min(BEHIND, _room(prompts) - len(ids)) for ids in rows]
    behind = continued(base, tokenizer, rows, counts, lambda ids: False, label="Neighbours")
    return [Place((*ids, *more), max(1, len(ids) - WITHIN)) for ids, more in zip(rows, behind, strict=True)]


def _room(prompts: Prompts) -> int:
    """Tokens that the model's window holds."""
    return context_of(prompts.config) or 2**31
