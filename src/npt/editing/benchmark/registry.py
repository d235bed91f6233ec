"""Methods by name, and their options as a command gives them: METHOD.NAME=VALUE."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

from npt.block.families import blocks_of
from npt.common.display import one_line
from npt.editing.benchmark.methods import Context, Method, Setup, Store
from npt.editing.store import EditStore
from npt.editing.values import SHARING, STRATEGIES, settings_of
from npt.errors import NPTError
from npt.tuner.converted import base_of

#: Arguments of methods and of `EditStore` that the setup decides, the same for all.
_DECIDED = (
    "self", "setup", "model", "tokenizer", "layer", "metric", "statistics", "domain", "values", "cache_dir", "read_back",
    "progress",
)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A method that has a name.

    make: takes a `Setup` and options. takes: a callable with the options' names, where `make` passes them on. settings: the
    strategy of `npt.editing.values` whose settings are options too. last_block: True for a method that edits the last block,
    unless its option `layers` names another. blocks: the most that it edits; None for any number. prefixed: True for one that
    looks for values behind the setup's `value_prefixes`, an option too.
    """

    make: Callable[..., Method]
    takes: Callable[..., Any] | None = None
    settings: str | None = None
    last_block: bool = False
    blocks: int | None = 1
    prefixed: bool = False

    def names(self) -> list[str]:
        """The options that the method takes by name."""
        found = signature(self.takes or self.make).parameters.values()
        plain = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        return [p.name for p in found if p.kind in plain and p.name not in _DECIDED]


METHODS: dict[str, Known] = {
    **{
        name: Known(
            partial(Store, several=name in SHARING, values=name),
            EditStore,
            name,
            name == "margin",
            None if name in SHARING else 1,
        )
        for name in STRATEGIES
    },
    # Many facts as they are recommended: without Adam's part of newton, and trained together behind the solve.
    "refined": Known(
        partial(Store, several=True, values="newton", further=0, refine=100), EditStore, "newton", False, None
    ),
    "context": Known(Context, blocks=0),
}


def known_method(name: str) -> Known:
    """The method of that name.

    Raises:
        NPTError: there is none.
    """
    if name not in METHODS:
        raise NPTError(f"--method {one_line(name, 40)}: no method has that name; use {', '.join(METHODS)}")
    return METHODS[name]


def options_of(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{method: {option: value}} of METHOD.NAME=VALUE; a value is a Python literal, or else text.

    Raises:
        NPTError: another form, an unknown method, or an option that it does not take.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        method, dot, rest = text.partition(".")
        name, equals, value = rest.partition("=")
        if not (dot and equals and name) or method not in METHODS:
            raise NPTError(
                f"--option {one_line(repr(text), 60)}: use METHOD.NAME=VALUE, METHOD of {', '.join(METHODS)}"
            )
        try:
            found.setdefault(method, {})[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found.setdefault(method, {})[name] = value
    for method, options in found.items():
        _check(method, options)
    return found


def _check(name: str, options: Mapping[str, Any]) -> None:
    known = METHODS[name]
    layers = options.get("layers", ())
    if not isinstance(layers, tuple) or not all(type(layer) is int for layer in layers):
        raise NPTError(f"--option {name}.layers={layers!r}: use blocks in brackets, as in (4,5,6)")
    if known.blocks is not None and len(layers) > known.blocks:
        remedy = (
            f"edits one block; name it alone, as in ({layers[len(layers) // 2]},)"
            if known.blocks
            else "edits no block; leave it out"
        )
        raise NPTError(f"--option {name}.layers={one_line(str(layers), 40)}: {name} {remedy}")
    prefixes = options.get("value_prefixes")
    if known.prefixed and prefixes is not None and (type(prefixes) is not int or prefixes < 0):
        raise NPTError(f"--option {name}.value_prefixes={one_line(repr(prefixes), 40)}: use a whole number from 0")
    own = [*known.names(), *(["value_prefixes"] if known.prefixed else [])]
    rest = {key: value for key, value in options.items() if key not in ("layers", *own)}
    if known.settings is not None:
        try:
            settings_of(known.settings, rest)
        except NPTError as error:
            raise NPTError(f"--option {name}.{error}") from error
    elif rest:
        raise NPTError(
            f"--option {name}.{one_line(next(iter(rest)), 40)}: {name} takes no such option; use {', '.join(own) or 'none'}"
        )


def made(name: str, setup: Setup, options: Mapping[str, Any]) -> Method:
    """A method with its options; `layers` and `value_prefixes` among them take the place of the setup's.

    Raises:
        NPTError: an option out of range.
    """
    known, options = known_method(name), dict(options)
    last = (len(blocks_of(base_of(setup.model))) - 1,)
    layers = options.pop("layers", last if known.last_block else setup.layers)
    setup = replace(setup, layers=layers)
    if known.prefixed:
        setup = replace(setup, value_prefixes=options.pop("value_prefixes", setup.value_prefixes))
    return known.make(setup, **options)
