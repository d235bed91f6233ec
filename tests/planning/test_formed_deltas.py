"""The memory table counts real allocations, knows sizes from shapes, and the formed delta is the same computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from npt import NPTConfig
from npt.block.component import ComponentSpec
from npt.config import load_config
from npt.equivalence.objectives import Objective
from npt.errors import NPTError
from npt.planning.counters import AllocationCounter
from npt.planning.formed_deltas import (
    component_bytes,
    estimate,
    materialized_delta_bytes,
    measure_component,
    measure_materialized,
    memory_table,
    values_peak,
)
from npt.planning.shapes import LLAMA_7B, enable_checkpointing
from npt.tuner.converted import active_layers
from tests.helpers import allocated

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=200,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=200, n_embd=64, n_layer=4, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=None)
BATCH, TOKENS = 4, 128


def test_counter_sees_the_peak_of_live_storage() -> None:
    with AllocationCounter() as counter:
        a = torch.ones(1000)  # 4,000 bytes
        b = a + 1  # 8,000 alive
        del a
        c = b.view(10, 100) * 2  # 8,000 alive, the view is no storage of its own
        del b, c
        torch.ones(10)
    assert counter.peak == 8000


def test_counter_sees_what_only_the_graph_keeps() -> None:
    x = torch.ones(1000, requires_grad=True)
    with AllocationCounter() as counter:
        loss = x.exp().sum()  # exp keeps its result for the backward pass
        assert counter.live == 4004
        loss.backward()
        assert counter.live == 4004  # the graph let go of it; x.grad and the loss remain


@pytest.mark.parametrize("options", [{}, {"low_rank_at": "projection"}, {"gain": "none"}, {"carry": "exact"}])
def test_counted_on_real_tensors_computed_on_meta_and_the_profiler_agree(options: dict[str, Any]) -> None:
    spec = ComponentSpec(256, 688, **options)
    measured = values_peak(spec, 128)
    assert measured == component_bytes(spec, 128)[1] > 0
    assert measured == pytest.approx(_profiled(lambda: values_peak(spec, 128), inputs=spec), rel=0.02)


def _profiled(run: Callable[[], Any], inputs: ComponentSpec | None = None) -> int:
    """Peak of what torch's CPU allocator hands out during a call, less what `values_peak` needs as inputs."""
    peak = allocated(run)
    if inputs is None:
        return peak
    d, f, tokens = inputs.hidden_size, inputs.intermediate_size, 128
    given = 4 * tokens * (2 * d + f) + component_bytes(inputs, tokens)[0] + 2 * 4 * d  # the norm's weight, inverted
    return peak - given


def test_formed_deltas_cost_hundreds_of_gigabytes_at_7b_shapes() -> None:
    one_block = materialized_delta_bytes(4096, 11008, batch=4, tokens=512)
    assert one_block == 4096 * 11008 * 3 * 4 * 512 * 4 > 500 * 2**30
    assert materialized_delta_bytes(4096, 11008, layers=32, batch=4, tokens=512) == 32 * one_block


def test_ours_stays_under_a_gigabyte_at_7b_shapes() -> None:
    """Measured on one block at the real shape: values of different blocks are never alive together."""
    assert measure_component(4096, 11008, tokens=4 * 512) < 2**30


def test_the_shifted_input_of_the_mlp_counts() -> None:
    """Default options: shift, z + shift, v_down's two parts and their sum are alive at once, each (tokens, d)."""
    assert values_peak(ComponentSpec(256, 688), 128) == pytest.approx(5 * 4 * 128 * 256, rel=0.05)


