"""Threads that call one model at once never see each other: a pass, its mode and its observers are the thread's own."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from npt.block.modes import Mode, running_as, watching, watching_deltas
from npt.block.passes import ThreadState
from npt.tuner.converted import active_layers
from tests.helpers import converted

LENGTHS = (13, 13, 7, 21)
Context = Callable[[Any], AbstractContextManager[None]]


def texts() -> list[Tensor]:
    """Rows of tokens, two of one length, so that another thread's attention fits."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (1, length), generator=generator) for length in LENGTHS]


def in_threads(*tasks: Callable[[], None]) -> None:
    """Runs each task in a thread of its own, all at once; raises what one of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(tasks))

    def guarded(task: Callable[[], None]) -> None:
        try:
            start.wait()
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def logits(model: Any, ids: Tensor) -> Tensor:
    """The logits without a cache, without gradient."""
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def compile_whole(model: Any, **options: Any) -> Any:
    """The model compiled as one graph, which the caller checks by `whole()`.

    torch 2.13 counts the graphs of `fullgraph=True` for all threads together, and raises where two threads count at once.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, backend="eager", **options)


def whole() -> bool:
    """True where no graph was broken since `compile_whole`."""
    return not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture(autouse=True)
def switches_often(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Python changes threads after 10 microseconds, not 5 milliseconds, so that a race shows in few passes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(("kind", "compiled"), [("llama", False), ("gpt2", False), ("llama", True)])
def test_each_thread_gets_its_own_logits(kind: str, compiled: bool) -> None:
    model = converted(kind, npt_layers=[3] if compiled else "all")
    rows = texts()
    want = [logits(model, row) for row in rows]
    call = compile_whole(model, dynamic=True) if compiled else model
    if compiled:
        want = [logits(call, row) for row in rows]
    wrong = [0] * len(rows)

    def serve(k: int) -> None:
        for _ in range(150):
            wrong[k] += not torch.equal(logits(call, rows[k]), want[k])

    in_threads(*[lambda k=k: serve(k) for k in range(len(rows))])
    assert wrong == [0, 0, 0, 0]
    assert whole()


CONTEXTS: dict[str, Context] = {
    "adapter": lambda model: nullcontext(),
    "disabled": lambda model: model.disable_adapter(),
    "zero": lambda model: running_as(active_layers(model), Mode.ZERO),
    "exact": lambda model: running_as(active_layers(model), Mode.EXACT),
}


@pytest.mark.parametrize(
    "compiled", [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=pytest.mark.slow)]
)
def test_a_mode_holds_in_its_own_thread(compiled: bool) -> None:
    """Threads that enter and leave disable_adapter(), the zero and the exact mode beside one that enters nothing."""
    model = converted("llama", npt_layers=[3] if compiled else "all")
    row = texts()[0]
    call = compile_whole(model) if compiled else model
    want = {}
    for name, context in CONTEXTS.items():
        with context(model):
            want[name] = logits(call, row)
    assert len({float(value.sum()) for value in want.values()}) >= 3
    wrong: list[str] = []

    def serve(name: str) -> None:
        for _ in range(40):
            with CONTEXTS[name](model):
                if not torch.equal(logits(call, row), want[name]):
                    wrong.append(name)

    in_threads(*[lambda name=name: serve(name) for name in CONTEXTS])
    assert wrong == []
    assert whole()
    assert model.get_model_status().enabled is True
    assert all(parameter.requires_grad for layer in active_layers(model) for parameter in layer.own.parameters())


def test_observers_see_their_own_threads_passes_only() -> None:
    model = converted("llama", npt_layers="all")
    rows = texts()
    seen: dict[str, set[int]] = {"blocks": set(), "deltas": set()}

    def watch(name: str, k: int) -> None:
        layers = active_layers(model)
        for _ in range(30):
            if name == "blocks":
                with watching(layers, lambda layer, record: seen[name].add(record.attention.shape[1])):
                    logits(model, rows[k])
            else:
                with watching_deltas(
                    layers, lambda layer, deltas: seen[name].add(next(iter(deltas.values())).value.shape[1])
                ):
                    logits(model, rows[k])

    def plain(k: int) -> None:
        for _ in range(60):
            logits(model, rows[k])

    in_threads(lambda: watch("blocks", 0), lambda: watch("deltas", 2), lambda: plain(3))
    assert seen == {"blocks": {LENGTHS[0]}, "deltas": {LENGTHS[2]}}


