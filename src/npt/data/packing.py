"""Documents to blocks of exactly `max_length` tokens.

    documents   <s> A A A </s>   <s> B B B B B </s>   ...
    blocks      [<s> A A A </s> <s> B B] [B B B </s> ...]
    labels      [ .  A A A </s>  .  B B] [B B B </s> ...]      "." is -100, never scored

Nothing is padded but a kept remainder. A document's first token is a join: no earlier document predicts it. Of chats, where
only replies are scored, the other tokens are not either; blocks then say in a column `starts` where documents begin, and a
block in which nothing is scored is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from npt.common.limits import check_ids
from npt.common.progress import progress_bar
from npt.data.chats import Chat, chat_ids, checked_score
from npt.data.documents import Document
from npt.errors import DataError

logger = logging.getLogger(__name__)

#: The label of a position that is never scored, as in transformers.
IGNORED = -100
#: While blocks are made, the label of a token that is not scored and begins no document.
UNSCORED = -101

# Characters (or one document) that a call of the tokenizer gets: bounds memory, and what an early stop wastes.
_BATCH_CHARACTERS = 1 << 18


def pack(
    documents: Iterable[Document] | str,
    tokenizer: Any,
    max_length: int,
    *,
    max_blocks: int | None = None,
    keep_remainder: bool = False,
    begin_with_bos: bool = False,
    score: str = "all",
    progress: bool = False,
) -> datasets.Dataset:
    """Tokenises documents and packs them into blocks; reads little further than `max_blocks` needs.

    Args:
        documents: texts; blank ones are skipped.
        tokenizer: the model's. Every document gets its special tokens, then its EOS unless it ends with one already.
        max_length: tokens in a block.
        max_blocks: stop there; None packs everything.
        keep_remainder: keep what is left at the end, shorter than a block, padded (attention_mask 0, labels -100).
        begin_with_bos: begin every block with BOS, not only those that begin with a document's own.
        progress: show a progress bar.

    Returns:
        rows of input_ids, attention_mask and labels, each `max_length` ints.

    Raises:
        DataError: as `text_packer` and `pack_token_ids`.
    """
    packer = text_packer(documents, tokenizer, max_length, begin_with_bos=begin_with_bos, score=score)
    packer.read(max_blocks, progress=progress)
    return packer.blocks(max_blocks, keep_remainder=keep_remainder)


def pack_token_ids(
    documents: Iterable[Sequence[int]],
    max_length: int,
    *,
    pad_token_id: int,
    max_blocks: int | None = None,
    keep_remainder: bool = False,
    progress: bool = False,
) -> datasets.Dataset:
    """Concatenates documents of token ids and cuts them into blocks; a long document goes over several blocks.

    Args:
        documents, max_length, pad_token_id: as `Packer` takes them.
        max_blocks: stop there; None packs everything.
        keep_remainder: keep what is left at the end, shorter than a block, padded (attention_mask 0, labels -100). By
            default it is dropped, unless it is all there is.
        progress: show a progress bar.

    Returns:
        rows of input_ids, attention_mask and labels, each `max_length` ints.

    Raises:
        DataError: `max_length` < 2, `max_blocks` < 1, or no document holds a token.
    """
    packer = Packer(map(labelled, documents), max_length, pad_token_id=pad_token_id)
    packer.read(max_blocks, progress=progress)
    return packer.blocks(max_blocks, keep_remainder=keep_remainder)


def text_packer(
    documents: Iterable[Document] | str,
    tokenizer: Any,
    max_length: int,
    *,
    begin_with_bos: bool = False,
    vocabulary: int | None = None,
    score: str = "all",
) -> Packer:
    """A packer of text and chats.

    Every text gets the tokenizer's own special tokens, then its EOS unless it ends with one already; a chat has the tokens
    that the chat template writes, and no others. Padding, where there is any, uses the pad id, else EOS, else 0. Blank
    documents are skipped.

    Args:
        begin_with_bos: begin every block with BOS, not only those that begin with a document's own.
        vocabulary: rows of the model's embedding, None where they are not known.
        score: `all` tokens, or of chats only the assistant's `replies`; text is scored whole.

    Raises:
        DataError: the tokenizer has no BOS to begin with, or there is no such `score`. From reading: a token that the model
            does not have, or a chat that the tokenizer's template does not take.
    """
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    bos = first_of_blocks(tokenizer, begin_with_bos)
    found = tokenised(documents, tokenizer, vocabulary, checked_score(score))
    return Packer(found, max_length, pad_token_id=pad, bos_token_id=bos)


def first_of_blocks(tokenizer: Any, begin_with_bos: bool) -> int | None:
    """The token that every block is to begin with, None where blocks begin as the text comes.

    Raises:
        DataError: the tokenizer has no such token.
    """
    if not begin_with_bos:
        return None
    if tokenizer.bos_token_id is None:
        raise DataError(
            "data.begin_with_bos=true: the tokenizer has no BOS token; set tokenizer.bos_token, or use false"
        )
    return int(tokenizer.bos_token_id)


class Packer:
    """Packs documents of token ids into blocks, as many as are asked for; a later call goes on where the last one stopped.

    Args:
        documents: (2, tokens) ids and labels each, as `labelled` and `tokenised` give them; empty ones are skipped.
        max_length: tokens in a block.
        pad_token_id: fills a kept remainder.
        bos_token_id: begins every block, before text that does not begin with it; None: blocks begin as the text comes.

    Raises:
        DataError: `max_length` < 2.
    """

    def __init__(
        self, documents: Iterable[np.ndarray], max_length: int, *, pad_token_id: int, bos_token_id: int | None = None
    ):
        if max_length < 2:
            raise DataError(f"data.max_length={max_length}: a block needs at least 2 tokens to predict one; raise it")
        self.max_length, self.pad_token_id, self.bos_token_id = max_length, pad_token_id, bos_token_id
        #: Whole blocks so far.
        self.count = 0
        self._documents = iter(documents)
        self._unscored = 0  # blocks that were left out
        self._full: list[np.ndarray] = []  # each (2, n, max_length): ids and labels of n blocks
        self._rest: np.ndarray = np.empty((2, 0), dtype=np.int32)

    def read(self, max_blocks: int | None = None, *, progress: bool = False) -> None:
        """Reads documents until there are `max_blocks` blocks, or to the end.

        Raises:
            DataError: `max_blocks` < 1.
        """
        if max_blocks is not None and max_blocks < 1:
            raise DataError(f"max_blocks={max_blocks}: must be at least 1, or None for all the text there is")
        with progress_bar("Packing text", max_blocks, progress, unit="blocks") as advance:
            advance(self.count)
            while max_blocks is None or self.count < max_blocks:
                document = next(self._documents, None)
                if document is None:
                    return
                if document.shape[1]:
                    advance(self._add(document))

    def _add(self, document: np.ndarray) -> int:
        """Appends a document; returns the number of blocks it completes."""
        rest = np.concatenate((self._rest, document), axis=1)
        new, self._rest = cut(rest, self.max_length, self.bos_token_id)
        counts = has_scored(new[1])
        self._unscored += int((~counts).sum())
        new = new[:, counts]
        if new.shape[1]:
            self._full.append(new)
        self.count += new.shape[1]
        return new.shape[1]

    def blocks(self, max_blocks: int | None = None, *, keep_remainder: bool = False) -> datasets.Dataset:
        """The blocks that were read, at most `max_blocks` (see `pack_token_ids`).

        Raises:
            DataError: no document held a token, or none that is scored.
        """
        left = self._rest.shape[1]
        if self.count == 0 and (self._unscored or left) and not (left and has_scored(self._rest[None, 1])[0]):
            raise DataError(
                "the chats hold no reply, and data.score=replies scores nothing else; give other chats, or use data.score=all"
            )
        full, lengths = list(self._full), [self.max_length] * self.count
        if self.count == 0 and not left:
            raise DataError("no text to pack: every document is empty; check the data source")
        if left and (keep_remainder or self.count == 0):
            rest = _begun(self._rest, self.bos_token_id)
            full.append(_padded(rest, self.max_length, self.pad_token_id)[:, None])
            lengths.append(rest.shape[1])
        ids, labels = np.concatenate(full, axis=1)[:, :max_blocks]
        mask = np.arange(self.max_length) < np.array(lengths[:max_blocks])[:, None]
        return as_blocks(ids, mask, labels)


def as_blocks(input_ids: np.ndarray, attention_mask: np.ndarray, labels: np.ndarray) -> datasets.Dataset:
    """A data set of blocks from three (blocks, max_length) arrays of numbers; 9 bytes a token, in memory.

    Where the labels leave out more than first tokens of documents, a column `starts` has 1 for these, a byte a token more.
    """
    arrays: dict[str, np.ndarray] = {
        "input_ids": input_ids.astype(np.int32),
        "attention_mask": attention_mask.astype(np.int8),
        "labels": public_labels(labels).astype(np.int32),
    }
    if (labels == UNSCORED).any():
        starts = (labels == IGNORED) & attention_mask.astype(bool)
        # After a BOS that was put before a block the text goes on.
        starts[:, 1:] &= labels[:, :-1] != IGNORED
        arrays["starts"] = starts.astype(np.int8)
    columns = {k: pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), v.shape[1]) for k, v in arrays.items()}
    return datasets.Dataset(pa.table(columns))


def split_blocks(
    blocks: datasets.Dataset, num_train: int | None, num_eval: int | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training blocks from the front, held-out blocks from the tail, never the same block in both.

    With fewer blocks than asked for, but at least 2, a tenth is held out (at least 1, at most `num_eval`, and all that
    training doesn't ask for), training gets the rest, and a warning gives the figures.

    Args:
        blocks: what `pack` or `sample_blocks` returned.
        num_train: training blocks; None is all that evaluation leaves.
        num_eval: evaluation blocks; None is a tenth of all, 0 is none.

    Raises:
        DataError: too few blocks, or a count out of range.
    """
    total = len(blocks)
    keys = f"data.num_train_samples={num_train}, data.num_eval_samples={num_eval}"
    tenth = max(1, total // 10)
    held_out = tenth if num_eval is None else num_eval
    wanted = 1 if num_train is None else num_train
    if held_out < 0 or wanted < 1:
        raise DataError(f"{keys}: train on at least 1 block and evaluate on at least 0, or null for all there is")
    least = 2 if held_out else 1
    if total < least:
        raise DataError(
            f"the text makes {total} block(s) of the {wanted + held_out} or more that {keys} ask for, and at least "
            f"{least} are needed; give more text, or lower data.max_length, data.num_train_samples or "
            "data.num_eval_samples"
        )
    if wanted + held_out > total:
        spare = 0 if num_train is None else total - num_train
        held_out = min(held_out, max(tenth, spare))
        message = "the text makes %d blocks, fewer than %s ask for: %d to train on, %d held out"
        logger.warning(message, total, keys, total - held_out, held_out)
    train = total - held_out if num_train is None else min(num_train, total - held_out)
    # The library refuses an empty range at the very end.
    tail = range(total - held_out, total) if held_out else range(0)
    return blocks.select(range(train)), blocks.select(tail)


def tokenised(
    documents: Iterable[Document] | str, tokenizer: Any, vocabulary: int | None = None, score: str = "all"
) -> Iterator[np.ndarray]:
    """Each document's (2, tokens) ids and labels: see `text_packer`.

    Raises:
        DataError: a token that the model does not have, or a chat that can't be written.
    """
    eos = tokenizer.eos_token_id
    for batch in _batches(documents):
        if isinstance(batch, Chat):
            ids, scored = chat_ids(batch, tokenizer, score)
            check_ids(ids, vocabulary, batch.place, tokenizer)
            yield labelled(ids, scored)
            continue
        # verbose=False: a document longer than the context isn't worth a warning, it is cut into blocks.
        encoded = tokenizer(batch, truncation=False, padding=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            if eos is not None and ids and ids[-1] != eos:
                ids.append(eos)
            check_ids(ids, vocabulary, "the text", tokenizer)
            yield labelled(ids)


def _batches(documents: Iterable[Document] | str) -> Iterator[list[str] | Chat]:
    """Chats one by one, and the texts between them in lists."""
    batch: list[str] = []
    size = 0
    # A text alone would be taken for as many documents as it has characters.
    for document in [documents] if isinstance(documents, str) else documents:
        if isinstance(document, Chat):
            if batch:
                yield batch
                batch, size = [], 0
            yield document
            continue
        if not document or document.isspace():
            continue
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def labelled(ids: Sequence[int], scored: np.ndarray | None = None) -> np.ndarray:
    """(2, tokens): a document's ids and labels. scored: (tokens,) bool, None: all tokens."""
    pair = np.tile(np.asarray(ids, dtype=np.int32), (2, 1))
    if scored is not None:
        pair[1, ~scored] = UNSCORED
    pair[1, :1] = IGNORED
    return pair


def public_labels(labels: np.ndarray) -> np.ndarray:
    """Labels as other libraries know them, with `IGNORED` for all tokens that are not scored."""
    return np.where(labels == UNSCORED, IGNORED, labels)


def has_scored(labels: np.ndarray) -> np.ndarray:
    """(blocks,) bool of labels (blocks, tokens): False for a block of chats in which nothing is scored."""
    found: np.ndarray = (labels[:, 1:] >= 0).any(axis=1) | ~(labels == UNSCORED).any(axis=1)
    return found


def cut(pair: np.ndarray, max_length: int, bos_token_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(whole blocks (2, blocks, max_length), what is left (2, tokens)) of ids and labels (2, tokens); see `Packer`."""
    if bos_token_id is None:
        count = pair.shape[1] // max_length
        return pair[:, : count * max_length].reshape(2, count, max_length), pair[:, count * max_length :]
    blocks, start = [np.empty((2, 0, max_length), dtype=pair.dtype)], 0
    while start < pair.shape[1]:
        end = start + max_length - (pair[0, start] != bos_token_id)
        if end > pair.shape[1]:
            break
        blocks.append(_begun(pair[:, start:end], bos_token_id)[:, None])
        start = int(end)
    return np.concatenate(blocks, axis=1), pair[:, start:]


def _begun(pair: np.ndarray, bos_token_id: int | None) -> np.ndarray:
    """Ids and labels with BOS before them, unless they begin with it; what follows a BOS that was put there is not scored."""
    if bos_token_id is None or pair[0, 0] == bos_token_id:
        return pair
    begun = np.insert(pair, 0, [bos_token_id, IGNORED], axis=1)
    begun[1, 1] = IGNORED
    return begun


def _padded(pair: np.ndarray, max_length: int, pad_token_id: int) -> np.ndarray:
    out = np.empty((2, max_length), dtype=np.int32)
    out[0], out[1] = pad_token_id, IGNORED
    out[:, : pair.shape[1]] = pair
    return out
