"""Speed and memory beside the frozen base and PEFT LoRA, in one process, interleaved: python -m benchmarks.speed

Every figure is a median over rounds in which each contender runs once, in turn, so that a machine that slows down slows all
of them; "±" is half the distance between the quartiles. Writes benchmarks/results/speed-<name>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from npt import NPTConfig, calibrate
from npt.memory import AllocationCounter
from npt.objectives import Objective, update_scales
from npt.tuner import run_backbone

RESULTS = Path(__file__).resolve().parent / "results"
RANK = 16


def build(vocabulary: int, hidden: int = 1024, layers: int = 8, intermediate: int = 2816) -> dict[str, Any]:
    """{"base", "npt", "lora"}: one random Llama-shaped model three times, adapters of one rank on the upper half's MLPs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=4096,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    npt = get_peft_model(copy.deepcopy(base), NPTConfig(rank=RANK))
    upper = [f"model.layers.{i}.mlp.{name}_proj" for i in range(layers // 2, layers) for name in ("gate", "up", "down")]
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=RANK, target_modules=upper, lora_dropout=0.0))
    return {"base": base, "npt": npt.eval(), "lora": lora.eval()}


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """{name: {"seconds", "spread"}}; one round before the first is thrown away."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            contenders[name]()
            if number:
                times[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": float(np.median(values)),
            "spread": float(np.subtract(*np.percentile(values, [75, 25])) / 2),
        }
        for name, values in times.items()
    }


def forward(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """A forward without gradient, logits included."""

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    return run


def decode(model: Any, ids: torch.Tensor, steps: int) -> Callable[[], Any]:
    """`steps` tokens, one at a time, on the cache of ids."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    def run() -> None:
        with torch.no_grad():
            past = copy.deepcopy(cache)
            for _ in range(steps):
                model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)

    return run


def npt_step(model: Any, ids: torch.Tensor, objective: str) -> Callable[[], Any]:
    """One optimiser step of an objective."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    loss = Objective(objective, scales=update_scales(model, batch))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def run() -> None:
        loss(model, batch, ids[:, 1:].numel()).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def lora_step(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """One optimiser step of LoRA on the language-model loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def calibration(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Calibration over ids, in batches of 4."""
    return lambda: calibrate(model, [{"input_ids": part} for part in ids.split(4)])


def backbone(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """The frozen forward over ids, in batches of 4, without the language-model head."""

    def run() -> None:
        with torch.no_grad():
            for part in ids.split(4):
                run_backbone(model, {"input_ids": part})

    return run


def peak(run: Callable[[], Any]) -> int:
    """Bytes alive at once above what was there before, counted in allocations."""
    run()
    with AllocationCounter() as counter:
        run()
    return counter.peak


def ratios(times: dict[str, dict[str, float]], reference: str) -> dict[str, float]:
    """Each contender's seconds over the reference's."""
    return {name: entry["seconds"] / times[reference]["seconds"] for name, entry in times.items() if name != reference}


def measure(vocabulary: int, rounds: int, hidden: int, batch: int, tokens: int) -> dict[str, Any]:
    """All figures of one shape."""
    models = build(vocabulary, hidden, intermediate=hidden * 11 // 4)
    ids = torch.randint(3, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {}

    def record(name: str, contenders: dict[str, Callable[[], Any]], rounds: int = rounds) -> None:
        times = interleaved(contenders, rounds)
        found[name] = {"times": times, "ratios": ratios(times, "base")}
        print(
            f"vocabulary {vocabulary}, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[name]["ratios"].items())
        )

    record("forward", {name: forward(model, ids) for name, model in models.items()})
    record("decode", {name: decode(model, ids[:1], 8) for name, model in models.items()})
    steps = {
        "base": forward(models["base"], ids),
        **{name: npt_step(models["npt"], ids, name) for name in ("local", "logits")},
        "lora": lora_step(models["lora"], ids),
    }
    record("training step", steps)
    found["peak"] = {name: peak(run) for name, run in steps.items()}
    print({name: round(value / found["peak"]["base"], 3) for name, value in found["peak"].items()})
    text = torch.randint(3, vocabulary, (16384 // tokens, tokens), generator=torch.Generator().manual_seed(2))
    contenders = {"base": backbone(models["base"], text), "calibration": calibration(models["npt"], text)}
    record("calibration", contenders, max(2, rounds // 4))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--name", default=f"{platform.system().lower()}-{platform.machine()}", help="of the result file"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8000, 32000])
    options = parser.parse_args(arguments)
    shapes = {
        str(v): measure(v, options.rounds, options.hidden, options.batch, options.tokens) for v in options.vocabulary
    }
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    result = {"machine": machine, "options": vars(options), "vocabulary": shapes}
    (RESULTS / f"speed-{options.name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
