"""Names `builtin:...`: a small model that comes with the package, and a text that comes with Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from npt.common.places import expanded
from npt.errors import DataError, NPTError

PREFIX = "builtin:"
_FOLDER = Path(__file__).parent
MODELS = {f"{PREFIX}tiny": _FOLDER / "tiny"}


def model_folder(name: str) -> Path:
    """The Hugging Face folder of a model that comes with the package, for `from_pretrained`.

    Raises:
        NPTError: no such model, or its files are missing from the installation.
    """
    if name not in MODELS:
        raise NPTError(f"{name!r}: no such model in the package; there is {', '.join(MODELS)}")
    folder = MODELS[name]
    if not (folder / "model.safetensors").is_file():
        raise NPTError(f"{name}: its weights are missing from {folder}; reinstall the package")
    return folder


def source_of(name: str) -> str:
    """The argument of `from_pretrained` for a model's name: the folder of a builtin one, else the name, `~` expanded."""
    return str(model_folder(name)) if name.startswith(PREFIX) else expanded(name)


def name_of(source: str | None) -> str | None:
    """The inverse of `source_of`, for reports."""
    return next((name for name, folder in MODELS.items() if str(folder) == source), source)


def recorded_name(source: str | None) -> str | None:
    """A base's name as an adapter's files hold it: the name of a builtin model, the absolute path of a local folder, which
    means the same from any working directory, or the hub id.
    """
    name = name_of(source)
    return str(Path(name).absolute()) if name and not name.startswith(PREFIX) and Path(name).is_dir() else name


def documents(name: str) -> list[str]:
    """The documents of a text that needs no download.

    Raises:
        DataError: no such text, or this Python was installed without it.
    """
    if name not in TEXTS:
        raise DataError(f"{name!r}: no such text in the package; there is {', '.join(TEXTS)}")
    return TEXTS[name]()


def _python_docs() -> list[str]:
    """Python's language reference by topic: about 450,000 characters, which differ a little between versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"{PREFIX}python-docs: this Python was installed without pydoc_data; take it out of data.eval_texts "
            "(--set 'data.eval_texts=[]'), or name a text file"
        ) from error
    return [topics[name] for name in sorted(topics)]


TEXTS: dict[str, Callable[[], list[str]]] = {f"{PREFIX}python-docs": _python_docs}
