"""Objectives equal plain formulas, also with accumulation and padding, and so do their gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model

from npt import NPTConfig
from npt.block.modes import Mode, running_as, watching
from npt.equivalence.objectives import BlockObjective, LogitsObjective, Objective, check_logit_head, update_scales
from npt.errors import NPTError
from npt.tuner.converted import active_layers
from tests.helpers import converted, random_base

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])
ALL = pytest.mark.parametrize("name", ["local", "logits", "composite"])


def batch(rows: int = 4, tokens: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, 5] = -100  # a join
    ids[1, 9:], mask[1, 9:], labels[1, 9:] = 0, 0, -100  # padding
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def items(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return (inputs["labels"][:, 1:] != -100).sum()


def objective(model: Any, name: str, inputs: dict[str, torch.Tensor], **options: Any) -> Objective:
    scales = update_scales(model, inputs) if name == "local" else {}
    return Objective(name, scales=scales, **options)


def gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@KINDS
def test_logits_objective_is_the_mean_kl(kind: str) -> None:
    model, inputs = converted(kind), batch()
    losses = Objective("logits")(model, inputs, items(inputs))
    call = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        student = model(**call).logits.log_softmax(-1)
        with model.disable_adapter():
            teacher = model(**call).logits.log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1)[:, :-1]
    expected = kl[inputs["labels"][:, 1:] != -100].mean()
    torch.testing.assert_close(losses.total, expected, rtol=1e-5, atol=1e-7)


@KINDS
@pytest.mark.parametrize("name", ["logits", "local"])
def test_training_with_the_denominator_starts_at_the_original(kind: str, name: str) -> None:
    """The low-rank part is there and trained, and what it is trained from is already exact."""
    model: Any = get_peft_model(
        random_base(kind, torch.float64), NPTConfig(npt_layers="all", rank=16, gain="denominator")
    )
    inputs = batch()
    loss = objective(model, name, inputs)(model, inputs, items(inputs)).total
    assert 0 <= abs(float(loss)) < 1e-12
    with torch.no_grad():
        for layer in active_layers(model):
            b = layer.own.low_rank_factors("down")["down"][0]
            b.add_(0.01 * torch.randn(b.shape, generator=torch.Generator().manual_seed(0), dtype=b.dtype))
    moved = objective(model, name, inputs)(model, inputs, items(inputs))
    assert float(moved.total) > 1e-8
    moved.total.backward()
    assert all(layer.own.A.grad is not None and layer.own.A.grad.abs().max() > 0 for layer in active_layers(model))


@KINDS
@pytest.mark.parametrize("name", ["local", "composite"])
def test_local_objective_is_the_block_error_on_the_teachers_stream(kind: str, name: str) -> None:
    model, inputs = converted(kind, npt_layers=[1, 2]), batch()
    loss = objective(model, name, inputs)
    records: dict[int, Any] = {}
    layers = active_layers(model)
    with (
        torch.no_grad(),
        running_as(layers, Mode.ORIGINAL),
        watching(layers, lambda q, r: records.update({q.index: r})),
    ):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    counted = torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))
    expected = 0.0
    for layer in layers:
        record = records[layer.index]
        with torch.no_grad():
            own = record.hidden_states + layer.update_from(record.hidden_states, record.attention)
        error = (own - record.output).square().mean(-1)[counted].mean()
        update = (record.output - record.hidden_states)[inputs["attention_mask"].bool()].square().mean()
        expected += error / (update if name == "local" else 1.0) / len(layers)
    torch.testing.assert_close(loss(model, inputs, items(inputs)).total, expected, rtol=1e-5, atol=1e-8)


@KINDS
@ALL
@pytest.mark.parametrize("regularizer", ["factors", "delta"])
def test_gradients_do_not_depend_on_accumulation(kind: str, name: str, regularizer: str) -> None:
    """1 x 4 rows and 4 x 1 row give the same gradients to rounding, with joins, padding and a regulariser."""
    model, inputs = converted(kind), batch()
    loss = objective(model, name, inputs, regularization_weight=0.1, regularizer=regularizer)
    loss(model, inputs, items(inputs)).total.backward()
    whole = gradients(model)
    model.zero_grad()
    for row in range(4):
        part = {k: v[row : row + 1] for k, v in inputs.items()}
        loss(model, part, items(inputs)).total.backward()
    for one, other in zip(whole, gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


@KINDS
@ALL
def test_gradients_reach_every_component_parameter_and_nothing_else(kind: str, name: str) -> None:
    for options in ({}, {"key": "learned", "low_rank_at": "projection", "gain": "overlap"}):
        model, inputs = converted(kind, **options), batch()
        objective(model, name, inputs)(model, inputs, items(inputs)).total.backward()
        own = {id(p) for layer in active_layers(model) for p in layer.component.parameters()}
        for parameter_name, p in model.named_parameters():
            if id(p) in own:
                assert p.grad is not None and p.grad.abs().max() > 0, parameter_name
            else:
                assert p.grad is None, parameter_name


@ALL
def test_padding_never_counts(name: str) -> None:
    model, inputs = converted("llama"), batch()
    loss = objective(model, name, inputs, regularizer="delta", regularization_weight=0.1)
    first = loss(model, inputs, items(inputs)).total
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 77)
    torch.testing.assert_close(first, loss(model, inputs, items(inputs)).total, rtol=1e-6, atol=0)


def test_local_gradient_equals_autograd_through_the_sum() -> None:
    """The gradients handed over block by block are those of one backward pass through the sum of the blocks' losses."""
    model, inputs = converted("llama"), batch()
    loss = objective(model, "local", inputs)
    loss(model, inputs, items(inputs)).total.backward()
    handed = gradients(model)
    model.zero_grad()
    records: dict[int, Any] = {}
    layers = active_layers(model)
    with (
        torch.no_grad(),
        running_as(layers, Mode.ORIGINAL),
        watching(layers, lambda q, r: records.update({q.index: r})),
    ):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    counted = torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))
    total = torch.zeros(())
    for layer in layers:
        r = records[layer.index]
        update = layer.update_from(r.hidden_states, r.attention)
        error = (update - (r.output - r.hidden_states)).square().mean(-1)[counted].mean()
        total = total + error / loss.scales[layer.index]
    total.backward()
    for one, other in zip(handed, gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


@KINDS
@pytest.mark.parametrize("name", ["local", "composite"])
@pytest.mark.parametrize("regularizer", ["factors", "delta"])
def test_a_blocks_gradient_does_not_depend_on_the_other_blocks(kind: str, name: str, regularizer: str) -> None:
    """Bit for bit the same alone as beside two others; the reported losses are means over blocks."""
    inputs, found = batch(), {}
    for layers in ([0, 2, 3], [0], [2], [3]):
        model = converted(kind, npt_layers=layers)
        for layer in active_layers(model):
            fill(layer)
        loss = objective(model, name, inputs, regularization_weight=0.3, regularizer=regularizer)
        losses = loss(model, inputs, items(inputs))
        losses.total.backward()
        found[tuple(layers)] = losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    together, gradients_together = found.pop((0, 2, 3))
    assert set().union(*(own for _, own in found.values())) == set(gradients_together)
    for _, own in found.values():
        assert all(torch.equal(gradient, gradients_together[n]) for n, gradient in own.items())
    for i in range(3):
        mean = torch.stack([losses[i].detach() for losses, _ in found.values()]).mean()
        torch.testing.assert_close(together[i].detach(), mean, rtol=1e-12, atol=0)


def fill(layer: Any) -> None:
    """Values that depend on the block alone."""
    generator = torch.Generator().manual_seed(layer.index)
    with torch.no_grad():
        for parameter in layer.component.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


#: What the hooks of a block hand to each other.
TENSORS = ("attention", "values", "residual", "down", "beside", "routing", "added", "observed")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gemma4_text", "lfm3"])
def test_checkpointing_gives_the_same_gradients_and_keeps_nothing(kind: str) -> None:
    """transformers recomputes a block's forward without the block's own hooks: what a tap kept must go all the same."""
    found = []
    for checkpointed in (False, True):
        model, inputs = converted(kind), batch()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        loss, runs = Objective("logits")(model, inputs, items(inputs)).total, []
        active_layers(model)[0].module("down").register_forward_pre_hook(lambda m, x, r=runs: r.append(1))
        loss.backward()
        assert len(runs) == checkpointed, "the block was recomputed, or was not, against what was asked"
        passes = [layer.hooks.thread.now for layer in active_layers(model)]
        assert all(getattr(p, name) is None for p in passes for name in TENSORS)
        found.append(gradients(model))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["gemma2", "lfm3", "olmo2"])
