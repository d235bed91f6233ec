"""Keys: the input of `down` at the subject's last token of a prompt, found in token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from npt.common.display import one_line
from npt.common.limits import check_ids, check_length
from npt.editing.requests import continued
from npt.editing.statistics import begins_with_bos
from npt.errors import DataError


@dataclass(frozen=True)
class Place:
    """A text's token ids, and the token whose key is meant."""

    ids: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class Target:
    """Token ids of a prompt with its target behind it. targets: the ids to be predicted, from `start` - 1 on.

    words: how many of them belong to the target; the others are its terminator. in_word: True for a target that ends in a
    letter or digit, which a next token may go on with.
    """

    ids: tuple[int, ...]
    start: int
    words: int
    in_word: bool

    @property
    def targets(self) -> tuple[int, ...]:
        """The ids that shall follow the prompt."""
        return self.ids[self.start :]


class Prompts:
    """Prompts as token ids.

    Args:
        tokenizer: the model's. config: the model's, for its context and vocabulary. vocabulary: rows of its embedding.
    """

    def __init__(self, tokenizer: Any, config: Any, vocabulary: int):
        self.tokenizer, self.config, self.vocabulary = tokenizer, config, vocabulary
        self.bos = begins_with_bos(tokenizer)

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, without an EOS that the tokenizer may put behind it.

        Raises:
            DataError: none, more than the context holds, or some without a row in the embedding.
        """
        found = list(self.tokenizer(text, verbose=False)["input_ids"])
        if len(found) > 1 and found[-1] == self.tokenizer.eos_token_id:
            found.pop()
        shown = one_line(repr(text), 60)
        if not found:
            raise DataError(f"{shown}: has no token of the model's vocabulary; write other text")
        check_ids(found, self.vocabulary, shown, self.tokenizer)
        check_length(self.config, len(found) + 1, f"{shown}: tokens")
        return tuple(found)

    def place(self, prompt: str, subject: str | None, prefix: str = "", first: bool = False) -> Place:
        """The last token of the subject's last mention in a prompt; the prompt's last token without a subject.

        Args:
            prefix: text to put in front.
            first: take the text's first token too.

        Raises:
            DataError: the subject's last token is the text's first one.
        """
        text = prefix + prompt
        ids = self.ids(text)
        if subject is None:
            return Place(ids, len(ids) - 1)
        begin = len(prefix) + prompt.rindex(subject)
        position = self._token_at(text, ids, begin + len(subject))
        if position == 0 and not first:
            raise DataError(
                f"{one_line(repr(prompt), 80)}: the subject {one_line(repr(subject), 40)} is the first token, whose key is "
                "the same for every text; put words in front of it, such as 'About X: X was born in'"
            )
        return Place(ids, position)

    def _token_at(self, text: str, ids: Sequence[int], end: int) -> int:
        """The index of the token that holds the character before `end`."""
        if getattr(self.tokenizer, "is_fast", False):
            offsets = self.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
            holding = [i for i, (start, stop) in enumerate(offsets[: len(ids)]) if start < end <= stop]
            if holding:
                return holding[-1]
        return max(0, len(self.ids(text[:end])) - 1)

    @cached_property
    def continuing(self) -> Tensor:
        """(vocabulary,) True for tokens that go on with a word: behind a letter, their text begins with a letter or digit."""
        letter = list(self.tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
        count = min(self.vocabulary, len(self.tokenizer))
        start = len(self.tokenizer.decode(letter))
        texts = self.tokenizer.batch_decode([[*letter, token] for token in range(count)], skip_special_tokens=True)
        found = torch.zeros(self.vocabulary, dtype=torch.bool)
        found[:count] = torch.tensor([text[start : start + 1].isalnum() for text in texts])
        return found

    def target(self, prompt: str, target: str, terminator: str | None) -> Target:
        """A prompt's token ids with those of its target and of the first token of a terminator behind them."""
        ids = self.ids(prompt)
        words = self._behind(ids, prompt, continued(prompt, target), target)
        end: tuple[int, ...] = ()
        if terminator and not target.endswith(terminator):
            whole = self.ids(continued(prompt, target) + terminator)
            known = (*ids, *words)
            end = whole[len(known) : len(known) + 1] if whole[: len(known)] == known else ()
        return Target((*ids, *words, *end), len(ids), len(words), target[-1:].isalnum())

    def _behind(self, ids: tuple[int, ...], prompt: str, text: str, target: str) -> tuple[int, ...]:
        whole = self.ids(text)
        if whole[: len(ids)] == ids and len(whole) > len(ids):
            return whole[len(ids) :]
        # The tokenizer joins the target to the prompt's last token: the ids that a model writes are those of the target alone.
        alone = self.tokenizer(text[len(prompt) :], add_special_tokens=False, verbose=False)["input_ids"]
        if not alone:
            raise DataError(
                f"target {one_line(repr(target), 60)}: has no token of the model's vocabulary; write other text"
            )
        return tuple(alone)
