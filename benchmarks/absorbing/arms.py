"""All arms on one context: nothing, the context in front, absorb, its closed form, and a LoRA at that one's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.absorbing.cases import Case
from benchmarks.absorbing.exam import Exam
from benchmarks.timing import moment
from npt import EditStore
from npt.block.modes import having
from npt.editing.absorbing.absorbed import Absorbed
from npt.editing.absorbing.choice import block_sets
from npt.editing.absorbing.contexts import Contexts
from npt.editing.absorbing.general import CHOOSING, REPORTING
from npt.editing.absorbing.gradient import PIECES, Trained, Training
from npt.editing.absorbing.lesson import Lesson
from npt.editing.absorbing.settings import Options, options_of
from npt.editing.absorbing.teaching import Teacher
from npt.editing.descent import zero
from npt.planning.counters import AllocationCounter

#: The least effect of a context, in nats, with which it is measured.
EFFECT = 0.2


@dataclass(frozen=True)
class Plan:
    """What is run.

    trainings: the gradient's. steps: after which it is measured, ascending. descent: absorb's own steps by gradient, from zero
    at its own blocks; 0 leaves the closed form alone. memory: count each arm's peak in runs of its own. options: of
    `EditStore.absorb`, for the closed form and the LoRA. clock: of `benchmarks.timing.CLOCKS`, for all seconds. number:
    questions of absorb itself.
    """

    trainings: tuple[Training, ...]
    steps: tuple[int, ...]
    descent: int
    memory: bool
    options: dict[str, Any]
    clock: str = "wall"
    number: int = Options.number


def prepare(store: EditStore, blocks: Sequence[int] | None = None) -> float:
    """Seconds of what a model needs once: its own text and second moments, and the text that damage is measured on.

    Args:
        store: the store.
        blocks: those that may be patched; None for those that `blocks="auto"` compares.
    """
    start = moment()
    contexts = store.contexts
    sets = block_sets(len(contexts.blocks)) if blocks is None else [tuple(blocks)]
    contexts.general.moments(sorted({block for one in sets for block in one}))
    contexts.watched(CHOOSING)
    contexts.watched(REPORTING)
    return moment() - start


def measure(store: EditStore, case: Case, plan: Plan) -> dict[str, Any]:
    """The record of one context.

    effect is the KL of the model without the context. Below `EFFECT` the record ends there; else `absorb` (the closed form),
    `descended` (absorb's steps) and `gradient` follow, the last with a list over `plan.steps` for each training. Seconds are
    without those of measuring.

    Args:
        store: a store with nothing in it, prepared.
        case: the context.
        plan: what is run.
    """
    given = {name: value for name, value in plan.options.items() if name not in ("questions", "answers", "blocks")}
    exam = Exam(store, case, options_of(given))
    nothing = exam.mark()
    found: dict[str, Any] = {
        "kind": case.kind, "part": case.part, "effect": nothing.kl, "questions": exam.questions, "answers": exam.answers,
        "left_out": exam.left_out, "taught": list(exam.taught), "nothing": nothing.kept(),
    }  # fmt: skip
    if nothing.kl < EFFECT:
        return found
    edit, found["absorb"] = absorbed(store, exam, case, plan.options, plan.clock)
    found["setting"] = {**asdict(edit.setting), "blocks": list(edit.setting.blocks)}
    found |= {name: found["absorb"].pop(name) for name in ("learnt", "asking_seconds")}
    store.undo(edit.id)
    if plan.descent:
        own, found["descended"] = absorbed(store, exam, case, _own(plan), plan.clock)
        store.undo(own.id)
    found["gradient"] = [
        {**asdict(training), "points": trained(store, exam, edit, training, plan)} for training in plan.trainings
    ]
    if plan.memory:
        found["peaks"] = peaks(store, case, plan, edit)
    return found


def absorbed(
    store: EditStore, exam: Exam, case: Case, options: dict[str, Any], clock: str
) -> tuple[Absorbed, dict[str, Any]]:
    """(the context in the store, its figures: also what it learnt from, and the seconds of asking).

    Args:
        store: with nothing in it.
        exam: the context's.
        case: the context.
        options: of `EditStore.absorb`.
        clock: see `Plan`.
    """
    with spent(clock) as seconds:
        edit = store.absorb(case.text, **options)
    assert isinstance(edit, Absorbed)
    learnt = {"conversations": len(edit.learnt), "tokens": sum(c.shared for c in edit.learnt)}
    spent_on = {"seconds": seconds["absorbing"], "asking_seconds": seconds["asking"], "learnt": learnt}
    return edit, {**exam.mark().kept(), **spent_on}


def _own(plan: Plan) -> dict[str, Any]:
    """The options of absorb itself."""
    shared = {name: value for name, value in plan.options.items() if name not in ("mu", "lam")}
    return {**shared, "number": plan.number, "steps": plan.descent}


def trained(store: EditStore, exam: Exam, edit: Absorbed, training: Training, plan: Plan) -> list[dict[str, Any]]:
    """The figures of a LoRA after each number of the plan's steps, and the seconds up to there. The store is empty."""
    found, seconds = [], 0.0
    start = moment(plan.clock)
    one = lora(store, edit, training)
    try:
        for count in plan.steps:
            loss = one.train(count - one.steps)
            seconds += moment(plan.clock) - start
            found.append({"steps": count, "loss": loss, "seconds": seconds, **exam.mark().kept()})
            start = moment(plan.clock)
    finally:
        one.close()
    return found


def lora(store: EditStore, edit: Absorbed, training: Training) -> Trained:
    """A LoRA at the place and of the rank of an absorbed context, which learns from the same tokens."""
    contexts, setting = store.contexts, edit.setting
    begin = zero(contexts.blocks.shapes(setting.blocks), setting.rank, training.seed)
    text = contexts.general.pieces(PIECES) if training.beta else ()
    return Trained(Lesson(contexts.blocks, edit.learnt), begin, training, text, contexts.patches.together)


def peaks(store: EditStore, case: Case, plan: Plan, edit: Absorbed) -> dict[str, int]:
    """{arm: most bytes alive at once above what was there before}, counted in runs that no time is taken of."""

    def absorb(options: dict[str, Any]) -> None:
        store.undo(store.absorb(case.text, **options).id)

    def train() -> None:
        one = lora(store, edit, plan.trainings[0])
        one.train(2)
        one.close()

    found = {}
    runs: dict[str, Callable[[], None]] = {"absorb": partial(absorb, plan.options)}
    if plan.descent:
        runs["descended"] = partial(absorb, _own(plan))
    if plan.trainings:
        runs["gradient"] = train
    for name, run in runs.items():
        with AllocationCounter() as counter:
            run()
        found[name] = counter.peak
    return found


@contextmanager
def spent(clock: str) -> Iterator[dict[str, float]]:
    """Seconds of an `absorb` within a `with` block: of its questions and the teacher's answers, which the gradient needs too
    (asking), of reporting, and of the rest (absorbing).
    """
    found = {"asking": 0.0, "reporting": 0.0, "absorbing": 0.0}
    parts = ((Teacher, "teach", "asking"), (Contexts, "compare", "reporting"), (Contexts, "text_kl", "reporting"))
    start = moment(clock)
    with ExitStack() as stack:
        for owner, method, part in parts:
            stack.enter_context(having([owner], method, _timed(getattr(owner, method), found, part, clock)))
        yield found
    found["absorbing"] = moment(clock) - start - found["asking"] - found["reporting"]


def _timed(method: Callable[..., Any], found: dict[str, float], part: str, clock: str) -> Callable[..., Any]:
    def run(*args: Any, **named: Any) -> Any:
        start = moment(clock)
        try:
            return method(*args, **named)
        finally:
            found[part] += moment(clock) - start

    return run


def trainings(
    rates: Sequence[float], tokens: Sequence[str], betas: Sequence[float], batch: int, steps: int
) -> tuple[Training, ...]:
    """Every rate with every choice of tokens and every weight of text; the rate falls to zero at the last of the steps."""
    return tuple(Training(rate, which, batch, beta, steps) for which in tokens for beta in betas for rate in rates)
