"""The conversion contract takes its tokens from those that have an input key; a model with a padding token is not refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model

from npt import NPTConfig
from npt.block.families import FAMILIES, register_family
from npt.errors import ConversionError
from npt.tuner.converted import active_layers
from tests.families import CASES, Case
from tests.helpers import random_base


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_padding_token_among_the_first_is_no_reason_to_refuse(case: Case) -> None:
    """Its embedding is zero, so z = 0 where the norm has no bias: the exact value has no key to act through."""
    base = case.build(noise=0.0, pad_token_id=3, bos_token_id=1)
    embedding = base.get_input_embeddings()
    if embedding.padding_idx is not None:
        with torch.no_grad():
            embedding.weight[3] = 0.0  # as torch makes it; transformers' own initial values of some types overwrite it
    get_peft_model(base, NPTConfig(npt_layers="all"))


def test_tokens_without_an_embedding_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    base = random_base("llama")
    with torch.no_grad():
        base.get_input_embeddings().weight[[1, 2, 5]] = 0.0
    with caplog.at_level(logging.INFO, logger="npt"):
        get_peft_model(base, NPTConfig(npt_layers="all"))
    assert "tokens [1, 2, 5] have a zero embedding" in caplog.text


def test_a_model_whose_first_tokens_are_all_zero_is_refused() -> None:
    base = random_base("llama")
    with torch.no_grad():
        base.get_input_embeddings().weight.zero_()
    with pytest.raises(ConversionError, match="all zero.*load the model's weights"):
        get_peft_model(base, NPTConfig(npt_layers="all"))


def test_fewer_tokens_with_a_key_than_the_contract_takes_are_repeated() -> None:
    base = random_base("llama")
    with torch.no_grad():
        base.get_input_embeddings().weight[:62] = 0.0
    assert len(active_layers(get_peft_model(base, NPTConfig(npt_layers="all")))) == 4


def test_a_block_at_a_token_without_key_passes_its_input_on() -> None:
    """h = 0 gives z = 0 and i = 0 (no biases): neither value is added, as docs/maths.md says."""
    base = random_base("llama")
    model = get_peft_model(base, NPTConfig(npt_layers=[0]))
    with torch.no_grad():
        base.get_input_embeddings().weight[3] = 0.0
        out = model(input_ids=torch.tensor([[7, 3, 9]]), output_hidden_states=True).hidden_states
    assert not out[1][0, 1].any()
    assert out[1][0, 0].any()


def massive(dtype: torch.dtype) -> Any:
    """A random model with a token whose hidden state is so large that what a block adds to it is lost in its rounding."""
    base = random_base("llama", dtype)
    with torch.no_grad():
        base.get_input_embeddings().weight[2] = 4 / torch.finfo(dtype).eps
    return base


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_massive_activations_are_no_reason_to_refuse_in_half_precision(dtype: torch.dtype) -> None:
    """At such a token the update is a thousandth of the hidden state, and both ways round most of it away, each elsewhere."""
    assert len(active_layers(get_peft_model(massive(dtype), NPTConfig(npt_layers="all")))) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrong", [{"tap": "self_attn.v_proj"}, {"norm": "input_layernorm"}], ids=["tap", "norm"])
def test_a_wrong_line_is_found_though_every_token_has_massive_activations(
    dtype: torch.dtype, wrong: dict[str, str]
) -> None:
    """They are of few channels: in the others nothing is lost to rounding."""
    base, right = random_base("llama", dtype), FAMILIES["llama"]
    with torch.no_grad():
        base.get_input_embeddings().weight[:, 5] = 4 / torch.finfo(dtype).eps
    register_family("llama", replace(right, **wrong))
    try:
        with pytest.raises(ConversionError, match="contract|before its norm"):
            get_peft_model(base, NPTConfig(npt_layers="all"))
    finally:
        register_family("llama", right)
    assert len(active_layers(get_peft_model(base, NPTConfig(npt_layers="all")))) == 4


def test_conversion_within_autocast_is_the_same() -> None:
    """bfloat16 products would differ from the exact value by more than float32's tolerance."""
    components = []
    for enabled in (False, True):
        base = random_base("llama", torch.float32)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model = get_peft_model(base, NPTConfig(npt_layers="all"))
        components.append([p for layer in active_layers(model) for p in layer.own.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*components, strict=True))
