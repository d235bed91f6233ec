"""`npt merge-adapters` joins what it is given, and misfits are refused in one line."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import NPTConfig, merge_adapters
from npt.adapters.folder import load_adapter
from npt.cli import main
from npt.config import load_config
from npt.errors import CheckpointError, NPTError, RunError
from npt.runs.corpora import trained_on
from npt.tuner.card import MARK, as_code
from tests.catalogue.entries import json_of, tensors
from tests.helpers import logits_of, quick_reports, settings

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "npt_run.yaml"
TEXTS = "seen_text.safetensors"
CLIP = 1e-3

# -- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(local_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of the command: block 1, blocks 2 and 3, and all three together."""
    folder = tmp_path_factory.mktemp("runs")
    for name, layers in (("low", "[1]"), ("high", "[2, 3]"), ("whole", "[1, 2, 3]")):
        options = {"model__npt_layers": layers, "training__objective": "local", "training__max_grad_norm": CLIP}
        with quick_reports():
            assert main(["--quiet", "train", *settings(local_model, folder / name, **options)]) == 0
    return folder


def of(runs: Path, name: str, which: str = "best_model") -> str:
    return str(runs / name / "checkpoints" / which)


def test_the_command_joins_what_it_trained(
    runs: Path, local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], token_ids: torch.Tensor
) -> None:
    joined = tmp_path / "new" / "joined"
    command = [of(runs, "low", "checkpoint-4"), of(runs, "high", "checkpoint-4"), "-o", str(joined)]
    capsys.readouterr()
    assert main(["merge-adapters", *command]) == 0
    out, err = capsys.readouterr()
    numbers = [sum(t.numel() for t in load_file(Path(folder) / WEIGHTS).values()) for folder in command[:2]]
    assert out.splitlines() == [
        f"block 1 of {command[0]}: {numbers[0]:,} parameters",
        f"blocks 2 and 3 of {command[1]}: {numbers[1]:,} parameters",
        f"adapter: {joined}, blocks 1 to 3: {sum(numbers):,} parameters",
    ]
    assert "has no npt_run.yaml that can be read" in " ".join(err.split())
    base = AutoModelForCausalLM.from_pretrained(local_model)
    whole = Path(of(runs, "whole", "checkpoint-4"))
    one, other = (logits_of(base.__class__.from_pretrained(local_model), f, token_ids) for f in (whole, joined))
    assert torch.equal(one, other)
    assert {p.name for p in joined.iterdir()} == {WEIGHTS, CONFIG, "README.md", TEXTS}
    assert [p.name for p in joined.parent.iterdir()] == ["joined"]


