"""Names `builtin:...`: models and texts that need no account on a hub. One of the models is fetched on first use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from npt.builtin.fetched import FETCHED, fetch, find_fetched
from npt.common.places import expanded
from npt.errors import DataError, NPTError

PREFIX = "builtin:"
_FOLDER = Path(__file__).parent
#: {name: the folder of the package with its config.json}; of a fetched model, nothing else is in that folder.
MODELS = {f"{PREFIX}tiny": _FOLDER / "tiny", **{name: _FOLDER / name.removeprefix(PREFIX) for name in FETCHED}}


def model_folder(name: str, cache_dir: str | Path | None = None) -> Path:
    """The Hugging Face folder of a builtin model, for `from_pretrained`; fetches the model where it has to be.

    Raises:
        NPTError: no such model, its files are missing from the installation, or it can't be fetched.
    """
    if name in FETCHED:
        return fetch(name, cache_dir)
    folder = config_folder(name)
    if not (folder / "model.safetensors").is_file():
        raise NPTError(f"{name}: its weights are missing from {folder}; reinstall the package")
    return folder


def config_folder(name: str) -> Path:
    """The folder with a builtin model's config.json; nothing is fetched.

    Raises:
        NPTError: no such model.
    """
    if name not in MODELS:
        raise NPTError(f"{name!r}: no such model in the package; there is {', '.join(MODELS)}")
    return MODELS[name]


def source_of(name: str, cache_dir: str | Path | None = None) -> str:
    """The argument of `from_pretrained` for a model's name: the folder of a builtin one, else the name, `~` expanded.

    Args:
        cache_dir: `paths.cache_dir`, where a fetched model is kept.
    """
    return str(model_folder(name, cache_dir)) if name.startswith(PREFIX) else expanded(name)


def source_at_hand(name: str) -> str:
    """The name for libraries that know `from_pretrained` alone: the folder of a builtin model or of a GGUF file, where one is
    there without fetching or converting anything; else the name itself.
    """
    from npt.common.gguf import find_gguf, is_gguf

    found: Path | None = None
    if name in FETCHED:
        found = find_fetched(name)
    elif name in MODELS:
        found = MODELS[name]
    elif is_gguf(name) and Path(name).is_file():
        found = find_gguf(Path(name))
    return name if found is None else str(found)


def name_of(source: str | None) -> str | None:
    """The inverse of `source_of`, for reports: a builtin model's name, a GGUF file's path, else the source itself."""
    from npt.common.gguf import is_gguf
    from npt.common.kept import SOURCE, record_of

    if source is None:
        return None
    kept = str((record_of(source) or {SOURCE: ""})[SOURCE])
    if kept in FETCHED or (is_gguf(kept) and Path(kept).is_absolute()):
        return kept
    return next((name for name, folder in MODELS.items() if str(folder) == source), source)


def recorded_name(source: str | None) -> str | None:
    """A base's name as an adapter's files hold it: the name of a builtin model, the absolute path of a local folder or GGUF
    file, which means the same from any working directory, or the hub id.
    """
    from npt.common.gguf import gguf_in

    name = name_of(source)
    if not name or name.startswith(PREFIX) or not Path(name).exists():
        return name
    return str((gguf_in(Path(name)) or Path(name)).absolute())


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
