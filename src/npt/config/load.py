"""A YAML file with "section.key=value" overrides to a run configuration; every problem is reported at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from npt.common.display import one_line
from npt.common.places import place
from npt.config.sections import SECTIONS, RunConfig, known_keys
from npt.config.strict_yaml import MAX_BYTES, parse_yaml
from npt.errors import ConfigError


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), below: Mapping[str, Any] | None = None
) -> RunConfig:
    """The configuration of a YAML file (or the defaults) with "dotted.key=value" overrides, values in YAML.

    Args:
        below: {"section.key": value} that holds where neither says anything.

    Raises:
        ConfigError: every problem in one message, each with its key, its value and what to do.
    """
    values: dict[str, Any] = {} if path is None else _read(place(path))
    problems = []
    for override in overrides:
        problem = _override(values, override)
        if problem:
            problems.append(problem)
    for name, value in (below or {}).items():
        section, key = name.split(".")
        if isinstance(known := values.setdefault(section, {}), dict):
            known.setdefault(key, value)
    problems += [_unknown(key) for key in islice(_unknown_keys(values), 100)]
    config, found = _validate(values)
    problems += found
    if problems or config is None:
        raise ConfigError(f"{'configuration' if path is None else path}: {_together(problems)}")
    return config


def given_keys(path: str | Path | None, overrides: Sequence[str] = ()) -> set[str]:
    """The "section.key" that a file and overrides give a value, right or wrong.

    Raises:
        ConfigError: the file can't be read.
    """
    values = {} if path is None else _read(place(path))
    for override in overrides:
        _override(values, override)
    return {f"{name}.{key}" for name, section in values.items() if isinstance(section, dict) for key in section}


def _together(problems: Iterable[str]) -> str:
    """All problems in one line; those past the first 20 are only counted."""
    lines = list(dict.fromkeys(one_line(problem) for problem in problems))
    return "; ".join([*lines[:20], *([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])])


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes a configuration as YAML, every key."""
    from npt.common.files import write_text  # a refused configuration needs no locks and no safetensors

    write_text(place(path), yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))