@pytest.mark.usefixtures("quick_reports")
def test_best_adapters_bring_tokenizer_and_record(
    runs: Path, local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = tmp_path / "joined"
    joined.mkdir()  # an empty folder will do
    assert main(["--quiet", "merge-adapters", of(runs, "low") + ".pt", of(runs, "high"), "--output", str(joined)]) == 0
    assert capsys.readouterr().err == ""
    record, whole = (load_config(Path(f) / RECORD) for f in (joined, of(runs, "whole")))
    assert record.model == whole.model and record.training == whole.training and record.data == whole.data
    assert trained_on(whole.data, joined)
    assert AutoTokenizer.from_pretrained(joined)("a cat").input_ids
    assert not (joined / "best.json").exists()
    report = tmp_path / "report.json"
    arguments = ["--checkpoint", str(joined), "--output", str(report), *settings(local_model, tmp_path)]
    assert main(["--quiet", "evaluate", *arguments]) == 0
    assert json.loads(report.read_text())["model_config"]["npt_layers"] == [1, 2, 3]


def test_the_card_says_where_blocks_came_from(runs: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(of(runs, "low"), tmp_path / "a`b\n# <b>loud" / "best_model")
    (odd / "README.md").write_text("My own words.")
    joined = merge_adapters([odd, of(runs, "high")], tmp_path / "joined")
    text = (joined / "README.md").read_text()
    assert MARK in text and "My own words" not in text
    assert f"- block 1: `` {tmp_path.name}/a`b # <b>loud/best_model ``\n" in text
    assert "- blocks 2 and 3: `high/checkpoints/best_model`\n" in text
    assert "In blocks 1 to 3 of" in text
    assert ModelCard.load(joined / "README.md").data.library_name == "peft"


def test_code_holds_any_name() -> None:
    assert as_code("plain") == "`plain`"
    assert as_code("``") == "``` `` ```"
    assert as_code("a\n\x1b[31mb") == "`a \\x1b[31mb`"


# -- what can't be joined ------------------------------------------------------------------------------------------------

Change = Callable[[Path], object]


@pytest.fixture
def pair(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with copies `a` of block 1 and `b` of blocks 2 and 3."""
    for name, run in (("a", "low"), ("b", "high")):
        shutil.copytree(of(runs, run), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(words: list[str], *folders: str, output: str = "joined", error: type[NPTError] = CheckpointError) -> None:
    """One line with these words, from the library and from the command; not a file is touched."""
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    places = sorted(Path().rglob("*"))
    with pytest.raises(error) as caught:
        merge_adapters(folders, output)
    assert "\n" not in str(caught.value) and not [word for word in words if word not in str(caught.value)], caught.value
    assert main(["--quiet", "merge-adapters", *folders, "-o", output]) == 2
    assert sorted(Path().rglob("*")) == places and all(p.read_bytes() == data for p, data in before.items())


def option(**changes: Any) -> Change:
    return json_of(CONFIG, **changes)


def fingerprint(**changes: Any) -> Change:
    """Another record of the base; no `weights` and the like where ... is given."""

    def change(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        values["base_fingerprint"] = {k: v for k, v in (values["base_fingerprint"] | changes).items() if v is not ...}
        (folder / CONFIG).write_text(json.dumps(values))

    return change


def renamed(values: dict[str, torch.Tensor]) -> None:
    values["base_model.model.lm_head.lora_A.weight"] = torch.ones(2, 2)


def drop(values: dict[str, torch.Tensor]) -> None:
    del values[next(name for name in sorted(values) if name.endswith("layers.3.neuroplastic.npt_components.c"))]


def halved(values: dict[str, torch.Tensor]) -> None:
    values.update({name: value.bfloat16() for name, value in values.items()})


UNFIT: dict[str, tuple[Change, list[str]]] = {
    "LoRA": (option(peft_type="LORA"), ["it is a LORA adapter, not NPT", "load it with peft"]),
    "a newer format": (option(format_version=99), ["format_version=99", "install the npt that wrote it"]),
    "another format": (option(format_version=0), ["format_version=0", "a has 2", "train them with the same"]),
    "another rank": (option(rank=4), ["A has the shape [24, 3]", "rank=4"]),
    "another key": (option(key="learned"), ["key=learned", "a has input", "train them with the same"]),
    "another carry": (option(carry="none"), ["carry=none", "a has diagonal"]),
    "another gain": (option(gain="norm"), ["gain=norm", "a has state"]),
    "another site": (option(low_rank_at="projection"), ["low_rank_at=projection", "a has input"]),
    "another scale": (option(modulation_scale=2.0), ["modulation_scale=2.0", "a has 1.0"]),
    "other projections": (option(target_projections=["up"]), ["target_projections=['up']", "a has"]),
    "other blocks in its config": (option(npt_layers=[0, 2]), ["target_modules=", "npt_layers=[0, 2]", "restore"]),
    "a word for blocks": (option(npt_layers="all"), ["npt_layers=all", "restore"]),
    "blocks of two kinds": (option(target_modules=["model.layers.2", "h.3"]), ["target_modules=", "restore"]),
    "no names of blocks": (option(target_modules=...), ["target_modules=None", "restore"]),
    "other sizes": (option(base_shape=[32, 40, 4]), ["base_shape=[32, 40, 4]", "a ([24, 40, 4])", "one base"]),
    "another base": (
        fingerprint(config={"vocab_size": 7}), ["another base than a: vocab_size is 7 here and was 259", "one base"],
    ),
    "other weights of the base": (fingerprint(weights="0" * 64), ["its weights are not the same", "one base"]),
    "another base's name, no fingerprint": (
        option(base_fingerprint=None, base_model_name_or_path="other"), ["'other'", "b has no base_fingerprint"],
    ),
    "another family's blocks": (
        lambda folder: (
            option(target_modules=["h.2", "h.3"])(folder),
            tensors(WEIGHTS, lambda v: [v.update({k.replace("model.layers", "h"): v.pop(k)}) for k in list(v)])(folder),
        ),
        ["its blocks are h, those of a model.layers", "one base"],
    ),
    "a weight too many": (tensors(WEIGHTS, renamed), ["lora_A", "no weight of its blocks 2 and 3", "npt wrote"]),
    "a weight too few": (tensors(WEIGHTS, drop), ["lacks", "layers.3.neuroplastic.npt_components.c", "npt wrote"]),
    "no weights": (tensors(WEIGHTS, dict.clear), ["holds nothing for its blocks 2 and 3", "npt wrote"]),
    "another dtype": (tensors(WEIGHTS, halved), ["its weights are bfloat16", "a float32", "model.dtype"]),
    "NaN": (tensors(WEIGHTS, lambda v: v[min(v)].fill_(float("nan"))), ["NaN", "take an earlier checkpoint"]),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:99]), ["is damaged", "backup"]),
    "no config": (lambda f: (f / CONFIG).unlink(), [f"{CONFIG} is missing", "save_pretrained wrote"]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_go_together_is_one_line(name: str, pair: Path) -> None:
    change, words = UNFIT[name]
    change(pair / "b")
    fails(["checkpoint b", *words], "a", "b")


def test_too_few_and_the_same_folder(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(["a: nothing to join", "two adapter folders or more"], "a", error=NPTError)
    with pytest.raises(NPTError, match="no folder: nothing to join"):
        merge_adapters([], "joined")
    fails(["checkpoint a: is named twice, also as a;", "once"], "a", "b", "a")
    os.symlink("a", "c")
    fails(["checkpoint c: is named twice, also as a;"], "b", "a", "c")
    fails(["checkpoint nowhere: no adapter folder there"], "a", "nowhere")


def test_overlapping_blocks_are_named(pair: Path, runs: Path) -> None:
    shutil.copytree(of(runs, "whole"), "c")
    fails(["checkpoint c: its blocks 1 to 3 and those of b, 2 and 3, overlap in 2 and 3", "leave one"], "b", "c")
    shutil.copytree("a", "d")
    fails(["checkpoint d: its block 1 and those of a, 1, overlap in 1"], "b", "a", "d")


def test_the_output_is_a_place_of_its_own(pair: Path) -> None:
    fails(["--output=a: is there and not empty", "name a new folder"], "a", "b", output="a", error=NPTError)
    fails(["--output=b/new: is in b, one of the adapters"], "a", "b", output="b/new", error=NPTError)
    Path("full").mkdir()
    Path("full/note").write_text("mine")
    fails(["--output=full: is there and not empty"], "a", "b", output="full", error=NPTError)
    fails(["--output=full/note/x: can't be made", "is a file"], "a", "b", output="full/note/x", error=NPTError)
    shutil.copytree("a", "joined.part")
    fails(["--output=joined: is in joined.part, one of the adapters"], "joined.part", "b", error=NPTError)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written(pair: Path) -> None:
    Path("closed").mkdir(mode=0o500)
    fails(["--output=closed/x: closed can't be written to"], "a", "b", output="closed/x", error=NPTError)


def test_a_full_disk_leaves_nothing(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("npt.adapters.join.save_config", full)
    with pytest.raises(RunError, match=r"joined: the disk is full.*make room and do it again") as caught:
        merge_adapters(["a", "b"], "joined")
    assert "--resume" not in str(caught.value)
    assert sorted(p.name for p in pair.iterdir()) == ["a", "b"]


def test_an_adapter_of_another_method_and_one_with_lora_beside(pair: Path, local_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(local_model)
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2))
    lora.save_pretrained("lora")
    fails(["checkpoint lora: it is a LORA adapter, not NPT"], "a", "lora")
    npt = get_peft_model(lora.get_base_model(), NPTConfig(npt_layers=[2, 3], rank=3))
    npt.save_pretrained("both")
    weights = load_file("both/" + WEIGHTS) | load_file("lora/" + WEIGHTS)
    save_file(weights, "both/" + WEIGHTS, {"format": "pt"})
    fails(["checkpoint both:", "lora_A", "no weight of its blocks 2 and 3"], "a", "both")


# -- what is told, and joined all the same ---------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture, *folders: str) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "npt"):
        merge_adapters(folders, "joined")
    return caplog.text


@pytest.mark.parametrize("bare", ["a", "b"])
@pytest.mark.parametrize("how", [option(base_fingerprint=None), option(base_fingerprint={}), fingerprint(weights=...)])
def test_an_adapter_without_a_fingerprint(
    bare: str, how: Change, pair: Path, local_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how(pair / bare)
    assert f"{bare} has no base_fingerprint: that it was made for the same weights" in told(caplog, "a", "b")
    config = json.loads((pair / "joined" / CONFIG).read_text())
    assert set(config["base_fingerprint"]) >= {"config", "dtype", "weights", "sample"}
    load_adapter(AutoModelForCausalLM.from_pretrained(local_model), "joined")


def test_one_base_under_two_names(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    option(base_model_name_or_path="elsewhere")(pair / "b")
    assert told(caplog, "a", "b") == ""


def record(folder: Path, **changes: Any) -> None:
    """Changes in an adapter's record: section__key=value."""
    values = yaml.safe_load((folder / RECORD).read_text())
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    (folder / RECORD).write_text(yaml.safe_dump(values))


def test_records_that_differ_in_what_jobs_may_differ_in(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    record(pair / "b", training__seed=5, paths__cache_dir="c", wandb__project="p")
    assert told(caplog, "a", "b") == ""
    assert load_config(pair / "joined" / RECORD).model.npt_layers == [1, 2, 3]


@pytest.mark.parametrize(
    "change,words",
    [
        ({"data__num_train_samples": 47}, "b was trained with another data.num_train_samples than a"),
        ({"training__learning_rate": 0.5}, "b was trained with another training.learning_rate than a"),
        ({"training__learning_rate": "fast"}, "b has no npt_run.yaml that can be read"),
    ],
)
def test_records_that_disagree_are_left_out(
    change: dict[str, Any], words: str, pair: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(pair / "b", **change)
    merge_adapters(["a", "b"], "joined")
    assert words in caplog.text and "gets no npt_run.yaml" in caplog.text
    assert not (pair / "joined" / RECORD).exists()
    other = load_config(None, ["data.dataset_name=text", "data.data_files=other.txt"])
    assert trained_on(other.data, pair / "joined")  # unknown, so taken as if it were


def test_logits_is_not_trained_apart(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        record(pair / name, training__objective="auto")
    assert "b was trained with objective auto beside the original's other blocks" in told(caplog, "a", "b")


def test_exact_has_no_weights_to_join(pair: Path, local_model: Path, token_ids: torch.Tensor) -> None:
    for name, layers in (("x", [0]), ("y", [2, 3]), ("z", [0, 2, 3])):
        base = AutoModelForCausalLM.from_pretrained(local_model)
        get_peft_model(base, NPTConfig(npt_layers=layers, carry="exact")).save_pretrained(name)
    merge_adapters(["x", "y"], "joined")
    one, other = (
        logits_of(AutoModelForCausalLM.from_pretrained(local_model), Path(name), token_ids) for name in ("joined", "z")
    )
    assert torch.equal(one, other)
