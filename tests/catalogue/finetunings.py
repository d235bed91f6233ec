"""Fine-tunings: configurations that start from nothing usable, contradict themselves or are another command's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.catalogue.entries import Entry, Kit, json_of, sets

TEXT = ("data.dataset_name=text", "data.data_files=[a.txt]", "model.base_model_name={model}")
FILES = {"a.txt": b"Some text.\n" * 80}


def bad(name: str, *words: str, given: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> Entry:
    """A fine-tuning on a good text with other settings and options."""
    return Entry(f"finetune: {name}", ("finetune", *sets(*TEXT, *given), *more), words, FILES)


def bad_start(name: str, changes: dict[str, object], *words: str) -> Entry:
    """A fine-tuning from a copy of the adapter with other values in its configuration."""

    def prepare(folder: Path, kit: Kit) -> None:
        shutil.copytree(kit.adapter, folder / "adapter")
        json_of("adapter_config.json", **changes)(folder / "adapter")

    arguments = ("finetune", *sets(*TEXT, "finetuning.adapter=adapter"))
    return Entry(f"finetune: {name}", arguments, words, FILES, prepare=prepare)


def _chat(*roles: str) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": "hello"} for role in roles]}).encode() + b"\n"


FINETUNINGS = [
    Entry("finetune: no text", ("finetune",), ("data.dataset_name", "needs files", "set data.data_files=[FILE, ...]")),
    Entry(
        "finetune: the original's own text",
        ("finetune", *sets("data.dataset_name=self", "data.num_train_samples=9")),
        ("data.dataset_name=self", "nothing new to learn", "data.data_files"),
    ),
    bad(
        "a gain that is no start", "model.gain=state", "does not start as the original", "finetuning.adapter",
        given=("model.gain=state",),
    ),
    bad("no low-rank part", "model.rank=0", "use a rank above 0", given=("model.rank=0",)),
    bad("exact", "model.carry=exact", "does not start as the original", given=("model.carry=exact",)),
    bad(
        "a projection is missing", "model.target_projections: without down", "use [gate, up, down]",
        given=("model.target_projections=[gate, up]",),
    ),
    bad(
        "every problem at once", "model.rank=0", "training.num_train_steps=0: trains nothing", "training.objective=local",
        given=("model.rank=0", "training.num_train_steps=0", "training.objective=local"),
    ),
    bad("a teacher cache", "paths.teacher_cache=t: is for `npt train`", given=("paths.teacher_cache=t",)),
    bad("calibration text", "data.calibration_files: nothing is calibrated", given=("data.calibration_files=[a.txt]",)),
    bad("an adapter that is not there", "checkpoint nowhere: no adapter folder there", given=("finetuning.adapter=nowhere",)),
    bad(
        "another rank than the adapter's", "model.rank=4: the adapter in finetuning.adapter=", "has 3; take it out",
        given=("finetuning.adapter={adapter}", "model.rank=4"),
    ),
    bad_start("an adapter of another method", {"peft_type": "LORA"}, "it is a LORA adapter, not NPT"),
    bad_start("an adapter without a low-rank part", {"rank": 0}, "finetuning.adapter=adapter: has no low-rank part"),
    bad_start("an adapter that is exact", {"carry": "exact"}, "finetuning.adapter=adapter: has no low-rank part"),
    bad("an unknown method", "finetuning.compare", "use 'lora' or 'dora'", more=("--compare", "ia3")),
    bad("a method twice", "finetuning.compare", "names an entry twice", more=("--compare", "lora,lora")),
    bad("a method that is no list", "finetuning.compare", "use a list", given=("finetuning.compare=3",)),
    bad("an anchor below zero", "finetuning.anchor_weight: -1", "0 or more", given=("finetuning.anchor_weight=-1",)),
    bad("one learning rate for two methods", "finetuning.compare_learning_rates: names 1 for 2 methods", "one for each",
        given=("finetuning.compare=[lora,dora]", "finetuning.compare_learning_rates=[0.01]")),
    bad("an anchor without blocks", "finetuning.num_anchor_samples: 0", "1 or more",
        given=("finetuning.num_anchor_samples=0",)),
    bad(
        "an anchor beside a stream", "finetuning.anchor_weight: goes with the blocks of a fixed text",
        given=("finetuning.anchor_weight=1", "data.streaming=true", "training.num_train_steps=2"),
    ),
    bad(
        "methods of a sharded base", "finetuning.compare: other methods are trained whole", "optimization.fsdp=false",
        given=("optimization.fsdp=true",), more=("--compare", "lora"),
    ),
    bad("a dry run that goes on", "--dry-run --resume", "leave one of the two out", more=("--dry-run", "--resume")),
    bad("a planned launch", "--processes 2: goes with --dry-run", "torchrun or accelerate", more=("--processes", "2")),
    bad("nothing to go on with", "holds no checkpoint to resume", more=("--resume",)),
    Entry("finetune: too little text", ("finetune", *sets(*TEXT, "data.max_length=64")), ("1 block", "give more text"),
          {"a.txt": b"Some text."}),
    Entry(
        "finetune: chats without a reply",
        ("finetune", *sets("data.dataset_name=text", "data.data_files=[a.jsonl]", "data.score=replies",
                           "model.base_model_name=base")),
        ("the chats hold no reply", "data.score=replies", "use data.score=all"),
        {"a.jsonl": _chat("user") * 20},
        prepare=lambda folder, kit: _with_template(folder, kit),
    ),
    Entry(
        "finetune: another command's keys",
        ("train", *sets("finetuning.anchor_weight=1")),
        ("finetuning.anchor_weight=1.0: is for `npt finetune`; take it out",),
    ),
]  # fmt: skip


def _with_template(folder: Path, kit: Kit) -> None:
    """A copy of the model with a chat template."""
    shutil.copytree(kit.model, folder / "base")
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "base" / "chat_template.jinja").write_text(lines + "{% if add_generation_prompt %}assistant: {% endif %}")
