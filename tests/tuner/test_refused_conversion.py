"""A conversion that is refused or breaks off leaves the model as it was; a second one is refused while the first is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

import npt.tuner.model
from npt import NPTConfig
from npt.block.hooks import BlockHooks
from npt.block.layer import NPTLayer
from npt.errors import ConversionError, NPTError
from npt.tuner.converted import npt_layers
from tests.helpers import random_base, randomize, transformers_own_adapters

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))


def state(base: Any) -> Any:
    """Everything that a conversion could leave behind."""
    modules = [(n, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in base.named_modules()]
    layers = [(layer.index, list(layer.npt_components), layer.active_adapters) for layer in npt_layers(base)]
    marks = {name: value for name, value in vars(base).items() if "peft" in name}
    return modules, layers, [(n, p.requires_grad) for n, p in base.named_parameters()], marks


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


WAYS: dict[str, Callable[[Any, NPTConfig, str], Any]] = {
    "peft": lambda base, config, name: get_peft_model(base, config, adapter_name=name),
    "injected": lambda base, config, name: inject_adapter_in_model(config, base, name),
    "transformers": lambda base, config, name: base.add_adapter(config, name),
}
EVERY_WAY = ["peft", "injected", pytest.param("transformers", marks=transformers_own_adapters)]
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "a dot": ({}, "v1.0", r"adapter name 'v1\.0': use letters, digits"),
    "a slash": ({}, "a/b", "adapter name 'a/b': use letters"),
    "a word of torch's": ({}, "train", "adapter name 'train': .* no word of torch's"),
    "a number": ({}, "2", "adapter name '2': .* no bare number"),
    "a part of a weight's name": ({}, "layers", "adapter name 'layers': is part of the name of a weight"),
    "a parameter's name": ({}, "A", "adapter name 'A': is part of the name of a weight"),
    "a block past the last": ({"npt_layers": [1, 9]}, "x", "the model has 4 blocks"),
    "a rank too large": ({"rank": 25}, "x", "rank=25 is larger than the model's hidden size 24"),
    "another base": ({"base_shape": [24, 40, 5]}, "x", "made for a base with"),
}


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_refusal_changes_nothing(wrong: str, way: str) -> None:
    base, (options, name, words) = random_base("llama", torch.float32).train(), WRONG[wrong]
    before, config = state(base), NPTConfig(**options)
    with pytest.raises(ConversionError, match=words):
        WAYS[way](base, config, name)
    assert state(base) == before
    WAYS[way](base, NPTConfig(rank=2), "x")
    assert [layer.index for layer in npt_layers(base)] == [2, 3]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_refused_further_adapter_changes_nothing(wrong: str) -> None:
    options, name, words = WRONG[wrong]
    model = get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[0, 1], rank=2))
    randomize(model)
    before, found = state(model.get_base_model()), logits(model)
    with pytest.raises(ConversionError, match=words):
        model.add_adapter(name, NPTConfig(**options))
    assert state(model.get_base_model()) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), found)


ERRORS = [torch.OutOfMemoryError("no memory"), KeyboardInterrupt(), RuntimeError("odd")]
PLACES = {
    "contract": (npt.tuner.model, "check_contract"),
    "component": (NPTLayer, "add_component"),
    "hooks": (BlockHooks, "_hook_modules"),
}


@pytest.fixture
def break_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, BaseException], None]:
    """Makes one call of a place raise, the second where it is called for each block."""

    def prepare(place: str, error: BaseException) -> None:
        owner, name = PLACES[place]
        function, calls = getattr(owner, name), []

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == (1 if place == "contract" else 2):
                raise error
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    return prepare


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_an_error_of_any_kind_changes_nothing(place: str, error: BaseException, break_off: Any) -> None:
    base = random_base("llama", torch.float32).train()
    before, expected = state(base), logits(base)
    break_off(place, error)
    with pytest.raises(type(error)):
        get_peft_model(base, NPTConfig(npt_layers="all", low_rank_at="projection"))
    assert state(base) == before
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_an_error_while_an_adapter_is_added_changes_nothing(place: str, error: BaseException, break_off: Any) -> None:
    model = get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[1], rank=2))
    randomize(model)
    before, found = state(model.get_base_model()), logits(model)
    break_off(place, error)
    with pytest.raises(type(error)):
        model.add_adapter("second", NPTConfig(npt_layers="all", rank=2, low_rank_at="projection"))
    assert state(model.get_base_model()) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_second_conversion_is_refused_until_the_first_is_taken_off(way: str, name: str) -> None:
    base = random_base("llama", torch.float32)
    original = logits(base)
    model = get_peft_model(base, NPTConfig(npt_layers=[1], rank=2))
    randomize(model)
    found, before = logits(model), state(base)
    with pytest.raises(
        ConversionError, match=r"this model has NPT blocks already, block 1 \(adapter.*unload\(\).*add_adapter"
    ):
        WAYS[way](base, NPTConfig(npt_layers=[2], rank=2), name)
    assert state(base) == before
    assert torch.equal(logits(model), found)
    assert torch.equal(logits(model.unload()), original)
    again = get_peft_model(base, NPTConfig(npt_layers=[2], rank=2))
    assert [layer.index for layer in npt_layers(again)] == [2]
    assert again.peft_config["default"].npt_layers == [2]


def test_adapters_put_in_directly_add_up_by_name_alone() -> None:
    base = random_base("llama", torch.float32)
    inject_adapter_in_model(NPTConfig(npt_layers=[1], rank=2), base, "one")
    inject_adapter_in_model(NPTConfig(npt_layers=[1, 2], rank=2), base, "two")
    assert [sorted(layer.npt_components) for layer in npt_layers(base)] == [["one", "two"], ["two"]]
    assert set(base.peft_config) == {"one", "two"}
    with pytest.raises(ConversionError, match="has an adapter 'two' already; give the new one another name"):
        inject_adapter_in_model(NPTConfig(rank=2), base, "two")
    with pytest.raises(ConversionError, match="NPT blocks already"):
        get_peft_model(base, NPTConfig(rank=2))


def test_the_callers_configuration_stays_as_it_is() -> None:
    config = NPTConfig(rank=2)
    first = get_peft_model(random_base("llama", torch.float32), config)
    assert (config.npt_layers, config.base_fingerprint, config.target_modules) == ("upper_half", None, None)
    assert first.peft_config["default"].npt_layers == [2, 3]
    second = get_peft_model(random_base("gpt2", torch.float32), config)
    second.peft_config["default"].rank = 7
    assert (config.rank, first.peft_config["default"].rank) == (2, 2)


def test_an_unloaded_base_trains_what_it_trained() -> None:
    base = random_base("llama")
    base.lm_head.requires_grad_(False)
    before = [(name, p.requires_grad) for name, p in base.named_parameters()]
    assert [(n, p.requires_grad) for n, p in get_peft_model(base, NPTConfig()).unload().named_parameters()] == before


def test_a_deleted_last_adapter_leaves_the_base_and_room_for_another() -> None:
    base = random_base("llama")
    before, original = [n for n, m in base.named_modules()], logits(base)
    model = get_peft_model(base, NPTConfig(rank=2))
    randomize(model)
    model.delete_adapter("default")
    assert torch.equal(logits(base), original)
    assert [n for n, m in base.named_modules()] == before
    model.add_adapter("default", NPTConfig(npt_layers=[1], rank=2))
    randomize(model)
    assert not torch.equal(logits(model), original)


def test_adding_an_adapter_does_not_stop_the_active_ones_training() -> None:
    model = get_peft_model(random_base("llama"), NPTConfig(rank=2))
    model.add_adapter("frozen", NPTConfig(rank=2, inference_mode=True))
    assert {name: flag for status in model.get_layer_status() for name, flag in status.requires_grad.items()} == {
        "default": True,
        "frozen": False,
    }
    with model.disable_adapter():
        pass
    assert model.get_model_status().requires_grad == {"default": True, "frozen": False}


def test_unknown_adapters_are_not_activated() -> None:
    model = get_peft_model(random_base("llama"), NPTConfig(rank=2))
    with pytest.raises(ConversionError, match="adapter 'x' does not exist; there are default"):
        model.base_model.set_adapter("x")
    assert model.base_model.active_adapters == ["default"]


def test_another_method_can_not_join() -> None:
    model = get_peft_model(random_base("llama"), NPTConfig(rank=2))
    before = state(model.get_base_model())
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("x", LoraConfig())
    with pytest.raises(NPTError, match="LoraConfig can't be added to an NPT model"):
        npt.tuner.model.NPTModel(random_base("llama"), {"x": LoraConfig()}, "x")
    assert state(model.get_base_model()) == before
