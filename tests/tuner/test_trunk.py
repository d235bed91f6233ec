"""The blocks below the first converted one run once for both models."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from npt import NPTConfig
from npt.block.families import blocks_of
from npt.equivalence.objectives import Objective
from npt.tuner.converted import as_original
from npt.tuner.trunk import shared_trunk
from tests.families import CASES, Case, marks_of
from tests.helpers import randomize

EACH = pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=marks_of(case)) for case in CASES])
LLAMA = next(case for case in CASES if case.name == "llama")
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


def converted(case: Case = LLAMA, layers: Any = (2, 3), **options: Any) -> Any:
    """A converted model that differs from its original."""
    model = get_peft_model(case.build(), NPTConfig(npt_layers=list(layers), rank=2, **options)).eval()
    randomize(model, 0.05)
    return model


def both(model: Any, ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    """Logits of the original and of the NPT model."""
    with as_original(model):
        teacher = model(ids, use_cache=False).logits
    return teacher, model(ids, use_cache=False).logits


def counted_calls(model: Any) -> Counter[int]:
    """Counts the runs of each block's MLP: a stand-in has none."""
    calls: Counter[int] = Counter()
    for index, block in enumerate(blocks_of(model.get_base_model())):
        block.mlp.register_forward_hook(lambda *_, i=index: calls.update([i]))
    return calls


@EACH
@torch.no_grad()
def test_both_models_are_what_they_are_without(case: Case) -> None:
    """Bit for bit, on every family."""
    model = converted(case)
    alone = both(model)
    with shared_trunk(model):
        shared = both(model)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(*shared)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 3], [3]])
@torch.no_grad()
def test_the_trunk_runs_once(layers: list[int]) -> None:
    model = converted(layers=layers)
    calls = counted_calls(model)
    with shared_trunk(model):
        both(model)
    assert [calls[i] for i in range(4)] == [1 if i < layers[0] else 2 for i in range(4)]
    both(model)
    assert [calls[i] for i in range(4)] == [3 if i < layers[0] else 4 for i in range(4)]
    assert not any("forward" in vars(block) for block in blocks_of(model.get_base_model()))


@torch.no_grad()
def test_blocks_are_themselves_again_after_an_error() -> None:
    model = converted()
    expected = both(model)
    with pytest.raises(IndexError), shared_trunk(model):
        model(IDS + 1000)
    other = (IDS + 7) % 96
    with shared_trunk(model):
        both(model, other)
    for one, two in zip(expected, both(model), strict=True):
        assert torch.equal(one, two)


@torch.no_grad()
def test_another_thread_runs_the_whole_model() -> None:
    model, other = converted(), (IDS + 7) % 96
    expected, found = both(model, other), []
    with shared_trunk(model):
        inner = both(model)

        def shares_too() -> None:
            with shared_trunk(model):
                found.append(both(model, other))

        for work in (lambda: found.append(both(model, other)), shares_too):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        again = model(IDS, use_cache=False).logits
    assert torch.equal(again, inner[1])
    for pair in found:
        assert all(torch.equal(one, two) for one, two in zip(pair, expected, strict=True))
    assert len(found) == 2


@torch.no_grad()
def test_a_forward_that_somebody_replaced_stays() -> None:
    """accelerate replaces a block's forward by one that moves its weights."""
    model = converted()
    block = blocks_of(model.get_base_model())[0]
    own, calls = block.forward, []

    def moved(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    block.forward = moved
    with shared_trunk(model):
        both(model)
    assert len(calls) == 1 and block.forward is moved


@torch.no_grad()
def test_nothing_is_shared_where_nothing_can_be() -> None:
    lora = get_peft_model(LLAMA.build(), LoraConfig(target_modules=["down_proj"], layers_to_transform=[3])).eval()
    compiled = converted()
    compiled.get_base_model().compile()  # it is not called: a compiled graph would have the block's forward in it
    for model in (lora, compiled):
        with shared_trunk(model):
            assert not any("forward" in vars(block) for block in blocks_of(model.get_base_model()))


def test_a_trained_part_below_keeps_its_gradient() -> None:
    model = converted()
    embedding = model.get_input_embeddings().weight.requires_grad_()
    with shared_trunk(model):
        with torch.no_grad():
            both(model)
        model(IDS, use_cache=False).logits.sum().backward()
    assert embedding.grad is not None and embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_logits_has_the_same_gradients(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grads, counts = [], []
    for shares in (True, False):
        model = converted()
        calls = counted_calls(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        if not shares:
            monkeypatch.setattr("npt.tuner.trunk._bypasses", lambda model: ())
        loss = Objective("logits", regularizer="delta", regularization_weight=0.1)(model, BATCH, 16.0)
        loss.total.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        counts.append(calls[0])
    assert grads[0] and list(grads[0]) == list(grads[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-12, atol=1e-14)
    assert counts[0] == 1 and counts[1] > 1
