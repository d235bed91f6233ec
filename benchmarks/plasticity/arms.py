"""One `npt finetune` run on a task, with LoRA and DoRA beside, and what each adapter answers to held-out prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from benchmarks.plasticity.tasks import Example, examples, right
from npt import load_base
from npt.adapters.folder import load_adapter
from npt.editing.absorbing.dialogue import Dialogue
from npt.editing.answers import continued
from npt.runs.finetune import run_finetuning
from npt.runs.finetune_settings import finetune_settings
from npt.tuner.converted import vocabulary_size

ARMS = ("npt", "lora", "dora")
#: Of a base that has no chat template of its own.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
#: The longest answer, in tokens, and prompts that an adapter is asked.
ANSWER, ASKED = 48, 200


@dataclass(frozen=True)
class Size:
    """How long a run is. steps, batch: of training. examples: that it may read. length: of a block. rank: NPT's."""

    steps: int = 300
    batch: int = 4
    examples: int = 4000
    length: int = 512
    rank: int = 8


def base_with_template(model: str, folder: Path) -> str:
    """The base's name, or a copy of its folder with `TEMPLATE` where its tokenizer has no chat template.

    Args:
        model: as --model gives it.
        folder: where a copy is made.
    """
    base, tokenizer = load_base(model)
    if tokenizer.chat_template:
        return model
    target = folder / "base"
    if not target.is_dir():
        base.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return str(target)


def measure(
    base: str,
    task: str,
    seed: int,
    part: str,
    rates: Mapping[str, float],
    size: Size,
    form: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """{arm: figures} of one run: held-out loss of the answers' tokens, damage on general text, which answers are right.

    Args:
        base: its name or folder, with a chat template.
        task: a name of `npt`'s tasks.
        seed: of examples, weights and batches.
        part: whose prompts are asked: development or test.
        rates: {arm: learning rate}.
        size: of the run.
        form: further settings of the run, KEY=VALUE.
        folder: is filled with the run's files, and emptied before.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    asked = examples(task, seed, part, ASKED)
    write_chats(folder / "chats.jsonl", examples(task, seed, "train", size.examples))
    report = run_finetuning(finetune_settings(None, settings(base, seed, rates, size, form, folder)))
    found = {}
    for arm in ARMS:
        figures = report["methods"][arm]["figures"]
        (general,) = [name for name in figures if name != "text"]
        found[arm] = {
            "rate": rates[arm],
            "trained": report["methods"][arm]["trained_parameters"],
            "seconds": report["methods"][arm]["seconds"],
            "loss": figures["text"]["loss"],
            "base_loss": report["methods"]["base"]["figures"]["text"]["loss"],
            "kl": figures[general]["mean_kl"],
            "right": answered(base, arm, folder, task, asked),
        }
    return found


def settings(
    base: str, seed: int, rates: Mapping[str, float], size: Size, form: Sequence[str], folder: Path
) -> list[str]:
    """The run's settings, KEY=VALUE.

    Held-out text is the end of the file, whose prompts stand there once. Its few digits and
    words repeat those of training text.
    """
    values = {
        "model.base_model_name": base, "model.rank": size.rank, "model.npt_layers": "all",
        "data.data_files": f"[{folder}/chats.jsonl]",
        "data.score": "replies", "data.max_length": size.length, "data.num_eval_samples": 32, "data.score_seen_text": "true",
        "training.batch_size": size.batch, "training.num_train_steps": size.steps, "training.seed": seed,
        "training.learning_rate": rates["npt"], "training.eval_steps": size.steps, "training.save_steps": size.steps,
        "training.logging_steps": size.steps, "training.prediction_logging_steps": size.steps,
        "finetuning.compare": "[lora,dora]",
        "finetuning.compare_learning_rates": f"[{rates['lora']},{rates['dora']}]",
        "paths.output_dir": folder / "outputs", "paths.checkpoint_dir": folder / "checkpoints",
    }  # fmt: skip
    return [*(f"{name}={value}" for name, value in values.items()), *form]


def write_chats(path: Path, some: Sequence[Example]) -> None:
    """Writes examples as chats of two messages, a line each."""
    rows = (
        {"messages": [{"role": "user", "content": one.prompt}, {"role": "assistant", "content": one.answer}]}
        for one in some
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answered(base: str, arm: str, folder: Path, task: str, asked: Sequence[Example]) -> list[int]:
    """1 for every prompt that an arm's adapter answers right, greedily.

    Args:
        base: its name or folder.
        arm: npt, lora or dora.
        folder: of the run.
        task: the task.
        asked: the prompts.
    """
    model, tokenizer = load_base(base)
    best = folder / "checkpoints" / ("" if arm == "npt" else arm) / "best_model"
    adapted: Any = load_adapter(model, best) if arm == "npt" else PeftModel.from_pretrained(model, best)
    dialogue = Dialogue(tokenizer, model.config, vocabulary_size(model), "chat")
    prompts = [dialogue.prompt(None, one.prompt) for one in asked]
    written = continued(
        adapted, tokenizer, prompts, [ANSWER] * len(prompts), over=lambda ids: "\n" in dialogue.text(ids[-1:])
    )
    return [int(right(task, dialogue.text(ids), one.answer)) for ids, one in zip(written, asked, strict=True)]
