"""Steps by gradient behind the closed form of an absorbed context."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from npt.editing.absorbing.choice import Choice, trained_blocks
from npt.editing.absorbing.dialogue import Dialogue
from npt.editing.absorbing.files import _setting
from npt.editing.absorbing.gradient import Trained, Training, check_trainable
from npt.editing.absorbing.lesson import Apart, Lesson
from npt.editing.absorbing.patches import Patches
from npt.editing.absorbing.settings import Options, Setting
from npt.editing.absorbing.stream import Blocks, outputs_of
from npt.editing.absorbing.teaching import Teacher
from npt.editing.descent import balanced, slopes_of
from npt.editing.solve import Factors
from npt.errors import NPTError
from tests.absorbing import ONE, absorb, base_of, store
from tests.families import CASES
from tests.helpers import spelling_tokenizer

LAYERS, RANK = (2, 3), 4
TEXT = [[5, 9, 12, 30, 7, 41, 8, 22], [14, 6, 50, 11, 33, 27, 19, 10]]


def conversations(base: Any) -> list[Any]:
    tokenizer = spelling_tokenizer()
    dialogue = Dialogue(tokenizer, base.config, 96, "question")
    answer = tokenizer(" yes", add_special_tokens=False).input_ids
    return [dialogue.conversation("Bo is red.", question, answer) for question in ("Is Bo?", "Is it?", "Is he red?")]


def text_of(blocks: Blocks) -> Apart:
    kept = [len(row) for row in TEXT]
    counted = torch.tensor([i for i, n in enumerate(kept) for _ in range(n)])
    return Apart(blocks, TEXT, kept, outputs_of(blocks, TEXT, kept, [])[1], counted)


def begun(blocks: Blocks, found: list[Any]) -> dict[int, Factors]:
    """The factors that the closed form finds."""
    lesson, patches = Lesson(blocks, found, LAYERS), Patches(blocks, [])
    text = {layer: torch.eye(blocks.shape(layer)[0], dtype=torch.float64) for layer in LAYERS}
    lesson.fit(Setting(LAYERS, 1.0, 0.01, RANK), text, patches)
    factors = dict(patches.factors)
    patches.close()
    return {layer: balanced(one) for layer, one in factors.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2", "granite"])
def test_steps_begin_at_the_closed_form_and_come_nearer_to_the_teacher(family: str) -> None:
    base = next(case for case in CASES if case.model_type == family).build(torch.float32)
    blocks, found = Blocks(base), conversations(base)
    lesson, factors = Lesson(blocks, found), begun(blocks, found)
    one = Trained(lesson, factors, Training(3e-3))
    try:
        one.train(0)
        start = lesson.kl()
        patches = Patches(blocks, one.adapters[LAYERS[0]]._together)
        one.close()
        patches.set(factors)
        assert torch.allclose(start, lesson.kl(), rtol=1e-3, atol=1e-6)  # the same weight deltas
        patches.close()
        for adapter in one.adapters.values():
            adapter.open()
        one.train(25)
        assert float(lesson.kl().sum()) < 0.9 * float(start.sum())
        assert all(p.requires_grad and p.grad is None for p in base.parameters())
    finally:
        one.close()


def test_a_step_is_that_of_the_whole_loss() -> None:
    """The first step of AdamW moves each number by the rate against the slope's sign, here of both parts of the loss."""
    base = next(case for case in CASES if case.model_type == "llama").build(torch.float64)
    blocks, found = Blocks(base), conversations(base)
    text, lesson, factors = text_of(blocks), Lesson(blocks, found), begun(blocks, found)
    beta, rate = 3.0, 1e-5
    pairs = {layer: [x.clone().requires_grad_() for x in (f.left, f.right)] for layer, f in factors.items()}

    def whole(rows: list[list[int]], kept: list[int], last: Tensor) -> Tensor:
        hooks = [
            blocks.down(layer).register_forward_hook(lambda m, args, y, p=pair: y + args[0] @ p[1].T @ p[0].T)
            for layer, pair in pairs.items()
        ]
        states = [
            base.get_decoder()(torch.tensor([row])).last_hidden_state[0, -n:] for row, n in zip(rows, kept, strict=True)
        ]
        for hook in hooks:
            hook.remove()
        given, now = (base.get_output_embeddings()(x).log_softmax(-1) for x in (last, torch.cat(states)))
        return (given.exp() * (given - now)).sum(-1).mean()

    loss = whole([c.student for c in found], [c.shared for c in found], lesson.last)
    loss = loss + beta * whole(TEXT, [len(row) for row in TEXT], text.last)
    loss.backward()
    one = Trained(lesson, factors, Training(rate, beta=beta), [text])
    one.train(1)
    one.close()
    for layer, pair in pairs.items():
        for before, after in zip(pair, (one.factors[layer].left, one.factors[layer].right), strict=True):
            assert before.grad is not None
            clear = before.grad.abs() > 1e-6
            assert clear.any() and torch.allclose((after - before)[clear], -rate * before.grad.sign()[clear], rtol=1e-2)


