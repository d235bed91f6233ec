"""`npt bench editing --factworld`: small models trained or loaded, edits of their worlds written and asked, results kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from npt.common.display import one_line
from npt.common.distribution import versions
from npt.common.fingerprint import base_fingerprint
from npt.common.writable import check_file
from npt.editing.benchmark.factworld import LAYERS, METHOD, SINGLES, Examiner, facts, measured, source_of
from npt.editing.benchmark.methods import Setup
from npt.editing.benchmark.registry import made, options_of
from npt.editing.benchmark.small import FAMILIES, Gates, Recipe, gates_of, small_model
from npt.editing.benchmark.world import World
from npt.editing.benchmark.worlds import KeptWorlds, Result, read_worlds, write_worlds
from npt.errors import NPTError
from npt.runs.editing_bench import check_arguments, check_methods, machine
from npt.runs.edits import only_process


@dataclass(frozen=True)
class FactWorldBench:
    """A command's words. None or empty where nothing was said.

    models: families, see `npt.editing.benchmark.small.FAMILIES`. seeds: of worlds, models and edits. edits: how many are
    written together; 1 stands for `SINGLES` edits, each alone. methods, layers, metric, options: see
    `npt.runs.editing_bench.Bench`; what is not said is chosen in `npt.editing.benchmark.factworld`. recipe: of the training,
    family and seed aside. cache: a folder that keeps trained models. output: a JSON file of results. progress: show bars.
    """

    models: Sequence[str] = ("llama",)
    seeds: Sequence[int] = (0,)
    edits: Sequence[int] = (1, 64, 256)
    methods: Sequence[str] = (METHOD,)
    layers: Sequence[int] = ()
    metric: str = "domain"
    options: Sequence[str] = ()
    wordings: int = 1
    singles: int = SINGLES
    recipe: Recipe = field(default_factory=Recipe)
    cache: Path | None = None
    output: Path | None = None
    progress: bool = True

    def recipes(self) -> list[Recipe]:
        """The models, each once."""
        return [
            replace(self.recipe, family=family, seed=seed)
            for family in dict.fromkeys(self.models)
            for seed in dict.fromkeys(self.seeds)
        ]

    def check(self) -> None:
        """Checks what needs no file and no training.

        Raises:
            NPTError: an unknown model, method or option, or a number out of range.
        """
        for family in self.models:
            if family not in FAMILIES:
                raise NPTError(f"--factworld {one_line(family, 40)}: use {' or '.join(FAMILIES)}")
        check_methods(self.methods, self.options, self.metric, self.layers)
        highest = self.recipe.blocks - 1
        if self.layers and self.layers[-1] > highest:
            raise NPTError(
                f"--layers {' '.join(map(str, self.layers))}: the model has {highest + 1} blocks; use 0 to {highest}"
            )
        for recipe in self.recipes():
            for count in self.edits:
                self.batches(World(recipe.seed, recipe.size), count)
        if self.output is not None:
            check_file("--output", self.output, ".json")

    def batches(self, world: World, count: int) -> list[list[Any]]:
        """The edits of a world, so many in a batch."""
        chosen = facts(world, self.singles if count == 1 else count, wordings=self.wordings)
        return [[fact] for fact in chosen] if count == 1 else [chosen]

    def decides(self) -> dict[str, Any]:
        """The arguments that every figure depends on, as the file holds them."""
        return {
            "--layers": list(self.layers or LAYERS), "--metric": self.metric, "--option": sorted(self.options),
            "wordings": self.wordings, "single edits": self.singles,
            "recipe": {name: v for name, v in asdict(self.recipe).items() if name not in ("family", "seed")},
        }  # fmt: skip


def measure_factworld(bench: FactWorldBench) -> list[Result]:
    """Trains or loads each model, asks its gates and measures its edits; what the output holds already is taken from there.

    Returns:
        the results that were asked for, in the order of methods, models, seeds and numbers of edits.

    Raises:
        NPTError: an argument out of range, or an output of other arguments, another machine or another training.
        DataError: an output that is something else. RunError: a model does not pass the gates; what was measured is kept.
    """
    bench.check()
    with nullcontext() if bench.output is None else only_process(bench.output):
        kept = _begun(bench)
        known = {result.asked: result for result in kept.results}
        wanted = {
            (method, recipe.family, recipe.seed, count): recipe
            for method in dict.fromkeys(bench.methods)
            for recipe in bench.recipes()
            for count in dict.fromkeys(bench.edits)
        }
        for recipe in bench.recipes():
            missing = [asked for asked, its in wanted.items() if its == recipe and asked not in known]
            if missing:
                for result in _of_model(bench, recipe, missing, kept.results):
                    known[result.asked] = result
                    kept.results.append(result)
                    if bench.output is not None:
                        write_worlds(bench.output, kept)
    return [known[asked] for asked in wanted]


def _begun(bench: FactWorldBench) -> KeptWorlds:
    """The results that the output holds, or none."""
    about = {"versions": versions(), "machine": machine(torch.float32)}
    if bench.output is None or not bench.output.exists():
        return KeptWorlds(about, bench.decides())
    kept = read_worlds(bench.output, "--output")
    check_arguments(bench.output, kept.arguments, bench.decides())
    return kept


def _of_model(
    bench: FactWorldBench, recipe: Recipe, missing: Sequence[tuple[str, str, int, int]], before: Sequence[Result]
) -> Iterator[Result]:
    """The missing results of one model, one after the other."""
    model, tokenizer, world = small_model(recipe, cache_dir=bench.cache, progress=bench.progress)
    name, base = f"FactWorld, {recipe.family}, seed {recipe.seed}", base_fingerprint(model)
    of_model = [result for result in before if (result.model, result.seed) == (recipe.family, recipe.seed)]
    if any(result.base != base for result in of_model):
        raise NPTError(
            f"--output {bench.output}: holds figures of another training of {name}; name another file, or measure all of them "
            "on one machine with one number of threads"
        )
    gates: Gates = of_model[0].gates if of_model else gates_of(model, tokenizer, world, progress=bench.progress)
    gates.check(name)
    source = source_of(model, tokenizer, world, bench.metric, bench.progress)
    setup = Setup(model, tokenizer, source, tuple(bench.layers or LAYERS))
    examiner, options = Examiner(model, tokenizer, world), options_of(bench.options)
    for method, _, _, count in missing:
        label = f"{name}, {method}, {count} at once" if count > 1 else f"{name}, {method}"
        found = measured(
            made(method, setup, options.get(method, {})), examiner, bench.batches(world, count), label, bench.progress
        )
        yield Result(method, recipe.family, recipe.seed, count, base, found, gates)
