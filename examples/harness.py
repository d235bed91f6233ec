"""Scores an adapter and its original with lm-evaluation-harness.

pip install 'neuroplastic[lm-eval]', then python examples/harness.py
"""

import json
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from peft import get_peft_model

import npt
import npt.integrations.lm_eval  # the harness's model type "npt"
from npt.data import sample_blocks

MODEL = "builtin:tiny"  # or "builtin:smollm2-135m", a hub id, a local folder
FOLDER = Path("outputs/harness")
# A task of one's own needs no network. Or ["hellaswag"], with TaskManager() for the harness's own list.
THINGS = ["ball", "cat", "box", "car", "hat"]
ROWS = [
    {"text": f"{name} had a {thing}. {name} liked to play with the", "options": THINGS, "answer": THINGS.index(thing)}
    for name in ("Lily", "Tom", "Ben", "Mia")
    for thing in THINGS
]
TASK = {
    "task": "toys", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(FOLDER / "toys.jsonl")}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{text}}",
    "doc_to_choice": "{{options}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
TASKS, MANAGER = [TASK], TaskManager(include_defaults=False)

FOLDER.mkdir(parents=True, exist_ok=True)
(FOLDER / "toys.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))

base, tokenizer = npt.load_base(MODEL)
model = get_peft_model(base, npt.NPTConfig(npt_layers="upper_half", rank=16))
npt.calibrate(model, sample_blocks(base, tokenizer, num_blocks=32, max_length=128, seed=0, progress=False))
model.save_pretrained(FOLDER / "adapter")

# `npt lm-eval --model_args peft=FOLDER --tasks ...` does the same from a shell.
for name, arguments in {"original": {"pretrained": MODEL}, "NPT": {"peft": str(FOLDER / "adapter")}}.items():
    found = lm_eval.simple_evaluate("npt", arguments, tasks=TASKS, task_manager=MANAGER, batch_size=8)
    for task, figures in found["results"].items():
        print(f"{name}: {task}, accuracy {figures['acc,none']:.3f}")
