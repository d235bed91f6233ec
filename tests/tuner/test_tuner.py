"""The PEFT surface works: save and load, several adapters, the teacher, refusals, and what npt relies on inside PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from npt import NPTConfig, weight_delta
from npt.adapters.folder import load_adapter
from npt.errors import CheckpointError, ConversionError
from npt.tuner.converted import active_layers, npt_layers, parameter_counts
from npt.tuner.model import NPTModel
from tests.helpers import converted, random_base, randomize

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def test_peft_knows_the_method() -> None:
    """peft has no public registration; this is the whole of what we put into it."""
    assert PEFT_TYPE_TO_CONFIG_MAPPING["NPT"] is NPTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["NPT"] is NPTModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["NPT"] == "npt_"


@KINDS
@torch.no_grad()
def test_disabled_adapter_is_the_base_bit_for_bit(kind: str, token_ids: torch.Tensor) -> None:
    expected = random_base(kind)(token_ids).logits
    model = converted(kind)
    assert not torch.equal(model(token_ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(token_ids).logits, expected)
    assert not torch.equal(model(token_ids).logits, expected)


@KINDS
@pytest.mark.parametrize("options", [{}, {"key": "learned", "low_rank_at": "projection"}, {"gain": "norm", "rank": 0}])
@torch.no_grad()
def test_save_and_load_is_bit_exact(kind: str, options: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    model = converted(kind, torch.float32, npt_layers=[1, -1], **options)
    expected = model(token_ids).logits
    model.save_pretrained(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, NPTConfig) and config.npt_layers == [1, 3]
    loaded = load_adapter(random_base(kind, torch.float32), tmp_path)
    assert torch.equal(loaded(token_ids).logits, expected)
    by_peft = PeftModel.from_pretrained(random_base(kind, torch.float32), str(tmp_path))
    assert torch.equal(by_peft(token_ids).logits, expected)


@torch.no_grad()
def test_several_adapters_on_one_base(token_ids: torch.Tensor) -> None:
    model = converted("llama", npt_layers=[0, 1])
    first = model(token_ids).logits
    model.add_adapter("second", NPTConfig(npt_layers=[1, 3], rank=2, gain="norm"))
    assert torch.equal(model(token_ids).logits, first)
    model.set_adapter("second")
    randomize(model, seed=9)
    second = model(token_ids).logits
    assert not torch.equal(second, first)
    assert [layer.index for layer in active_layers(model)] == [1, 3]
    model.set_adapter("default")
    assert torch.equal(model(token_ids).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(token_ids).logits, first)
    assert "second" not in {name for layer in npt_layers(model) for name in layer.npt_components}


@KINDS
@torch.no_grad()
def test_unload_gives_the_base_back(kind: str, token_ids: torch.Tensor) -> None:
    expected = random_base(kind)(token_ids).logits
    base = converted(kind).unload()
    assert torch.equal(base(token_ids).logits, expected)
    assert not npt_layers(base)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in base.modules())


def test_merge_is_refused_with_the_reason() -> None:
    model = converted("llama")
    for call in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ConversionError, match="depends on the input"):
            call()


@torch.no_grad()
def test_weight_delta_of_one_token_reproduces_its_block(token_ids: torch.Tensor) -> None:
    """Adding the formed matrices to the weights gives that token's block output from the plain MLP."""
    model = converted("llama", key="learned", npt_layers=[1])
    deltas = weight_delta(model, token_ids, layer=1, token=(0, -2))
    (layer,) = active_layers(model)
    block, seen = layer.get_base_layer(), {}
    handle = block.register_forward_hook(lambda m, x, y: seen.update(h=x[0], y=y))
    model(token_ids)
    handle.remove()
    z = block.post_attention_layernorm.forward(seen["h"])[0, -2]
    weights = {name: layer.module(name).weight + deltas[name] for name in ("gate", "up", "down")}
    i = torch.nn.functional.silu(weights["gate"] @ z) * (weights["up"] @ z)
    torch.testing.assert_close(seen["h"][0, -2] + weights["down"] @ i, seen["y"][0, -2], rtol=1e-9, atol=1e-9)
    with pytest.raises(ConversionError, match=r"layer=0 is not a converted block; use one of \[1\]"):
        weight_delta(model, token_ids, layer=0, token=(0, 0))


