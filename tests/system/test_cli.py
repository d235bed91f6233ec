"""The command and the root scripts do what the documentation says, as a user types them, on a local model."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from npt.cli import main
from npt.config import load_config
from npt.runs.corpora import trained_on
from tests.helpers import REPOSITORY, settings

Called = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(finished_run: Path) -> Path:
    """A finished small run."""
    return finished_run


def test_train_leaves_what_is_documented(run: Path) -> None:
    output = run / "outputs"
    assert {p.name for p in output.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "evaluation_report.json",
    }
    assert {p.name for p in (run / "checkpoints" / "best_model").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert set(rows[0]["calibration"]) == {"layer_2", "layer_3"}
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    assert [row["step"] for row in rows if "eval_mean_kl" in row] == [0, 2, 4]
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {2, 4} and {
        "step",
        "prompt",
        "npt",
        "original",
        "matching_tokens",
    } <= set(samples[0])
    report = json.loads((output / "evaluation_report.json").read_text())
    assert set(report["expected_outcomes"]) == {"functional_fidelity", "low_magnitude_delta", "perplexity_ratio"}
    assert not list((run / "checkpoints").glob("**/*.pkl"))


def test_evaluate_agrees_with_train_and_resolves_pt(run: Path, local_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    checkpoint = run / "checkpoints" / "best_model.pt"
    arguments = ["evaluate", "--checkpoint", str(checkpoint), "--output", str(output), *settings(local_model, run)]
    assert main(["--quiet", *arguments]) == 0
    own, theirs = json.loads(output.read_text()), json.loads((run / "outputs" / "evaluation_report.json").read_text())
    assert own["evaluations"]["perplexity"] == theirs["evaluations"]["perplexity"]
    assert own["evaluations"]["divergence"] == theirs["evaluations"]["divergence"]


def test_evaluate_on_other_text(run: Path, local_model: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Some other prose. " * 40)
    arguments = settings(
        local_model, run, data__dataset_name="text", data__data_files=f"[{tmp_path / 'other.txt'}]",
        data__eval_texts="[builtin:python-docs]",
    )  # fmt: skip
    (tmp_path / "third.txt").write_text("And a third kind. " * 40)
    command = [
        "evaluate",
        "--checkpoint",
        str(run / "checkpoints" / "best_model"),
        "--output",
        str(tmp_path / "r.json"),
    ]
    assert main(["--quiet", *command, "--text", str(tmp_path / "third.txt"), *arguments]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["protocol"]["corpora"] == ["text", "builtin:python-docs", "third"]
    assert report["protocol"]["tokens"] == 8 * 31  # all of it: the adapter was not trained on this text


@pytest.mark.usefixtures("quick_reports")
@pytest.mark.parametrize("objective", ["local", "logits"])
def test_teacher_targets_serve_a_second_run(
    objective: str, local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`paths.teacher_cache`: the same losses from what the first run wrote; other text is refused before calibration."""
    found = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        more = {"paths__teacher_cache": tmp_path / "targets", "training__seed": seed, "training__objective": objective}
        status = main(["train", *settings(local_model, tmp_path / name, **more)])
        messages = " ".join(capsys.readouterr().err.split())
        if name == "three":
            assert status == 2 and "made with other text" in messages and "calibrating" not in messages
            break
        assert status == 0 and "teacher targets in" in messages
        files = {p: p.stat().st_mtime_ns for p in (tmp_path / "targets").rglob("*.*")}
        rows = map(json.loads, (tmp_path / name / "outputs" / "metrics.jsonl").read_text().splitlines())
        found.append((files, [row["loss"] for row in rows if "loss" in row]))
    assert found[0] == found[1] and len(found[0][1]) == 2


def test_a_checkpoint_folder_may_have_a_dot_in_its_name(run: Path, tmp_path: Path) -> None:
    """Its record of the training text is found: other text is not taken for text it was trained on."""
    folder = shutil.copytree(run / "checkpoints" / "best_model", tmp_path / "adapter.v2")
    other = load_config(None, ["data.dataset_name=text", "data.data_files=other.txt"])
    assert not trained_on(other.data, folder)
    assert trained_on(load_config(folder / "npt_run.yaml").data, folder)


@pytest.mark.usefixtures("quick_reports")
def test_training_on_text_holds_the_tail_out(local_model: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"Sentence number {n} of a book. " for n in range(200)))
    (tmp_path / "prose.jsonl").write_text(
        '{"text": "Calibration prose, in another voice altogether, again and again."}\n' * 20
    )
    arguments = settings(
        local_model, tmp_path, data__dataset_name="text", data__data_files=f"[{tmp_path / 'book.txt'}]",
        data__calibration_files=f"[{tmp_path / 'prose.jsonl'}]", training__objective="local",
    )  # fmt: skip
    assert main(["--quiet", "train", *arguments]) == 0
    report = json.loads((tmp_path / "outputs" / "evaluation_report.json").read_text())
    again = [
        "evaluate",
        "--checkpoint",
        str(tmp_path / "checkpoints" / "best_model"),
        "--output",
        str(tmp_path / "r.json"),
    ]
    assert main(["--quiet", *again, *arguments]) == 0
    second = json.loads((tmp_path / "r.json").read_text())
    assert second["evaluations"]["divergence"] == report["evaluations"]["divergence"]


