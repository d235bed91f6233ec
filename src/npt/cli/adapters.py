"""Commands that use adapters: generate text, join them, hand one to another program."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from npt.cli.app import app, console, say
from npt.cli.options import Checkpoint, OwnConfig, Set, place_of
from npt.common.display import blocks_text, visible
from npt.common.distribution import install_extra
from npt.errors import NPTError

logger = logging.getLogger("npt")


class Decoding(str, Enum):
    """How `npt generate` chooses the next token; `sampled` is at temperature 1 from the whole distribution."""

    GREEDY = "greedy"
    SAMPLED = "sampled"
    BASE = "base"


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    checkpoint: Checkpoint = Path("checkpoints/best_model"),
    config: OwnConfig = None,
    set_: Set = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    decoding: Annotated[
        Decoding, typer.Option("--decoding", help="base: by the settings of the base's own generation_config.json.")
    ] = Decoding.GREEDY,
) -> None:
    """Continues prompts with the NPT model and the original."""
    from rich.markup import escape

    from npt.adapters.settings import load_settings
    from npt.evaluation.generation import check_context, check_prompts, own_settings, side_by_side
    from npt.runs.evaluate import load_npt

    check_prompts(prompts)
    run = load_settings(checkpoint, config, set_ or (), ("model", "optimization"))
    model, tokenizer = load_npt(run, checkpoint)
    check_context(model, tokenizer, prompts, max_new_tokens)
    seed, own = None if decoding is Decoding.GREEDY else run.training.seed, decoding is Decoding.BASE
    if own:
        logger.info("decoding by the base's own settings: %s", own_settings(model) or "none beside the defaults")
    for sample in side_by_side(model, tokenizer, prompts, max_new_tokens, seed, own):
        for name in ("npt", "original"):
            console().print(f"[bold]{name:>8}[/bold]  {escape(visible(sample[name]))}")


@app.command("merge-adapters")
def merge_adapters(
    adapters: Annotated[list[Path], typer.Argument(help="Two adapter folders or more.", callback=place_of)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new adapter's folder.", callback=place_of)],
) -> None:
    """Joins adapters of disjoint blocks of one base.

    They come from jobs that trained other blocks each.
    """
    from npt.adapters.join import join

    parts = join(adapters, output)
    for part in parts:
        say(f"{blocks_text(part.blocks)} of {part.folder}: {part.parameters:,} parameters")
    blocks = sorted(block for part in parts for block in part.blocks)
    say(f"adapter: {output}, {blocks_text(blocks)}: {sum(part.parameters for part in parts):,} parameters")


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="--checkpoint FOLDER --tasks NAMES [options of the harness]",
)
def lm_eval(context: typer.Context) -> None:
    """Runs lm-evaluation-harness on an NPT model.

    Its own command and options, with the model type npt. --checkpoint scores the base on the same items as well;
    --no-base leaves that out.
    """
    try:
        from npt.integrations.lm_eval import run_harness
        from npt.integrations.paired import comparison_tables
    except ImportError as error:
        raise NPTError(f"npt lm-eval needs lm-evaluation-harness ({error}): {install_extra('lm-eval')}") from error
    for table in comparison_tables(run_harness(context.args)):
        console().print(table)


@app.command("make-tasks")
def make_tasks(
    folder: Annotated[Path, typer.Argument(help="A new folder for the tasks.", callback=place_of)],
    text: Annotated[
        list[Path],
        typer.Option("--text", help="A file of text, or a pattern of several; may be repeated.", callback=place_of),
    ],
    items: Annotated[int, typer.Option("--items", min=2, help="Questions of each task.")] = 200,
    words: Annotated[int, typer.Option("--words", min=1, help="Words of context in each question.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Chooses passages and the order of answers.")] = 0,
) -> None:
    """Makes tasks for lm-evaluation-harness from text.

    The tasks are cloze and continuation; npt lm-eval --include-path FOLDER --tasks cloze,continuation runs them.
    """
    from npt.integrations import local_tasks

    for name, found in local_tasks.make_tasks(folder, text, items=items, words=words, seed=seed).items():
        say(f"{name}: {items} items, of {found} passages that the text has")
    say(f"tasks: {folder}")
