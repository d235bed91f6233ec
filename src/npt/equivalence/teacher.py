"""The original model's side of an objective, kept on disk: made once, read by every later run on the same text.

    hidden   for `local` and `composite`: per converted block h, a and y of every token, as the model computes them. The
             frozen forward then disappears from a training step.
    logits   for `logits`: per token the k most probable next tokens, their log-probabilities and that of all others
             together. KL over these k + 1 outcomes is a lower bound of the full KL (data processing), close for k = 64.

A folder holds targets.json, which names the model and the text that the targets were made from, and safetensors shards,
each of whole blocks of text. A shard appears whole, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from npt.block.layer import BlockRecord, NPTLayer
from npt.block.modes import Mode, running_as, watching
from npt.block.probing import logit_head
from npt.common.display import blocks_text, human_bytes
from npt.common.files import replace_file
from npt.common.fingerprint import base_fingerprint, text_fingerprint
from npt.common.places import expanded
from npt.common.processes import barrier, first_does, share, world
from npt.common.progress import progress_bar
from npt.common.sharded import is_sharded
from npt.data.batches import batches_of
from npt.errors import DataError
from npt.tuner.converted import ConvertedModel, active_layers, device_of, eval_mode, run_backbone

logger = logging.getLogger(__name__)

#: Column of the training set that says which row of the cache a block is.
ROW = "teacher_row"
TARGETS = ("hidden", "logits")
MANIFEST = "targets.json"
#: Least size of a shard; a shard holds whole blocks.
SHARD_BYTES = 256 * 2**20
#: Disk that stays free for the run's other files.
RESERVE = 64 * 2**20
_FORMAT = 1
#: Key of the manifest -> the words for a difference in it, in the order in which they are told.
_MEANINGS = {
    "format": "another version of npt",
    "kind": "another kind of targets",
    "base": "another base model (its weights, dtype or configuration differ)",
    "text": "other text (other blocks, data section or training.seed)",
    "precision": "another optimization.mixed_precision",
    "top_k": "another training.teacher_top_k",
}
#: Keys that the model alone decides.
_OF_MODEL = ("format", "kind", "base", "top_k")


@dataclass(frozen=True)
class Manifest:
    """The origin of targets and their layout in the shards; the content of targets.json.

    kind: one of `TARGETS`. base, text: fingerprints. top_k: tokens kept per position, None for `hidden`. layers: the converted
    blocks. precision: of autocast. blocks: in all. shard_blocks: blocks per shard.
    """

    kind: str
    base: str
    top_k: int | None
    layers: list[int]
    text: str = ""
    precision: str = ""
    blocks: int = 0
    shard_blocks: int = 1
    format: int = _FORMAT

    def __post_init__(self) -> None:
        numbers = [self.blocks, self.shard_blocks, *self.layers, *([] if self.top_k is None else [self.top_k])]
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or self.shard_blocks < 1:
            raise ValueError(f"blocks, shard_blocks, layers and top_k are whole numbers, not {numbers}")


class TeacherCache:
    """Targets on disk, for one kind of objective.

    Args:
        folder: of this kind. manifest: what it holds.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._open: dict[int, Any] = {}

    def record(self, layer: int, rows: Tensor, device: torch.device) -> BlockRecord:
        """h, a and y, each (rows, tokens, d), of a converted block."""
        # Where the block before is converted too, its output is this one's h and lies there once.
        hidden = f"{layer}.hidden_states"
        h = hidden if self._has(hidden) else f"{layer - 1}.output"
        return BlockRecord(*(self._read(n, rows, device) for n in (h, f"{layer}.attention", f"{layer}.output")))

    def log_probabilities(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(ids (rows, tokens, k), log-probabilities (rows, tokens, k + 1), the last one that of all other tokens)."""
        return self._read("ids", rows, device).long(), self._read("log_probabilities", rows, device)

    def _shard(self, index: int) -> Any:
        if index not in self._open:
            path = shard_path(self.folder, index)
            try:
                self._open[index] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DataError(f"{path}: unreadable teacher targets ({error}); delete it, it is made again") from error
        return self._open[index]

    def _has(self, name: str) -> bool:
        return name in self._shard(0).keys()  # noqa: SIM118 - no mapping

    def _read(self, name: str, rows: Tensor, device: torch.device) -> Tensor:
        size = self.manifest.shard_blocks
        found = []
        for row in rows.tolist():
            if not 0 <= row < self.manifest.blocks:
                raise DataError(f"{ROW}={row}: {self.folder} holds {self.manifest.blocks} blocks")
            found.append(self._shard(row // size).get_slice(name)[row % size])
        return torch.stack(found).to(device)


def shard_path(folder: Path, index: int) -> Path:
    """Returns the path of a shard."""
    return folder / f"shard-{index:05d}.safetensors"


def bytes_per_block(model: ConvertedModel, kind: str, top_k: int, tokens: int) -> int:
    """Returns the bytes on disk of a block of `tokens`, from shapes."""
    if kind == "logits":
        return tokens * (4 * top_k + 4 * (top_k + 1))
    layers = active_layers(model)
    indices = {layer.index for layer in layers}
    apart = layers[0].family.tail is not None  # what a block reads is not what the one below it added up to
    vectors = 2 * len(indices) + sum(apart or index - 1 not in indices for index in indices)
    return int(tokens * vectors * layers[0].shape("up")[0] * model.dtype.itemsize)


def check_teacher_cache(
    folder: str | Path, model: ConvertedModel, kinds: list[str], top_k: int, blocks: int, tokens: int
) -> None:
    """Logs how large the targets will be, and stops before any work where they can't be made.

    Raises:
        DataError: the disk is too small, or there is no folder to write to; `top_k` is not below the vocabulary; what is
            there was made from another base or for other blocks (`teacher_cache` checks the text).
    """
    folder = Path(expanded(folder))
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if "logits" in kinds and not 0 < top_k < vocabulary:
        raise DataError(f"training.teacher_top_k={top_k}: use 1 to {vocabulary - 1}, below the model's vocabulary")
    for kind in kinds:
        if (folder / kind / MANIFEST).is_file():
            _agree(folder / kind, _read_manifest(folder / kind), _wanted(model, kind, top_k), _OF_MODEL)
    there = sum(f.stat().st_size for kind in kinds for f in (folder / kind).glob("shard-*.safetensors"))
    needed = sum(bytes_per_block(model, kind, top_k, tokens) for kind in kinds) * blocks
    logger.info("teacher targets in %s: %s for %d blocks (%s)", folder, human_bytes(needed), blocks, ", ".join(kinds))
    _check_space(folder, needed - there)


def _check_space(folder: Path, needed: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free - RESERVE
    except OSError as error:
        raise DataError(f"paths.teacher_cache={folder}: no folder to write to ({error}); name another") from error
    if needed > free:
        raise DataError(
            f"paths.teacher_cache={folder}: the targets need {human_bytes(needed)} and the disk has "
            f"{human_bytes(max(0, free))} to spare; name a folder on a larger disk, lower data.num_train_samples, or set "
            "it to null"
        )


def teacher_cache(
    folder: str | Path,
    model: ConvertedModel,
    blocks: Any,
    kind: str,
    *,
    top_k: int = 64,
    batch_size: int = 16,
    precision: str = "no",
    progress: bool = False,
) -> TeacherCache:
    """Returns the targets of `blocks`; makes those that are missing. Several processes share the work, and all call it.

    Args:
        folder: holds a folder for each kind. model: a PEFT model with an active NPT adapter. blocks: a dataset of equally
            long blocks. kind: one of `TARGETS`. top_k: of `logits`. precision: what autocast is set to around the call.

    Raises:
        DataError: the targets there were made from something else; the disk is too small.
    """
    place, length = Path(expanded(folder)) / kind, len(blocks[0]["input_ids"])
    per_block = bytes_per_block(model, kind, top_k, length)
    manifest = _agreed(
        place,
        replace(
            _wanted(model, kind, top_k),
            text=text_fingerprint(blocks),
            precision=precision,
            blocks=len(blocks),
            shard_blocks=max(1, SHARD_BYTES // per_block),
        ),
    )
    count = -(-manifest.blocks // manifest.shard_blocks)
    missing = first_does(lambda: [i for i in range(count) if not _is_whole(shard_path(place, i), manifest, i)])
    if missing:
        _check_space(place, len(missing) * manifest.shard_blocks * per_block if len(missing) < count else 0)
    per_shard = -(-min(manifest.shard_blocks, manifest.blocks) // batch_size)
    with progress_bar(f"Teacher targets ({kind})", len(missing), progress and bool(missing), unit="shards") as advance:
        for _, index, counts in share(missing, is_sharded(model)):
            rows = range(index * manifest.shard_blocks, min((index + 1) * manifest.shard_blocks, manifest.blocks))
            batches = list(batches_of(blocks.select(rows), batch_size, device_of(model)))
            parts = [targets(model, batch, kind, top_k) for batch in batches]
            for _ in range(per_shard - len(batches) if is_sharded(model) else 0):
                targets(model, batches[0], kind, top_k)  # a sharded model's forward needs all processes
            if counts:
                _write(shard_path(place, index), {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
            advance(world()[1])
    barrier()
    return TeacherCache(place, manifest)


def _wanted(model: ConvertedModel, kind: str, top_k: int) -> Manifest:
    """The manifest of a run's targets, with the fields that the model alone decides."""
    return Manifest(
        kind=kind,
        base=base_fingerprint(model),
        top_k=top_k if kind == "logits" else None,
        layers=[layer.index for layer in active_layers(model)] if kind == "hidden" else [],
    )


def _agreed(place: Path, wanted: Manifest) -> Manifest:
    """Returns the manifest at `place`; writes the wanted one where there is none."""
    # In this order: other processes write theirs after the manifest.
    path, shards = place / MANIFEST, list(place.glob("shard-*.safetensors"))
    if not path.is_file():
        if shards:
            raise DataError(
                f"{place}: {len(shards)} shard(s) of unknown origin, {MANIFEST} is missing; delete the folder"
            )
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(wanted), indent=2) + "\n"
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), shared=True)
        return wanted
    found = _read_manifest(place)
    _agree(place, found, wanted, tuple(_MEANINGS))
    return found


