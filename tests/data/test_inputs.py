"""What Python callers hand over as text, and the limits of a model that it has to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import NPTConfig, calibrate, evaluate
from npt.cli import main
from npt.common.limits import check_ids, context_of
from npt.data import pack
from npt.data.inputs import as_batches, documents_or_blocks
from npt.errors import DataError, NPTError
from npt.evaluation.generation import side_by_side
from tests.helpers import converted, random_base, settings, trainer

TEXT = "One text of several words, long enough for a block or two of sixteen tokens."


@pytest.fixture
def model(local_model: Path) -> tuple[Any, Any]:
    """(converted model, its byte-level tokenizer)."""
    base = AutoModelForCausalLM.from_pretrained(local_model)
    return get_peft_model(base, NPTConfig(npt_layers=[2], rank=2)), AutoTokenizer.from_pretrained(local_model)


def report_on(model: tuple[Any, Any], texts: Any, **more: Any) -> dict[str, Any]:
    return evaluate(*model, texts, **{"context_length": 16, "prompts": [], **more})


def read(source: Any) -> Any:
    found = documents_or_blocks(source, "texts")
    return found["input_ids"] if isinstance(found, datasets.Dataset) else list(found)


def test_text_in_every_form_is_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    table = datasets.Dataset.from_dict({"text": [TEXT]})
    for source in (
        TEXT, [TEXT], (TEXT,), (text for text in [TEXT]), Path("a.txt"), "a.txt", ["a.txt"], [Path("a.txt")],
        table, table.rename_column("text", "content"), table.to_iterable_dataset(), [{"text": TEXT}],
        DataLoader([TEXT], batch_size=None),
    ):  # fmt: skip
        assert read(source) == [TEXT], source


def test_token_ids_in_every_form_are_the_same_blocks() -> None:
    ids = torch.arange(12).reshape(3, 4)
    rows = [{"input_ids": row} for row in ids.tolist()]
    loader = DataLoader(
        rows, batch_size=2, collate_fn=lambda part: {"input_ids": torch.tensor([r["input_ids"] for r in part])}
    )
    for source in (
        ids, {"input_ids": ids}, rows, loader, datasets.Dataset.from_list(rows), ids.tolist(), list(ids),
        datasets.Dataset.from_list(rows).to_iterable_dataset(),
    ):  # fmt: skip
        assert read(source) == ids.tolist(), source
        assert torch.cat([torch.as_tensor(b["input_ids"]) for b in as_batches(source, None, 4, "x")]).equal(ids)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.txt", "missing.txt: no such file"),
        ("folder", "also the name of a file or folder.*Path\\('folder'\\)"),
        ([3.5], "float 3.5 is neither text nor token ids"),
        (None, "NoneType None is neither text"),
        ([TEXT, 3], "text and 3; give text alone"),
        (["a.txt", TEXT], "both names of files and"),
        ([TEXT, "a.txt"], "both names of files|text beside the name 'a.txt'"),
        ([{"body": TEXT}], "neither input_ids nor a column .text. or .messages. .there are: body."),
        (datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), "there are: a, b.*rename"),
        (torch.rand(2, 3), "Tensor .* is neither text nor token ids"),
    ],
)
def test_what_is_neither_is_named(source: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("a.txt").write_text(TEXT)
    with pytest.raises(DataError, match=words) as error:
        read(source)
    assert "\n" not in str(error.value)


def test_evaluate_and_calibrate_take_raw_text(
    model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    table = datasets.Dataset.from_dict({"text": [TEXT]})
    figures = calibrate(model[0], [TEXT], tokenizer=model[1])
    assert figures["layer_2"]["tokens"] == len(model[1](TEXT).input_ids) + 1
    tokens = [report_on(model, source)["protocol"]["tokens"] for source in ("a.txt", table)]
    assert tokens == [report_on(model, [TEXT])["protocol"]["tokens"]] * 2
    assert report_on(model, {"one": "a.txt", "two": table})["protocol"]["corpora"] == ["one", "two"]
    with pytest.raises(DataError, match=r"calibrate\(batches=...\): is text.*give tokenizer=TOKENIZER"):
        calibrate(model[0], ["some text"])
    calibrate(model[0], datasets.Dataset.from_dict({"input_ids": [[3, 4, 5, 6]] * 3}))
    calibrate(model[0], model[1](TEXT, return_tensors="pt"))
    with pytest.raises(NPTError, match="no text"):
        calibrate(model[0], [])


def test_a_single_text_is_one_document_and_one_prompt(model: tuple[Any, Any]) -> None:
    assert pack(TEXT, model[1], 8)[:] == pack([TEXT], model[1], 8)[:]
    assert len(side_by_side(*model, "Once upon", 2)) == 1
    samples = report_on(model, [TEXT], prompts="Once upon")["evaluations"]["generation_samples"]
    assert samples["prompts"] == ["Once upon"]


def test_a_trainer_with_raw_text_says_what_it_needs(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train_dataset = datasets.Dataset.from_dict({"text": [TEXT]})
    with pytest.raises(DataError, match=r"no input_ids \(columns text\); make blocks of text with npt.data.pack"):
        run.train()


# -- limits of the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lengths_beyond_the_context_are_refused_in_python(kind: str, tmp_path: Path, model: tuple[Any, Any]) -> None:
    npt = converted(kind, torch.float32)
    ids = torch.ones(1, 129, dtype=torch.long)
    for call in (
        lambda: calibrate(npt, [{"input_ids": ids}]),
        lambda: evaluate(npt, model[1], ids, prompts=[]),
        lambda: evaluate(npt, model[1], [TEXT], context_length=129, prompts=[]),
    ):
        with pytest.raises(DataError, match="129 is above the model's context of 128 tokens; lower it"):
            call()
    run = trainer(tmp_path, kind=kind)
    run.train_dataset = datasets.Dataset.from_dict({"input_ids": ids.repeat(8, 1).tolist()})
    with pytest.raises(DataError, match="training text: a length=129 is above"):
        run.train()


def test_tokens_without_an_embedding_are_refused_in_python(tmp_path: Path, model: tuple[Any, Any]) -> None:
    npt, tokenizer = model
    tokenizer.add_tokens(["<new>"])
    for call in (
        lambda: calibrate(npt, ["with a <new> token"], tokenizer=tokenizer),
        lambda: evaluate(npt, tokenizer, ["with a <new> token"], context_length=16, prompts=[]),
        lambda: evaluate(npt, tokenizer, [TEXT], context_length=16, prompts=["a <new> one"]),
        lambda: calibrate(npt, [{"input_ids": torch.tensor([[3, -1]])}]),
    ):
        with pytest.raises(
            DataError, match=r"token (259|-1)( \('<new>'\))? has no row in the model's embedding of 259; use"
        ):
            call()
    assert report_on(model, [TEXT])["protocol"]["tokens"], "an added token that the text does not use is no error"


def test_a_report_of_a_short_context_has_shorter_samples(model: tuple[Any, Any]) -> None:
    npt, tokenizer = model
    npt.config.max_position_embeddings = 20
    samples = side_by_side(npt, tokenizer, ["Once upon a time"], 48)
    assert samples[0]["tokens"] <= 20 - len(tokenizer("Once upon a time").input_ids)
    with pytest.raises(NPTError, match="prompt 1, .* model's context of 20"):
        report_on(model, [TEXT], prompts=["A prompt that is longer than that"])


def test_context_with_scaled_positions() -> None:
    config = random_base("llama").config
    assert context_of(config) == 128
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert context_of(config) == 512
    config.alibi = True
    assert context_of(config) is None
    check_ids([10**6], None, "unknown sizes are not checked")


@pytest.mark.parametrize(
    "source",
    [
        {"data__dataset_name": "text", "data__data_files": "[a.txt]"},
        {"data__dataset_name": "builtin:python-docs"},
        {"data__dataset_name": "text", "data__data_files": "[a.txt]", "data__streaming": "true"},
    ],
)
def test_every_source_of_text_asks_for_the_context(
    source: dict[str, Any], local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("npt.runs.train.convert_base", "npt.runs.evaluate.load_npt"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("the base was loaded"))
    Path("a.txt").write_text(f"{TEXT} " * 50)
    arguments = settings(local_model, tmp_path, data__max_length=129, **source)
    for command in (["train"], ["train", "--dry-run"]):
        assert main(["--quiet", *command, *arguments]) == 2
        assert "data.max_length=129 is above the model's context of 128 tokens" in capsys.readouterr().err


def test_added_tokens_are_found_before_the_base_is_loaded(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In text to train on, to calibrate on and to evaluate on, streamed or not."""
    import shutil

    base = shutil.copytree(local_model, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(str(base))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("npt.runs.train.convert_base", lambda *_: pytest.fail("the base was loaded"))
    Path("new.txt").write_text(f"{TEXT} <new> " * 50)
    Path("old.jsonl").write_text("".join(f'{{"text": "{n} {TEXT} {n}"}}\n' for n in range(90)))
    old = {"data__dataset_name": "text", "data__data_files": "[old.jsonl]", "data__score_seen_text": "true"}
    for more in (
        {"data__dataset_name": "text", "data__data_files": "[new.txt]"},
        {"data__dataset_name": "text", "data__data_files": "[new.txt]", "data__streaming": "true"},
        {**old, "data__eval_texts": "[new.txt]"},
        {**old, "data__calibration_files": "[new.txt]"},
    ):
        capsys.readouterr()
        assert main(["--quiet", "train", *settings(base, tmp_path, **more)]) == 2
        assert "token 259 ('<new>') has no row in the model's embedding of 259" in capsys.readouterr().err, more


def test_the_harness_asks_for_the_limits(local_model: Path, tmp_path: Path, model: tuple[Any, Any]) -> None:
    pytest.importorskip("lm_eval")
    from npt.integrations.lm_eval import NPTLM

    with pytest.raises(DataError, match="--model_args max_length=129 is above the model's context of 128"):
        NPTLM(pretrained=str(local_model), max_length=129, device="cpu")
    harness = NPTLM(pretrained=str(local_model), device="cpu")
    assert harness._model_call(torch.tensor([[3, 4]])).shape == (1, 2, 259)
    with pytest.raises(DataError, match="a task's text: token 259 .* has no row in the model's embedding"):
        harness._model_call(torch.tensor([[3, 259]]))
