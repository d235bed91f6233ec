"""The blocks of a run: what trains, what calibrates, what chooses the best adapter, and what is held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from npt.adapters.folder import RUN_CONFIG, resolve_checkpoint
from npt.builtin import PREFIX
from npt.common.processes import is_first, world
from npt.config import DataSection, load_config
from npt.data import pack, sample_blocks, split_blocks
from npt.data.batches import batches_of
from npt.data.packing import pack_token_ids, token_ids
from npt.data.streaming import BlockStream, DocumentStream, StreamedBlocks, held_out_documents
from npt.errors import DataError
from npt.runs.texts import RunTexts
from npt.training.steps import VALIDATION_BLOCKS, held_back

#: Order of the pass that streamed text is held out in. It is not the run's own order, so that an evaluation with other
#: settings can't score text that was trained on.
HELD_OUT_SEED, HELD_OUT_WINDOW = 2**32, 1000


@dataclass(frozen=True)
class Corpus:
    """The blocks of a run.

    train: to train on. chosen_by: to choose the best adapter by. calibration: to calibrate on, from the front and at most
    all of it. held_out: for the report.
    """

    train: datasets.Dataset | StreamedBlocks
    chosen_by: datasets.Dataset
    calibration: datasets.Dataset
    held_out: datasets.Dataset

    @property
    def trained_blocks(self) -> int:
        """The number of training blocks; 0 for a stream, which has no end."""
        return 0 if isinstance(self.train, StreamedBlocks) else len(self.train)


def load_corpus(texts: RunTexts, model: Any, tokenizer: Any) -> Corpus:
    """The blocks of the `data` section.

    Raises:
        DataError: too little text.
    """
    if texts.data.streaming:
        return streamed_corpus(texts, tokenizer)
    train, held_out = corpus_blocks(texts, model, tokenizer)
    validation = held_back(len(train))
    if len(train) <= validation:
        raise DataError(f"{len(train)} training block(s) are too few; raise data.num_train_samples or give more text")
    first = len(train) - validation
    return Corpus(train.select(range(first)), train.select(range(first, len(train))), train, held_out)


def streamed_corpus(texts: RunTexts, tokenizer: Any) -> Corpus:
    """A corpus whose training text is read as it trains.

    Documents for the report and for choosing the best adapter come first, from a pass in an order of their own, and those
    for calibration after them. The first are left out of training, wherever they come again.

    Raises:
        DataError: the text is too small for that.
    """
    data, source, seen = texts.data, texts.stream, set[bytes]()
    documents = DocumentStream(source, seed=HELD_OUT_SEED, window=HELD_OUT_WINDOW)

    def blocks(count: int) -> datasets.Dataset:
        # One document at a time: any tokenised ahead would count as seen and never be trained on.
        one_by_one = (ids for text in held_out_documents(documents, seen) for ids in token_ids([text], tokenizer))
        found = pack_token_ids(one_by_one, data.max_length, pad_token_id=0, max_blocks=count)
        if len(found) < count:
            raise DataError(
                f"the streamed text makes {len(found)} of the {count} block(s) of data.max_length={data.max_length} that are "
                "to be held out or calibrated on; give more text, or lower data.num_eval_samples or "
                "data.num_calibration_samples"
            )
        return found

    held_out = blocks((data.num_eval_samples or VALIDATION_BLOCKS) + VALIDATION_BLOCKS)
    left_out, last = frozenset(seen), len(held_out) - VALIDATION_BLOCKS
    calibration = blocks(data.num_calibration_samples)

    def make(place: tuple[int, int]) -> BlockStream:
        stream = DocumentStream(source, place, seed=texts.seed, window=data.shuffle_window, left_out=left_out)
        return BlockStream(stream, tokenizer, data.max_length)

    return Corpus(
        StreamedBlocks(make, world()),
        held_out.select(range(last, len(held_out))),
        calibration,
        held_out.select(range(last)),
    )


def corpus_blocks(texts: RunTexts, model: Any, tokenizer: Any) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training blocks, held-out blocks) of text that is not streamed."""
    if texts.data.dataset_name != "self":
        return texts.split(texts.blocks(tokenizer))
    counts = {"train": texts.data.num_train_samples, "eval": texts.data.num_eval_samples}
    train, held_out = (own_text(texts, model, tokenizer, count, label) for label, count in counts.items())
    return train, held_out


