"""Figures of a method on records, on text that the model writes with nothing of the answer given.

efficacy     the text behind the prompt begins with the target
paraphrase   the same behind the paraphrases
locality     behind a neighbour's prompt, the base and the edited model write the same up to the sentence's end
ordering     behind a neighbour's prompt, what is right stays likelier than the target; of records that say what is right
S            harmonic mean of efficacy, paraphrase and locality
forced       share of the target's tokens that are the likeliest with those before given
forced all   share of records of which all of them are; `gap` is that less efficacy
kl           mean divergence of next-token distributions from the base's over running text, in nats; 0 for the context, which
             is put in front of prompts alone. `largest kl` is that of the worst batch
perplexity   of the running text, edited over base
bytes        of what is written, as it is saved

`fluency` and `skill` are made by `npt.editing.benchmark.extras` where they are asked for.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from npt.common.display import one_line
from npt.common.progress import progress_bar
from npt.editing.bench import chunks
from npt.editing.benchmark.asking import Asker
from npt.editing.benchmark.extras import Extras
from npt.editing.benchmark.methods import Method
from npt.editing.benchmark.records import Record
from npt.errors import NPTError, RunError

#: Records of a row whose texts are shown, and records shown at most of those that came out wrong.
SHOWN, WRONG = 3, 5


@dataclass(frozen=True)
class Outcome:
    """The figures of one record; None where a record does not say what is right, or a figure was not asked for.

    group: the batch that it was written in. From kl on they are those of the batch: divergence, rise of the running text's
    negative log-likelihood, skill and its change, cost of one edit, bytes of all.
    """

    group: int
    efficacy: float
    paraphrase: float | None
    locality: float | None
    ordering: float | None
    forced: float
    forced_all: float
    fluency: float | None
    fluency_change: float | None
    kl: float
    rise: float
    skill: float | None
    skill_change: float | None
    seconds: float
    passes: float
    bytes: float


#: Figures that the records of a batch share.
OF_BATCH = ("kl", "rise", "skill", "skill_change", "seconds", "passes", "bytes")


@dataclass(frozen=True)
class Example:
    """Text before and after of one prompt of a record.

    kind: "prompt", "paraphrase" or "neighbour". right: the target follows, or the neighbour's text is the same.
    """

    kind: str
    prompt: str
    target: str
    before: str
    after: str
    right: bool


@dataclass(frozen=True)
class Measured:
    """A batch that is done."""

    outcomes: list[Outcome]
    examples: list[Example]


def measured(
    method: Method,
    asker: Asker,
    batches: Sequence[Sequence[Record]],
    *,
    label: str = "Editing",
    progress: bool = True,
    sequential: bool = False,
    extras: Extras | None = None,
    first: int = 0,
    wrong: int = 0,
) -> Generator[Measured, None, None]:
    """Measures batch after batch: its records are written, then all are asked, then they are taken back.

    Args:
        sequential: write the records of a batch one after the other instead of together.
        extras: makes the figures that cost more.
        first: the batch to begin with; those before are done. wrong: examples of what came out wrong in them.

    Raises:
        RunError: a figure is not finite; the batch is taken back.
    """
    for near in (near for batch in batches[first:] for record in batch for near in record.neighbours):
        asker.said(near.prompt)  # while nothing is written
    sizes = [len(part) for part in batches]
    with progress_bar(label, sum(sizes), progress, unit="records", done=sum(sizes[:first])) as advance:
        for group in range(first, len(batches)):
            limits = max(0, SHOWN - sum(sizes[:group])), WRONG - wrong
            found = _of_batch(method, asker, batches[group], group, sequential, extras or Extras(), limits, label)
            advance(sizes[group])  # writing takes longer than asking: records asked one by one would tell of neither
            wrong += sum(not example.right for example in found.examples)
            yield found


def measure(
    method: Method, asker: Asker, batches: Sequence[Sequence[Record]], label: str = "Editing", progress: bool = True
) -> list[Outcome]:
    """The outcome of every record; see `measured`."""
    found = measured(method, asker, batches, label=label, progress=progress)
    return [outcome for one in found for outcome in one.outcomes]


def batches_of(records: Sequence[Record], size: int, draws: int | None = None, seed: int = 0) -> list[list[Record]]:
    """Records in batches: one after the other, or so many random draws of `size`, no record in two of them.

    Draws that shared records would not be independent, as the standard errors take them to be.

    Raises:
        NPTError: a size or number of draws below 1, or more records in all draws than there are.
    """
    if size < 1 or (draws is not None and draws < 1):
        raise NPTError(f"batch={size}, draws={draws}: use whole numbers from 1")
    if draws is None:
        return [list(part) for part in chunks(records, size)]
    check_draws(f"batch={size}, draws={draws}", size, draws, len(records))
    drawn = random.Random(seed).sample(list(records), size * draws)
    return [list(part) for part in chunks(drawn, size)]


def check_draws(given: str, size: int, draws: int, records: int) -> None:
    """Checks that so many draws can do without a record twice.

    Args:
        given: the two numbers, as they were given.
        size: records of a draw.
        draws: how many.
        records: how many there are to draw from.

    Raises:
        NPTError: there are too few records.
    """
    if size * draws > records:
        most = records // size
        remedy = (
            f"use at most {most} draw{'s' * (most > 1)} of {size}, or smaller batches"
            if most
            else "use a smaller batch"
        )
        raise NPTError(f"{given}: {size * draws} records, of the {records} there are, none twice; {remedy}")


def _of_batch(
    method: Method,
    asker: Asker,
    part: Sequence[Record],
    group: int,
    sequential: bool,
    extras: Extras,
    limits: tuple[int, int],
    label: str,
) -> Measured:
    """limits: records to show, and examples of what came out wrong."""
    outcomes, examples = list[Outcome](), list[Example]()
    start, passes = time.perf_counter(), method.passes
    try:
        for requests in chunks([record.request for record in part], 1 if sequential else len(part)):
            method.write_many(requests)
        seconds, passes = (time.perf_counter() - start) / len(part), method.passes - passes
        kl, rise = asker.on_text(method)
        skill, change = extras.skill(asker, method)
        shared = {
            "kl": kl, "rise": rise, "skill": skill, "skill_change": change, "seconds": seconds,
            "passes": passes / len(part), "bytes": method.bytes,
        }  # fmt: skip
        for number, record in enumerate(part):
            outcome = _outcome(method, asker, record, extras, group, shared, label)
            outcomes.append(outcome)
            more = sum(not example.right for example in examples) < limits[1]
            examples += _examples(method, asker, record, outcome, number < limits[0], more)
    finally:
        method.undo()
    return Measured(outcomes, examples)


def _outcome(
    method: Method,
    asker: Asker,
    record: Record,
    extras: Extras,
    group: int,
    shared: dict[str, float | None],
    label: str,
) -> Outcome:
    target = record.request.target
    said = [asker.says(method.text(text), target) for text in record.paraphrases]
    forced, locality, ordering = asker.answers(method, record)
    fluency, change = extras.fluency(asker, method, record)
    values = {
        "efficacy": float(asker.says(method.text(record.request.prompt), target)),
        "paraphrase": fmean(said) if said else None,
        "locality": locality,
        "ordering": ordering,
        "forced": forced,
        "forced_all": float(forced == 1),
        "fluency": fluency,
        "fluency_change": change,
        **shared,
    }
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise RunError(
                f"{label}: {name} is {value} after {one_line(repr(record.request.prompt), 60)} was written: the edit "
                "breaks the model; give the method milder options with --option, or leave it out of --method"
            )
    return Outcome(group, **{name: rounded(value) for name, value in values.items()})  # type: ignore[arg-type]


def rounded(value: float | None) -> float | None:
    """Six significant digits, as figures are kept; None stays."""
    return None if value is None else float(f"{value:.6g}")


def _examples(
    method: Method, asker: Asker, record: Record, outcome: Outcome, shown: bool, wrong: bool
) -> Iterator[Example]:
    """The texts of a record that is shown, or of what came out wrong in it."""
    near = next(iter(record.neighbours), None)
    right = {
        "prompt": outcome.efficacy == 1,
        "paraphrase": outcome.paraphrase == 1,
        "neighbour": outcome.locality == 1,
    }
    texts = [("prompt", record.request.prompt), *(("paraphrase", text) for text in record.paraphrases[:1])]
    for kind, prompt in [*texts, *([("neighbour", near.prompt)] if near else [])]:
        # A paraphrase or neighbour among several is shown as wrong only where all of them are.
        failed = wrong and {"prompt": outcome.efficacy, "neighbour": outcome.locality}.get(kind) == 0
        if shown or failed:
            before = asker.first_words_of_base(method, prompt)
            after = asker.first_words(method.text(prompt))
            holds = before == after if kind == "neighbour" else right[kind]
            yield Example(kind, prompt, record.request.target, one_line(before), one_line(after), holds and not failed)


# -- over records ----------------------------------------------------------------------------------------------------------

Figure = Callable[[Sequence[Outcome]], float]


def harmonic(values: Sequence[float]) -> float:
    """The harmonic mean; 0 where a value is."""
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0


def _known(outcomes: Sequence[Outcome], name: str) -> list[float]:
    return [value for outcome in outcomes if (value := getattr(outcome, name)) is not None]


def mean_of(name: str) -> Figure:
    """The mean of one figure over the records that have it; NaN where none has."""

    def over(outcomes: Sequence[Outcome]) -> float:
        values = _known(outcomes, name)
        return fmean(values) if values else math.nan

    return over


def score(outcomes: Sequence[Outcome]) -> float:
    """S: the harmonic mean of the mean efficacy, paraphrase and locality."""
    return harmonic([mean_of(name)(outcomes) for name in ("efficacy", "paraphrase", "locality")])


def gap(outcomes: Sequence[Outcome]) -> float:
    """The share of records whose whole target is right when it is forced, less the share that the model writes itself."""
    return mean_of("forced_all")(outcomes) - mean_of("efficacy")(outcomes)


def perplexity(outcomes: Sequence[Outcome]) -> float:
    """Perplexity of the running text over the base's, the geometric mean over batches; infinite beyond a float's range."""
    try:
        return math.exp(mean_of("rise")(outcomes))
    except OverflowError:
        return math.inf


def largest_kl(outcomes: Sequence[Outcome]) -> float:
    """The divergence of the batch that disturbs most; of single edits, of the worst one. NaN without an outcome."""
    return max(_known(outcomes, "kl"), default=math.nan)


FIGURES: dict[str, Figure] = {
    **{name: mean_of(name) for name in ("efficacy", "paraphrase", "locality", "ordering")},
    "S": score,
    "forced": mean_of("forced"),
    "forced all": mean_of("forced_all"),
    "gap": gap,
    "kl": mean_of("kl"),
    "largest kl": largest_kl,
    "perplexity": perplexity,
    **{name.replace("_", " "): mean_of(name) for name in ("fluency", "fluency_change", "skill", "skill_change")},
    **{name: mean_of(name) for name in ("passes", "seconds", "bytes")},
}


def with_error(outcomes: Sequence[Outcome], figure: Figure) -> tuple[float, float]:
    """(a figure, its standard error by leaving out one batch at a time).

    Records of a batch share a model, so batches are what is independent: single edits are batches of one. For a mean over
    batches of equal size this is the usual standard error. NaN with a single batch, and for a largest value.
    """
    if figure is largest_kl:
        return figure(outcomes), math.nan
    return _leaving_out(outcomes, lambda group: figure(_without(outcomes, group)))


def ahead(outcomes: Sequence[Outcome], others: Sequence[Outcome]) -> tuple[float, float]:
    """(S of a method less that of another on the same batches, the standard error of this paired difference).

    Raises:
        NPTError: the two were not measured in the same batches.
    """
    if [outcome.group for outcome in outcomes] != [outcome.group for outcome in others]:
        raise NPTError("two methods can be compared on the same records in the same batches only; measure them so")
    return _leaving_out(outcomes, lambda group: score(_without(outcomes, group)) - score(_without(others, group)))


def _without(outcomes: Sequence[Outcome], group: int | None) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.group != group]


def _leaving_out(outcomes: Sequence[Outcome], figure: Callable[[int | None], float]) -> tuple[float, float]:
    """(a figure of everything, its standard error), of a figure without a batch; None leaves out nothing."""
    groups = sorted({outcome.group for outcome in outcomes})
    whole, count = figure(None), len(groups)
    if count < 2:
        return whole, math.nan
    left = [figure(group) for group in groups]
    centre = fmean(left)
    return whole, math.sqrt((count - 1) / count * sum((value - centre) ** 2 for value in left))
