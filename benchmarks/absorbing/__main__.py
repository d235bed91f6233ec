"""Absorbing beside gradient context distillation, the context itself and nothing: python -m benchmarks.absorbing

    python -m benchmarks.absorbing --part development
    python -m benchmarks.absorbing --part test
    python -m benchmarks.absorbing.tables

On the development contexts a LoRA is trained with every rate; on the test contexts with the one that is best there, for
documents and for system prompts. Prints a line for each context and keeps its figures in
benchmarks/results/absorbing-MODEL--PART.json; a command that was killed goes on with the next context.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.__main__ import machine
from benchmarks.absorbing import arms
from benchmarks.absorbing.cases import FILES, Case, read_cases
from benchmarks.absorbing.choice import Chosen, at, choose, recovered
from benchmarks.kept import PARTS, Kept, Record, ended, file_of, opened, read_kept
from benchmarks.timing import CLOCKS, check_clock
from npt import EditStore, load_base
from npt.common.display import one_line
from npt.editing.absorbing.gradient import BATCH, TOKENS, Training
from npt.editing.absorbing.settings import Options
from npt.errors import NPTError

KIND = "absorbing"


def run(store: EditStore, cases: Sequence[Case], plans: Mapping[str, arms.Plan], kept: Kept, path: Path) -> None:
    """Measures the contexts that are not in the file yet, and keeps each.

    Args:
        store: a store with nothing in it, prepared.
        cases: the contexts.
        plans: {kind: what is run}.
        kept: the figures that there are.
        path: their file.
    """
    for case in cases:
        found = kept.measured(case.name, partial(arms.measure, store, case, plans[case.kind]), path)
        print(line_of(case.name, found, kept.about["chosen"]), flush=True)


def line_of(name: str, record: Record, chosen: Mapping[str, Any] | None) -> str:
    """One context's figures on a line; the gradient's best ones where nothing is chosen yet."""
    start = f"{name}: effect {record['effect']:.2f} nats"
    if "absorb" not in record:
        return f"{start}, below {arms.EFFECT:g}, left out"
    marks = {"absorb": record["descended"]} if "descended" in record else {}
    marks["closed form"] = record["absorb"]
    if chosen is not None:
        marks["gradient"] = at(record, Chosen(**chosen[record["kind"]]))
    elif record["gradient"]:
        marks["best gradient"] = min((m for one in record["gradient"] for m in one["points"]), key=lambda m: m["kl"])
    shown = (
        f"{arm} {100 * recovered(record, mark):.0f} % recovered, general text {mark['text_kl']:.4f}, {mark['seconds']:.0f} s"
        for arm, mark in marks.items()
    )
    return "; ".join([start, *shown])


def plans_of(
    given: argparse.Namespace, tuned: Kept | None, limit: float
) -> tuple[dict[str, arms.Plan], dict[str, Any]]:
    """({kind: what is run}, what the figures are measured with).

    Args:
        given: the command line.
        tuned: figures of the development contexts; None where these are measured now.
        limit: on general text.
    """
    options = {
        "number": given.number, "phrasings": given.phrasings, "new_tokens": given.new_tokens, "steps": 0,
    }  # fmt: skip
    steps, batch = tuple(sorted(set(given.steps))), given.batch
    if tuned is not None:
        steps, batch = tuple(tuned.about["steps"]), tuned.about["batch"]
    chosen = None if tuned is None else {kind: choose(tuned.contexts, kind, limit) for kind in FILES}
    trainings = arms.trainings(given.rates, given.tokens, given.betas, batch, steps[-1])
    plan = arms.Plan(trainings, steps, given.descent, given.memory, options, given.clock)
    plans = dict.fromkeys(FILES, plan)
    if chosen is not None:
        for kind, one in chosen.items():
            plans[kind] = replace(plan, trainings=(Training(one.rate, one.tokens, batch, one.beta, steps[-1]),))
    about: dict[str, Any] = {
        "model": given.model, "part": given.part, "machine": machine(), "options": options, "steps": list(steps),
        "batch": batch, "limit": limit, "clock": given.clock, "descent": given.descent, "number": Options.number,
        "rates": list(given.rates) if tuned is None else tuned.about["rates"],
        "tokens": list(given.tokens) if tuned is None else tuned.about["tokens"],
        "betas": list(given.betas) if tuned is None else tuned.about["betas"],
        "chosen": None if chosen is None else {kind: asdict(one) for kind, one in chosen.items()},
    }  # fmt: skip
    return plans, about


def chosen_cases(part: str, only: Sequence[str]) -> list[Case]:
    """The contexts of a part, or those of them that are named.

    Raises:
        NPTError: the part has none of that name.
    """
    found = [case for case in read_cases() if case.part == part]
    unknown = [name for name in only if name not in {case.name for case in found}]
    if unknown:
        names = ", ".join(case.name for case in found)
        raise NPTError(f"--only {one_line(unknown[0], 40)}: no context of the {part} part; use {names}")
    return [case for case in found if not only or case.name in only]


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.absorbing", description=str(__doc__).splitlines()[0])
    add = found.add_argument
    add("--model", default="builtin:smollm2-135m", help="default: builtin:smollm2-135m")
    add("--part", choices=PARTS, default=PARTS[0], help="the contexts (default: development)")
    add("--only", nargs="+", default=[], metavar="NAME", help="these contexts of the part")
    add("--output", type=Path, help="the file of the figures (default: in benchmarks/results)")
    add("--tuned-on", type=Path, help="with --part test: the file of the development contexts")
    add("--rates", type=float, nargs="+", default=[1e-3, 3e-3], help="of AdamW, to choose from (development)")
    add("--steps", type=int, nargs="+", default=[20, 40], help="after which it is measured (development)")
    add("--tokens", nargs="+", choices=TOKENS, default=["all"], help="that the LoRA's KL is taken over, to choose from")
    add("--betas", type=float, nargs="+", default=[2.0], help="the LoRA's weights of text, to choose from")
    add("--batch", type=int, default=BATCH, help="conversations of a step (development; default: 8)")
    add("--number", type=int, default=144, help="questions that the closed form and the LoRA learn from (default: 144)")
    add("--phrasings", type=int, default=3, help="wordings of each (default: 3)")
    add("--new-tokens", type=int, default=Options.new_tokens, help="the longest answer, as for npt absorb")
    add(
        "--descent",
        type=int,
        default=Options.steps,
        help="absorb's steps by gradient, as for npt absorb",
    )
    add("--memory", action="store_true", help="count each arm's peak, in runs of its own")
    add("--clock", choices=CLOCKS, default="wall", help="processor: this process's own time, on a busy machine")
    add("--cache", type=Path, help="a folder that keeps the model's own text and its statistics")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 1 for an error that is said in one line."""
    given = parser().parse_args(arguments)
    return ended(lambda: command(given))


def command(given: argparse.Namespace) -> None:
    """Measures what the command line asks for."""
    check_clock(given.clock)
    path = given.output or file_of(KIND, given.model, given.part)
    if min(*given.steps, given.batch) < 1 or any(not rate > 0 for rate in given.rates):
        raise NPTError("--steps, --batch and --rates: use whole numbers from 1, and rates above 0")
    if not min(given.descent, *given.betas) >= 0:
        raise NPTError("--descent and --betas: use numbers from 0")
    tuned = None if given.part == PARTS[0] else read_kept(given.tuned_on or file_of(KIND, given.model, PARTS[0]))
    plans, about = plans_of(given, tuned, Options.limit)
    cases, kept = chosen_cases(given.part, given.only), opened(path, about)
    model, tokenizer = load_base(given.model)
    store = EditStore(model, tokenizer, cache_dir=given.cache, progress=False)
    if any(case.name not in kept.contexts for case in cases):
        print(f"once for the model: {arms.prepare(store):.0f} s", flush=True)
    run(store, cases, plans, kept, path)


if __name__ == "__main__":
    sys.exit(main())
