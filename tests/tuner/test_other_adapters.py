"""Adapters of other methods in a base: they belong to it, and nothing that is done to the NPT adapter reaches them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from npt import EquivalenceTrainer, NPTConfig, calibrate
from npt.common.fingerprint import base_fingerprint
from npt.data.sampling import sample_blocks
from npt.errors import ConversionError, NPTError
from npt.evaluation.divergence import token_divergences
from npt.tuner.converted import npt_layers
from tests.helpers import blocks, random_base, randomize, trainer, transformers_own_adapters

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))

OTHERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False),
    "dora": LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False, use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    "loha": LoHaConfig(target_modules=["o_proj"], r=2, init_weights=False),
    "head": LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False, modules_to_save=["lm_head"]),
}


def with_other(kind: str = "lora", name: str = "other") -> Any:
    """A PEFT model with another method's adapter at work, which has learned something."""
    torch.manual_seed(3)
    model = get_peft_model(random_base("llama", torch.float32), copy.deepcopy(OTHERS[kind]), adapter_name=name).eval()
    if kind == "head":
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save[name].weight.add_(0.3)
    return model


def convert(other: Any, **options: Any) -> Any:
    model = get_peft_model(other.get_base_model(), NPTConfig(**{"npt_layers": [1, 2], "rank": 2, **options}))
    randomize(model)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("kind", OTHERS)
def test_switched_off_saved_and_taken_off_without_touching_the_other(kind: str, tmp_path: Path) -> None:
    other = with_other(kind)
    before, trained = logits(other), [p.requires_grad for p in other.parameters()]
    model = convert(other)
    found = logits(model)
    assert not torch.equal(found, before)
    assert {"npt_components" in name for name, p in model.named_parameters() if p.requires_grad} == {True}
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model), before), "the inner context switched it on"
    assert torch.equal(logits(model), found)
    model.set_adapter("default")
    assert torch.equal(logits(model), found)
    model.save_pretrained(str(tmp_path))
    assert all("npt_components" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(model.unload()), before)
    assert [p.requires_grad for p in other.parameters()] == trained
    assert type(other.peft_config["other"]) is type(OTHERS[kind])


@pytest.mark.parametrize("kind", OTHERS)
def test_a_saved_adapter_wants_the_other_one_back_whatever_its_name(kind: str, tmp_path: Path) -> None:
    other = with_other(kind)
    other.save_pretrained(str(tmp_path))
    model = convert(other)
    found = logits(model)
    model.save_pretrained(str(tmp_path / "npt"))
    again = PeftModel.from_pretrained(random_base("llama", torch.float32), str(tmp_path / "other"), adapter_name="x")
    assert torch.equal(logits(PeftModel.from_pretrained(again.get_base_model(), str(tmp_path / "npt"))), found)
    with pytest.raises(ConversionError, match=r"other adapters are at work inside it: none here, .* there\. Load the"):
        PeftModel.from_pretrained(random_base("llama", torch.float32), str(tmp_path / "npt"))


def changed(change: str) -> Any:
    other = with_other()
    layer = other.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        if change == "one value":
            layer.lora_A["other"].weight[0, 0] += 1e-3
        if change == "scaling":
            layer.scaling["other"] *= 2
        if change == "switched off":
            other.base_model.disable_adapter_layers()
        if change == "merged":
            other.merge_adapter()
        if change == "another active":
            other.add_adapter("second", copy.deepcopy(OTHERS["lora"]))
            other.set_adapter("second")
    return other


@pytest.mark.parametrize("change", ["one value", "scaling", "switched off", "merged", "another active"])
def test_another_state_of_the_other_adapter_is_another_base(change: str, tmp_path: Path) -> None:
    convert(with_other()).save_pretrained(str(tmp_path))
    PeftModel.from_pretrained(changed("").get_base_model(), str(tmp_path))
    with pytest.raises(ConversionError, match="made for another base: .*(inside it|weights are not the same)"):
        PeftModel.from_pretrained(changed(change).get_base_model(), str(tmp_path))


def test_a_base_in_another_dtype_with_its_other_adapter_is_the_same(tmp_path: Path) -> None:
    convert(with_other()).save_pretrained(str(tmp_path))
    half = with_other().to(torch.bfloat16)
    PeftModel.from_pretrained(half.get_base_model(), str(tmp_path))
    with torch.no_grad():
        half = with_other()
        half.base_model.model.model.layers[3].self_attn.q_proj.lora_B["other"].weight.mul_(1.05)
    with pytest.raises(ConversionError, match="the lora adapter at work inside it is not the same"):
        PeftModel.from_pretrained(half.to(torch.bfloat16).get_base_model(), str(tmp_path))


def test_text_is_sampled_from_the_model_that_divergence_is_measured_against() -> None:
    other, npt = with_other(), convert(with_other())
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2)
    arguments: dict[str, Any] = {"num_blocks": 4, "max_length": 12, "seed": 1, "progress": False}
    expected = sample_blocks(other.get_base_model(), tokenizer, **arguments)
    assert sample_blocks(npt, tokenizer, **arguments)["input_ids"] == expected["input_ids"]
    exact = convert(with_other(), carry="exact")
    assert token_divergences(exact, expected)["kl"].max() < 1e-6
    assert base_fingerprint(npt) != base_fingerprint(convert(changed("scaling")))


