"""edits.json, the record of a store's folder: what was asked and what came out, checked as it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npt.common.display import one_line
from npt.common.fingerprint import is_record
from npt.common.places import place
from npt.editing.absorbing import files as absorbed
from npt.editing.checks import MOST_STEPS
from npt.editing.requests import NAMES, request_of
from npt.editing.writing import Edit
from npt.errors import CheckpointError, DataError, NPTError

EDITS = "edits.json"
#: The file with keys and values: its name comes from its content, so a save that was cut off leaves the old one for the old
#: edits.json.
PAIRS = re.compile(r"edits-[0-9a-f]{12}\.safetensors")
#: Of stores whose facts are trained together. Those of others in several blocks have version 3, those with absorbed contexts
#: and facts in one block at most version 2, and those with facts alone, in one block, version 1, which older programs read.
FORMAT_VERSION = 4
MOST_BYTES = 256 * 2**20
#: The names of an edit in edits.json and the type of each.
FIELDS: dict[str, type] = {
    "id": str, "values": str, "passes": int, "before": str, "after": str, "holds": bool, "note": str,
}  # fmt: skip


def layer_record(layers: Sequence[int]) -> int | list[int] | None:
    """Blocks, as edits.json has them: one alone, several in a list, null for none."""
    return list(layers) if len(layers) > 1 else layers[0] if layers else None


def layers_of(record: Any) -> tuple[int, ...]:
    """The blocks that edits.json has.

    Raises:
        TypeError: it has something else.
    """
    found = () if record is None else tuple(record) if isinstance(record, list) else (record,)
    if any(type(layer) is not int or layer < 0 for layer in found) or list(found) != sorted(set(found)):
        raise TypeError(f"layer={one_line(repr(record), 40)}")
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """edits.json of a store's folder, checked.

    Raises:
        CheckpointError: missing, damaged, or of a newer version.
    """
    folder = place(folder)
    file = folder / EDITS
    if not file.is_file():
        raise CheckpointError(f"store {folder}: no {EDITS} there; name a folder that `npt edit write` or save() made")
    try:
        if file.stat().st_size > MOST_BYTES:
            raise CheckpointError(
                f"store {folder}: {EDITS} has more than {MOST_BYTES:,} bytes; restore it from a backup"
            )
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, NPTError):
            raise
        raise CheckpointError(
            f"store {folder}: {EDITS} is not a JSON object ({one_line(error, 80)}); restore it from a backup"
        ) from error
    problem = _problem(record)
    if problem is not None:
        raise CheckpointError(f"store {folder}: {EDITS}: {problem}; restore it from a backup")
    return {**record, "modules": record.get("modules") or [record["module"]]}


def _problem(record: Any) -> str | None:
    """The first problem with the content of edits.json; None for none."""
    if not isinstance(record, dict):
        return f"not a JSON object but {type(record).__name__}"
    version = record.get("format_version")
    if type(version) is not int:
        return f"format_version={one_line(version, 40)} is no whole number"
    if version > FORMAT_VERSION:
        return f"format_version={version} was written by a newer npt, this one reads up to {FORMAT_VERSION}: upgrade npt, or"
    ridge, chosen = record.get("ridge"), record.get("chosen_ridge")
    checks = {
        "base": isinstance(record.get("base"), str | None),
        "layer": _is_layer(record.get("layer"), version),
        "module": isinstance(record.get("module"), str),
        "metric": isinstance(record.get("metric"), str) and bool(record["metric"].strip()),
        "ridge": ridge == "auto" or _is_number(ridge),
        "chosen_ridge": _is_number(chosen),
        **{name: record.get(name) is None or _is_number(record[name]) for name in ("limit", "chosen_cap")},
        "pairs": isinstance(record.get("pairs"), str) and PAIRS.fullmatch(record["pairs"]) is not None,
        "edits": isinstance(record.get("edits"), list),
        **{name: isinstance(record.get(name), list) for name in ("contexts", "modules", "order") if version > 1},
        "refine": _is_refine(record.get("refine")),
        "trained": record.get("trained", []) in ([], _listed(record.get("layer"))),
        "base_fingerprint": record.get("base_fingerprint") is None or is_record(record["base_fingerprint"]),
    }
    wrong = next((name for name, right in checks.items() if not right), None)
    if wrong is not None:
        return f"{wrong}={one_line(repr(record.get(wrong)), 40)} is not what npt writes there"
    seen = set()
    for number, edit in enumerate(record["edits"], 1):
        try:
            if not isinstance(edit, dict):
                return f"edit {number} is not an object but {type(edit).__name__}"
            found = _read(edit)
        except (DataError, KeyError, TypeError) as error:
            return f"edit {number} is damaged ({one_line(error, 100)})"
        if found.id != found.request.id or found.id in seen:
            return f"edit {number} has the id {one_line(repr(found.id), 20)}, which does not belong to its words"
        seen.add(found.id)
    return _problem_of_contexts(record, seen) if version > 1 else None


def _problem_of_contexts(record: Mapping[str, Any], seen: set[str]) -> str | None:
    """The first problem with the absorbed contexts of edits.json; None for none."""
    for number, one in enumerate(record["contexts"], 1):
        try:
            id = absorbed.read(one).id
        except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
            return f"context {number} is damaged ({one_line(error, 100)})"
        if id in seen or not re.fullmatch("[0-9a-f]{8}", id):
            return f"context {number} has the id {one_line(repr(id), 20)}, which is no id of its own"
        seen.add(id)
    for name in ("modules", "order"):
        if not all(isinstance(value, str) for value in record[name]) or (name == "order" and set(record[name]) != seen):
            return f"{name}={one_line(repr(record[name]), 60)} does not name what the store holds"
    return None


def _is_layer(value: Any, version: int) -> bool:
    try:
        count = len(layers_of(value))
    except TypeError:
        return False
    if isinstance(value, list):
        return count > 1 and version > 2
    return count == 1 or version > 1


def _is_refine(value: Any) -> bool:
    """True for what a store keeps of `Refining`; stores without it have nothing."""
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != {"steps", "terminator"}:
        return False
    steps = type(value["steps"]) is int and 0 <= value["steps"] <= MOST_STEPS
    return steps and isinstance(value["terminator"], str | None)


def refine_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `EditStore` about steps that a record has."""
    found = record.get("refine") or {}
    return {name: found[key] for name, key in (("refine", "steps"), ("terminator", "terminator")) if found.get(key)}


def _listed(layer: Any) -> list[int]:
    return layer if isinstance(layer, list) else [layer]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _read(edit: Mapping[str, Any]) -> Edit:
    request = request_of({name: edit.get(name) for name in NAMES}, "request")
    values = {}
    for name, kind in FIELDS.items():
        if type(edit.get(name)) is not kind:
            raise TypeError(f"{name}={one_line(repr(edit.get(name)), 40)}")
        values[name] = edit[name]
    return Edit(request=request, layers=layers_of(edit.get("layer")), **values)


def read_edits(record: Mapping[str, Any]) -> list[Edit]:
    """The edits of a checked edits.json, absorbed contexts without their token ids among them, in their order."""
    found: list[Edit] = [_read(edit) for edit in record["edits"]]
    found += [absorbed.read(one) for one in record.get("contexts", ())]
    by_id = {edit.id: edit for edit in found}
    return [by_id[id] for id in record.get("order", by_id)]
