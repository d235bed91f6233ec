"""An entry of the catalogue, and how entries of each kind are made."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Kit:
    """What entries start from, made once."""

    model: Path
    adapter: Path


@dataclass(frozen=True)
class Entry:
    """A command line, the files it needs, and words of the line that must come out."""

    name: str
    arguments: tuple[str, ...]
    words: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    prepare: Callable[[Path, Kit], None] | None = None
    #: Also run as a command of its own.
    script: bool = False


def sets(*overrides: str) -> tuple[str, ...]:
    return tuple(word for override in overrides for word in ("--set", override))


def bad_file(name: str, content: str | bytes, *words: str, place: str = "c.yaml", script: bool = False) -> Entry:
    """A configuration file."""
    data = content.encode() if isinstance(content, str) else content
    return Entry(f"config: {name}", ("train", "--config", "c.yaml"), (place, *words), {"c.yaml": data}, script=script)


def bad_key(override: str, *words: str, name: str = "") -> Entry:
    """One override."""
    return Entry(f"override: {name or override}", ("train", *sets(override)), words)


def bad_choice(override: str, *words: str) -> Entry:
    """One override beside blocks that are to be chosen."""
    return Entry(f"override: auto, {override}", ("train", *sets("model.npt_layers=auto", override)), words)


def bad_data(name: str, content: bytes, *words: str, more: tuple[str, ...] = (), script: bool = False) -> Entry:
    """A text file to train on."""
    overrides = sets("data.dataset_name=text", f"data.data_files=[{name}]", "model.base_model_name={model}", *more)
    return Entry(f"data: {name}", ("train", *overrides), (name, *words), {name: content}, script=script)


def bad_chat(name: str, value: Any, *words: str, more: tuple[str, ...] = ()) -> Entry:
    """A chat to train on, `messages` of the second line of a file; the first is a good one."""
    good = {"messages": [{"role": "user", "content": "hi"}]}
    content = "".join(json.dumps(row) + "\n" for row in (good, {"messages": value}))
    file = f"{name.replace(' ', '-')}.jsonl"
    return bad_data(file, content.encode(), "line 2, column 'messages'", *words, more=more)


def bad_base(name: str, change: Callable[[Path], None], *words: str, script: bool = False) -> Entry:
    """A copy of the working base model with something wrong."""

    def prepare(folder: Path, kit: Kit) -> None:
        shutil.copytree(kit.model, folder / "base")
        change(folder / "base")

    arguments = ("train", *sets("model.base_model_name=base", "data.eval_texts=[]"))
    return Entry(f"base: {name}", arguments, ("model.base_model_name=", *words), prepare=prepare, script=script)


def bad_adapter(name: str, change: Callable[[Path], None], *words: str, script: bool = False) -> Entry:
    """A copy of the working adapter with something wrong."""

    def prepare(folder: Path, kit: Kit) -> None:
        shutil.copytree(kit.adapter, folder / "adapter")
        change(folder / "adapter")

    arguments = ("generate", "hello", "--checkpoint", "adapter", *sets("model.base_model_name={model}"))
    return Entry(f"adapter: {name}", arguments, ("checkpoint adapter", *words), prepare=prepare, script=script)


def bad_run(name: str, command: str, files: dict[str, bytes], *words: str) -> Entry:
    """The output folder of a run, given to one of the commands that show it."""
    return Entry(
        f"{command.split()[0]}: {name}", ("--quiet", *command.split()), words, {f"run/{k}": v for k, v in files.items()}
    )


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def json_of(file: str, **changes: Any) -> Callable[[Path], None]:
    """Other values in a JSON file; ... removes a key."""

    def change(folder: Path) -> None:
        values = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    return change


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def remove(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size]) and None


def tensors(file: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Other tensors in a safetensors file."""

    def change(folder: Path) -> None:
        values = load_file(folder / file)
        edit(values)
        save_file({k: v.contiguous() for k, v in values.items()}, folder / file, {"format": "pt"})

    return change


def pickled(file: str) -> Callable[[Path], None]:
    """Weights as a pickle that would leave a file behind if anything ran it."""

    class Trap:
        def __reduce__(self) -> Any:
            return (open, ("pickle_was_run", "w"))

    def change(folder: Path) -> None:
        torch.save({"w": Trap()}, folder / file)

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes] and None
