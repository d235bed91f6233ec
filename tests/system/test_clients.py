"""Common tools work on an NPT model as they are: pipeline, Trainer, TRL, lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from npt import NPTConfig, calibrate, load_base
from npt.cli import main
from npt.data import pack
from npt.data.batches import batches_of
from npt.errors import NPTError
from npt.evaluation.divergence import token_divergences
from npt.finetuning.low_rank import train_low_rank
from npt.tuner.card import MARK
from npt.tuner.converted import npt_layers

SENTENCES = [
    "One day, a little girl named Lily found a needle in her room.",
    "Tom had a red ball. He liked the ball.",
] * 8


def load(folder: Path) -> tuple[Any, Any]:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return base, AutoTokenizer.from_pretrained(folder)


def values(model: Any, own: bool) -> list[torch.Tensor]:
    return [p.detach().clone() for n, p in model.named_parameters() if ("npt_components" in n) is own]


def test_pipeline(local_model: Path, tmp_path: Path) -> None:
    base, tokenizer = load(local_model)
    expected = pipeline("text-generation", model=base, tokenizer=tokenizer)(
        "Tom had", max_new_tokens=8, do_sample=False
    )
    model = get_peft_model(base, NPTConfig(carry="exact"))
    for converted in (model, model.get_base_model()):
        writer = pipeline("text-generation", model=converted, tokenizer=tokenizer)
        assert writer("Tom had", max_new_tokens=8, do_sample=False) == expected
        assert len(writer(["Tom had", "One"], batch_size=2, max_new_tokens=4, do_sample=False)) == 2


def test_trainer_trains_the_components_only(local_model: Path, tmp_path: Path) -> None:
    """Phase 2 as anyone would do it: Trainer's own loss on an NPT model."""
    base, tokenizer = load(local_model)
    model = get_peft_model(base, NPTConfig(rank=2))
    frozen, own = values(model, False), values(model, True)
    train = pack(SENTENCES, tokenizer, 32)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.01, use_cpu=True, report_to=[],
        save_steps=2, logging_steps=1, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=train)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(frozen, values(model, False), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(own, values(model, True), strict=True))
    assert not model.get_base_model().model.training, "dropout of the frozen base is off, whatever the trainer does"
    loaded = PeftModel.from_pretrained(load(local_model)[0], str(tmp_path / "checkpoint-4")).eval()
    ids = torch.tensor([train[0]["input_ids"]])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_trl_sft_trainer(local_model: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    base, tokenizer = load(local_model)
    config = trl.SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.01, use_cpu=True, bf16=False,
        report_to=[], logging_steps=1, max_length=32, gradient_checkpointing=True, save_steps=3,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": SENTENCES})
    for model, options in (
        (get_peft_model(base, NPTConfig(rank=2)), {}),
        (load(local_model)[0], {"peft_config": NPTConfig(rank=2)}),
    ):
        trainer = trl.SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, **options)
        before = values(trainer.model, True)
        frozen = values(trainer.model, False)
        trainer.train()
        assert len(npt_layers(trainer.model)) == 2
        assert not any(torch.equal(a, b) for a, b in zip(before, values(trainer.model, True), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(frozen, values(trainer.model, False), strict=True))
        assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()


def test_trl_sft_trains_the_low_rank_part(local_model: Path, tmp_path: Path) -> None:
    """The trainer's own loss starts as the base's, and what makes the model equivalent stays."""
    trl = pytest.importorskip("trl")
    base, tokenizer = load(local_model)
    model = get_peft_model(base, NPTConfig(rank=2, gain="denominator", key="learned"))
    train_low_rank(model)
    config = trl.SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.01, use_cpu=True, bf16=False,
        report_to=[], logging_steps=1, max_length=32, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": SENTENCES})
    trainer = trl.SFTTrainer(model, config, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = trainer.evaluate()["eval_loss"]
    with model.disable_adapter():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(start, abs=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"A", "B_in", "B_down", "C_in", "C_down"}


def test_trl_dpo_trainer(local_model: Path, tmp_path: Path) -> None:
    """The low-rank part of a model that starts as the original: the reference is the same model without its adapter."""
    trl = pytest.importorskip("trl")
    base, tokenizer = load(local_model)
    model = get_peft_model(base, NPTConfig(rank=2, gain="denominator", key="learned"))
    train_low_rank(model)
    config = trl.DPOConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.01, use_cpu=True, bf16=False,
        report_to=[], logging_steps=1, max_length=48, save_steps=3, gradient_checkpointing=False,
    )  # fmt: skip
    prompts = [{"prompt": s[:12], "chosen": s[12:], "rejected": s[12:][::-1]} for s in SENTENCES]
    trainer = trl.DPOTrainer(
        model, args=config, train_dataset=datasets.Dataset.from_list(prompts), processing_class=tokenizer
    )
    before, frozen = values(trainer.model, True), values(trainer.model, False)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4), "policy and reference are one model at the start"
    assert losses[-1] < losses[0]
    assert any(not torch.equal(a, b) for a, b in zip(before, values(trainer.model, True), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(frozen, values(trainer.model, False), strict=True))
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple-choice task of 40 questions for the harness."""
    folder = tmp_path_factory.mktemp("task")
    names, things = ["Lily", "Tom", "Ben", "Mia"], ["ball", "cat", "box", "car", "hat"]
    rows = [
        {
            "question": f"{name} had a {thing}. {name} liked to play with the",
            "options": [thing, *(other for other in things if other != thing)][:3],
            "answer": 0,
        }
        for name in names
        for thing in things
    ] + [
        {
            "question": f"Once upon a time, there was a little {thing}. The",
            "options": [f"{thing} was", "of was"],
            "answer": 0,
        }
        for thing in [
            *things,
            "girl",
            "boy",
            "bird",
            "dog",
            "fish",
            "frog",
            "tree",
            "duck",
            "bear",
            "bug",
            "bee",
            "fox",
        ]
    ]
    for number, row in enumerate(rows):  # so that a constant guess is no good
        turn = number % len(row["options"])
        row["options"], row["answer"] = row["options"][-turn:] + row["options"][:-turn], turn
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "task.yaml").write_text(
        "task: local_choices\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{options}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
        encoding="utf-8",
    )
    return folder


def own_log_likelihoods(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[list[float], float]:
    """What `evaluate` scores text with, on each question's answers: (log-likelihoods, accuracy)."""
    found, right = [], 0
    for row in rows:
        scores = []
        question = tokenizer(row["question"])["input_ids"]
        for option in row["options"]:
            ids = tokenizer(row["question"] + " " + option)["input_ids"]
            labels = [-100] * len(question) + ids[len(question) :]
            block = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "labels": [labels]}
            tokens = token_divergences(model, datasets.Dataset.from_dict(block))
            scores.append(-float(tokens["npt_nll"].sum()))
        found += scores
        right += max(range(len(scores)), key=scores.__getitem__) == row["answer"]
    return found, right / len(rows)


