"""HF Trainer's checkpoints, whole or not there, and without pickle.

A checkpoint-<step> folder is sealed last (`npt.common.files`): a run that was killed while it wrote one resumes from the
one before. Adapter, optimiser, scheduler and random generators are safetensors, whole, in one form for any number of
processes, with DDP or FSDP2 or neither; DeepSpeed keeps a format of its own beside the adapter.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from npt.adapters.weights import adapter_state, load_weights, save_weights
from npt.common.files import SEAL, check_space, disk_errors, is_sealed, seal, write_json
from npt.common.places import place
from npt.common.processes import barrier, first_does, is_first
from npt.common.sharded import full_tensor, is_sharded, like
from npt.data.streaming import StreamedBlocks
from npt.errors import CheckpointError, RunError
from npt.training.overridden import check_overridden
from npt.training.resume import RECORD
from npt.training.state_file import load_state, save_state

logger = logging.getLogger(__name__)

check_overridden(Trainer)

OPTIMIZER, SCALER, RANDOM = "optimizer.safetensors", "scaler.safetensors", "rng_state_{}.safetensors"
STREAM = "stream-{:05d}.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest finished checkpoint; unfinished or damaged ones are named and passed over."""
    for path in sorted(_checkpoints(folder), key=step_of, reverse=True):
        if is_sealed(path):
            return path
        logger.warning("%s was not finished, or its files have changed since; looking for the one before", path)
    return None


def finished_checkpoint(asked: str | Path | bool, folder: Path) -> Path:
    """The checkpoint that `resume_from_checkpoint` asks for: a path, or True for the newest finished one of a folder.

    Raises:
        CheckpointError: it was never finished; there is none.
    """
    found = last_checkpoint(folder) if asked is True else place(str(asked))
    if found is None:
        raise CheckpointError(
            f"{folder}: holds no finished checkpoint; train without resume_from_checkpoint, or name one"
        )
    if not (found / SEAL).is_file():
        raise CheckpointError(f"{found}: no finished checkpoint ({SEAL} is missing); name another, or start anew")
    return found


def step_of(checkpoint: Path) -> int:
    """12 of checkpoint-12."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.is_dir() and re.fullmatch(r".*-\d+", p.name)]


class DurableTrainer(Trainer):
    """HF Trainer with these checkpoints. `npt.training.overridden` lists the methods it overrides, and why."""

    _parameters: list[list[Any]] | None = None

    @property
    def is_streamed(self) -> bool:
        """True where the text is read during training (`npt.data.streaming`)."""
        return isinstance(self.train_dataset, StreamedBlocks)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """HF's loader, or a plain one for streamed text, which is split by process already and keeps its own place."""
        if not self.is_streamed:
            return super().get_train_dataloader()
        self.args.ignore_data_skip = True
        return DataLoader(self.train_dataset, batch_size=self._train_batch_size, collate_fn=self.data_collator)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        needed, limit = self._checkpoint_bytes(), self.args.save_total_limit

        def make_room() -> None:
            check_space(folder, needed, folder.name)
            if folder.exists():
                shutil.rmtree(folder)  # what a killed run left

        first_does(make_room)
        try:
            self.args.save_total_limit = None  # an older checkpoint goes only once this one is whole
            with disk_errors(folder, needed):
                super()._save_checkpoint(model, trial)
                barrier()
                first_does(lambda: self._finish(folder))
        except RunError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        first_does(lambda: self._remove_old(folder))

    def _finish(self, folder: Path) -> None:
        """Writes the record of what decided the checkpoint, and seals it."""
        if record := self.training_record():
            write_json(folder / RECORD, record)
        seal(folder)

    def training_record(self) -> dict[str, Any]:
        """The content of `npt.training.resume.RECORD`; empty for none."""
        return {}

    def _checkpoint_bytes(self) -> int:
        """The bytes of the weights and two moments of all that is trained, and 1 MiB for the rest."""
        return 2**20 + sum(3 * p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def _remove_old(self, newest: Path) -> None:
        """Removes checkpoints beyond save_total_limit, and unfinished ones of killed runs older than the newest one."""
        old = sorted((p for p in _checkpoints(newest.parent) if step_of(p) < step_of(newest)), key=step_of)
        whole = [p for p in old if (p / SEAL).is_file()]
        kept = whole if self.args.save_total_limit is None else whole[len(whole) - self.args.save_total_limit + 1 :]
        for path in set(old) - set(kept):
            (path / SEAL).unlink(missing_ok=True)  # first, so that a half-deleted one is no checkpoint
            shutil.rmtree(path)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """HF's optimiser. Remembers its parameters where the model is sharded already."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        self._parameters = (
            [list(group["params"]) for group in optimizer.param_groups] if is_sharded(self.model) else None
        )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """HF's scheduler; gives the optimiser its parameters back first.

        accelerate has prepared the optimiser by now. It finds a sharded parameter by the address of its part, which an
        empty part does not have.
        """
        if self._parameters is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._parameters, strict=True):
                group["params"] = parameters
        return super().create_scheduler(num_training_steps, optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter, whole, from the first process. HF's would gather the base too, and pickle the arguments."""
        model: Any = self.accelerator.unwrap_model(self.model)
        state = adapter_state(model)
        if is_first():
            save_weights(model, output_dir or str(self.args.output_dir), state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = tree_map_only(DTensor, full_tensor, self.optimizer.state_dict())
        if self.args.should_save:
            state = {"optimizer": optimizer, "scheduler": self.lr_scheduler.state_dict()}
            save_state(Path(output_dir) / OPTIMIZER, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.is_streamed:
            self._load_streams(Path(checkpoint))
        state = load_state(Path(checkpoint) / OPTIMIZER)
        self._spread(state["optimizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def _spread(self, state: dict[str, Any]) -> None:
        """Cuts an optimiser's moments into shards, each as its parameter is cut."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            own = state["state"].get(number, {})
            for name, value in own.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    own[name] = like(value, parameter)

    def _save_streams(self, folder: Path) -> None:
        """Writes the place of each of this process's streams, a file each."""
        for number, state in self.train_dataset.state_dict().items():
            write_json(folder / STREAM.format(number), state)

    def _load_streams(self, checkpoint: Path) -> None:
        paths = sorted(checkpoint.glob(STREAM.replace("{:05d}", "*")))
        if not paths:
            raise CheckpointError(f"{checkpoint}: was saved without data.streaming; resume it without, or start anew")
        states = {int(path.stem.rpartition("-")[2]): json.loads(path.read_text(encoding="utf-8")) for path in paths}
        self.train_dataset.load_state_dict(states)

    def _save_scaler(self, output_dir: str) -> None:
        if self.args.should_save and self.accelerator.scaler is not None:
            save_state(Path(output_dir) / SCALER, self.accelerator.scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "") / SCALER
        if checkpoint is not None and self.accelerator.scaler is not None and path.is_file():
            self.accelerator.scaler.load_state_dict(load_state(path))

    def _save_rng_state(self, output_dir: str) -> None:
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.random.get_rng_state()
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        if self.is_streamed:
            self._save_streams(Path(output_dir))
        save_state(Path(output_dir) / RANDOM.format(self.args.process_index), state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / RANDOM.format(self.args.process_index)
        if not path.is_file():
            logger.warning("%s is missing: resumed on more processes than before, with other random numbers", path)
            return
        state = load_state(path)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.random.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and "cuda" in state:
            torch.cuda.random.set_rng_state(state["cuda"])
