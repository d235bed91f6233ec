"""Work that waits for an import: names that another module defines (PEP 562), and a call once a module is there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importlib.abc imports a quarter as much as npt --help does
    from importlib.abc import Loader, MetaPathFinder
else:
    Loader = MetaPathFinder = object


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


def after_import(name: str, call: Callable[[], object]) -> None:
    """Makes a call once a module has been imported: at once where it has been, else at the end of its import."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watcher(name, call))


class _Watcher(MetaPathFinder):
    """Finds one module as all other finders do, and has it loaded by a loader that makes the call.

    A search alone (`importlib.util.find_spec`) makes none.
    """

    def __init__(self, name: str, call: Callable[[], object]):
        self.name, self.call, self._searching = name, call, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _CallingLoader(spec.loader, self.call)
        return spec


class _CallingLoader(Loader):
    """A module's own loader, and a call when it is done."""

    def __init__(self, loader: Loader, call: Callable[[], object]):
        self.loader, self.call = loader, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module shall know its own loader: resources are found through it.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.call()