def with_overrides(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A copy with {"section.key": value} changed.

    Raises:
        ConfigError: what comes out contradicts itself.
    """
    values = config.model_dump()
    for name, value in changes.items():
        section, key = name.split(".")
        values[section][key] = value
    changed, problems = _validate(values)
    if changed is None or problems:
        raise ConfigError(_together(problems))
    return changed


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"--config {path}: more than {MAX_BYTES:,} bytes; that is no configuration, name another")
        values = parse_yaml(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path}: no such file; name a YAML file, e.g. config.yaml") from error
    except IsADirectoryError as error:
        raise ConfigError(f"--config {path}: is a folder; name a YAML file in it, e.g. config.yaml") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = one_line(error, 300)
        raise ConfigError(f"--config {path}: not readable as YAML: {reason}; mend the file or name another") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path}: expected sections like `model:`, found {type(values).__name__}; write section: and its "
            "keys indented below"
        )
    # A section whose keys are all commented out is null.
    return {name: {} if name in SECTIONS and value is None else value for name, value in values.items()}


def _override(values: dict[str, Any], override: str) -> str | None:
    """Applies one override; returns what is wrong with it, if anything."""
    dotted, separator, text = (part.strip() for part in override.partition("="))
    parts = dotted.split(".")
    shown = f"--set {one_line(override, 200)}"
    if not separator or not all(parts):
        return f"{shown}: write section.key=value, e.g. training.num_train_steps=100"
    if dotted in SECTIONS:
        return f"{shown}: {dotted} is a section; write {dotted}.key=value"
    if len(parts) != 2:
        return f"{shown}: {_unknown(dotted)}"
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        return f"{shown}: the value is not YAML ({one_line(error, 80)}); quote it"
    section = values.setdefault(parts[0], {})
    if isinstance(section, dict):
        section[parts[1]] = value
    return None


def option_problems(options: Mapping[str, Any]) -> list[str]:
    """The problems of values of the `model` section, for the options in an adapter's file."""
    return [problem.removeprefix("model.") for problem in _validate({"model": dict(options)})[1]]


def _unknown_keys(values: dict[str, Any]) -> Iterator[str]:
    known = known_keys()
    for name, section in values.items():
        if name not in SECTIONS:
            yield name
        elif isinstance(section, dict):
            yield from (f"{name}.{key}" for key in section if f"{name}.{key}" not in known)


def _unknown(key: str) -> str:
    """The message for an unknown key. It names the nearest known one, of the same section rather than of another."""
    section, _, leaf = key.rpartition(".")

    def likeness(name: str) -> float:
        its_section, _, its_leaf = name.rpartition(".")
        return difflib.SequenceMatcher(None, leaf, its_leaf).ratio() + 0.1 * (section == its_section)

    names = [*known_keys(), *(() if section else SECTIONS)]
    nearest = max(names, key=likeness)
    if likeness(nearest) >= 0.7:
        return f"{key}: unknown key; did you mean {nearest}?"
    return f"{key}: unknown key; remove it (the sections are {', '.join(SECTIONS)})"


def _validate(values: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """(the configuration or None, every problem but unknown keys).

    A wrong value hides the checks across keys of its section, so it is taken out and the rest checked again.
    """
    values = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    config, first = _attempt(values)
    wrong = {tuple(error["loc"][:2]) for error in first if len(error["loc"]) > 1}
    for section, key in wrong:
        values[str(section)].pop(key)
    second = _attempt(values)[1] if wrong else []
    first = [error for error in first if error["type"] != "extra_forbidden"]
    conflicts = [error for error in second if error["type"] == "conflict" and error not in first]
    return config, [line for error in (*first, *conflicts) for line in _explain(error, wrong)]


def _attempt(values: dict[str, Any]) -> tuple[RunConfig | None, list[ErrorDetails]]:
    try:
        # A section that is named is validated as part of the whole; a default would need a validator of its own.
        return RunConfig.model_validate({**{name: {} for name in SECTIONS}, **values}), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


#: {type of pydantic's error: the remedy}; braces are filled from the error's context.
_REMEDIES = {
    "int_type": "use a whole number",
    "int_from_float": "use a whole number",
    "float_type": "use a number",
    "finite_number": "use a finite number",
    "bool_type": "use true or false",
    "string_type": "use text, in quotes where YAML would read something else",
    "string_unicode": "holds half a surrogate pair; take it out",
    "string_too_short": "must not be empty",
    "list_type": "use a list, such as [a, b]",
    "too_short": "use at least {min_length} entry",
    "literal_error": "use {expected}",
    "greater_than": "use a value above {gt}",
    "greater_than_equal": "use a value of {ge} or more",
    "less_than": "use a value below {lt}",
    "less_than_equal": "use a value of {le} or less",
}


def _explain(error: ErrorDetails, wrong: set[tuple[Any, ...]]) -> Iterator[str]:
    """`key: value: remedy`; conflicts that involve a value in `wrong` wait until that is right."""
    location, kind, context = error["loc"], error["type"], error.get("ctx", {})
    key = ".".join(str(part) for part in location[:2])
    if kind == "conflict":
        for keys, text in context["conflicts"]:
            if not any((*location, *name.split(".")) in wrong for name in keys):
                yield f"{key}.{keys[0]}: {text}".removeprefix(".")
        return
    if len(location) == 1:
        yield f"{key}: {_shown(error['input'])}: not a section; write `{key}:` with its keys indented below"
        return
    text = str(context["error"]) if kind == "value_error" else _REMEDIES.get(kind, error["msg"]).format(**context)
    if kind == "literal_error" and isinstance(error["input"], bool):
        text += ", in quotes: YAML reads a bare yes or no as true or false"
    yield f"{key}: {_shown(error['input'])}: {text}"


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number of thousands of digits"
    return one_line(text, 80)
