"""The methods of HF Trainer that npt overrides: the list is complete, and a method gone upstream stops the import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import transformers
from transformers import Trainer

from npt.equivalence.trainer import EquivalenceTrainer
from npt.finetuning.trainer import FinetuneTrainer
from npt.training.overridden import OVERRIDDEN, check_overridden


def test_the_list_holds_every_method_that_is_overridden() -> None:
    own = {
        name
        for trainer in (EquivalenceTrainer, FinetuneTrainer)
        for kind in trainer.__mro__[: trainer.__mro__.index(Trainer)]
        for name, value in vars(kind).items()
        if callable(value)
    }
    names = [name for name, _ in OVERRIDDEN]
    assert sorted(names) == sorted(n for n in own if not n.startswith("__") and hasattr(Trainer, n))


@pytest.mark.parametrize("name", [name for name, _ in OVERRIDDEN])
def test_a_method_that_is_gone_is_named(name: str) -> None:
    check_overridden(Trainer)
    planted = type("Trainer", (), {other: None if other == name else print for other, _ in OVERRIDDEN})
    with pytest.raises(ImportError, match=f"transformers {transformers.__version__}: Trainer has no method {name}, "):
        check_overridden(planted)


def test_the_import_fails_where_one_is_gone() -> None:
    code = "from transformers import Trainer; del Trainer._save_rng_state; import npt.training.checkpoints"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "ImportError: transformers" in found.stderr and "has no method _save_rng_state" in found.stderr
