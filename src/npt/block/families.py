"""The table of model families: one line says where the pieces of a block are.

A new family is one call: `register_family("my_type", Family(...))`. The conversion contract (`contract.py`) runs at
conversion on the real model: a missing path, a wrong tap, norm or multiplier is an error, not a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from npt.block.refusals import refusal
from npt.common.display import one_line, ranges
from npt.common.options import is_automatic
from npt.errors import ConversionError


@dataclass(frozen=True)
class Family:
    """Paths of modules, relative to the causal LM (`blocks`) or to one block (the others).

    Args:
        blocks: the list of decoder blocks.
        tap: the last module whose output attention adds to the residual stream, a norm after attention included; where
            blocks of one model differ (attention here, a linear recurrence there), a tuple of paths: each block uses
            the first that it has.
        norm: Norm2, which the MLP's input comes from; None where the MLP reads the residual stream itself.
        mlp: the module from Norm2's output to the update; None where a block holds the projections itself.
        up: the MLP's projection (Linear or Conv1D) to its width.
        down: the one back.
        gate: the gate's projection, None where there is none; the same as `up` where one projection holds both, the
            gate's rows first.
        out: the norm after the MLP, where there is one; `down`'s value joins its output (docs/maths.md, section 5).
        parallel: the MLP reads Norm2(h), not Norm2(h + a): attention changes nothing but the residual stream.
        multiplier: the block's attribute that scales both attention and MLP on their way into the residual stream.
        run: (block, z) -> the MLP's update y - h, where it isn't out(mlp(z)) times the multiplier.
        tail: (block, x, *what the block is called with behind its hidden states) -> the block's output, where it isn't x, the
            residual stream behind the MLP. Such a block has `out` and no `multiplier`.
        experts: where the MLP of some blocks is a mixture, the module of its experts, called as `npt.block.mixture.routing_of`
            says. `up` and `down` are then the whole MLP: what reads z, the router included, and what comes out.
        beside: a shared expert that the block itself adds to what `mlp` gives, called behind it.
    """

    blocks: str
    tap: str | tuple[str, ...]
    norm: str | None
    mlp: str | None
    up: str
    down: str
    gate: str | None = None
    out: str | None = None
    parallel: bool = False
    multiplier: str | None = None
    run: Callable[[Any, Tensor], Tensor] | None = None
    tail: Callable[..., Tensor] | None = None
    experts: str | None = None
    beside: str | None = None

    def __post_init__(self) -> None:
        if self.tail is not None and (self.out is None or self.multiplier is not None):
            raise ConversionError(
                "Family(tail=...): what a tail reads is known with `out`, and without `multiplier`, only"
            )

    @property
    def projections(self) -> dict[str, str]:
        """{"gate" | "up" | "down": path}, the ones this family has."""
        paths = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: path for name, path in paths.items() if path is not None}

    @property
    def fused(self) -> bool:
        """True where gate and up are one projection."""
        return self.gate == self.up

    @property
    def reads(self) -> str:
        """The MLP's input in the original block, as `ComponentSpec.reads`: "norm(h + a)", "h + a", or "h"."""
        return "h" if self.parallel else "h + a" if self.norm is None else "norm(h + a)"


