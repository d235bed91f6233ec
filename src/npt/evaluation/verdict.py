"""The verdict on a report's figures: the method's three expected outcomes, and a grade on the scale of quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KL_TARGET, RMS_ENTRY_TARGET, EXACT_FACTOR, RATIO_TOLERANCE = 0.01, 0.01, 1.1, 0.05

#: Mean KL of quantised models to their own float16 original on WikiText-2, in nats per token: (name, bits, Llama 3 8B).
#: Published in llama.cpp, tools/perplexity/README.md, "LLaMA 3 8b Scoreboard" and "LLaMA 3 BF16 vs. FP16 comparison"
#: (llama.cpp f364eb6f and 83330d8c; no importance matrix).
QUANTISATION_SCALE = (
    ("rounding to bfloat16", 16, 0.00002515),
    ("8-bit quantisation (q8_0)", 8, 0.001355),
    ("6-bit quantisation (q6_K)", 6, 0.005452),
    ("5-bit quantisation (q5_K_M)", 5, 0.010762),
    ("4-bit quantisation (q4_K_M)", 4, 0.031273),
    ("3-bit quantisation (q3_K_M)", 3, 0.101913),
    ("2-bit quantisation (q2_K)", 2, 0.445132),
)
#: The share of unknown tokens in scored text from which on the report says so.
UNKNOWN_SHARE = 0.01
SCALE_SOURCE = "https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md"


def expected_outcomes(evaluations: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The three outcomes the method promises, each {target, value, standard_error, met}.

    `met` compares the value itself; the standard error (None where there is none) says how firm that is.
    """
    divergence, perplexity = evaluations["divergence"], evaluations["perplexity"]
    kl, ratio = divergence["mean_kl"], perplexity["perplexity_ratio"]
    delta = evaluations["weight_delta_stats"]
    small = delta["rms_entry"] < RMS_ENTRY_TARGET
    near_exact = delta["mean_frobenius"] <= EXACT_FACTOR * delta["exact_frobenius"]
    return {
        "functional_fidelity": {
            "target": f"mean KL <= {KL_TARGET}",
            "value": kl,
            "standard_error": divergence.get("mean_kl_standard_error"),
            "met": kl <= KL_TARGET,
        },
        "low_magnitude_delta": {
            "target": f"rms entry < {RMS_ENTRY_TARGET}, mean norm <= {EXACT_FACTOR} x exact",
            "value": delta["rms_entry"],
            "standard_error": None,
            "met": small and near_exact,
        },
        "perplexity_ratio": {
            "target": f"1.0 +/- {RATIO_TOLERANCE}",
            "value": ratio,
            "standard_error": perplexity.get("perplexity_ratio_standard_error"),
            "met": abs(ratio - 1) <= RATIO_TOLERANCE,
        },
    }


def grade(mean_kl: float, unknown_share: float = 0.0) -> dict[str, Any]:
    """Places a mean KL among quantisations: {as_near_as, bits, text, source}.

    as_near_as is the finest quantisation whose published KL is not below this one; it and bits are None beyond the coarsest.

    Args:
        unknown_share: of the scored tokens that are the tokenizer's unknown token, which both models foresee alike.
    """
    spoilt = ""
    if unknown_share > UNKNOWN_SHARE:
        spoilt = f", on text of which the vocabulary does not know {100 * unknown_share:.2g} % of the tokens"
    for name, bits, kl in QUANTISATION_SCALE:
        if mean_kl <= kl:
            text = (
                f"as near to the original as {name}{spoilt} (mean KL {mean_kl:.2g}; that costs {kl:.2g} on Llama 3 8B)"
            )
            return {"as_near_as": name, "bits": bits, "text": text, "source": SCALE_SOURCE}
    name, bits, kl = QUANTISATION_SCALE[-1]
    text = f"further from the original than {name}{spoilt} (mean KL {mean_kl:.2g}; that costs {kl:.2g} on Llama 3 8B)"
    return {"as_near_as": None, "bits": None, "text": text, "source": SCALE_SOURCE}
