"""The remedies that messages name lead somewhere: each is followed here, and then it works."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import NPTConfig, load_base
from npt.adapters.folder import find_adapter
from npt.cli import main
from npt.config import load_config
from npt.data import load_documents, pack, sample_blocks
from npt.data.sources import TextFiles
from npt.data.streaming import hub_source
from npt.errors import CheckpointError, DataError, NPTError

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def rows(path: Path, *values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def base(local_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(local_model, tmp_path / "base")


def said(error: type[Exception], call: Any, *arguments: Any, **options: Any) -> str:
    """The message of a call that is refused."""
    with pytest.raises(error) as found:
        call(*arguments, **options)
    return str(found.value)


def changed(file: Path, **changes: Any) -> None:
    """Other values in a JSON file; ... removes a key."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


# -- text ------------------------------------------------------------------------------------------------------------------


def test_a_chat_template_is_put_beside_the_tokenizer(tmp_path: Path, base: Path) -> None:
    chats = TextFiles([rows(tmp_path / "c.jsonl", {"messages": CHAT})])
    assert "put a chat_template.jinja into the model's folder" in said(
        DataError, pack, chats, AutoTokenizer.from_pretrained(base), 16
    )
    (base / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "user: Hello\nassistant: Good day\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert pack(chats, tokenizer, len(ids))["input_ids"][:] == [ids]


@pytest.mark.usefixtures("offline")
def test_another_column_than_the_chats(tmp_path: Path) -> None:
    """Whatever kind of data set names it, the message names the column of chats."""
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT], "n": [1]}), tmp_path / "c.parquet")
    rows(tmp_path / "set" / "train.jsonl", {"messages": CHAT, "n": 1})
    for column in ("body", "n"):
        options = {"text_column": column, "cache_dir": str(tmp_path / "cache")}
        for message in (
            said(DataError, TextFiles, [tmp_path / "c.parquet"], column),
            said(DataError, load_documents, str(tmp_path / "set"), **options),
            said(DataError, hub_source, str(tmp_path / "set"), None, column),
        ):
            assert (
                "name one with a chat in data.text_column: messages" in message and "there are: messages, n" in message
            )


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "set", "stream"])
@pytest.mark.usefixtures("offline")
def test_the_column_that_a_message_names_is_read(kind: str, tmp_path: Path) -> None:
    rows(tmp_path / "set" / "train.jsonl", {"id": 3, "body": "one"}, {"id": 4, "body": "two"})
    pyarrow.parquet.write_table(pyarrow.table({"id": [3, 4], "body": ["one", "two"]}), tmp_path / "t.parquet")

    def read(column: str) -> list[str]:
        if kind == "stream":
            return [row["text"] for row in hub_source(str(tmp_path / "set"), None, column)(0)]
        if kind == "set":
            return list(load_documents(str(tmp_path / "set"), text_column=column, cache_dir=str(tmp_path / "cache")))
        return list(TextFiles([tmp_path / {"jsonl": "set/train.jsonl", "parquet": "t.parquet"}[kind]], column))

    for wrong in ("text", "id"):
        message = said(DataError, read, wrong)
        (column,) = re.findall(r"name one with text in data.text_column: (\w+)", message)
        assert sorted(read(column)) == ["one", "two"]


@pytest.mark.usefixtures("offline")
def test_configurations_and_splits_of_data_sets(tmp_path: Path) -> None:
    cache, folder = str(tmp_path / "cache"), tmp_path / "several"
    rows(folder / "a.jsonl", {"text": "one"})
    names = "".join(f"- config_name: {name}\n  data_files: a.jsonl\n" for name in ("first", "second"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    for config in (None, "third"):
        message = said(DataError, load_documents, str(folder), dataset_config=config, cache_dir=cache)
        assert "'second'" in message and "name one of these in data.dataset_config" in message
        assert "name one of these in data.dataset_config" in said(DataError, hub_source, str(folder), config, "text")
    assert list(load_documents(str(folder), dataset_config="second", cache_dir=cache)) == ["one"]

    rows(tmp_path / "unsplit" / "test.jsonl", {"text": "two"})
    message = said(DataError, load_documents, str(tmp_path / "unsplit"), cache_dir=cache)
    assert "load_dataset(NAME, split=SPLIT).to_json(FILE)" in message
    from datasets import load_dataset

    load_dataset(str(tmp_path / "unsplit"), split="test", cache_dir=cache).to_json(str(tmp_path / "f.jsonl"))
    assert list(TextFiles([tmp_path / "f.jsonl"])) == ["two"]


@pytest.mark.parametrize("name", ["a.jsonl", "deep/er/a.parquet", "a.TXT"])
def test_the_files_of_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "d" / name).parent.mkdir(parents=True)
    (tmp_path / "d" / name).write_text('{"text": "one"}')
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "d" / name)
    message = said(DataError, TextFiles, [tmp_path / "d"])
    (pattern,) = re.findall("name its files, for example (.*)$", message)
    assert len(TextFiles([pattern])) == 1
    (tmp_path / "d" / name).rename(tmp_path / "x.docx")
    assert "it holds no file of a kind that is read (.txt" in said(DataError, TextFiles, [tmp_path / "d"])


