"""Commands about edits: write facts into a model, read them back, undo them, hand them to other programs."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npt.cli.app import app, say
from npt.cli.options import Set, place_of
from npt.common.display import blocks_text, one_line
from npt.errors import NPTError

if TYPE_CHECKING:
    from npt.editing.absorbing.absorbed import Absorbed
    from npt.editing.requests import Request
    from npt.editing.writing import Edit

logger = logging.getLogger("npt")

edit = typer.Typer(
    help="Permanent weight deltas: facts written, proved, undone.", no_args_is_help=True,
    rich_markup_mode=None,
)  # fmt: skip
app.add_typer(edit, name="edit")

Store = Annotated[Path, typer.Option("--store", help="The store's folder, which plain PEFT loads.", callback=place_of)]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="The base; without it, the one that the store was written for."),
]
Damage = Annotated[
    float | None,
    typer.Option(
        "--limit", help="The most that all facts may disturb the base's own text, in nats; without, no limit."
    ),
]


class Format(str, Enum):
    """The kinds of file that `npt edit export` writes."""

    PEFT = "peft"
    GGUF = "gguf"


@edit.command()
def write(
    store: Store,
    model: Model = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The text before the target.")] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="The part of the prompt the fact is about.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="What shall follow the prompt.")] = None,
    paraphrase: Annotated[
        list[str] | None, typer.Option("--paraphrase", help="Another prompt for the target; any number.")
    ] = None,
    protect: Annotated[
        list[str] | None, typer.Option("--protect", help="A prompt after which nothing shall change; any number.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            help="Many edits: JSON lines with prompt, subject, target, paraphrases, protect.",
            callback=place_of,
        ),
    ] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Show what both models write; save nothing.")] = False,
    layer: Annotated[
        str | None, typer.Option("--layer", help="The block, several as in 4,5,6, or auto (a new store's default).")
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="domain (default), text or identity.")] = None,
    values: Annotated[
        str | None, typer.Option("--values", help="newton (default), optimised, margin or naive.")
    ] = None,
    ridge: Annotated[str | None, typer.Option("--ridge", help="auto (default), or a number from 0.")] = None,
    limit: Damage = None,
    statistics: Annotated[
        list[str] | None, typer.Option("--statistics", help="Text files not to disturb; without, the base's own text.")
    ] = None,
    set_: Set = None,
) -> None:
    """Writes one fact, or those of a file.

    Shows the text that the base and the edited model write behind each prompt.
    """
    from npt.runs import edits

    requests, places = _requests(file, prompt, subject, target, paraphrase, protect)
    edits.check_target(store)
    new = edits.new_requests(store, requests, places)
    if not new:
        say(f"{store}: holds these edits already; nothing to write")
        return
    options = edits.Options(model, set_ or (), layer, metric, values, ridge, limit, statistics or ())
    edits.check_options(options, store)
    if preview:
        for written in edits.write_edits(edits.opened(store, options), new, None):
            _show(written)
        return
    with edits.only_process(store):
        new = edits.new_requests(store, requests, places)
        for written in edits.write_edits(edits.opened(store, options), new, store):
            _show(written)
    _say_written(store)


@app.command()
def absorb(
    context: Annotated[
        Path, typer.Option("--context", help="A file of text, or the messages of a chat as .json.", callback=place_of)
    ],
    store: Store,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            help="One question a line, or JSON lines with question and answer; else the model's own.",
            callback=place_of,
        ),
    ] = None,
    model: Model = None,
    blocks: Annotated[str | None, typer.Option("--blocks", help="auto (default), or indices such as 15,17,19.")] = None,
    number: Annotated[int | None, typer.Option("--number", help="Questions that the model writes (288).")] = None,
    limit: Annotated[
        float | None,
        typer.Option("--limit", help="Mean KL on general text: the closed form's most; above it, a note (0.02)."),
    ] = None,
    mu: Annotated[
        float | None, typer.Option("--mu", help="The closed form's weight of general text; else chosen.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="The largest rank of a block's weight delta (128).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps by gradient (80); 0: the closed form alone.")
    ] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="AdamW's rate in these steps (0.003).")] = None,
    start: Annotated[str | None, typer.Option("--start", help="Where they begin: zero (default) or closed.")] = None,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", help="The longest answer (48).")] = None,
    style: Annotated[str | None, typer.Option("--style", help="auto (default), chat, question or text.")] = None,
    statistics: Annotated[
        list[str] | None, typer.Option("--statistics", help="Text files not to disturb; without, the base's own text.")
    ] = None,
    set_: Set = None,
) -> None:
    """Writes a context into the weights of several blocks.

    Without the context, the model then answers as with it. Shows answers to held-out questions before, with the context, and
    after; the store's report.html has all of them.
    """
    from npt.runs.absorb import absorb as absorb_into
    from npt.runs.absorb import asked_for
    from npt.runs.edits import Options

    given = {
        "number": number, "limit": limit, "mu": mu, "rank": rank, "steps": steps, "rate": rate, "start": start,
        "new_tokens": new_tokens, "style": style,
    }  # fmt: skip
    asked = asked_for(context, questions, blocks, given)
    found, page = absorb_into(store, asked, Options(model, set_ or (), statistics=statistics or ()))
    _show_absorbed(found)
    say(f"store: {store}")
    say(f"page: {page}")


@edit.command("list")
def list_(store: Store) -> None:
    """Lists the edits of a store; loads no model."""
    from npt.editing.absorbing.absorbed import Absorbed
    from npt.runs.edits import edits_in

    for found in edits_in(store):
        state = "holds" if found.holds else "does not hold"
        if isinstance(found, Absorbed):
            say(
                f"{found.id}  context {one_line(found.request.prompt, 80)}  ({state}, {found.figures.recovered:.0%} recovered)"
            )
            continue
        say(f"{found.id}  {one_line(found.request.prompt)} -> {one_line(found.request.target)}  ({state})")


@edit.command()
def show(id: Annotated[str, typer.Argument(help="An edit's id.")], store: Store) -> None:
    """Shows one edit, as it was asked and as it came out."""
    from npt.editing.absorbing.absorbed import Absorbed
    from npt.runs.edits import edit_in

    found = edit_in(store, id)
    if isinstance(found, Absorbed):
        say(f"context: {one_line(found.request.prompt)}")
        _show_absorbed(found)
        return
    request = found.request
    say(f"{found.id}  block {' '.join(map(str, found.layers))}, values {found.values}, {found.passes} passes")
    for name in ("prompt", "subject", "target", "paraphrases", "protect"):
        value = getattr(request, name)
        if value:
            say(f"{name}: {value if isinstance(value, str) else ' / '.join(value)}")
    _show(found)


@edit.command()
def verify(store: Store, model: Model = None, set_: Set = None) -> None:
    """Reads every edit back, with all of them at work.

    Exit status 1 where one does not hold.
    """
    from npt.runs.edits import Options, opened_there

    found = opened_there(store, Options(model, set_ or ())).verify()
    for one in found:
        say(f"{one.id}  {'holds' if one.holds else 'DOES NOT HOLD'}  {one_line(one.prompt)} -> {one_line(one.target)}")
        say(f"  before  {one_line(one.before)}")
        say(f"  after   {one_line(one.after)}")
    held = sum(one.holds for one in found)
    say(f"{held} of {len(found)} edits hold")
    if held < len(found):
        raise typer.Exit(1)


@edit.command()
def refine(
    store: Store,
    steps: Annotated[int, typer.Option("--steps", help="Steps by gradient; 0 goes back to the solve.")] = 100,
    model: Model = None,
    set_: Set = None,
) -> None:
    """Trains the facts of a store together, so that they disturb other text and each other less.

    Facts that are written or undone later are trained with the others again.
    """
    from npt.runs import edits

    edits.check_refinable(store, steps)
    with edits.only_process(store):
        for line in edits.refine(edits.opened_there(store, edits.Options(model, set_ or ())), steps, store):
            say(line)
        say(f"store: {store}")


@edit.command()
def undo(
    ids: Annotated[list[str], typer.Argument(help="Ids of edits, as `npt edit list` shows them.")],
    store: Store,
    model: Model = None,
    set_: Set = None,
) -> None:
    """Takes edits back, as if they had never been written."""
    from npt.report.run_files import PAGE
    from npt.runs import edits
    from npt.runs.absorb import write_page

    for id in ids:
        edits.edit_in(store, id)
    with edits.only_process(store):
        there = edits.opened_there(store, edits.Options(model, set_ or ()))
        there.undo(*dict.fromkeys(ids))
        there.save(store)
        if (store / PAGE).is_file():
            write_page(store)
    say(f"{store}: {len(there.edits)} edits left")


@edit.command()
def export(
    store: Store,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder, or a .gguf file.", callback=place_of)],
    format: Annotated[Format, typer.Option("--format", help="peft: a folder; gguf: for llama.cpp.")] = Format.PEFT,
    model: Model = None,
    set_: Set = None,
) -> None:
    """Writes the edits as a LoRA for other programs."""
    from npt.runs.edits import Options
    from npt.runs.edits import export as export_lora

    export_lora(store, output, format.value, Options(model, set_ or ()))
    say(f"{format.value}: {output}")


@edit.command()
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Two stores or more, of one base and layer.", callback=place_of)],
    store: Annotated[Path, typer.Option("--store", help="The new store's folder.", callback=place_of)],
    model: Model = None,
    set_: Set = None,
) -> None:
    """Joins stores into a new one that holds the edits of all."""
    from npt.runs.edits import Options
    from npt.runs.edits import merge as merge_stores

    say(f"store: {store}, {len(merge_stores(stores, store, Options(model, set_ or ())).edits)} edits")


def _requests(
    file: Path | None, prompt: str | None, subject: str | None, target: str | None, paraphrases: object, protect: object
) -> tuple[list[Request], list[str]]:
    """The requests of a file, or the one of the options, with their places."""
    from npt.editing.requests import read_requests, request_of

    given = {"prompt": prompt, "subject": subject, "target": target, "paraphrases": paraphrases, "protect": protect}
    said = {name: value for name, value in given.items() if value is not None}
    if file is not None:
        if said:
            raise NPTError(f"--file {file}: goes without --{min(said)}; give one or the other")
        return read_requests(file)
    if prompt is None or target is None:
        raise NPTError("npt edit write: give --prompt and --target, or --file with many edits")
    return [request_of(said, "npt edit write")], ["npt edit write"]


def _say_written(store: Path) -> None:
    from npt.runs.edits import untrained

    if count := untrained(store):
        say(
            f"{count} facts at once disturb other text and each other: npt edit refine --store {store} trains them together"
        )
    say(f"store: {store}")


def _show_absorbed(found: Absorbed) -> None:
    for row in found.compared:
        say(f"{one_line(row.question)}  (KL {row.kl_before:.3f} -> {row.kl_after:.3f})")
        say(f"  before   {one_line(row.before)}")
        say(f"  context  {one_line(row.taught)}")
        say(f"  after    {one_line(row.after)}")
    figures, setting = found.figures, found.setting
    say(f"{found.id}  {figures.recovered:.0%} recovered: KL to the model with the context {figures.kl_before:.3f} -> "
        f"{figures.kl_after:.3f} on {len(found.compared)} held-out questions; general text {figures.text_kl:.4f}")  # fmt: skip
    solved = f"mu {setting.mu:.3g}, lambda {setting.lam:.2g}, " if setting.is_solved else ""
    say(f"  {blocks_text(setting.blocks)}, {solved}{setting.steps} steps by gradient, {figures.seconds:.0f} s")
    for line in (*found.left_out, found.note):
        if line:
            say(f"  note     {one_line(line)}")


def _show(found: Edit) -> None:
    say(f"{found.id}  {one_line(found.request.prompt)}")
    say(f"  before  {one_line(found.before)}")
    say(f"  after   {one_line(found.after)}{'' if found.holds else '   (DOES NOT HOLD)'}")
    if not found.holds and found.values == "newton":
        say("  remedy  of many facts, npt edit refine; of one, another --layer in another store")
    if found.note:
        say(f"  note    {found.note}")