def _read_manifest(place: Path) -> Manifest:
    path = place / MANIFEST
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not readable ({error}); delete the folder {place}, it is made again") from error


def _agree(place: Path, found: Manifest, wanted: Manifest, keys: tuple[str, ...]) -> None:
    """Raises a DataError where the targets at `place` differ from the wanted ones in one of the keys."""
    differences = [_MEANINGS[key] for key in keys if getattr(found, key) != getattr(wanted, key)]
    if not set(wanted.layers) <= set(found.layers):
        differences.append(f"{blocks_text(found.layers)}, and this run converts {blocks_text(wanted.layers)}")
    if differences:
        raise DataError(
            f"paths.teacher_cache={place.parent}: the targets in {place} were made with {'; '.join(differences)}. "
            f"Name another folder, or delete {place} to make them again"
        )


def _is_whole(path: Path, manifest: Manifest, index: int) -> bool:
    """True for a shard that has all its rows; safetensors checks a file's length as it opens it."""
    if not path.is_file():
        return False
    rows = min(manifest.shard_blocks, manifest.blocks - index * manifest.shard_blocks)
    names = ["ids", "log_probabilities"] if manifest.kind == "logits" else [f"{i}.output" for i in manifest.layers]
    try:
        with safe_open(path, framework="pt") as file:
            return all(file.get_slice(name).get_shape()[0] == rows for name in names)
    except (SafetensorError, OSError) as error:
        logger.warning("%s: unreadable (%s); made again", path, error)
        return False


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        replace_file(path, lambda temporary: save_file(tensors, temporary))
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: can't be written ({error}); make room or name another paths.teacher_cache. What was written before "
            "is whole and will be used"
        ) from error


