"""Folders that hold an adapter where a base model is wanted: transformers would attach it without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from npt.adapters.folder import CONFIG
from npt.common.display import one_line
from npt.errors import NPTError
from npt.tuner.config import PEFT_TYPE


def refuse_adapter(where: str, folder: Path) -> None:
    """Refuses a folder with an adapter in it, alone or beside a model.

    Args:
        where: the key and value that name the folder.

    Raises:
        NPTError: it has one.
    """
    if not (folder / CONFIG).is_file():
        return
    values = _read(folder / CONFIG)
    kind, base = (one_line(values.get(key) or "unknown", 80) for key in ("peft_type", "base_model_name_or_path"))
    if (folder / "config.json").is_file():
        raise NPTError(
            f"{where}: the folder holds a {kind} adapter ({CONFIG}) beside the model, and which of the two is meant can't be "
            f"told; move {CONFIG} and the adapter's weights to a folder of their own, for the model alone{_or_merge(kind)}"
        )
    if kind == PEFT_TYPE.value:
        raise NPTError(
            f"{where}: is an NPT adapter, not a model; name its base (it was made for {base}), and the adapter with "
            "--checkpoint where a command takes one"
        )
    raise NPTError(
        f"{where}: is a {kind} adapter, not a model; name its base (it was made for {base}){_or_merge(kind)}"
    )


def refuse_attached(where: str, model: Any) -> None:
    """Refuses a model to which transformers has attached an adapter that lay beside its weights.

    Raises:
        NPTError: it has one.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        kinds = sorted({one_line(getattr(c.peft_type, "value", c.peft_type), 40) for c in model.peft_config.values()})
        kind = ", ".join(kinds)
        raise NPTError(
            f"{where}: a {kind} adapter ({CONFIG}) lies beside the model, and which of the two is meant can't be told; name a "
            f"model without one{_or_merge(kind)}"
        )


def _or_merge(kind: str) -> str:
    """The remedy for a model and an adapter together; an NPT adapter can't be merged."""
    if kind == PEFT_TYPE.value:
        return ""
    return (
        ", or merge the adapter into its model with peft, PeftModel.from_pretrained(model, folder).merge_and_unload(), and "
        "name the folder to which model and tokenizer are then saved"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
