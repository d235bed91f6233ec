"""Text that is read while it trains: documents of any number of files or of a hub data set, shuffled, packed, split.

A run has `streams`, one per process of its first start. A stream reads its own part of the text (`datasets` splits it, no
document twice), epoch after epoch, shuffles documents in windows and packs them into blocks. Its place is a few numbers, so
that a run goes on at the exact document after a stop, on as many processes or on fewer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset

from npt.common.display import one_line
from npt.common.places import expanded
from npt.data.chats import Chat
from npt.data.documents import TEXT, Document, columns_to_read, document_of
from npt.data.packing import IGNORED, UNSCORED, cut, has_scored, public_labels, tokenised
from npt.data.readers import read_documents
from npt.data.seen import Seen
from npt.data.sources import HUB_ERRORS, expand_files, hub_remedy, where_of
from npt.errors import DataError, NPTError

#: At most this many files, evenly spaced, have their first document read before a run.
CHECKED_FILES = 256
#: Blocks in a row without a token that is scored, after which a text counts as one that has none.
MOST_UNSCORED = 10_000
#: (seed of an epoch) -> a streaming data set whose column "text" holds documents, its files in an order of that seed.
Source = Callable[[list[int]], datasets.IterableDataset]


def local_source(data_files: Sequence[str | Path], text_column: str, *, chats_only: bool = False) -> Source:
    """Local files of the kinds in `npt.data.readers`; a file is the unit that is dealt out and shuffled.

    Args:
        text_column, chats_only: as of `npt.data.documents.document_of`.

    Raises:
        DataError: a file is missing, empty or of an unknown kind, or its first document can't be read.
    """
    paths, problems = expand_files(data_files, "data.data_files")
    for path in paths[:: max(1, -(-len(paths) // CHECKED_FILES))]:
        try:
            next(read_documents(path, text_column, chats_only=chats_only))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(map(one_line, problems)))
    names = [str(path) for path in paths]

    def source(seed: list[int]) -> datasets.IterableDataset:
        order = np.random.default_rng(seed).permutation(len(names))
        arguments = {"paths": [names[i] for i in order], "text_column": text_column, "chats_only": chats_only}
        return datasets.IterableDataset.from_generator(_read, gen_kwargs=arguments)

    return source


def _read(paths: list[str], text_column: str, chats_only: bool) -> Iterator[dict[str, Document]]:
    for path in paths:
        for document in read_documents(Path(path), text_column, chats_only=chats_only):
            yield {"text": document}


def hub_source(
    name: str, config: str | None, text_column: str, split: str = "train", *, chats_only: bool = False
) -> Source:
    """A hub data set, or a folder that `datasets.load_dataset` can read, in streaming mode.

    Args:
        text_column, chats_only: as of `npt.data.documents.document_of`.

    Raises:
        DataError: the hub can't be reached, or the name or the column is unknown.
    """
    where = where_of(name, config)
    try:
        found = datasets.load_dataset(expanded(name), config, split=split, streaming=True)
        first: dict[str, Any] = next(iter(found), {})
    except HUB_ERRORS as error:
        why = one_line(error, 300) or type(error).__name__
        raise DataError(f"{where}: can't be streamed, split '{split}' ({why}); {hub_remedy(error)}") from error

    def document(row: dict[str, Any]) -> dict[str, Document]:
        return {TEXT: document_of(row, text_column, f"{where}, a row", chats_only=chats_only)}

    document(first)
    columns = columns_to_read(first, text_column)
    texts = found.select_columns(columns).map(document, remove_columns=[name for name in columns if name != TEXT])
    # A buffer of one document: the order of the files is all that is to be shuffled here.
    return lambda seed: texts.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]), buffer_size=1)


class DocumentStream:
    """One stream's documents, without an end.

    Args:
        source: the text. place: (stream, number of streams). seed: of every order. window: documents shuffled at once, and
            held in memory. left_out: digests of documents that are not to come (`digest`).
    """

    def __init__(
        self,
        source: Source,
        place: tuple[int, int] = (0, 1),
        *,
        seed: int,
        window: int,
        left_out: frozenset[bytes] = frozenset(),
    ):
        self.source, self.place, self.seed, self.window, self.left_out = source, place, seed, window, left_out
        self.epoch = self.window_number = self.position = self.count = 0
        self._start: dict[str, Any] | None = None  # the library's place where the window begins
        self._epoch_data: Any = None
        self._documents: Iterator[Any] = iter(())
        self._held: list[Document] | None = None

    def upcoming(self) -> list[Document]:
        """The rest of the current window, in its order; never empty.

        Raises:
            DataError: an epoch has not one document.
        """
        held = self._read_window() if self._held is None else self._held
        while self.position >= len(held):
            if held:
                self._start, self.window_number = self._epoch_data.state_dict(), self.window_number + 1
            elif self.window_number:
                self.epoch, self.window_number, self._start, self._epoch_data = self.epoch + 1, 0, None, None
            else:
                raise DataError(
                    f"the streamed text has no document for part {self.place[0] + 1} of {self.place[1]} beside what is held "
                    "out; give more text, lower data.num_eval_samples, or start fewer processes"
                )
            self.position = 0
            held = self._read_window()
        return held[self.position :]

    def take(self) -> Document:
        """The next document."""
        document = self.upcoming()[0]
        self.advance()
        return document

    def advance(self) -> None:
        """Goes past the first of `upcoming`."""
        self.position += 1
        self.count += 1

    def _read_window(self) -> list[Document]:
        if self._epoch_data is None:
            data = self.source([self.seed, self.epoch])
            self._epoch_data = split_dataset_by_node(data, *self.place)
            if self._start is not None:
                self._epoch_data.load_state_dict(self._start)
            self._documents = iter(self._epoch_data)
        if self._start is None:
            self._start = self._epoch_data.state_dict()
        documents = (row[TEXT] for row in self._documents)
        wanted = (text for text in documents if isinstance(text, Chat) or (text and not text.isspace()))
        held = list(islice((text for text in wanted if digest(text) not in self.left_out), self.window))
        rng = np.random.default_rng([self.seed, self.epoch, self.place[0], self.window_number])
        self._held = [held[i] for i in rng.permutation(len(held))]
        return self._held

    def state_dict(self) -> dict[str, Any]:
        """The place of the next document, as plain JSON values."""
        return {
            "epoch": self.epoch,
            "window": self.window_number,
            "position": self.position,
            "documents": self.count,
            "start": self._start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place."""
        self.epoch, self.window_number, self.position = state["epoch"], state["window"], state["position"]
        self.count, self._start = state["documents"], state["start"]
        self._epoch_data, self._held = None, None


