"""Checks, before any work is done, that the files of a command can be written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from npt.common.places import place
from npt.errors import NPTError


def check_folders(folders: Mapping[str, str | Path]) -> None:
    """Checks that each folder can be written to, or can be made.

    Args:
        folders: {the key or option that a person wrote: folder}.

    Raises:
        NPTError: names the first that is not.
    """
    for name, folder in folders.items():
        _check_folder(f"{name}={folder}", place(folder))


def check_file(name: str, path: Path, *kinds: str) -> None:
    """Checks that a file of one of these suffixes can be written at `path`.

    Raises:
        NPTError: another suffix, a folder is there, or its own folder can't be made or written to.
    """
    path = place(path)
    if path.suffix.lower() not in kinds:
        raise NPTError(f"{name} {path}: can't be written as '{path.suffix}'; end the name in {', '.join(kinds)}")
    if path.is_dir():
        raise NPTError(f"{name} {path}: is a folder; name a file in it")
    _check_folder(f"{name} {path}", path.parent)


def _check_folder(place: str, folder: Path) -> None:
    try:
        there = next(part for part in (folder, *folder.parents) if part.exists())
    except OSError as error:
        raise NPTError(f"{place}: can't be made ({error.strerror}); name another folder") from error
    if not there.is_dir():
        raise NPTError(f"{place}: can't be made, {there} is a file; name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise NPTError(f"{place}: {there} can't be written to; change its permissions or name another folder")
