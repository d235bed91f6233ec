"""The files of a store: a PEFT LoRA folder, edits.json with what was asked and what came out, and what undoing needs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from npt.adapters.folder import CONFIG, WEIGHTS
from npt.builtin import recorded_name
from npt.common.display import one_line
from npt.common.files import new_folder, replace_files, write_json, write_tensors
from npt.common.fingerprint import difference, is_record, tensor_digest
from npt.common.places import place
from npt.common.writable import check_folders
from npt.editing.absorbing import files as absorbed
from npt.editing.export import described, loras_of, write_lora
from npt.editing.joint import Joint
from npt.editing.requests import NAMES, request_of
from npt.editing.solve import Pairs
from npt.editing.writing import Edit
from npt.errors import CheckpointError, DataError, NPTError

if TYPE_CHECKING:
    from npt.editing.store import EditStore

EDITS = "edits.json"
#: The file with keys and values: its name comes from its content, so a save that was cut off leaves the old one for the old
#: edits.json.
PAIRS = re.compile(r"edits-[0-9a-f]{12}\.safetensors")
#: Of stores whose facts are in several blocks. Those with absorbed contexts and facts in one block at most have version 2, and
#: those with facts alone, in one block, version 1, which older programs read.
FORMAT_VERSION = 3
MOST_BYTES = 256 * 2**20
_PARTS = ("keys", "whitened", "values")
#: The names of an edit in edits.json and the type of each.
_EDIT: dict[str, type] = {
    "id": str, "values": str, "passes": int, "before": str, "after": str, "holds": bool, "note": str,
}  # fmt: skip


def save_store(store: EditStore, folder: Path) -> Path:
    """See `EditStore.save`."""
    folder = place(folder)
    check_target(folder)
    blocks, loras = store.contexts.blocks, loras_of(store)
    ledger, several = store.contexts.ledger, len(store.layers) > 1
    version = FORMAT_VERSION if several else 2 if ledger or not store.layers else 1
    record: dict[str, Any] = {
        "format_version": version,
        "base": recorded_name(getattr(blocks.base.config, "_name_or_path", None)),
        "layer": _layer_record(store.layers),
        "module": blocks.name(store.layers[0]) if len(store.layers) == 1 else "",
        "metric": store.metric,
        "ridge": store.ridge,
        "chosen_ridge": store.joint.ridge,
        **({} if store.limit is None else {"limit": store.limit, "chosen_cap": store.joint.cap}),
        "lora": described(loras),
        "pairs": "",
        "edits": [_written(edit) for edit in store.facts],
        "base_fingerprint": blocks.fingerprint,
    }
    if version > 1:
        record |= {"modules": sorted(loras), "contexts": [absorbed.described(one) for one in ledger.values()]}
        record["order"] = [edit.id for edit in store.edits]
    tensors = {
        _tensor_name(edit.id, layer, store.layers, part): getattr(pairs, part).contiguous()
        for edit in store.facts
        for layer, pairs in store.pairs_of(edit.id).items()
        for part in _PARTS
    } | absorbed.tensors_of(store.contexts)
    digest = hashlib.sha256(b"".join(name.encode() + tensor_digest(tensors[name]) for name in sorted(tensors)))
    record["pairs"] = f"edits-{digest.hexdigest()[:12]}.safetensors"

    def fill(temporary: Path) -> None:
        write_lora(store, loras, temporary)
        write_tensors(temporary / str(record["pairs"]), tensors)
        write_json(temporary / EDITS, record)
        for path in temporary.iterdir():  # safetensors gives its files to their owner alone
            path.chmod((temporary / EDITS).stat().st_mode)

    if folder.is_dir() and any(folder.iterdir()):
        # edits.json last: it is what a reader looks at first.
        replace_files(folder, fill, last=EDITS)
        for path in folder.iterdir():
            if PAIRS.fullmatch(path.name) and path.name != record["pairs"]:
                path.unlink()
    else:
        new_folder(folder, fill)
    return folder


def check_target(folder: Path) -> None:
    """Checks that a store can be written to a folder: it holds one, or nothing, or can be made.

    Raises:
        NPTError: not so.
    """
    check_folders({"store": folder})
    if folder.is_dir() and any(folder.iterdir()) and not (folder / EDITS).is_file():
        raise NPTError(f"store {folder}: is there and holds no {EDITS}; name another folder")


def _written(edit: Edit) -> dict[str, Any]:
    request = asdict(edit.request)
    own = {name: getattr(edit, name) for name in _EDIT}
    return {**request, **own, "layer": _layer_record(edit.layers)}


def _layer_record(layers: Sequence[int]) -> int | list[int] | None:
    """Blocks, as edits.json has them: one alone, several in a list, null for none."""
    return list(layers) if len(layers) > 1 else layers[0] if layers else None


def _layers_of(record: Any) -> tuple[int, ...]:
    """The blocks that edits.json has.

    Raises:
        TypeError: it has something else.
    """
    found = () if record is None else tuple(record) if isinstance(record, list) else (record,)
    if any(type(layer) is not int or layer < 0 for layer in found) or list(found) != sorted(set(found)):
        raise TypeError(f"layer={one_line(repr(record), 40)}")
    return found


def _tensor_name(id: str, layer: int, layers: Sequence[int], part: str) -> str:
    """The name of an edit's tensor at a block: that of the block is in it where there are several."""
    return f"{id}.{layer}.{part}" if len(layers) > 1 else f"{id}.{part}"


