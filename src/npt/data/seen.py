"""A record of text by its content: which blocks of another text repeat it, whatever their length, file name or order.

A text is known by its windows of 13 consecutive tokens, the unit by which GPT-3's training text was cleaned (Brown et al.,
"Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C). Each window is a 64-bit hash; a window lies in one
document, and a shorter document is one window. Of many hashes the smallest are kept, a uniform sample of all that there
are (a bottom-k sketch), so that a record never outgrows 512 KiB and shares stay right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from npt.common.display import one_line
from npt.common.files import write_tensors
from npt.data.packing import IGNORED
from npt.errors import CheckpointError

#: The file of a `TextRecord` in an adapter's folder.
RECORD = "seen_text.safetensors"

#: Tokens in a window, and in one of a vocabulary of fewer than `SMALL_VOCABULARY` tokens: 13 bytes in a row are common to
#: many texts (13 % of the blocks of WikiText-2 would count as seen after 7 MB of other prose; of 26 bytes none).
WINDOW, LONG_WINDOW, SMALL_VOCABULARY = 13, 26, 512
#: The most hashes that a record of a text keeps.
LIMIT = 2**16
#: A block counts as seen from this share of its windows on.
SEEN_SHARE = 0.5
#: So many windows that lie in a block are enough to judge it by.
WHOLE_WINDOWS = 6
#: Windows of a sample that a judgement needs; blocks with fewer are judged together with their neighbours.
LEAST_WINDOWS = 8
#: Tokens that are hashed at once.
_CHUNK_TOKENS = 2**20
#: Single documents that are hashed at once.
_DOCUMENTS = 256
#: Multiplier of the polynomial hash, odd, and its inverse modulo 2^64.
_FACTOR = 0x9E3779B97F4A7C15
_INVERSE = pow(_FACTOR, -1, 2**64)

Hashes = np.ndarray


class Seen:
    """The windows of a text.

    Args:
        window: tokens in a window. hashes: (n,) uint64, ascending and each once. level: windows whose hash has its first
            `level` bits 0 are kept, one in 2^level.
    """

    def __init__(self, window: int = WINDOW, hashes: Hashes | None = None, level: int = 0):
        self.window = window
        self._hashes: Hashes = np.empty(0, dtype=np.uint64) if hashes is None else hashes
        self.level = level
        self._documents: list[np.ndarray] = []  # not hashed yet

    @property
    def hashes(self) -> Hashes:
        """(n,) uint64, ascending: the hashes that are kept."""
        documents, self._documents = self._documents, []
        if documents:
            starts = np.zeros(sum(map(len, documents)), dtype=bool)
            starts[np.cumsum([0, *map(len, documents[:-1])])] = True
            self._keep(window_hashes(np.concatenate(documents), starts, self.window)[2])
        return self._hashes

    def add(self, blocks: Any) -> Seen:
        """Adds a dataset of equally long blocks; consecutive ones are read as one text, whatever their length."""
        length = len(blocks[0]["input_ids"]) if len(blocks) else 1
        step, ahead = max(1, _CHUNK_TOKENS // length), -(-self.window // length)
        for first in range(0, len(blocks), step):
            ids, starts, *_ = _tokens(blocks, first, min(first + step + ahead, len(blocks)))
            self._keep(window_hashes(ids, starts, self.window)[2])
        return self

    def add_document(self, ids: Sequence[int]) -> None:
        """Adds the token ids of one document."""
        if len(ids):
            self._documents.append(np.asarray(ids))
            if len(self._documents) >= _DOCUMENTS:
                _ = self.hashes

    def merge(self, other: Seen) -> None:
        """Adds the windows of another record.

        Raises:
            CheckpointError: its windows have another length.
        """
        if not other:
            return
        self.window = self.window if self else other.window
        if self.window != other.window:
            raise CheckpointError(
                f"{RECORD}: windows of {other.window} and of {self.window} tokens can't be joined; delete one of the records"
            )
        found = np.concatenate((self.hashes, other.hashes))
        self.level = max(self.level, other.level)
        self._keep(found)

    def _keep(self, hashes: Hashes) -> None:
        found = np.union1d(self._hashes, hashes[_below(hashes, self.level)])
        while True:
            found = found[_below(found, self.level)]
            if len(found) <= LIMIT:
                break
            self.level += 1
        self._hashes = found

    def __bool__(self) -> bool:
        return bool(len(self.hashes))

    def covers(self, blocks: Any) -> np.ndarray:
        """(blocks,) bool: the blocks of which at least half of the windows are in this text.

        The windows of a block are those that lie in it or, where these are few, those whose middle does. Half of those that
        end in a scored token have to be known too, where there are any: a system message that chats share says nothing about
        replies.
        Of a text with more windows than a record keeps, a block is judged by those of its windows that would have been
        kept. Where these are fewer than `LEAST_WINDOWS`, blocks that follow each other are judged together.
        """
        if not self or not len(blocks):
            return np.zeros(len(blocks), dtype=bool)
        # Of all windows, and of those that end in a scored token.
        kept, hits = np.zeros((2, 2, len(blocks)))
        length = len(blocks[0]["input_ids"])
        step, around = max(1, _CHUNK_TOKENS // length), -(-self.window // length)
        for start in range(0, len(blocks), step):
            end = min(start + step, len(blocks))
            ids, starts, rows, scored = _tokens(blocks, max(0, start - around), min(end + around, len(blocks)))
            first, last, hashes = window_hashes(ids, starts, self.window)
            row, inside = rows[(first + last) // 2], rows[first] == rows[last]
            # Blocks need not follow each other in the text: windows that reach into the next one are the last resort.
            enough = np.bincount(row[inside], minlength=len(blocks)) >= WHOLE_WINDOWS
            own = (inside | ~enough[row]) & _below(hashes, self.level) & (row >= start) & (row < end)
            row, ends, known = row[own], scored[last][own], np.isin(hashes[own], self.hashes)
            for number, weights in enumerate((np.ones(len(row)), ends)):
                kept[number] += np.bincount(row, weights=weights, minlength=len(blocks))
                hits[number] += np.bincount(row, weights=weights * known, minlength=len(blocks))
        groups = ((np.cumsum(kept[0]) - kept[0]) // (LEAST_WINDOWS if self.level else 1)).astype(int)
        kept, hits = (np.stack([np.bincount(groups, weights=x)[groups] for x in pair]) for pair in (kept, hits))
        found: np.ndarray = (kept[0] > 0) & (hits >= SEEN_SHARE * kept).all(0)
        return found


def window_hashes(ids: np.ndarray, starts: np.ndarray, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray, Hashes]:
    """(place of its first token, of its last token, hash), each (windows,), of every window of a text.

    Args:
        ids: (tokens,) token ids. starts: (tokens,) bool, the first tokens of documents; the text's own is one.
    """
    count = len(ids)
    document = np.cumsum(starts)
    begins = np.flatnonzero(np.diff(document, prepend=document[:1] - 1)) if count else np.empty(0, dtype=int)
    ends = np.append(begins[1:], count)
    short = ends - begins < window
    first = np.arange(max(0, count - window + 1))
    first = first[document[first] == document[first + window - 1]]
    places = np.concatenate((first, begins[short]))
    after = np.concatenate((first + window, ends[short]))
    # The hash of tokens i to j is sum x_k f^(k - i), from sums over all tokens before: no loop over the window.
    powers = np.cumprod(np.full(count, _FACTOR, dtype=np.uint64))
    back = np.cumprod(np.full(count, _INVERSE, dtype=np.uint64))
    sums = np.concatenate((np.zeros(1, dtype=np.uint64), np.cumsum(_mixed(ids.astype(np.uint64)) * powers)))
    polynomial = (sums[after] - sums[places]) * back[places]
    return places, after - 1, _mixed(polynomial + (after - places).astype(np.uint64))


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014), a bijection of 64-bit words."""
    x = x + np.uint64(_FACTOR)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def _below(hashes: Hashes, level: int) -> np.ndarray:
    """(n,) bool: the hashes whose first `level` bits are 0."""
    if level == 0:
        return np.ones(len(hashes), dtype=bool)
    kept: np.ndarray = hashes >> np.uint64(64 - level) == 0
    return kept