@torch.no_grad()
def targets(model: ConvertedModel, batch: dict[str, Tensor], kind: str, top_k: int) -> dict[str, Tensor]:
    """Returns the targets of a batch as they are stored, on the CPU: {name: (rows, tokens, ...)}."""
    layers = active_layers(model)
    found: dict[str, Tensor] = {}

    def see(layer: NPTLayer, record: BlockRecord) -> None:
        before = found.get(f"{layer.index - 1}.output")
        hidden, attention, output = (x.to("cpu") for x in (record.hidden_states, record.attention, record.output))
        if before is None or layer.family.tail is not None:
            found[f"{layer.index}.hidden_states"] = hidden
        elif not torch.equal(before, hidden):
            raise DataError(
                f"paths.teacher_cache: the model changes the stream between blocks {layer.index - 1} and {layer.index}, "
                "which the cache does not know; set it to null"
            )
        found[f"{layer.index}.attention"], found[f"{layer.index}.output"] = attention, output

    with eval_mode(model), running_as(layers, Mode.ORIGINAL), watching(layers, see if kind == "hidden" else None):
        hidden = run_backbone(model, batch)
    if kind == "logits":
        rows = [_top(logit_head(model)(row), top_k) for row in hidden]
        found["ids"], found["log_probabilities"] = (torch.stack(part).to("cpu") for part in zip(*rows, strict=True))
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids (tokens, k) int32, log-probabilities (tokens, k + 1)) of (tokens, vocabulary)."""
    log_probabilities = logits.float().log_softmax(-1)
    ids = log_probabilities.topk(k, -1).indices
    return ids.int(), grouped(log_probabilities, ids)


def grouped(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """(..., k + 1): the log-probabilities of `ids` (..., k) and, last, of all other tokens together."""
    others = log_probabilities.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat((log_probabilities.gather(-1, ids), others), -1)


def with_rows(blocks: Any) -> Any:
    """Returns the dataset with a column of each block's place in the cache."""
    return blocks.add_column(ROW, list(range(len(blocks))))
