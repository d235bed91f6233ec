"""Records of text by content: what is recognised, whatever the length of a block, and what is not."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from npt import NPTConfig, calibrate, evaluate, merge_adapters
from npt.data import pack, pack_token_ids
from npt.data.batches import batches_of
from npt.data.seen import LIMIT, LONG_WINDOW, RECORD, WINDOW, Seen, TextRecord, window_hashes
from npt.errors import CheckpointError
from tests.helpers import Letters, blocks, converted, random_base, trainer


def tokens(count: int, seed: int = 0, most: int = 500) -> list[int]:
    return np.random.default_rng(seed).integers(3, most, count).tolist()


def packed(documents: list[list[int]], length: int) -> Any:
    return pack_token_ids(documents, length, pad_token_id=0)


def test_the_hash_of_a_window_depends_on_its_tokens_and_their_order_alone() -> None:
    ids = np.array(tokens(200))
    places, last, hashes = window_hashes(ids, np.zeros(200, dtype=bool))
    assert places.tolist() == list(range(188)) == [place - 12 for place in last] and len(set(hashes.tolist())) == 188
    shifted = window_hashes(ids[50:], np.zeros(150, dtype=bool))[2]
    assert (hashes[50:] == shifted).all()
    other = ids.copy()
    other[[70, 71]] = other[[71, 70]]
    changed = np.flatnonzero(window_hashes(other, np.zeros(200, dtype=bool))[2] != hashes)
    assert changed.tolist() == list(range(70 - WINDOW + 1, 72))


def test_windows_end_with_their_document_and_a_short_document_is_one() -> None:
    starts = np.zeros(40, dtype=bool)
    starts[[0, 20, 25]] = True  # 20, 5 and 15 tokens
    places, _, _ = window_hashes(np.array(tokens(40)), starts)
    assert sorted(places.tolist()) == [*range(8), 20, *range(25, 28)]


@pytest.mark.parametrize("length", [5, 8, 15, 20, 64, 250])
def test_trained_blocks_are_known_in_any_block_length(length: int) -> None:
    ids = tokens(4000)
    trained = Seen().add(packed([ids], 50).select(range(40)))
    covered = trained.covers(packed([ids], length))
    known = 2000 // length
    edge = 2 * (length < WINDOW)  # their windows reach past the end of what was trained on
    assert covered[: known - edge].all() and not covered[known + 1 :].any()
    assert not trained.covers(packed([tokens(4000, 1)], length)).any()


@pytest.mark.parametrize("length", [19, 32, 64])
def test_blocks_that_do_not_follow_each_other_are_known(length: int) -> None:
    blocks = packed([tokens(4000)], length)
    assert Seen().add(blocks.shuffle(seed=0)).covers(blocks.shuffle(seed=1)).all()


def test_documents_in_another_order_are_known() -> None:
    documents = [tokens(int(n), int(n)) for n in np.arange(4, 64)]
    shuffled = random.Random(0).sample(documents, len(documents))
    assert Seen().add(packed(documents, 32)).covers(packed(shuffled, 32)).mean() > 0.95


def test_short_replies_of_a_few_kinds_do_not_make_new_questions_known() -> None:
    question = tokens(15, 0)  # "Answer with yes or no", and the template's own tokens
    answers = tokens(2, 1), tokens(2, 2)

    def chats(seed: int) -> list[dict[str, list[int]]]:
        found = ([*tokens(31, 100 * seed + number), *question, *answers[number % 2]] for number in range(8))
        return [{"input_ids": ids, "labels": [*[-100] * 46, *ids[46:]], "starts": [1, *[0] * 47]} for ids in found]

    seen = Seen().add(chats(1))
    assert seen.covers(chats(1)).all() and not seen.covers(chats(2)).any()


def test_a_padded_remainder_counts_by_its_tokens() -> None:
    ids = tokens(80)
    padded = pack_token_ids([ids], 64, pad_token_id=0, keep_remainder=True)
    assert Seen().add(padded).covers(padded).tolist() == [True, True]
    short = pack_token_ids([[3, *tokens(30, 2)]], 64, pad_token_id=0, keep_remainder=True)
    assert Seen().add(padded).covers(short).tolist() == [False], "padding is no text"


def test_a_system_prompt_that_all_chats_share_does_not_make_their_replies_known() -> None:
    shared = tokens(40, 0)

    def chats(seed: int) -> list[dict[str, list[int]]]:
        rows = []
        for number in range(8):
            ids = [*shared, *tokens(6, 100 * seed + number), *tokens(4, 100 * seed + number + 50)]
            rows.append({"input_ids": ids, "labels": [*[-100] * 46, *ids[46:]], "starts": [1, *[0] * 49]})
        return rows

    seen = Seen().add(chats(1))
    assert seen.covers(chats(1)).all() and not seen.covers(chats(2)).any()
    everything = [{**row, "labels": row["input_ids"]} for row in chats(2)]
    assert seen.covers(everything).all(), "of which most is the system prompt"
    nothing = [{**row, "labels": [-100] * 50} for row in chats(2)]
    assert seen.covers(nothing).all()


def test_of_much_text_a_bounded_sample_is_kept_and_shares_stay_right() -> None:
    ids = tokens(600_000, most=30_000)
    seen = Seen().add(packed([ids], 100))
    assert seen.level >= 4 and LIMIT / 2 - 2000 < len(seen.hashes) <= LIMIT
    rows = packed([ids[:100_000] + tokens(100_000, 1, 30_000)], 100)
    covered = seen.covers(rows)
    assert covered[:990].all() and not covered[1010:].any()
    again = Seen()
    for first in range(0, 600_000, 100_000):
        again.merge(Seen().add(packed([ids[first : first + 100_012]], 100_012)))
    assert (again.hashes[:1000] == seen.hashes[:1000]).all()


def test_a_record_does_not_depend_on_the_length_of_a_block() -> None:
    ids = tokens(1200)
    short, long, other = (Seen().add(packed([ids[start:]], size)) for start, size in ((0, 30), (0, 120), (5, 119)))
    assert short.hashes.tolist() == long.hashes.tolist() != other.hashes.tolist()


def test_bytes_need_longer_windows() -> None:
    """Text in single letters shares many runs of 13 letters with other text."""
    assert TextRecord.of_vocabulary(259).trained.window == LONG_WINDOW == 2 * WINDOW
    assert TextRecord.of_vocabulary(512).trained.window == WINDOW


def test_a_record_is_kept_in_a_file_without_pickle(tmp_path: Path) -> None:
    record = TextRecord(Seen().add(packed([tokens(300)], 50)), Seen().add(packed([tokens(300, 1)], 50)))
    record.write(tmp_path)
    found = TextRecord.read(tmp_path)
    assert found is not None and found.trained.hashes.tolist() == record.trained.hashes.tolist()
    assert (
        found.held_out.hashes.tolist() == record.held_out.hashes.tolist() and TextRecord.read(tmp_path / "none") is None
    )
    for change in ({"window": torch.tensor(0)}, {"trained": torch.tensor([3, 1])}, {"trained": torch.zeros(2, 2)}):
        (tmp_path / "broken").mkdir(exist_ok=True)
        save_file({**load_file(tmp_path / RECORD), **change}, tmp_path / "broken" / RECORD)
        with pytest.raises(CheckpointError, match=f"{RECORD}: is damaged .* or delete it"):
            TextRecord.read(tmp_path / "broken")


# -- the record of an adapter ----------------------------------------------------------------------------------------------


def seen_notes(report: dict[str, Any]) -> list[str]:
    return [note for note in report["notes"] if "trained on" in note]


class Words(Letters):
    """`Letters` that can also be asked for text."""

    bos_token_id, unk_token_id = 2, None

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def report_on(model: Any, texts: Any) -> dict[str, Any]:
    return evaluate(model, Words(), texts, context_length=16, prompts=[])


def test_calibration_and_trainer_in_python_leave_a_record(tmp_path: Path) -> None:
    """Through PEFT's own ways to save and to load, and for text that only the trainer read."""
    run = trainer(tmp_path, steps=2)
    calibrate(run.model, batches_of(blocks(8, 5), 4, torch.device("cpu")))
    run.train()
    run.model.save_pretrained(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(random_base("llama", torch.float32), str(tmp_path / "saved"))
    for model in (run.model, loaded):
        record = model.peft_config["default"].text_record
        assert record.trained.covers(blocks(8, 5)).all(), "calibrated on"
        assert record.trained.covers(blocks()).sum() == 8, "trained on: two steps of four blocks"
        assert not record.trained.covers(blocks(8, 9)).any()
    assert seen_notes(report_on(loaded, {"a": blocks(8, 5), "b": blocks(8, 9)})) == [
        "8 of 8 scored blocks of a were trained on"
    ]


def test_an_adapter_without_a_record_says_so(tmp_path: Path) -> None:
    model = converted("llama", torch.float32)
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / RECORD).exists() and seen_notes(report_on(model, blocks(8))) == []
    loaded = PeftModel.from_pretrained(random_base("llama", torch.float32), str(tmp_path))
    assert ["can't be told" in note for note in seen_notes(report_on(loaded, blocks(8)))] == [True]


