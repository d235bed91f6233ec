"""Documents, packed with separators into blocks of one length."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import datasets
from rich.progress import Progress, SpinnerColumn, TextColumn

from npt.errors import DataError

logger = logging.getLogger(__name__)

IGNORED = -100
#: Characters handed to the tokenizer at once; a document is cut at a line end when it is longer.
PIECE_CHARACTERS = 200_000


def pack(
    documents: Iterable[str],
    tokenizer: Any,
    max_length: int,
    *,
    max_blocks: int | None = None,
    keep_remainder: bool = False,
    progress: bool = False,
) -> datasets.Dataset:
    """Blocks of exactly `max_length` tokens: {"input_ids", "attention_mask", "labels"}, each a list of ints.

    A document gets the tokenizer's own special tokens and, behind it, the EOS token as separator. `labels` are the ids,
    but -100 on the first token of a document that follows another (a join) and on padding. A last remainder is dropped,
    unless `keep_remainder` or there would be no block at all; it is then padded. Stops early at `max_blocks`.

    Raises:
        DataError: max_length below 2, or no text at all.
    """
    pad = next(t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if t is not None)
    with Progress(SpinnerColumn(), TextColumn("packing text"), transient=True, disable=not progress) as bar:
        bar.add_task("")
        return pack_token_ids(
            _tokenize(documents, tokenizer),
            max_length,
            pad_token_id=pad,
            max_blocks=max_blocks,
            keep_remainder=keep_remainder,
        )


def _tokenize(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    eos = tokenizer.eos_token_id
    for document in documents:
        if not document.strip():
            continue
        # verbose=False: a document longer than the context is fine here, it is cut into blocks.
        ids = list(tokenizer(document, verbose=False)["input_ids"])
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        yield ids


def pack_token_ids(
    documents: Iterable[Sequence[int]],
    max_length: int,
    *,
    pad_token_id: int,
    max_blocks: int | None = None,
    keep_remainder: bool = False,
) -> datasets.Dataset:
    """`pack` for documents that are token ids already."""
    if max_length < 2:
        raise DataError(f"data.max_length={max_length}: a block needs at least 2 tokens")
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in islice(_cut(documents, max_length), max_blocks):
        if len(ids) < max_length and columns["input_ids"] and not keep_remainder:
            continue
        padding = max_length - len(ids)
        columns["input_ids"].append([*ids, *[pad_token_id] * padding])
        columns["attention_mask"].append([1] * len(ids) + [0] * padding)
        columns["labels"].append([*labels, *[IGNORED] * padding])
    if not columns["input_ids"]:
        raise DataError("there is no text to pack: every document is empty")
    features = datasets.Features({name: datasets.List(datasets.Value("int64")) for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def _cut(documents: Iterable[Sequence[int]], max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of each block; the last one may be shorter."""
    ids: list[int] = []
    labels: list[int] = []
    first = True
    for document in documents:
        ids += document
        labels += document if first or not document else [IGNORED, *document[1:]]
        first = False
        start = 0
        while len(ids) - start >= max_length:
            yield ids[start : start + max_length], labels[start : start + max_length]
            start += max_length
        ids, labels = ids[start:], labels[start:]
    if len(ids) > 1:
        yield ids, labels


def split_blocks(
    blocks: datasets.Dataset, num_train: int | None, num_eval: int | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training blocks from the front, held-out blocks from the tail), never overlapping; None means all there is.

    With too few blocks for both, the held-out part is at most a tenth and the rest trains, with a warning.

    Raises:
        DataError: fewer than two blocks.
    """
    total = len(blocks)
    if total < 2:
        raise DataError(
            f"the text fills {total} block(s), but training and evaluation need one each; give more text or lower "
            "data.max_length"
        )
    tenth = max(1, total // 10)
    held_out = min(num_eval if num_eval is not None else tenth, total - 1)
    if num_train is not None and num_train + held_out > total:
        held_out = min(held_out, tenth)
        logger.warning(
            "text fills %d blocks, fewer than data.num_train_samples=%s + data.num_eval_samples=%s: %d train, %d held out",
            total, num_train, num_eval, total - held_out, held_out,
        )  # fmt: skip
    train = total - held_out if num_train is None else min(num_train, total - held_out)
    return blocks.select(range(train)), blocks.select(range(total - held_out, total))