@pytest.mark.usefixtures("own_tasks")
def test_harness_gives_the_accuracy_of_our_own_log_likelihoods(
    stories: Path, shared_dir: Path, choices: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Calibration alone, saved and loaded again: through the command, through Python, and through `evaluate`'s scores."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    import npt.integrations.lm_eval  # noqa: F401

    base, tokenizer = load(stories)
    model = get_peft_model(base, NPTConfig())
    texts = sorted((shared_dir / "data" / "text").glob("*.txt"))
    text = [path.read_text(encoding="utf-8")[:100_000] for path in texts[:2]]
    calibrate(model, batches_of(pack(text, tokenizer, 128, max_blocks=64), 16, torch.device("cpu")))
    model.save_pretrained(str(tmp_path / "adapter"))

    rows = [json.loads(line) for line in (choices / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    scores, accuracy = own_log_likelihoods(model.eval(), tokenizer, rows)
    assert 0.5 < accuracy < 1

    manager = TaskManager(include_path=str(choices))
    result = lm_eval.simple_evaluate(
        model="npt",
        model_args=f"peft={tmp_path / 'adapter'}",
        tasks=["local_choices"],
        task_manager=manager,
        batch_size=8,
    )
    assert result["results"]["local_choices"]["acc,none"] == accuracy
    harness = [float(pair[0]) for sample in result["samples"]["local_choices"] for pair in sample["filtered_resps"]]
    assert torch.allclose(torch.tensor(harness), torch.tensor(scores), atol=1e-4)

    arguments = ["--tasks", "local_choices", "--include_path", str(choices), "--output_path", str(tmp_path / "out")]
    assert main(["lm-eval", "--checkpoint", str(tmp_path / "adapter"), *arguments]) == 0
    (written,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(written.read_text())["results"]["local_choices"]["acc,none"] == accuracy
    assert "local_choices" in capfd.readouterr().out

    loader = f"pretrained={stories},peft={tmp_path / 'adapter'}"  # the harness's own way, which knows PEFT methods
    options = {"tasks": ["local_choices"], "task_manager": manager, "device": "cpu"}
    result = lm_eval.simple_evaluate(model="hf", model_args=loader, **options)
    assert result["results"]["local_choices"]["acc,none"] == accuracy


@pytest.mark.usefixtures("own_tasks")
def test_harness_on_a_builtin_base_and_a_wrong_adapter(choices: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    import npt.integrations.lm_eval  # noqa: F401

    manager = TaskManager(include_path=str(choices))
    result = lm_eval.simple_evaluate(
        model="npt", model_args="pretrained=builtin:tiny", tasks=["local_choices"], task_manager=manager, limit=4
    )
    assert 0 <= result["results"]["local_choices"]["acc,none"] <= 1
    arguments = ["--tasks", "local_choices", "--include_path", str(choices)]
    for wrong in (
        ["--model_args", f"peft={tmp_path}", *arguments],
        ["--model_args", "pretrained=builtin:tiny", "--tasks", "no_such_task"],
        ["--model_args", "dtype=float32", *arguments],
        ["--checkpoint", str(tmp_path), *arguments],
    ):
        assert main(["lm-eval", *wrong]) == 2


def test_a_checkpoint_becomes_a_model_argument(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from npt.integrations.lm_eval import _with_adapter

    get_peft_model(load_base("builtin:tiny")[0], NPTConfig(rank=1)).save_pretrained(str(tmp_path / "best_model"))
    folder = tmp_path / "best_model"
    given = ["--checkpoint", f"{folder}.pt"]
    for words, expected in (
        (["--tasks", "a"], ["--tasks", "a", "--model_args", f"peft={folder}"]),
        (["run", "-a", "dtype=float32", "-t", "a"], ["run", "-a", f"peft={folder}", "dtype=float32", "-t", "a"]),
        (["--model_args=dtype=float32", "-s"], [f"--model_args=peft={folder},dtype=float32", "-s"]),
    ):
        assert _with_adapter([*words, *given]) == _with_adapter([*given, *words]) == expected
    assert _with_adapter(["-a", "peft=x", "-t", "a"]) == ["-a", "peft=x", "-t", "a"]
    for wrong, message in (
        (["--checkpoint"], "names no folder"),
        (["--checkpoint", "nowhere"], "no adapter folder there"),
        ([*given, "-a", "peft=x"], "leave one of the two out"),
    ):
        with pytest.raises(NPTError, match=message):
            _with_adapter(wrong)


def test_harness_options_are_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(SystemExit) as stop:
        main(["lm-eval", "run", "--help"])
    assert stop.value.code == 0
    assert "--num_fewshot" in capfd.readouterr().out


def test_hub_layout_and_model_card(local_model: Path, tmp_path: Path) -> None:
    """What push_to_hub uploads is what save_pretrained writes; the card must be ours and valid, and a person's stays."""
    from huggingface_hub import ModelCard

    base, _ = load(local_model)
    model = get_peft_model(base, NPTConfig(npt_layers=[1, 2]))
    model.save_pretrained(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation" and "npt" in card.data.tags
    assert card.data.base_model is None, "a folder is no name on a hub"
    assert "blocks 1 and 2" in card.text and "| rank | 16 |" in card.text and "PeftModel.from_pretrained" in card.text
    assert "More Information Needed" not in card.text
    model.save_pretrained(str(tmp_path))
    assert ModelCard.load(tmp_path / "README.md").text.count(MARK) == 1
    mine = "---\nlicense: mit\n---\n\n# Mine\n"
    (tmp_path / "README.md").write_text(mine, encoding="utf-8")
    model.save_pretrained(str(tmp_path))
    assert "# Mine" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert MARK not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_card_names_a_hub_base(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    NPTConfig(npt_layers=[3], base_model_name_or_path="org/model-8b").save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/model-8b" and "# " not in card.data.base_model
    assert "NPT adapter for model-8b" in card.text
