"""Stores of a test leave their models as they found them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import OPEN


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    """Takes the stores of a test off their models."""
    yield
    while OPEN:
        OPEN.pop().close()
