"""The files of a store: a PEFT LoRA folder, edits.json with what was asked and what came out, and what undoing needs."""

from __future__ import annotations

import hashlib
import logging
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
from npt.common.fingerprint import difference, tensor_digest
from npt.common.places import place
from npt.common.writable import check_folders
from npt.editing.absorbing import files as absorbed
from npt.editing.export import described, loras_of, write_lora
from npt.editing.joint import Joint
from npt.editing.record import (
    EDITS,
    FIELDS,
    FORMAT_VERSION,
    PAIRS,
    layer_record,
    layers_of,
    read_edits,
    read_record,
    refine_of,
)
from npt.editing.solve import Factors, Pairs
from npt.editing.writing import Edit
from npt.errors import CheckpointError, DataError, NPTError

if TYPE_CHECKING:
    from npt.editing.store import EditStore

logger = logging.getLogger(__name__)

_PARTS, _FACTORS = ("keys", "whitened", "values"), ("left", "right")
#: Of the text that training facts together reads.
_TEXT = ("trained.ids", "trained.lengths")


def save_store(store: EditStore, folder: Path) -> Path:
    """See `EditStore.save`."""
    folder = place(folder)
    check_target(folder)
    blocks, loras = store.contexts.blocks, loras_of(store)
    ledger, trained = store.contexts.ledger, store.joint.trained
    steps = store.refining.steps
    version = (
        FORMAT_VERSION if steps or trained else 3 if len(store.layers) > 1 else 2 if ledger or not store.layers else 1
    )
    record: dict[str, Any] = {
        "format_version": version,
        "base": recorded_name(getattr(blocks.base.config, "_name_or_path", None)),
        "layer": layer_record(store.layers),
        "module": blocks.name(store.layers[0]) if len(store.layers) == 1 else "",
        "metric": store.metric,
        "ridge": store.ridge,
        "chosen_ridge": store.joint.ridge,
        **({} if store.limit is None else {"limit": store.limit, "chosen_cap": store.joint.cap}),
        **({"refine": asdict(store.refining), "trained": sorted(trained)} if steps or trained else {}),
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
    tensors |= {
        _trained_name(layer, part): getattr(factors, part).contiguous()
        for layer, factors in trained.items()
        for part in _FACTORS
    }
    if store.text is not None:
        tensors |= absorbed.tensors_of_rows(store.text, _TEXT)
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
    own = {name: getattr(edit, name) for name in FIELDS}
    return {**request, **own, "layer": layer_record(edit.layers)}


def _tensor_name(id: str, layer: int, layers: Sequence[int], part: str) -> str:
    """The name of an edit's tensor at a block: that of the block is in it where there are several."""
    return f"{id}.{layer}.{part}" if len(layers) > 1 else f"{id}.{part}"


def _trained_name(layer: int, part: str) -> str:
    return f"trained.{layer}.{part}"


def load_store(
    kind: type[EditStore], model: Any, tokenizer: Any, folder: Path, options: Mapping[str, Any]
) -> EditStore:
    """See `EditStore.load`."""
    record = read_record(folder)
    tensors = _read_tensors(place(folder), record)
    pairs = _pairs_in(folder, record, tensors)
    same = {"metric": record["metric"].split()[0], "ridge": record["ridge"], "limit": record.get("limit")}
    options = {**same, **refine_of(record), **options}
    if layers := layers_of(record["layer"]):
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
                f"{one_line(repr(store.source.name), 100)}; load it with the same metric, statistics and domain to write "
                "more, or to train facts together",
                record["metric"],
            )
        try:
            absorbed.put_back(store.contexts, record.get("contexts", ()), tensors)
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"store {folder}: {record['pairs']} and {EDITS} differ in an absorbed context ({one_line(error, 80)}); "
                "restore both from a backup"
            ) from error
        trained = _trained_in(folder, record, tensors)
        joint = Joint(record["chosen_ridge"], record.get("chosen_cap"), trained)
        store.restore(read_edits(record), pairs, joint, _text_in(folder, record, tensors))
        if store.refining.steps and len(pairs) > 1 and not trained:
            logger.warning(
                "store %s: its facts are not trained together yet, a write of them was cut off; `npt edit refine --store %s "
                "--steps %d` does it", folder, folder, store.refining.steps,
            )  # fmt: skip
    except BaseException:
        store.close()
        raise
    return store


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
    layers = layers_of(record["layer"])
    wanted = {
        _tensor_name(edit["id"], layer, layers, part) for edit in record["edits"] for layer in layers for part in _PARTS
    }
    wanted |= absorbed.names_in(record.get("contexts", ()))
    wanted |= {_trained_name(layer, part) for layer in record.get("trained", ()) for part in _FACTORS}
    if record.get("trained") or (record.get("refine") and set(_TEXT) <= set(tensors)):
        wanted |= set(_TEXT)
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
    layers = layers_of(record["layer"])
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


def _trained_in(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[int, Factors]:
    """{block: weight delta that was trained} of a store's facts; empty without one.

    Raises:
        CheckpointError: damaged.
    """
    found = {}
    for layer in record.get("trained", ()):
        left, right = (tensors[_trained_name(layer, part)] for part in _FACTORS)
        whole = all(
            part.dim() == 2 and part.dtype == torch.float64 and bool(part.isfinite().all()) for part in (left, right)
        )
        pair = record["edits"][0]["id"]
        keys, values = (
            tensors[_tensor_name(pair, layer, layers_of(record["layer"]), part)] for part in ("keys", "values")
        )
        if not whole or (len(left), right.shape[1], left.shape[1]) != (len(values), len(keys), len(right)):
            raise CheckpointError(
                f"store {folder}: {record['pairs']} is damaged at the weight delta of block {layer}; restore it from a backup"
            )
        found[layer] = Factors(left, right)
    return found


def _text_in(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[list[int]] | None:
    """Token ids of the text that training facts together reads; None where the store has none.

    Raises:
        CheckpointError: damaged.
    """
    if not set(_TEXT) <= set(tensors):
        return None
    try:
        return absorbed.rows_of(tensors, _TEXT)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"store {folder}: {record['pairs']} is damaged at {one_line(error, 40)}; restore it from a backup"
        ) from error
