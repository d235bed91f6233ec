"""Small random mixtures of experts of every supported type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.families import Case

#: Four experts, two of them for each token, under the names that configurations have for that.
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
_SPARSE = {**_LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}
_LINEAR = {"layer_types": ["linear_attention", "linear_attention", "full_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_DELTA = {
    **_LINEAR, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8
}  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """A type and its options. blocks: those that are mixtures, of four."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[int, ...] = (0, 1, 2, 3)

    def build(self, dtype: torch.dtype = torch.float64) -> Any:
        """The model. Of the ways to compute experts only the plain one knows float64."""
        base = Case(self.name, {**EXPERTS, **self.options}).build(dtype)
        if dtype == torch.float64:
            base.set_experts_implementation("eager")
        return base


_DENSE_FIRST = (1, 2, 3)
MIXTURES = [
    *(Mixture(name) for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "minimax_m2", "phimoe", "hunyuan_v1_moe",
                                 "aria_text", "mellum", "solar_open", "flex_olmo", "kolibri1", "minimax_m3_vl_text")),
    *(Mixture(name, blocks=_DENSE_FIRST) for name in ("glm4_moe", "dots1", "exaone_moe", "cohere2_moe", "hy_v3", "laguna",
                                                      "mimo_v2_flash")),
    Mixture("gpt_oss", {"sliding_window": 4}),
    Mixture("flint", blocks=(2, 3)),
    Mixture("afmoe", {"num_dense_layers": 1}, _DENSE_FIRST),
    Mixture("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_layer_end_index": 3}, _DENSE_FIRST),
    *(Mixture(name, {"residual_multiplier": 0.4}) for name in ("granitemoe", "granitemoe_swa")),
    Mixture("granitemoeshared", {"residual_multiplier": 0.4, "shared_intermediate_size": 24}),
    Mixture("granitemoehybrid", {"residual_multiplier": 0.4, "shared_intermediate_size": 24, **_MAMBA,
                                 **_LINEAR}),
    *(Mixture(name, _LATENT, _DENSE_FIRST) for name in ("deepseek_v2", "glm4_moe_lite")),
    *(Mixture(name, {**_LATENT, "head_dim": None}, _DENSE_FIRST) for name in ("deepseek_v3", "axk1")),
    *(Mixture(name, _SPARSE, _DENSE_FIRST) for name in ("deepseek_v32", "glm_moe_dsa")),
    Mixture("kimi_linear", {**_LATENT, **_LINEAR, "linear_num_heads": 4, "linear_head_dim": 8}, _DENSE_FIRST),
    Mixture("bailing_hybrid", {**_LATENT, **_LINEAR}, _DENSE_FIRST),
    *(Mixture(name, _DELTA) for name in ("qwen3_next", "qwen3_5_moe_text")),
    Mixture("llama4_text", {"intermediate_size_mlp": 40, "moe_layers": [1, 2, 3], "use_qk_norm": False}, _DENSE_FIRST),
    Mixture("lfm2_moe", {"layer_types": ["conv", "conv", "full_attention", "full_attention"]}, (2, 3)),
    Mixture("jamba", {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                      "expert_layer_offset": 1}, (1, 3)),
]  # fmt: skip


def named(name: str) -> Mixture:
    """The mixture of a type."""
    return next(m for m in MIXTURES if m.name == name)
