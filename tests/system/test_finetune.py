"""`npt finetune`: chats to adapter and report, methods beside it, an adapter as the start, and exact resume."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from npt.builtin import model_folder
from npt.cli import main
from npt.config import load_config
from tests.distributed_worker import free_port
from tests.helpers import REPOSITORY, quick_reports

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SMALL: dict[str, Any] = {
    "data.max_length": 32, "data.num_eval_samples": 6, "training.batch_size": 4, "training.num_train_steps": 6,
    "training.logging_steps": 3, "training.eval_steps": 3, "training.save_steps": 3, "training.learning_rate": 0.01,
    "training.prediction_logging_steps": 6, "training.warmup_steps": 0, "model.rank": 3,
}  # fmt: skip


def sentences(count: int) -> list[str]:
    """Sentences of the same words in an order of their own each: no two blocks of them are alike."""
    chance, known = random.Random(0), ("the", "red", "cat", "saw", "a", "small", "dog", "near", "that", "old", "tree")
    return [" ".join(chance.choices(known, k=9)) for _ in range(count)]


def chats(count: int = 60) -> str:
    made = sentences(2 * count)
    rows = (
        {"messages": [{"role": "user", "content": made[i]}, {"role": "assistant", "content": made[count + i]}]}
        for i in range(count)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def words(model: Path, folder: Path, *more: str, **changes: Any) -> list[str]:
    values = {
        **SMALL,
        "model.base_model_name": model,
        "data.data_files": f"[{folder}/chats.jsonl]",
        "paths.output_dir": folder / "outputs",
        "paths.checkpoint_dir": folder / "checkpoints",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return ["--quiet", "finetune", *(w for k, v in values.items() for w in ("--set", f"{k}={v}")), *more]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """builtin:tiny with a chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    shutil.copytree(model_folder("builtin:tiny"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


#: Of the run that most tests read: every feature at once.
EVERY: dict[str, Any] = {
    "data__score": "replies", "finetuning__anchor_weight": 0.2, "finetuning__num_anchor_samples": 3,
    "finetuning__compare_learning_rates": "[0.01, 0.004]",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with LoRA and DoRA beside; tests only read it."""
    folder = tmp_path_factory.mktemp("finetuned")
    (folder / "chats.jsonl").write_text(chats())
    with quick_reports():
        assert main(words(tiny, folder, "--compare", "lora,dora", **EVERY)) == 0
    return folder


def report_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "outputs" / "finetune_report.json").read_text())
    return found


def rows_in(folder: Path, method: str = "") -> list[dict[str, Any]]:
    lines = (folder / "outputs" / method / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_it_starts_as_the_base_and_the_held_out_loss_falls(finished: Path) -> None:
    report = report_in(finished)
    start, methods = report["start"], report["methods"]
    assert abs(start["first_loss"] - start["first_base_loss"]) < 1e-4
    for method in ("npt", "lora", "dora"):
        gained = methods[method]["figures"]["text"]
        assert gained["loss_difference"] < -0.1 and gained["loss_difference_standard_error"] > 0
        assert gained["loss"] == pytest.approx(methods["base"]["figures"]["text"]["loss"] + gained["loss_difference"])
        lost = methods[method]["figures"]["builtin:python-docs"]
        assert lost["mean_kl"] > 0 and lost["mean_kl_standard_error"] > 0
        assert lost["perplexity_ratio_standard_error"] > 0
        first = rows_in(finished, "" if method == "npt" else method)
        assert next(row for row in first if "base_loss" in row)["language_loss"] == pytest.approx(start["first_loss"])


def test_each_method_has_its_own_learning_rate(finished: Path) -> None:
    methods = report_in(finished)["methods"]
    for method, rate in (("npt", 0.01), ("lora", 0.01), ("dora", 0.004)):
        rows = rows_in(finished, "" if method == "npt" else method)
        assert methods[method]["learning_rate"] == rate
        assert max(row["learning_rate"] for row in rows if "learning_rate" in row) == pytest.approx(rate)


def test_methods_are_of_about_as_many_parameters(finished: Path) -> None:
    methods = report_in(finished)["methods"]
    for method in ("lora", "dora"):
        state = load_file(finished / "checkpoints" / method / "best_model" / "adapter_model.safetensors")
        assert sum(x.numel() for x in state.values()) == methods[method]["trained_parameters"]
        per_rank = sum(x.numel() for name, x in state.items() if "magnitude" not in name) / methods[method]["rank"]
        assert abs(methods[method]["trained_parameters"] - methods["npt"]["trained_parameters"]) <= per_rank / 2
        config = json.loads((finished / "checkpoints" / method / "best_model" / "adapter_config.json").read_text())
        assert config["use_dora"] == (method == "dora") and len(config["target_modules"]) == 9


@pytest.mark.usefixtures("quick_reports")
def test_the_files_of_a_run(finished: Path) -> None:
    best, output = finished / "checkpoints" / "best_model", finished / "outputs"
    assert json.loads((best / "adapter_config.json").read_text())["peft_type"] == "NPT"
    assert load_config(best / "npt_run.yaml").finetuning.anchor_weight == 0.2
    assert len((output / "samples.jsonl").read_text().splitlines()) > 0
    page = (output / "report.html").read_text()
    for text in ("first loss", "LoRA", "DoRA", "lost: builtin:python-docs", "gained: held-out text of text"):
        assert text in page
    assert main(["report", str(output)]) == 0
    assert (output / "report.html").read_text() == page


def test_resume_is_exact_for_every_method(finished: Path, tiny: Path, tmp_path: Path) -> None:
    """The NPT adapter and LoRA were done when the run was stopped, DoRA was not."""
    folder = shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    shutil.rmtree(folder / "checkpoints" / "dora" / "checkpoint-6")
    (folder / "outputs" / "finetune_report.json").unlink()
    with quick_reports():
        assert main(words(tiny, folder, "--compare", "lora,dora", "--resume", **EVERY)) == 0
    for method in ("", "lora", "dora"):
        for place in (Path("checkpoint-6", "optimizer.safetensors"), Path("best_model", "adapter_model.safetensors")):
            a, b = (load_file(top / "checkpoints" / method / place) for top in (finished, folder))
            assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a), (method, place)
        assert [row["loss"] for row in rows_in(folder, method) if "loss" in row] == [
            row["loss"] for row in rows_in(finished, method) if "loss" in row
        ]
    a, b = (report_in(top)["methods"] for top in (finished, folder))
    assert {name: method["figures"] for name, method in a.items()} == {name: m["figures"] for name, m in b.items()}


def test_another_setting_on_resume_is_one_line(finished: Path, tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for changes, message in (
        ({"finetuning__anchor_weight": 0.3}, "finetuning.anchor_weight is 0.3 here and 0.2 in the checkpoint"),
        ({"finetuning__num_anchor_samples": 4}, "finetuning.num_anchor_samples is 4 here and 3"),
        ({"model__rank": 2}, "model.rank is 2 here and 3"),
        ({"data__score": "all"}, "the training text is another"),
    ):
        assert main(words(tiny, finished, "--compare", "lora,dora", "--resume", **{**EVERY, **changes})) == 2
        assert message in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("quick_reports")
def test_an_adapter_of_phase_1_goes_on(local_model: Path, finished_run: Path, tmp_path: Path) -> None:
    """Its options and its base hold; its carry and gain stay, bit for bit."""
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(80)))
    start = finished_run / "checkpoints" / "best_model"
    changes = {"finetuning__adapter": start, "training__num_train_steps": 4, "data__eval_texts": "[]"}
    arguments = words(local_model, tmp_path, "--compare", "lora", **changes)
    at = arguments.index(f"model.base_model_name={local_model}")
    arguments = [*arguments[: at - 1], *arguments[at + 1 :]]
    assert main(arguments) == 0
    report, rows = report_in(tmp_path), rows_in(tmp_path, "lora")
    assert report["start"]["adapter"] == str(start) and report["model_config"]["gain"] == "state"
    assert report["notes"] == ["data.eval_texts names no general text: what was lost there is not measured"]
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (start, tmp_path / "checkpoints" / "best_model")
    )
    for name, value in after.items():
        trained = name.rpartition(".")[2] in ("A", "B_in", "B_down")
        assert value.equal(before[name]) != trained, name
    assert main(arguments) == 0, "a new run in the same folders takes nothing from the earlier one"
    kept = ("step", "loss", "eval_loss")
    assert [[row.get(key) for key in kept] for row in rows_in(tmp_path, "lora")] == [
        [row.get(key) for key in kept] for row in rows
    ]
    assert (tmp_path / "outputs" / "lora" / "previous-1" / "metrics.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_train_as_one_does(fsdp: bool, tiny: Path, tmp_path: Path) -> None:
    """The same global batch; with DDP also DoRA beside it. A sharded base has no other methods beside it."""
    found = {}
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "chats.jsonl").write_text(chats())
        changes = {**EVERY, "training__batch_size": batch, "data__eval_texts": "[]"}
        changes["finetuning__compare_learning_rates"] = "[]"
        changes["optimization__fsdp"] = fsdp and processes > 1
        arguments = words(tiny, folder, *([] if fsdp else ["--compare", "dora"]), **changes)
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
        done = subprocess.run(
            [sys.executable, *(torchrun if processes > 1 else []), "-m", "npt.cli", *arguments],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = folder
    for method in [""] if fsdp else ["", "dora"]:
        for key in ("language_loss", "anchor_kl", "base_loss", "eval_loss"):
            one, two = ([row[key] for row in rows_in(found[n], method) if key in row] for n in (1, 2))
            assert one == pytest.approx(two, abs=1e-4) and one, (method, key)
    one, two = (report_in(found[n])["methods"] for n in (1, 2))
    for method in one:
        a, b = (of[method]["figures"]["text"] for of in (one, two))
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3), method
