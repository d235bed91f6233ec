"""Adapters know their base and their format, and those of every format ever written load."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from npt import NPTConfig
from npt.adapters.folder import load_adapter
from npt.builtin import source_of
from npt.cli import main
from npt.common.fingerprint import base_fingerprint, base_record, difference, tensor_digest
from npt.errors import CheckpointError, ConversionError
from npt.tuner.config import FORMAT_VERSION
from scripts.adapter_fixture import ADAPTERS, logits
from tests.helpers import REPOSITORY, random_base, randomize

FIXTURES = REPOSITORY / "tests" / "fixtures" / "adapters"


def tiny(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(source_of("builtin:tiny"), dtype=dtype).eval()


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("v*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_adapters_of_every_format_load_and_compute_the_same(folder: Path) -> None:
    model = load_adapter(tiny(), folder)
    expected = torch.tensor(json.loads((folder / "expected.json").read_text()))
    torch.testing.assert_close(torch.tensor(logits(model)), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        if json.loads((folder / "adapter_config.json").read_text())["carry"] != "exact":
            assert (torch.tensor(logits(model)) - expected).abs().max() > 0.1


def test_there_are_fixtures_of_this_format() -> None:
    assert {path.name for path in (FIXTURES / f"v{FORMAT_VERSION}").iterdir()} == set(ADAPTERS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[1, 3], rank=3))
    randomize(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def edit(folder: Path, **values: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def other_base(change: str) -> Any:
    base = random_base("llama", torch.float32)
    with torch.no_grad():
        if change == "one weight":
            base.model.layers[0].self_attn.q_proj.weight[2, 3] += 1e-3
        if change == "epsilon":
            base.config.rms_norm_eps = 1e-5
        if change == "rounded":
            base.lm_head.weight.copy_(base.lm_head.weight.bfloat16())
    return base


@pytest.mark.parametrize(
    "change, words", [("one weight", "its weights are not the same"), ("epsilon", "rms_norm_eps is 1e-05 here and was 1e-06"),
                      ("rounded", "its weights are not the same")],
)  # fmt: skip
def test_another_base_of_the_same_sizes_is_an_error_with_an_override_by_name(
    change: str, words: str, saved: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"made for another base: {words}.*allow_other_base"):
        load_adapter(other_base(change), saved)
    with pytest.raises(ConversionError, match=words):
        PeftModel.from_pretrained(other_base(change), str(saved))
    model = load_adapter(other_base(change), saved, allow_other_base=True)
    model.save_pretrained(str(saved.parent / "again"))
    # Saved again, the adapter is that base's own, and the permission is not passed on.
    assert json.loads((saved.parent / "again" / "adapter_config.json").read_text())["allow_other_base"] is False
    load_adapter(other_base(change), saved.parent / "again")
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter(random_base("llama", torch.float32), saved.parent / "again")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same_base(dtype: torch.dtype, saved: Path) -> None:
    load_adapter(random_base("llama", torch.float32).to(dtype), saved)
    with pytest.raises(CheckpointError, match=r"its weights are not the same \(embedding\)"):
        load_adapter(random_base("llama", torch.float32, seed=7).to(dtype), saved)


def test_a_quantised_base_is_recognised_by_its_embedding() -> None:
    here = base_record(random_base("llama", torch.float32))
    assert here is not None
    packed = {**copy.deepcopy(here), "weights": "other"}
    packed["sample"]["last_matrix"] = None
    assert difference(here, packed) is None and difference(packed, here) is None
    packed["sample"]["embedding"][3] += 1
    assert difference(here, packed) == "its weights are not the same (embedding)"


def test_an_adapter_without_a_fingerprint_loads(saved: Path) -> None:
    load_adapter(random_base("llama", torch.float32), edit(saved, base_fingerprint=None))
    with pytest.raises((CheckpointError, ConversionError), match="base_fingerprint='x': npt writes it itself"):
        load_adapter(random_base("llama", torch.float32), edit(saved, base_fingerprint="x"))


def test_a_newer_format_is_refused(saved: Path) -> None:
    with pytest.raises(
        (CheckpointError, ConversionError), match=r"format_version=3: .* .*install the npt that wrote it"
    ):
        load_adapter(random_base("llama", torch.float32), edit(saved, format_version=3))


def test_other_adapters_in_the_base_count_while_they_are_at_work() -> None:
    plain = base_record(random_base("llama", torch.float32))
    with_lora = get_peft_model(random_base("llama", torch.float32), LoraConfig(r=2, target_modules=["q_proj"]))
    record = base_record(with_lora.get_base_model())
    assert record is not None and plain is not None
    assert difference(plain, record) == "other adapters are at work inside it: lora here, none there"
    assert {key for key in plain if plain[key] != record[key]} == {"inside"}
    with with_lora.disable_adapter():
        assert base_record(with_lora.get_base_model()) == plain
    npt = get_peft_model(random_base("llama", torch.float32), NPTConfig(rank=2))
    assert base_record(npt.get_base_model()) == plain
    assert base_fingerprint(npt) == base_fingerprint(random_base("llama", torch.float32))


def test_a_digest_sees_every_bit() -> None:
    for shape in ((3,), (5, 7), (70_001, 3), (2**16 + 3, 8)):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        first, places = tensor_digest(tensor), (0, tensor.numel() // 2, tensor.numel() - 1)
        for place in places:
            changed = tensor.clone().view(-1)
            changed.view(torch.int16)[place] ^= 1
            assert tensor_digest(changed.view(shape)) != first
        assert tensor_digest(tensor.clone()) == first
        # Parts of larger tensors, as a checkpoint read from disk may hold them.
        assert tensor_digest(torch.cat([torch.zeros(1, dtype=tensor.dtype), tensor.view(-1)])[1:].view(shape)) == first
    assert tensor_digest(torch.empty(0)) != tensor_digest(torch.empty(0, 2))


def test_on_the_meta_device_nothing_is_checked() -> None:
    assert base_record(random_base("llama", torch.float32).to("meta")) is None


def test_the_command_has_the_override(local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(local_model, tmp_path / "other")
    base = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    model = get_peft_model(base, NPTConfig(rank=2))
    model.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        base.lm_head.weight.mul_(1.5)
    model.unload().save_pretrained(str(other))
    command = ["generate", "a", "--max-new-tokens", "2", "--checkpoint", str(tmp_path / "adapter")]
    command += ["--set", f"model.base_model_name={other}"]
    assert main(command) == 2
    assert "made for another base: its weights are not the same" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--set", "model.allow_other_base=true"]) == 0
