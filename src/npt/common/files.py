"""Files that outlive a killed process, a full disk and a second run on the same folder.

A file is written under another name, flushed to the disk and renamed, so that it is either the old one or the new one. A
folder of several files is sealed last, by a list of their sizes and digests: what has no seal was never finished.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from npt.common.display import human_bytes
from npt.errors import NPTError, RunError

PART = ".part"
SEAL = "complete.json"
LOCK = ".lock"
#: What a disk does to a write, wherever it happens: it is full, over a quota, gone, or has become read-only.
DISK_ERRORS = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EIO, errno.EROFS)  # Windows has no quotas
#: Disk kept free beside what a save needs.
RESERVE = 16 * 2**20


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file by what `write` puts at the path it is given.

    Raises:
        RunError: the disk is full or gone; the old file is as it was.
    """
    temporary = path.with_name(path.name + PART)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)


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


def whole_lines(file: Any) -> int:
    """Where the last whole line of an open binary file ends."""
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


def is_sealed(folder: Path) -> bool:
    """Whether a folder was finished and every file in it is what it was then."""
    try:
        names = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        # A name that leads out of the folder is no name `seal` wrote.
        inside = all(folder.resolve() in (folder / name).resolve().parents for name in names)
        return inside and all(_identity(folder / name) == found for name, found in names.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _identity(path: Path) -> list[Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
            size += len(part)
    return [size, digest.hexdigest()]


def check_space(folder: Path, needed: int, what: str) -> None:
    """Stops before a save that the disk can't take.

    Raises:
        RunError: with what is needed and what is free.
    """
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if needed + RESERVE > free:
        raise RunError(
            f"{folder}: {what} needs {human_bytes(needed)} (and {human_bytes(RESERVE)} to spare) and the disk has "
            f"{human_bytes(free)} free; what was saved before is whole. Make room and go on with --resume"
        )


@contextmanager
def disk_errors(path: Path, needed: int | None = None, again: str = "go on with --resume") -> Iterator[None]:
    """Turns what a disk can do to a write into one line; safetensors hides the number of the error in its text.

    again: what to do once the disk is well.
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
    """Holds folders for this process: a second run on one of them is refused. The system lets go when the process ends.

    Of the processes that torchrun or accelerate launch for one run, the first one holds them.

    Raises:
        NPTError: another run holds one, or it can't be made.
    """
    with ExitStack() as held:
        first = os.environ.get("RANK", "0") == "0"
        for folder in dict.fromkeys(folder.resolve() for folder in folders if first):
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
