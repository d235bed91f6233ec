"""Streamed text gives every document once per epoch, goes on at the exact place after a stop, in flat memory."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainingArguments

from npt import EquivalenceTrainer, NPTConfig, Objective
from npt.cli import main
from npt.config import load_config
from npt.data import pack
from npt.data.streaming import BlockStream, DocumentStream, StreamedBlocks, hub_source, local_source
from npt.errors import CheckpointError, ConfigError, DataError, NPTError
from npt.runs.corpora import load_corpus
from npt.runs.texts import RunTexts
from npt.runs.train import run_training
from npt.training.checkpoints import STREAM
from npt.training.steps import VALIDATION_BLOCKS
from tests.helpers import Letters, StopAt, random_base

SHARDS = 200


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """(glob of 200 files of three kinds with 1 to 6 documents each, all documents)."""
    folder = tmp_path_factory.mktemp("shards")
    everything = []
    for number in range(SHARDS):
        texts = [f"document {number} {i} " + "word " * ((number * 7 + i * 13) % 40) for i in range(1 + number % 6)]
        kind = number % 3
        if kind == 0:
            texts = texts[:1]  # a text file is one document
            (folder / f"{number:03d}.txt").write_text(texts[0])
        elif kind == 1:
            (folder / f"{number:03d}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        else:
            pq.write_table(pa.table({"text": texts}), folder / f"{number:03d}.parquet")
        everything += texts
    return str(folder / "*"), everything


def stream(shards: Any, place: tuple[int, int] = (0, 1), **options: Any) -> DocumentStream:
    return DocumentStream(local_source([shards[0]], "text"), place, **{"seed": 3, "window": 16, **options})


def epoch(documents: DocumentStream) -> list[str]:
    """What is left of the epoch that the next document is of."""
    documents.upcoming()
    found, number = [], documents.epoch
    while documents.upcoming() and documents.epoch == number:
        found.append(documents.take())
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_document_once_per_epoch_and_none_twice(count: int, shards: Any) -> None:
    streams = [stream(shards, (rank, count)) for rank in range(count)]
    orders = []
    for _ in range(3):
        parts = [epoch(documents) for documents in streams]
        assert Counter(text for part in parts for text in part) == Counter(shards[1])
        assert max(map(len, parts)) < 2 * min(map(len, parts))
        orders.append(parts[0])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert epoch(stream(shards, (0, count), seed=4)) != orders[0] == epoch(stream(shards, (0, count)))
    kept = [shards[1].index(text) for text in orders[0]]
    assert sum(a < b for a, b in pairwise(kept)) < 0.7 * len(kept)  # it is shuffled


@pytest.mark.parametrize("window", [1, 7, 16, 10_000])
def test_a_stop_anywhere_loses_and_repeats_nothing(window: int, shards: Any) -> None:
    for cut in (0, 1, 6, 7, 15, 16, 17, 100, 231, 232, 233, 250):
        whole = stream(shards, (1, 2), window=window)
        first = [whole.take() for _ in range(cut)]
        state = json.loads(json.dumps(whole.state_dict()))
        again = stream(shards, (1, 2), window=window)
        again.load_state_dict(state)
        assert again.count == cut and [again.take() for _ in range(260)] == [whole.take() for _ in range(260)]
        once = stream(shards, (1, 2), window=window)
        again.load_state_dict(state)
        assert first + [again.take() for _ in range(60)] == [once.take() for _ in range(cut + 60)]


def block_stream(shards: Any, place: tuple[int, int], **options: Any) -> BlockStream:
    return BlockStream(stream(shards, place, **options), Letters(), 32)


def rows(blocks: Iterator[Any], count: int) -> list[Any]:
    return [[block[n].tolist() for n in ("input_ids", "attention_mask", "labels")] for block in islice(blocks, count)]


def test_blocks_are_those_of_pack(shards: Any) -> None:
    """The same format, the same joins; nothing dropped between documents and between epochs."""
    documents = stream(shards)
    texts = epoch(documents) + epoch(documents)
    expected = pack(texts, Letters(), 32)
    found = rows(iter(StreamedBlocks(lambda place: block_stream(shards, place))), len(expected))
    assert found == [[row[n] for n in ("input_ids", "attention_mask", "labels")] for row in expected]


def test_a_stop_inside_a_document_goes_on_at_the_token(shards: Any) -> None:
    """Documents reach over up to seven blocks of 32."""
    for cut in range(1, 60, 4):
        whole = block_stream(shards, (0, 2))
        for _ in range(cut):
            whole.take()
        again = block_stream(shards, (0, 2))
        again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        for _ in range(100):
            one, other = whole.take(), again.take()
            assert all(torch.equal(one[n], other[n]) for n in one), cut


def test_one_process_goes_on_with_the_blocks_of_two(shards: Any) -> None:
    """Steps of 2 x 3 blocks of two processes, and of 6 of one: the same blocks, whoever stopped and whoever goes on."""

    def make(place: tuple[int, int]) -> BlockStream:
        return block_stream(shards, place)

    two = [StreamedBlocks(make, (rank, 2)) for rank in range(2)]
    alone = StreamedBlocks(make, (0, 1))
    alone.load_state_dict({r: make((r, 2)).state_dict() for r in range(2)})
    sides = [iter(side) for side in (*two, alone)]
    for step in range(30):
        a, b, both = rows(sides[0], 3), rows(sides[1], 3), rows(sides[2], 6)
        assert sorted(a + b) == sorted(both), step
    states = two[0].state_dict() | two[1].state_dict()
    assert states == alone.state_dict()
    again = StreamedBlocks(make, (1, 2))
    again.load_state_dict({int(number): state for number, state in json.loads(json.dumps(states)).items()})
    assert rows(iter(again), 6) == rows(sides[1], 6)


def test_streams_that_do_not_deal_out_are_refused(shards: Any) -> None:
    states = {r: block_stream(shards, (r, 4)).state_dict() for r in range(4)}
    with pytest.raises(NPTError, match=r"over 4 processes and can't go on with 3; resume it with 1 or 2 or 4"):
        StreamedBlocks(lambda place: block_stream(shards, place), (0, 3)).load_state_dict(states)


def test_memory_is_flat(tmp_path: Path) -> None:
    """The peak of 40 shards is that of 4: a window of documents and what a reader holds."""
    for i in range(40):
        lines = (json.dumps({"text": f"{i} {j} " + "some words " * 200}) + "\n" for j in range(200))
        (tmp_path / f"{i:02d}.jsonl").write_text("".join(lines))

    def peak(files: str) -> int:
        blocks = BlockStream(DocumentStream(local_source([files], "text"), seed=0, window=50), Letters(), 256)
        tracemalloc.start()
        while blocks.documents.epoch == 0:
            blocks.take()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(str(tmp_path / "00.jsonl"))  # what the libraries allocate once
    assert peak(str(tmp_path / "*.jsonl")) < 1.1 * peak(str(tmp_path / "0[0-3].jsonl"))


def settings(local_model: Path, shards: Any, folder: Path, *more: str) -> Any:
    return load_config(
        None,
        [
            f"model.base_model_name={local_model}", "data.dataset_name=text", f"data.data_files=['{shards[0]}']",
            "data.streaming=true", "data.shuffle_window=20", "data.max_length=48", "data.num_eval_samples=6",
            "data.num_calibration_samples=8", "data.eval_texts=[]", "training.batch_size=2", "training.num_train_steps=6",
            "training.eval_steps=3", "training.save_steps=2", "training.logging_steps=1",
            f"paths.output_dir={folder / 'out'}", f"paths.checkpoint_dir={folder / 'checkpoints'}", *more,
        ],
    )  # fmt: skip


def test_held_out_documents_are_never_trained_on(local_model: Path, shards: Any, tmp_path: Path) -> None:
    config = settings(local_model, shards, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    corpus = load_corpus(RunTexts.of(config), None, tokenizer)
    assert (len(corpus.held_out), len(corpus.chosen_by), len(corpus.calibration)) == (6, VALIDATION_BLOCKS, 8)
    # Whatever else the run or its evaluation is set to.
    other = settings(local_model, shards, tmp_path, "training.seed=7", "data.shuffle_window=3")
    again = load_corpus(RunTexts.of(other), None, tokenizer)
    assert again.held_out[:] == corpus.held_out[:] and again.chosen_by[:] == corpus.chosen_by[:]

    def names(ids: list[int]) -> set[str]:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return {" ".join(part.split()[:2]) for part in text.split("document ")[1:] if len(part.split()) > 1}

    held = set().union(*(names(row) for row in [*corpus.held_out["input_ids"], *corpus.chosen_by["input_ids"]]))
    documents = corpus.train.streams[0].documents
    trained = {" ".join(text.split()[1:3]) for text in epoch(documents)}
    everything = {" ".join(text.split()[1:3]) for text in shards[1]}
    assert len(held) > 10 and not held & trained and held <= everything - trained
    assert len(everything - trained) < len(everything) / 2 and len(everything - trained - held) <= 8


@pytest.mark.usefixtures("quick_reports")
def test_a_run_that_is_stopped_goes_on_bit_for_bit(local_model: Path, shards: Any, tmp_path: Path) -> None:
    report = run_training(settings(local_model, shards, tmp_path / "whole"))
    assert report["protocol"]["corpora"] == ["text"]
    parts = settings(local_model, shards, tmp_path / "parts")
    run_training(parts)
    for path in (tmp_path / "parts" / "checkpoints").glob("checkpoint-[46]"):
        (path / "complete.json").unlink()  # as if killed after step 2
    run_training(parts, resume=True)
    one, two = (tmp_path / n / "checkpoints" / "checkpoint-6" for n in ("whole", "parts"))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert (one / STREAM.format(0)).read_text() == (two / STREAM.format(0)).read_text()
    logs = [(tmp_path / n / "out" / "metrics.jsonl").read_text().splitlines() for n in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in log if '"loss"' in line] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_accumulated_batches_keep_the_place(shards: Any, tmp_path: Path) -> None:
    """What is saved is the place after the batches of the step, not after some that were read ahead."""

    def trainer(folder: Path) -> EquivalenceTrainer:
        args = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=4, save_steps=2,
            report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        model = get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[1, 3], rank=3))
        blocks = StreamedBlocks(lambda place: block_stream(shards, place))
        held = pack(["some text " * 40], Letters(), 32)
        return EquivalenceTrainer(model, args, Objective("local"), train_dataset=blocks, eval_dataset=held)

    whole = trainer(tmp_path / "whole")
    whole.train()
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / STREAM.format(0)).read_text())
    assert state["served"] == 2 * 3 * 2
    first = trainer(tmp_path / "parts")
    first.add_callback(StopAt(2))
    first.train()
    second = trainer(tmp_path / "parts")
    second.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "parts" / "checkpoint-2" / STREAM.format(0)).unlink()
    with pytest.raises(CheckpointError, match="without data.streaming"):
        trainer(tmp_path / "parts").train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))


def test_a_folder_is_streamed_as_a_hub_data_set(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(60)]
    for i in range(6):
        lines = (json.dumps({"body": t}) + "\n" for t in texts[10 * i : 10 * i + 10])
        (tmp_path / f"{i}.jsonl").write_text("".join(lines))
    source = hub_source(str(tmp_path), None, "body")
    streams = [DocumentStream(source, (r, 2), seed=0, window=8) for r in range(2)]
    for _ in range(2):
        assert sorted(t for documents in streams for t in epoch(documents)) == sorted(texts)
    for cut in (5, 8, 21):
        whole = DocumentStream(source, (1, 2), seed=0, window=8)
        for _ in range(cut):
            whole.take()
        again = DocumentStream(source, (1, 2), seed=0, window=8)
        again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        assert [again.take() for _ in range(40)] == [whole.take() for _ in range(40)]
    with pytest.raises(DataError, match=r"no column 'text' \(there are: body\)"):
        hub_source(str(tmp_path), None, "text")
    with pytest.raises(DataError, match=r"can't be streamed"):
        hub_source(str(tmp_path / "nowhere"), None, "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.num_train_steps=null"], r"training.num_train_steps: has no end with data.streaming=true"),
        (["paths.teacher_cache=cache"], r"paths.teacher_cache: is for a fixed set of blocks"),
        (["data.dataset_name=self", "data.data_files=null"], r"data.streaming: is for text from a hub or from files"),
    ],
)
def test_what_streaming_contradicts(changes: list[str], message: str, shards: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, shards, tmp_path, *changes)


def test_bad_files_are_named_before_anything_starts(local_model: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "wrong column"}\n')
    (tmp_path / "c.txt").write_text("")
    options = settings(local_model, (str(tmp_path / "*.*"), []), tmp_path)
    command = [part for key in ("model", "data", "training", "paths") for part in _options(options, key)]
    assert main(["train", *command]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "b.jsonl, line 1: no column 'text'" in message and "c.txt: is empty" in message and "a.jsonl" not in message
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").glob("checkpoint*"))


def _options(config: Any, section: str) -> Iterator[str]:
    for key, value in getattr(config, section).model_dump(exclude_unset=True).items():
        yield from ("--set", f"{section}.{key}={json.dumps(value)}")


def test_too_little_text_is_told(local_model: Path, shards: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} word " * 30}) + "\n" for i in range(20)))
    few = (str(tmp_path / "a.jsonl"), [])
    config, tokenizer = (
        settings(local_model, few, tmp_path, "data.max_length=200"),
        AutoTokenizer.from_pretrained(local_model),
    )
    with pytest.raises(DataError, match=r"of the 38 block\(s\) .* held out or calibrated on; give more text"):
        load_corpus(RunTexts.of(config), None, tokenizer)
    empty = stream(shards, left_out=frozenset(stream_digests(shards[1])))
    with pytest.raises(DataError, match=r"no document for part 1 of 1 beside what is held out"):
        empty.take()


def stream_digests(texts: list[str]) -> Iterator[bytes]:
    from npt.data.streaming import digest

    return map(digest, texts)