def _tokens(blocks: Any, first: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids, first tokens of documents, block of each token, scored ones), each (tokens,), of blocks `first` to before `end`.

    Padding is left out.
    """
    columns = _columns(blocks, first, end)
    ids = np.concatenate([np.asarray(row) for row in columns["input_ids"]])
    rows = np.repeat(np.arange(first, end), [len(row) for row in columns["input_ids"]])
    real, unscored = np.ones(len(ids), dtype=bool), np.zeros(len(ids), dtype=bool)
    if "attention_mask" in columns:
        real = np.concatenate([np.asarray(row) for row in columns["attention_mask"]]).astype(bool)
    if "labels" in columns:
        unscored = np.concatenate([np.asarray(row) for row in columns["labels"]]) == IGNORED
    if "starts" in columns:
        starts = np.concatenate([np.asarray(row) for row in columns["starts"]]).astype(bool)
        starts[:1] = True
    else:  # of several unscored tokens in a row the first one begins a document
        starts = unscored & ~np.concatenate(([False], unscored[:-1]))
    starts |= ~np.concatenate(([True], real[:-1]))  # what follows padding does too
    return ids[real], starts[real], rows[real], ~unscored[real]


def _columns(blocks: Any, first: int, end: int) -> dict[str, Any]:
    """{name: rows} of some blocks."""
    if isinstance(blocks, datasets.Dataset):
        rows: dict[str, Any] = blocks.with_format("numpy")[first:end]
        return rows
    return {name: [blocks[i][name] for i in range(first, end)] for name in blocks[first]}


@dataclass
class TextRecord:
    """The text that an adapter was made with and measured on; it lies in the adapter's folder as `RECORD`.

    trained: read to calibrate, to train or to choose the best adapter. held_out: what its own run scored. complete: a run
    has entered all its text, and its calibration and trainer have nothing to add. It is not kept in the file.
    """

    trained: Seen = field(default_factory=Seen)
    held_out: Seen = field(default_factory=Seen)
    complete: bool = False

    @classmethod
    def of_vocabulary(cls, size: int, *, complete: bool = False) -> TextRecord:
        """An empty record for text in the tokens of a vocabulary."""
        window = WINDOW if size >= SMALL_VOCABULARY else LONG_WINDOW
        return cls(Seen(window), Seen(window), complete)

    def __bool__(self) -> bool:
        return bool(self.trained or self.held_out)

    def add_batch(self, batch: Mapping[str, Any]) -> None:
        """Adds a batch of text that is trained on, (rows, tokens) tensors, unless the record is complete.

        Tensors without memory (the meta device, on which `npt memory` runs) say nothing.
        """
        ids = batch["input_ids"]
        if not self.complete and not ids.is_meta:
            names = [name for name in ("input_ids", "attention_mask", "labels", "starts") if name in batch]
            columns = {name: torch.as_tensor(batch[name]).detach().cpu().numpy() for name in names}
            self.trained.add([dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)])

    def merge(self, other: TextRecord) -> None:
        """Adds what another record holds."""
        self.trained.merge(other.trained)
        self.held_out.merge(other.held_out)

    def write(self, folder: Path) -> None:
        """Writes the record into an adapter's folder."""
        parts = {"trained": self.trained, "held_out": self.held_out}
        tensors = {name: torch.from_numpy(part.hashes.view(np.int64)) for name, part in parts.items()}
        levels = {f"{name}.level": torch.tensor(part.level) for name, part in parts.items()}
        write_tensors(folder / RECORD, {**tensors, **levels, "window": torch.tensor(self.trained.window)})

    @classmethod
    def read(cls, folder: Path) -> TextRecord | None:
        """The record in an adapter's folder; None where there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            found = load_file(path)
            window = int(found["window"])
            parts = [
                Seen(window, found[name].numpy().view(np.uint64), int(found[f"{name}.level"]))
                for name in ("trained", "held_out")
            ]
            if window < 1 or not all(map(_is_sketch, parts)):
                raise ValueError("not what npt writes")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            why = one_line(error, 120)
            raise CheckpointError(f"{path}: is damaged ({why}); restore it from a backup, or delete it") from error
        return cls(trained=parts[0], held_out=parts[1])


def _is_sketch(seen: Seen) -> bool:
    """True for values that `Seen` could have written."""
    hashes, level = seen.hashes, seen.level
    ascending = hashes.ndim == 1 and bool((hashes[1:] > hashes[:-1]).all())
    return ascending and 0 <= level < 64 and len(hashes) <= LIMIT and bool(_below(hashes, level).all())
