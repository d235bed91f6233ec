"""GGUF files give the model and the tokenizer that were put into them, once, or one line that says why not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import npt
from npt import builtin
from npt.common import gguf as ours
from npt.common import precision
from npt.common.kept import RECORD, SOURCE
from npt.errors import NPTError
from tests.gguf_files import TEMPLATE, random_llama, vocabulary, write_gguf

IDS = torch.arange(2, 66)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("NPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@torch.no_grad()
def test_logits_are_those_of_the_safetensors_twin(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = random_llama(tie_word_embeddings=kind != "F16")
    twin = write_gguf(tmp_path / "m.gguf", original, kind)
    base, tokenizer = npt.load_base(str(tmp_path / "m.gguf"), dtype="float32")
    if kind == "F16":  # its vectors, which GGUF keeps in F32, follow its matrices
        for parameter in twin.parameters():
            parameter.copy_(parameter.half())
    expected, found, exact = twin(IDS).logits, base(IDS).logits, original(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    error = float((found - exact).norm() / exact.norm())
    assert error <= {"F32": 1e-6, "F16": 2e-3, "Q8_0": 0.03, "Q4_0": 0.3}[kind] and (kind == "F32") == (error < 1e-6)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == (kind != "F16")
    assert base.config.eos_token_id == tokenizer.eos_token_id == 1 and tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128
    monkeypatch.setattr(precision, "has_units", lambda *_: True)  # else it depends on this machine's processor
    assert npt.load_base(str(tmp_path), dtype="auto")[0].dtype == (torch.float16 if kind == "F16" else torch.float32)


def test_a_file_is_converted_once_until_it_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, random_llama())
    folder = ours.kept_gguf(path)
    assert folder.parent == cache and {p.name for p in cache.iterdir() if p.is_dir()} == {folder.name}
    assert builtin.name_of(str(folder)) == builtin.recorded_name(str(tmp_path)) == str(path)
    assert builtin.source_at_hand(str(path)) == str(folder)
    with monkeypatch.context() as patched:
        patched.setattr(ours, "write_model", None)
        patched.setattr(ours, "header_of", None)
        assert ours.kept_gguf(path) == ours.kept_gguf(path, tmp_path / "other cache") == folder
    write_gguf(path, random_llama(seed=1))
    os.utime(path, ns=(0, 7))
    assert builtin.source_at_hand(str(path)) == str(path), "the kept folder is of another file now"
    assert ours.kept_gguf(path) == folder
    assert json.loads((folder / RECORD).read_text())["changed"] == 7
    assert ours.kept_gguf(path, dtype="bfloat16") == folder, "float32 is there, and serves all"
    shutil.rmtree(folder)
    half = ours.kept_gguf(path, dtype="bfloat16")
    assert half != folder and json.loads((half / RECORD).read_text())[SOURCE] == str(path)
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    (half / "model.safetensors").write_bytes(b"")
    assert ours.find_gguf(path, dtype="bfloat16") is None, "a folder of which a part has gone"


def test_configuration_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, random_llama(), "Q8_0")
    config = ours.config_of(path)
    assert (config.hidden_size, config.num_hidden_layers, str(config.dtype)) == (64, 4, "torch.float32")
    assert not hasattr(config, "quantization_config") and ours.find_gguf(path) is None
    header = ours.header_of(path)
    assert header.parameters == sum(p.numel() for p in random_llama().parameters())


def test_numbers_are_split_into_digits_where_the_file_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ "Ġ1" is a merge that a vocabulary of single digits never meets."""
    for splitting, tokens in (("smollm", ["Ġ", "1", "2"]), ("gpt-2", ["Ġ1", "2"]), ("odd", ["Ġ1", "2"])):
        path = tmp_path / f"{splitting}.gguf"
        write_gguf(path, random_llama(), splitting=splitting)
        caplog.clear()
        tokenizer = ours.tokenizer_of(path, ours.header_of(path), 128)
        assert tokenizer.tokenize(" 12") == tokens
        assert len(tokenizer) == len(vocabulary()) and tokenizer.chat_template == TEMPLATE
        assert ("token ids may differ" in caplog.text) == (splitting == "odd")
        again = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / splitting))
        for text in (" 12 the", "the\n\n\tcafé ½ 日本", "<|bos|>the<|eos|>"):
            assert again(text).input_ids == tokenizer(text).input_ids
            assert tokenizer.decode(tokenizer(text).input_ids) == text


def _saved(tokenizer: object, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@torch.no_grad()
def test_llama_3_s_rotary_factors_become_its_scaling(tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # fmt: skip
    original = random_llama(rope_parameters=scaled)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = (plain / ROPE_INIT_FUNCTIONS["llama3"](original.config, "cpu")[0]).numpy().astype(np.float32)
    write_gguf(tmp_path / "m.gguf", original, more={"rope_freqs.weight": factors})
    base, _ = npt.load_base(str(tmp_path / "m.gguf"))
    assert base.config.rope_parameters == scaled
    torch.testing.assert_close(base(IDS).logits, original(IDS).logits, rtol=1e-5, atol=1e-5)
    write_gguf(tmp_path / "odd.gguf", original, more={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(NPTError, match=r"odd\.gguf: scales its rotary embedding by factors .* not those of Llama 3"):
        npt.load_base(str(tmp_path / "odd.gguf"))


def test_files_that_are_refused(tmp_path: Path, cache: Path) -> None:
    model = random_llama()
    path = tmp_path / "m.gguf"
    for options, words in (
        ({"architecture": "mamba2"}, "reads no GGUF of this architecture: name the Hugging Face model"),
        ({"scaling": "yarn"}, r"scales its rotary embedding \(yarn\), which transformers does not read"),
        (
            {"leave_out": "blk.1.ffn_up.weight"},
            r"1 of the model's weights are missing, first model\.layers\.1\.mlp\.up_proj",
        ),
    ):
        write_gguf(path, model, **options)
        with pytest.raises(NPTError, match=words) as raised:
            npt.load_base(str(path))
        assert str(raised.value).startswith("model.base_model_name=") and "\n" not in str(raised.value)
    write_gguf(path, model)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(NPTError, match="no whole GGUF file.*fetch it again"):
        npt.load_base(str(path))
    assert not cache.exists() or not [p for p in cache.iterdir() if p.is_dir()], "nothing half-made is left"
