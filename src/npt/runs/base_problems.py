"""Remedies for a base that can't be loaded, from the library's error and from what lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from npt.common.display import one_line
from npt.common.gguf import is_gguf

#: What a base has to be.
MODEL_FOLDER = "a Hugging Face model folder: config.json, tokenizer and *.safetensors together"
#: Keys of config.json that ask for one implementation of attention.
ATTENTION_KEYS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
#: The first bytes of the text that stands for a file which Git LFS has not fetched.
LFS = b"version https://git-lfs"
_ORIGINAL = "name the Hugging Face model that it was made from"
_VERSION = f"version {transformers.__version__}"


def file_remedy(path: Path) -> str:
    """The remedy where the base is named by a file."""
    if (path.parent / "config.json").is_file():
        return f"name the Hugging Face model folder it lies in: {path.absolute().parent}"
    return f"name {MODEL_FOLDER}, or a GGUF file"


def folder_remedy(folder: Path) -> str:
    """The remedy where the base's folder has no config.json."""
    inside = sorted({path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json")})
    if inside:
        return f"name the folder in it that has one: {one_line(', '.join(map(str, inside[:3])), 300)}"
    if files := sorted(path.name for path in folder.iterdir() if is_gguf(path)):
        return f"it has {len(files)} GGUF files: name the one that is meant, such as {folder / files[0]}"
    return f"name {MODEL_FOLDER}, or a GGUF file"


def local_remedy(folder: Path, error: Exception) -> str:
    """The remedy where a library fails on a folder with a config.json."""
    config, text = _config(folder), str(error)
    attention = next((key for key in ATTENTION_KEYS if config.get(key) is not None), None)
    quantization = config.get("quantization_config")
    if attention is not None and any(word in text for word in ("ttention", "attn_implementation", "kernels")):
        return f"take {attention!r} out of its config.json, or install the attention that it asks for"
    if isinstance(error, ImportError):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method:
            return (
                f"its weights are quantised with {one_line(method, 40)}: install the package for that, or name the model that "
                "they were made from"
            )
        return "install the package that is missing, or name another folder"
    if "does not recognize this architecture" in text:
        return f"correct model_type in its config.json, or upgrade transformers if the model is newer than {_VERSION}"
    if pointers := sorted(path.name for path in folder.iterdir() if path.is_file() and _is_pointer(path)):
        return f"{pointers[0]} stands for a file that Git LFS has not fetched: run `git lfs pull` in the folder"
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            return (
                f"its weights are a pickle ({one_line(pickles[0], 80)}), which npt never reads. Where you trust the file, "
                "write safetensors beside it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        if files := sorted(path for path in folder.iterdir() if is_gguf(path)):
            return f"its weights are in GGUF: name the file, {files[0]}"
    return "restore its config.json, tokenizer and *.safetensors, or name another folder (builtin:tiny needs nothing)"


def gguf_remedy(path: Path, error: Exception) -> str:
    """The remedy where a library fails on a GGUF file."""
    text = str(error)
    if isinstance(error, ImportError):
        return "install the package that is missing"
    if "is not supported" in text or "Unknown gguf" in text:
        return f"transformers {transformers.__version__} reads no GGUF of this architecture: {_ORIGINAL}"
    return f"fetch {path.name} again, or {_ORIGINAL}"


def hub_remedy(error: Exception) -> str:
    """The remedy where a library fails on a name that is no folder."""
    text = str(error)
    if isinstance(error, ImportError):
        return "install the package that is missing, or name another model"
    if "does not recognize this architecture" in text:
        return f"upgrade transformers if the model is newer than {_VERSION}, or name another"
    if "does not appear to have a file named" in text and "safetensors" in text:
        return "it has no weights in safetensors, and pickled ones are never read; name a model that has them"
    return "check the name, the network or `hf auth login`, or give the path of a local folder (builtin:tiny needs nothing)"


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS
