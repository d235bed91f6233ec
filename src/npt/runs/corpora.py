"""The text of a configuration: what trains, what calibrates, what is held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from npt.adapters.folder import resolve_checkpoint
from npt.builtin import PREFIX
from npt.common.display import quiet
from npt.common.processes import is_first, world
from npt.config import RunConfig, load_config
from npt.data import load_documents, pack, sample_blocks, split_blocks
from npt.data.batches import batches_of
from npt.data.packing import pack_token_ids, token_ids
from npt.data.sources import TextFiles, expand_files
from npt.data.streaming import (
    BlockStream,
    DocumentStream,
    Source,
    StreamedBlocks,
    held_out_documents,
    hub_source,
    local_source,
)
from npt.errors import DataError
from npt.runs.base_model import load_tokenizer

#: The configuration an adapter was trained with, beside it in its folder.
RUN_CONFIG = "npt_run.yaml"


#: Blocks taken from the end of the training set to choose the best adapter by.
VALIDATION_BLOCKS = 32
#: Order of the pass that streamed text is held out in: not the run's own, so that an evaluation with other settings can't
#: score what was trained on.
HELD_OUT_SEED, HELD_OUT_WINDOW = 2**32, 1000


@dataclass(frozen=True)
class Corpus:
    """The blocks of a run: what it trains on, what chooses its best adapter, what it calibrates on (at most, and from the
    front), and what its report is about."""

    train: Any
    chosen_by: datasets.Dataset
    calibration: datasets.Dataset
    held_out: datasets.Dataset


def load_corpus(config: RunConfig, model: Any, tokenizer: Any) -> Corpus:
    """The blocks of the `data` section.

    Raises:
        DataError: too little text.
    """
    if config.data.streaming:
        return streamed_corpus(config, tokenizer)
    train, held_out = corpus_blocks(config, model, tokenizer)
    validation = min(VALIDATION_BLOCKS, max(1, len(train) // 10))
    if len(train) <= validation:
        raise DataError(f"{len(train)} training block(s) are too few; raise data.num_train_samples or give more text")
    first = len(train) - validation
    return Corpus(train.select(range(first)), train.select(range(first, len(train))), train, held_out)


def streamed_corpus(config: RunConfig, tokenizer: Any) -> Corpus:
    """A corpus whose training text is read as it trains.

    Documents for the report and for choosing the best adapter come first from a pass in an order of their own, those for
    calibration after them. The first are left out of training, wherever they come again.

    Raises:
        DataError: the text is too small for that.
    """
    data, seed = config.data, config.training.seed
    source, seen = _source(config), set[bytes]()
    documents = DocumentStream(source, seed=HELD_OUT_SEED, window=HELD_OUT_WINDOW)

    def blocks(count: int) -> datasets.Dataset:
        # One by one: what the tokenizer is given beside is lost for training.
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
        stream = DocumentStream(source, place, seed=seed, window=data.shuffle_window, left_out=left_out)
        return BlockStream(stream, tokenizer, data.max_length)

    return Corpus(
        StreamedBlocks(make, world()),
        held_out.select(range(last, len(held_out))),
        calibration,
        held_out.select(range(last)),
    )


def _source(config: RunConfig) -> Source:
    data = config.data
    if data.dataset_name == "text":
        return local_source(data.data_files or (), data.text_column)
    return hub_source(data.dataset_name, data.dataset_config, data.text_column)


def corpus_blocks(config: RunConfig, model: Any, tokenizer: Any) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training blocks, held-out blocks) of text that is not streamed."""
    data: Any = config.data
    seed = config.training.seed
    if data.dataset_name == "self":
        common: dict[str, Any] = {"seed": seed, "cache_dir": data_cache(config), "progress": is_first()}
        train = sample_blocks(model, tokenizer, data.num_train_samples, data.max_length, label="train", **common)
        held_out = sample_blocks(model, tokenizer, data.num_eval_samples, data.max_length, label="eval", **common)
        return train, held_out
    return _split(config, _text_blocks(config, tokenizer))


