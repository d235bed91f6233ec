"""Prompts like the edits' about other names, and what the base writes behind them: the neighbours of many facts.

The names are the package's and more that the base writes itself; none of them is the subject of a fact. Prompts that the
window does not hold are left out.
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
LISTS, NAMED, WRITTEN = 64, 4, 32
#: Tokens that the base writes behind a prompt.
BEHIND = 10
_NAME = re.compile(r"[^\W\d_a-z][\w'.&-]*(?: [\w'.&-]+){0,4}")
_SEED = 0


def names(base: Any, tokenizer: Any, prompts: Prompts, progress: bool = False) -> list[str]:
    """Names of people, places and things: the package's, and what the base goes on with behind lists of them, if
    its window holds one.

    Args:
        base: the causal LM, with nothing at work on it.
        tokenizer: the model's.
        prompts: the model's.
        progress: show a progress bar.
    """
    known = [name for _, _, subjects in RELATIONS for name in subjects]
    chance = random.Random(_SEED)
    texts = [f"Well-known names: {', '.join(chance.sample(known, NAMED))}," for _ in range(LISTS)]
    lists = [prompts.ids(text) for text in texts if fits(prompts, text, WRITTEN)]
    counts = [WRITTEN] * len(lists)
    found = continued(base, tokenizer, lists, counts, lambda ids: False, seed=_SEED, label="Names", progress=progress)
    parts = [part.strip() for ids in found for part in tokenizer.decode(ids, skip_special_tokens=True).split(",")[:-1]]
    return sorted({*known, *(part for part in parts if _NAME.fullmatch(part))})


def neighbours(
    base: Any,
    tokenizer: Any,
    prompts: Prompts,
    requests: Sequence[Request],
    each: int,
    most: int,
    progress: bool = False,
) -> list[Place]:
    """Prompts of the requests with other names in place of their subjects, and the texts that they protect; behind each what
    the base writes, greedily. The position is that of the prompt's last token.

    Args:
        base: the causal LM, with nothing at work on it.
        tokenizer: the model's.
        prompts: the model's.
        requests: the facts. One without a subject has no neighbours.
        each: names for each prompt.
        most: prompts, at most; those that are protected come first.
        progress: show progress bars.
    """
    own = {prompt for request in requests for prompt in request.prompts}
    subjects = [re.compile(rf"\b{re.escape(request.subject)}\b") for request in requests if request.subject]
    pool = [name for name in names(base, tokenizer, prompts, progress) if not any(one.search(name) for one in subjects)]
    chance = random.Random(_SEED)
    others = [
        text
        for request in requests
        if request.subject
        for prompt in request.prompts
        if request.subject in prompt
        for name in chance.sample(pool, min(each, len(pool)))
        if (text := prompt.replace(request.subject, name)) not in own
    ]
    texts = [text for request in requests for text in request.protect] + chance.sample(others, len(others))
    rows = [prompts.ids(text) for text in texts[:most] if fits(prompts, text, BEHIND)]
    behind = continued(
        base, tokenizer, rows, [BEHIND] * len(rows), lambda ids: False, label="Neighbours", progress=progress
    )
    return [Place((*ids, *more), len(ids) - 1) for ids, more in zip(rows, behind, strict=True)]


def fits(prompts: Prompts, text: str, behind: int) -> bool:
    """True where the model's window holds a text with so many tokens behind it."""
    count = len(prompts.tokenizer(text, verbose=False)["input_ids"]) + behind
    return count <= (context_of(prompts.config) or count)
