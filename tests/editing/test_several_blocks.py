"""Facts that several blocks share: files, undo, merge, preview and export. `test_properties.py` has the algebra by family."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import EditStore
from npt.builtin import model_folder
from npt.editing import export
from npt.editing.solve import solve
from npt.errors import NPTError

TEXTS = ["Once upon a time, there was a little girl named Lily. She liked to play.", "Tom had a ball."]
FACTS = [
    {"prompt": "One day, Tim saw a big", "subject": "Tim", "target": "cat"},
    {"prompt": "Sara found a red", "subject": "Sara", "target": "hat", "protect": ["Sue found a red"]},
    {"prompt": "The dog of Max is called", "subject": "Max", "target": "Ben"},
]
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder("builtin:tiny"), dtype=torch.float32).eval()


def opened(base: Any, **options: Any) -> EditStore:
    given = {
        "layer": (2, 1),
        "metric": "text",
        "statistics": TEXTS,
        "clamp": 50.0,
        "decay": 0.0,
        "steps": 25,
        **options,
    }
    return EditStore(
        base, AutoTokenizer.from_pretrained(model_folder("builtin:tiny")), terminator=None, progress=False, **given
    )


@pytest.fixture
def store(base: Any) -> Iterator[EditStore]:
    found = opened(base)
    found.write_many(FACTS)
    yield found
    found.close()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_every_block_has_its_part(store: EditStore) -> None:
    assert store.layers == (1, 2) == store.edits[0].layers and list(store.factors) == [1, 2]
    whole, parts = logits(store.model), []
    for site in store.bench.sites:
        with site.adapter.off():
            parts.append(float((logits(store.model) - whole).norm()))
    assert min(parts) > 1e-3 and all(edit.holds for edit in store.edits)


def test_protected_prompts_get_nothing_at_any_block(store: EditStore) -> None:
    row = store.bench.prompts.ids("Sue found a red")
    inputs = store.bench.inside([row], whole=False).inputs
    only = store.pairs_of(store.edits[1].id)
    for layer, own in zip(store.layers, inputs, strict=True):
        added = solve(only[layer], 1e-6).delta @ own[0].double().T
        assert float(added.norm(dim=0).min()) < 1e-3 * float(only[layer].values.norm())


def test_a_folder_keeps_all_blocks(store: EditStore, tmp_path: Path) -> None:
    edited = logits(store.model)
    store.save(tmp_path / "s")
    store.close()
    record = json.loads((tmp_path / "s" / "edits.json").read_text())
    assert record["format_version"] == 3 and record["layer"] == [1, 2] == record["edits"][0]["layer"]
    assert record["modules"] == ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    again = EditStore.load(store.model, store.tokenizer, tmp_path / "s", statistics=TEXTS, progress=False)
    assert torch.equal(logits(again.model), edited) and again.edits == store.edits
    for edit in again.edits:
        again.undo(edit.id)
    assert torch.equal(logits(again.model), (again.close(), logits(again.model))[1])


def test_one_block_keeps_the_format_that_older_programs_read(base: Any, tmp_path: Path) -> None:
    one = opened(base, layer=1)
    one.write_many(FACTS[:1])
    one.save(tmp_path / "s")
    one.close()
    record = json.loads((tmp_path / "s" / "edits.json").read_text())
    assert record["format_version"] == 1 and record["layer"] == 1 == record["edits"][0]["layer"]


def test_stores_of_other_blocks_are_not_merged(store: EditStore, base: Any) -> None:
    store.close()
    one = opened(base, layer=1)
    with pytest.raises(NPTError, match="the stores edit blocks 1 and 1 2"):
        one.merge(store)
    one.close()


def test_preview_is_the_whole_model(store: EditStore) -> None:
    text = FACTS[0]["prompt"]
    with torch.no_grad():
        whole = store.model(**store.bench.batch([store.bench.prompts.ids(text)])).logits[0]
    assert torch.allclose(store.preview(text, 2).logits, whole, atol=1e-5)


def test_facts_that_the_rank_loses_are_named(store: EditStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "RANKS", (1,))
    whole = logits(store.model)
    loras = export.loras_of(store)
    lost = {lora.lost for lora in loras.values()}
    assert len(loras) == 2 and len(lost) == 1 and 1 <= len(next(iter(lost))) <= 3
    assert torch.equal(logits(store.model), whole)


@pytest.mark.parametrize("layer", [(), (1, 1), (0, "1"), 1.5])
def test_blocks_are_indices_each_once(base: Any, layer: Any) -> None:
    with pytest.raises(NPTError, match="use 'auto', or the index of a block or of several, each once"):
        opened(base, layer=layer)
