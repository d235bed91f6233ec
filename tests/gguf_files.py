"""GGUF files of small random Llama models, written with llama.cpp's own package, for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ("<|bos|>", "<|eos|>")
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
#: Pairs that are joined: across a digit and a space none may be.
MERGES = (("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "Â"), ("Ġ", "1"))


def vocabulary() -> list[str]:
    return [*SPECIAL, *bytes_to_unicode().values(), *("".join(pair) for pair in MERGES)]


def random_llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A Llama with fewer key than query heads, and rows that are whole blocks of 32."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": len(vocabulary())}  # fmt: skip
    config = LlamaConfig(**{**sizes, "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5, **options})
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.05)
    return model


def _permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in which llama.cpp keeps queries and keys: the two halves of a rotary pair side by side."""
    return weights.reshape(heads, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    splitting: str = "smollm",
    more: Mapping[str, np.ndarray] | None = None,
    leave_out: str = "",
    scaling: str | None = None,
) -> LlamaForCausalLM:
    """Writes a GGUF file; returns the model with the weights that the file stands for, dequantised by the package gguf.

    kind: of the matrices; vectors stay F32. more: further tensors. leave_out: the name of a tensor to forget.
    """
    config, wanted = model.config, gguf.GGMLQuantizationType[kind]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(vocabulary())
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocabulary()])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stands_for = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        key, array = names.get_name(name.removesuffix(".weight")) + ".weight", tensor.numpy()
        count = next((heads[part] for part in heads if part in name), 0)
        array = _permuted(array, count) if count else array
        kept = wanted if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(array, kept)
        if key != leave_out:
            writer.add_tensor(key, data, raw_dtype=kept)
        back = gguf.dequantize(data, kept)
        if count:  # the same order backwards
            back = back.reshape(count, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        stands_for[name] = torch.from_numpy(back.copy())
    for key, array in (more or {}).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    twin = LlamaForCausalLM(config).eval()
    twin.load_state_dict(stands_for, strict=not config.tie_word_embeddings)
    return twin
