"""Models that npt does not convert, and why: a reason by type where somebody has looked, else one by what the config says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_POST_NORM = "each block normalises the residual stream itself, so no weight delta can replace attention"
_POST_NORMS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "openai-gpt", "rembert",
    "roberta", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlnet",
)  # fmt: skip
_STREAMS = "its residual stream is several streams that each block mixes"
_SCALED = "each block scales the whole residual stream, not what it adds alone"
_NO_MLP = "a block holds one mixer and no MLP: there is none to take attention's part"
_TWO_WRITERS = "two modules write to the residual stream before the MLP, and npt takes the output of one"

#: By config.json's model_type.
REASONS: dict[str, str] = {
    **dict.fromkeys(("deepseek_v4", "hy_v4", "gemma3n", "gemma3n_text"), _STREAMS),
    **dict.fromkeys(("minimax", "doge"), _SCALED),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "xlstm", "nemotron_h"), _NO_MLP),
    **dict.fromkeys(_POST_NORMS, _POST_NORM),
    **dict.fromkeys(("falcon_h1", "zamba", "zamba2"), _TWO_WRITERS),
    "dbrx": "the weights of its experts are one matrix, of which npt does not know the parts",
    "gpt_neox_japanese": "attention's bias joins the residual stream behind the last module of attention",
    "jetmoe": "its attention is a mixture too, and no module's output is what it adds to the residual stream",
    "longcat_flash": "a block has two attentions, and a mixture around the second",
    "xglm": "transformers can't run it in float64, in which npt holds every type against a formula",
    "mllama": "some of its blocks attend to images alone",
    "olmo_hybrid": "blocks with attention have their norms behind it, and those with a recurrence before it",
}


def _experts(config: Any) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = [getattr(config, name, None) for name in names]
    return any(isinstance(count, int) and count > 1 for count in counts) and getattr(config, "is_moe", True) is True


#: A reason, and a test of the model's config.
_BY_CONFIG: dict[str, Callable[[Any], bool]] = {
    "it has an encoder, and its decoder's blocks add cross-attention to the residual stream as well; "
    "npt converts decoder-only models": lambda config: bool(getattr(config, "is_encoder_decoder", False)),
    "its MLPs are mixtures of experts, and its type is none of those whose mixtures npt knows (npt families lists them); add "
    "it with register_family(model_type, Family(..., experts=...)), or use a dense model": _experts,
}


def refusal(config: Any) -> str | None:
    """Why models of a configuration can't be converted; None where nothing is known against it."""
    if (reason := REASONS.get(str(getattr(config, "model_type", None)))) is not None:
        return reason
    return next((reason for reason, applies in _BY_CONFIG.items() if applies(config)), None)