def test_lora_on_an_npt_model_leaves_it_what_it_is(tmp_path: Path) -> None:
    """Also where both adapters have PEFT's default name."""
    model = get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[1, 2], rank=2))
    randomize(model)
    before = logits(model)
    lora = get_peft_model(model.get_base_model(), copy.deepcopy(OTHERS["lora"])).eval()
    found = logits(lora)
    assert not torch.equal(found, before)
    assert type(model.peft_config["default"]) is NPTConfig
    with lora.disable_adapter():
        assert torch.equal(logits(lora), before)
    assert torch.equal(logits(lora), found)
    lora.save_pretrained(str(tmp_path / "lora"))
    model.save_pretrained(str(tmp_path / "npt"))
    assert all("lora_" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert all("npt_" in key for key in load_file(tmp_path / "npt" / "adapter_model.safetensors"))
    assert [status.module_type for status in lora.get_layer_status()] == ["lora.Linear"] * 8
    assert [status.module_type for status in model.get_layer_status()] == ["NPTLayer"] * 2
    lora.add_adapter("second", copy.deepcopy(OTHERS["lora"]))
    lora.set_adapter("second")
    lora.delete_adapter("default")
    lora.unload()
    assert torch.equal(logits(model), before)


@transformers_own_adapters
def test_transformers_own_adapters_on_an_npt_model_leave_it_what_it_is() -> None:
    model = get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[1, 2], rank=2))
    randomize(model)
    before, base = logits(model), model.get_base_model()
    base.add_adapter(copy.deepcopy(OTHERS["lora"]), "default")
    found = logits(model)
    assert not torch.equal(found, before)
    base.disable_adapters()
    assert torch.equal(logits(model), before)
    base.enable_adapters()
    assert torch.equal(logits(model), found)
    base.delete_adapter("default")
    assert torch.equal(logits(model), before)


@transformers_own_adapters
def test_an_adapter_that_would_be_switched_off_by_its_own_way_in_is_refused() -> None:
    base = random_base("llama", torch.float32)
    base.add_adapter(copy.deepcopy(OTHERS["lora"]), "other")
    before = logits(base)
    with pytest.raises(ConversionError, match=r"would switch the lora adapter of this model off.*use get_peft_model"):
        base.add_adapter(NPTConfig(rank=2), "npt")
    assert torch.equal(logits(base), before)
    model = get_peft_model(base, NPTConfig(rank=2))
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def test_whole_modules_under_the_same_name_are_refused_with_a_remedy(tmp_path: Path) -> None:
    other = with_other("head", "default")
    with pytest.raises(ConversionError, match=r"lm_head .*modules_to_save.*adapter_name='npt'"):
        get_peft_model(other.get_base_model(), NPTConfig(rank=2))
    model = get_peft_model(other.get_base_model(), NPTConfig(rank=2), adapter_name="npt")
    model.save_pretrained(str(tmp_path))
    assert all("npt_components" in key for key in load_file(tmp_path / "npt" / "adapter_model.safetensors"))


def test_tensors_of_another_adapter_in_an_old_file_are_not_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = convert(with_other(name="default"))
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**load_file(path), key: torch.full((2, 24), 9.0)}, path, {"format": "pt"})
    loaded = PeftModel.from_pretrained(with_other(name="default").get_base_model(), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    assert "1 tensors of an adapter inside its base" in caplog.text


def thaw(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad = True


def test_a_trainer_that_would_train_the_base_too_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    model = convert(with_other())
    arguments = {"args": run.args, "train_dataset": blocks(), "eval_dataset": blocks(4)}
    EquivalenceTrainer(model, **arguments)
    thaw(model)
    with pytest.raises(
        NPTError, match=r"16 parameters beside the NPT components are trained too, first .*lora_A.*freeze"
    ):
        EquivalenceTrainer(model, **arguments)


FITS: dict[str, Callable[[Any], Any]] = {
    "calibration": lambda model: calibrate(model, [{"input_ids": IDS}]),
    "saving": lambda model: None,
}


@pytest.mark.parametrize("fit", FITS)
def test_the_record_is_of_the_base_that_the_adapter_was_fitted_to(fit: str, tmp_path: Path) -> None:
    """An adapter that was put in after the conversion counts once the NPT adapter has been fitted with it."""
    model = get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[1, 2], rank=2))
    get_peft_model(model.get_base_model(), copy.deepcopy(OTHERS["lora"]))
    FITS[fit](model)
    model.save_pretrained(str(tmp_path))
    if fit == "saving":
        PeftModel.from_pretrained(random_base("llama", torch.float32), str(tmp_path))
        return
    with pytest.raises(ConversionError, match="inside it: none here, lora there"):
        PeftModel.from_pretrained(random_base("llama", torch.float32), str(tmp_path))


def test_dtypes_of_the_other_adapter_stay() -> None:
    base = random_base("llama", torch.bfloat16)
    other = get_peft_model(base, copy.deepcopy(OTHERS["lora"]), autocast_adapter_dtype=False)
    model = convert(other)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert {p.dtype for layer in npt_layers(model) for p in layer.parameters()} == {torch.float32}
