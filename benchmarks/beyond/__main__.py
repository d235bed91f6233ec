"""Memory beyond the context: python -m benchmarks.beyond --model builtin:smollm2-135m --facts 4 16 64

A text states facts of invented people. It is read once, by edits, by absorbing or by a LoRA, and then asked for in other words
without it; the model with the text in front, and the model alone, stand beside. --part development tries the LoRA's rates and
epochs, on another seed; --part test takes the best of them, whatever the damage (lora) or within a limit (lora, mild). Prints
a line for each arm and keeps the figures in benchmarks/results/beyond-MODEL--PART.json; a command that was killed goes on with
the next arm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.__main__ import machine
from benchmarks.absorbing.arms import prepare
from benchmarks.beyond.arms import Room, Training
from benchmarks.beyond.facts import DEVELOPMENT, MOST, facts, text_of
from benchmarks.kept import PARTS, Kept, ended, file_of, opened, read_kept
from npt import EditStore, load_base
from npt.errors import NPTError

KIND = "beyond"
#: The LoRA's most epochs, and the epochs after which it is measured.
EPOCHS, AFTER = 40, (5, 10, 20, 40)
#: {arm: the mean KL on general text, in nats a token, within which its LoRA is chosen}.
LIMITS = {"lora": float("inf"), "lora, mild": 0.05}
#: In the order in which they are measured: edits stay in the store, so that a larger number only adds to them.
ARMS = ("nothing", "context", "absorb", "absorb, told", "lora", "lora, mild", "edits")


@dataclass(frozen=True)
class Chosen:
    """The LoRA's rate and epochs."""

    rate: float
    epochs: int


def choose(records: Mapping[str, Mapping[str, Any]], limit: float) -> Chosen:
    """The rate and epochs with the most facts answered in the asked wording, among those within the limit on general text.

    Args:
        records: of the development seed, {arm's place: its figures}.
        limit: mean KL in nats a token; where nothing is within, the setting nearest to it is taken.

    Raises:
        NPTError: no LoRA was trained.
    """
    points: dict[Chosen, list[Mapping[str, Any]]] = {}
    for record in records.values():
        for one in record.get("trainings", []):
            for mark in one["marks"]:
                points.setdefault(Chosen(one["rate"], mark["epochs"]), []).append(mark)
    if not points:
        raise NPTError("the development part holds no LoRA; measure it first with --arm lora")

    def key(chosen: Chosen) -> tuple[float, float]:
        over = max(0.0, fmean(mark["text_kl"] for mark in points[chosen]) - limit)
        return over, -fmean(share for mark in points[chosen] for share in mark["asked"])

    return min(points, key=key)


def arms_of(
    room: Room, given: argparse.Namespace, chosen: Mapping[str, Chosen] | None
) -> dict[str, Callable[[], dict[str, Any]]]:
    """{arm: what gives its figures}.

    Args:
        room: the model and the facts.
        given: the command line.
        chosen: the LoRA's settings, by arm.
    """

    def lora(arm: str) -> dict[str, Any]:
        if chosen is not None:
            rate, epochs = chosen[arm].rate, chosen[arm].epochs
            (mark,) = room.trained(Training(given.rank, rate, epochs), [epochs])
            return {**mark, "rate": rate}
        trainings = [
            {"rate": rate, "marks": room.trained(Training(given.rank, rate, EPOCHS), AFTER)} for rate in given.rates
        ]
        return {"trainings": trainings}

    return {
        "nothing": lambda: room.mark(0.0),
        "context": lambda: room.mark(0.0, text_of(room.facts)) | {"text_kl": 0.0},
        "absorb": lambda: room.absorbed(given.number, told=False),
        "absorb, told": lambda: room.absorbed(given.number, told=True),
        **{arm: partial(lora, arm) for arm in LIMITS},
        "edits": room.edited,
    }