def load_store(
    kind: type[EditStore], model: Any, tokenizer: Any, folder: Path, options: Mapping[str, Any]
) -> EditStore:
    """See `EditStore.load`."""
    record = read_record(folder)
    tensors = _read_tensors(place(folder), record)
    pairs = _pairs_in(folder, record, tensors)
    options = {"metric": record["metric"].split()[0], "ridge": record["ridge"], "limit": record.get("limit"), **options}
    if layers := _layers_of(record["layer"]):
        options["layer"] = layers
    store = kind(model, tokenizer, **options)
    try:
        here, there = store.contexts.blocks.fingerprint, record["base_fingerprint"]
        if here is not None and there is not None and (told := difference(there, here)) is not None:
            raise CheckpointError(
                f"store {folder}: it was written for another base than this one: {told}; load the base that {EDITS} names, "
                f"{one_line(record['base'], 80)}"
            )
        for id, found in pairs.items():
            for site in store.bench.sites:
                own = found[site.layer]
                if (len(own.keys), len(own.values)) != (site.width, site.size):
                    raise CheckpointError(
                        f"store {folder}: edit {id} is for a projection of {len(own.keys)} to {len(own.values)} numbers, and "
                        f"this model's has {site.width} to {site.size}; load the base that {EDITS} names"
                    )
        if store.source.name != record["metric"]:
            store.refuse_writing(
                f"the store in {folder} has the metric {one_line(repr(record['metric']), 100)}, and this one "
                f"{one_line(repr(store.source.name), 100)}; load it with the same metric, statistics and domain to write more",
                record["metric"],
            )
        try:
            absorbed.put_back(store.contexts, record.get("contexts", ()), tensors)
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"store {folder}: {record['pairs']} and {EDITS} differ in an absorbed context ({one_line(error, 80)}); "
                "restore both from a backup"
            ) from error
        store.restore(read_edits(record), pairs, Joint(record["chosen_ridge"], record.get("chosen_cap")))
    except BaseException:
        store.close()
        raise
    return store


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
        count = len(_layers_of(value))
    except TypeError:
        return False
    if isinstance(value, list):
        return count > 1 and version > 2
    return count == 1 or version > 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _read(edit: Mapping[str, Any]) -> Edit:
    request = request_of({name: edit.get(name) for name in NAMES}, "request")
    values = {}
    for name, kind in _EDIT.items():
        if type(edit.get(name)) is not kind:
            raise TypeError(f"{name}={one_line(repr(edit.get(name)), 40)}")
        values[name] = edit[name]
    return Edit(request=request, layers=_layers_of(edit.get("layer")), **values)


def read_edits(record: Mapping[str, Any]) -> list[Edit]:
    """The edits of a checked edits.json, absorbed contexts without their token ids among them, in their order."""
    found: list[Edit] = [_read(edit) for edit in record["edits"]]
    found += [absorbed.read(one) for one in record.get("contexts", ())]
    by_id = {edit.id: edit for edit in found}
    return [by_id[id] for id in record.get("order", by_id)]


def copy_lora(folder: Path, target: Path) -> None:
    """Copies the LoRA of a store and edits.json, without what undoing needs."""
    for name in (CONFIG, WEIGHTS, EDITS):
        shutil.copy2(folder / name, target / name)


def _read_tensors(folder: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a store's edits and contexts.

    Raises:
        CheckpointError: missing, damaged, or others.
    """
    name = record["pairs"]
    try:
        tensors: dict[str, Tensor] = load_file(folder / name)
    except (SafetensorError, OSError) as error:
        reason = one_line(error, 100)
        raise CheckpointError(f"store {folder}: {name} can't be read ({reason}); restore it from a backup") from error
    layers = _layers_of(record["layer"])
    wanted = {
        _tensor_name(edit["id"], layer, layers, part) for edit in record["edits"] for layer in layers for part in _PARTS
    }
    wanted |= absorbed.names_in(record.get("contexts", ()))
    if wanted != set(tensors):
        odd = min(wanted ^ set(tensors))
        raise CheckpointError(
            f"store {folder}: {name} and {EDITS} differ in {one_line(odd, 40)}; restore both from a backup"
        )
    return tensors


def _pairs_in(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, dict[int, Pairs]]:
    """{id: {block: pairs}} of a store's facts.

    Raises:
        CheckpointError: damaged.
    """
    layers = _layers_of(record["layer"])
    found: dict[str, dict[int, Pairs]] = {edit["id"]: {} for edit in record["edits"]}
    for id, own in found.items():
        for layer in layers:
            parts = [tensors[_tensor_name(id, layer, layers, part)] for part in _PARTS]
            whole = all(
                part.dim() == 2 and part.dtype == torch.float64 and bool(part.isfinite().all()) for part in parts
            )
            if not whole or len({part.shape[1] for part in parts}) != 1 or parts[0].shape != parts[1].shape:
                raise CheckpointError(
                    f"store {folder}: {record['pairs']} is damaged at edit {id}; restore it from a backup"
                )
            own[layer] = Pairs(*parts)
    return found
