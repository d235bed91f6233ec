"""What the fuzzers call: bytes in, nothing out but NPTError. The test suite replays the corpus through it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from npt.common.display import visible
from npt.config import RunConfig, load_config, save_config
from npt.data.chats import Chat
from npt.data.sources import TextFiles
from npt.errors import ConfigError, DataError

#: By the first byte of an input, so that one corpus reaches every reader.
KINDS = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".tsv", ".jsonl.gz", ".csv.zst")
_FOLDER = tempfile.TemporaryDirectory(prefix="npt-fuzz-")


def config(data: bytes) -> None:
    """A configuration file, then the same bytes as an override's value and as a whole override.

    Raises:
        AssertionError: an error of several lines, or a configuration that does not survive being saved.
    """
    path = Path(_FOLDER.name) / "c.yaml"
    path.write_bytes(data)
    text = data.decode("utf-8", "surrogateescape")
    key = list(RunConfig.model_fields)[len(data) % len(RunConfig.model_fields)]
    leaf = list(getattr(RunConfig(), key).__class__.model_fields)
    for source, overrides in ((path, []), (None, [f"{key}.{leaf[sum(data) % len(leaf)]}={text}"]), (None, [text])):
        try:
            found = load_config(source, overrides)
        except ConfigError as error:
            _one_line(error)
            continue
        save_config(found, path.with_name("saved.yaml"))
        if load_config(path.with_name("saved.yaml")) != found:
            raise AssertionError(f"{found!r} is read back as another configuration")


def data(data: bytes) -> None:
    """The text files of one kind: the first byte chooses it, the rest is the file.

    Raises:
        AssertionError: an error of several lines, or a document that can't be tokenised.
    """
    path = Path(_FOLDER.name) / f"text{KINDS[data[0] % len(KINDS)] if data else KINDS[0]}"
    path.write_bytes(data[1:])
    try:
        for document in TextFiles([path]):
            if isinstance(document, str) and not document.strip():
                raise AssertionError("a blank document")
            _ = document.content() if isinstance(document, Chat) else document.encode("utf-8")
    except DataError as error:
        _one_line(error)


def _one_line(error: Exception) -> None:
    if visible(error) != str(error) or str(error).splitlines() != [str(error)]:
        raise AssertionError(f"not one line: {error!r}")
