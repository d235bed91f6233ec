"""Digests of a model and of text: what a file in a cache was made from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from peft import PeftModel
from torch import nn

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def base_fingerprint(model: nn.Module) -> str:
    """Digest of the base's configuration and weights, the same with and without adapters around them."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # An adapter's own parameters all carry its method's prefix; `base_layer` is PEFT's wrapper around a base module.
    prefix = getattr(model.base_model, "prefix", None) if isinstance(model, PeftModel) else None
    config = {k: v for k, v in base.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    state = base.state_dict(keep_vars=True)
    if any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in state.values()):
        state = get_state_dict_offloaded_model(base)
    for name, tensor in sorted(state.items()):
        of_adapter = prefix is not None and any(part.startswith(prefix) for part in name.split("."))
        if isinstance(tensor, torch.Tensor) and not of_adapter:
            digest.update(f"{name.replace('.base_layer', '')} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(_tensor_digest(tensor))
    return digest.hexdigest()


@torch.no_grad()
def _tensor_digest(tensor: torch.Tensor) -> bytes:
    """The bits of three short slices and an exact sum of all bits as integers, which any one change moves."""
    if tensor.numel() == 0:
        return b""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    middle = bits.numel() // 2
    slices = torch.cat((bits[:64], bits[middle : middle + 64], bits[-64:])).cpu().numpy().tobytes()
    return slices + bits.sum(dtype=torch.int64).cpu().numpy().tobytes()


def text_fingerprint(blocks: Any) -> str:
    """Digest of the ids and attention masks of a dataset of equally long blocks, in their order."""
    digest = hashlib.sha256()
    for batch in blocks.select_columns(["input_ids", "attention_mask"]).iter(256):
        for name, rows in sorted(batch.items()):
            array = np.asarray(rows, dtype=np.int64)
            digest.update(f"{name} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