def test_a_recomputed_forward_leaves_nothing_to_the_next_one(kind: str) -> None:
    """It may end inside the norm behind the MLP, before the hook that takes the value of `down`."""
    model, inputs = converted(kind), batch()
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=inputs["input_ids"]).logits
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    Objective("logits")(model, inputs, items(inputs)).total.backward()
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=inputs["input_ids"]).logits, expected)


@pytest.mark.parametrize(
    ("name", "kind"), [("local", BlockObjective), ("composite", BlockObjective), ("logits", LogitsObjective)]
)
def test_the_name_picks_the_class(name: str, kind: type[Objective]) -> None:
    found = Objective(name, 0.5, regularizer="factors")
    assert type(found) is kind and isinstance(found, Objective)
    assert (found.name, found.equivalence_weight, found.regularizer, found.teacher) == (name, 0.5, "factors", None)
    for again in (copy.deepcopy(found), replace(found), kind(name, 0.5, regularizer="factors"), Objective(name=name)):
        assert type(again) is kind and again.name == name
    assert (type(Objective()), Objective().name) == (LogitsObjective, "logits")
    with pytest.raises(NPTError, match="training.objective='logits': use one of local, composite"):
        BlockObjective("logits")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(NPTError, match="training.objective='magic': use one of local, logits, composite"):
        Objective("magic")
    with pytest.raises(NPTError, match="training.regularizer='l1'"):
        Objective("logits", regularizer="l1")


def test_a_head_npt_does_not_know_is_refused() -> None:
    model = converted("llama")
    check_logit_head(model, torch.ones(1, 4, dtype=torch.long))
    model.get_base_model().register_forward_hook(lambda m, x, out: out.__setitem__("logits", out["logits"] * 2) or out)
    with pytest.raises(NPTError, match="objective=local"):
        check_logit_head(model, torch.ones(1, 4, dtype=torch.long))