def test_one_configuration_for_two_models_keeps_their_texts_apart() -> None:
    config, models = NPTConfig(npt_layers=[1], rank=2), []
    for seed in (0, 1):
        model = get_peft_model(random_base("llama", torch.float32), config)
        calibrate(model, batches_of(blocks(8, seed), 4, torch.device("cpu")))
        models.append(model)
    assert not models[1].peft_config["default"].text_record.trained.covers(blocks(8, 0)).any()


def test_joined_adapters_know_all_their_texts(tmp_path: Path) -> None:
    for block in (1, 2):
        model = get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[block], rank=2))
        calibrate(model, batches_of(blocks(8, block), 4, torch.device("cpu")))
        model.save_pretrained(str(tmp_path / str(block)))
    parts = [tmp_path / "1", tmp_path / "2"]
    merge_adapters(parts, tmp_path / "joined")
    record = TextRecord.read(tmp_path / "joined")
    assert record is not None and all(record.trained.covers(blocks(8, block)).all() for block in (1, 2))
    (tmp_path / "2" / RECORD).unlink()
    merge_adapters(parts, tmp_path / "unknown")
    assert TextRecord.read(tmp_path / "unknown") is None, "nobody knows all the text"
    shutil.copy(tmp_path / "joined" / RECORD, tmp_path / "2" / RECORD)


def test_text_of_documents_is_recorded_as_it_is_packed() -> None:
    documents = ["the first text of some length", "a second one that is longer than the first"] * 3
    assert Seen().add(pack(documents, Words(), 16)).covers(pack(documents, Words(), 24)).all()
