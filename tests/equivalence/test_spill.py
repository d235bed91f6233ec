"""The first tokens of calibration in a temporary file."""

from __future__ import annotations

import errno
import shutil
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from npt import NPTConfig, calibrate
from npt.common.files import RESERVE
from npt.equivalence.block_fit import PROBE_TOKENS
from npt.equivalence.calibration import check_calibration_room
from npt.equivalence.parts import Part, slices
from npt.equivalence.spill import Spill
from npt.errors import RunError
from npt.planning.counters import AllocationCounter
from tests.helpers import converted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parts_come_back_as_they_went_in(dtype: torch.dtype) -> None:
    spill, generator = Spill(), torch.Generator().manual_seed(0)
    parts = [
        Part(start, *(torch.randn(count, 5, generator=generator).to(dtype) for _ in range(2)))
        for start, count in ((0, 3), (3, 0), (3, 7), (10, 1))
    ]
    for part in parts:
        spill.add(part._replace(h=part.h.T.contiguous().T))  # however it lies in memory
    found = spill.parts()
    assert len(found) == 4
    for part, read in zip(parts, found, strict=True):
        assert read.start == part.start and read.h.dtype == dtype
        assert torch.equal(read.h, part.h) and torch.equal(read.a, part.a)
    assert [len(part.h) for part in slices(found)] == [3, 0, 7, 1]


def test_formats_of_h_and_a_may_differ() -> None:
    spill, h, a = Spill(), torch.randn(3, 1).bfloat16(), torch.randn(3, 1).double()
    spill.add(Part(0, h, a))
    spill.add(Part(3, h + 1, a + 1))
    read = spill.parts()[1]
    assert torch.equal(read.h, h + 1) and torch.equal(read.a, a + 1)


def test_parts_without_a_token_need_no_file() -> None:
    spill = Spill()
    spill.add(Part(0, torch.ones(0, 4), torch.ones(0, 4)))
    (read,) = spill.parts()
    assert read.h.shape == (0, 4) and not read.h.is_meta


def test_what_is_on_disk_takes_no_memory() -> None:
    spill, total = Spill(), 0.0
    with AllocationCounter() as counter:
        for number in range(16):
            spill.add(Part(256 * number, torch.ones(256, 64), torch.ones(256, 64)))
        for piece in slices(spill.parts()):
            total += float(piece.h.sum() + piece.a.sum())
    assert total == 2 * 4096 * 64 and counter.peak < 2 * 4096 * 64 * 4 / 4


def test_more_blocks_add_their_sums_and_their_probes_to_a_calibration_alone() -> None:
    shape = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=8, num_attention_heads=2, vocab_size=64, pad_token_id=0
    )  # fmt: skip
    ids = torch.randint(3, 64, (32, 128), generator=torch.Generator().manual_seed(0))
    peaks = []
    for blocks in ([7], [4, 5, 6, 7]):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(shape), NPTConfig(npt_layers=blocks, gain_units=0))
        with AllocationCounter() as counter:
            calibrate(model, [{"input_ids": part} for part in ids.split(4)], chunk_tokens=4096)
        peaks.append(counter.peak)
    h_and_a, sums, probe = 2 * 4096 * 64 * 4, 2 * 64 * 64 * 8, 3 * PROBE_TOKENS * 64 * 4
    assert peaks[1] - peaks[0] < 3 * (sums + probe) + h_and_a / 4


def test_a_full_disk_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("npt.equivalence.spill.tempfile.TemporaryFile", full)
    with pytest.raises(RunError, match="No space left on device.*TMPDIR"):
        Spill().add(Part(0, torch.ones(1, 2), torch.ones(1, 2)))


def test_a_small_disk_stops_before_any_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked for is what is written: the first tokens, and the whole of the batch that the last of them lies in."""
    model, sizes, write = converted("llama", npt_layers=[0, 1, 3]), [], Spill._write

    def counted(spill: Spill, x: torch.Tensor) -> None:
        sizes.append(x.numel() * x.dtype.itemsize)
        write(spill, x)

    monkeypatch.setattr(Spill, "_write", counted)
    monkeypatch.setattr("npt.equivalence.block_fit.CHUNK_TOKENS", 97)
    monkeypatch.setattr("npt.equivalence.block_fit.UNIT_BYTES", 0)
    calibrate(model, [{"input_ids": torch.randint(3, 96, (4, 16))} for _ in range(4)])
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=RESERVE + sum(sizes)))
    assert sum(sizes) == 3 * 2 * 128 * 24 * 8
    check_calibration_room(model, 4 * 64, 128 - 97)
    check_calibration_room(model, 128, 64)  # no longer than the text
    with pytest.raises(RunError, match="disk has .* KiB to spare.*TMPDIR.*fewer blocks"):
        check_calibration_room(model, 4 * 64, 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr("npt.equivalence.calibration.world", lambda: (0, 2))
    check_calibration_room(model, 4 * 64, 64)
