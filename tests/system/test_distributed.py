"""Several processes give what one gives: losses, calibration, evaluation, checkpoints; with DDP and FSDP2 over gloo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from npt.cli import main
from npt.common import processes as distributed
from npt.common.launch import check_launch
from npt.errors import NPTError
from npt.runs.processes import shards_base, start_processes
from npt.training.checkpoints import last_checkpoint
from tests.distributed_worker import free_port, work
from tests.helpers import REPOSITORY

OBJECTIVES = ("local", "logits", "composite")
#: As `Spec.sharded` names them: DDP, FSDP2 from before calibration on, FSDP2 as Trainer does it.
ENGINES = ("", "early", pytest.param("late", marks=pytest.mark.slow))
LOSSES = ("loss", "equivalence_loss", "regularization_loss", "mean_delta_norm", "grad_norm", "eval_mean_kl")


def launch(count: int, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python COMMAND` as one process or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", free_port()]
    done = subprocess.run(
        [sys.executable, *(torchrun if count > 1 else []), *command],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def logged(folder: Path, key: str) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


def assert_alike(one: Path, other: Path, losses: float, logits: float, names: tuple[str, ...] = LOSSES) -> None:
    """Two runs' logged figures agree to `losses`, relative to the largest, and their logits to `logits`."""
    for name in names:
        pair = logged(one, name), logged(other, name)
        assert [step for step, _ in pair[0]] == [step for step, _ in pair[1]] and pair[0], name
        a, b = (torch.tensor([value for _, value in rows], dtype=torch.float64) for rows in pair)
        assert float((a - b).abs().max()) <= losses * max(1.0, float(a.abs().max())), name
    a, b = (load_file(folder / "logits.safetensors")["logits"].double() for folder in (one, other))
    assert float((a - b).abs().max()) <= logits


def specs(folder: Path, engine: str | None) -> Iterator[dict[str, Any]]:
    """All small cases of an engine; None for the single process."""
    common = {"sharded": engine or "", "calibrate": True, "chunk_tokens": 200}
    for objective in OBJECTIVES:
        for dtype in ("float64", "float32"):
            name = f"{objective}-{dtype}"
            accumulation = 2 if dtype == "float32" else 1
            yield {
                **common,
                "folder": str(folder / name),
                "objective": objective,
                "dtype": dtype,
                "accumulation": accumulation,
                "steps": 20 if dtype == "float64" else 10,
            }
    weights = {"regularization_weight": 0.01, "regularizer": "factors"}
    more: dict[str, dict[str, Any]] = {
        "factors": {"weights": weights},
        "delta": {"weights": {**weights, "regularizer": "delta"}, "objective": "local"},
        "gpt2": {"model": "gpt2", "options": {"key": "learned", "low_rank_at": "projection", "gain": "overlap"}},
        "teacher": {"teacher": True, "objective": "local"},
        "mixture": {"model": "qwen2_moe"},
        "local-mixture": {"model": "qwen2_moe", "objective": "local"},
    }
    for name, changes in more.items():
        yield {**common, "folder": str(folder / name), "steps": 6, **changes}