def test_forming_the_delta_is_the_same_computation_and_much_larger() -> None:
    formed, difference = measure_materialized(128, 344, tokens=32)
    assert difference < 1e-4
    assert formed > 20 * measure_component(128, 344, tokens=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hf_config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_estimate_of_a_step_is_what_a_real_step_allocates(hf_config: Any, dtype: torch.dtype) -> None:
    found = estimate(hf_config, {"rank": 8}, BATCH, TOKENS, dtype)
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    model = get_peft_model(base, NPTConfig(rank=8))
    assert found.base_bytes == size
    assert found.new_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.new_bytes == sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert found.optimizer_bytes == 2 * found.new_bytes
    # The estimate also counts the last token of each row, which predicts nothing.
    assert found.local_step_bytes == pytest.approx(_real_step(model, "local"), rel=0.06)
    assert found.logits_step_bytes == pytest.approx(_real_step(model, "logits"), rel=0.06)
    enable_checkpointing(base)
    assert found.logits_checkpointed_bytes == pytest.approx(_real_step(model, "logits"), rel=0.06)
    assert found.local_step_bytes < found.logits_step_bytes
    assert found.logits_checkpointed_bytes < found.logits_step_bytes


def _real_step(model: Any, objective: str) -> int:
    ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 200
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    scales = {layer.index: 1.0 for layer in active_layers(model)}
    model.train()
    with AllocationCounter() as counter:
        Objective(objective, scales=scales)(model, inputs, float(ids.numel())).total.backward()
    model.zero_grad(set_to_none=True)
    return counter.peak


def test_estimate_follows_the_options() -> None:
    plain = estimate(LLAMA, None, BATCH, TOKENS)
    assert plain.layers == [2, 3]
    assert estimate(LLAMA, {"npt_layers": "all"}, BATCH, TOKENS).new_parameters == 2 * plain.new_parameters
    wide = estimate(LLAMA, {"low_rank_at": "projection"}, BATCH, TOKENS)
    assert wide.new_parameters - plain.new_parameters == 2 * 16 * (2 * 172 - 64)  # B_gate and B_up for B_in, two blocks
    exact = estimate(LLAMA, {"carry": "exact"}, BATCH, TOKENS)
    assert exact.new_parameters == exact.optimizer_bytes == 0


def test_estimate_of_7b_reads_no_weights() -> None:
    found = estimate(LlamaConfig(**LLAMA_7B), None, 4, 512)
    assert found.base_parameters == 6_738_415_616
    assert found.materialized_bytes > 1000 * found.base_bytes
    assert found.logits_step_bytes > 1024 * 32000 * 4  # one chunk of next-token distributions at the least


def test_what_is_no_causal_lm_is_an_error() -> None:
    from transformers import CLIPConfig, CTRLConfig

    with pytest.raises(NPTError, match="no causal language model"):
        estimate(CLIPConfig())
    with pytest.raises(NPTError, match="ctrl"):
        estimate(CTRLConfig(n_embd=16, n_layer=2, n_head=2, dff=16))


def test_the_table_has_both_sides() -> None:
    rows = {row.what: row for row in memory_table()}
    assert {row.how for row in rows.values()} == {"computed", "measured"}
    assert any("formed dW, 16 converted blocks" in what for what in rows)
    values = next(row for what, row in rows.items() if "npt values, one block" in what)
    assert values.how == "measured" and values.bytes < 2**30


def test_the_table_follows_a_configuration(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    options = ["training.batch_size=64", "data.max_length=64", "model.dtype=float32", "model.rank=4"]
    rows = {row.what: row for row in memory_table(load_config(None, [f"model.base_model_name={tmp_path}", *options]))}
    assert any("base weights, 4 blocks, float32" in what for what in rows)
    # More tokens than are measured at once: the whole is computed, a part of it measured, in proportion.
    whole = next(row for what, row in rows.items() if "64 x 64 tokens" in what and "rank 4" in what)
    part = next(row for what, row in rows.items() if "the first 2,048" in what)
    assert (whole.how, part.how) == ("computed", "measured")
    assert whole.bytes == pytest.approx(2 * part.bytes, rel=0.01)


def test_names_of_models(tmp_path: Path) -> None:
    rows = memory_table(load_config(None, ["model.base_model_name=llama-2-7b", "training.batch_size=1"]))
    assert "32 blocks" in rows[0].what
    with pytest.raises(NPTError, match=r"model\.base_model_name='.*missing'.*NAME with llama-2-7b, llama-3\.1-8b"):
        memory_table(load_config(None, [f"model.base_model_name={tmp_path / 'missing'}"]))