def test_small_slopes_survive_a_base_in_float16() -> None:
    """A mean over many tokens has slopes below what float16 holds."""
    tokens, found = 2048, []
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16):
        part = torch.full((8,), 1e-3, requires_grad=True)  # factors are in float32 whatever the base is
        base = torch.linspace(-0.02, 0.02, 64).view(8, 8).to(dtype)
        loss = ((x * part).to(dtype) @ base).float().sum(-1).square().mean()
        found.append(slopes_of(loss, [part])[0])
    assert torch.allclose(*found, rtol=0.01)


class Unslopable(torch.autograd.Function):
    """A product whose backward pass is not there, as in some quantised kernels."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T


@pytest.mark.parametrize("kernel", [torch.no_grad()(torch.nn.functional.linear), Unslopable.apply])
@pytest.mark.parametrize("place", ["model.layers.2.mlp.down_proj", "lm_head"])
def test_a_base_without_a_gradient_is_refused_before_any_question(
    place: str, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("llama")
    one, module = store(base), base.get_submodule(place)
    module.forward = lambda x: kernel(x, module.weight.detach())
    with monkeypatch.context() as patch, pytest.raises(NPTError, match="has no gradient.*steps=0"):
        patch.setattr(Teacher, "teach", lambda *args: pytest.fail("questions were written"))
        absorb(one, ONE, steps=2)
    assert not one.edits and absorb(one, ONE, steps=0)
    assert all(p.requires_grad for p in base.parameters())


def test_a_projection_without_a_gradient_below_the_blocks_does_not_matter() -> None:
    base = base_of("llama")
    module = base.get_submodule("model.layers.1.mlp.down_proj")
    module.forward = lambda x: torch.nn.functional.linear(x, module.weight).detach()
    check_trainable(Blocks(base), 2)
    with pytest.raises(NPTError, match=r"layers\.1\.mlp\.down_proj \(Linear\) has no gradient"):
        check_trainable(Blocks(base), 0)


def test_a_part_that_turns_gradients_off_on_purpose_is_not_refused() -> None:
    """As the indexers of sparse attention in DeepSeek V3.2 and GLM do."""
    base = base_of("llama")
    part = base.get_submodule("model.layers.2.mlp")
    part.forward = torch.no_grad()(part.forward)
    check_trainable(Blocks(base), 1)


def test_blocks_are_spread_and_nothing_is_tried_for_steps_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    monkeypatch.setattr(Choice, "best", lambda *args: pytest.fail("a setting was tried"))
    edit = absorb(store(base), ONE, blocks="auto", steps=2)
    assert edit.layers == trained_blocks(4) == (0, 1, 2, 3) and edit.passes == 0 and edit.setting.start == "zero"
    assert trained_blocks(30) == (4, 7, 10, 12, 15, 18, 21, 23, 26, 29)
    assert (Options.steps, Options.rate, Options.number, Options.start) == (80, 3e-3, 288, "zero")


def test_text_in_the_loss_stays_nearer_to_the_base() -> None:
    base = next(case for case in CASES if case.model_type == "llama").build(torch.float32)
    blocks, found = Blocks(base), conversations(base)
    text, factors, moved = text_of(blocks), begun(blocks, found), []
    for beta in (0.0, 30.0):
        one = Trained(Lesson(blocks, found), factors, Training(1e-3, beta=beta), [text])
        try:
            one.train(25)
            moved.append(float(text.kl().sum()))
        finally:
            one.close()
    assert moved[1] < 0.7 * moved[0]


def test_the_rate_falls_to_zero() -> None:
    base = next(case for case in CASES if case.model_type == "llama").build(torch.float32)
    blocks, found = Blocks(base), conversations(base)
    one = Trained(Lesson(blocks, found), begun(blocks, found), Training(1e-3, falling=2))
    try:
        one.train(2)
        before = one.factors
        one.train(1)
        assert all(torch.equal(one.factors[layer].left, before[layer].left) for layer in LAYERS)
    finally:
        one.close()


def test_balanced_factors_are_the_same_weight_delta() -> None:
    chance = torch.Generator().manual_seed(0)
    one = Factors(torch.randn(5, 3, generator=chance), 100 * torch.randn(3, 7, generator=chance))
    found = balanced(one)
    assert torch.allclose(found.delta, one.delta, rtol=1e-4)
    assert torch.allclose(found.left.norm(dim=0), found.right.norm(dim=1), rtol=1e-4)
    empty = balanced(Factors(torch.zeros(5, 1), torch.zeros(1, 7)))
    assert empty.left.isfinite().all() and empty.right.isfinite().all()


def test_a_setting_without_steps_is_read() -> None:
    """Stores that were written before there were steps."""
    whole = Setting((1, 2), 4.0, 0.01, 8, 3, 1e-3, "zero")
    kept = {**asdict(whole), "blocks": [1, 2]}
    assert _setting(kept) == whole
    old = {name: value for name, value in kept.items() if name not in ("steps", "rate", "start")}
    assert _setting(old) == Setting((1, 2), 4.0, 0.01, 8)
    assert _setting(old | {"steps": 3}).is_solved  # versions that began at the closed form alone
    for wrong in ({"steps": -1}, {"rate": 0}, {"rate": "x"}, {"steps": True}, {"start": "x"}, {"start": None}):
        with pytest.raises((TypeError, ValueError)):
            _setting(kept | wrong)
