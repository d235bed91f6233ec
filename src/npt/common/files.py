"""Files that outlive a killed process, a full disk and a second run on the same folder.

This module is the only one that writes a file atomically: under another name, flushed to the disk and renamed, so that a
reader finds either the old file or the new one. A folder of several files is sealed last, by a list of their sizes and
digests: a folder without a seal was never finished.

    replace_file    one file; the errors of the disk as Python raises them
    write_file      one file; an error of the disk becomes a RunError that says what to do (also text, JSON, tensors)
    append_json     one line of a JSON-lines file
    new_folder      a folder of several files, which appears whole
    replace_files   several files of a folder that is there, each replaced whole
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from npt.common.display import human_bytes
from npt.common.launch import is_first_launched
from npt.errors import NPTError, RunError

if TYPE_CHECKING:
    from torch import Tensor

#: How the name of a file or folder ends while it is written.
PART = ".part"
SEAL = "complete.json"
LOCK = ".lock"
#: The errors of a disk that is full, over a quota, gone, or has become read-only.
DISK_ERRORS = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EIO, errno.EROFS)  # Windows has no quotas
#: The remedy for a command that was stopped by the machine.
AGAIN = "run the command again; npt train goes on with --resume"
#: Disk kept free beside what a save needs.
RESERVE = 16 * 2**20


def replace_file(path: Path, write: Callable[[Path], object], *, shared: bool = False) -> None:
    """Replaces a file by the one that `write` makes at the path it is given.

    Args:
        shared: other processes may write the same file at the same time, so each needs a temporary name of its own.

    Raises:
        OSError, SafetensorError: from `write` or the disk; the old file is as it was.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}{PART}" if shared else path.name + PART)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file by the one that `write` makes at the path it is given.

    Raises:
        RunError: the disk is full or gone; the old file is as it was.
    """
    with disk_errors(path):
        replace_file(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replaces a file by tensors in safetensors' format.

    Raises:
        RunError: the disk is full or gone; the old file is as it was.
    """
    from safetensors.torch import save_file  # here, because it imports torch

    write_file(path, lambda temporary: save_file(dict(tensors), temporary))


def write_text(path: Path, text: str) -> None:
    """Replaces a file by text."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_json(path: Path, value: Any) -> None:
    """Appends one object as a line, flushed to the disk. A line that a killed process left half-written is cut off."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            end = whole_lines(file)
            file.truncate(end)
            try:
                file.write((json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def new_folder(target: Path, fill: Callable[[Path], object], *, again: str = AGAIN) -> None:
    """Makes a folder out of the files that `fill` puts into the one it is given. The folder appears whole, by its last rename.

    Args:
        target: is not there yet, or empty. again: what to do once the disk is well, for the error.

    Raises:
        RunError: the disk is full or gone; there is no `target`.
    """
    with disk_errors(target, again=again), _temporary_folder(target) as temporary:
        fill(temporary)
        for path in (*(p for p in temporary.rglob("*") if p.is_file()), temporary):
            flush(path)
        if target.is_dir():
            target.rmdir()  # Windows can't rename a folder onto one that is there, even if that is empty
        os.replace(temporary, target)
        flush(target.parent)


def replace_files(folder: Path, fill: Callable[[Path], object], *, last: str = ".safetensors") -> None:
    """Replaces files of a folder by those that `fill` puts into the one it is given, each whole. Other files stay.

    Args:
        last: files whose names end so are replaced after all others.

    Raises:
        RunError: the disk is full or gone; where `fill` failed, the folder holds what it held.
    """
    with disk_errors(folder), _temporary_folder(folder) as temporary:
        fill(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda p: p.name.endswith(last)):
            flush(path)
            os.replace(path, folder / path.name)
        flush(folder)


def temporary_name(folder: Path) -> Path:
    """The folder in which `new_folder` and `replace_files` put the files first."""
    return folder.with_name(folder.name + PART)


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, removed at the end if it is still there."""
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def whole_lines(file: BinaryIO) -> int:
    """The offset at which the last whole line of an open binary file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        end = start
    return 0


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leaves the objects of a JSON-lines file that `keep` accepts; half-written lines go too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and keep(row):
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def flush(path: Path) -> None:
    """Sends a file's content, or a folder's names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(folder: Path) -> None:
    """Marks a folder as finished, once all of it is on the disk."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        flush(path)
        found[path.relative_to(folder).as_posix()] = _identity(path)
    write_json(folder / SEAL, found)
    flush(folder.parent)


def is_sealed(folder: Path, *, sizes_only: bool = False) -> bool:
    """True for a folder that was finished and whose files have not changed since.

    Args:
        sizes_only: compare the files' sizes alone, which reads none of them.
    """
    try:
        names = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        # `seal` writes no name that leads out of the folder.
        inside = all(folder.resolve() in (folder / name).resolve().parents for name in names)
        if sizes_only:
            return inside and all((folder / name).stat().st_size == found[0] for name, found in names.items())
        return inside and all(_identity(folder / name) == found for name, found in names.items())
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        return False


def _identity(path: Path) -> list[Any]:
    """[size in bytes, SHA-256] of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
            size += len(part)
    return [size, digest.hexdigest()]


def check_space(folder: Path, needed: int, what: str) -> None:
    """Stops before a save for which the disk has too little room.

    Raises:
        RunError: with what is needed and what is free.
    """
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if needed + RESERVE > free:
        raise RunError(
            f"{folder}: {what} needs {human_bytes(needed)} (and {human_bytes(RESERVE)} to spare) and the disk has "
            f"{human_bytes(free)} free; what was saved before is whole. Make room and {AGAIN}"
        )


@contextmanager
def disk_errors(path: Path, needed: int | None = None, again: str = AGAIN) -> Iterator[None]:
    """Turns an error of the disk into a RunError of one line; safetensors hides the error's number in its text.

    Args:
        needed: bytes the write needs, for the message. again: what to do once the disk is well.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "os error" not in str(error).lower():
            raise
        number = getattr(error, "errno", None)
        full = number in DISK_ERRORS[:2] or "os error 28" in str(error).lower()
        why = "the disk is full" if full else f"can't be written ({getattr(error, 'strerror', None) or error})"
        size = "" if needed is None else f" ({human_bytes(needed)} needed)"
        remedy = "make room" if full else "check the drive and its permissions"
        raise RunError(f"{path}: {why}{size}; what was saved before is whole. Then {remedy} and {again}") from error


@contextmanager
def only_run(*folders: Path) -> Iterator[None]:
    """Locks folders for this process, so that a second run on one of them is refused. The system unlocks them when the process
    ends. Of the processes that torchrun or accelerate launch for one run, the first one locks them.

    Raises:
        NPTError: another run holds one, or it can't be made.
    """
    with ExitStack() as held:
        for folder in dict.fromkeys(folder.resolve() for folder in folders if is_first_launched()):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = FileLock(folder / LOCK, timeout=0)
                held.enter_context(lock)
            except Timeout as error:
                raise NPTError(
                    f"{folder}: another run is writing there; wait for it, stop it, or name another folder in "
                    "paths.output_dir and paths.checkpoint_dir"
                ) from error
            except OSError as error:
                raise NPTError(
                    f"{folder}: can't be written to ({error.strerror or error}); name another folder in "
                    "paths.output_dir and paths.checkpoint_dir"
                ) from error
        yield
