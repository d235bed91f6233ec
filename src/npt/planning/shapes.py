"""Running npt's own code on the meta device, where tensors have sizes but no memory, and counting what it allocates."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from npt.builtin import source_of
from npt.common.display import quiet
from npt.errors import ConversionError, NPTError
from npt.runs.base_model import base_config
from npt.tuner.config import NPTConfig

#: Shapes of Llama-2-7b, so that no hub is needed to talk about 7B.
LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000,
}  # fmt: skip
#: What all sizes of Llama 3.1 share, as their config.json says.
_LLAMA_3_1 = {
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
LLAMA_3_1_8B = {
    **_LLAMA_3_1, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
LLAMA_3_1_70B = {
    **_LLAMA_3_1, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
#: Models known by shape: `model.base_model_name` for `npt memory` and `npt train --dry-run`.
KNOWN_SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA_7B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.1-70b": LLAMA_3_1_70B,
}
#: Numbers in a tensor that is copied to the CPU for its values.
MOST_VALUES = 2**20
#: The name under which transformers finds `_fused_attention`.
FUSED = "npt_fused_shapes"


class AllocationCounter(TorchDispatchMode):
    """Counts bytes of tensor storage alive at once, above what was alive on entry; works on the meta device too."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage_id(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and _storage_id(tensor) not in known | self._seen:
                self._watch(tensor)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage_id(tensor)
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


def _storage_id(tensor: Tensor) -> int:
    """A storage has one Python object for as long as it lives; addresses of data are all zero on the meta device."""
    return id(tensor.untyped_storage())


class PretendValues(TorchDispatchMode):
    """Lets code whose course depends on values run on the meta device: a mask is all true, a number that is read is one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if not any(isinstance(x, Tensor) and x.is_meta for x in tree_iter(args)):
            return func(*args, **kwargs)
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            mask = args[1][0]
            return args[0].new_empty(mask.numel(), *args[0].shape[mask.dim() :])
        if func is aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        if func is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten._to_copy.default and str(kwargs.get("device", "meta")) == "cpu":
            dtype = kwargs.get("dtype") or args[0].dtype
            # Of a large one nobody reads single values, and of a 70B model there would be gigabytes.
            return torch.ones(args[0].shape, dtype=dtype, device="meta" if args[0].numel() > MOST_VALUES else "cpu")
        if func is aten.copy_.default and not args[0].is_meta:
            return args[0].fill_(1)
        return func(*args, **kwargs)


def shapes_of(hf_config: Any, options: Any, dtype: torch.dtype) -> Any:
    """The converted model on the meta device."""
    if options is None or isinstance(options, Mapping):
        adapter = NPTConfig(**(options or {}))
    else:
        adapter = NPTConfig.from_options(options)
    try:
        with torch.device("meta"):
            base: Any = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=FUSED)
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise NPTError(f"{type(hf_config).__name__} is no causal language model ({reason}); name another") from error
    with quiet("npt.block.contract", "npt.tuner.model"):
        return get_peft_model(base, adapter)


def enable_checkpointing(base: Any) -> None:
    """The old name draws a warning in transformers 5.23, and the new one does not exist before it."""
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()


def _fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention as the CPU fuses it: scaled_dot_product_attention on the meta device would take the unfused
    path, and count (tokens, tokens) matrices that no fused kernel keeps."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output = fused(query, key, value, 0.0, True, scale=scaling)[0]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, _fused_attention)


def dtype_of(name: str, hf_config: Any) -> torch.dtype:
    """`auto` is what the checkpoint says, float32 where it says nothing."""
    if name == "auto":
        name = str(getattr(hf_config, "dtype", None) or "float32").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_shapes(config: Any) -> Any:
    """The configuration of a model known by shape, else of `model.base_model_name` (see `loading.base_config`)."""
    name = source_of(config.model.base_model_name)
    if name in KNOWN_SHAPES and not Path(name).is_dir():
        return LlamaConfig(**KNOWN_SHAPES[name])
    try:
        return base_config(config)
    except ConversionError:
        raise
    except NPTError as error:
        raise NPTError(
            f"{error}. Without any model, for its shapes alone: model.base_model_name=NAME with {', '.join(KNOWN_SHAPES)}"
        ) from error
