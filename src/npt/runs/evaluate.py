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
from npt.common.stopwatch import Stopwatch
from npt.config import RunConfig
from npt.data.seen import TextRecord
from npt.evaluation import evaluate
from npt.report.page import write_page
from npt.runs.arguments import start
from npt.runs.base_model import default_device, load_base, load_tokenizer, offload_frozen
from npt.runs.corpora import evaluation_blocks, further_corpora, own_counts, still_to_write
from npt.runs.estimate import EVALUATION, PAGE, SAMPLING, Part, Sizes, parts_of, say_plan, say_times
from npt.runs.processes import shard_base, shards_base
from npt.runs.texts import RunTexts
from npt.runs.timing import measure
from npt.runs.unseen import Unseen


def run_evaluation(
    config: RunConfig, checkpoint: str | Path, output: str | Path, *, more_text: Sequence[str | Path] = ()
) -> dict[str, Any]:
    """Evaluates a checkpoint on the configuration's data, its eval_texts and `more_text`; writes the report and returns it.

    Blocks that repeat text the adapter was trained on are left out, by its own record; of such a text the end is scored, as
    in training. Other text is used from its front. Each up to data.num_eval_samples blocks.

    Raises:
        DataError: a text of which nothing is left; before the base is loaded, unless the base writes the text itself.
    """
    output, arguments = place(output), start(config)
    texts, spent = RunTexts.of(config), Stopwatch()
    texts.check(more_text)
    texts.check_model(config.model)
    record = TextRecord.read(resolve_checkpoint(checkpoint))
    unseen = Unseen(None if record is None or config.data.score_seen_text else record.trained)
    tokenizer = load_tokenizer(config.model, config.paths.cache_dir)
    name, own = config.data.dataset_name, None
    if name != "self":
        own = evaluation_blocks(texts, checkpoint, None, tokenizer, record, unseen)
    further = further_corpora(texts, tokenizer, more_text, unseen)
    model, tokenizer = load_npt(config, checkpoint)
    if shards_base(config.optimization.fsdp):
        shard_base(model, arguments)
    parts = plan(config, texts, model, tokenizer, own, further, spent)
    if own is None:
        with spent.timing(SAMPLING):
            own = through(model, lambda: evaluation_blocks(texts, checkpoint, model, tokenizer, record, unseen))
    with spent.timing(EVALUATION):
        report = evaluate_corpora(model, tokenizer, {name: own} | further, config)
    report["notes"] = [*unseen.notes, *report["notes"]]

    def write() -> None:
        write_json(output, report)
        # The curves of training belong to the page when the report lies with them.
        write_page(output.parent, output, output.with_suffix(".html"))

    with spent.timing(PAGE):
        first_does(write)
    say_times(parts, spent)
    return report


def plan(
    config: RunConfig,
    texts: RunTexts,
    model: Any,
    tokenizer: Any,
    own: datasets.Dataset | None,
    further: dict[str, datasets.Dataset],
    spent: Stopwatch,
) -> list[Part]:
    """Logs the parts of an evaluation with the time that each will take, from timing a little text; returns them.

    Args:
        own: blocks of `data.dataset_name`; None where the base writes them. further: of the other texts.
    """
    with spent.timing("timing"):
        rates = measure(model, tokenizer, config, trains=False)
        to_write = through(model, lambda: still_to_write(texts, model, tokenizer, own_counts(texts, ("eval",))))
    held_out = (config.data.num_eval_samples or 0) if own is None else len(own)
    sizes = Sizes(
        sampled=tuple(to_write),
        scored=held_out + sum(map(len, further.values())),
        detailed=min(config.data.num_detail_samples, held_out),
    )
    parts = parts_of(config, sizes, rates)
    say_plan(config, model.get_base_model(), parts, rates)
    return parts


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
    data, t = config.data, config.training
    return through(
        model,
        lambda: evaluate(
            model, tokenizer, corpora, context_length=data.max_length, batch_size=t.batch_size, score=data.score,
            detail_blocks=data.num_detail_samples, seed=t.seed, progress=is_first(),
        ),
    )  # fmt: skip
