"""Each batch of an evaluation goes once through the trunk and once through each upper half, whoever watches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import pytest
import torch
from peft import get_peft_model

from npt import NPTConfig, evaluate
from npt.block.families import blocks_of
from npt.block.layer import BlockRecord, NPTLayer
from npt.evaluation.details import Details
from npt.evaluation.divergence import compare, token_divergences
from npt.evaluation.look import STREAM_ROWS, Observer, look, observe
from tests.families import CASES
from tests.helpers import randomize, spelling_tokenizer

LLAMA = next(case for case in CASES if case.name == "llama")
ROWS = 7
IDS = torch.randint(3, 96, (ROWS, 16), generator=torch.Generator().manual_seed(5))
BLOCKS = datasets.Dataset.from_dict({"input_ids": IDS.tolist()})


def converted() -> Any:
    """A model whose blocks 2 and 3 are converted, and differ from the original's."""
    model = get_peft_model(LLAMA.build(), NPTConfig(npt_layers=[2, 3], rank=2)).eval()
    randomize(model, 0.05)
    return model


class Passes(Observer):
    """Notes whose pass it saw, of which block and of how many rows."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def see_original(self, layer: NPTLayer, record: BlockRecord) -> None:
        """Notes it."""
        self.seen.append(("original", layer.index, len(record.output)))

    def see_own(self, layer: NPTLayer, record: BlockRecord) -> None:
        """Notes it."""
        self.seen.append(("own", layer.index, len(record.output)))


def test_a_report_runs_each_model_once_a_batch() -> None:
    """Of 7 blocks: two batches of at most 4 rows, which the figures by block share; and one of three pairs, by position."""
    model = converted()
    calls: Counter[int] = Counter()
    for index, block in enumerate(blocks_of(model.get_base_model())):
        block.self_attn.register_forward_hook(lambda *_, i=index: calls.update([i]))
    evaluate(model, spelling_tokenizer(), BLOCKS, context_length=16, prompts=[])
    batches = -(-ROWS // STREAM_ROWS) + 1
    # One row of one token says which dtype the blocks compute in.
    assert [calls[i] - 1 for i in range(4)] == [batches, batches, 2 * batches, 2 * batches]


@torch.no_grad()
def test_observers_see_the_first_blocks_alone_and_change_nothing() -> None:
    model, passes = converted(), Passes()
    found = token_divergences(model, BLOCKS, batch_size=3, observers=[passes], observed=5)
    alone = token_divergences(model, BLOCKS, batch_size=3)
    for name, values in alone.items():
        assert (found[name] == values).all(), name
    expected = [(who, i, rows) for rows in (3, 2) for who in ("original", "own") for i in (2, 3)]
    assert passes.seen == expected


@torch.no_grad()
def test_figures_by_block_do_not_depend_on_how_the_text_is_cut() -> None:
    model = converted()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    together, parts = Details(model), Details(model)
    observe(model, [batch], together.observers)
    observe(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(ROWS)], parts.observers)
    one, other = (details.figures(None) for details in (together, parts))
    same(one, other)


def same(one: Any, other: Any) -> None:
    """Compares two reports' figures."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    else:
        assert one == pytest.approx(other, rel=1e-6, abs=1e-12)


@torch.no_grad()
def test_nobody_watches_a_pass_that_no_observer_wants() -> None:
    """An observed pass keeps h and a: it would cost memory."""
    model = converted()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    hooks = [layer.hooks.thread.now for layer in Details(model).norms.layers]
    watched: list[bool] = []
    for block in list(blocks_of(model.get_base_model()))[2:]:
        block.mlp.register_forward_hook(lambda *_: watched.extend(h.on_block is not None for h in hooks))
    look(model, batch, [Observer()])
    assert watched and not any(watched)


@pytest.mark.parametrize("scale", [1e-4, 0.1, 5.0])
def test_divergence_of_logits_is_that_of_the_definition(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = 5 * torch.randn(20, 300, generator=generator)
    student = teacher + scale * torch.randn(20, 300, generator=generator)
    target = torch.arange(20)
    found = compare(teacher, student, target)
    p, q = (x.double().log_softmax(-1) for x in (teacher, student))
    torch.testing.assert_close(found[:, 0], (p.exp() * (p - q)).sum(-1), rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(found[:, 1], -q[target, target], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[:, 2], -p[target, target], rtol=1e-12, atol=0)
    delta = q[target, target].exp() - p[target, target].exp()
    torch.testing.assert_close(found[:, 4], delta, rtol=1e-9, atol=1e-15)
    assert found[:, 5].tolist() == student.argmax(-1).tolist() and found[:, 6].tolist() == teacher.argmax(-1).tolist()
