"""The texts that a run's `data` section names, each opened once: checked before any long work, then packed.

In each process a local file of `data.data_files` is read twice at most: once from end to end by the check, once by the
packing. A file that another key names too is another text, and streamed files are read as they train.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from npt.builtin import PREFIX
from npt.common.display import one_line, quiet
from npt.common.limits import check_length, vocabulary_of
from npt.common.processes import is_first
from npt.config import DataSection, ModelSection, RunConfig
from npt.data import load_documents, split_blocks
from npt.data.documents import Document
from npt.data.packing import Packer, text_packer
from npt.data.sources import TextFiles, expand_files
from npt.data.streaming import Source, hub_source, local_source
from npt.errors import DataError
from npt.runs.base_model import base_config, load_tokenizer
from npt.training.steps import untrained_blocks


class RunTexts:
    """The texts of a run. Each is opened when it is first asked for, and the same open text is handed on afterwards.

    Args:
        data: names the texts. seed: `training.seed`. cache_dir: `paths.cache_dir`. own_train: blocks to train on that the base
            writes where it writes the text; None for `data.num_train_samples`.

    vocabulary: rows of the base's embedding, once `check_model` has asked for them.
    """

    def __init__(self, data: DataSection, *, seed: int = 0, cache_dir: str | None = None, own_train: int | None = None):
        self.data, self.seed, self.cache_dir = data, seed, cache_dir
        self.own_train = data.num_train_samples if own_train is None else own_train
        self._further: dict[str, Iterable[Document]] = {}
        self._packer: Packer | None = None
        self.vocabulary: int | None = None

    @classmethod
    def of(cls, config: RunConfig) -> RunTexts:
        """The texts of a run configuration."""
        own = own_train_blocks(config)
        return cls(config.data, seed=config.training.seed, cache_dir=config.paths.cache_dir, own_train=own)

    @property
    def label(self) -> str:
        """The text of `data.dataset_name` as notes and errors name it."""
        return one_line(", ".join(self.data.data_files or [self.data.dataset_name]), 80)

    @cached_property
    def own(self) -> Iterable[Document]:
        """The documents of `data.dataset_name`, which is not `self` and not streamed."""
        data = self.data
        return load_documents(
            data.dataset_name,
            dataset_config=data.dataset_config,
            data_files=data.data_files or (),
            text_column=data.text_column,
            cache_dir=self.cache_dir,
            chats_only=self._chats_only,
        )

    @cached_property
    def stream(self) -> Source:
        """The documents of `data.dataset_name`, streamed."""
        data = self.data
        if data.dataset_name == "text":
            return local_source(data.data_files or (), data.text_column, chats_only=self._chats_only)
        return hub_source(data.dataset_name, data.dataset_config, data.text_column, chats_only=self._chats_only)

    @property
    def _chats_only(self) -> bool:
        return self.data.score == "replies"

    @cached_property
    def prose(self) -> TextFiles | None:
        """The documents of `data.calibration_files`, None where it names none."""
        files = self.data.calibration_files
        return TextFiles(files, self.data.text_column, "data.calibration_files") if files else None

    def further(self, name: str | Path, named_by: str = "data.eval_texts") -> Iterable[Document]:
        """The documents of a builtin text or of a file that is evaluated on. named_by: the key or option, for errors."""
        name = str(name)
        if name not in self._further:
            builtin = name.startswith(PREFIX)
            self._further[name] = (
                load_documents(name) if builtin else TextFiles([name], self.data.text_column, named_by)
            )
        return self._further[name]

    def check(self, more: Sequence[str | Path] = ()) -> None:
        """Opens every text, so that what is bad is named at once: local files are read from end to end, the hub is asked for
        its data set, and of streamed files the first document is read.

        Args:
            more: further files to evaluate on.

        Raises:
            DataError: an unusable file or data set; a file to evaluate on that is also trained or calibrated with.
        """
        data = self.data
        trained: dict[Path, str] = {}
        if data.streaming:
            _ = self.stream
            files = expand_files(data.data_files or (), "data.data_files")[0] if data.dataset_name == "text" else []
            trained |= {path.resolve(): "data.data_files" for path in files}
        elif data.dataset_name != "self":
            trained |= dict.fromkeys(_files_of(self.own), "data.data_files")
        if self.prose is not None:
            trained |= dict.fromkeys(_files_of(self.prose), "data.calibration_files")
        for name in data.eval_texts:
            for path in _files_of(self.further(name)):
                if path in trained and not data.score_seen_text:
                    raise DataError(
                        f"data.eval_texts: {name} is also in {trained[path]}, and would be evaluated on after training on "
                        "it; take it out of one of the two, or set data.score_seen_text=true"
                    )
        for further in more:
            self.further(further, "--text")

    def check_enough(self, model: ModelSection) -> None:
        """Checks, before any weights are loaded, that local text yields enough blocks. Loads only the tokenizer.

        `blocks` goes on packing where this check stopped; nothing is read again.

        Raises:
            DataError: too few blocks to train on and to hold out, or a token that the model lacks. NPTError: no tokenizer.
        """
        data = self.data
        if data.dataset_name != "text" or data.streaming:
            return
        own = self.own  # a bad file is named before a bad model
        self.vocabulary = vocabulary_of(base_config(model, self.cache_dir))
        self._packer = self.pack(own, load_tokenizer(model, self.cache_dir))
        enough = (data.num_eval_samples or 0) + 3
        self._packer.read(enough)
        if self._packer.count < enough:  # the text is at its end
            with quiet("npt.data.packing"):
                self.split(self._packer.blocks())

    def check_model(self, model: ModelSection) -> None:
        """Checks that the base, by its config.json, has positions for a block; notes how many tokens it knows.

        Raises:
            DataError: `data.max_length` is above its context.
        """
        config = base_config(model, self.cache_dir)
        check_length(config, self.data.max_length, "data.max_length")
        self.vocabulary = vocabulary_of(config)

    def pack(self, documents: Iterable[Document], tokenizer: Any) -> Packer:
        """A packer of documents into the blocks of the `data` section."""
        data = self.data
        options: dict[str, Any] = {"begin_with_bos": data.begin_with_bos, "vocabulary": self.vocabulary}
        return text_packer(documents, tokenizer, data.max_length, score=data.score, **options)

    def blocks(self, tokenizer: Any) -> tuple[datasets.Dataset, Packer | None]:
        """(the blocks of `own`, what reads on where there are more).

        Local text is packed whole, as the held-out part is its end; of a hub data set, which can be far larger, as many as
        are asked for.
        """
        data = self.data
        local = data.dataset_name == "text" or data.dataset_name.startswith(PREFIX)
        wanted = None if local else (data.num_train_samples or 0) + (data.num_eval_samples or 0) or None
        packer = self._packer or self.pack(self.own, tokenizer)
        self._packer = None  # it holds the whole text, and is not needed again
        packer.read(wanted, progress=is_first())
        return packer.blocks(wanted), None if wanted is None else packer

    def split(self, blocks: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
        """(training blocks, held-out blocks) of the text.

        Raises:
            DataError: too few blocks for both.
        """
        data = self.data
        train, held_out = split_blocks(blocks, data.num_train_samples, data.num_eval_samples)
        if len(train) < 2:
            raise DataError(
                f"the text makes {len(train)} block(s) of data.max_length={data.max_length} to train on, and at least 2 are "
                "needed: one chooses the best adapter; give more text, or lower data.max_length or data.num_eval_samples"
            )
        return train, held_out


def own_train_blocks(config: RunConfig) -> int:
    """How many blocks to train on the base writes: no more than the run uses, where it takes no step."""
    blocks, training = config.data.num_train_samples or 0, config.training
    if training.num_train_steps != 0:
        return blocks
    return min(blocks, untrained_blocks(config.data.num_calibration_samples if training.calibrate else 0))


def _files_of(documents: Iterable[Document]) -> list[Path]:
    """The files of documents, with links and `..` followed; none for other documents."""
    return [path.resolve() for path in documents.paths] if isinstance(documents, TextFiles) else []
