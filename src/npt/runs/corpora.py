"""The blocks of a run: what trains, what calibrates, what chooses the best adapter, and what is held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from npt.data import sample_blocks, split_blocks
from npt.data.batches import batches_of
from npt.data.packing import Packer, first_of_blocks, tokenised
from npt.data.readers import short_name
from npt.data.sampling import kept_blocks
from npt.data.seen import Seen, TextRecord
from npt.data.streaming import BlockStream, DocumentStream, StreamedBlocks, held_out_documents
from npt.errors import DataError
from npt.runs.texts import RunTexts
from npt.runs.unseen import Unseen
from npt.training.steps import VALIDATION_BLOCKS, held_back

#: Order of the pass that streamed text is held out in. It is not the run's own order, so that an evaluation with other
#: settings can't score text that was trained on.
HELD_OUT_SEED, HELD_OUT_WINDOW = 2**32, 1000


@dataclass(frozen=True)
class Corpus:
    """The blocks of a run.

    train: to train on. chosen_by: to choose the best adapter by. calibration: to calibrate on, from the front and at most
    all of it. held_out: for the report. prose: of `data.calibration_files`, mixed into the calibration text. further: {name:
    blocks} of other texts, for the report. unseen: knows the text that is trained on. held_out and further hold none of it.
    """

    train: datasets.Dataset | StreamedBlocks
    chosen_by: datasets.Dataset
    calibration: datasets.Dataset
    held_out: datasets.Dataset
    prose: datasets.Dataset | None
    further: dict[str, datasets.Dataset]
    record: TextRecord
    unseen: Unseen

    @property
    def trained_blocks(self) -> int:
        """The number of training blocks; 0 for a stream, which has no end."""
        return 0 if isinstance(self.train, StreamedBlocks) else len(self.train)

    def scored(self, name: str) -> dict[str, datasets.Dataset]:
        """{name: blocks} for the report. Text that was streamed meanwhile is left out, unless nothing else would be left."""
        streamed = isinstance(self.train, StreamedBlocks)
        held_out = self.unseen.among(name, self.held_out, or_all=True) if streamed else self.held_out
        more = {n: self.unseen.among(n, blocks, or_all=True) for n, blocks in self.further.items()} if streamed else {}
        return {name: held_out} | self.further | more


def load_corpus(texts: RunTexts, model: Any, tokenizer: Any) -> Corpus:
    """The blocks of the `data` section.

    Args:
        model: writes the text where `data.dataset_name` is `self`; not needed elsewhere.

    Raises:
        DataError: too little text, or all that is to be scored is also trained on.
    """
    record, prose = TextRecord.of_vocabulary(len(tokenizer), complete=True), prose_blocks(texts, tokenizer)
    if prose is not None:
        record.trained.add(prose)
    unseen = Unseen(None if texts.data.score_seen_text else record.trained)
    if texts.data.streaming:
        train, chosen_by, calibration, held_out = streamed_blocks(texts, tokenizer, record, unseen)
    else:
        calibration, held_out = corpus_blocks(texts, model, tokenizer, record, unseen)
        validation = held_back(len(calibration))
        if len(calibration) <= validation:
            raise DataError(
                f"{len(calibration)} training block(s) are too few; raise data.num_train_samples or give more text"
            )
        first = len(calibration) - validation
        train = calibration.select(range(first))
        # What chooses the best adapter should not repeat what it is trained on either, where there is any choice.
        chosen_by = Unseen(Seen(record.trained.window).add(train)).among(
            "", calibration.select(range(first, len(calibration))), or_all=True
        )
    record.held_out.add(held_out)
    further = further_corpora(texts, tokenizer, unseen=unseen)
    return Corpus(train, chosen_by, calibration, held_out, prose, further, record, unseen)


def streamed_blocks(
    texts: RunTexts, tokenizer: Any, record: TextRecord, unseen: Unseen
) -> tuple[StreamedBlocks, datasets.Dataset, datasets.Dataset, datasets.Dataset]:
    """(training text, read as it trains; blocks to choose the best adapter by; blocks to calibrate on; held-out blocks).

    Documents for the report and for choosing the best adapter come first, from a pass in an order of their own, and those
    for calibration after them. The first are left out of training, wherever they come again.

    Raises:
        DataError: the text is too small for that.
    """
    data, source = texts.data, texts.stream
    bos = first_of_blocks(tokenizer, data.begin_with_bos)
    documents = HeldOutText(texts, tokenizer)
    held_out = documents.blocks((data.num_eval_samples or VALIDATION_BLOCKS) + VALIDATION_BLOCKS, unseen)
    left_out, last = frozenset(documents.digests), len(held_out) - VALIDATION_BLOCKS
    calibration = documents.blocks(data.num_calibration_samples)
    chosen_by = held_out.select(range(last, len(held_out)))
    for blocks in (chosen_by, calibration):
        record.trained.add(blocks)

    def make(place: tuple[int, int]) -> BlockStream:
        stream = DocumentStream(source, place, seed=texts.seed, window=data.shuffle_window, left_out=left_out)
        return BlockStream(
            stream, tokenizer, data.max_length, record.trained,
            bos_token_id=bos, vocabulary=texts.vocabulary, score=data.score,
        )  # fmt: skip

    return StreamedBlocks(make, world()), chosen_by, calibration, held_out.select(range(last))


class HeldOutText:
    """The text of a stream that is held out or calibrated on, from a pass in an order of its own.

    digests: of the documents that were read.
    """

    def __init__(self, texts: RunTexts, tokenizer: Any):
        self.texts, self.tokenizer, self.digests = texts, tokenizer, set[bytes]()
        self._documents = DocumentStream(texts.stream, seed=HELD_OUT_SEED, window=HELD_OUT_WINDOW)

    def blocks(self, count: int, unseen: Unseen | None = None) -> datasets.Dataset:
        """The next `count` blocks, those that were seen left out.

        Raises:
            DataError: the text is too small for that.
        """
        data = self.texts.data
        # One document at a time: any tokenised ahead would count as seen and never be trained on.
        read = held_out_documents(self._documents, self.digests)
        given = self.tokenizer, self.texts.vocabulary, data.score
        one_by_one = (pair for document in read for pair in tokenised([document], *given))
        bos = first_of_blocks(self.tokenizer, data.begin_with_bos)
        packer = Packer(one_by_one, data.max_length, pad_token_id=0, bos_token_id=bos)
        found = (unseen or Unseen(None)).first(self.texts.label, packer, count, has_end=False)
        if len(found) < count:
            raise DataError(
                f"the streamed text makes {len(found)} of the {count} block(s) of data.max_length={data.max_length} that are "
                "to be held out or calibrated on; give more text, or lower data.num_eval_samples or "
                "data.num_calibration_samples"
            )
        return found


def corpus_blocks(
    texts: RunTexts, model: Any, tokenizer: Any, record: TextRecord, unseen: Unseen
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training blocks, held-out blocks) of text that is not streamed; the first are entered in the record."""
    name = texts.label
    if texts.data.dataset_name == "self":
        counts = own_counts(texts, ("train", "eval"))
        train, sampled = (own_text(texts, model, tokenizer, count, label) for label, count in counts.items())
        record.trained.add(train)
        return train, unseen.among(name, sampled)
    blocks, packer = texts.blocks(tokenizer)
    train, held_out = texts.split(blocks)
    record.trained.add(train)
    return train, unseen.last(name, blocks, len(train), len(held_out), packer) if len(held_out) else held_out


