"""One run by several processes, which fork from one that has the libraries imported: python -m tests.distributed_worker
SPECS COUNT PORT. Each gets the variables that torchrun sets.

SPECS is a JSON list of objects, see `Spec`; what the first process leaves in a spec's folder is compared between launches.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from npt import EquivalenceTrainer, NPTConfig, Objective, calibrate
from npt.adapters.weights import adapter_state
from npt.common.processes import is_first, world
from npt.common.sharded import is_sharded, through
from npt.data import pack_token_ids
from npt.data.batches import batches_of
from npt.data.streaming import BlockStream, DocumentStream, StreamedBlocks, local_source
from npt.runs.arguments import FSDP_ARGUMENTS
from npt.runs.processes import shard_base, start_processes
from npt.training.callbacks import BestAdapterCallback, JsonLinesCallback
from tests.helpers import REPOSITORY, Letters, random_base
from tests.mixtures import MIXTURES, named


@dataclass
class Spec:
    """model: "llama", "gpt2", the type of a mixture or a folder. batch: blocks of a step of all processes and accumulated
    batches. sharded: FSDP2, before calibration (`early`) or as Trainer does it (`late`). kill: the step after which each
    process kills itself. arguments: more of TrainingArguments.
    """

    folder: str
    model: str = "llama"
    dtype: str = "float64"
    objective: str = "logits"
    options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    sharded: str = ""
    steps: int = 20
    batch: int = 8
    accumulation: int = 1
    calibrate: bool = False
    chunk_tokens: int | None = None
    resume: bool = False
    kill: int = 0
    vocabulary: int = 96
    teacher: bool = False
    stream: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


class _Recorded(DocumentStream):
    """Keeps which documents were taken."""

    def advance(self) -> None:
        taken.setdefault(self.place[0], []).append(self.upcoming()[0])
        super().advance()


#: {stream: the documents it gave in the run of a spec}, for `write_taken`.
taken: dict[int, list[str]] = {}


def write_taken(folder: Path, name: str) -> None:
    (folder / f"{name}-{world()[0]}.json").write_text(json.dumps(taken))


class _Kill(TrainerCallback):
    def __init__(self, step: int, folder: Path):
        self.step, self.folder = step, folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            write_taken(self.folder, "killed")
            os.kill(os.getpid(), signal.SIGKILL)


def blocks(count: int, seed: int, vocabulary: int) -> Any:
    """Random text in documents of several lengths, so that batches differ in how many tokens count."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (count,), generator=generator).tolist()
    ids = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return pack_token_ids(ids * 3, 16, pad_token_id=0, max_blocks=count)


def build(spec: Spec) -> Any:
    """The converted model."""
    dtype = getattr(torch, spec.dtype)
    if spec.model in ("llama", "gpt2"):
        base = random_base(spec.model, dtype)
    elif spec.model in {mixture.name for mixture in MIXTURES}:
        base = named(spec.model).build(dtype)
    else:
        base = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype).eval()
    torch.manual_seed(0)
    return get_peft_model(base, NPTConfig(**{"npt_layers": [1, 3], "rank": 3, "gain_units": 16, **spec.options}))


def streamed(spec: Spec) -> StreamedBlocks | None:
    """The training text from files, where the spec names some."""
    if not spec.stream:
        return None
    source = local_source([spec.stream], "text")

    def make(place: tuple[int, int]) -> BlockStream:
        return BlockStream(_Recorded(source, place, seed=0, window=16), Letters(), 16)

    return StreamedBlocks(make, world())


def run(spec: Spec) -> None:
    """Converts, calibrates, trains, and writes what came out."""
    taken.clear()
    folder = Path(spec.folder)
    split = spec.batch // spec.accumulation // int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"), per_device_train_batch_size=split, per_device_eval_batch_size=4,
        gradient_accumulation_steps=spec.accumulation, max_steps=spec.steps, learning_rate=5e-3, logging_steps=1,
        save_steps=10, eval_strategy="steps", eval_steps=10, report_to=[], disable_tqdm=True, use_cpu=True, seed=1,
        **(FSDP_ARGUMENTS if spec.sharded else {}), **spec.arguments,
    )  # fmt: skip
    start_processes(args)
    model = build(spec)
    if spec.sharded == "early":
        shard_base(model, args)
    text, held_out = blocks(160, 0, spec.vocabulary), blocks(10, 9, spec.vocabulary)
    if spec.calibrate and not spec.resume:
        batches = list(batches_of(text.select(range(52)), 4, torch.device("cpu")))
        figures = through(model, lambda: calibrate(model, batches, chunk_tokens=spec.chunk_tokens))
        fitted = adapter_state(model)
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "calibration.json").write_text(json.dumps(figures))
            save_file({n: p.contiguous() for n, p in fitted.items()}, folder / "calibrated.safetensors")
    if spec.steps:
        trainer = EquivalenceTrainer(
            model, args, Objective(spec.objective, **spec.weights), train_dataset=streamed(spec) or text,
            eval_dataset=held_out,
            teacher_cache=folder / "teacher" if spec.teacher else None,
            callbacks=[
                JsonLinesCallback(folder / "metrics.jsonl"), BestAdapterCallback(folder / "best_model", model),
                *([_Kill(spec.kill, folder)] if spec.kill else []),
            ],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=True if spec.resume else None)
        model = trainer.model
        write_taken(folder, "taken")
    ids = torch.arange(3, 3 + 24)[None]
    with torch.no_grad():
        logits = through(model, lambda: model.get_base_model()(input_ids=ids, use_cache=False).logits)
    state = adapter_state(model)
    if is_first():
        save_file({n: p.contiguous() for n, p in state.items()}, folder / "adapter.safetensors")
        save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
        (folder / "world.json").write_text(json.dumps({"world": world()[1], "sharded": is_sharded(model)}))


def work(count: int, specs: list[dict[str, Any]], *, check: bool = True) -> None:
    """Runs specs in this process, or in `count` others."""
    if count == 1:
        for spec in specs:
            run(Spec(**spec))
        return
    command = [sys.executable, "-m", "tests.distributed_worker", json.dumps(specs), str(count), free_port()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400, env=environment)
    assert not check or done.returncode == 0, done.stderr[-4000:]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def process(rank: int, count: int, port: str, specs: list[dict[str, Any]]) -> int:
    """The id of a new process that runs the specs as one of `count` and ends with status 0, or 1 after an error."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        size, place = str(count), str(rank)
        os.environ.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, RANK=place, LOCAL_RANK=place)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for spec in specs:
            run(Spec(**spec))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> int:
    """Starts the processes and waits for all; where one fails, the others are killed."""
    torch.set_num_threads(1)
    specs, count, port = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    left = {process(rank, count, port, specs) for rank in range(count)}
    failed = False
    while left:
        done, status = os.wait()
        left.discard(done)
        failed |= bool(status)
        if status and not os.WIFSIGNALED(status):  # after a kill that a spec asked for, the others kill themselves
            for pid in left:
                os.kill(pid, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
