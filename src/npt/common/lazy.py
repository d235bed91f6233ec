"""Names that a package exports from another module, imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exports_of(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The module-level `__getattr__` of a package.

    Args:
        package: the package's `__name__`. places: {exported name: module that defines it}.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
