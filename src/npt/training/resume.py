"""The record in a checkpoint of everything that decided it, and the comparison with the run that goes on from it.

An optimiser's state brings its learning rate with it, calibration is not done again and the schedule counts steps that were
taken, so that a run which goes on with other settings is neither the old run nor a new one, and its report would name settings
it never had. The adapter's own options and its base stand in the checkpoint's adapter_config.json, all else in `RECORD`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import TrainingArguments

from npt.adapters.folder import CONFIG
from npt.common.display import one_line
from npt.common.fingerprint import difference, is_record
from npt.common.options import OPTIONS
from npt.common.precision import matmul_precision
from npt.config import TrainingSection
from npt.errors import CheckpointError
from npt.tuner.config import NPTConfig

logger = logging.getLogger(__name__)

#: The record's file in a checkpoint.
RECORD = "npt_training.json"
_FORMAT = 1
#: Arguments of HF's Trainer that decide a run; not steps, logs and places, nor what only costs time or memory.
_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "seed",
    "data_seed", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha",
    "train_sampling_strategy", "dataloader_drop_last", "average_tokens_across_devices",
)  # fmt: skip
#: Of each block; all that a step reads.
_COLUMNS = ("input_ids", "attention_mask", "labels")
_REMEDY = "a run goes on as it began: set that back, or start a new run without --resume (resume_from_checkpoint)"

Settings = Mapping[str, Any]


def argument_settings(args: TrainingArguments, precision: str, processes: int) -> dict[str, Any]:
    """{name as in a configuration: value} of the arguments that decide a run.

    Args:
        precision: of autocast, "no", "bf16" or "fp16". processes: of the launch.
    """
    values = args.to_dict()
    keys = TrainingSection.model_fields
    found = {f"training.{n}" if n in keys else f"TrainingArguments.{n}": values.get(n) for n in _ARGUMENTS}
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    found["training.batch_size x training.gradient_accumulation_steps x processes"] = step
    products = matmul_precision(args.device)
    return {**found, "optimization.mixed_precision": precision, "torch's precision of matrix products": products}


def differences(there: Settings, here: Settings) -> list[str]:
    """Every setting that both name and that differs, as a phrase with both values."""
    here = json.loads(json.dumps(here, default=str))
    return [
        f"{name} is {_shown(here[name])} here and {_shown(there[name])} in the checkpoint"
        for name in here
        if name in there and there[name] != here[name]
    ]


def _shown(value: Any) -> str:
    return one_line(json.dumps(value, ensure_ascii=False), 100)


def refuse(checkpoint: Path, found: Iterable[str]) -> None:
    """Raises a CheckpointError of one line where there are differences."""
    if lines := list(found):
        raise CheckpointError(f"{checkpoint}: {'; '.join(lines)}; {_REMEDY}")


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The record of a checkpoint; empty where an earlier npt wrote it.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = checkpoint / RECORD
    if not path.is_file():
        return {}
    found = _read_json(path)
    if not isinstance(found, dict) or not all(isinstance(found.get(name, {}), dict) for name in ("settings", "text")):
        raise CheckpointError(f"{path}: not a record of npt's; resume from an earlier checkpoint")
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not readable ({one_line(error, 80)}); resume from an earlier checkpoint"
        ) from error


def new_record(settings: Settings, text: Settings, **more: Any) -> dict[str, Any]:
    """The content of `RECORD`. more: values that are kept and not compared."""
    return {"format": _FORMAT, "settings": dict(settings), "text": dict(text), **more}


# -- the adapter and its base -----------------------------------------------------------------------------------------------


def check_options(checkpoint: Path, options: Settings) -> None:
    """Compares the options of a block, by name, with those of the checkpoint's adapter.

    Raises:
        CheckpointError: one differs.
    """
    refuse(checkpoint, differences(_ordered(_adapter(checkpoint)), _ordered(options)))


def adapter_blocks(checkpoint: Path) -> list[int]:
    """The blocks of the checkpoint's adapter, by index."""
    blocks: Any = _adapter(checkpoint)["npt_layers"]
    return list(blocks)


