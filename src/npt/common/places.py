"""Names of files and folders, as every part of the package understands them.

A leading `~` or `~user` is a home folder, as in a shell. Shells leave it alone in `--set paths.output_dir=~/runs` and in YAML,
and the libraries differ in whether they expand it. Environment variables stay as they are written. Relative names count from
the working directory.
"""

from __future__ import annotations

import os
from pathlib import Path

from npt.errors import NPTError


def expanded(name: str | Path) -> str:
    """The name with a leading `~` replaced by the home folder; any other name, such as that of a model on a hub, as it is.

    Raises:
        NPTError: there is no home folder for it.
    """
    text = os.fspath(name)
    found = os.path.expanduser(text)
    if found == text and text.startswith("~"):
        user = text.replace("\\", "/").partition("/")[0]
        raise NPTError(
            f"{text}: there is no home folder for {user}; write the whole path, or ./{text} for a name with ~"
        )
    return found


def place(name: str | Path) -> Path:
    """The path that a name stands for (see `expanded`).

    Raises:
        NPTError: it begins with `~`, and there is no home folder for it.
    """
    return Path(expanded(name))