_GATED: dict[str, Any] = {"mlp": "mlp", "up": "mlp.up_proj", "down": "mlp.down_proj", "gate": "mlp.gate_proj"}
_FUSED: dict[str, Any] = {"mlp": "mlp", "up": "mlp.gate_up_proj", "down": "mlp.down_proj", "gate": "mlp.gate_up_proj"}
_FC: dict[str, Any] = {"mlp": "mlp", "up": "mlp.fc1", "down": "mlp.fc2", "gate": None}
_CONV: dict[str, Any] = {"mlp": "mlp", "up": "mlp.c_fc", "down": "mlp.c_proj", "gate": None}
_4H: dict[str, Any] = {"mlp": "mlp", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
_LLAMA = Family("model.layers", "self_attn.o_proj", "post_attention_layernorm", **_GATED)
_SANDWICH = replace(
    _LLAMA, tap="post_attention_layernorm", norm="pre_feedforward_layernorm", out="post_feedforward_layernorm"
)
_POST_NORM = replace(_SANDWICH, norm=None)
_FUSED_LLAMA = replace(_LLAMA, **_FUSED)
_UNGATED_LLAMA = replace(_LLAMA, gate=None)
_PARALLEL_LLAMA = replace(_LLAMA, norm="input_layernorm", parallel=True)
_HYBRID_LLAMA = replace(_LLAMA, tap=("self_attn.o_proj", "linear_attn.out_proj"))
_MIXTURE = replace(_LLAMA, gate=None, up="mlp", down="mlp", experts="mlp.experts")
_HYBRID_MIXTURE = replace(_MIXTURE, tap=_HYBRID_LLAMA.tap)
_FEED_FORWARD: dict[str, Any] = {
    "mlp": "feed_forward", "up": "feed_forward", "down": "feed_forward", "experts": "feed_forward.experts"
}  # fmt: skip
_GRANITE_MIXTURE = replace(
    _MIXTURE, mlp="block_sparse_moe", up="block_sparse_moe", down="block_sparse_moe", experts="block_sparse_moe.experts",
    multiplier="residual_multiplier",
)  # fmt: skip
#: Types whose block is a Llama's with experts in the place of its MLP, dense in some of the first blocks of many.
_MIXTURES = (
    "aria_text", "axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "hunyuan_v1_moe", "hy_v3", "kimi_linear", "laguna",
    "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
    "solar_open",
)  # fmt: skip
_GPTJ = Family("transformer.h", "attn.out_proj", "ln_1", mlp="mlp", up="mlp.fc_in", down="mlp.fc_out", parallel=True)
_GPT2 = Family("transformer.h", "attn.resid_dropout", "ln_2", **_CONV)
# The block holds the projections itself, as OPT's does.
_BARE = Family(
    "model.layers", "self_attn.out_proj", "final_layer_norm", None, "fc1", "fc2",
    run=lambda block, z: block.fc2(block.activation_fn(block.fc1(z))),
)  # fmt: skip
_GPT_NEOX = Family("gpt_neox.layers", "attention.dense", "post_attention_layernorm", **_4H)
_FALCON = Family("transformer.h", "self_attention.dense", "post_attention_layernorm", **_4H)


def _falcon(config: Any) -> Family:
    if config.new_decoder_architecture or config.parallel_attn:
        norms = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
        own_norm = config.new_decoder_architecture and norms == 2
        return replace(_FALCON, norm="ln_mlp" if own_norm else "input_layernorm", parallel=True)
    return _FALCON


def _opt(config: Any) -> Family:
    if not config.do_layer_norm_before:
        raise ConversionError(
            "OPT with do_layer_norm_before=false (opt-350m) normalises the residual stream itself after each block, so no "
            "weight delta can replace attention; use an OPT of another size"
        )
    return replace(_BARE, blocks="model.decoder.layers")


def _granite_mixture(config: Any) -> Family:
    tap = ("self_attn.o_proj", "mamba.out_proj")
    if config.num_local_experts == 0:
        reads = "shared_mlp.input_linear"
        return replace(
            _LLAMA, tap=tap, mlp="shared_mlp", up=reads, gate=reads, down="shared_mlp.output_linear",
            multiplier="residual_multiplier",
        )  # fmt: skip
    return replace(_GRANITE_MIXTURE, tap=tap, beside="shared_mlp" if config.shared_intermediate_size else None)


def _gemma4_tail(block: Any, x: Tensor, per_layer_input: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    if getattr(block, "hidden_size_per_layer_input", 0):
        gated = block.act_fn(block.per_layer_input_gate(x)) * per_layer_input
        x = x + block.post_per_layer_input_norm(block.per_layer_projection(gated))
    return x * block.layer_scalar


_GEMMA4 = replace(_SANDWICH, tail=_gemma4_tail)


def _gemma4(config: Any) -> Family:
    if getattr(config.get_text_config(), "enable_moe_block", False):
        raise ConversionError(
            "Gemma 4 with enable_moe_block=true can't be converted: its router and experts read the stream beside the "
            "MLP, each through a norm of its own, and npt shifts what one norm gives; use a dense one"
        )
    return _GEMMA4 if config is config.get_text_config() else replace(_GEMMA4, blocks="model.language_model.layers")


#: By config.json's model_type; a function of the config where that decides.
FAMILIES: dict[str, Family | Callable[[Any], Family]] = {
    "apertus": replace(_UNGATED_LLAMA, norm="feedforward_layernorm"),
    "arcee": _UNGATED_LLAMA,
    "biogpt": replace(_BARE, blocks="biogpt.layers"),
    "bitnet": _LLAMA,
    "bloom": replace(_FALCON, run=lambda block, z: block.mlp(z, z.new_zeros(1))),
    "codegen": replace(_GPTJ, tap="attn.resid_dropout"),
    "cohere": _PARALLEL_LLAMA,
    "cohere2": _PARALLEL_LLAMA,
    "cwm": _LLAMA,
    "diffllama": _LLAMA,
    "ernie4_5": _LLAMA,
    "exaone4": _POST_NORM,
    "falcon": _falcon,
    "gemma": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3": replace(_SANDWICH, blocks="model.language_model.layers"),
    "gemma3_text": _SANDWICH,
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _gemma4),
    "glm": _FUSED_LLAMA,
    "glm4": replace(_FUSED_LLAMA, tap="post_self_attn_layernorm", out="post_mlp_layernorm"),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(_GPT2, tap="attn.attention.out_proj"),
    "gpt_neox": lambda config: replace(_GPT_NEOX, parallel=config.use_parallel_residual),
    "gptj": _GPTJ,
    "granite": replace(_LLAMA, multiplier="residual_multiplier"),
    "granite_swa": replace(_LLAMA, multiplier="residual_multiplier"),
    "helium": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "hyperclovax": replace(_LLAMA, tap="post_norm1", out="post_norm2", multiplier="residual_multiplier"),
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "jais2": _UNGATED_LLAMA,
    "lfm2": Family(
        "model.layers", ("self_attn.out_proj", "conv.out_proj"), "ffn_norm", "feed_forward",
        up="feed_forward.w3", down="feed_forward.w2", gate="feed_forward.w1",
    ),
    "lfm3": Family(
        "model.layers", "post_operator_norm", "ffn_norm", "feed_forward", up="feed_forward.w3", down="feed_forward.w2",
        gate="feed_forward.w1", out="post_ffn_norm",
    ),
    "llama": _LLAMA,
    "minicpm3": replace(_LLAMA, multiplier="residual_scale"),
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mpt": Family(
        "transformer.blocks", "resid_attn_dropout", "norm_2", "ffn", up="ffn.up_proj", down="ffn.down_proj",
        run=lambda block, z: block.ffn(z, z.new_zeros(1)),
    ),
    "nanochat": replace(_LLAMA, **_FC),
    "nemotron": _UNGATED_LLAMA,
    "olmo": _LLAMA,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "opt": _opt,
    "persimmon": replace(_FALCON, blocks="model.layers", tap="self_attn.dense"),
    "phi": Family("model.layers", "self_attn.dense", "input_layernorm", **_FC, parallel=True),
    "phi3": _FUSED_LLAMA,
    "phi4_multimodal": _FUSED_LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_5_text": _HYBRID_LLAMA,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": lambda config: _PARALLEL_LLAMA if config.use_parallel_residual else _LLAMA,
    "starcoder2": replace(_LLAMA, **_CONV),
    "vaultgemma": replace(_LLAMA, norm="pre_feedforward_layernorm"),
    "youtu": _LLAMA,
    **dict.fromkeys(_MIXTURES, _MIXTURE),
    "afmoe": replace(_MIXTURE, tap="post_attention_layernorm", norm="pre_mlp_layernorm", out="post_mlp_layernorm"),
    "bamba": Family(
        "model.layers", ("self_attn.o_proj", "mamba.out_proj"), "pre_ff_layernorm", "feed_forward",
        up="feed_forward.up_proj", down="feed_forward.down_proj", gate="feed_forward.gate_proj",
    ),
    "cohere2_moe": replace(_MIXTURE, norm="input_layernorm", parallel=True),
    "flex_olmo": replace(_MIXTURE, tap="post_attention_layernorm", norm=None, out="post_feedforward_layernorm"),
    "granitemoe": _GRANITE_MIXTURE,
    **dict.fromkeys(("granitemoe_swa", "granitemoehybrid", "granitemoeshared"), _granite_mixture),
    "jamba": replace(_MIXTURE, tap=("self_attn.o_proj", "mamba.out_proj"), norm="pre_ff_layernorm", **_FEED_FORWARD),
    "kolibri1": replace(_MIXTURE, tap="post_self_attn_layernorm", out="post_mlp_layernorm"),
    "lfm2_moe": replace(_MIXTURE, tap=("self_attn.out_proj", "conv.out_proj"), norm="ffn_norm", **_FEED_FORWARD),
    "llama4_text": replace(_MIXTURE, **_FEED_FORWARD),
    "modernbert-decoder": Family(
        "model.layers", "attn.Wo", "mlp_norm", "mlp", up="mlp.Wi", down="mlp.Wo", gate="mlp.Wi"
    ),
    "qwen3_5_moe_text": _HYBRID_MIXTURE,
    "qwen3_next": _HYBRID_MIXTURE,
    "recurrent_gemma": Family(
        "model.layers", ("temporal_block.o_proj", "temporal_block.linear_out"), "channel_pre_norm", "mlp_block",
        up="mlp_block.up_proj", down="mlp_block.down_proj", gate="mlp_block.gate_proj",
    ),
}  # fmt: skip


