"""A report of two blocks and two texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import NPTConfig, evaluate
from tests.helpers import randomize

TEXT = ["The cat sat on the mat and looked at the moon.", "A second document, a little longer than the first one."] * 6


@pytest.fixture(scope="session")
def report(local_model: Path) -> dict[str, Any]:
    """What `evaluate` returns; tests copy it before they change it."""
    base = AutoModelForCausalLM.from_pretrained(local_model, dtype=torch.float32).eval()
    model = get_peft_model(base, NPTConfig(rank=3))
    randomize(model, 0.05)
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    return evaluate(model, tokenizer, {"home": TEXT, "away": TEXT[1:4]}, context_length=32, prompts=["The", "A"])
