"""`npt evaluate`: an adapter compared with the model it was made from, on the texts of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel

from npt.adapters.folder import load_adapter, resolve_checkpoint
from npt.common.files import write_json
from npt.common.places import place
from npt.common.processes import first_does, is_first
from npt.common.sharded import through
from npt.config import RunConfig
from npt.evaluation import evaluate
from npt.report.page import write_page
from npt.runs.arguments import start
from npt.runs.base_model import default_device, load_base, offload_frozen
from npt.runs.corpora import evaluation_blocks, further_corpora
from npt.runs.processes import shard_base, shards_base
from npt.runs.texts import RunTexts


def run_evaluation(
    config: RunConfig, checkpoint: str | Path, output: str | Path, *, more_text: Sequence[str | Path] = ()
) -> dict[str, Any]:
    """Evaluates a checkpoint on the configuration's data, its eval_texts and `more_text`; writes the report and returns it.

    Text the adapter was trained on is split as in training and only its held-out part is used; other text is used
    whole, up to data.num_eval_samples blocks.
    """
    output, arguments = place(output), start(config)
    texts = RunTexts.of(config)
    texts.check(more_text)
    model, tokenizer = load_npt(config, checkpoint)
    if shards_base(config.optimization.fsdp):
        shard_base(model, arguments)
    own = through(model, lambda: evaluation_blocks(texts, checkpoint, model, tokenizer))
    corpora = {config.data.dataset_name: own} | further_corpora(texts, tokenizer, more_text)
    report = evaluate_corpora(model, tokenizer, corpora, config)

    def write() -> None:
        write_json(output, report)
        # The curves of training belong to the page when the report lies with them.
        write_page(output.parent, output, output.with_suffix(".html"))

    first_does(write)
    return report


def load_npt(config: RunConfig, checkpoint: str | Path) -> tuple[PeftModel, Any]:
    """(NPT model, tokenizer): the base of the configuration with the adapter at `checkpoint` (see `load_adapter`)."""
    folder = resolve_checkpoint(checkpoint)  # a missing one is named before the base is loaded
    base, tokenizer = load_base(config.model, config.optimization, config.paths.cache_dir)
    model = load_adapter(base, folder, allow_other_base=config.model.allow_other_base)
    if config.optimization.use_cpu_offload:
        offload_frozen(model, default_device())
    return model, tokenizer


def evaluate_corpora(
    model: Any, tokenizer: Any, corpora: dict[str, datasets.Dataset], config: RunConfig
) -> dict[str, Any]:
    """The report on {name: blocks}, by all processes together."""
    size, t = config.data.max_length, config.training
    return through(
        model,
        lambda: evaluate(
            model, tokenizer, corpora, context_length=size, batch_size=t.batch_size, seed=t.seed, progress=is_first()
        ),
    )