@pytest.mark.usefixtures("quick_reports")
def test_resume_continues(local_model: Path, tmp_path: Path) -> None:
    assert main(["--quiet", "train", *settings(local_model, tmp_path, training__num_train_steps=2)]) == 0
    longer = settings(local_model, tmp_path, training__num_train_steps=4)
    assert main(["--quiet", "train", "--resume", *longer]) == 0
    rows = [json.loads(line) for line in (tmp_path / "outputs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    assert sum("calibration" in row for row in rows) == 1


@pytest.mark.usefixtures("quick_reports")
def test_a_new_run_sets_the_old_one_aside(local_model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["--quiet", "train", *settings(local_model, tmp_path, training__num_train_steps=0)]) == 0
    assert (tmp_path / "outputs" / "previous-1" / "metrics.jsonl").is_file()
    assert (tmp_path / "checkpoints" / "previous-1" / "best_model" / "adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("quick_reports")
@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_a_quantised_base_is_trained_on_a_cpu(bits: int, tmp_path: Path) -> None:
    overrides = settings(
        Path("builtin:tiny"), tmp_path, model__dtype="auto", **{f"optimization__use_{bits}bit": "true"}
    )
    assert main(["train", *overrides]) == 0
    report = json.loads((tmp_path / "outputs" / "evaluation_report.json").read_text())
    assert report["protocol"]["quantization"] == "bitsandbytes"
    assert report["protocol"]["dtype"] == "float32"  # of what is not quantised
    assert 0 < report["evaluations"]["divergence"]["mean_kl"] < 1


@pytest.mark.usefixtures("quick_reports")
def test_exact_needs_no_training(local_model: Path, tmp_path: Path) -> None:
    assert main(["--quiet", "train", *settings(local_model, tmp_path, model__carry="exact")]) == 0
    report = json.loads((tmp_path / "outputs" / "evaluation_report.json").read_text())
    assert report["model_config"]["trainable_parameters"] == 0
    assert report["evaluations"]["divergence"]["mean_kl"] < 1e-8


def test_generate_and_plot(run: Path, local_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = ["--checkpoint", str(run / "checkpoints" / "best_model"), "--max-new-tokens", "4"]
    assert main(["generate", "The cat", *checkpoint, "--set", f"model.base_model_name={local_model}"]) == 0
    assert "original" in capsys.readouterr().out
    assert main(["plot", "--output-dir", str(run / "outputs")]) == 0
    names = {p.stem for p in (run / "outputs" / "plots").glob("*.png")}
    assert names >= {"loss", "perplexity_ratio", "weight_delta", "learning_rate", "layer_error", "kl_histogram"}


def test_check_and_memory(local_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert "FAIL" not in capsys.readouterr().out
    memory = ["memory", "--set", f"model.base_model_name={local_model}"]
    assert main(memory) == 2
    assert "data.max_length=256 is above the model's context of 128 tokens" in capsys.readouterr().err
    assert main([*memory, "--set", "data.max_length=64"]) == 0
    assert "formed dW" in capsys.readouterr().out


BAD = [
    (["train", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    (["train", "--set", "model.rnak=3"], "model.rnak: unknown key; did you mean model.rank"),
    (
        ["train", "--set", "model.base_model_name=no-such-org/no-such-model"],
        "model.base_model_name='no-such-org/no-such-model'",
    ),
    (["evaluate", "--checkpoint", "nothing/best_model.pt"], "nothing/best_model.pt: no adapter folder"),
    (["generate", "hello"], "checkpoints/best_model: no adapter folder there"),
    (["plot", "--output-dir", "nothing"], "nothing: no metrics.jsonl"),
    (["train", "--set", "data.dataset_name=text", "--set", "data.data_files=[none.txt]"], "none.txt"),
    (["train", "--set", "data.calibration_files=[none.jsonl]"], "none.jsonl"),
    (["train", "--set", "training.report_to=[abacus]"], "training.report_to=['abacus']"),
    (["train", "--set", "model.base_model_name=builtin:huge"], 'model.base_model_name: "builtin:huge": no such name'),
    (["train", "--set", "data.dataset_name=builtin:novel"], 'data.dataset_name: "builtin:novel": no such name'),
    (["train", "--set", "data.eval_texts=[builtin:novel]"], "data.eval_texts"),
    (["train", "--set", "data.eval_texts=[none.txt]"], "none.txt"),
    (["train", "--resume"], "holds no checkpoint to resume"),
    (["memory", "--set", "model.base_model_name=no-such-org/no-such-model"], "no-such-org/no-such-model"),
    (["evaluate"], "--checkpoint"),
    (["fly"], "fly"),
]


@pytest.mark.parametrize("arguments,words", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["--quiet", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("npt:")]
    assert len(lines) == 1 and words in lines[0], lines
    assert not list(tmp_path.iterdir())


def script(name: str, *arguments: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a root entry point with this interpreter's environment active and the hub out of reach."""
    command = [str(REPOSITORY / name)] if name.endswith(".sh") else [sys.executable, str(REPOSITORY / name)]
    prefix = Path(sys.prefix)
    environment = {
        **os.environ,
        "VIRTUAL_ENV": str(prefix),
        "PATH": f"{prefix / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert (result.returncode == 0) == ok, result.stderr[-2000:]
    assert ok or "Traceback" not in result.stderr
    return result


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Called:
    """Runs a root script in this process, which has the libraries imported: (name, *arguments) -> status, output."""

    def call(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("sys.argv", [name, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / name), run_name="__main__")
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess([name, *arguments], ended.value.code, *capsys.readouterr())

    return call


def short_run(local_model: Path, folder: Path) -> list[str]:
    return settings(local_model, folder, data__dataset_name="self", training__num_train_steps=2)


@pytest.mark.parametrize(
    "name,first",
    [
        # test_distributed.py runs it under torchrun, and launch_training.sh starts it.
        pytest.param("train_npt_equivalence.py", ["--config", str(REPOSITORY / "config.yaml")], marks=pytest.mark.slow),
        ("launch_training.sh", ["--config", str(REPOSITORY / "config.yaml")]),
        ("launch_optimized.sh", ["small"]),
        pytest.param("launch_optimized.sh", ["optimized"], marks=pytest.mark.slow),  # test_the_optimized_script_trains
    ],
)
def test_documented_entry_points_train(name: str, first: list[str], local_model: Path, tmp_path: Path) -> None:
    result = script(name, *first, *short_run(local_model, tmp_path), cwd=tmp_path)
    assert "perplexity ratio" in result.stdout
    assert (tmp_path / "checkpoints" / "best_model" / "adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("quick_reports")
def test_the_optimized_script_trains(local_model: Path, tmp_path: Path, called: Called) -> None:
    """In this process; `launch_optimized.sh` starts it in one of its own."""
    first = ["--config", str(REPOSITORY / "config_optimized.yaml")]
    result = called("train_npt_optimized.py", *first, *short_run(local_model, tmp_path))
    assert result.returncode == 0 and "perplexity ratio" in result.stdout
    assert (tmp_path / "checkpoints" / "best_model" / "adapter_model.safetensors").is_file()


def test_documented_entry_points_around_training(run: Path, local_model: Path, tmp_path: Path, called: Called) -> None:
    arguments = [
        "--checkpoint", str(run / "checkpoints" / "best_model.pt"), "--config", str(REPOSITORY / "config.yaml"),
        "--output", str(tmp_path / "evaluation_report.json"), *settings(local_model, run),
    ]  # fmt: skip
    assert called("evaluate_npt.py", *arguments).returncode == 0
    assert json.loads((tmp_path / "evaluation_report.json").read_text())["protocol"]["tokens"] > 0
    assert "ok" in script("test_npt_setup.py", cwd=tmp_path).stdout
    memory = called("memory_efficiency_test.py")
    assert memory.returncode == 0 and "formed dW" in memory.stdout
    assert called("visualize_training.py", "--output-dir", str(run / "outputs")).returncode == 0


def test_scripts_fail_with_one_readable_line(called: Called) -> None:
    result = called("evaluate_npt.py", "--checkpoint", "checkpoints/best_model.pt")
    lines = [line for line in result.stderr.splitlines() if line.startswith("npt:")]
    assert result.returncode == 2 and len(lines) == 1 and "no adapter folder" in lines[0], result.stderr


@pytest.mark.parametrize(
    "name,arguments,words",
    [
        ("launch_optimized.sh", [], "small|optimized"),
        ("launch_optimized.sh", ["large"], "got 'large'"),
        ("launch_optimized.sh", ["optimized"], "meta-llama/Llama-2-7b-hf"),
        ("launch_training.sh", ["--set", "model.base_model_name=meta-llama/Llama-3.2-1B"], "meta-llama/Llama-3.2-1B"),
    ],
)
def test_entry_points_fail_with_one_readable_line(name: str, arguments: list[str], words: str, tmp_path: Path) -> None:
    result = script(name, *arguments, cwd=tmp_path, ok=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("npt:")]
    assert result.returncode == 2 and len(lines) == 1 and words in lines[0], result.stderr