def own_text(texts: RunTexts, model: Any, tokenizer: Any, count: int | None, label: str) -> datasets.Dataset:
    """Blocks that the frozen model writes itself (`data.dataset_name: self`); kept only where there is a cache_dir.

    Args:
        count: blocks; the configuration does not let it be None here. label: "train" or "eval", chooses the random stream.
    """
    return sample_blocks(
        model, tokenizer, count or 0, texts.data.max_length,
        seed=texts.seed, label=label, cache_dir=samples_folder(texts), progress=is_first(),
    )  # fmt: skip


def samples_folder(texts: RunTexts) -> Path | None:
    """The folder in which sampled text is kept; None without a `paths.cache_dir`."""
    return None if texts.cache_dir is None else Path(texts.cache_dir) / "npt_samples"


def own_counts(texts: RunTexts, labels: Sequence[str]) -> dict[str, int]:
    """{label: blocks} of the texts ("train", "eval") that the model writes itself; none for other text."""
    counts = {"train": texts.own_train or 0, "eval": texts.data.num_eval_samples or 0}
    return {label: counts[label] for label in labels if texts.data.dataset_name == "self"}


def still_to_write(texts: RunTexts, model: Any, tokenizer: Any, counts: Mapping[str, int]) -> list[int]:
    """Numbers of blocks of texts, {label: blocks}, that the model has not written yet."""
    length, folder = texts.data.max_length, samples_folder(texts)
    kept = {
        label: kept_blocks(model, tokenizer, count, length, texts.seed, label, cache_dir=folder)
        for label, count in counts.items()
    }
    return [counts[label] for label, path in kept.items() if path is None or not path.exists()]


