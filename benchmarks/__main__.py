"""Speed and memory beside the frozen base, PEFT LoRA and formed weight deltas: python -m benchmarks

Everything runs in one process, interleaved; figures are medians with half the distance between the quartiles. Writes
benchmarks/results/<name>.json after each part, the tables of docs/speed.md and the README's sentence about speed. On a CUDA
machine the models are bfloat16, and a shape of 1 billion parameters and torch.compile join in. Needs a quiet machine: 2
cores take about 30 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from benchmarks import contenders as c
from benchmarks import linear, materialized
from benchmarks.roofline import limit_of, machine_rates
from benchmarks.tables import limits_table, linear_table, materialized_table, speed_sentence, speed_table
from benchmarks.timing import CLOCKS, Run, check_clock, interleaved, peak, ratios
from npt.builtin import source_of
from npt.errors import NPTError
from scripts.marked import write_section

RESULTS = Path(__file__).resolve().parent / "results"
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def measure_model(source: Any, options: argparse.Namespace, label: str) -> dict[str, Any]:
    """All figures of one model: {"parameters", part: {"times", "ratios", "peaks", "peak_ratios"}}."""
    base = c.frozen(source, DEVICE, DTYPE)
    models = {"base": base, "npt": c.converted(base), "lora": c.with_lora(base)}
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in base.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        for name, (runs, rounds) in parts(models, options, folder).items():
            if options.part in name:
                found[name] = measure_part(runs, rounds, options)
                line = ", ".join(f"{k} {v:.3f}" for k, v in found[name]["ratios"].items())
                print(f"{label}, {name}: {line}", flush=True)
    return found


def parts(models: dict[str, Any], options: argparse.Namespace, folder: str) -> dict[str, tuple[dict[str, Run], int]]:
    """{part: ({contender: run}, rounds)}; "base" is the reference of each. Teacher targets go to `folder`."""
    vocabulary, rounds = models["base"].config.vocab_size, options.rounds
    ids = random_ids(vocabulary, options.batch, options.tokens)
    text = random_ids(vocabulary, max(1, 16384 // options.tokens), options.tokens)
    found = {
        "forward": ({name: c.forward(model, ids) for name, model in models.items()}, rounds),
        "prefill": ({name: c.prefill(model, ids[:1]) for name, model in models.items()}, rounds),
        "decode": ({name: c.decode(model, ids[:1]) for name, model in models.items()}, 2 * rounds),
        "training step": (
            {
                "base": c.forward(models["base"], ids),
                **c.npt_steps(models["npt"], ids),
                "local, cached": c.cached_step(models["npt"], ids, folder),
                "lora": c.lora_step(models["lora"], ids),
            },
            rounds,
        ),
        "calibration": (
            {
                "base": c.backbone(models["base"], text, options.batch),
                "npt": c.calibration(models["npt"], text, options.batch),
            },
            max(3, rounds // 3),
        ),
    }
    few = max(2, rounds // 5)
    scored, frozen = text[: max(1, len(text) // 4)], models["base"]
    reference = c.forwards(frozen, scored, options.batch)
    found["divergence"] = ({"base": reference, "npt": c.divergence(models["npt"], scored)}, few)
    found["report"] = ({"base": reference, "npt": c.report(models["npt"], scored)}, few)
    rows = options.sampled
    found["sampling"] = (
        {"base": c.greedy(frozen, rows, options.tokens), "npt": c.sampling(frozen, rows, options.tokens)}, max(1, few // 2)
    )  # fmt: skip
    if CUDA or options.compile:
        compiled = {name: torch.compile(models[name]) for name in ("base", "npt")}
        found["compiled forward"] = ({name: c.forward(model, ids) for name, model in compiled.items()}, rounds)
    return found


def random_ids(vocabulary: int, batch: int, tokens: int) -> torch.Tensor:
    """(batch, tokens) seeded ids."""
    return torch.randint(3, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def measure_part(runs: dict[str, Run], rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times and peaks of one part."""
    times = interleaved(runs, rounds, options.clock)
    found: dict[str, Any] = {
        "clock": options.clock,
        "times": times,
        "ratios": ratios({k: v["seconds"] for k, v in times.items()}, "base"),
    }
    if options.rates is not None:
        found["limits"] = {name: limit_of(run, options.rates) for name, run in runs.items()}
    if options.memory:
        found["peaks"] = {name: peak(run) for name, run in runs.items()}
        found["peak_ratios"] = ratios(found["peaks"], "base")
    return found


def suites(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """{name in the result file: what measures it}."""
    found: dict[str, Callable[[], Any]] = {}

    def add(name: str, source: Any) -> None:
        found[name] = lambda: measure_model(source, options, name)

    for vocabulary in options.vocabulary:
        add(f"d {options.hidden}, vocabulary {vocabulary:,}", c.llama_shape(vocabulary, options.hidden))
    for model in options.model:
        add(Path(source_of(model)).name if model == source_of(model) else model, model)
    if CUDA:
        add("1 billion parameters", c.ONE_BILLION)
    found["materialized"] = lambda: materialized.measure(options.rounds)
    found["linear"] = lambda: linear.measure(options.rounds)
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=str(__doc__).splitlines()[0])
    default = f"{platform.system().lower()}-{platform.machine()}-{'cuda' if CUDA else 'cpu'}"
    parser.add_argument("--name", default=default, help="of the result file")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--sampled", type=int, default=64, help="rows that are sampled at once")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for one thread on a busy machine")
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[8000, 32000])
    parser.add_argument("--model", nargs="*", default=["builtin:tiny"], help="Llamas: builtin names, folders")
    parser.add_argument("--only", default="", help="measure only what has this in its name; the rest is kept")
    parser.add_argument("--part", default="", help="of each model only the parts with this in their name")
    parser.add_argument("--compile", action="store_true", help="torch.compile on the CPU too")
    parser.add_argument("--no-limits", dest="limits", action="store_false")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--no-readme", dest="readme", action="store_false")
    options = parser.parse_args(arguments)
    path = RESULTS / f"{options.name}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"suites": {}}
    try:
        check_clock(options.clock)
    except NPTError as error:
        parser.error(str(error))
    result |= {"machine": machine(), "options": {"rank": c.RANK, "batch": options.batch, "tokens": options.tokens}}
    options.rates = machine_rates(DEVICE, DTYPE, options.clock) if options.limits else None
    if options.rates is not None:
        result["rates"] = options.rates._asdict()
    for name, measure in suites(options).items():
        if options.only in name:
            result["suites"].setdefault(name, {}).update(measure())
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_section("docs/speed.md", f"speed {options.name}", speed_table(result))
    write_section("docs/speed.md", f"limits {options.name}", limits_table(result))
    if options.readme:
        write_section("README.md", "speed sentence", speed_sentence(result))
        write_section("docs/speed.md", "speed", speed_table(result))
        write_section("docs/speed.md", "materialized", materialized_table(result))
        write_section("docs/speed.md", "linear", linear_table(result))


if __name__ == "__main__":
    main()
