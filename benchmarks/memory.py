"""The plan of `npt memory` beside the peak of a real run: python -m benchmarks.memory

For each shape a random checkpoint is written and `npt train` run on it in a process of its own, for a few steps. Measured
is the process's peak resident size (Linux) above what it had after its imports. Writes benchmarks/results/memory.json and
the table in MEMORY_OPTIMIZATION.md. None of these shapes took part in choosing `npt.planning.plan.OVERHEAD`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

from npt.builtin import source_of
from npt.common.display import markdown
from npt.config import load_config
from scripts.marked import write_section

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
MIB = 2**20

GPT2_SHAPE = GPT2Config(vocab_size=16000, n_embd=768, n_layer=8, n_head=12, n_positions=1024, eos_token_id=0)
LLAMA_SHAPE = LlamaConfig(
    vocab_size=8000, hidden_size=1280, intermediate_size=3456, num_hidden_layers=10, num_attention_heads=20,
    num_key_value_heads=4, max_position_embeddings=2048,
)  # fmt: skip
QWEN_SHAPE = Qwen2Config(
    vocab_size=24000, hidden_size=640, intermediate_size=2560, num_hidden_layers=12, num_attention_heads=10,
    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip
SHORT = [
    "data.num_train_samples=24", "data.num_eval_samples=8", "data.num_calibration_samples=16", "data.eval_texts=[]",
    "training.num_train_steps=3", "training.batch_size=4",
]  # fmt: skip
#: (label, shape, overrides)
RUNS: list[tuple[str, Any, list[str]]] = [
    ("GPT-2, d 768, 8 blocks, vocabulary 16,000, `logits`", GPT2_SHAPE, []),
    ("Llama, d 1280, 10 blocks, vocabulary 8,000, `local`", LLAMA_SHAPE, ["training.objective=local"]),
    ("Qwen 2, d 640, 12 blocks, vocabulary 24,000, `logits`", QWEN_SHAPE, []),
    ("the last one, gradient checkpointing", QWEN_SHAPE, ["training.gradient_checkpointing=true"]),
    ("the last but one, bfloat16", QWEN_SHAPE, ["model.dtype=bfloat16"]),
    (
        "the same, batch 1 with 4 accumulation steps",
        QWEN_SHAPE,
        ["training.batch_size=1", "training.gradient_accumulation_steps=4"],
    ),
    ("the same, `local`", QWEN_SHAPE, ["training.objective=local"]),
    ("the same, 8-bit base", QWEN_SHAPE, ["training.objective=local", "optimization.use_8bit=true"]),
    ("the same, 4-bit base", QWEN_SHAPE, ["training.objective=local", "optimization.use_4bit=true"]),
]

CHILD = """
import json, re, sys, time
import npt.cli, npt.runs.train, transformers
from npt.config import load_config
from transformers import AutoConfig, AutoModelForCausalLM

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

config = load_config(None, sys.argv[2:])
AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(config.model.base_model_name))]  # its import
before, steps = status("VmRSS"), []
original = npt.runs.train.EquivalenceTrainer.training_step

def step(self, *args, **kwargs):
    start = time.perf_counter()
    try:
        return original(self, *args, **kwargs)
    finally:
        steps.append(time.perf_counter() - start)

npt.runs.train.EquivalenceTrainer.training_step = step
npt.runs.train.run_training(config)
found = {"peak": status("VmHWM") - before, "seconds": sorted(steps)[len(steps) // 2] if steps else None}
open(sys.argv[1], "w").write(json.dumps(found))
"""


def measure(shape: Any, overrides: list[str]) -> dict[str, float]:
    """{"measured", "predicted" bytes; "seconds", "predicted_seconds" of a micro-batch} of one run."""
    import torch

    from npt.planning.devices import machine_speed
    from npt.planning.plan import plan_run

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape).save_pretrained(f"{folder}/model")
        AutoTokenizer.from_pretrained(source_of("builtin:tiny")).save_pretrained(f"{folder}/model")
        names = {"output_dir": "outputs", "checkpoint_dir": "checkpoints"}
        paths = [f"paths.{key}={folder}/{name}" for key, name in names.items()]
        settings = [f"model.base_model_name={folder}/model", *paths, *SHORT, *overrides]
        config = load_config(None, settings)
        plan = plan_run(config)
        dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
        seconds = plan.step_seconds(*machine_speed(torch.device("cpu"), dtype))
        subprocess.run([sys.executable, "-c", CHILD, f"{folder}/found.json", *settings], check=True)
        found = json.loads(Path(f"{folder}/found.json").read_text())
    return {
        "measured": found["peak"],
        "predicted": plan.peak,
        "seconds": found["seconds"],
        "predicted_seconds": seconds,
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """The markdown table."""
    head = ["run", "measured peak", "predicted", "difference", "step, measured", "predicted"]
    rows = [
        [
            label,
            f"{r['measured'] / MIB:,.0f} MiB",
            f"{r['predicted'] / MIB:,.0f} MiB",
            f"{100 * (r['predicted'] / r['measured'] - 1):+.0f} %",
            f"{r['seconds']:.2f} s",
            f"{r['predicted_seconds']:.2f} s",
        ]
        for label, r in results.items()
    ]
    return markdown(head, rows)


def main() -> None:
    """Measures every run, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run only those whose label contains this; the others are kept")
    only = parser.parse_args().only
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for label, shape, overrides in RUNS:
        if only in label:
            results[label] = measure(shape, overrides)
            print(label, results[label], flush=True)
            results = {name: results[name] for name, _, _ in RUNS if name in results}
            RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            write_section("MEMORY_OPTIMIZATION.md", "memory", table(results))


if __name__ == "__main__":
    main()
