"""Conversion holds its contract: exact where it must be, strict, switchable, right with caches, the base untouched."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from npt import NPTConfig
from npt.block.component import NPComponent
from npt.block.families import FAMILIES, Family, register_family, resolve_layers
from npt.block.layer import NPTLayer
from npt.block.modes import Mode, running_as, watching
from npt.block.probing import probe_norm
from npt.errors import ConversionError
from npt.tuner.converted import active_layers, npt_layers
from tests.families import CASES
from tests.helpers import converted, random_base

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])


@KINDS
@torch.no_grad()
def test_exact_equals_the_unconverted_model(kind: str, token_ids: torch.Tensor) -> None:
    base = random_base(kind)
    expected = base(token_ids).logits
    model = get_peft_model(base, NPTConfig(npt_layers="all", carry="exact"))
    torch.testing.assert_close(model(token_ids).logits, expected, rtol=1e-10, atol=1e-10)
    assert model.get_nb_trainable_parameters()[0] == 0


@KINDS
@torch.no_grad()
def test_strict_attention_reaches_the_stream_only_through_the_component(kind: str, token_ids: torch.Tensor) -> None:
    """With every value zeroed in all blocks, logits at a position can't depend on earlier tokens."""
    model = converted(kind)
    for layer in active_layers(model):
        for parameter in layer.component.parameters():
            parameter.zero_()
    changed = token_ids.clone()
    changed[:, :5] = (changed[:, :5] + 7) % 96
    assert torch.equal(model(token_ids).logits[:, 5:], model(changed).logits[:, 5:])
    assert not torch.equal(model(token_ids).logits[:, :5], model(changed).logits[:, :5])
    intact = converted(kind)
    assert not torch.equal(intact(token_ids).logits[:, 5:], intact(changed).logits[:, 5:])


@KINDS
@torch.no_grad()
def test_norm_reads_the_block_input(kind: str, token_ids: torch.Tensor) -> None:
    """The input of the MLP's norm equals the block's input in every converted block."""
    model = converted(kind)
    seen: dict[int, list[torch.Tensor]] = {}
    for layer in active_layers(model):
        seen[layer.index] = []
        layer.get_base_layer().register_forward_pre_hook(lambda m, x, s=seen[layer.index]: s.append(x[0]))
        layer.module("norm").register_forward_pre_hook(lambda m, x, s=seen[layer.index]: s.append(x[0]))
    model(token_ids)
    assert all(torch.equal(*pair) for pair in seen.values()) and len(seen) == 4


@KINDS
def test_base_stays_frozen_and_in_eval_mode(kind: str) -> None:
    model = converted(kind)
    model.train()
    inside = {id(m) for layer in npt_layers(model) for m in layer.modules()}
    training = [name for name, m in model.base_model.model.named_modules() if m.training and id(m) not in inside]
    assert training == []
    assert all(layer.component.training for layer in active_layers(model))
    own = {id(p) for layer in npt_layers(model) for p in layer.parameters()}
    assert all(p.requires_grad == (id(p) in own) for p in model.parameters())


def test_gpt2_dropout_stays_off(token_ids: torch.Tensor) -> None:
    base = random_base("gpt2")
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in base.modules())
    model = get_peft_model(base, NPTConfig())
    model.train()
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, model(token_ids).logits)


@KINDS
@torch.no_grad()
def test_cached_generation_equals_uncached_with_left_padding(kind: str) -> None:
    model = converted(kind, torch.float32)
    ids = torch.randint(1, 96, (3, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    cached = model.generate(input_ids=ids, use_cache=True, **arguments)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **arguments))
    alone = model.generate(input_ids=ids[:1, 4:], use_cache=True, **{**arguments, "attention_mask": mask[:1, 4:]})
    assert torch.equal(cached[:1, 10:], alone[:, 6:])


@KINDS
@torch.no_grad()
def test_deepcopy_is_independent(kind: str, token_ids: torch.Tensor) -> None:
    model = converted(kind)
    before = model(token_ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(token_ids).logits, before)
    for layer in active_layers(twin):
        for parameter in layer.component.parameters():
            parameter.add_(0.1)
    assert torch.equal(model(token_ids).logits, before)
    assert not torch.equal(twin(token_ids).logits, before)


