"""Writes the predicted tables of recipes/README.md and docs/scaling.md: python -m scripts.recipes_table"""

from __future__ import annotations

from dataclasses import dataclass

from npt.common.display import duration
from npt.config import RunConfig, load_config
from npt.planning.devices import planned_launch
from npt.planning.plan import plan_run
from npt.planning.timing import memory_limit, planned_steps, step_time
from scripts.marked import ROOT, section, write_section

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A run configuration of recipes/, the shapes it is planned with and the launch."""

    recipe: str
    shapes: str
    processes: int
    nodes: int = 1
    options: tuple[str, ...] = ()
    device: str = "h100-80gb"

    def config(self) -> RunConfig:
        """The configuration, with the name of the shapes in place of the hub's model."""
        name = f"model.base_model_name={self.shapes}"
        return load_config(ROOT / "recipes" / f"{self.recipe}.yaml", [name, *self.options])


ONE, NODE, TWO = "llama-3.1-8b-1gpu", "llama-3.1-8b-8gpu", "llama-3.1-70b-2nodes"
QWEN, OSS = "qwen3-30b-a3b-8gpu", "gpt-oss-20b-1gpu"
SMALL, LARGE, SHARDED = "llama-3.1-8b", "llama-3.1-70b", ("optimization.fsdp=true",)
RECIPES = (
    Row(ONE, SMALL, 1),
    Row(NODE, SMALL, 8),
    Row(NODE, SMALL, 8, options=SHARDED),
    Row(TWO, LARGE, 16, 2),
    Row(QWEN, "qwen3-30b-a3b", 1, options=("optimization.fsdp=false",)),
    Row(QWEN, "qwen3-30b-a3b", 8),
    Row(OSS, "gpt-oss-20b", 1),
    Row(OSS, "gpt-oss-20b", 8),
)
SCALING = (
    Row(NODE, SMALL, 1),
    Row(NODE, SMALL, 8),
    Row(NODE, SMALL, 16, 2),
    Row(NODE, SMALL, 8, options=SHARDED),
    Row(NODE, SMALL, 16, 2, SHARDED),
    Row(TWO, LARGE, 1, options=("optimization.fsdp=false",)),
    Row(TWO, LARGE, 8),
    Row(TWO, LARGE, 16, 2),
    Row(TWO, LARGE, 16, 2, ("model.npt_layers=all",)),
)
TABLES: dict[str, tuple[str, tuple[Row, ...]]] = {
    "recipes": ("recipes/README.md", RECIPES),
    "scaling": ("docs/scaling.md", SCALING),
}
HEAD = (
    "| run | processes | strategy | weights of each | peak of each | fits 80 GB | tokens a step | a step | where "
    "communication overlaps | the training |\n|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """One row of a table."""
    config, launch = row.config(), planned_launch(row.processes, row.nodes, row.device)
    plan, steps = plan_run(config, None, row.processes), planned_steps(config, row.processes)
    t = config.training
    time = step_time(plan, t.gradient_accumulation_steps, launch)
    tokens = row.processes * t.batch_size * t.gradient_accumulation_steps * config.data.max_length
    options = "".join(f", `{option}`" for option in row.options)
    cells = [
        f"`{row.recipe}`{options}",
        f"{row.processes} on {row.nodes} node{'s' * (row.nodes > 1)}",
        plan.spread.strategy,
        f"{plan.weights / GIB:.1f} GiB",
        f"{plan.peak / GIB:.1f} GiB",
        "yes" if plan.peak <= memory_limit(launch) else "no",
        f"{tokens:,}",
        duration(time.most),
        duration(time.least),
        "" if steps is None else f"{steps:,} steps, {duration(steps * time.most)}",
    ]
    return f"| {' | '.join(cells)} |"


def lines_of(text: str, name: str) -> list[str]:
    """The rows of a document's table, without its head."""
    return section(text, name).splitlines()[2:]


def main() -> None:
    """Writes all tables."""
    for name, (document, rows) in TABLES.items():
        write_section(document, name, "\n".join([HEAD, *map(line, rows)]))


if __name__ == "__main__":
    main()
