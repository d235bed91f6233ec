"""Absorbed contexts on small random models: what is exact holds bit for bit, on several families."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from npt import EditStore
from npt.editing.absorbing.absorbed import Absorbed
from tests.families import CASES
from tests.helpers import spelling_tokenizer

TEXTS = ["a river flows by the old town", "she reads a long letter", "many ships sail in spring", "no bread is left"]
FACT = {"prompt": "the home of Ada is", "subject": "Ada", "target": "Oslo"}
ONE, OTHER = "Bo is a red cat.", "The mill of Tam is old."
ASKED = {
    ONE: ["What is Bo?", "Who is red?", "Is Bo a dog?"],
    OTHER: ["Whose mill is it?", "How old is it?", "Is it new?"],
}
OPTIONS: dict[str, Any] = {
    "blocks": [1, 2], "mu": 1.0, "lam": 0.01, "phrasings": 1, "new_tokens": 5, "limit": 10.0, "style": "question",
}  # fmt: skip
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))
FAMILIES = ("llama", "gpt2", "falcon", "gemma2", "granite")

OPEN: list[EditStore] = []


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    """Takes the stores of a test off their models."""
    yield
    while OPEN:
        OPEN.pop().close()


def base_of(family: str) -> Any:
    return next(case for case in CASES if case.model_type == family).build(torch.float32)


@pytest.fixture(scope="module")
def llama() -> Any:
    return base_of("llama")


def store(base: Any, **options: Any) -> EditStore:
    options = {"layer": 1, "metric": "text", "statistics": TEXTS, "progress": False, "steps": 3, **options}
    OPEN.append(EditStore(base, spelling_tokenizer(), **options))
    return OPEN[-1]


def absorb(one: EditStore, context: str, **options: Any) -> Absorbed:
    found = one.absorb(context, ASKED[context], **{**OPTIONS, **options})
    assert isinstance(found, Absorbed)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_is_absorbed_undone_saved_and_is_a_lora(family: str, tmp_path: Path) -> None:
    base = base_of(family)
    plain = logits(base)
    one = store(base)
    edit = absorb(one, ONE)
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