def register_family(model_type: str, family: Family | Callable[[Any], Family]) -> None:
    """Adds a model family to the table.

    Args:
        model_type: as in the model's config.json.
        family: its line, or a function of the config that returns one.
    """
    FAMILIES[model_type] = family


def family_of(model: nn.Module) -> Family:
    """The family of a causal LM.

    Raises:
        ConversionError: the model has no `config.model_type`, or one that isn't in the table, or can't be converted.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    entry = FAMILIES.get(str(model_type))
    family = entry if isinstance(entry, Family) or entry is None else entry(config)
    reason = refusal(config)
    if reason is not None and (family is None or family.experts is None):
        raise ConversionError(f"{type(model).__name__} can't be converted: {reason}")
    if family is None:
        raise ConversionError(
            f"model type {model_type!r} of {type(model).__name__} is not supported; npt families lists the {len(FAMILIES)} "
            "that are. Add one with npt.families.register_family(model_type, Family(...))"
        )
    return family


def refuse_mixture(model: nn.Module, why: str) -> None:
    """Refuses a mixture of experts where a block's MLP has to be one.

    Raises:
        ConversionError: it is one; says `why`.
    """
    if family_of(model).experts is not None:
        raise ConversionError(f"{type(model).__name__} is a mixture of experts: {why}; use a dense model")


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal LM, in depth order."""
    blocks: Any = model.get_submodule(family_of(model).blocks)
    return blocks


