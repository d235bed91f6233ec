"""Contexts, questions and stores of the tests of absorbing, on small random models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npt import EditStore
from npt.editing.absorbing.absorbed import Absorbed
from tests.families import CASES
from tests.helpers import OPEN, spelling_tokenizer

TEXTS = ["a river flows by the old town", "she reads a long letter", "many ships sail in spring", "no bread is left"]
FACT = {"prompt": "the home of Ada is", "subject": "Ada", "target": "Oslo"}
ONE, OTHER = "Bo is a red cat.", "The mill of Tam is old."
ASKED = {
    ONE: ["What is Bo?", "Who is red?", "Is Bo a dog?"],
    OTHER: ["Whose mill is it?", "How old is it?", "Is it new?"],
}
OPTIONS: dict[str, Any] = {
    "blocks": [1, 2], "mu": 1.0, "lam": 0.01, "phrasings": 1, "new_tokens": 5, "limit": 10.0, "style": "question", "steps": 0,
}  # fmt: skip
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))
#: Options of every store: where what the models write is kept for the next test.
SHARED: dict[str, Any] = {}


def base_of(family: str) -> Any:
    return next(case for case in CASES if case.model_type == family).build(torch.float32)


def store(base: Any, **options: Any) -> EditStore:
    options = {"layer": 1, "metric": "text", "statistics": TEXTS, "progress": False, "steps": 3, **SHARED, **options}
    OPEN.append(EditStore(base, spelling_tokenizer(), **options))
    return OPEN[-1]


def absorb(one: EditStore, context: str, **options: Any) -> Absorbed:
    options = {**OPTIONS, **({"rate": 1e-2} if options.get("steps") else {}), **options}
    if options["steps"] and options.get("start") != "closed":
        options = {name: value for name, value in options.items() if name not in ("mu", "lam")}
    found = one.absorb(context, ASKED[context], **options)
    assert isinstance(found, Absorbed)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found
