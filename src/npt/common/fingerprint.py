"""Digests of a model and of text, to tell what a cached file or an adapter was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import nn

from npt.common.base_settings import deciding_settings, difference_of_settings
from npt.common.inside import Parts, parts_of, short_digest
from npt.common.samples import are_samples, differing, has_codes, is_quantized, sample_tensors
from npt.common.sharded import full_tensor, is_sharded

#: Words of 8 bytes whose sum is kept.
_ROW = 2**16
#: Keys that change nothing; Trainer switches use_cache off.
_NO_MATTER = ("_name_or_path", "transformers_version", "use_cache")
_SAMPLES = 24
#: Relative difference of sampled weights that a cast to another dtype explains (bfloat16 rounds to 2^-9).
_CAST_TOLERANCE = 2**-7


def base_fingerprint(model: nn.Module) -> str:
    """Digest of the base's configuration and weights and of the adapters at work inside it, the same with and without adapters
    around it, whole or in parts: all processes call it.
    """
    from peft import PeftModel  # here, as npt.tuner, which peft's import brings, needs this module

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # An adapter's own parameters all carry its method's prefix; `base_layer` is PEFT's wrapper around a base module.
    prefix = getattr(model.base_model, "prefix", None) if isinstance(model, PeftModel) else None
    config = {k: v for k, v in base.config.to_dict().items() if k not in _NO_MATTER}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if prefix in (None, "npt_") and (inside := parts_of(base)).kinds:
        digest.update(short_digest([inside.layers, inside.settings, sorted(inside.adapters)]).encode())
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

    config: the settings that decide what the base computes (`npt.common.base_settings`). dtype and weights: a digest of all
    its parameters, whatever their names; body: of those that are no embedding or head; codes: of a quantised base's integer
    buffers. sample, samples and ends: values of the embedding and the last matrix, of every parameter of the body, and of
    embedding and head, by which a base in another dtype is recognised. inside: other methods' adapters at work in it.
    """
    parts = parts_of(base)
    if any(p.is_meta for p in [*parts.own.values(), *parts.adapters.values()]):
        return None
    embedding, head = embeddings_of(base)
    body = {name: p for name, p in parts.own.items() if p is not embedding and p is not head}
    matrices = [p for p in parts.own.values() if p.dim() == 2 and p is not embedding and p.shape != embedding.shape]
    codes = [
        b for b in base.buffers() if b.dim() > 1 and b.dtype in (torch.int8, torch.int32, torch.int64, torch.uint8)
    ]
    return {
        "config": deciding_settings(base.config.get_text_config()),
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "weights": _digest_of_all(parts.own.values()),
        "body": _digest_of_all(body.values()),
        "codes": _digest_of_all(codes) if codes else None,
        "sample": {
            "embedding": _sample(embedding),
            "last_matrix": _sample(matrices[-1]) if matrices else None,
        },
        "samples": sample_tensors(body),
        "ends": sample_tensors({"embedding": embedding, "head": head}),
        "inside": _inside_record(parts) if parts.kinds else None,
    }


def _inside_record(parts: Parts) -> dict[str, Any]:
    return {
        "kinds": parts.kinds,
        "layers": short_digest(parts.layers),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in parts.adapters.values()}),
        "settings": {name: short_digest(values) for name, values in sorted(parts.settings.items())},
        "weights": _digest_of_all(parts.adapters.values()),
        "samples": sample_tensors(parts.adapters),
    }


