"""HF Trainer's checkpoints, whole or not there, and without pickle.

A checkpoint-<step> folder is sealed last (`npt.durable`): a run that was killed while it wrote one resumes from the
one before. Optimiser, scheduler and random generators are safetensors; under DeepSpeed and FSDP those engines keep their
own formats.
"""

from __future__ import annotations

import logging
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from npt.durable import SEAL, check_space, disk_errors, is_sealed, seal
from npt.errors import RunError
from npt.state import load_state, save_state

logger = logging.getLogger(__name__)

OPTIMIZER, SCALER, RANDOM = "optimizer.safetensors", "scaler.safetensors", "rng_state_{}.safetensors"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest finished checkpoint; unfinished or damaged ones are named and passed over."""
    for path in sorted(_checkpoints(folder), key=step_of, reverse=True):
        if is_sealed(path):
            return path
        logger.warning("%s was not finished, or its files have changed since; looking for the one before", path)
    return None


def step_of(checkpoint: Path) -> int:
    """12 of checkpoint-12."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.is_dir() and re.fullmatch(r".*-\d+", p.name)]


def save_weights(model: Any, folder: str, **kwargs: Any) -> None:
    """`save_pretrained` of an adapter; PEFT would ask the hub whether the vocabulary was resized, which npt never does."""
    model.save_pretrained(folder, save_embedding_layers=False, **kwargs)


class DurableTrainer(Trainer):
    """HF Trainer with such checkpoints."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        needed, limit = self._checkpoint_bytes(), self.args.save_total_limit
        if self.args.should_save:
            check_space(folder, needed, folder.name)
            if folder.exists():
                shutil.rmtree(folder)  # what a killed run left
        self.accelerator.wait_for_everyone()
        try:
            self.args.save_total_limit = None  # an older checkpoint goes only once this one is whole
            with disk_errors(folder, needed):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seal(folder)
        except RunError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            self._remove_old(folder)

    def _checkpoint_bytes(self) -> int:
        """Weights and two moments of everything that is trained, and a little for the rest."""
        return 2**20 + sum(3 * p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def _remove_old(self, newest: Path) -> None:
        """Checkpoints beyond save_total_limit, and what killed runs left unfinished before the newest one."""
        old = sorted((p for p in _checkpoints(newest.parent) if step_of(p) < step_of(newest)), key=step_of)
        whole = [p for p in old if (p / SEAL).is_file()]
        kept = whole if self.args.save_total_limit is None else whole[len(whole) - self.args.save_total_limit + 1 :]
        for path in set(old) - set(kept):
            (path / SEAL).unlink(missing_ok=True)  # first, so that a half-deleted one is no checkpoint
            shutil.rmtree(path)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter. HF's would also pickle the arguments, which config.yaml holds."""
        if self.args.should_save:
            model: Any = self.accelerator.unwrap_model(self.model)
            save_weights(model, output_dir or self.args.output_dir, state_dict=state_dict)

    @property
    def _engine_saves(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._engine_saves:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}
            save_state(Path(output_dir) / OPTIMIZER, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._engine_saves:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            state = load_state(Path(checkpoint) / OPTIMIZER)
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])

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
