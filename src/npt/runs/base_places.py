"""Where a base lies: a builtin model, a GGUF file, a folder, a hub's cache, or a hub."""

from __future__ import annotations

from pathlib import Path

from npt.builtin import PREFIX, config_folder, source_of
from npt.common.gguf import find_gguf, gguf_in, is_gguf, kept_gguf
from npt.common.places import expanded
from npt.config import ModelSection
from npt.errors import NPTError
from npt.runs.base_adapters import refuse_adapter
from npt.runs.base_problems import file_remedy, folder_remedy


def config_place(model: ModelSection, cache_dir: str | None, where: str) -> tuple[str, Path | None]:
    """(argument of `from_pretrained` for a base's configuration, the GGUF file to read it from instead); nothing is fetched.

    Args:
        where: the key and value that name the base, for errors.

    Raises:
        NPTError: a file or folder that is no base.
    """
    name = model.base_model_name
    if name.startswith(PREFIX):
        return str(config_folder(name)), None
    source = expanded(name)
    if (gguf := gguf_named(source)) is not None:
        kept = find_gguf(gguf, cache_dir, model.dtype)
        return str(kept or gguf), None if kept else gguf
    if Path(source).is_file():
        raise NPTError(f"{where}: is a file; {file_remedy(Path(source))}")
    folder = Path(snapshot_of(source))
    refuse_adapter(where, folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise NPTError(f"{where}: the folder has no config.json; {folder_remedy(folder)}")
    return snapshot_of(source), None


def weights_of(model: ModelSection, cache_dir: str | None) -> str:
    """The argument of `from_pretrained` for a base's weights and tokenizer: fetches a builtin model, converts a GGUF file.

    Raises:
        NPTError: that can't be done.
    """
    name = source_of(model.base_model_name, cache_dir)
    gguf = gguf_named(name)
    return snapshot_of(name) if gguf is None else str(kept_gguf(gguf, cache_dir, model.dtype))


def gguf_named(name: str) -> Path | None:
    """The GGUF file that a base's name means: the file itself, or the only one in a folder."""
    path = Path(name)
    return path if is_gguf(path) and path.is_file() else gguf_in(path)


def snapshot_of(name: str) -> str:
    """The snapshot that a hub's cache folder of one model (models--OWNER--NAME) has of its main branch; else the name."""
    folder = Path(name)
    reference = folder / "refs" / "main"
    if not folder.name.startswith("models--") or not reference.is_file():
        return name
    snapshot = folder / "snapshots" / reference.read_text(encoding="utf-8").strip()
    return str(snapshot) if (snapshot / "config.json").is_file() else name