def check_adapter(checkpoint: Path, config: NPTConfig) -> None:
    """Compares a converted model's adapter and base with the checkpoint's.

    Raises:
        CheckpointError: another option, another base, or the same one in another dtype.
    """
    there = _adapter(checkpoint)
    found = differences(_ordered(there), _ordered({name: getattr(config, name) for name in OPTIONS}))
    made_for: Any = there.get("base_fingerprint")
    here: Any = config.base_fingerprint
    if not is_record(made_for) or not here:
        logger.info("%s: whether it was made with this base is not known, and not compared", checkpoint)
        refuse(checkpoint, found)
        return
    names = config.base_model_name_or_path, there.get("base_model_name_or_path")
    if (other := difference(made_for, here)) is not None:
        found.append(f"model.base_model_name={names[0]} is another base than the checkpoint's ({names[1]}): {other}")
    elif made_for.get("dtype") != here.get("dtype"):
        found += differences({"model.dtype": made_for.get("dtype")}, {"model.dtype": here.get("dtype")})
    refuse(checkpoint, found)


def _adapter(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / CONFIG
    found = _read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object; resume from an earlier checkpoint")
    return {"gain_units": 0, **found}  # a file of format 1 does not name them


def _ordered(options: Settings) -> dict[str, Any]:
    """{"model.<name>": value} of `OPTIONS`, lists in an order of their own: theirs decides nothing."""
    found = {f"model.{name}": options[name] for name in OPTIONS if name in options}
    return {name: sorted(value) if isinstance(value, list | tuple) else value for name, value in found.items()}


# -- the text ----------------------------------------------------------------------------------------------------------------


def text_record(rows: Any) -> dict[str, Any]:
    """{"blocks", "tokens", "digest"} of a data set of blocks, of one length or of several; empty where it has no length.

    Rows that a collator makes tokens of are known by all they hold.
    """
    if not hasattr(rows, "__len__") or not len(rows):
        return {}
    digest, tokens = hashlib.sha256(), 0
    for name, values in _columns(rows):
        tokens += values.size if name == _COLUMNS[0] else 0
        digest.update(f"{name} {values.shape} ".encode() + values.tobytes())
    return {"blocks": len(rows), "tokens": tokens, "digest": digest.hexdigest()[:32]}


def _columns(rows: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of the columns of one row after the other."""
    names = [name for name in _COLUMNS if name in rows[0]]
    if names and isinstance(rows, datasets.Dataset):
        for batch in rows.select_columns(names).with_format("numpy").iter(256):
            for i in range(len(batch[names[0]])):
                yield from ((name, np.ascontiguousarray(batch[name][i], dtype="<i4")) for name in names)
        return
    for row in (rows[i] for i in range(len(rows))):
        yield from ((name, np.asarray(row[name], dtype="<i4")) for name in names)
        if not names:
            yield "row", np.frombuffer(json.dumps(dict(row), sort_keys=True, default=str).encode(), dtype=np.uint8)


#: {part of the text: its name in a message}
_TEXTS = {"train": "the training text", "eval": "the text that chooses the best adapter"}


def check_record(checkpoint: Path, here: dict[str, Any], texts: Sequence[str] = ("train",)) -> None:
    """Compares the record of a training that is to go on with the checkpoint's.

    Args:
        here: of `new_record`. texts: the parts of the text that have to be alike.

    Raises:
        CheckpointError: another setting, another text, or fewer steps than are taken already.
    """
    there, here = read_record(checkpoint), json.loads(json.dumps(here, default=str))
    if not there:
        logger.warning(
            "%s was saved by an earlier npt and does not say with which settings and text; its adapter's options and base "
            "alone are compared",
            checkpoint,
        )
        return
    found = differences(there["settings"], here["settings"])
    if all(there.get(name) == here.get(name) for name in ("steps", "epochs")):
        name = "the objectives' first steps"  # they move with the number of steps
        found += differences({name: there.get("starts")}, {name: here.get("starts")})
    found += steps_missing(there, here["steps"])
    for name in texts:
        parts = there["text"].get(name), here["text"][name]
        if all(parts) and parts[0] != parts[1]:
            named = differences(there.get("text_settings") or {}, here.get("text_settings") or {})
            why = "; ".join(named) or "no setting of it differs, its content does"
            found.append(
                f"{_TEXTS[name]} is another: {_text(parts[1])} here, {_text(parts[0])} in the checkpoint ({why})"
            )
            break
    refuse(checkpoint, found)


def steps_missing(record: Settings, steps: int | None) -> list[str]:
    """One phrase where fewer steps are asked for than are taken already; steps is None or negative for epochs."""
    taken = record.get("step", 0)
    if steps is None or not 0 <= steps < taken:
        return []
    return [f"training.num_train_steps is {steps} here and {taken} steps are taken already"]


def _text(record: Settings) -> str:
    return f"{record.get('blocks')} blocks, {record.get('tokens')} tokens, digest {str(record.get('digest'))[:8]}"