def embeddings_of(base: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of a base's input embedding and of its head; one tensor where they are tied."""
    embedding: torch.Tensor = base.get_input_embeddings().weight
    head = base.get_output_embeddings()
    return embedding, embedding if head is None else head.weight


def _digest_of_all(tensors: Iterable[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(sorted(tensor_digest(tensor) for tensor in tensors))).hexdigest()


@torch.no_grad()
def _sample(weight: torch.Tensor) -> list[float] | None:
    """Evenly spaced entries; None for a quantised weight, whose entries are codes."""
    if is_quantized(weight):
        return None
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, _SAMPLES, dtype=torch.float64).long()
    return [float(value) for value in flat[places.to(flat.device)].float().cpu()]


def difference(made_for: dict[str, Any], here: dict[str, Any], *, embeddings: bool = True) -> str | None:
    """The difference between two records of `base_record`, in words; None where they are of one base, in any dtype.

    What only one of the two records says is not compared: older ones say less.

    Args:
        embeddings: False leaves the weights of the embedding and of the head out.
    """
    told = difference_of_settings(made_for.get("config") or {}, here.get("config") or {})
    told = told or _difference_inside(made_for, here)
    if told is not None:
        return told
    key = "weights" if embeddings else "body"
    if made_for.get("dtype") == here.get("dtype"):
        codes = made_for.get("codes"), here.get("codes")
        if made_for.get(key) == here.get(key) and (None in codes or codes[0] == codes[1]):
            return None
        # A quantised base is of its original's dtype in what is left unquantised.
        if (not _quantized(made_for) and not _quantized(here)) or (codes[0] != codes[1] and None not in codes):
            return "its weights are not the same"
    for name, there in (made_for.get("sample") or {}).items():
        now = (here.get("sample") or {}).get(name)
        close = not there or not now or np.allclose(there, now, rtol=_CAST_TOLERANCE, atol=1e-6)
        if not close and (embeddings or name == "last_matrix"):
            return f"its weights are not the same ({name.replace('_', ' ')})"
    parts = ("samples", "ends") if embeddings else ("samples",)
    count = sum(differing(made_for[part], here[part]) for part in parts if made_for.get(part) and here.get(part))
    return f"its weights are not the same ({count} of its parameters)" if count else None


def _difference_inside(made_for: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The difference between the adapters at work inside two bases."""
    if "inside" not in made_for or "inside" not in here:
        return None
    one, other = made_for["inside"], here["inside"]
    if one is None or other is None or one["kinds"] != other["kinds"]:
        held, holds = (", ".join(part["kinds"]) if part else "none" for part in (one, other))
        return None if one is other else f"other adapters are at work inside it: {holds} here, {held} there"
    differ = one["layers"] != other["layers"] or difference_of_settings(one["settings"], other["settings"])
    same = one["weights"] == other["weights"] or (
        one.get("dtypes") != other.get("dtypes")
        and one["samples"]["names"] == other["samples"]["names"]
        and not differing(one["samples"], other["samples"])
    )
    return None if same and not differ else f"the {', '.join(one['kinds'])} adapter at work inside it is not the same"


def is_record(value: Any) -> bool:
    """True for a value of a file that has the form of `base_record`'s."""
    if not isinstance(value, dict):
        return False
    config, sample, inside = value.get("config") or {}, value.get("sample") or {}, value.get("inside")
    return (
        isinstance(config, dict)
        and isinstance(sample, dict)
        and all(map(_is_sample, sample.values()))
        and all(value.get(part) is None or are_samples(value[part]) for part in ("samples", "ends"))
        and (inside is None or _is_inside(inside))
    )


def _is_inside(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("kinds"), list)
        and all(isinstance(kind, str) for kind in value["kinds"])
        and isinstance(value.get("settings"), dict)
        and are_samples(value.get("samples"))
        and {"layers", "weights"} <= set(value)
    )


def _is_sample(value: Any) -> bool:
    numbers = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    return value is None or (numbers and len(value) == _SAMPLES)


def _quantized(record: dict[str, Any]) -> bool:
    samples = record.get("samples")
    return (record.get("sample") or {}).get("last_matrix") is None or bool(samples and has_codes(samples))


def text_fingerprint(blocks: Any) -> str:
    """Digest of the ids and attention masks of a dataset of equally long blocks, in their order."""
    digest = hashlib.sha256()
    for batch in blocks.select_columns(["input_ids", "attention_mask"]).iter(256):
        for name, rows in sorted(batch.items()):
            array = np.asarray(rows, dtype=np.int64)
            digest.update(f"{name} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
