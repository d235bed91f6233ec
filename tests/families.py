"""Small random models of every supported family and variant, and what a block of each computes, from its own submodules."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

#: Of a model that also sees: small, and never run.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
#: Of one that also hears.
AUDIO = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2}


def raw(module: Any) -> tuple[Tensor, Tensor]:
    """(W (out, in), bias) of a Linear or Conv1D."""
    weight = module.weight.T if hasattr(module, "nf") else module.weight
    bias = module.bias if getattr(module, "bias", None) is not None else weight.new_zeros(len(weight))
    return weight, bias


@dataclass(frozen=True)
class Case:
    """A variant of a family.

    source: attention's output projection, or those of blocks that differ.
    after_attention: (block, its output) -> what joins the residual stream.
    before: (block, x) -> what the MLP reads from the residual stream x; norm: the norm in it; parallel: of h alone.
    gate, up, down: the projections, "path:0" and "path:1" for the halves of a fused one; act: (block) -> activation.
    inner: (block, act(gate) * up) -> what down reads.
    after: (block, down's output) -> what joins the residual stream, times multiplier.
    tail: (block, the residual stream behind the MLP, *what the block reads beside hidden states) -> the block's output; None
        where that is the stream itself.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    source: str | tuple[str, ...] = "self_attn.o_proj"
    after_attention: Callable[[Any, Tensor], Tensor] = lambda block, a: a
    before: Callable[[Any, Tensor], Tensor] = lambda block, x: block.post_attention_layernorm.forward(x)
    parallel: bool = False
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    act: Callable[[Any], Callable[[Tensor], Tensor]] = lambda block: block.mlp.act_fn
    inner: Callable[[Any, Tensor], Tensor] = lambda block, i: i
    after: Callable[[Any, Tensor], Tensor] = lambda block, u: u
    tail: Callable[..., Tensor] | None = None
    multiplier: float = 1.0
    blocks: str = "model.layers"
    norm: str | None = "post_attention_layernorm"
    composite: bool = False

    @property
    def name(self) -> str:
        """For test ids."""
        switches = [
            f"{name}={value}"
            for name, value in self.options.items()
            if isinstance(value, bool) or name == "num_kv_shared_layers"
        ]
        return "-".join([self.model_type, *switches])

    def projection(self, block: Any, name: str) -> tuple[Tensor, Tensor]:
        """(W (out, in), bias) of gate, up or down."""
        path, _, half = getattr(self, name).partition(":")
        weight, bias = raw(block.get_submodule(path))
        return (weight.chunk(2)[int(half)], bias.chunk(2)[int(half)]) if half else (weight, bias)

    def source_of(self, block: Any) -> Any:
        """Attention's output projection."""
        paths = (self.source,) if isinstance(self.source, str) else self.source
        names = {name for name, _ in block.named_modules()}
        (path,) = (path for path in paths if path in names)
        return block.get_submodule(path)

    def norm_parts(self, block: Any) -> tuple[Tensor, Tensor, bool]:
        """(weight, bias, whether it centres) of the norm the MLP's input comes from; ones where there is none."""
        size = self.projection(block, "up")[0].shape[1]
        ones, zeros = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        if self.norm is None:
            return ones, zeros, False
        norm = block.get_submodule(self.norm)
        weight = getattr(norm, "weight", ones)
        if re.match("Gemma(?!4)|RecurrentGemma|VaultGemma", type(norm).__name__) or "Qwen3_5" in type(norm).__name__:
            weight = (1.0 + weight.float()).double()  # these classes do so in float32
        elif "1P" in type(norm).__name__:
            weight = 1.0 + weight
        bias = getattr(norm, "bias", None)
        return weight, zeros if bias is None else bias, "LayerNorm" in type(norm).__name__

    def build(self, dtype: torch.dtype = torch.float64, *, noise: float = 0.15, **more: Any) -> Any:
        """The model, whose norms, biases and attention are far from their initial values; `more` replaces options."""
        torch.manual_seed(0)
        config_class = transformers.CONFIG_MAPPING[self.model_type]
        options = {name: value for name, value in {**SIZES, **self.options, **more}.items() if value is not None}
        config = config_class(**({"text_config": options, "vision_config": VISION} if self.composite else options))
        base = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
            for name, buffer in base.named_buffers():
                if name.endswith("layer_scalar"):  # ones, unless a checkpoint says otherwise
                    buffer.mul_(0.7)
        return base.to(dtype).eval()


def _plain(model_type: str, prefix: str, up: str, down: str, norm: str | None, **more: Any) -> Case:
    return Case(model_type, gate=None, up=f"{prefix}{up}", down=f"{prefix}{down}", norm=norm, **more)


def _norm(name: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda block, x: getattr(block, name).forward(x)  # without the hooks


_GELU: Any = lambda block: block.mlp.act  # noqa: E731
_SANDWICH: dict[str, Any] = {
    "after_attention": _norm("post_attention_layernorm"),
    "after": _norm("post_feedforward_layernorm"),
    "before": _norm("pre_feedforward_layernorm"),
    "norm": "pre_feedforward_layernorm",
}

_HYBRID: dict[str, Any] = {
    "source": ("self_attn.o_proj", "linear_attn.out_proj"),
    "options": {"layer_types": ["linear_attention", "linear_attention", "full_attention", "full_attention"],
                "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                                    "mrope_section": [1, 1, 0]}},
}  # fmt: skip


def _gemma4_tail(block: Any, x: Tensor, embedding: Any = None, *_: Any) -> Tensor:
    """A second gated update, by an embedding of the block's own, and a factor on everything."""
    if getattr(block, "hidden_size_per_layer_input", 0) == 0:
        return block.layer_scalar * x
    gate, back = block.per_layer_input_gate.weight, block.per_layer_projection.weight
    gated = torch.nn.functional.gelu(x @ gate.T, approximate="tanh") * embedding
    return block.layer_scalar * (x + block.post_per_layer_input_norm(gated @ back.T))


_GEMMA4: dict[str, Any] = {
    **_SANDWICH, "tail": _gemma4_tail, "options": {
    "sliding_window": 4, "hidden_size_per_layer_input": 0, "global_head_dim": 8, "vocab_size_per_layer_input": 96,
    "final_logit_softcapping": 5.0, "layer_types": ["sliding_attention", "full_attention"] * 2}
}  # fmt: skip
_POST_NORM = {**_SANDWICH, "before": lambda block, x: x, "norm": None}
_PARALLEL: dict[str, Any] = {"parallel": True, "before": _norm("input_layernorm"), "norm": "input_layernorm"}
_FUSED: dict[str, Any] = {
    "act": lambda block: block.mlp.activation_fn, "gate": "mlp.gate_up_proj:0", "up": "mlp.gate_up_proj:1"
}  # fmt: skip
_BARE: dict[str, Any] = {
    "source": "self_attn.out_proj", "before": _norm("final_layer_norm"), "act": lambda block: block.activation_fn
}  # fmt: skip

CASES = [
    *(Case(name) for name in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo", "ernie4_5", "diffllama",
                              "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "ministral", "ministral3",
                              "seed_oss")),
    Case("cwm", {"sliding_window": 4}),
    Case("youtu", {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
                   "head_dim": 4, "num_key_value_heads": 4}),
    Case("minicpm3", {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
                      "num_key_value_heads": 4, "scale_depth": 1.4}, multiplier=1.4 / 4**0.5),
    Case("bitnet", inner=lambda block, i: block.mlp.ffn_sub_norm(i)),
    Case("apertus", gate=None, norm="feedforward_layernorm", before=_norm("feedforward_layernorm")),
    *(Case(name, gate=None) for name in ("arcee", "jais2", "nemotron")),
    Case("nanochat", gate=None, up="mlp.fc1", down="mlp.fc2", act=lambda block: block.mlp.activation_fn),
    Case("vaultgemma", norm="pre_feedforward_layernorm", before=_norm("pre_feedforward_layernorm")),
    Case("lfm2", {"layer_types": ["conv", "conv", "full_attention", "full_attention"], "block_auto_adjust_ff_dim": False},
         source=("self_attn.out_proj", "conv.out_proj"), norm="ffn_norm", before=_norm("ffn_norm"), gate="feed_forward.w1",
         up="feed_forward.w3", down="feed_forward.w2", act=lambda block: torch.nn.functional.silu),
    Case("lfm3", {"layer_types": ["conv", "conv", "full_attention", "sliding_attention"], "sliding_window": 4},
         source=("self_attn.o_proj", "conv.out_proj"), after_attention=_norm("post_operator_norm"), norm="ffn_norm",
         before=_norm("ffn_norm"), after=_norm("post_ffn_norm"), gate="feed_forward.w1", up="feed_forward.w3",
         down="feed_forward.w2", act=lambda block: torch.nn.functional.silu),
    Case("qwen3_5_text", **_HYBRID),
    Case("bamba", {"attn_layer_indices": [2, 3], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
                   "mamba_d_state": 8},
         source=("self_attn.o_proj", "mamba.out_proj"), norm="pre_ff_layernorm", before=_norm("pre_ff_layernorm"),
         gate="feed_forward.gate_proj", up="feed_forward.up_proj", down="feed_forward.down_proj",
         act=lambda block: block.feed_forward.act_fn),
    Case("granitemoehybrid", {"num_local_experts": 0, "shared_intermediate_size": 40, "residual_multiplier": 0.4,
                              "layer_types": _HYBRID["options"]["layer_types"], "mamba_n_heads": 4, "mamba_d_head": 16,
                              "mamba_n_groups": 1, "mamba_d_state": 8},
         source=("self_attn.o_proj", "mamba.out_proj"), gate="shared_mlp.input_linear:0", up="shared_mlp.input_linear:1",
         down="shared_mlp.output_linear", act=lambda block: block.shared_mlp.activation, multiplier=0.4),
    Case("recurrent_gemma", {"lru_width": 32, "attention_window_size": 16},
         source=("temporal_block.o_proj", "temporal_block.linear_out"), norm="channel_pre_norm",
         before=_norm("channel_pre_norm"), gate="mlp_block.gate_proj", up="mlp_block.up_proj", down="mlp_block.down_proj",
         act=lambda block: block.mlp_block.act_fn),
    Case("modernbert-decoder", source="attn.Wo", norm="mlp_norm", before=_norm("mlp_norm"), gate="mlp.Wi:0", up="mlp.Wi:1",
         down="mlp.Wo", act=_GELU),
    Case("llama", {"attention_bias": True, "mlp_bias": True}),
    Case("gemma"),
    Case("gemma2", {"sliding_window": 4}, **_SANDWICH),
    Case("gemma3_text", {"sliding_window": 4}, **_SANDWICH),
    *(Case(name, **_GEMMA4) for name in ("gemma4_text", "gemma4_unified_text")),
    Case("gemma4_text", **{**_GEMMA4, "options": {**_GEMMA4["options"], "hidden_size_per_layer_input": 6,
                                                  "num_kv_shared_layers": 2}}),
    *(
        Case(name, composite=True, blocks="model.language_model.layers", **_GEMMA4) for name in ("gemma4", "gemma4_unified")
    ),
    Case("gemma3", {"sliding_window": 4}, composite=True, blocks="model.language_model.layers", **_SANDWICH),
    *(Case(name, {"residual_multiplier": 0.4}, multiplier=0.4) for name in ("granite", "granite_swa")),
    Case("hyperclovax", {"residual_multiplier": 0.4}, multiplier=0.4, after_attention=_norm("post_norm1"),
         after=_norm("post_norm2")),
    *(Case(name, **_POST_NORM) for name in ("olmo2", "olmo3", "exaone4")),
    *(Case(name, **_PARALLEL) for name in ("cohere", "cohere2")),
    Case("stablelm"),
    Case("stablelm", {"use_parallel_residual": True}, **_PARALLEL),
    *(Case(name, **_FUSED) for name in ("phi3", "glm")),
    Case("phi4_multimodal", {"vision_config": VISION, "audio_config": AUDIO}, **_FUSED),
    Case("glm4", **_FUSED, after_attention=_norm("post_self_attn_layernorm"), after=_norm("post_mlp_layernorm")),
    _plain("phi", "mlp.", "fc1", "fc2", "input_layernorm", source="self_attn.dense", parallel=True,
           before=_norm("input_layernorm"), act=lambda block: block.mlp.activation_fn),
    _plain("persimmon", "mlp.", "dense_h_to_4h", "dense_4h_to_h", "post_attention_layernorm", source="self_attn.dense",
           act=_GELU),
    _plain("starcoder2", "mlp.", "c_fc", "c_proj", "post_attention_layernorm", act=_GELU),
    _plain("gpt2", "mlp.", "c_fc", "c_proj", "ln_2", source="attn.c_proj", before=_norm("ln_2"), act=_GELU,
           blocks="transformer.h"),
    _plain("gpt_bigcode", "mlp.", "c_fc", "c_proj", "ln_2", source="attn.c_proj", before=_norm("ln_2"), act=_GELU,
           blocks="transformer.h"),
    _plain("mpt", "ffn.", "up_proj", "down_proj", "norm_2", source="attn.out_proj", before=_norm("norm_2"),
           act=lambda block: block.ffn.act, blocks="transformer.blocks"),
    _plain("codegen", "mlp.", "fc_in", "fc_out", "ln_1", source="attn.out_proj", before=_norm("ln_1"), act=_GELU,
           blocks="transformer.h", parallel=True, options={"rotary_dim": 4}),
    _plain("gpt_neo", "mlp.", "c_fc", "c_proj", "ln_2", source="attn.attention.out_proj", before=_norm("ln_2"), act=_GELU,
           blocks="transformer.h", options={"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}),
    _plain("gptj", "mlp.", "fc_in", "fc_out", "ln_1", source="attn.out_proj", before=_norm("ln_1"), act=_GELU,
           blocks="transformer.h", parallel=True, options={"rotary_dim": 4}),
    *(
        _plain("gpt_neox", "mlp.", "dense_h_to_4h", "dense_4h_to_h", "post_attention_layernorm", source="attention.dense",
               act=_GELU, blocks="gpt_neox.layers", parallel=parallel, options={"use_parallel_residual": parallel})
        for parallel in (True, False)
    ),
    *(
        _plain("falcon", "mlp.", "dense_h_to_4h", "dense_4h_to_h", norm, source="self_attention.dense", act=_GELU,
               blocks="transformer.h", before=_norm(norm), parallel=norm != "post_attention_layernorm",
               options={"head_dim": None, "alibi": False, "bias": True, **options})
        for norm, options in (
            ("input_layernorm", {"parallel_attn": True}),
            ("post_attention_layernorm", {"parallel_attn": False}),
            ("ln_mlp", {"new_decoder_architecture": True}),
        )
    ),
    _plain("bloom", "mlp.", "dense_h_to_4h", "dense_4h_to_h", "post_attention_layernorm", source="self_attention.dense",
           act=lambda block: block.mlp.gelu_impl, blocks="transformer.h"),
    _plain("biogpt", "", "fc1", "fc2", "final_layer_norm", **_BARE, blocks="biogpt.layers"),
    _plain("opt", "", "fc1", "fc2", "final_layer_norm", **_BARE, blocks="model.decoder.layers",
           options={"ffn_dim": 40, "word_embed_proj_dim": 32, "activation_function": "gelu"}),
]  # fmt: skip

#: One for each way in which blocks differ: these run by default where a test goes through all, the others with the slow ones.
FEW = {
    "llama", "olmo", "nemotron", "lfm2-block_auto_adjust_ff_dim=False", "qwen3_5_text", "granitemoehybrid", "recurrent_gemma",
    "modernbert-decoder", "llama-attention_bias=True-mlp_bias=True", "gemma2", "gemma4_text-num_kv_shared_layers=2", "gemma3",
    "granite", "olmo2", "cohere", "stablelm-use_parallel_residual=True", "phi3", "glm4", "phi", "gpt2", "mpt", "codegen",
    "gpt_neo", "falcon-alibi=False-bias=True-parallel_attn=False",
    "falcon-alibi=False-bias=True-new_decoder_architecture=True", "bloom", "opt",
}  # fmt: skip


def marks_of(case: Case) -> list[Any]:
    """What a test that goes through all families puts on a case: it is slow, or one of `FEW`."""
    return [] if case.name in FEW else [pytest.mark.slow]