def test_disabling_for_good_holds_for_every_thread() -> None:
    """`disable_adapter_layers()`, called outside PEFT's context, is a setting of the model."""
    model = converted("llama", npt_layers="all")
    row = texts()[0]
    with model.disable_adapter():
        base = logits(model, row)
    model.base_model.disable_adapter_layers()
    seen: list[Tensor] = []
    in_threads(lambda: seen.append(logits(model, row)))
    assert torch.equal(seen[0], base)
    model.base_model.enable_adapter_layers()
    in_threads(lambda: seen.append(logits(model, row)))
    assert not torch.equal(seen[1], base)


def test_disabling_within_disabling_ends_with_the_outer_one() -> None:
    model = converted("llama", npt_layers="all")
    row = texts()[0]
    with model.disable_adapter():
        base = logits(model, row)
        with model.disable_adapter():
            assert torch.equal(logits(model, row), base)
        assert torch.equal(logits(model, row), base)
    assert not torch.equal(logits(model, row), base)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_threads_generate_what_each_would_alone(compiled: bool) -> None:
    model = converted("llama", npt_layers=[3] if compiled else "all")
    rows = texts()[:2]
    if compiled:
        torch._dynamo.reset()
        model.get_base_model().model.compile(backend="eager", dynamic=True)

    def generate(k: int) -> Tensor:
        ids: Tensor = model.generate(input_ids=rows[k], max_new_tokens=12, do_sample=False, pad_token_id=0)
        return ids

    want = [generate(k) for k in range(2)]
    wrong = [0, 0]

    def serve(k: int) -> None:
        for _ in range(6):
            wrong[k] += not torch.equal(generate(k), want[k])

    in_threads(lambda: serve(0), lambda: serve(1))
    assert wrong == [0, 0]


def test_a_module_wrapped_under_threads_gets_its_hooks_once() -> None:
    """Several threads find a wrapped module at once: its hooks move one time."""
    model = converted("llama", npt_layers="all")
    rows = texts()
    want = [logits(model, row) for row in rows]
    for layer in active_layers(model):
        mlp = layer.get_base_layer().mlp
        mlp.down_proj = Wrapped(mlp.down_proj)
    wrong = [0] * len(rows)

    def serve(k: int) -> None:
        for _ in range(10):
            wrong[k] += not torch.equal(logits(model, rows[k]), want[k])

    in_threads(*[lambda k=k: serve(k) for k in range(len(rows))])
    assert wrong == [0, 0, 0, 0]


class Wrapped(torch.nn.Linear):
    """A linear that stands for another, as a LoRA layer does."""

    def __init__(self, inner: torch.nn.Linear):
        super().__init__(inner.in_features, inner.out_features, bias=False, dtype=inner.weight.dtype)
        self.weight = inner.weight


def test_gradient_checkpointing_recomputes_in_the_mode_of_the_first_forward() -> None:
    """The backward pass runs in another thread, and after the mode was left."""
    model = converted("llama", npt_layers="all")
    row = texts()[0]
    embedding = model.get_input_embeddings().weight.requires_grad_(True)

    def gradient(checkpointing: bool) -> Tensor:
        embedding.grad = None
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with running_as(active_layers(model), Mode.EXACT):
            loss = model(input_ids=row, labels=row, use_cache=False).loss
        in_threads(loss.backward)
        assert embedding.grad is not None
        return embedding.grad.clone()

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_reference_pass_between_forward_and_backward_changes_no_gradient() -> None:
    """The order of preference trainers: the adapter's forward, the original's forward, then the adapter's backward."""
    row = texts()[0]

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = converted("llama", npt_layers="all")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = model(input_ids=row, labels=row, use_cache=False).loss
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=row, use_cache=False)
        loss.backward()
        return [p.grad for layer in active_layers(model) for p in layer.own.parameters() if p.grad is not None]

    want, found = gradients(False), gradients(True)
    assert len(found) == len(want) > 0
    torch.testing.assert_close(found, want)


def test_a_copied_or_pickled_state_starts_anew() -> None:
    state = ThreadState()
    state.now.attention = torch.ones(1)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert other.now.attention is None
        assert other is not state
