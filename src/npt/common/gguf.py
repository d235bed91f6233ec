"""GGUF files, the format of llama.cpp, as Hugging Face model folders: transformers reads and dequantises them, once.

header_of        what decides how a file is read, without its weights
config_of        the model's configuration, without its weights
kept_gguf        the folder with safetensors and tokenizer that is kept for a file
write_model      the same folder, wherever the caller wants it
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from npt.common.display import one_line
from npt.common.kept import SOURCE, find_kept, keep
from npt.errors import NPTError

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
#: Values of tokenizer.ggml.pre, as llama.cpp's llama-vocab.cpp lists them: each digit is a piece of its own, then GPT-2's way.
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
#: The same, GPT-2's way alone.
_GPT2 = ("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "olmo", "jais",
         "trillion", "granite-docling", "mpt")  # fmt: skip
_HALF = ("float16", "bfloat16")
_LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class GGUFError(NPTError):
    """A GGUF file that can't be read as the model it is."""


@dataclass(frozen=True)
class Header:
    """The facts of a GGUF file that decide how it is read.

    architecture: general.architecture. parameters: numbers in all tensors. dtype: what the weights are kept in, float32 for
    quantised ones: dequantised values have more digits than a half-precision format. splitting: tokenizer.ggml.pre.
    vocabulary: tokens of the file.
    rope_factors: divisors of the rotary frequencies (Llama 3.1 and later), none for most.
    """

    architecture: str
    parameters: int
    dtype: str
    splitting: str | None
    vocabulary: int
    rope_factors: tuple[float, ...]


def is_gguf(path: str | Path) -> bool:
    """True for the name of a GGUF file."""
    return Path(path).suffix.lower() == SUFFIX


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that has one and no model of Hugging Face's."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return None
    found = [path for path in folder.iterdir() if is_gguf(path) and path.is_file()]
    return found[0] if len(found) == 1 else None


