"""The cost of blocks together is predicted from that of each alone, and the blocks that cost least are chosen."""

from __future__ import annotations

from itertools import combinations
from threading import Event, Thread
from typing import Any

import datasets
import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from npt import NPTConfig, calibrate
from npt.block.modes import Mode, running_as
from npt.equivalence.choice import hold_back
from npt.equivalence.prediction import Interactions, measure_interactions, passes_alone, probe_texts
from npt.errors import ConversionError
from npt.tuner.converted import active_layers, adapter_config
from tests.helpers import random_base, randomize


def text(rows: int = 4, length: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]


def converted(family: str = "llama", scale: float = 1.0, **options: Any) -> Any:
    model = get_peft_model(random_base(family, torch.float64), NPTConfig(**{"npt_layers": "all", "rank": 2, **options}))
    randomize(model)
    with torch.no_grad():
        for layer in active_layers(model):
            for parameter in layer.own.parameters():
                parameter.mul_(scale)
    return model.eval()


@torch.no_grad()
def kl(model: Any, batches: list[dict[str, Tensor]], blocks: list[int]) -> float:
    """Mean KL of the model with these blocks converted, over all positions but the last of each row."""
    others = [layer for layer in active_layers(model) if layer.index not in blocks]
    sums, count = 0.0, 0
    for batch in batches:
        with model.disable_adapter():
            p = model(**batch).logits[:, :-1].double().log_softmax(-1)
        with running_as(others, Mode.ORIGINAL):
            q = model(**batch).logits[:, :-1].double().log_softmax(-1)
        sums, count = sums + float((p.exp() * (p - q)).sum()), count + p[..., 0].numel()
    return sums / count


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_the_cost_of_a_block_alone_is_its_kl(family: str) -> None:
    """One pass from the block on gives what the whole model gives, and leaves every block's forward as it was."""
    model = converted(family)
    found = measure_interactions(model, text())
    for block, cost in found.alone().items():
        assert cost == pytest.approx(kl(model, text(), [block]), rel=1e-5)
        assert found.predict([block])[0] == pytest.approx(cost)
    assert not any("forward" in layer.get_base_layer().__dict__ for layer in active_layers(model))


def test_another_thread_computes_as_always() -> None:
    """While blocks are measured, a thread that uses the model gets its outputs, and the measured costs stay what they are."""
    model = converted()
    ids, expected, wrong, stop = text(seed=9)[0]["input_ids"], None, [], Event()
    with torch.no_grad():
        expected = model(input_ids=ids).logits

    @torch.no_grad()
    def serve() -> None:
        while not stop.is_set():
            wrong.append(not torch.equal(model(input_ids=ids).logits, expected))

    thread = Thread(target=serve)
    alone = measure_interactions(model, text(rows=8)).gram
    thread.start()
    try:
        beside = measure_interactions(model, text(rows=8)).gram
    finally:
        stop.set()
        thread.join()
    assert len(wrong) > 3 and not any(wrong)
    assert torch.equal(alone, beside)


def test_the_blocks_that_are_not_chosen_get_no_other_adapter() -> None:
    model: Any = get_peft_model(random_base("llama", torch.float64), NPTConfig(npt_layers="auto:1", rank=2))
    model.add_adapter("other", NPTConfig(npt_layers="all", rank=1))
    model.set_adapter("default")
    calibrate(model, text(rows=24, length=20))
    assert len(active_layers(model)) == 1 and set(model.peft_config) == {"default", "other"}
    model.set_adapter("other")
    assert len(active_layers(model)) > 1


def test_text_that_measured_the_blocks_is_text_that_was_seen() -> None:
    model: Any = get_peft_model(random_base("llama", torch.float64), NPTConfig(npt_layers="auto:1", rank=2))
    batches = text(rows=24, length=60)
    calibrate(model, batches)
    record = adapter_config(model).text_record
    data = datasets.Dataset.from_list([{"input_ids": row.tolist()} for part in batches for row in part["input_ids"]])
    assert record is not None and record.trained.covers(data).all() and len(data) == 24


