"""The settings of a base's configuration that decide what it computes: all of them but the ones named here."""

from __future__ import annotations

import json
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

#: Names that are alike in every version of transformers, whatever a family calls the setting in its file.
COMMON = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "tie_word_embeddings",
)  # fmt: skip
#: Of training, of classification heads, of generation, of how the weights are stored and the code is run.
_NO_MATTER = (
    "pretraining_tp", "initializer_range", "initializer_factor", "initializer_cutoff_factor", "init_std", "init_device",
    "quantization_config", "gradient_checkpointing", "classifier_dropout", "output_router_logits", "router_aux_loss_coef",
    "attn_implementation", "use_cache", "learned_pos_emb_init", "embedding_initializer_range", "auto_map", "torch_dtype",
)  # fmt: skip
#: How many positions a model was made for changes nothing unless its rotary embedding is scaled by it.
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


def deciding_settings(config: Any) -> dict[str, Any]:
    """{setting: value}, as JSON keeps them, of the text part's configuration.

    Of transformers' own classes only declared settings are read by a model; of code that came with a model any may be.
    """
    values = config.to_dict()
    declared = getattr(type(config), "__dataclass_fields__", {})
    if type(config).__module__.startswith("transformers.") and declared:
        values = {key: value for key, value in values.items() if key in declared or key == "model_type"}
    ignored = {*PreTrainedConfig().to_dict(), *GenerationConfig().to_dict(), *_NO_MATTER} - {"model_type"}
    if not _scales_positions(values):
        ignored |= set(_POSITIONS)
    found = {key: value for key, value in values.items() if key not in ignored and not _is_idle(key)}
    common = {key: value for key in COMMON if (value := getattr(config, key, None)) is not None}
    kept: dict[str, Any] = json.loads(json.dumps({**found, **common}, default=str))
    return kept


def difference_of_settings(made_for: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first setting that differs, in words; a setting that one of the two does not know is not compared."""
    for key in sorted(set(made_for) & set(here)):
        if made_for[key] != here[key]:
            return f"{key} is {here[key]!r} here and was {made_for[key]!r}"
    return None


def _is_idle(key: str) -> bool:
    """True for settings of dropout, which a frozen base never uses, of heads it lacks, and of special tokens."""
    return key.startswith(("summary_", "_")) or key.endswith(
        ("dropout", "pdrop", "dropout_prob", "layerdrop", "_token_id")
    )


def _scales_positions(values: dict[str, Any]) -> bool:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    return any(kind not in (None, "default") for kind in kinds)
