"""The first tokens of calibration, in a temporary file until a block's fit reads them."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import torch
from torch import Tensor

from npt.common.display import human_bytes
from npt.common.files import RESERVE
from npt.equivalence.parts import Part
from npt.errors import RunError

#: Bytes that every tensor begins at a multiple of, so that its numbers lie where any format may begin.
_ALIGNED = 64


class Spill:
    """Parts of the text in a temporary file, which is gone with the process.

    On the meta device nothing is written, and what only the file would hold takes no memory.

    Raises:
        RunError: the disk is full, or no folder takes temporary files or lets them be mapped.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._known: list[Part] = []  # shapes alone

    def add(self, part: Part) -> None:
        """Puts a part behind those before."""
        h, a = (torch.empty(1, 1, dtype=x.dtype, device="meta").expand(x.shape) for x in (part.h, part.a))
        self._known.append(Part(part.start, h, a, part.h.device))
        if not part.h.is_meta:
            with _said():
                self._write(part.h)
                self._write(part.a)

    def parts(self) -> list[Part]:
        """All parts in their order, once. h and a are maps of the file, which take memory only where they are read."""
        data, at = None, 0
        if self._file is not None:
            with _said(), self._file:  # the maps keep it
                data = torch.from_numpy(np.memmap(self._file, np.uint8, "c"))

        def read(x: Tensor, device: torch.device | None) -> Tensor:
            nonlocal at
            if device is not None and device.type == "meta":
                return x
            if data is None or not x.numel():
                return torch.empty(x.shape, dtype=x.dtype)
            start, at = at, at + _whole(_bytes(x))
            return data[start : start + _bytes(x)].view(x.dtype).view(x.shape)

        # Arguments are read from left to right, as they were written.
        return [Part(p.start, read(p.h, p.device), read(p.a, p.device), p.device) for p in self._known]

    def _write(self, x: Tensor) -> None:
        if not x.numel():
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        self._file.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._file.write(bytes(_whole(_bytes(x)) - _bytes(x)))
        self._file.flush()


def check_room(needed: int) -> None:
    """Stops before a calibration whose first tokens find no room.

    Args:
        needed: bytes that the processes of this machine write together.

    Raises:
        RunError: with what is needed and what is free.
    """
    with _said():
        folder = tempfile.gettempdir()
        free = max(0, shutil.disk_usage(folder).free - RESERVE)
    if needed > free:
        raise RunError(
            f"{folder}: calibration keeps {human_bytes(needed)} of its first tokens in temporary files there, and the disk "
            f"has {human_bytes(free)} to spare; make room, let TMPDIR name another folder, or convert fewer blocks"
        )


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"calibration can't keep its first tokens in a temporary file ({error.strerror or error}); make room in "
            f"{tempfile.tempdir or 'the folder of temporary files'}, or let TMPDIR name another folder"
        ) from error


def _bytes(x: Tensor) -> int:
    return x.numel() * x.dtype.itemsize


def _whole(size: int) -> int:
    """So many bytes, and those up to where the next tensor begins."""
    return -(-size // _ALIGNED) * _ALIGNED