def test_parameter_counts_and_print(capsys: pytest.CaptureFixture[str]) -> None:
    """Per block: A and B_in and B_down of rank 3, c, e, the direction, two scalars, and 64 hidden units."""
    model = converted("llama", npt_layers=[2, 3])
    expected = 2 * (3 * 24 * 3 + 24 + 24 + 24 + 2 + 64 * (24 + 2))
    assert parameter_counts(model)[0] == expected
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options,words",
    [
        ({"key": "best"}, "key='best': use one of input, tied, learned"),
        ({"carry": 1}, "carry=1: use one of none, diagonal, exact"),
        ({"gain": "loud"}, "gain='loud'"),
        ({"low_rank_at": "output"}, "low_rank_at='output'"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"target_projections": []}, "target_projections=\\[\\]"),
        ({"target_projections": ["gate", "side"]}, "target_projections="),
        ({"key": "tied"}, "use target_projections=\\['gate', 'up'\\]"),
        ({"key": "x", "gain": "y"}, "key='x'.*gain='y'"),
    ],
)
def test_bad_options_name_value_and_remedy(options: Any, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        NPTConfig(**options)


def test_options_that_do_not_fit_the_model() -> None:
    with pytest.raises(ConversionError, match="rank=25 is larger than the model's hidden size 24"):
        get_peft_model(random_base("llama"), NPTConfig(rank=25))
    get_peft_model(random_base("llama"), NPTConfig(rank=24))
    with pytest.raises(ConversionError, match="npt_layers=\\[7\\].*4 blocks"):
        get_peft_model(random_base("llama"), NPTConfig(npt_layers=[7]))
    base = random_base("gpt2")
    with pytest.raises(ConversionError, match="MLP has up, down only"):
        get_peft_model(base, NPTConfig(target_projections=["gate"]))
    assert not npt_layers(base)


def test_compiled_and_data_parallel_models_are_refused() -> None:
    with pytest.raises(ConversionError, match="compiled"):
        get_peft_model(torch.compile(random_base("llama")), NPTConfig())
    in_place = random_base("llama")
    in_place.compile()
    with pytest.raises(ConversionError, match="convert, then compile"):
        get_peft_model(in_place, NPTConfig())
    parallel: Any = torch.nn.DataParallel(random_base("llama"))
    parallel.config = parallel.module.config
    with pytest.raises(ConversionError, match="DistributedDataParallel"):
        NPTModel(parallel, NPTConfig(), "default")
    split = random_base("llama")
    split._tp_size = 2
    with pytest.raises(ConversionError, match="without tp_plan"):
        get_peft_model(split, NPTConfig())


def test_two_active_adapters_in_one_block_are_refused() -> None:
    model = converted("llama", npt_layers=[0, 1])
    model.add_adapter("second", NPTConfig(npt_layers=[1, 3], rank=2))
    with pytest.raises(ConversionError, match=r"\['default', 'second'\] are both for block 1"):
        model.base_model.set_adapter(["default", "second"])


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    converted("llama", torch.float32, npt_layers=[3]).save_pretrained(str(tmp_path))
    other = random_base("gpt2", torch.float32)
    with pytest.raises(CheckpointError, match=r"hidden size 24, intermediate size 40, 4 blocks; this one has .* 96"):
        load_adapter(other, tmp_path)


def test_damaged_and_missing_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter folder"):
        load_adapter(random_base("llama"), tmp_path / "nothing.pt")
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        load_adapter(random_base("llama"), tmp_path / "a")
    converted("llama", torch.float32).save_pretrained(str(tmp_path / "b"))
    weights = tmp_path / "b" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter(random_base("llama", torch.float32), tmp_path / "b")


@torch.no_grad()
def test_pt_name_means_the_folder(tmp_path: Path, token_ids: torch.Tensor) -> None:
    model = converted("llama", torch.float32)
    model.save_pretrained(str(tmp_path / "best_model"))
    loaded = load_adapter(random_base("llama", torch.float32), tmp_path / "best_model.pt")
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)
