"""Digests of a model and of text, to tell what a cached file or an adapter was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from npt.common.sharded import full_tensor, is_sharded

#: Words of 8 bytes whose sum is kept.
_ROW = 2**16
#: Keys of a model's configuration that decide what it computes and are named alike in every version of transformers.
_CONFIG_KEYS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "tie_word_embeddings",
)  # fmt: skip
#: Keys that change nothing; Trainer switches use_cache off.
_NO_MATTER = ("_name_or_path", "transformers_version", "use_cache")
_SAMPLES = 24
#: Relative difference of sampled weights that a cast to another dtype explains (bfloat16 rounds to 2^-9).
_CAST_TOLERANCE = 2**-7


def base_fingerprint(model: nn.Module) -> str:
    """Digest of the base's configuration and weights, the same with and without adapters around them, whole or in parts:
    all processes call it.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # An adapter's own parameters all carry its method's prefix; `base_layer` is PEFT's wrapper around a base module.
    prefix = getattr(model.base_model, "prefix", None) if isinstance(model, PeftModel) else None
    config = {k: v for k, v in base.config.to_dict().items() if k not in _NO_MATTER}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    state = _state_of_parts(base) if is_sharded(base) else base.state_dict(keep_vars=True)
    if any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in state.values()):
        state = get_state_dict_offloaded_model(base)
    for name, tensor in sorted(state.items()):
        of_adapter = prefix is not None and any(part.startswith(prefix) for part in name.split("."))
        if isinstance(tensor, torch.Tensor) and not of_adapter:
            digest.update(f"{name.replace('.base_layer', '')} ".encode() + tensor_digest(full_tensor(tensor)))
    return digest.hexdigest()


def _state_of_parts(base: nn.Module) -> dict[str, Any]:
    """`state_dict` without FSDP2's hooks, which would free the weights that a forward around this call has gathered."""
    found: dict[str, Any] = {}
    for prefix, module in base.named_modules(remove_duplicate=False):
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        found |= {f"{prefix}.{n}".lstrip("."): t for n, t in {**module._parameters, **kept}.items() if t is not None}
    return found


@torch.no_grad()
def tensor_digest(tensor: torch.Tensor) -> bytes:
    """Digest of dtype, shape and content: every bit goes into the sum of its row of `_ROW` words, modulo 2^64."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel():
        content = flat.view(torch.uint8)
        content = content.clone() if content.storage_offset() % 8 else content
        whole = len(content) // 8 * 8
        words = content[:whole].view(torch.int64)
        rows = len(words) // _ROW * _ROW
        sums = [words[:rows].view(-1, _ROW).sum(1), words[rows:], content[whole:]]
        for part in sums:
            # A copy: numpy would pin the storage of a weight that FSDP2 has to let go of.
            digest.update(part.cpu().clone().numpy().tobytes())
    return digest.digest()


def base_record(base: Any) -> dict[str, Any] | None:
    """The record an adapter keeps of the base it is made for; None where weights are not at hand (meta device, offloaded).

    config: `_CONFIG_KEYS` of it. dtype and weights: a digest of all parameters, whatever their names. sample: values of
    the embedding and of the last matrix, by which a base in another dtype is recognised.
    """
    parameters = list(_own_parameters(base))
    if any(p.is_meta for p in parameters):
        return None
    config = base.config.get_text_config()
    digests = sorted(tensor_digest(p) for p in parameters)
    embedding = base.get_input_embeddings().weight
    matrices = [p for p in parameters if p.dim() == 2 and p is not embedding and p.shape != embedding.shape]
    return {
        "config": {key: value for key in _CONFIG_KEYS if (value := getattr(config, key, None)) is not None},
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "weights": hashlib.sha256(b"".join(digests)).hexdigest(),
        "sample": {"embedding": _sample(embedding), "last_matrix": _sample(matrices[-1]) if matrices else None},
    }


def _own_parameters(base: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are no adapter's."""
    adapters = {
        id(p)
        for module in base.modules()
        if isinstance(module, BaseTunerLayer)
        for name in module.adapter_layer_names
        for p in (getattr(module, name).parameters() if isinstance(getattr(module, name, None), nn.Module) else ())
    }
    yield from (p for p in base.parameters() if id(p) not in adapters)


@torch.no_grad()
def _sample(weight: torch.Tensor) -> list[float] | None:
    """Evenly spaced entries; None for a quantised weight, whose entries are codes."""
    if not weight.is_floating_point():
        return None
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, _SAMPLES, dtype=torch.float64).long()
    return [float(value) for value in flat[places.to(flat.device)].float().cpu()]


def difference(made_for: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The difference between two records of `base_record`, in words; None where they are of one base, in any dtype."""
    configs = made_for.get("config") or {}, here["config"]
    for key in sorted(set(configs[0]) & set(configs[1])):
        if configs[0][key] != configs[1][key]:
            return f"{key} is {configs[1][key]!r} here and was {configs[0][key]!r}"
    if made_for.get("dtype") == here["dtype"]:
        if made_for.get("weights") == here["weights"]:
            return None
        # A quantised base is of its original's dtype in what is left unquantised.
        if not _quantized(made_for) and not _quantized(here):
            return "its weights are not the same"
    for name, there in (made_for.get("sample") or {}).items():
        now = here["sample"].get(name)
        if there and now and not np.allclose(there, now, rtol=_CAST_TOLERANCE, atol=1e-6):
            return f"its weights are not the same ({name.replace('_', ' ')})"
    return None


def is_record(value: Any) -> bool:
    """True for a value of a file that has the form of `base_record`'s."""
    if not isinstance(value, dict):
        return False
    config, sample = value.get("config") or {}, value.get("sample") or {}
    return isinstance(config, dict) and isinstance(sample, dict) and all(map(_is_sample, sample.values()))


def _is_sample(value: Any) -> bool:
    numbers = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    return value is None or (numbers and len(value) == _SAMPLES)


def _quantized(record: dict[str, Any]) -> bool:
    return (record.get("sample") or {}).get("last_matrix") is None


def text_fingerprint(blocks: Any) -> str:
    """Digest of the ids and attention masks of a dataset of equally long blocks, in their order."""
    digest = hashlib.sha256()
    for batch in blocks.select_columns(["input_ids", "attention_mask"]).iter(256):
        for name, rows in sorted(batch.items()):
            array = np.asarray(rows, dtype=np.int64)
            digest.update(f"{name} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