def test_small_changes_add_up_as_predicted() -> None:
    """With small changes second order is all there is: what is left is the noise of the drawn tokens."""
    model = converted(gain="denominator")
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in active_layers(model):
            layer.own.gain.fill_(1)
            layer.own.c.copy_(layer.norm_parameters[0])
            layer.own.e.fill_(1)
            for name, parameter in layer.own.named_parameters():
                if name.startswith("B_"):
                    parameter.copy_(0.05 * torch.randn_like(parameter))
    batches = text(rows=16, length=40)
    found = measure_interactions(model, batches)
    together = kl(model, batches, found.blocks)
    assert 0 < together < 0.05
    assert found.predict()[0] == pytest.approx(together, rel=0.15)
    assert found.predict()[0] != pytest.approx(sum(found.alone().values()), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_counts_once_however_many_blocks_there_are(dtype: torch.dtype) -> None:
    """Blocks that change nothing cost what rounding does. The original's rounding is in every block's change."""
    model: Any = get_peft_model(
        random_base("llama", dtype), NPTConfig(npt_layers="all", carry="exact", gain="denominator")
    )
    batches = text(rows=64, length=40)
    found = measure_interactions(model.eval(), batches)
    measured = kl(model, batches, found.blocks)
    assert found.rounding is not None and measured > 0
    assert measured / 2 < found.predict()[0] < 2 * measured
    assert max(found.alone().values()) < measured / 2
    assert passes_alone(model) == 2 * len(found.blocks)


def test_padding_and_single_tokens_do_not_count() -> None:
    model = converted()
    plain = text()
    padded = [{name: torch.nn.functional.pad(x, (0, 3)) for name, x in batch.items()} for batch in plain] + [
        {"input_ids": torch.tensor([[7]])}
    ]
    one, other = (measure_interactions(model, batches) for batches in (plain, padded))
    assert torch.equal(one.tokens, other.tokens)
    torch.testing.assert_close(one.gram, other.gram)


def test_the_standard_error_is_that_of_a_ratio_over_texts() -> None:
    gram = torch.tensor([3.0, 1.0, 8.0]).view(3, 1, 1).double()
    tokens = torch.tensor([10.0, 10.0, 20.0]).double()
    mean, error = Interactions([4], gram, tokens).predict()
    rest = torch.tensor([3.0, 1.0, 8.0]) - 0.3 * tokens
    assert mean == pytest.approx(0.3) and error == pytest.approx(float((rest**2).sum() * 3 / 2) ** 0.5 / 40)


def test_the_choice_is_the_cheapest_of_all() -> None:
    """Against every set of blocks, with costs that cancel or add up; no count leaves out what it should keep."""
    for seed in range(20):
        factors = torch.randn(7, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rounding = None if seed % 2 else torch.linspace(9, 0, 7, dtype=torch.float64)[None]
        found = Interactions(list(range(10, 17)), (factors @ factors.T)[None], torch.tensor([1.0]), rounding)
        for count in (1, 3, 7):
            best = min(combinations(found.blocks, count), key=lambda blocks: found.predict(blocks)[0])
            chosen = found.choose(count)
            assert len(chosen) == count and chosen == sorted(chosen)
            assert chosen == list(best)


def test_the_choice_among_many_blocks_is_as_good_as_none_better_by_one_exchange() -> None:
    factors = torch.randn(30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Interactions(list(range(30)), (factors @ factors.T)[None], torch.tensor([1.0]))
    chosen = found.choose(15)
    cost = found.predict(chosen)[0]
    assert len(set(chosen)) == 15 and cost < found.predict(range(15))[0]
    others = set(found.blocks) - set(chosen)
    assert all(found.predict({*chosen, new} - {old})[0] >= cost for old in chosen for new in others)


def test_auto_keeps_the_blocks_that_cost_least() -> None:
    base = random_base("llama", torch.float64)
    model: Any = get_peft_model(base, NPTConfig(npt_layers="auto:1", rank=2))
    count = len(active_layers(model))
    assert count > 1
    batches = text(rows=24, length=20)
    errors = calibrate(model, batches)
    (kept,) = active_layers(model)
    assert set(errors) == {f"layer_{i}" for i in range(count)} and errors["layer_0"]["tokens"] == 16 * 20
    config = adapter_config(model)
    assert config.npt_layers == [kept.index] and config.target_modules == [f"model.layers.{kept.index}"]
    whole: Any = get_peft_model(random_base("llama", torch.float64), NPTConfig(npt_layers="all", rank=2))
    probes, rest = hold_back(batches, 8)
    calibrate(whole, list(rest))
    costs = {i: kl(whole, probes, [i]) for i in range(count)}
    assert kept.index == min(costs, key=lambda i: costs[i])


@pytest.mark.parametrize(
    "choice, match",
    [("auto:0", "use auto:1 to auto:"), ("auto:99", "99"), ("auto:", "auto:"), ("automat", "unknown")],
)
def test_a_wrong_choice_is_refused(choice: str, match: str) -> None:
    with pytest.raises(ConversionError, match=match):
        get_peft_model(random_base("llama", torch.float64), NPTConfig(npt_layers=choice))


def test_blocks_that_cost_nothing_are_not_chosen_from() -> None:
    with pytest.raises(ConversionError, match="gain='denominator'"):
        get_peft_model(random_base("llama", torch.float64), NPTConfig(npt_layers="auto", gain="denominator"))


@pytest.mark.parametrize(
    "blocks, texts, count", [(3, 384, 32), (15, 384, 32), (30, 384, 24), (30, 64, 8), (3, 12, 6), (2, 1, 1)]
)
def test_how_many_texts_are_held_back(blocks: int, texts: int, count: int) -> None:
    """Between 8 and 32, so that measuring takes no longer than calibrating, and never more than half of the text."""
    assert probe_texts(blocks, texts) == count


@pytest.mark.parametrize("rows, held, left", [(24, 8, 16), (9, 8, 1), (8, 8, 8), (3, 3, 3)])
def test_rows_held_back(rows: int, held: int, left: int) -> None:
    """The first eight; all text where nothing would be left."""
    probes, rest = hold_back(text(rows=rows), 8)
    all_rows = torch.cat([batch["input_ids"] for batch in text(rows=rows)])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in probes]), all_rows[:held])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in rest]), all_rows[-left:])
