"""Edits obey the algebra that they are derived from, on a small random model of every family."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from npt import EditStore
from npt.editing.solve import Factors, solve
from tests.families import CASES, Case, marks_of
from tests.helpers import spelling_tokenizer

TEXTS = ["a river flows by the old town", "she reads a long letter", "many ships sail in spring", "no bread is left"]
FACTS = [
    {"prompt": "the home of Ada is", "subject": "Ada", "target": "Oslo"},
    {"prompt": "the work of Ben is", "subject": "Ben", "target": "art", "protect": ["the work of Bea is"]},
    {
        "prompt": "Carl Orff likes",
        "subject": "Carl Orff",
        "target": "tea",
        "paraphrases": ["a friend of Carl Orff has"],
    },
]
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))


#: Families on which one block is edited too; the others have every fact in both.
ONE_BLOCK = ("llama", "gpt2", "falcon")


def store(base: Any, layers: tuple[int, ...]) -> EditStore:
    """A store on some blocks, with statistics from a few texts."""
    return EditStore(
        base,
        spelling_tokenizer(),
        layer=layers,
        metric="text",
        statistics=TEXTS,
        progress=False,
        steps=3,
        terminator=None,
    )


def delta_of(factors: dict[int, Factors]) -> Tensor:
    """The weight deltas of all blocks beside one another."""
    return torch.cat([one.delta for one in factors.values()], 1)


@dataclass
class Scene:
    """What one family's model said and did on the way; every test reads another part of it."""

    base: Any
    logits: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)


def scene(case: Case, layers: tuple[int, ...]) -> Scene:
    found = Scene(case.build(noise=0.3))
    base = found.base

    def logits(name: str, model: Any = base) -> None:
        with torch.no_grad():
            found.logits[name] = model(input_ids=IDS).logits

    logits("base")
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    batch = store(base, layers)
    edits = batch.write_many(FACTS)
    found.deltas["batch"] = delta_of(batch.factors)
    logits("edited")
    text = "the home of Ada is"
    found.logits["preview"] = batch.preview(text, 2).logits
    with torch.no_grad():
        found.logits["whole"] = base(**batch.bench.batch([batch.bench.prompts.ids(text)])).logits[0]
    narrow = {layer: solve(pairs.to(torch.float32), batch.chosen_ridge) for layer, pairs in batch.pairs.items()}
    found.deltas["float32"] = delta_of(narrow)
    with batch.disabled():
        logits("disabled")
    with tempfile.TemporaryDirectory() as folder:
        batch.save(folder)
        batch.undo(edits[1].id)
        found.deltas["undone"] = delta_of(batch.factors)
        for edit in (edits[0], edits[2]):
            batch.undo(edit.id)
        logits("all undone")
        batch.close()
        peft = PeftModel.from_pretrained(base, folder)
        logits("peft", peft)
        with peft.disable_adapter():
            logits("peft off", peft)
        peft.unload()
    one = store(base, layers)
    for fact in (FACTS[2], FACTS[0], FACTS[1]):
        one.write(**fact)
    found.deltas["one by one"] = delta_of(one.factors)
    one.close()
    parts = []
    for facts in ([FACTS[0], FACTS[2]], [FACTS[1]]):
        parts.append(store(base, layers))
        parts[-1].write_many(facts)
        found.deltas.setdefault("never written", delta_of(parts[-1].factors))
        parts[-1].close()
    union = store(base, layers)
    for part in parts:
        union.merge(part)
    found.deltas["union"] = delta_of(union.factors)
    union.close()
    assert all(torch.equal(p, weights[name]) for name, p in base.named_parameters())
    return found


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def scenes() -> list[Any]:
    """Every family with facts in both blocks, and some with facts in the last one alone."""
    both = [pytest.param((case, (0, 1)), id=case.name, marks=marks_of(case)) for case in CASES]
    return both + [pytest.param((case, (1,)), id=f"{case.name}, one") for case in CASES if case.name in ONE_BLOCK]


@pytest.fixture(scope="module", params=scenes())
def found(request: pytest.FixtureRequest) -> Scene:
    """Made once for a family; pytest runs a family's tests one after the other."""
    return scene(*request.param)


def test_edits_are_at_work(found: Scene) -> None:
    assert apart(found.logits["edited"], found.logits["base"]) > 1e-3
    assert float(found.deltas["batch"].norm()) > 1e-3


def test_order_does_not_matter_and_one_by_one_is_the_batch(found: Scene) -> None:
    assert apart(found.deltas["one by one"], found.deltas["batch"]) < 1e-9


def test_undo_is_as_if_it_had_never_been_written(found: Scene) -> None:
    assert apart(found.deltas["undone"], found.deltas["never written"]) < 1e-9
    assert apart(found.deltas["undone"], found.deltas["batch"]) > 1e-3


def test_a_merge_is_the_union(found: Scene) -> None:
    assert apart(found.deltas["union"], found.deltas["batch"]) < 1e-9


def test_undo_of_all_is_the_base_bit_for_bit(found: Scene) -> None:
    assert torch.equal(found.logits["all undone"], found.logits["base"])
    assert torch.equal(found.logits["disabled"], found.logits["base"])


def test_a_preview_equals_the_whole_model(found: Scene) -> None:
    assert apart(found.logits["preview"], found.logits["whole"]) < 1e-12


def test_float32_solves_as_float64(found: Scene) -> None:
    assert apart(found.deltas["float32"].double(), found.deltas["batch"]) < 1e-4


def test_plain_peft_loads_the_lora(found: Scene) -> None:
    assert apart(found.logits["peft"], found.logits["edited"]) < 1e-5
    assert torch.equal(found.logits["peft off"], found.logits["base"])
