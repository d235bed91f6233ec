"""Absorbed contexts on small random models: what is exact holds bit for bit, on several families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from npt import EditStore
from npt.editing import export
from npt.editing.solve import Factors
from npt.errors import CheckpointError, ConversionError, NPTError
from tests.absorbing import FACT, ONE, OPTIONS, OTHER, SHARED, TEXTS, absorb, base_of, logits, store
from tests.helpers import OPEN

pytestmark = pytest.mark.usefixtures("short_questions")
FAMILIES = ("llama", "gpt2", "falcon", "gemma2", "granite")
#: The closed form alone, steps from zero, and steps behind the closed form.
WAYS: list[dict[str, Any]] = [{"steps": 0}, {"steps": 3}, {"steps": 3, "start": "closed"}]


@pytest.fixture(scope="module")
def llama() -> Any:
    return base_of("llama")


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_is_absorbed_undone_saved_and_is_a_lora(family: str, way: dict[str, Any], tmp_path: Path) -> None:
    base = base_of(family)
    plain = logits(base)
    one = store(base)
    edit = absorb(one, ONE, **way)
    assert one.edits == [edit] and edit.id in {found.id for found in one.edits}
    assert edit.figures.kl_after < edit.figures.kl_before and edit.figures.text_kl > 0
    absorbed = logits(base)
    assert not torch.allclose(absorbed, plain, atol=1e-3)
    with one.disabled():
        assert torch.equal(logits(base), plain)
    one.save(tmp_path / "s")
    one.close()
    assert torch.equal(logits(base), plain)
    again = EditStore.load(base, one.tokenizer, tmp_path / "s", progress=False)
    OPEN.append(again)
    assert torch.equal(logits(base), absorbed) and again.edits == one.edits
    again.undo(edit.id)
    assert again.edits == [] and torch.equal(logits(base), plain)
    again.close()
    peft = PeftModel.from_pretrained(base, str(tmp_path / "s"))
    assert torch.allclose(logits(peft), absorbed, atol=1e-4)
    config = json.loads((tmp_path / "s" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 2 and config["target_modules"] == sorted(config["target_modules"])


# -- the ledger ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_order_does_not_matter_and_undo_is_as_if_never_absorbed(llama: Any, way: dict[str, Any]) -> None:
    found = {}
    for order in ((ONE, OTHER), (OTHER, ONE), (ONE,), (OTHER,)):
        one = store(llama)
        ids = [absorb(one, context, **way).id for context in order]
        found[order] = logits(llama)
        if order == (ONE, OTHER):
            one.undo(ids[0])
            found["one undone"] = logits(llama)
            one.undo(ids[1])
            found["both undone"] = logits(llama)
        one.close()
    assert torch.equal(found[ONE, OTHER], found[OTHER, ONE])
    assert torch.equal(found["one undone"], found[OTHER,]) and not torch.equal(found["one undone"], found[ONE, OTHER])
    assert not torch.equal(found[ONE,], found[OTHER,])
    assert torch.equal(found["both undone"], logits(llama))


@pytest.mark.parametrize("way", WAYS)
def test_a_context_that_was_loaded_is_undone_without_its_text(llama: Any, way: dict[str, Any], tmp_path: Path) -> None:
    """The other context is solved for anew from what the folder holds: no statistics, no questions are needed."""
    one = store(llama)
    first = absorb(one, ONE, **way)
    absorb(one, OTHER, **way)
    one.save(tmp_path / "s")
    one.close()
    alone = store(llama)
    absorb(alone, OTHER, **way)
    expected = logits(llama)
    alone.close()
    again = EditStore.load(llama, one.tokenizer, tmp_path / "s", progress=False)
    OPEN.append(again)
    again.undo(first.id)
    assert torch.equal(logits(llama), expected)


def test_contexts_that_were_absorbed_in_other_ways_share_a_store(llama: Any) -> None:
    found = []
    for order in (("closed", "zero"), ("zero", "closed")):
        one = store(llama)
        contexts = {"closed": (ONE, {"steps": 0}), "zero": (OTHER, {"steps": 3})}
        ids = {start: absorb(one, contexts[start][0], **contexts[start][1]).id for start in order}
        setting = one.contexts.setting()
        assert (setting.is_solved, setting.steps, setting.mu) == (True, 3, OPTIONS["mu"])
        found.append(logits(llama))
        one.undo(ids["closed"])
        assert not one.contexts.setting().is_solved
        undone = logits(llama)
        one.close()
        alone = store(llama)
        absorb(alone, OTHER, steps=3)
        assert torch.equal(undone, logits(llama))
        alone.close()
    assert torch.equal(*found)


@pytest.mark.parametrize("way", WAYS[:2])
def test_facts_and_contexts_share_a_store(llama: Any, way: dict[str, Any], tmp_path: Path) -> None:
    plain = logits(llama)
    one = store(llama)
    edit = absorb(one, ONE, **way)
    absorbed = logits(llama)
    fact = one.write(**FACT)
    both = logits(llama)
    assert [found.id for found in one.edits] == [edit.id, fact.id] and one.facts == [fact]
    assert {found.id for found in one.verify()} == {edit.id, fact.id}
    one.save(tmp_path / "s")
    one.undo(edit.id)
    only_fact = logits(llama)
    one.undo(fact.id)
    assert torch.equal(logits(llama), plain)
    one.close()
    other = store(llama)
    other.write(**FACT)
    assert torch.equal(logits(llama), only_fact)  # keys and values are the base's, whatever was absorbed
    absorb(other, ONE, **way)
    assert torch.equal(logits(llama), both)
    other.close()
    again = EditStore.load(llama, one.tokenizer, tmp_path / "s", progress=False)
    OPEN.append(again)
    assert torch.equal(logits(llama), both) and [found.id for found in again.edits] == [edit.id, fact.id]
    again.undo(fact.id)
    assert torch.equal(logits(llama), absorbed)
    again.close()
    peft = PeftModel.from_pretrained(llama, str(tmp_path / "s"))
    assert torch.allclose(logits(peft), both, atol=1e-4)
    peft.unload()


@pytest.mark.parametrize("way", WAYS[:2])
def test_a_merge_is_the_union(llama: Any, way: dict[str, Any]) -> None:
    one, parts = store(llama), list[EditStore]()
    absorb(one, ONE, **way)
    absorb(one, OTHER, **way)
    one.write(**FACT)
    union = logits(llama)
    one.close()
    for context in (ONE, OTHER):
        parts.append(store(llama))
        absorb(parts[-1], context, **way)
        if context == OTHER:
            parts[-1].write(**FACT)
        parts[-1].close()
    parts[0].reopen()
    parts[0].merge(parts[1])
    assert torch.equal(logits(llama), union) and len(parts[0].edits) == 3
    parts[0].close()
    strange = store(llama, statistics=["other words are here"])
    absorb(strange, ONE)
    strange.close()
    parts[1].undo(parts[1].facts[0].id)  # the metric of facts would be refused first
    with pytest.raises(NPTError, match="beside different text"):
        strange.merge(parts[1])


def test_what_fails_leaves_the_store_as_it_was(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = store(llama)
    absorb(one, ONE)
    before = logits(llama)

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("npt.editing.absorbing.contexts.Contexts._tell", fail)
    with pytest.raises(MemoryError):
        absorb(one, OTHER)
    assert len(one.edits) == 1 and torch.equal(logits(llama), before)
    monkeypatch.undo()
    monkeypatch.setattr("npt.editing.absorbing.contexts.Contexts.resolve", fail)
    with pytest.raises(MemoryError):
        one.undo(one.edits[0].id)
    assert len(one.edits) == 1 and torch.equal(logits(llama), before)


def test_blocks_that_go_on_behind_their_mlp_are_refused_before_any_long_work() -> None:
    with pytest.raises(ConversionError, match="Gemma4ForCausalLM change the stream.*facts can be written"):
        store(base_of("gemma4_text")).absorb("Bo lives in a mill.")


def test_a_damaged_context_is_refused(llama: Any, tmp_path: Path) -> None:
    one = store(llama)
    absorb(one, ONE)
    folder = one.save(tmp_path / "s")
    one.close()
    record = json.loads((folder / "edits.json").read_text())
    for path, value in (
        (("setting", "blocks"), []), (("setting", "blocks"), [1]), (("setting", "rank"), 0), (("learnt",), []), (("id",), 3),
        (("figures", "kl_before"), "x"), (("context",), " "),
    ):  # fmt: skip
        damaged = json.loads(json.dumps(record))
        place = damaged["contexts"][0]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (folder / "edits.json").write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match="restore"):
            EditStore.load(llama, one.tokenizer, folder, progress=False)
    store(llama)  # nothing was left at work


# -- stores that are closed, cut off or loaded otherwise -------------------------------------------------------------------


def test_a_closed_store_stays_off_the_model(llama: Any) -> None:
    plain, one = logits(llama), store(llama)
    first = absorb(one, ONE)
    absorb(one, OTHER)
    one.close()
    one.contexts.patches.set(dict(one.contexts.factors))
    assert torch.equal(logits(llama), plain)
    one.contexts.patches.set({})
    one.contexts.resolve()
    with one.contexts.patches.trying():
        pass
    assert torch.equal(logits(llama), plain)
    one.undo(first.id)
    assert torch.equal(logits(llama), plain)
    with pytest.raises(NPTError, match="reopen"):
        absorb(one, ONE)
    other = store(llama)  # nothing is at work on the model
    other.close()
    one.reopen()
    undone = logits(llama)
    one.close()
    alone = store(llama)
    absorb(alone, OTHER)
    assert torch.equal(logits(llama), undone) and not torch.equal(undone, plain)


def test_an_interrupt_while_the_ridge_is_chosen_leaves_a_store_that_is_saved(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = store(llama)
    fact = one.write(**FACT)
    other = one.write(**{**FACT, "prompt": f"About it: {FACT['prompt']}"})
    edit = absorb(one, ONE)
    before, ridge = logits(llama), one.chosen_ridge

    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("npt.editing.joint.automatic_ridge", interrupt)
    with pytest.raises(KeyboardInterrupt):
        one.write(**{**FACT, "prompt": f"Here: {FACT['prompt']}"})
    with pytest.raises(KeyboardInterrupt):
        one.undo(edit.id, other.id)
    assert [found.id for found in one.edits] == [fact.id, other.id, edit.id] and torch.equal(logits(llama), before)
    one.save(tmp_path / "s")
    assert json.loads((tmp_path / "s" / "edits.json").read_text())["chosen_ridge"] == ridge == one.chosen_ridge


def test_a_store_of_another_metric_keeps_the_name_of_its_own(llama: Any, tmp_path: Path) -> None:
    one = store(llama)
    one.write(**FACT)
    one.save(tmp_path / "s")
    one.close()
    for number in range(2):
        again = EditStore.load(
            llama, one.tokenizer, tmp_path / "s", statistics=["other words are here"], progress=False, **SHARED
        )
        OPEN.append(again)
        if number == 0:
            absorb(again, ONE)
            again.save(tmp_path / "s")
            again.close()
        with pytest.raises(NPTError, match="load it with the same metric"):
            again.write("the mill of Tam is", "Tam", "old")
    again.close()
    other = store(llama, statistics=["other words are here"])
    with pytest.raises(NPTError, match="have the metrics"):
        other.merge(again)


def test_contexts_go_on_beside_the_text_that_they_were_absorbed_beside(llama: Any, tmp_path: Path) -> None:
    one = store(llama)
    edit = absorb(one, ONE)
    one.save(tmp_path / "s")
    one.close()
    again = EditStore.load(
        llama, one.tokenizer, tmp_path / "s", statistics=["other words are here"], progress=False, **SHARED
    )
    OPEN.append(again)
    with pytest.raises(NPTError, match="absorbed beside other text"):
        absorb(again, OTHER)
    again.undo(edit.id)
    absorb(again, OTHER)  # beside its own text
    assert len(again.contexts.general.rows()) == 1
    again.close()
    same = EditStore.load(llama, one.tokenizer, tmp_path / "s", statistics=TEXTS, progress=False, **SHARED)
    OPEN.append(same)
    absorb(same, OTHER)
    assert len(same.edits) == 2


def test_facts_that_the_rank_of_the_joint_lora_loses_are_named(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fact alone is within the rank; beside a large weight delta that its own tokens never meet it is not."""
    one = store(llama, clamp=50.0, terminator=None, decay=0.0, steps=8, margin=4.0, contexts=1)
    fact = one.write("the home of Ada is", "Ada", "O")
    assert fact.holds
    row = one.bench.prompts.target(fact.request.prompt, fact.request.target, None).ids
    inputs = one.bench.inside([row], whole=False).inputs[0][0].double()
    never = torch.linalg.svd(inputs, full_matrices=True)[2][len(inputs) :][:1]
    one.contexts.patches.put(1, Factors(torch.full((one.bench.first.size, 1), 1e3, dtype=torch.float64), never))
    monkeypatch.setattr(export, "RANKS", (2,))
    assert [lora.lost for lora in export.loras_of(one).values()] == [()]
    monkeypatch.setattr(export, "RANKS", (1,))
    whole = logits(llama)
    assert [lora.lost for lora in export.loras_of(one).values()] == [(fact.id,)]
    assert torch.equal(logits(llama), whole) and one.verify()[0].holds
