"""Adapters on disk: finding, checking and loading them. Only safetensors and JSON are ever read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from npt.errors import CheckpointError, ConversionError
from npt.tuner import PEFT_TYPE, NPTConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def resolve_checkpoint(path: str | Path) -> Path:
    """The adapter folder a checkpoint path means; `best_model.pt` means the folder `best_model`.

    Raises:
        CheckpointError: there is no such folder, or it holds no NPT adapter.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.with_suffix("") if path.suffix == ".pt" else path
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {path}: no adapter folder there (pickled .pt files are never read); run `npt train` first, or "
            "name a folder with adapter_config.json"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder}: {name} is missing; name a folder that save_pretrained wrote")
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: {CONFIG} is not a JSON object; restore it from a backup"
        ) from error
    if kind != PEFT_TYPE:
        raise CheckpointError(
            f"checkpoint {folder}: it is a {kind} adapter, not {PEFT_TYPE}; load it with peft instead"
        )
    return folder


def load_adapter(base: Any, path: str | Path, *, allow_other_base: bool = False) -> PeftModel:
    """The base with the adapter at `path` attached, frozen, in eval mode.

    Args:
        allow_other_base: also where the base has the sizes, but not the weights or settings, it was made for.

    Raises:
        CheckpointError: missing, damaged, or made for a base with other blocks or sizes.
    """
    folder = resolve_checkpoint(path)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: {WEIGHTS} is damaged ({error}); restore it from a backup"
        ) from error
    try:
        config = NPTConfig.from_pretrained(str(folder))
        config.allow_other_base = allow_other_base
        model = PeftModel.from_pretrained(base, str(folder), config=config)
    except ConversionError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {folder}: made for a base of other sizes: {_first_line(error)}") from error
    wanted = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    if wanted != shapes:
        odd = sorted(set(wanted.items()) ^ set(shapes.items()))[0]
        raise CheckpointError(
            f"checkpoint {folder}: its weights (blocks {config.npt_layers}) do not fit its config or this "
            f"base, first at {odd[0]} {list(odd[1])}; use the base it was made from"
        )
    return model.eval()


def set_aside(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    """Moves what matches into a new `previous-<n>` folder beside it, so that a new run overwrites nothing."""
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not found:
        return None
    number = 1
    while (target := folder / f"previous-{number}").exists():
        number += 1
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    return target


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