NAMES = [Path(spec["folder"]).name for spec in specs(Path(), None)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """The folder of an engine's runs, made when first asked for; None is the single process."""
    made: dict[str | None, Path] = {}

    def of(engine: str | None) -> Path:
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp(engine or "plain")
            work(1 if engine is None else 2, list(specs(made[engine], engine)))
        return made[engine]

    return of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one_does(engine: str, name: str, runs: Callable[[str | None], Path]) -> None:
    """At the same global batch, losses to 1e-9 in 20 steps of float64 and to 1e-4 in 10 of float32; logits to 1e-6 (1e-5)."""
    one, two = runs(None) / name, runs(engine) / name
    exact = not name.endswith("float32")
    assert_alike(one, two, *(1e-9, 1e-6) if exact else (1e-4, 1e-5))
    made = json.loads((two / "world.json").read_text())
    assert made == {"world": 2, "sharded": bool(engine)}
    assert {size for _, size in logged(two, "world_size")} == {2} and {n for _, n in logged(one, "world_size")} == {1}


@pytest.mark.parametrize("engine", ENGINES)
def test_calibration_is_the_same_fit(engine: str, runs: Callable[[str | None], Path]) -> None:
    """Of 13 batches, so that the last round is not full, and a first chunk that ends within a round."""
    for name in NAMES:
        one, two = (load_file(runs(which) / name / "calibrated.safetensors") for which in (None, engine))
        assert one.keys() == two.keys()
        bound = 1e-9 if not name.endswith("float32") else 1e-4
        for key, value in one.items():
            assert float((value - two[key]).abs().max()) <= bound * max(1.0, float(value.abs().max())), (name, key)
        figures = [json.loads((runs(which) / name / "calibration.json").read_text()) for which in (None, engine)]
        for block, values in figures[0].items():
            assert values == pytest.approx(figures[1][block], rel=1e-6), (name, block)
            assert values["tokens"] == 52 * 16


@pytest.mark.parametrize("engine", ["", "early"])
def test_the_adapter_is_saved_once_and_whole(engine: str, runs: Callable[[str | None], Path]) -> None:
    """What two processes save has one process's files, shapes and values."""
    one, two = runs(None) / "logits-float64", runs(engine) / "logits-float64"
    last = last_checkpoint(two / "checkpoints")
    assert last is not None and last.name == "checkpoint-20"
    files = [{p.name for p in (folder / "checkpoints" / "checkpoint-20").iterdir()} for folder in (one, two)]
    assert files[1] == files[0] | {"rng_state_1.safetensors"}
    for place in ("checkpoints/checkpoint-20", "best_model"):
        a, b = (load_file(folder / place / "adapter_model.safetensors") for folder in (one, two))
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-9, rtol=0) for k in a)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of two processes that kill themselves after step 14, with its checkpoint of step 10."""
    made: dict[str, Path] = {}

    def of(engine: str) -> Path:
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp("killed")
            work(2, [{**RESUMED, "folder": str(made[engine]), "sharded": engine, "kill": 14}], check=False)
            last = last_checkpoint(made[engine] / "checkpoints")
            assert last is not None and last.name == "checkpoint-10"
        return made[engine]

    return of


RESUMED: dict[str, Any] = {"dtype": "float32", "calibrate": True, "chunk_tokens": 200, "objective": "logits"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process, unbroken."""
    folder = tmp_path_factory.mktemp("whole")
    work(1, [{**RESUMED, "folder": str(folder)}])
    return folder


@pytest.mark.parametrize(
    ("before", "count", "after"),
    [
        ("", 1, ""),
        ("early", 2, "early"),
        pytest.param("", 2, "", marks=pytest.mark.slow),
        pytest.param("", 2, "early", marks=pytest.mark.slow),
        pytest.param("early", 1, "", marks=pytest.mark.slow),
        pytest.param("early", 2, "", marks=pytest.mark.slow),
    ],
)
def test_killed_under_two_processes_and_resumed_under_any(
    before: str, count: int, after: str, killed: Callable[[str], Path], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed(before), folder)
    log = folder / "metrics.jsonl"
    # As `npt train --resume` does it: what was logged after the checkpoint comes again.
    log.write_text("".join(line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= 10))
    work(count, [{**RESUMED, "folder": str(folder), "sharded": after, "resume": True}])
    assert_alike(whole, folder, 1e-4, 1e-5)
    assert {size for step, size in logged(folder, "world_size") if step > 10} == {count}