def digest(document: Document) -> bytes:
    """The digest by which a document is recognised."""
    return hashlib.sha256(document.content() if isinstance(document, Chat) else document.encode()).digest()


class BlockStream:
    """One stream's documents packed into blocks, what is left of a document going into the next block.

    Args:
        seen: takes the tokens of each document that goes into a block. bos_token_id, vocabulary, score: as of
            `npt.data.packing.text_packer`.
    """

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: Any,
        max_length: int,
        seen: Seen | None = None,
        *,
        bos_token_id: int | None = None,
        vocabulary: int | None = None,
        score: str = "all",
    ):
        self.score = score
        self.documents, self.tokenizer, self.max_length = documents, tokenizer, max_length
        self.seen, self.bos_token_id, self.vocabulary = Seen() if seen is None else seen, bos_token_id, vocabulary
        self.served = 0
        self._rest: np.ndarray = np.empty((2, 0), dtype=np.int32)  # ids and labels
        self._ids: Iterator[np.ndarray] = iter(())  # ids and labels of the window's documents

    def take(self) -> dict[str, torch.Tensor]:
        """The next block in which a token is scored: input_ids, attention_mask and labels, (max_length,) each.

        Raises:
            DataError: none of so many has one.
        """
        found = next(
            (pair for pair in (self._next() for _ in range(MOST_UNSCORED)) if has_scored(pair[None, 1])[0]), None
        )
        if found is None:
            raise DataError(
                f"{MOST_UNSCORED} blocks in a row of the streamed chats hold no reply, and data.score=replies scores nothing "
                "else; give other chats, or use data.score=all"
            )
        self.served += 1
        ids, labels = (torch.from_numpy(part.astype(np.int64)) for part in (found[0], public_labels(found[1])))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def _next(self) -> np.ndarray:
        """(2, max_length): ids and labels of the next block."""
        while not (found := cut(self._rest[:, : self.max_length], self.max_length, self.bos_token_id))[0].size:
            document = next(self._ids, None)
            if document is None:
                self._ids = tokenised(self.documents.upcoming(), self.tokenizer, self.vocabulary, self.score)
                continue
            self.documents.advance()
            if document.shape[1]:
                self.seen.add_document(document[0])
                self._rest = np.concatenate((self._rest, document), axis=1)
        blocks, rest = found
        self._rest = np.concatenate((rest, self._rest[:, self.max_length :]), axis=1)
        first: np.ndarray = blocks[:, 0]
        return first

    def state_dict(self) -> dict[str, Any]:
        """The place of the next block, as plain JSON values."""
        ids, labels = self._rest
        unscored, prompts = (np.flatnonzero(labels == value).tolist() for value in (IGNORED, UNSCORED))
        return {
            **self.documents.state_dict(),
            "served": self.served,
            "rest": " ".join(map(str, ids)),
            "rest_unscored": unscored,
        } | ({"rest_prompts": prompts} if prompts else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place."""
        self.documents.load_state_dict(state)
        self.served, self._ids = state["served"], iter(())
        self._rest = np.tile(np.array(state["rest"].split(), dtype=np.int32), (2, 1))
        self._rest[1, state["rest_unscored"]] = IGNORED
        self._rest[1, state.get("rest_prompts", [])] = UNSCORED


class StreamedBlocks(IterableDataset):  # type: ignore[type-arg]
    """The training blocks of one process: those of its streams by turns, so that all processes' blocks of a step are the
    same whatever their number.

    Args:
        make: (stream, number of streams) -> its `BlockStream`. world: (this process, number of processes).
    """

    def __init__(self, make: Callable[[tuple[int, int]], BlockStream], world: tuple[int, int] = (0, 1)):
        self.make, self.world = make, world
        self.streams: dict[int, BlockStream] = {world[0]: make(world)}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            # By turns: the one that has served least, the first of several.
            yield min(self.streams.items(), key=lambda item: (item[1].served, item[0]))[1].take()

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """{stream: its place} of this process's streams, as plain JSON values."""
        return {number: stream.state_dict() for number, stream in self.streams.items()}

    def load_state_dict(self, states: dict[int, dict[str, Any]]) -> None:
        """Goes on where all streams of a run were.

        Raises:
            NPTError: their number can't be dealt out evenly to the processes there are now.
        """
        rank, count = self.world
        if len(states) % count:
            fitting = [n for n in range(1, len(states) + 1) if len(states) % n == 0]
            raise NPTError(
                f"the run streams its text over {len(states)} processes and can't go on with {count}; resume it with "
                f"{' or '.join(map(str, fitting))}"
            )
        self.streams = {number: self.make((number, len(states))) for number in range(rank, len(states), count)}
        for number, stream in self.streams.items():
            stream.load_state_dict(states[number])


def held_out_documents(documents: DocumentStream, seen: set[bytes]) -> Iterable[Document]:
    """One epoch of a stream's documents; the digest of each that is read goes into `seen`."""
    while documents.upcoming() and documents.epoch == 0:
        document = documents.take()
        seen.add(digest(document))
        yield document
