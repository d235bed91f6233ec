"""Stores of a test leave their models as they found them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.absorbing import SHARED
from tests.helpers import OPEN


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    """Takes the stores of a test off their models."""
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.fixture
def short_questions(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the models of `tests.absorbing` write is short, and kept for the next test."""
    monkeypatch.setattr("npt.editing.absorbing.questions.TOKENS", 6)
    SHARED["cache_dir"] = tmp_path_factory.getbasetemp() / "absorbing"
