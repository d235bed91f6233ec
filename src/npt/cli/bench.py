"""Commands that measure methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from npt.cli.app import app, say
from npt.cli.options import Set, place_of
from npt.errors import NPTError

bench = typer.Typer(help="Methods measured side by side.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


class _Several(TyperCommand):
    """A command without arguments, whose options that may be given several times also take several values at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        many = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        given, option, bare = list[str](), "", False
        for word in args:
            if word.startswith("-") and not word[1:2].isdigit():
                option, bare = word, "=" not in word
                given.append(word)
            elif option in many and not bare:
                given += [option, word]
            else:
                given.append(word)
                bare = False
        return super().parse_args(ctx, given)


Records = Annotated[
    Path | None, typer.Option("--records", help="A JSON file of CounterFact's or zsRE's format.", callback=place_of)
]
Model = Annotated[str, typer.Option("--model", metavar="NAME", help="The base.")]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="Methods by name (default: all; of --factworld, margin).")
]
Limit = Annotated[int | None, typer.Option("--limit", help="The first so many records.")]
Batch = Annotated[
    list[int] | None, typer.Option("--batch", help="Records written together; several sizes (default: 1).")
]
Draws = Annotated[
    int | None,
    typer.Option(
        "--draws", help="Random batches of each size above 1, no record in two, instead of one after the other."
    ),
]
Sequential = Annotated[
    bool, typer.Option("--sequential", help="Write the records of a batch (default: all) one after the other.")
]
Layers = Annotated[
    list[int] | None, typer.Option("--layers", help="Blocks, rising; methods with one block use the middle.")
]
Metric = Annotated[str, typer.Option("--metric", help="domain, text or identity.")]
Option = Annotated[
    list[str] | None, typer.Option("--option", metavar="METHOD.NAME=VALUE", help="An option of one method.")
]
With = Annotated[list[str] | None, typer.Option("--with", help="Figures that cost more: fluency, skill.")]
Text = Annotated[
    Path | None, typer.Option("--text", help="Running text to keep (default: the base's own).", callback=place_of)
]
TunedOn = Annotated[
    Path | None,
    typer.Option("--tuned-on", help="Records that choices were made on; none may be in --records.", callback=place_of),
]
Cache = Annotated[Path | None, typer.Option("--cache", help="A folder that keeps statistics.", callback=place_of)]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="A JSON file of all figures, from which a second call goes on.", callback=place_of),
]
Page = Annotated[Path | None, typer.Option("--page", help="An HTML file: table, plot, texts.", callback=place_of)]
From = Annotated[
    list[Path] | None, typer.Option("--from", help="Files of --output, joined; measures nothing.", callback=place_of)
]
FactWorld = Annotated[
    list[str] | None,
    typer.Option("--factworld", metavar="NAME", help="Edit small models of invented worlds: llama, gpt2, or both."),
]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Of the worlds of --factworld; several (default: 0).")]
Edits = Annotated[
    list[int] | None,
    typer.Option("--edits", help="Facts of --factworld written together; several numbers (default: 1 64 256)."),
]


@bench.command(cls=_Several)
def editing(
    ctx: typer.Context,
    records: Records = None,
    model: Model = "builtin:tiny",
    method: Methods = None,
    limit: Limit = None,
    batch: Batch = None,
    draws: Draws = None,
    sequential: Sequential = False,
    layers: Layers = None,
    metric: Metric = "domain",
    option: Option = None,
    with_: With = None,
    text: Text = None,
    tuned_on: TunedOn = None,
    cache: Cache = None,
    output: Output = None,
    page: Page = None,
    from_: From = None,
    factworld: FactWorld = None,
    seed: Seeds = None,
    edits: Edits = None,
    set_: Set = None,
) -> None:
    """Writes records of facts by several methods and prints a row of figures for each.

    All edit the same base at the same blocks, with the same statistics. Figures are of text that the model writes.
    """
    from npt.common.writable import check_file
    from npt.editing.benchmark.rows import table
    from npt.runs import editing_bench
    from npt.runs.edits import cache_folder

    if page is not None:
        check_file("--page", page, ".html")
    if factworld:
        _alone(ctx, "--factworld", _OF_WORLDS, "its worlds bring their models, records and text")
        _measure_factworld(factworld, seed, edits, method, layers, metric, option, cache, output)
        return
    _without_worlds(ctx)
    if from_:
        _alone(ctx, "--from", ("from_", "page"), "its figures are measured already")
        kept = editing_bench.joined_figures(from_)
    elif records is None:
        raise NPTError(
            "npt bench editing: give --records FILE or --factworld NAME to measure, or --from FILE to show what was kept"
        )
    else:
        kept = editing_bench.measure_editing(
            editing_bench.Bench(
                records, model, set_ or (), method or (), limit, batch or (), draws, sequential, layers or (), metric,
                option or (), text, tuned_on, with_ or (), cache or cache_folder(), output,
            )
        )  # fmt: skip
    say(table(kept.rows))
    if page is not None:
        from npt.editing.benchmark.page import write_page

        say(f"page: {write_page(kept, page)}")


def _measure_factworld(
    models: list[str],
    seeds: list[int] | None,
    edits: list[int] | None,
    methods: list[str] | None,
    layers: list[int] | None,
    metric: str,
    options: list[str] | None,
    cache: Path | None,
    output: Path | None,
) -> None:
    from npt.editing.benchmark.factworld import METHOD
    from npt.editing.benchmark.worlds import gates_text, worlds_table
    from npt.runs.factworld_bench import FactWorldBench, measure_factworld

    found = measure_factworld(
        FactWorldBench(
            models, seeds or (0,), edits or (1, 64, 256), methods or (METHOD,), layers or (), metric, options or (),
            cache=cache, output=output,
        )
    )  # fmt: skip
    say(worlds_table(found))
    say(gates_text(found))


#: Parameters that go with --factworld, and those of them that go with nothing else.
_OF_WORLDS = ("factworld", "seed", "edits", "method", "layers", "metric", "option", "cache", "output")
_WORLDS_ALONE = ("seed", "edits")


def _given(ctx: typer.Context) -> list[tuple[str, str]]:
    """(name, option) of every parameter that stands on the command line."""
    sources = [(param, ctx.get_parameter_source(str(param.name))) for param in ctx.command.params]
    return [(str(p.name), p.opts[0]) for p, source in sources if source is not None and source.name == "COMMANDLINE"]


def _alone(ctx: typer.Context, option: str, beside: tuple[str, ...], why: str) -> None:
    """Checks that an option stands beside certain parameters only.

    Raises:
        NPTError: names another one.
    """
    for name, other in _given(ctx):
        if name not in beside:
            raise NPTError(f"{option}: goes without {other}; {why}")


def _without_worlds(ctx: typer.Context) -> None:
    """Checks that nothing is given that belongs to --factworld.

    Raises:
        NPTError: names it.
    """
    for name, option in _given(ctx):
        if name in _WORLDS_ALONE:
            raise NPTError(f"{option}: goes with --factworld; name its models, as in --factworld llama gpt2")
