"""Folders that are made once and kept for every later run: where they lie, and how they become whole.

A kept folder has a record of what it was made from, is sealed and appears by a rename, so that a process that was killed half
way leaves nothing that a later one takes for whole. A lock makes processes that want the same folder at once take turns.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from npt.common.display import human_bytes
from npt.common.files import LOCK, RESERVE, is_sealed, new_folder, seal, write_json
from npt.common.places import place
from npt.errors import NPTError

#: The file of a kept folder that holds its record.
RECORD = "npt_source.json"
#: The key of a record that names what the folder stands for.
SOURCE = "source"
_ELSEWHERE = (
    "set paths.cache_dir, or the environment variable NPT_CACHE, to a folder on a disk that has room and can be written"
)

logger = logging.getLogger(__name__)


def kept_models(cache_dir: str | Path | None = None) -> list[Path]:
    """The folders in which kept models are looked for; a new one goes to the first.

    `npt_models` in `cache_dir` where that is given, then `models` in $NPT_CACHE, else in $XDG_CACHE_HOME/npt, else in
    ~/.cache/npt.
    """
    own = os.environ.get("NPT_CACHE")
    user = place(own) if own else place(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "npt"
    return [*([] if cache_dir is None else [place(cache_dir) / "npt_models"]), user / "models"]


def find_kept(name: str, record: Mapping[str, Any], cache_dir: str | Path | None = None) -> Path | None:
    """The whole folder of that name and record, if there is one."""
    folders = [parent / name for parent in kept_models(cache_dir)]
    return next(
        (folder for folder in folders if record_of(folder) == record and is_sealed(folder, sizes_only=True)), None
    )


def record_of(folder: str | Path) -> dict[str, Any] | None:
    """The record of a kept folder; None for anything else."""
    try:
        found = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get(SOURCE), str) else None


def keep(
    name: str,
    record: Mapping[str, Any],
    fill: Callable[[Path], object],
    *,
    needed: int,
    cache_dir: str | Path | None = None,
) -> Path:
    """The kept folder of that name and record, made if it isn't there; one of another record is replaced.

    Args:
        record: JSON, with a `SOURCE`. fill: puts the files into the folder it is given. needed: bytes of disk that takes.

    Raises:
        NPTError: no folder for it can be written, or its disk is too full.
        RunError: the disk became full or read-only on the way.
    """
    if (found := find_kept(name, record, cache_dir)) is not None:
        return found
    parent = kept_models(cache_dir)[0]
    target = parent / name
    lock = FileLock(parent / (name + LOCK))
    try:
        parent.mkdir(parents=True, exist_ok=True)
        take_turns(lock, target)
    except OSError as error:
        raise NPTError(f"{parent}: can't be written to ({error.strerror or error}); {_ELSEWHERE}") from error
    try:
        if (found := find_kept(name, record, cache_dir)) is None:
            _check_room(parent, needed, record)
            shutil.rmtree(target, ignore_errors=True)
            new_folder(
                target, lambda folder: _sealed(folder, record, fill), again=f"run the command again, or {_ELSEWHERE}"
            )
    finally:
        lock.release()
    return found or target


def _sealed(folder: Path, record: Mapping[str, Any], fill: Callable[[Path], object]) -> None:
    fill(folder)
    write_json(folder / RECORD, dict(record))
    mode = (folder / RECORD).stat().st_mode  # safetensors gives its files to their owner alone
    for path in folder.iterdir():
        path.chmod(mode)
    seal(folder)


def take_turns(lock: FileLock, target: Path) -> None:
    """Acquires a lock, and says so where another process holds it for longer than a moment."""
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=2)
        return
    logger.info("waiting for another process that is making %s", target)
    lock.acquire()


def _check_room(parent: Path, needed: int, record: Mapping[str, Any]) -> None:
    free = shutil.disk_usage(parent).free
    if needed + RESERVE > free:
        raise NPTError(
            f"{record[SOURCE]}: takes {human_bytes(needed)} in {parent}, whose disk has {human_bytes(free)} free; make room, "
            f"or {_ELSEWHERE}"
        )
