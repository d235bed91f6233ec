"""Cost of an edit beside a forward of the frozen base: python -m benchmarks.editing.cost [--model NAME]

edit        floating-point operations of `EditStore.write`, without reading back, over those of one forward of the prompt with
            its target; statistics are there before. The same of seconds.
statistics  seconds of the blocks' second moments over those of the base's forward of the same tokens, interleaved
solve       seconds of the joint weight delta of 1,000 edits, of random keys and values

Adds the model's figures to benchmarks/results/editing-cost.json, and writes the table in docs/editing.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tables import RESULTS, cost_table
from benchmarks.timing import interleaved
from npt import EditStore, load_base
from npt.editing.bench import Bench
from npt.editing.metrics import Source
from npt.editing.probes import probes
from npt.editing.requests import Request
from npt.editing.solve import EPSILON, Metric, Pairs, solve
from npt.editing.statistics import LENGTH, moments_of, padded
from npt.editing.writing import PREFIX_TOKENS, PREFIXES
from npt.errors import NPTError
from npt.tuner.converted import device_of, eval_mode
from scripts.marked import write_section

#: Targets that are given to the package's own statements in turn, and how many statements.
TARGETS, STATEMENTS = ("Rome", "music", "Portugal", "blue"), 16
#: Edits of the solve, and texts of a pass of statistics.
EDITS, TEXTS = 1000, 8
FILE = RESULTS / "editing-cost.json"


def requests() -> list[Request]:
    """Statements of the package, each with a target."""
    found = list(probes())[:STATEMENTS]
    return [Request(probe.prompt, TARGETS[i % len(TARGETS)], probe.subject) for i, probe in enumerate(found)]


def work(run: Callable[[], Any]) -> tuple[float, float]:
    """(floating-point operations, seconds) of a call, which runs once for each."""
    with FlopCounterMode(display=False) as counter:
        run()
    start = time.perf_counter()
    run()
    return float(counter.get_total_flops()), time.perf_counter() - start


def edit_cost(model: Any, tokenizer: Any, layers: Sequence[int], source: Source) -> dict[str, float]:
    """Means over edits: operations and seconds of one over those of a forward, passes, and the standard error of the first."""
    products, seconds, passes = [], [], []
    for request in requests():
        ids = Bench(model, tokenizer, layers)
        rows = padded([ids.prompts.target(request.prompt, request.target, None).ids], device_of(model))
        ids.close()

        def forward(rows: Any = rows) -> None:
            with torch.no_grad():
                model(**rows, use_cache=False)

        def write(request: Request = request) -> None:
            store = EditStore(model, tokenizer, layer=layers, read_back=False, progress=False)
            store.source = source  # statistics and prefixes are there
            try:
                passes.append(store.write_many([request])[0].passes)
            finally:
                store.close()

        one, whole = work(forward), work(write)
        products.append(whole[0] / one[0])
        seconds.append(whole[1] / one[1])
    error = stdev(products) / len(products) ** 0.5
    return {
        "products": fmean(products), "products_standard_error": error, "seconds": fmean(seconds), "passes": fmean(passes),
        "edits": len(products),
    }  # fmt: skip


def statistics_cost(model: Any, tokenizer: Any, layers: Sequence[int], rounds: int) -> dict[str, float]:
    """{"seconds": ratio of the moments' pass to the frozen forward, "tokens"}."""
    chance = torch.Generator().manual_seed(0)
    rows = torch.randint(10, len(tokenizer), (TEXTS, LENGTH), generator=chance).tolist()
    bench = Bench(model, tokenizer, layers)
    bench.close()
    downs = {site.layer: site.down for site in bench.sites}

    @torch.no_grad()
    def forward() -> None:
        with eval_mode(model):
            model(**padded(rows, device_of(model)), use_cache=False)

    def moment() -> None:
        moments_of(model, downs, rows, progress=False)

    found = interleaved({"forward": forward, "moment": moment}, rounds)
    return {"seconds": found["moment"]["seconds"] / found["forward"]["seconds"], "tokens": TEXTS * LENGTH}


def solve_seconds(width: int, size: int) -> float:
    """Seconds of the solve of 1,000 edits with a metric: M K, the Gram matrix and its factor."""
    chance = torch.Generator().manual_seed(0)
    keys = torch.randn(width, EDITS, generator=chance, dtype=torch.float64)
    values = torch.randn(size, EDITS, generator=chance, dtype=torch.float64)
    text = torch.randn(width, 2 * width, generator=chance, dtype=torch.float64)
    metric = Metric(text @ text.T / (2 * width), EPSILON)
    start = time.perf_counter()
    solve(Pairs(keys, metric(keys), values), 0.1)
    return time.perf_counter() - start


def measure(name: str, layers: Sequence[int], rounds: int, cache: Path | None) -> dict[str, Any]:
    """All figures of one model."""
    model, tokenizer = load_base(name)
    source = Source(model, tokenizer, "domain", "self", None, cache, True)
    bench = Bench(model, tokenizer, layers)
    bench.close()
    source.moments({site.layer: site.down for site in bench.sites})
    source.prefixes(PREFIXES, PREFIX_TOKENS)
    return {
        "layers": list(layers),
        "edit": edit_cost(model, tokenizer, layers, source),
        "statistics": statistics_cost(model, tokenizer, layers, rounds),
        "solve": {"edits": EDITS, "seconds": solve_seconds(bench.first.width, bench.first.size)},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 1 for an error that is said in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.editing.cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="builtin:smollm2-135m", help="default: builtin:smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6], help="the edited blocks (default: 4 5 6)")
    parser.add_argument("--rounds", type=int, default=5, help="of the interleaved times (default: 5)")
    parser.add_argument("--cache", type=Path, help="a folder that keeps statistics")
    given = parser.parse_args(arguments)
    try:
        found = measure(given.model, given.layers, given.rounds, given.cache)
    except NPTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    results[given.model] = found
    FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(cost_table(results))
    write_section("docs/editing.md", "editing cost", cost_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