def own_text(texts: RunTexts, model: Any, tokenizer: Any, count: int | None, label: str) -> datasets.Dataset:
    """Blocks that the frozen model writes itself (`data.dataset_name: self`); kept only where there is a cache_dir.

    Args:
        count: blocks; the configuration does not let it be None here. label: "train" or "eval", chooses the random stream.
    """
    cache_dir = None if texts.cache_dir is None else Path(texts.cache_dir) / "npt_samples"
    return sample_blocks(
        model, tokenizer, count or 0, texts.data.max_length,
        seed=texts.seed, label=label, cache_dir=cache_dir, progress=is_first(),
    )  # fmt: skip


def further_corpora(texts: RunTexts, tokenizer: Any, more: Sequence[str | Path] = ()) -> dict[str, datasets.Dataset]:
    """{name: up to data.num_eval_samples blocks} of `data.eval_texts` and `more`, each under its file's short name.

    The text that is trained on is left out: its held-out part is evaluated anyway.
    """
    data = texts.data
    names = dict.fromkeys(str(name) for name in (*data.eval_texts, *more) if name != data.dataset_name)
    short = {name: name if name.startswith(PREFIX) else Path(name).stem for name in names}
    taken = [data.dataset_name, *short.values()]
    return {
        (short[name] if taken.count(short[name]) == 1 else name): pack(
            texts.further(name), tokenizer, data.max_length, max_blocks=data.num_eval_samples
        )
        for name in names
    }


def calibration_batches(
    texts: RunTexts, tokenizer: Any, train: datasets.Dataset, batch_size: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Batches of the calibration text: `train`, from the front, or half of that and half of `calibration_files`, mixed."""
    count, prose = texts.data.num_calibration_samples, texts.prose
    if prose is None:
        return list(batches_of(train.select(range(min(count, len(train)))), batch_size, device))
    blocks = pack(prose, tokenizer, texts.data.max_length)
    blocks = blocks.shuffle(seed=texts.seed).select(range(min(count // 2, len(blocks))))
    own = train.select(range(min(count - len(blocks), len(train))))
    mixed = datasets.concatenate_datasets([own, blocks.cast(own.features)]).shuffle(seed=texts.seed)
    return list(batches_of(mixed, batch_size, device))


def evaluation_blocks(texts: RunTexts, checkpoint: str | Path, model: Any, tokenizer: Any) -> datasets.Dataset:
    """The blocks of `data.dataset_name` to evaluate an adapter on: the held-out ones, or all of a text that it was not
    trained on.
    """
    data = texts.data
    if data.streaming:
        return streamed_corpus(texts, tokenizer).held_out
    if data.dataset_name == "self":
        return own_text(texts, model, tokenizer, data.num_eval_samples, "eval")
    blocks = texts.blocks(tokenizer)
    if trained_on(data, checkpoint):
        return split_blocks(blocks, data.num_train_samples, data.num_eval_samples)[1]
    return blocks if data.num_eval_samples is None else blocks.select(range(min(data.num_eval_samples, len(blocks))))


def trained_on(data: DataSection, checkpoint: str | Path) -> bool:
    """True where the adapter's own record says that it was trained on this text, or where it has none."""
    record = resolve_checkpoint(checkpoint) / RUN_CONFIG
    if not record.is_file():
        return True  # unknown: the careful split

    def source(section: DataSection) -> tuple[str, str | None, frozenset[str]]:
        files: Iterable[str] = [*(section.data_files or ()), *(section.calibration_files or ())]
        return section.dataset_name, section.dataset_config, frozenset(str(Path(f).resolve()) for f in files)

    mine, theirs = source(data), source(load_config(record).data)
    return mine[:2] == theirs[:2] and (mine[0] != "text" or bool(mine[2] & theirs[2]))