def line_of(place: str, record: Mapping[str, Any]) -> str:
    """One arm's figures on a line."""
    marks = [
        (f"rate {one['rate']:g}, {m['epochs']} epochs", m) for one in record.get("trainings", []) for m in one["marks"]
    ]
    parts = [
        f"{label} {100 * fmean(m['asked']):.0f} % asked, {100 * fmean(m['prompt']):.0f} % as stated, general text "
        f"{m['text_kl']:.4f}, {m['seconds']:.0f} s".strip()
        for label, m in marks or [("", record)]
    ]
    return f"{place}: {'; '.join(parts)}"


def run(given: argparse.Namespace, kept: Kept, path: Path, chosen: Mapping[str, Chosen] | None) -> None:
    """Measures what is not in the file yet, and keeps each arm's figures."""
    model, tokenizer = load_base(given.model)
    seeds = given.seed if given.part == PARTS[1] else [DEVELOPMENT]
    store: EditStore | None = None
    for seed in seeds:
        if store is not None:
            store.close()
        store = EditStore(model, tokenizer, cache_dir=given.cache, progress=False)
        places = {
            f"{arm}, {count} facts, seed {seed}": (arm, count)
            for arm in ARMS
            if arm in given.arm
            for count in sorted(set(given.facts))
        }
        if any(place not in kept.contexts for place in places):
            print(f"seed {seed}: {prepare(store):.0f} s once", flush=True)
        most = facts(seed, max(given.facts))
        for place, (arm, count) in places.items():
            own = {"arm": arm, "facts": count, "seed": seed}
            measure = arms_of(Room(store, most[:count]), given, chosen)[arm]
            found = kept.measured(place, lambda own=own, measure=measure: {**own, **measure()}, path)  # type: ignore[misc]
            print(line_of(place, found), flush=True)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.beyond", description=str(__doc__).splitlines()[0])
    add = found.add_argument
    add("--model", default="builtin:smollm2-135m", help="default: builtin:smollm2-135m")
    add("--part", choices=PARTS, default=PARTS[0], help="development chooses the LoRA's setting (default)")
    add("--facts", type=int, nargs="+", default=[4, 16, 64], help="numbers of facts (default: 4 16 64)")
    add("--seed", type=int, nargs="+", default=[0], help="of the test's facts (default: 0)")
    add("--arm", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    add("--rank", type=int, default=8, help="of the LoRA (default: 8)")
    add("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="of the LoRA, to choose from (development)")
    add("--number", type=int, default=48, help="questions that the model writes at least, as for npt absorb")
    add("--output", type=Path, help="the file of the figures (default: in benchmarks/results)")
    add("--tuned-on", type=Path, help="with --part test: the file of the development part")
    add("--cache", type=Path, help="a folder that keeps the model's own text and its statistics")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 1 for an error that is said in one line."""
    given = parser().parse_args(arguments)
    return ended(lambda: command(given))


def command(given: argparse.Namespace) -> None:
    """Measures what the command line asks for."""
    path = given.output or file_of(KIND, given.model, given.part)
    if not all(1 <= count <= MOST for count in given.facts) or given.rank < 1 or min(given.rates) <= 0:
        raise NPTError(f"--facts, --rank, --rates: use 1 to {MOST} facts, a rank from 1, and rates above 0")
    if given.part == PARTS[1] and DEVELOPMENT in given.seed:
        raise NPTError(f"--seed {DEVELOPMENT}: choices were made on it; use others")
    chosen = None
    if given.part == PARTS[1] and not LIMITS.keys().isdisjoint(given.arm):
        tried = read_kept(given.tuned_on or file_of(KIND, given.model, PARTS[0])).contexts
        chosen = {arm: choose(tried, limit) for arm, limit in LIMITS.items()}
    if given.part == PARTS[0]:
        given.arm = [arm for arm in given.arm if arm != "lora, mild"]  # the same trainings
    about = {
        "model": given.model, "part": given.part, "rank": given.rank, "number": given.number, "machine": machine(),
    }  # fmt: skip
    if given.part == PARTS[0]:
        about["lora"] = list(given.rates)
    run(given, opened(path, about), path, chosen)


if __name__ == "__main__":
    sys.exit(main())
