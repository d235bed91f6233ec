"""A base is another one where a setting or a weight differs that decides what it computes, and the same one otherwise."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, MistralConfig

from npt import NPTConfig
from npt.adapters.folder import load_adapter
from npt.common.base_settings import deciding_settings, difference_of_settings
from npt.common.fingerprint import base_record, difference, is_record
from npt.common.samples import differing, has_codes, sample_tensors
from npt.errors import CheckpointError, ConversionError
from tests.helpers import random_base

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
DECIDE: list[tuple[Any, dict[str, Any]]] = [
    (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
    (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    (LlamaConfig, {"rope_parameters": YARN}),
    (LlamaConfig, {"rms_norm_eps": 1e-5}),
    (LlamaConfig, {"hidden_act": "gelu"}),
    (LlamaConfig, {"head_dim": 16}),
    (MistralConfig, {"sliding_window": 16}),
    (Gemma2Config, {"final_logit_softcapping": 10.0}),
    (Gemma2Config, {"attn_logit_softcapping": 10.0}),
    (Gemma2Config, {"query_pre_attn_scalar": 64}),
    (Gemma2Config, {"sliding_window": 16}),
    (GraniteConfig, {"attention_multiplier": 0.5}),
    (GraniteConfig, {"logits_scaling": 2.0}),
    (GraniteConfig, {"embedding_multiplier": 2.0}),
    (GPT2Config, {"layer_norm_epsilon": 1e-4}),
    (GPT2Config, {"activation_function": "relu"}),
    (GPT2Config, {"scale_attn_by_inverse_layer_idx": True}),
]


@pytest.mark.parametrize(
    "kind, change", DECIDE, ids=lambda part: next(iter(part)) if isinstance(part, dict) else part.__name__
)
def test_every_setting_that_decides_counts(kind: Any, change: dict[str, Any]) -> None:
    told = difference_of_settings(deciding_settings(kind()), deciding_settings(kind(**change)))
    assert told is not None and told.startswith(f"{next(iter(change))} is ")


@pytest.mark.parametrize(
    "change",
    [
        {"use_cache": False}, {"attention_dropout": 0.1}, {"initializer_range": 0.5}, {"pad_token_id": 3},
        {"temperature": 0.5}, {"dtype": "float16"}, {"max_position_embeddings": 64}, {"pretraining_tp": 2},
        {"architectures": ["x"]}, {"unsloth_version": "9"}, {"transformers_version": "4"}, {"name_or_path": "elsewhere"},
        {"output_attentions": True},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_settings_that_decide_nothing_do_not_count(change: dict[str, Any]) -> None:
    assert deciding_settings(LlamaConfig(**change)) == deciding_settings(LlamaConfig())


def test_positions_count_where_the_rotary_embedding_is_scaled_by_them() -> None:
    short, long = (LlamaConfig(rope_parameters=YARN, max_position_embeddings=n) for n in (64, 128))
    assert difference_of_settings(deciding_settings(short), deciding_settings(long)) is not None


def test_settings_of_code_that_came_with_a_model_all_count() -> None:
    class Own(LlamaConfig):
        pass

    Own.__module__ = "transformers_modules.own"
    assert deciding_settings(Own(odd=3))["odd"] == 3
    assert "odd" not in deciding_settings(LlamaConfig(odd=3))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[1], rank=2)).save_pretrained(
        str(tmp_path)
    )
    return tmp_path


def same_weights(**settings: Any) -> Any:
    base = random_base("llama", torch.float32)
    other = type(base)(LlamaConfig(**{**base.config.to_dict(), **settings}))
    other.load_state_dict(base.state_dict())
    return other


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rope_parameters": YARN}]
)
def test_the_same_weights_with_another_rotary_embedding_are_another_base(change: dict[str, Any], saved: Path) -> None:
    load_adapter(same_weights(), saved)
    with pytest.raises(CheckpointError, match="made for another base: rope_parameters is .* here and was"):
        load_adapter(same_weights(**change), saved)
    with pytest.raises(ConversionError, match="rope_parameters"):
        PeftModel.from_pretrained(same_weights(**change), str(saved))
    with pytest.raises(ConversionError, match="rope_parameters"):
        same_weights(**change).load_adapter(str(saved))


PLACES = ["model.layers.0.self_attn.k_proj", "model.layers.2.mlp.up_proj", "model.layers.3.mlp.down_proj", "model.norm",
          "model.layers.1.input_layernorm", "model.embed_tokens", "lm_head"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("place", PLACES)
def test_one_fine_tuned_matrix_is_seen_in_any_dtype(place: str, dtype: torch.dtype, saved: Path) -> None:
    load_adapter(random_base("llama", torch.float32).to(dtype), saved)
    base = random_base("llama", torch.float32)
    with torch.no_grad():
        base.get_submodule(place).weight.mul_(1.03)
    with pytest.raises(CheckpointError, match="made for another base: its weights are not the same"):
        load_adapter(base.to(dtype), saved)


def test_an_adapter_made_in_half_precision_knows_the_whole_base(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = get_peft_model(random_base("llama", torch.float32).to(dtype), NPTConfig(rank=2))
        model.save_pretrained(str(tmp_path / str(dtype)))
        for other in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            load_adapter(random_base("llama", torch.float32).to(other), tmp_path / str(dtype))
            load_adapter(random_base("llama", torch.float32).to(dtype).to(other), tmp_path / str(dtype))


def test_integers_of_a_quantised_base_count() -> None:
    """What GPTQ and AWQ keep: the weights are buffers, only norms and embeddings are parameters."""
    base = random_base("llama", torch.float32)
    base.model.layers[0].register_buffer("qweight", torch.arange(12).view(3, 4).int())
    first = base_record(base)
    assert first is not None and difference(first, copy.deepcopy(first)) is None
    base.model.layers[0].qweight[1, 2] += 1
    assert difference(first, base_record(base) or {}) == "its weights are not the same"
    base.model.layers[0].register_buffer("qweight", None)
    assert difference(first, base_record(base) or {}) is None  # the original, which has no codes


def test_codes_are_not_compared() -> None:
    weights = {"a": torch.randn(5, 7), "b": torch.randn(3)}
    packed = {"a": torch.ones(5, 4, dtype=torch.uint8), "b": weights["b"].half()}
    assert differing(sample_tensors(weights), sample_tensors(packed)) == 0
    assert has_codes(sample_tensors(packed)) and not has_codes(sample_tensors(weights))
    packed["b"] = packed["b"] * 1.02
    assert differing(sample_tensors(weights), sample_tensors(packed)) == 1


def test_a_record_of_an_older_npt_is_compared_in_what_it_says(saved: Path) -> None:
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text())
    record = values["base_fingerprint"]
    old = {key: record[key] for key in ("config", "dtype", "weights", "sample")}
    old["config"] = {key: record["config"][key] for key in ("model_type", "rms_norm_eps", "vocab_size")}
    path.write_text(json.dumps({**values, "base_fingerprint": old}))
    model = load_adapter(random_base("llama", torch.float32), saved)
    assert is_record(old) and is_record(model.peft_config["default"].base_fingerprint)
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        load_adapter(same_weights(rms_norm_eps=1e-3), saved)


@pytest.mark.parametrize(
    "part, value",
    [("samples", "abc"), ("samples", {"names": "x", "values": "!"}), ("ends", {"names": 1, "values": ""}), ("inside", []),
     ("inside", {"kinds": [3]}), ("inside", {"kinds": [], "settings": {}, "samples": None})],
)  # fmt: skip
def test_a_damaged_record_is_named(part: str, value: Any, saved: Path) -> None:
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text())
    values["base_fingerprint"][part] = value
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="base_fingerprint=.*restore it from a backup"):
        load_adapter(random_base("llama", torch.float32), saved)


def test_real_weights_in_every_dtype(stories: Path) -> None:
    records = [
        base_record(AutoModelForCausalLM.from_pretrained(stories, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    assert all(difference(one or {}, other or {}) is None for one in records for other in records)
