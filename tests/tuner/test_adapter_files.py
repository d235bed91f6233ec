"""An adapter's file goes into a model whole or not at all, whoever reads it; what else PEFT offers works or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import NPTConfig
from npt.adapters.folder import load_adapter
from npt.errors import CheckpointError, ConversionError
from npt.tuner.converted import npt_layers
from tests.helpers import converted, random_base, randomize

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))
WEIGHTS = "adapter_model.safetensors"
BLOCK = "base_model.model.model.layers.2."
Tensors = dict[str, torch.Tensor]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def base() -> Any:
    return random_base("llama", torch.float32)


def of_block(values: Tensors, name: Callable[[str], str]) -> Tensors:
    return {name(key) if key.startswith(BLOCK) else key: value for key, value in values.items()}


CHANGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a block missing": (
        lambda v: {k: x for k, x in v.items() if not k.startswith(BLOCK)},
        rf"missing {BLOCK}neuroplastic\.npt_components\.A, .* and 8 more",
    ),
    "one missing": (lambda v: {k: x for k, x in v.items() if k != f"{BLOCK}neuroplastic.npt_components.e"}, r"missing .*\.e;"),
    "a block renamed": (lambda v: of_block(v, lambda k: k.replace("layers.2", "layers.9")), r"missing .*unknown .*layers\.9"),
    "another prefix": (lambda v: of_block(v, lambda k: k.replace("base_model.model", "model.base")), "unknown model.base"),
    "with the adapter's name": (lambda v: of_block(v, lambda k: k.replace("ts.", "ts.default.")), r"unknown .*default"),
    "one too many": (lambda v: {**v, "odd": torch.ones(2)}, "unknown .*odd"),
    "another shape": (lambda v: of_block(v, str) | {f"{BLOCK}neuroplastic.npt_components.e": torch.ones(7)}, "size mismatch"),
    "nothing": (lambda v: {}, "missing"),
    "NaN": (lambda v: {k: x * float("nan") if k.startswith(BLOCK) else x for k, x in v.items()}, "NaN or infinity in"),
}  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = get_peft_model(base(), NPTConfig(npt_layers=[1, 2], rank=2))
    randomize(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def damage(folder: Path, change: str) -> str:
    values, words = load_file(folder / WEIGHTS), CHANGES[change][1]
    save_file(CHANGES[change][0](values), folder / WEIGHTS, {"format": "pt"})
    return words


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_does_not_fit_leaves_the_base_as_it_was(change: str, saved: Path) -> None:
    whole = load_file(saved / WEIGHTS)
    words, model = damage(saved, change), base()
    expected = logits(model)
    with pytest.raises(CheckpointError, match=words):
        PeftModel.from_pretrained(model, str(saved))
    assert torch.equal(logits(model), expected)
    assert not npt_layers(model) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    save_file(whole, saved / WEIGHTS, {"format": "pt"})
    assert not torch.equal(logits(PeftModel.from_pretrained(model, str(saved))), expected)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_does_not_fit_leaves_other_adapters_as_they_were(change: str, saved: Path) -> None:
    model = PeftModel.from_pretrained(base(), str(saved))
    found, words = logits(model), damage(saved, change)
    for name in ("second", "default"):
        with pytest.raises(CheckpointError, match=words):
            model.load_adapter(str(saved), name)
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), found)


@pytest.mark.parametrize("change", ["a block missing", "one missing", "a block renamed"])
def test_transformers_own_load_adapter_takes_no_part_of_a_file(change: str, saved: Path, tmp_path: Path) -> None:
    model, whole = base(), load_file(saved / WEIGHTS)
    expected = logits(model)
    damage(saved, change)
    with pytest.raises(CheckpointError, match="of block 2: its weights are missing or have other names"):
        model.load_adapter(str(saved))
    assert torch.equal(logits(model), expected) and not npt_layers(model)
    save_file(whole, saved / WEIGHTS, {"format": "pt"})
    model.load_adapter(str(saved))
    found = logits(model)
    damage(saved, change)
    with pytest.raises(CheckpointError, match="the file of adapter 'second' holds no"):
        model.load_adapter(str(saved), adapter_name="second")
    assert torch.equal(logits(model), found) and list(model.peft_config) == ["default"]


def test_peft_refuses_a_part_of_a_state_too(saved: Path) -> None:
    model = PeftModel.from_pretrained(base(), str(saved))
    with pytest.raises(CheckpointError, match="missing"):
        set_peft_model_state_dict(model, {})


@pytest.mark.parametrize("name", ["npt", "default", "n"])
def test_an_adapters_name_does_not_matter(name: str, saved: Path) -> None:
    """PEFT warns of names that are part of the prefix of its parameters; nothing depends on that here."""
    expected = logits(PeftModel.from_pretrained(base(), str(saved)))
    model = PeftModel.from_pretrained(base(), str(saved), adapter_name=name)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(str(saved.parent / "again"))
    folder = saved.parent / "again" / ("" if name == "default" else name)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(folder))), expected)


CALLS: dict[str, Callable[..., Any]] = {
    "forward": lambda model, **more: model(IDS, **more),
    "generate": lambda model, **more: model.generate(input_ids=IDS, max_new_tokens=2, **more),
    "tuner": lambda model, **more: model.base_model(IDS, **more),
}


@pytest.mark.parametrize("call", CALLS)
def test_adapters_by_row_are_refused(call: str) -> None:
    model = converted("llama", torch.float32)
    CALLS[call](model)
    for more in ({"adapter_names": ["default", "__base__"]}, {"alora_offsets": [1, 1]}):
        with pytest.raises(ConversionError, match=r"one adapter for all rows of a batch; choose it with set_adapter"):
            CALLS[call](model, **more)


def test_status_names_method_and_state() -> None:
    model = get_peft_model(base(), NPTConfig(npt_layers=[1, 3], rank=2))
    model.add_adapter("second", NPTConfig(npt_layers=[3], rank=2))
    status = model.get_model_status()
    assert status.peft_types == {"default": "NPT", "second": "NPT"}
    assert (status.adapter_model_type, status.num_adapter_layers, status.enabled) == ("NPTModel", 2, True)
    assert (status.active_adapters, status.available_adapters) == (["default"], ["default", "second"])
    assert status.requires_grad == {"default": True, "second": False}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = model.get_layer_status()
    assert [(layer.name, layer.module_type) for layer in layers] == [
        (f"model.model.layers.{i}.neuroplastic", "NPTLayer") for i in (1, 3)
    ]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_methods_of_other_tuners_are_refused_with_a_reason() -> None:
    model = converted("llama")
    with pytest.raises(ConversionError, match=r"can't be added up with weights.*merge_adapters"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ConversionError, match="can't be merged"):
        model.unmerge_adapter()


# -- embeddings that come with an adapter ------------------------------------------------------------------------------


def resized(when: str, folder: Path) -> tuple[Any, Path, Path]:
    """(a converted model whose vocabulary was made larger in memory, its base's folder, its adapter's)."""
    base().save_pretrained(str(folder / "base"))
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if when == "before":
        model.resize_token_embeddings(99)
    model = get_peft_model(model, NPTConfig(npt_layers=[1, 2], rank=2)).eval()
    if when == "after":
        model.resize_token_embeddings(99)
    randomize(model)
    model.save_pretrained(str(folder / "adapter"))
    return model, folder / "base", folder / "adapter"


@pytest.mark.parametrize("when", ["before", "after"])
def test_embeddings_of_a_base_resized_in_memory_come_with_the_adapter(
    when: str, local_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, place, adapter = resized(when, tmp_path)
    found = logits(model)
    with pytest.raises(ConversionError, match=r"vocab_size is 96 here and was 99\. Load it on .*embeddings\(99\)"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place), str(adapter))
    again = AutoModelForCausalLM.from_pretrained(place)
    again.resize_token_embeddings(99)
    assert torch.equal(logits(PeftModel.from_pretrained(again, str(adapter))), found)
    assert torch.equal(logits(load_adapter(AutoModelForCausalLM.from_pretrained(place), adapter)), found)
    assert "embeddings for 99 tokens and its base has 96: the base is resized" in caplog.text
    # PEFT itself makes room for the tokens of a tokenizer beside the adapter.
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    with_tokens = AutoModelForCausalLM.from_pretrained(place)
    with_tokens.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(with_tokens, NPTConfig(npt_layers=[1, 2], rank=2)).eval()
    randomize(model)
    model.save_pretrained(str(tmp_path / "both"))
    tokenizer.save_pretrained(str(tmp_path / "both"))
    for _ in range(2):
        auto = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "both"))
        assert torch.equal(logits(auto), logits(model))
        auto.save_pretrained(str(tmp_path / "both"))


def test_another_base_of_that_size_needs_the_embeddings_in_the_file(tmp_path: Path) -> None:
    model, place, adapter = resized("before", tmp_path)
    model.save_pretrained(str(tmp_path / "bare"), save_embedding_layers=False)
    again = AutoModelForCausalLM.from_pretrained(place)
    again.resize_token_embeddings(99)
    expected = logits(again)
    with pytest.raises(ConversionError, match="made for another base: its weights are not the same"):
        PeftModel.from_pretrained(again, str(tmp_path / "bare"))
    assert torch.equal(logits(again), expected) and not npt_layers(again)
    with torch.no_grad():
        again.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ConversionError, match="made for another base: its weights are not the same"):
        PeftModel.from_pretrained(again, str(adapter))
    smaller = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        smaller.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    expected = logits(smaller)
    with pytest.raises(CheckpointError, match="made for another base"):
        load_adapter(smaller, adapter)
    assert torch.equal(logits(smaller), expected)
