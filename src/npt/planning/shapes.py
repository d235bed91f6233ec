"""The run's model from its shapes alone: converted on the meta device, where tensors have sizes but no memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM

from npt.common.display import quiet
from npt.config import RunConfig, with_overrides
from npt.errors import ConversionError, NPTError
from npt.runs.base_model import base_config, base_dtype
from npt.tuner.config import NPTConfig

#: Shapes of Llama-2-7b, so that 7B can be planned for without the hub.
LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000,
}  # fmt: skip
#: The part of config.json that all sizes of Llama 3.1 share.
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
#: Mixtures of experts: 30.5 billion parameters of which a token uses 3.3, and 20.9 of which it uses 3.6.
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
    "vocab_size": 201088, "sliding_window": 128, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
#: Models known by shape: values of `model.base_model_name` that `npt memory` and `npt train --dry-run` know without a hub.
KNOWN_SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA_7B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.1-70b": LLAMA_3_1_70B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "gpt-oss-20b": GPT_OSS_20B,
}
#: Bytes per parameter of a component, in float32: the parameter or its gradient, and AdamW's two moments of it.
OWN_BYTES, MOMENTS_BYTES = 4, 8
#: The name under which transformers finds `_fused_attention`.
FUSED = "npt_fused_shapes"


def load_shapes(config: RunConfig) -> Any:
    """The transformers configuration of a model known by shape, else that of `model.base_model_name`.

    Raises:
        NPTError: it can't be loaded (see `npt.runs.base_model.base_config`).
    """
    name = config.model.base_model_name
    if name in KNOWN_SHAPES and not Path(name).is_dir():
        known = {"model_type": "llama", **KNOWN_SHAPES[name]}
        return CONFIG_MAPPING[known.pop("model_type")](**known)
    try:
        return base_config(config.model, config.paths.cache_dir)
    except ConversionError:
        raise
    except NPTError as error:
        raise NPTError(
            f"{error}. Without any model, for its shapes alone: model.base_model_name=NAME with {', '.join(KNOWN_SHAPES)}"
        ) from error


def with_own_dtype(config: RunConfig, hf_config: Any) -> RunConfig:
    """The configuration with the dtype that `model.dtype: auto` means on this machine, where `npt train` may take float32."""
    dtype, _ = base_dtype(config.model, config.optimization, hf_config)
    return (
        config if isinstance(dtype, str) else with_overrides(config, {"model.dtype": str(dtype).removeprefix("torch.")})
    )


def dtype_of(name: str, hf_config: Any) -> torch.dtype:
    """The dtype of `model.dtype`. `auto` is the checkpoint's own, float32 where its configuration names none."""
    if name == "auto":
        name = str(getattr(hf_config, "dtype", None) or "float32").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def shapes_of(hf_config: Any, options: Any, dtype: torch.dtype) -> Any:
    """The converted model on the meta device.

    Args:
        hf_config: a transformers configuration. dtype: of the base.
        options: a `ModelSection`, an `NPTConfig`, a mapping of its fields, or None for its defaults.

    Raises:
        NPTError: no causal LM has this configuration, or it can't be converted with these options.
    """
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
    with quiet("npt.block.contract", "npt.tuner.checks"):
        return get_peft_model(base, adapter)


def enable_checkpointing(base: Any) -> None:
    """Turns gradient checkpointing on, by the newer of two names: the old one warns in transformers 5.23."""
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()


def _fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention by the CPU's fused kernel. On the meta device scaled_dot_product_attention would take the unfused
    path, and (tokens, tokens) matrices would be counted that no fused kernel keeps."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output = fused(query, key, value, 0.0, True, scale=scaling)[0]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, _fused_attention)
