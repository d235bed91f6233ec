"""The first tokens of calibration in a temporary file."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch

from npt.equivalence.parts import Part, slices
from npt.equivalence.spill import Spill
from npt.errors import RunError
from npt.planning.counters import AllocationCounter


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
    assert len(spill) == len(found) == 4
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
    spill, part = Spill(), Part(0, torch.ones(4096, 64), torch.ones(4096, 64))
    with AllocationCounter() as counter:
        spill.add(part)
        read = spill.parts()
        total = sum(float(piece.h.sum()) for piece in slices(read))
    assert total == 4096 * 64 and counter.peak < part.h.nbytes / 16


def test_a_full_disk_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("npt.equivalence.spill.tempfile.TemporaryFile", full)
    with pytest.raises(RunError, match="No space left on device.*TMPDIR"):
        Spill().add(Part(0, torch.ones(1, 2), torch.ones(1, 2)))