def _split(config: RunConfig, blocks: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    data = config.data
    train, held_out = split_blocks(blocks, data.num_train_samples, data.num_eval_samples)
    if len(train) < 2:
        raise DataError(
            f"the text makes {len(train)} block(s) of data.max_length={data.max_length} to train on, and at least 2 are "
            "needed: one chooses the best adapter; give more text, or lower data.max_length or data.num_eval_samples"
        )
    return train, held_out


def _text_blocks(config: RunConfig, tokenizer: Any) -> datasets.Dataset:
    data = config.data
    documents = _own_documents(config)
    local = data.dataset_name == "text" or data.dataset_name.startswith(PREFIX)
    wanted = (data.num_train_samples or 0) + (data.num_eval_samples or 0)
    # A hub dataset can be far larger than what is asked for; local files are packed whole, held-out text at the end.
    return pack(
        documents, tokenizer, data.max_length, max_blocks=None if local else wanted or None, progress=is_first()
    )


def _own_documents(config: RunConfig) -> Iterable[str]:
    data = config.data
    return load_documents(
        data.dataset_name,
        dataset_config=data.dataset_config,
        data_files=data.data_files or (),
        text_column=data.text_column,
        cache_dir=config.paths.cache_dir,
    )


def check_training_text(config: RunConfig) -> None:
    """That local text makes enough blocks, asked before the base's weights are loaded; the tokenizer is.

    Raises:
        DataError: too few blocks to train on and to hold out. NPTError: no tokenizer.
    """
    data = config.data
    if data.dataset_name != "text" or data.streaming:
        return
    enough = (data.num_eval_samples or 0) + 3
    blocks = pack(_own_documents(config), load_tokenizer(config), data.max_length, max_blocks=enough)
    if len(blocks) < enough:  # so this is all of the text
        with quiet("npt.data.packing"):
            _split(config, blocks)


def check_text_files(config: RunConfig, more: Sequence[str | Path] = ()) -> None:
    """Reads every local text file once, and asks the hub for its data set, so that what is bad is named at once. Of files
    that are streamed the first document is read.

    Raises:
        DataError: an unusable file or data set; a file to evaluate on that is also trained or calibrated with.
    """
    data = config.data
    trained: dict[Path, str] = {}
    if data.streaming:
        _source(config)
        files = expand_files(data.data_files or (), "data.data_files")[0] if data.dataset_name == "text" else []
        trained |= {path.resolve(): "data.data_files" for path in files}
    elif data.dataset_name != "self":
        trained |= _resolved(_own_documents(config), "data.data_files")
    if data.calibration_files:
        key = "data.calibration_files"
        trained |= _resolved(TextFiles(data.calibration_files, data.text_column, key), key)
    for name in data.eval_texts:
        for path in _resolved(_documents(config, name, "data.eval_texts"), "data.eval_texts"):
            if path in trained:
                raise DataError(
                    f"data.eval_texts: {name} is also in {trained[path]}, and would be evaluated on after training on it; "
                    "take it out of one of the two"
                )
    for further in more:
        _documents(config, further, "--text")


def _resolved(documents: Iterable[str], key: str) -> dict[Path, str]:
    """The files of documents, links and `..` followed, each with the key that names it."""
    return {path.resolve(): key for path in documents.paths} if isinstance(documents, TextFiles) else {}


def _documents(config: RunConfig, name: str | Path, named_by: str = "data.eval_texts") -> Iterable[str]:
    """The documents of a builtin text or of a file."""
    if str(name).startswith(PREFIX):
        return load_documents(str(name))
    return TextFiles([name], config.data.text_column, named_by)


def further_corpora(config: RunConfig, tokenizer: Any, more: Sequence[str | Path] = ()) -> dict[str, datasets.Dataset]:
    """{name: up to data.num_eval_samples blocks} of `data.eval_texts` and `more`, each under its file's short name.

    The text that is trained on is left out: its held-out part is evaluated anyway.
    """
    texts = dict.fromkeys(str(name) for name in (*config.data.eval_texts, *more) if name != config.data.dataset_name)
    short = {name: name if name.startswith(PREFIX) else Path(name).stem for name in texts}
    taken = [config.data.dataset_name, *short.values()]
    return {
        (short[name] if taken.count(short[name]) == 1 else name): pack(
            _documents(config, name), tokenizer, config.data.max_length, max_blocks=config.data.num_eval_samples
        )
        for name in texts
    }


def data_cache(config: RunConfig) -> str | None:
    """Where sampled text is kept; with no cache_dir, nothing is."""
    return None if config.paths.cache_dir is None else str(Path(config.paths.cache_dir) / "npt_samples")


def calibration_batches(
    config: RunConfig, tokenizer: Any, train: datasets.Dataset, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """Half of the calibration text from `Corpus.calibration`, half from `calibration_files` where there are any; mixed."""
    count, size = config.data.num_calibration_samples, config.training.batch_size
    files = config.data.calibration_files or []
    if not files:
        return list(batches_of(train.select(range(min(count, len(train)))), size, device))
    documents = load_documents("text", data_files=files, text_column=config.data.text_column)
    prose = pack(documents, tokenizer, config.data.max_length)
    prose = prose.shuffle(seed=config.training.seed).select(range(min(count // 2, len(prose))))
    own = train.select(range(min(count - len(prose), len(train))))
    mixed = datasets.concatenate_datasets([own, prose.cast(own.features)]).shuffle(seed=config.training.seed)
    return list(batches_of(mixed, size, device))


def evaluation_blocks(config: RunConfig, checkpoint: str | Path, model: Any, tokenizer: Any) -> datasets.Dataset:
    """The held-out blocks of the configuration's data."""
    data: Any = config.data
    if data.streaming:
        return streamed_corpus(config, tokenizer).held_out
    if data.dataset_name == "self":
        return sample_blocks(
            model, tokenizer, data.num_eval_samples, data.max_length,
            seed=config.training.seed, label="eval", cache_dir=data_cache(config), progress=is_first(),
        )  # fmt: skip
    blocks = _text_blocks(config, tokenizer)
    if trained_on(config, checkpoint):
        return split_blocks(blocks, data.num_train_samples, data.num_eval_samples)[1]
    return blocks if data.num_eval_samples is None else blocks.select(range(min(data.num_eval_samples, len(blocks))))


def trained_on(config: RunConfig, checkpoint: str | Path) -> bool:
    """Whether the adapter's own record says that it was trained on this configuration's text."""
    record = resolve_checkpoint(checkpoint) / RUN_CONFIG
    if not record.is_file():
        return True  # unknown: take the careful split
    theirs = load_config(record).data

    def source(data: Any) -> tuple[Any, ...]:
        files: Iterable[str] = [*(data.data_files or ()), *(data.calibration_files or ())]
        return data.dataset_name, data.dataset_config, frozenset(str(Path(f).resolve()) for f in files)

    mine, trained = source(config.data), source(theirs)
    return mine[:2] == trained[:2] and (mine[0] != "text" or bool(mine[2] & trained[2]))