def decoder_of(model: Any) -> Any:
    """The module inside a causal LM whose output is the last hidden states."""
    decoder = getattr(model, model.base_model_prefix, None)
    return model.get_submodule(family_of(model).blocks.rpartition(".")[0]) if decoder is None else decoder


def hand_on(model: Any) -> bool:
    """True where blocks of a causal LM read keys and values of lower blocks, which then can't be left out of a forward."""
    return bool(getattr(model.config.get_text_config(), "num_kv_shared_layers", 0))


def resolve_layers(choice: str | list[int], num_blocks: int) -> list[int]:
    """Block indices, ascending, of "all", "upper_half" (n//2 ... n-1), "lower_half" or a list (negatives from the end).

    All of them for "auto" and "auto:N", which are decided after all are calibrated (`automatic_count`).

    Raises:
        ConversionError: an unknown word, an index out of range, a duplicate or an empty list.
    """
    words = {
        "all": range(num_blocks),
        "upper_half": range(num_blocks // 2, num_blocks),
        "lower_half": range(num_blocks // 2),
    }
    if automatic_count(choice, num_blocks) is not None:
        layers = list(range(num_blocks))
    elif isinstance(choice, str):
        if choice not in words:
            raise ConversionError(
                f"npt_layers={choice!r} is unknown; use {', '.join(words)}, auto, auto:N or a list of indices"
            )
        layers = list(words[choice])
    else:
        wrong = [
            i for i in choice if not isinstance(i, int) or isinstance(i, bool) or not -num_blocks <= i < num_blocks
        ]
        if wrong:
            raise ConversionError(
                f"npt_layers={one_line(list(choice), 80)} names {ranges(wrong)}, but the model has {num_blocks} blocks: "
                f"use {-num_blocks} to {num_blocks - 1}"
            )
        layers = sorted(i % num_blocks for i in choice)
        if len(set(layers)) != len(layers):
            raise ConversionError(f"npt_layers={one_line(list(choice), 80)} names a block twice; name each once")
    if not layers:
        raise ConversionError(f"npt_layers={choice!r} selects no block of {num_blocks}; name at least one")
    return layers


def automatic_count(choice: str | list[int], num_blocks: int) -> int | None:
    """The number of blocks that "auto" (as many as "upper_half") or "auto:N" will choose; None for any other choice.

    Raises:
        ConversionError: N is no number from 1 to the number of blocks.
    """
    if not is_automatic(choice):
        return None
    if choice == "auto":
        return num_blocks - num_blocks // 2
    number = choice.partition(":")[2]
    if not number.isdecimal() or not 0 < int(number) <= num_blocks:
        raise ConversionError(
            f"npt_layers={choice!r}: the model has {num_blocks} blocks; use auto:1 to auto:{num_blocks}"
        )
    return int(number)