@pytest.mark.parametrize("name, dies_in", [("llama", "down"), ("llama", "mlp"), ("gemma2", "out")])
@pytest.mark.parametrize("carry", ["diagonal", "exact"])
@torch.no_grad()
def test_a_forward_that_dies_leaves_nothing_behind(name: str, dies_in: str, carry: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    model = get_peft_model(case.build(), NPTConfig(npt_layers="all", rank=3, carry=carry)).eval()
    ids = torch.arange(3, 12)[None]
    expected = model(ids).logits
    layer = active_layers(model)[1]
    handle = layer.module(dies_in).register_forward_pre_hook(lambda m, x: (_ for _ in ()).throw(RuntimeError("died")))
    with pytest.raises(RuntimeError, match="died"), watching([layer], lambda *_: None):
        model(ids)
    handle.remove()
    kept = [
        name
        for name in ("attention", "observed", "residual", "values", "down")
        if getattr(layer.hooks.thread.now, name) is not None
    ]
    assert not kept
    assert torch.equal(model(ids).logits, expected)


def test_a_later_adapter_brings_the_hooks_it_needs(token_ids: torch.Tensor) -> None:
    """Gate and up carry hooks only while an adapter adds something of their own to them."""
    alone = converted("llama", low_rank_at="projection")
    model = converted("llama")
    assert not active_layers(model)[0].module("gate")._forward_hooks
    model.add_adapter("second", alone.peft_config["default"])
    model.set_adapter("second")
    for own, other in zip(active_layers(model), active_layers(alone), strict=True):
        own.component.load_state_dict(other.component.state_dict())
    assert torch.equal(model(token_ids).logits, alone(token_ids).logits)


def test_a_fused_projection_carries_a_hook_only_where_it_is_needed() -> None:
    (case,) = (case for case in CASES if case.name == "phi3")
    for options, hooks in (({}, 0), ({"low_rank_at": "projection"}, 1), ({"target_projections": ["up", "down"]}, 1)):
        model = get_peft_model(case.build(), NPTConfig(npt_layers=[1], rank=3, **options))
        assert len(active_layers(model)[0].module("up")._forward_hooks) == hooks, options


@torch.no_grad()
def test_the_oracle_beside_another_adapter(token_ids: torch.Tensor) -> None:
    """Each gives what it gives alone; the block's input is kept for the one that reads it, and for no other."""
    model = converted("llama", torch.float32)
    alone, original = model(token_ids).logits, random_base("llama", torch.float32)(token_ids).logits
    layers = active_layers(model)
    norms = [layer.module("norm")._forward_pre_hooks for layer in layers]
    assert not any(norms)
    model.add_adapter("oracle", NPTConfig(npt_layers="all", carry="exact"))
    assert all(len(hooks) == 1 for hooks in norms)
    kept = []
    layers[1].module("mlp").register_forward_pre_hook(
        lambda *_: kept.append(layers[1].hooks.thread.now.residual is not None)
    )
    for _ in range(2):
        assert torch.equal(model(token_ids).logits, alone)
        model.set_adapter("oracle")
        torch.testing.assert_close(model(token_ids).logits, original, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(token_ids).logits, original)
        model.set_adapter("default")
    assert kept == [False, True, False] * 2
    model.delete_adapter("oracle")
    for _ in range(2):
        with running_as(layers, Mode.EXACT):
            torch.testing.assert_close(model(token_ids).logits, original, rtol=1e-4, atol=1e-5)
            assert all(len(hooks) == 1 for hooks in norms)
        assert torch.equal(model(token_ids).logits, alone)
    base = model.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules() if m is not layers[1].module("mlp"))


@torch.no_grad()
def test_two_adapters_at_once_in_different_blocks(token_ids: torch.Tensor) -> None:
    model = converted("llama", npt_layers=[0])
    model.add_adapter("second", NPTConfig(npt_layers=[2], rank=2))
    model.base_model.set_adapter(["default", "second"])
    assert [(layer.index, layer.active_name) for layer in active_layers(model)] == [(0, "default"), (2, "second")]
    assert all(p.requires_grad for layer in active_layers(model) for p in layer.component.parameters())
    both = model(token_ids).logits
    for name in ("default", "second"):
        model.set_adapter(name)
        assert not torch.equal(model(token_ids).logits, both)


def test_activating_trains_unless_told_otherwise() -> None:
    (layer,) = active_layers(converted("llama", npt_layers=[0]))
    for arguments, trains in (({}, True), ({"inference_mode": True}, False), ({"inference_mode": False}, True)):
        layer.set_adapter("default", **arguments)
        assert all(p.requires_grad == trains for p in layer.component.parameters())


def test_a_layer_made_by_hand_applies_the_adapter_peft_names_first() -> None:
    """PEFT's active adapter is the name "default" until one is set, a list from then on."""
    base = random_base("llama")
    layer = NPTLayer(base.model.layers[1], FAMILIES["llama"], 1)
    assert layer.active_name is None and layer.component is None
    for name in ("other", "default"):
        layer.add_component(name, **NPTConfig(rank=2).component_options())
    assert layer.active_name == "default" and layer.active() is layer.npt_components["default"]
    layer.set_adapter("other")
    assert layer.active_name == "other"
    assert layer.parts.multiplier == 1