def header_of(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        GGUFError: it is damaged, or scales its rotary embedding in a way that transformers does not read.
    """
    found = path.stat()
    return _header(str(path), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=8)
def _header(name: str, size: int, changed: int) -> Header:
    from gguf import GGUFReader  # here, because a vocabulary takes seconds to read

    try:
        reader = GGUFReader(name)
        architecture = str(_value(reader, "general.architecture"))
        types = {tensor.tensor_type.name for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, TypeError, OSError, OverflowError) as error:
        raise GGUFError(
            f"{name}: is no whole GGUF file ({type(error).__name__}: {one_line(error, 120)}); fetch it again"
        ) from error
    named = {tensor.name: tensor for tensor in reader.tensors}
    scaling = _value(reader, f"{architecture}.rope.scaling.type")
    unread = sorted(key for key in named if key.startswith("rope_factors"))
    if unread or scaling not in (None, "none"):
        raise GGUFError(
            f"{name}: scales its rotary embedding ({unread[0] if unread else scaling}), which transformers does not read from "
            "a GGUF file; name the Hugging Face model that it was made from"
        )
    factors = named.get("rope_freqs.weight")
    tokens = reader.get_field("tokenizer.ggml.tokens")
    half = (
        {"F16": "float16", "BF16": "bfloat16"}.get(next(iter(types - {"F32"}), ""))
        if len(types - {"F32"}) == 1
        else None
    )
    return Header(
        architecture=architecture,
        parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        dtype=half or "float32",
        splitting=_value(reader, "tokenizer.ggml.pre"),
        vocabulary=0 if tokens is None else len(tokens.data),
        rope_factors=() if factors is None else tuple(np.asarray(factors.data, dtype=np.float32).tolist()),
    )


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def config_of(path: Path) -> Any:
    """The transformers configuration that a GGUF file describes; no weights are read.

    Raises:
        GGUFError: see `header_of`. ValueError: transformers does not know the architecture.
    """
    from transformers import AutoConfig

    header = header_of(path)  # its errors say more
    return _completed(AutoConfig.from_pretrained(path.parent, gguf_file=path.name), header, path)


def _completed(config: Any, header: Header, path: Path) -> Any:
    """A copy of the configuration with what transformers leaves out of it, and without what it says about the file."""
    import torch

    config = copy.deepcopy(config)
    config.name_or_path, config.dtype = "", getattr(torch, header.dtype)
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    if header.rope_factors:
        config.rope_parameters = _llama3_rope(config, header.rope_factors, path)
    return config


def _llama3_rope(config: Any, factors: tuple[float, ...], path: Path) -> dict[str, Any]:
    """The rope_parameters whose frequencies are the plain ones divided by `factors`.

    Raises:
        GGUFError: Llama 3's rule gives none such.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = dict(config.rope_parameters)
    for original in (8192, 4096, 16384, 32768):
        scaled = {
            **plain,
            **_LLAMA3_ROPE,
            "factor": round(float(max(factors)), 3),
            "original_max_position_embeddings": original,
        }
        tried = copy.deepcopy(config)
        tried.rope_parameters = scaled
        frequencies = ROPE_INIT_FUNCTIONS["llama3"](tried, "cpu")[0].double().numpy()
        steps = np.arange(0, 2 * len(frequencies), 2) / (2 * len(frequencies))
        expected = plain["rope_theta"] ** -steps / frequencies
        if len(factors) == len(expected) and np.allclose(expected, factors, rtol=1e-3):
            return scaled
    raise GGUFError(
        f"{path}: scales its rotary embedding by factors (rope_freqs.weight) that are not those of Llama 3; name the Hugging "
        "Face model that it was made from"
    )


def kept_gguf(path: Path, cache_dir: str | Path | None = None, dtype: str = "auto") -> Path:
    """The Hugging Face folder that is kept for a GGUF file, written if the file is new or has changed.

    Args:
        dtype: bfloat16 or float16 keeps a file of float32 or of quantised weights in that; it takes half the disk.

    Raises:
        GGUFError: see `header_of`. NPTError: see `npt.common.kept.keep`. ValueError: see `config_of`.
    """
    if (found := find_gguf(path, cache_dir, dtype)) is not None:
        return found
    header = header_of(path)
    kept = dtype if dtype in _HALF and header.dtype == "float32" else header.dtype
    name, record = _identity(path, kept if kept != header.dtype else "auto")
    needed = header.parameters * (2 if kept in _HALF else 4)
    logger.info("writing %s as safetensors in %s, once", path, kept)
    return keep(name, record, lambda folder: write_model(path, folder, kept), needed=needed, cache_dir=cache_dir)


def find_gguf(path: Path, cache_dir: str | Path | None = None, dtype: str = "auto") -> Path | None:
    """The folder that is already kept for a GGUF file as it is now, in `dtype` or in the file's own."""
    for kept in dict.fromkeys((dtype if dtype in _HALF else "auto", "auto")):
        name, record = _identity(path, kept)
        if (found := find_kept(name, record, cache_dir)) is not None:
            return found
    return None


def _identity(path: Path, dtype: str) -> tuple[str, dict[str, Any]]:
    """(name, record) of a kept folder: the file's place decides its name; size and time tell if it is still that file's."""
    place, found = path.absolute(), path.stat()
    stem = re.sub(r"[^\w.-]+", "_", path.stem)[:60]
    digest = hashlib.sha256(str(place).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    record = {SOURCE: str(place), "size": found.st_size, "changed": found.st_mtime_ns, "dtype": dtype}
    return "-".join((stem, digest, *((dtype,) if dtype != "auto" else ()))), record


def write_model(path: Path, folder: Path, dtype: str) -> None:
    """Writes the model of a GGUF file into a folder: config.json, generation_config.json, safetensors and tokenizer.

    Raises:
        GGUFError: see `header_of`; or tensors are missing. ValueError: transformers does not know the architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    header = header_of(path)
    with _no_bar_in_a_file():
        loaded, found = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=getattr(torch, dtype), output_loading_info=True
        )
    if found["missing_keys"]:
        raise GGUFError(
            f"{path}: {len(found['missing_keys'])} of the model's weights are missing, first {min(found['missing_keys'])}; "
            "fetch the file again, or name the Hugging Face model that it was made from"
        )
    config = _completed(loaded.config, header, path)
    config.dtype = getattr(torch, dtype)
    # A model that was loaded from a GGUF file refuses to be saved, so its weights move to one that was not.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer_of(path, header, getattr(config, "max_position_embeddings", None)).save_pretrained(folder)


@contextmanager
def _no_bar_in_a_file() -> Iterator[None]:
    """Keeps transformers' bar of dequantised tensors, which has no switch, to terminals."""
    with redirect_stderr(io.StringIO()) if sys.stderr is None or not sys.stderr.isatty() else nullcontext():
        yield


def tokenizer_of(path: Path, header: Header, positions: int | None) -> Any:
    """The tokenizer of a GGUF file; transformers does not know every way to split text, and takes GPT-2's instead.

    Args:
        positions: tokens that the model was made for.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = _without_surplus(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), header.vocabulary)
    tokenizer.model_max_length = positions or tokenizer.model_max_length
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        if header.splitting in _DIGITS:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif header.splitting not in _GPT2:
            logger.warning(
                "%s: splits text as %s, which transformers does not know; GPT-2's way is taken, and token ids may differ",
                path, one_line(header.splitting or "it does not say", 40),
            )  # fmt: skip
    return tokenizer


def _without_surplus(tokenizer: Any, vocabulary: int) -> Any:
    """The tokenizer without tokens past those of the file, which have no row in the embedding.

    transformers gives every byte-level tokenizer GPT-2's own token for what is unknown.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if len(tokenizer) <= vocabulary:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocabulary]
    backend = Tokenizer.from_str(json.dumps(state))
    known = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        **{key: token for key, token in known.items() if backend.token_to_id(token) is not None},
    )