@pytest.mark.parametrize("after", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_shards_are_read_once_also_after_a_stop(after: int, tmp_path: Path) -> None:
    """200 shards over two processes that are killed, and over one or two after: every document once in an epoch."""
    documents = [f"{shard}-{i}" for shard in range(200) for i in range(3)]
    (tmp_path / "shards").mkdir()
    for shard in range(200):
        lines = (json.dumps({"text": f"{shard}-{i}"}) + "\n" for i in range(3))
        (tmp_path / "shards" / f"{shard:03d}.jsonl").write_text("".join(lines))
    spec = {"stream": str(tmp_path / "shards" / "*"), "dtype": "float32", "objective": "local", "steps": 50}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # In one launch; the second of them ends it.
    work(2, [{**spec, "folder": str(whole)}, {**spec, "folder": str(parts), "kill": 27}], check=False)
    last = last_checkpoint(parts / "checkpoints")
    assert last is not None and last.name == "checkpoint-20"
    before = [json.loads((parts / f"killed-{r}.json").read_text())[str(r)] for r in range(2)]
    kept = [json.loads((last / f"stream-{r:05d}.json").read_text())["documents"] for r in range(2)]
    work(after, [{**spec, "folder": str(parts), "resume": True}])
    found = [json.loads((parts / f"taken-{min(r, after - 1)}.json").read_text())[str(r)] for r in range(2)]
    unbroken = [json.loads((whole / f"taken-{r}.json").read_text())[str(r)] for r in range(2)]
    streams = [one[:n] + rest for one, n, rest in zip(before, kept, found, strict=True)]
    assert streams == unbroken
    epoch = [stream[:300] for stream in streams]
    assert sorted(text for part in epoch for text in part) == sorted(documents)  # 600 of them, none twice
    assert all(len(stream) > 300 and set(stream[300:]) <= set(documents) for stream in streams)
    log = parts / "metrics.jsonl"
    rows = [
        row for row in map(json.loads, log.read_text().splitlines()) if row["step"] <= 20 or row["world_size"] == after
    ]
    resumed = {row["step"]: row["loss"] for row in rows if "loss" in row}
    for step, loss in logged(whole, "loss"):
        assert resumed[step] == pytest.approx(loss, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [("float32",), ("float64", "float32")], ids=str)
def test_real_checkpoint(dtypes: tuple[str, ...], stories: Path, tmp_path: Path) -> None:
    def cases(engine: str | None) -> list[dict[str, Any]]:
        folder = tmp_path / ("one" if engine is None else engine or "ddp")
        return [
            {"folder": str(folder / f"{name}-{dtype}"), "model": str(stories), "objective": name, "dtype": dtype,
             "options": {"npt_layers": [2, 3, 4], "rank": 8}, "vocabulary": 512, "sharded": engine or "", "calibrate": True,
             "steps": 10}
            for name in OBJECTIVES for dtype in dtypes
        ]  # fmt: skip

    work(1, cases(None))
    for engine in ("", "early"):
        work(2, cases(engine))
        for one, two in zip(cases(None), cases(engine), strict=True):
            limits = (1e-9, 1e-6) if one["dtype"] == "float64" else (1e-4, 1e-4)
            assert_alike(Path(one["folder"]), Path(two["folder"]), *limits)


def settings(model: Path | str, folder: Path, **changes: Any) -> list[str]:
    """--set options of a small run."""
    values = {
        "model.base_model_name": str(model), "training.batch_size": 4, "training.num_train_steps": 6,
        "training.eval_steps": 3, "training.save_steps": 3, "training.logging_steps": 1,
        "training.prediction_logging_steps": 6, "data.num_train_samples": 48, "data.num_eval_samples": 22,
        "data.num_calibration_samples": 24, "data.max_length": 32, "data.eval_texts": "[builtin:python-docs]",
        "paths.output_dir": str(folder / "out"), "paths.checkpoint_dir": str(folder / "checkpoints"), **changes,
    }  # fmt: skip
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def differences(one: Any, other: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ by more than 1e-9."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            yield place, sorted(one), sorted(other)
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{place}/{i}")
    elif isinstance(one, float) and isinstance(other, float):
        if not abs(one - other) <= 1e-9:
            yield place, one, other
    elif one != other:
        yield place, one, other


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_commands_under_torchrun(shared: bool, local_model: Path, tmp_path: Path) -> None:
    """Training with two processes through the script, and its evaluation by one, by two and by two that share the base."""
    run = settings(local_model, tmp_path)
    done = launch(2, "train_npt_equivalence.py", *run)
    assert done.stdout.count("report:") == 1 and "2 processes on cpu, 8 blocks a step" in done.stderr
    assert {size for _, size in logged(tmp_path / "out", "world_size")} == {2}
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sum("calibration" in row for row in rows) == 1 and [r["step"] for r in rows if "loss" in r] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    reports = []
    together = ("shared", 2, ["--set", "optimization.fsdp=true"]) if shared else ("two", 2, [])
    for name, count, more in (("one", 1, []), together):
        output = tmp_path / f"{name}.json"
        adapter = str(tmp_path / "checkpoints" / "best_model")
        arguments = ["--checkpoint", adapter, "--output", str(output), *run, *more]
        if count == 1:
            assert main(["evaluate", *arguments]) == 0
        else:
            launch(count, "evaluate_npt.py", *arguments)
        reports.append(json.loads(output.read_text()))
    assert not list(differences(reports[0], reports[1]))
    # The report of the run itself is that of the same adapter on the same text.
    trained = json.loads((tmp_path / "out" / "evaluation_report.json").read_text())
    assert not list(differences(trained["evaluations"]["perplexity"], reports[0]["evaluations"]["perplexity"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["builtin:tiny", "stories"])
def test_accelerate_with_fsdp_reads_the_base_once(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The first process reads the weights, the others get theirs as the base is cut; one base per machine in memory."""
    model = name if name.startswith("builtin") else request.getfixturevalue("stories")
    launch(2, "train_npt_equivalence.py", *settings(model, tmp_path / "torchrun"), "--set", "optimization.fsdp=true")
    config = tmp_path / "fsdp.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: 'no'\nnum_machines: 1\n"
        "num_processes: 2\nmachine_rank: 0\nuse_cpu: false\nfsdp_config:\n  fsdp_version: 2\n"
        "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n  fsdp_reshard_after_forward: true\n"
        "  fsdp_cpu_ram_efficient_loading: true\n  fsdp_state_dict_type: FULL_STATE_DICT\n"
    )
    start = ("-m", "accelerate.commands.launch", "--config_file", str(config), "train_npt_equivalence.py")
    launch(1, *start, *settings(model, tmp_path / "accelerate"))
    one, two = (
        json.loads((tmp_path / n / "out" / "evaluation_report.json").read_text()) for n in ("torchrun", "accelerate")
    )
    assert not list(differences(one, two))


# -- a launch that went wrong --------------------------------------------------------------------------------------------


class _Arguments:
    device = torch.device("cpu")
    per_device_train_batch_size = gradient_accumulation_steps = 1


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_two_singles_are_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(NPTError, match=rf"{name}=2: .* group of 1; .*torchrun --nproc-per-node 2"):
        start_processes(_Arguments())  # type: ignore[arg-type]
    monkeypatch.setenv(name, "1")
    start_processes(_Arguments())  # type: ignore[arg-type]


def test_a_launch_without_an_address_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    check_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NPTError, match=r"WORLD_SIZE=2, but RANK, .* torchrun"):
        check_launch()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    check_launch()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(NPTError, match=r"accelerate was asked for several processes and started one"):
        check_launch()


def test_sharding_needs_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shards_base(False)
    with pytest.raises(NPTError, match=r"optimization.fsdp=true .* one process"):
        shards_base(True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NPTError, match="one process"):
        shards_base(False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shards_base(False)


def test_singles_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main(["train", *settings("builtin:tiny", tmp_path)]) == 2
    assert "SLURM_STEP_NUM_TASKS=2" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


# -- in one process ------------------------------------------------------------------------------------------------------


def test_one_process_needs_no_group() -> None:
    x = torch.arange(3.0)
    assert distributed.world() == (0, 1) and distributed.total(x) is x and distributed.gather(x)[0] is x
    assert distributed.from_first(3) == 3 and distributed.gather_values(3) == [3] and not distributed.any_process(False)
    assert list(distributed.share("abc", True)) == [(0, "a", True), (1, "b", True), (2, "c", True)]


@pytest.mark.parametrize("fill", [True, False])
def test_shares_cover_everything_once(fill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 2, 3, 4):
        for size in (1, 2, 3, 7, 8):
            parts = []
            for rank in range(count):
                monkeypatch.setattr(distributed, "world", lambda place=(rank, count): place)
                parts.append(list(distributed.share(range(size), fill)))
            assert sorted(i for part in parts for i, _, counts in part if counts) == list(range(size))
            assert not fill or len({len(part) for part in parts}) == 1
            assert fill or all(counts for part in parts for _, _, counts in part)