def further_corpora(
    texts: RunTexts, tokenizer: Any, more: Sequence[str | Path] = (), unseen: Unseen | None = None
) -> dict[str, datasets.Dataset]:
    """{name: up to data.num_eval_samples blocks} of `data.eval_texts` and `more`, each under its file's short name.

    The text that is trained on is left out: its held-out part is evaluated anyway.

    Raises:
        DataError: all blocks of a text are known to `unseen`.
    """
    data, unseen = texts.data, unseen or Unseen(None)
    names = dict.fromkeys(str(name) for name in (*data.eval_texts, *more) if name != data.dataset_name)
    short = {name: name if name.startswith(PREFIX) else short_name(Path(name)) for name in names}
    taken = [data.dataset_name, *short.values()]
    found = {}
    for name in names:
        key = short[name] if taken.count(short[name]) == 1 else name
        packer = texts.pack(texts.further(name), tokenizer)
        found[key] = unseen.first(name, packer, data.num_eval_samples)
    return found


def prose_blocks(texts: RunTexts, tokenizer: Any) -> datasets.Dataset | None:
    """The blocks of `data.calibration_files` that are calibrated on, up to half of all; None where it names none."""
    if texts.prose is None:
        return None
    packer = texts.pack(texts.prose, tokenizer)
    packer.read()
    blocks = packer.blocks()
    wanted = min(texts.data.num_calibration_samples // 2, len(blocks))
    return blocks.shuffle(seed=texts.seed).select(range(wanted))


def calibration_batches(
    texts: RunTexts, corpus: Corpus, batch_size: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Batches of the calibration text: training text, from the front, or half of that and half of the prose, mixed."""
    count, own, prose = texts.data.num_calibration_samples, corpus.calibration, corpus.prose
    if prose is None:
        return list(batches_of(own.select(range(min(count, len(own)))), batch_size, device))
    own = own.select(range(min(count - len(prose), len(own))))
    own, prose = (part.select_columns(["input_ids", "attention_mask", "labels"]) for part in (own, prose))
    mixed = datasets.concatenate_datasets([own, prose.cast(own.features)]).shuffle(seed=texts.seed)
    return list(batches_of(mixed, batch_size, device))


def evaluation_blocks(
    texts: RunTexts, checkpoint: str | Path, model: Any, tokenizer: Any, record: TextRecord | None, unseen: Unseen
) -> datasets.Dataset:
    """The blocks of `data.dataset_name` to evaluate an adapter on: the held-out ones, or all of a text that it was not
    trained on.

    Args:
        record: the adapter's. unseen: knows the text that it was trained on.

    Raises:
        DataError: all of it was trained on.
    """
    data, name = texts.data, texts.label
    if data.streaming:
        return HeldOutText(texts, tokenizer).blocks(data.num_eval_samples or VALIDATION_BLOCKS, unseen)
    if data.dataset_name == "self":
        return unseen.among(name, own_text(texts, model, tokenizer, data.num_eval_samples, "eval"))
    blocks, packer = texts.blocks(tokenizer)
    if unseen.trained is None and trained_on(data, checkpoint):
        return split_blocks(blocks, data.num_train_samples, data.num_eval_samples)[1]
    if record is not None and unseen.trained is not None and unseen.trained.covers(blocks).any():
        return unseen.last(name, blocks, 0, data.num_eval_samples or max(1, len(blocks) // 10), packer)
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
