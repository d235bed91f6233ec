"""Options of `EditStore.absorb`, and the setting that its choice ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from npt.common.display import one_line, ranges
from npt.editing.absorbing.dialogue import STYLES
from npt.errors import NPTError


@dataclass(frozen=True)
class Setting:
    """How weight deltas are found.

    blocks: ascending. mu, lam: of the formula. rank: the largest of a block's. steps: by gradient. rate: AdamW's. start: where
    the steps begin, see `STARTS`.
    """

    blocks: tuple[int, ...]
    mu: float
    lam: float
    rank: int
    steps: int = 0
    rate: float = 1e-3
    start: str = "closed"

    @property
    def is_solved(self) -> bool:
        """True where the weight deltas are found in closed form, with steps by gradient behind it or without."""
        return _is_solved(self.start, self.steps)


@dataclass(frozen=True)
class Options:
    """How a context is absorbed.

    number: questions that the model writes. phrasings: wordings of each. new_tokens: the longest answer. limit: mean KL from
    the base on general text, in nats a token, by which the formula's mu is chosen; the note names a larger one. mu, lam: of
    the formula; None chooses. rank: the largest of a block's weight delta. steps: by gradient; with 0 the formula alone.
    rate: AdamW's. start: where the steps begin, see `STARTS`. style: how questions are put (see
    `npt.editing.absorbing.dialogue.STYLES`), or "auto". seed: of the questions.
    """

    number: int = 288
    phrasings: int = 3
    new_tokens: int = 48
    limit: float = 0.02
    mu: float | None = None
    lam: float | None = None
    rank: int = 128
    steps: int = 80
    rate: float = 3e-3
    start: str = "zero"
    style: str = "auto"
    seed: int = 0


#: Where steps by gradient begin: at no weight delta, as a LoRA does; or at those that the formula finds.
STARTS = ("zero", "closed")
#: The most steps by gradient.
MOST_STEPS = 10_000
#: The smallest value of each whole number.
_LEAST = {"number": 4, "phrasings": 1, "new_tokens": 1, "rank": 1, "steps": 0, "seed": 0}
_MOST = {"number": 10_000, "phrasings": 16, "new_tokens": 4_096, "rank": 512, "steps": MOST_STEPS, "seed": 2**31 - 1}


def options_of(given: dict[str, Any]) -> Options:
    """The options, checked.

    Raises:
        NPTError: an unknown name, or a value out of range.
    """
    names = [field.name for field in fields(Options)]
    for name, value in given.items():
        shown = f"{name}={one_line(repr(value), 40)}"
        if name not in names:
            raise NPTError(f"{shown}: absorb has no such option; use {', '.join(names)}")
        if name in _LEAST:
            if type(value) is not int or not _LEAST[name] <= value <= _MOST[name]:
                raise NPTError(f"{shown}: use a whole number from {_LEAST[name]} to {_MOST[name]:,}")
        elif name == "style":
            if value != "auto" and value not in STYLES:
                raise NPTError(f"{shown} is unknown; use auto, {', '.join(STYLES)}")
        elif name == "start":
            if value not in STARTS:
                raise NPTError(f"{shown} is unknown; use {' or '.join(STARTS)}")
        elif not (value is None and name in ("mu", "lam")) and not _positive(value):
            raise NPTError(
                f"{shown}: use a number above 0{', or None to have it chosen' if name in ('mu', 'lam') else ''}"
            )
    options = Options(**given)
    solved = _is_solved(options.start, options.steps)
    for name, useless, instead in (
        ("mu", not solved, "the closed form; use start=closed or steps=0"),
        ("lam", not solved, "the closed form; use start=closed or steps=0"),
        ("rate", not options.steps, "steps by gradient; use more than 0 steps"),
        ("start", not options.steps, "steps by gradient; use more than 0 steps"),
    ):
        if given.get(name) is not None and useless:
            raise NPTError(f"{name}={given[name]}: is of {instead} with it")
    return options


def _is_solved(start: str, steps: int) -> bool:
    return start == "closed" or not steps


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def blocks_of_choice(blocks: Any, count: int) -> tuple[int, ...] | None:
    """The blocks that are named, ascending; None for "auto".

    Args:
        blocks: "auto", or a list of indices.
        count: blocks of the model.

    Raises:
        NPTError: neither, none, or one that the model does not have.
    """
    if isinstance(blocks, str) and blocks == "auto":
        return None
    shown = one_line(repr(blocks), 60)
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or any(type(b) is not int for b in blocks):
        raise NPTError(f"blocks={shown}: use 'auto', or a list of the indices of blocks")
    wrong = [block for block in blocks if not 0 <= block < count]
    if wrong or not blocks:
        what = f"names {ranges(wrong)}, and" if wrong else "is empty;"
        raise NPTError(f"blocks={shown}: {what} the model has {count} blocks; use 0 to {count - 1}, or 'auto'")
    return tuple(sorted(set(blocks)))