@torch.no_grad()
def test_hooks_move_only_when_a_module_was_wrapped(token_ids: torch.Tensor) -> None:
    """Here by a LoRA that is still zero, so that the oracle is still the base."""
    base = random_base("llama")
    expected = base(token_ids).logits
    model = get_peft_model(base, NPTConfig(npt_layers="all", carry="exact")).eval()
    layers = active_layers(model)
    before = [layer.hooks.handles for layer in layers]
    for _ in range(2):
        torch.testing.assert_close(model(token_ids).logits, expected, rtol=1e-10, atol=1e-10)
        assert all(layer.hooks.handles is handles for layer, handles in zip(layers, before, strict=True))
    lora = LoraConfig(target_modules=["up_proj", "o_proj"], layers_to_transform=[1], r=2)
    model = get_peft_model(model.get_base_model(), lora).eval()
    after = []
    for _ in range(2):
        torch.testing.assert_close(model(token_ids).logits, expected, rtol=1e-10, atol=1e-10)
        after.append([layer.hooks.handles for layer in layers])
    moved = [layer.index for layer, old, new in zip(layers, before, after[0], strict=True) if old is not new]
    assert moved == [1] and all(old is new for old, new in zip(*after, strict=True))


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 2.0])
@torch.no_grad()
def test_residual_multipliers(multiplier: float) -> None:
    (case,) = (case for case in CASES if case.name == "granite")
    base = replace(case, options={"residual_multiplier": multiplier}).build()
    ids = torch.arange(3, 12)[None]
    expected = base(ids).logits
    model = get_peft_model(base, NPTConfig(npt_layers="all", carry="exact")).eval()
    assert [layer.parts.multiplier for layer in active_layers(model)] == [multiplier] * 4
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-10)


def test_modulation_is_computed_once_per_block(token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up hand it on to down."""
    calls = []
    whole = NPComponent.modulation
    model = converted("llama")
    monkeypatch.setattr(NPComponent, "modulation", lambda self, a: calls.append(1) or whole(self, a))
    model(token_ids)
    assert len(calls) == 4


def test_wrong_table_lines_are_caught() -> None:
    """A planted wrong line is rejected at conversion, and the model is left as it was."""
    right = FAMILIES["llama"]
    for wrong in (
        Family(right.blocks, "self_attn.v_proj", right.norm, right.mlp, right.up, right.down, right.gate),
        Family(right.blocks, right.tap, "input_layernorm", right.mlp, right.up, right.down, right.gate),
    ):
        base = random_base("llama")
        ids = torch.arange(5)[None]
        expected = base(ids).logits
        register_family("llama", wrong)
        try:
            with pytest.raises(ConversionError, match="contract|before its norm"):
                get_peft_model(base, NPTConfig())
        finally:
            register_family("llama", right)
        assert not npt_layers(base)
        assert torch.equal(base(ids).logits, expected)


def test_post_norm_blocks_are_refused() -> None:
    """A norm behind the residual add: the exact value would still fit, but the block writes more than its two parts."""
    base = random_base("llama")
    for block in base.model.layers:
        block.register_forward_hook(lambda m, x, y: y * 2)
    with pytest.raises(ConversionError, match=r"it should return its input.*post-norm"):
        get_peft_model(base, NPTConfig())
    assert not npt_layers(base)


def test_unknown_family_says_where_the_known_ones_are_listed() -> None:
    base = random_base("llama")
    base.config.model_type = "unheard_of"
    with pytest.raises(ConversionError, match="unheard_of.*npt families lists the .*register_family"):
        get_peft_model(base, NPTConfig())


@pytest.mark.parametrize(
    "choice,expected",
    [("all", [0, 1, 2, 3, 4]), ("upper_half", [2, 3, 4]), ("lower_half", [0, 1]), ([-1, 0], [0, 4]), ([3], [3])],
)
def test_layer_choice(choice: Any, expected: list[int]) -> None:
    assert resolve_layers(choice, 5) == expected


@pytest.mark.parametrize("choice", ["middle", [5], [-6], [1, 1], [1, -4], [], [True]])
def test_bad_layer_choice_names_value(choice: Any) -> None:
    with pytest.raises(ConversionError, match="npt_layers="):
        resolve_layers(choice, 5)


@torch.no_grad()
def test_probe_norm_measures_weight_bias_and_centering() -> None:
    base = random_base("gpt2")
    norm = base.transformer.h[0].ln_2
    weight, bias, centered = probe_norm(norm, 24, norm.weight)
    assert centered
    torch.testing.assert_close(weight, norm.weight.data, rtol=1e-9, atol=0)
    torch.testing.assert_close(bias, norm.bias.data, rtol=1e-9, atol=1e-9)
    norm = random_base("llama").model.layers[0].post_attention_layernorm
    weight, bias, centered = probe_norm(norm, 24, norm.weight)
    assert not centered and bias is None
    torch.testing.assert_close(weight, norm.weight.data, rtol=1e-9, atol=0)


@KINDS
def test_update_from_is_the_block_without_attention(kind: str, token_ids: torch.Tensor) -> None:
    """A block run alone on recorded h and a gives the update the whole model computes there."""
    model = converted(kind, npt_layers=[0])
    (layer,) = active_layers(model)
    seen: dict[str, Any] = {}
    with torch.no_grad():
        with running_as([layer], Mode.ORIGINAL), watching([layer], lambda _, record: seen.update(record=record)):
            model(token_ids)
        handle = layer.get_base_layer().register_forward_hook(lambda m, x, y: seen.update(y=y))
        model(token_ids)
        handle.remove()
        record = seen["record"]
        update = layer.update_from(record.hidden_states, record.attention)
    torch.testing.assert_close(record.hidden_states + update, seen["y"], rtol=1e-10, atol=1e-10)
