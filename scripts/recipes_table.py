"""Writes the predictions of the recipes into recipes/README.md, from shapes alone: python -m scripts.recipes_table"""

from __future__ import annotations

from pathlib import Path

from npt.config import load_config
from npt.devices import planned_launch
from npt.forecast import duration, run_steps, step_time
from npt.plan import plan_run
from npt.text import human_bytes

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
README = RECIPES / "README.md"
START, END = "<!-- predictions: start -->", "<!-- predictions: end -->"
#: (run configuration, shapes it is planned with, processes, nodes, device, further settings)
ROWS: list[tuple[str, str, int, int, str, list[str]]] = [
    ("llama-3.1-8b-1gpu.yaml", "llama-3.1-8b", 1, 1, "h100-80gb", []),
    ("llama-3.1-8b-1gpu.yaml", "llama-3.1-8b", 1, 1, "a100-80gb", []),
    ("llama-3.1-8b-8gpu.yaml", "llama-3.1-8b", 8, 1, "h100-80gb", []),
    ("llama-3.1-8b-8gpu.yaml", "llama-3.1-8b", 8, 1, "h100-80gb", ["optimization.fsdp=true"]),
    ("llama-3.1-70b-2nodes.yaml", "llama-3.1-70b", 16, 2, "h100-80gb", []),
]


def table() -> str:
    """The rows in Markdown."""
    head = ("recipe", "devices", "base in each process", "predicted peak of a process", "tokens a step")
    head += ("predicted step", "predicted training")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, shapes, processes, nodes, device, more in ROWS:
        config = load_config(RECIPES / name, [f"model.base_model_name={shapes}", *more])
        launch, t = planned_launch(processes, nodes, device), config.training
        plan = plan_run(config, processes=processes)
        seconds, steps = step_time(plan, config, launch).most, run_steps(config, processes) or 0
        tokens = processes * t.batch_size * t.gradient_accumulation_steps * config.data.max_length
        cells = (
            f"`{name}`" + "".join(f" `--set {change}`" for change in more),
            f"{processes} x {device}" + (f" on {nodes} nodes" if nodes > 1 else ""),
            human_bytes(plan.spread.base),
            human_bytes(plan.peak),
            f"{tokens:,}",
            duration(seconds),
            f"{duration(steps * seconds)} ({steps:,} steps)",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_predictions(text: str) -> str:
    """recipes/README.md with the table between its markers replaced."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_predictions(README.read_text(encoding="utf-8")), encoding="utf-8")