# -- bases and adapters ----------------------------------------------------------------------------------------------------


def test_gguf(base: Path) -> None:
    """A folder that has a config.json beside a damaged file, the file, and its folder alone: no circle."""
    (base / "F.gguf").write_bytes(b"GGUF")
    (base / "model.safetensors").unlink()
    message = said(NPTError, load_base, str(base))
    (named,) = re.findall("its weights are in GGUF: name the file, (.*)$", message)
    for name in (named, str(base)):
        assert "is no whole GGUF file" in said(NPTError, load_base, name)
        (base / "config.json").unlink(missing_ok=True)


def test_a_file_of_a_model_and_a_folder_around_one(base: Path, tmp_path: Path) -> None:
    message = said(NPTError, load_base, str(base / "model.safetensors"))
    (named,) = re.findall("it lies in: (.*)$", message)
    assert load_base(named)
    cached = shutil.copytree(base, tmp_path / "models--org--name" / "snapshots" / "abc")
    for around in (cached.parents[1], cached.parent):
        (named,) = re.findall("name the folder in it that has one: (.*)$", said(NPTError, load_base, str(around)))
        assert load_base(named)
    (tmp_path / "alone.bin").write_bytes(b"x")
    assert "config.json, tokenizer and *.safetensors together" in said(NPTError, load_base, str(tmp_path / "alone.bin"))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "org/kernel", "magic"])
def test_attention_that_is_not_installed(key: str, kernel: str, base: Path) -> None:
    changed(base / "config.json", **{key: kernel})
    message = said(NPTError, load_base, str(base))
    assert f"take {key!r} out of its config.json" in message and "restore" not in message
    changed(base / "config.json", **{key: ...})
    assert load_base(str(base))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "hqq"])
def test_weights_of_a_quantisation_that_is_not_installed(method: str, base: Path) -> None:
    changed(base / "config.json", quantization_config={"quant_method": method, "bits": 4, "group_size": 8})
    message = said(NPTError, load_base, str(base))
    assert f"quantised with {method}: install the package for that, or name the model that they were made" in message
    assert "restore" not in message


def test_pickled_weights(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    message = said(NPTError, load_base, str(base))
    assert "pickle (pytorch_model.bin), which npt never reads" in message
    assert "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)" in message
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base)
    assert load_base(str(base))


def test_files_that_git_lfs_has_not_fetched(base: Path) -> None:
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "model.safetensors stands for a file that Git LFS has not fetched" in said(NPTError, load_base, str(base))


def test_a_folder_around_adapters_and_a_model_in_an_adapter_s_place(base: Path, tmp_path: Path) -> None:
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(base), NPTConfig(rank=2))
    for name in ("best_model", "checkpoint-4"):
        adapter.save_pretrained(str(tmp_path / "checkpoints" / name))
    message = said(CheckpointError, find_adapter, tmp_path / "checkpoints")
    (named,) = re.findall("name the adapter in it: (.*)$", message)
    assert find_adapter(named).name == "best_model"
    assert "it is a whole model: name it in model.base_model_name" in said(CheckpointError, find_adapter, base)


def test_a_token_to_begin_sampled_text_with(base: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        changed(base / name, bos_token_id=None, eos_token_id=None)
    changed(base / "tokenizer_config.json", bos_token=..., eos_token=...)
    model, tokenizer = load_base(str(base))
    message = said(DataError, sample_blocks, model, tokenizer, 1, 4, seed=0)
    assert "name one of its tokens as bos_token in its tokenizer_config.json" in message
    changed(base / "tokenizer_config.json", bos_token="<s>")
    model, tokenizer = load_base(str(base))
    assert sample_blocks(model, tokenizer, 1, 4, seed=0, progress=False)["input_ids"][0][0] == 1


def test_another_base_is_allowed_in_the_harness_too(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from npt.integrations.lm_eval import NPTLM

    get_peft_model(AutoModelForCausalLM.from_pretrained(base), NPTConfig(rank=2)).save_pretrained(str(tmp_path / "a"))
    changed(tmp_path / "a" / "adapter_config.json", base_fingerprint={"config": {"vocab_size": 7}})
    assert "model.allow_other_base=true" in said(CheckpointError, NPTLM, peft=str(tmp_path / "a"), device="cpu")
    assert NPTLM(peft=str(tmp_path / "a"), device="cpu", allow_other_base=True)


def test_a_bare_no_is_the_word() -> None:
    """A message asks for optimization.mixed_precision='no', whose quotes a shell takes away."""
    assert load_config(None, ["optimization.mixed_precision=no"]).optimization.mixed_precision == "no"


@pytest.mark.parametrize(
    "error", [ConnectionError("no such place"), ImportError("no module x"), FileNotFoundError("f")]
)
def test_what_the_harness_can_t_reach_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    from npt.integrations import lm_eval

    def refuse(self: Any, arguments: Any) -> None:
        raise error

    monkeypatch.setattr(lm_eval.HarnessCLI, "execute", refuse)
    assert main(["lm-eval", "--model_args", "pretrained=builtin:tiny", "--tasks", "x"]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("npt:")]
    assert len(lines) == 1 and str(error) in lines[0] and "check --tasks, --model_args" in lines[0]
