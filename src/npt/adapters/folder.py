"""Adapters on disk: finding, checking and loading them. Only safetensors and JSON are ever read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open

from npt.common.display import one_line
from npt.common.fingerprint import is_record
from npt.common.places import place
from npt.config import option_problems
from npt.config.strict_yaml import MAX_BYTES
from npt.errors import CheckpointError, ConversionError
from npt.tuner.config import FORMAT_VERSION, OPTIONS, PEFT_TYPE, UPGRADE, NPTConfig
from npt.tuner.state import embedding_names

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: The run configuration an adapter was trained with, beside it in its folder.
RUN_CONFIG = "npt_run.yaml"


def resolve_checkpoint(path: str | Path) -> Path:
    """The adapter folder a checkpoint path means, with its weights read once and found finite.

    Raises:
        CheckpointError: as `find_adapter`; weights that are damaged or not finite.
    """
    folder = find_adapter(path)
    _header(folder)
    return folder


def find_adapter(path: str | Path) -> Path:
    """The adapter folder a checkpoint path means; `best_model.pt` means the folder `best_model`.

    Raises:
        CheckpointError: there is no such folder, or it holds no NPT adapter.
    """
    path = place(path)
    folder = path if path.is_dir() else path.with_suffix("") if path.suffix == ".pt" else path
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {path}: no adapter folder there (pickled .pt files are never read); run `npt train` first, or "
            "name a folder with adapter_config.json"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"checkpoint {folder}: {name} is missing (pickled weights are never read); {_adapters_in(folder)}"
            )
    _check_config(folder)
    return folder


def _adapters_in(folder: Path) -> str:
    """The remedy where a folder that is named as an adapter is none."""
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if inside:
        best = [path for path in inside if path.name == "best_model"]
        return f"name the adapter in it: {one_line((best or inside)[0], 200)}"
    if (folder / "config.json").is_file():
        return "it is a whole model: name it in model.base_model_name, and here the folder of an adapter for it"
    return "name a folder that save_pretrained wrote for an adapter"


def _check_config(folder: Path) -> None:
    """Checks adapter_config.json before PEFT reads it: PEFT drops, or fails on, values it does not expect."""
    place = f"checkpoint {folder}: {CONFIG}"
    try:
        with (folder / CONFIG).open("rb") as file:
            values = json.loads(file.read(MAX_BYTES + 1).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{place} is not a JSON object ({one_line(error, 80)}); restore it from a backup"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{place} is not a JSON object but {type(values).__name__}; restore it from a backup")
    if values.get("peft_type") != PEFT_TYPE:
        kind = one_line(values.get("peft_type"), 40)
        raise CheckpointError(
            f"checkpoint {folder}: it is a {kind} adapter, not {PEFT_TYPE.value}; load it with peft instead"
        )
    version = values.get("format_version", FORMAT_VERSION)
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{place}: format_version={version!r}: the adapter was written by a newer npt, this one reads up to "
            f"{FORMAT_VERSION}; {UPGRADE}"
        )
    problems = option_problems({name: values[name] for name in OPTIONS if name in values})
    shape = values.get("base_shape")
    if shape is not None and not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int for n in shape)):
        problems.append(f"base_shape: {one_line(shape, 80)}: use three whole numbers")
    base = values.get("base_model_name_or_path")
    if type(version) is not int:
        problems.append(f"format_version: {one_line(version, 80)}: use a whole number")
    if not isinstance(base, str | None):
        problems.append(f"base_model_name_or_path: {one_line(base, 80)}: use text")
    if not (values.get("base_fingerprint") is None or is_record(values["base_fingerprint"])):
        shown = one_line(repr(values["base_fingerprint"]), 40)
        problems.append(f"base_fingerprint={shown}: npt writes it itself")
    if problems:
        raise CheckpointError(f"{place}: {'; '.join(problems)}; restore it from a backup")


def _header(folder: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the adapter's weights; refuses any that are not finite."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {}
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                shapes[key] = tuple(tensor.shape)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise CheckpointError(
                        f"checkpoint {folder}: {WEIGHTS} holds NaN or infinity in {key}; take an earlier checkpoint"
                    )
    except (SafetensorError, OSError) as error:
        reason = one_line(error, 120)
        raise CheckpointError(
            f"checkpoint {folder}: {WEIGHTS} is damaged ({reason}); restore it from a backup"
        ) from error
    return shapes


def load_adapter(base: Any, path: str | Path, *, allow_other_base: bool = False) -> PeftModel:
    """The base with the adapter at `path` attached, frozen, in eval mode.

    Args:
        allow_other_base: also where the base has the sizes, but not the weights or settings, it was made for.

    Raises:
        CheckpointError: missing, damaged, or made for a base with other blocks or sizes.
    """
    folder = resolve_checkpoint(path)
    shapes = _header(folder)
    rows, wanted = base.get_input_embeddings().weight.shape[0], _rows(base, shapes)
    try:
        config = NPTConfig.from_pretrained(str(folder))
        config.allow_other_base = allow_other_base
        if wanted not in (None, rows):
            logger.warning(
                "the adapter brings embeddings for %d tokens and its base has %d: the base is resized; npt's commands read "
                "text with the base's own tokenizer, which makes no use of the others", wanted, rows,
            )  # fmt: skip
            base.resize_token_embeddings(wanted, mean_resizing=False)
        return PeftModel.from_pretrained(base, str(folder), config=config).eval()
    except BaseException as error:
        if base.get_input_embeddings().weight.shape[0] != rows:
            base.resize_token_embeddings(rows, mean_resizing=False)
        if isinstance(error, ConversionError | CheckpointError):
            raise CheckpointError(f"checkpoint {folder}: {error}") from error
        raise


def _rows(base: Any, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """The number of embeddings that the adapter's file holds, whose values come with it; None where it holds none."""
    found = {shapes[name][0] for name in embedding_names(base) & set(shapes) if len(shapes[name]) == 2}
    return found.pop() if len(found) == 1 else None
