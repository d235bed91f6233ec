"""The plan of a run equals what its own code allocates on shapes alone; the advice helps when that is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from npt import NPTConfig, calibrate
from npt.config import RunConfig, load_config, with_overrides
from npt.errors import ConfigError, NPTError
from npt.evaluation.divergence import token_divergences
from npt.planning.advice import advice
from npt.planning.counters import AllocationCounter, PretendValues, WorkCounter
from npt.planning.devices import parse_bytes
from npt.planning.plan import BYTES_4BIT, Plan, plan_run, weight_bytes
from npt.planning.shapes import shapes_of

SHAPE = LlamaConfig(
    hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=64, dtype=torch.float32,
)  # fmt: skip
DEEP = LlamaConfig(**{**SHAPE.to_dict(), "num_hidden_layers": 8})
SMALL = ["data.max_length=64", "training.batch_size=4", "data.num_calibration_samples=12", "data.num_train_samples=8"]


def config(*overrides: str) -> RunConfig:
    return load_config(None, [*SMALL, *overrides])


def phases(plan: Plan) -> dict[str, int]:
    return {phase.name: phase.bytes for phase in plan.phases}


def test_phases_are_what_real_tensors_take() -> None:
    found = phases(plan_run(config(), SHAPE))
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(SHAPE), NPTConfig())
    ids = torch.randint(3, 500, (16, 64))
    with AllocationCounter() as counter:
        calibrate(model, [{"input_ids": part} for part in ids.split(4)], chunk_tokens=12 * 64)
    assert found["calibration"] == pytest.approx(counter.peak, rel=0.1)
    blocks = [{name: row.tolist() for name in ("input_ids", "attention_mask", "labels")} for row in ids]
    with AllocationCounter() as counter:
        token_divergences(model, blocks, batch_size=4)
    assert found["evaluation: divergence"] == pytest.approx(counter.peak, rel=0.1)


def test_remembered_layouts_change_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan_run(config(), SHAPE)
    monkeypatch.setattr("npt.planning.counters._is_fresh", lambda func: False)
    assert plan_run(config(), SHAPE) == found


def test_a_layout_is_worked_out_once() -> None:
    """Arguments of another layout or type, and results that point into an argument, are worked out anew."""
    x, whole = torch.ones(4, 6, device="meta"), torch.ones(4, 6, dtype=torch.long, device="meta")
    with WorkCounter() as work, PretendValues():
        torch.mm(x, x.mT)
        assert work.flops == 2 * 4 * 6 * 4
        again = torch.mm(x, x.mT)
        assert work.flops == 2 * 4 * 6 * 4 and again.shape == (4, 4) and again.untyped_storage().nbytes() == 4 * 16
        torch.mm(x.mT, x)
        assert work.flops == 2 * 4 * 6 * (4 + 6)
        assert ((x * 2).stride(), (x.mT * 2).stride()) == ((6, 1), (1, 6))
        assert ((whole * 1).dtype, (whole * 1.0).dtype) == (torch.long, torch.float32)
        for _ in range(2):
            part = torch.ops.aten._unsafe_view(x, [24])
            assert part.untyped_storage() is x.untyped_storage()


def test_logits_of_one_batch_are_gone_when_the_next_one_comes() -> None:
    model = get_peft_model(AutoModelForCausalLM.from_config(SHAPE), NPTConfig())
    row = {name: list(range(3, 67)) for name in ("input_ids", "attention_mask", "labels")}
    peaks = []
    for blocks in ([row] * 4, [row] * 12):
        with AllocationCounter() as counter:
            token_divergences(model, blocks, batch_size=4)
        peaks.append(counter.peak)
    assert peaks[1] < 1.05 * peaks[0]


def test_the_plan_follows_the_options() -> None:
    plain, checkpointed, local, one, half = (
        plan_run(config("training.calibrate=false", *options), DEEP)
        for options in (
            ["training.objective=logits"],
            ["training.objective=logits", "training.gradient_checkpointing=true"],
            ["training.objective=local"],
            ["training.batch_size=1"],
            ["model.dtype=bfloat16"],
        )
    )
    step = phases(plain)["training step"]
    assert phases(local)["training step"] < phases(checkpointed)["training step"] < step
    assert phases(one)["training step"] < step / 2
    assert half.weights < 0.6 * plain.weights
    assert plain.step_flops > 0 and plain.step_traffic > 0
    assert plain.step_seconds(plain.step_flops, plain.step_traffic) == 2


def test_teacher_targets_are_planned_for() -> None:
    assert plan_run(config(), SHAPE).disk == 0
    logits, both = (
        plan_run(config("paths.teacher_cache=x", o), SHAPE).disk
        for o in ("training.seed=1", "training.calibrate=false")
    )
    assert logits == 64 * (4 * 64 + 4 * 65)
    assert both - logits == 64 * 64 * 4 * 5  # h once; a and y of blocks 2 and 3


def test_temporary_files_are_planned_only_where_something_is_calibrated() -> None:
    assert plan_run(config(), SHAPE).temporary == 2 * 2 * 64 * 4 * 12 * 64  # h and a of blocks 2 and 3
    assert not plan_run(config("model.carry=exact", "model.gain=denominator"), SHAPE).temporary
    assert not plan_run(config("training.calibrate=false"), SHAPE).temporary


def test_phases_that_do_not_happen_are_not_planned() -> None:
    plan = plan_run(config("training.num_train_steps=0", "data.dataset_name=builtin:python-docs"), SHAPE)
    assert not {"training step", "sampling text"} & set(phases(plan))
    assert plan.optimizer == 0


def test_weights_on_the_device() -> None:
    model = shapes_of(SHAPE, {}, torch.float32)

    def found(**options: bool) -> int:
        return weight_bytes(model, config().optimization.model_copy(update=options))

    plain, embeddings, linear = found(), 4 * 2 * 512 * 64, 4 * 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 172)
    norms = 4 * (2 * 4 + 1) * 64
    assert plain == embeddings + linear + norms
    assert found(use_8bit=True) == embeddings + linear // 4 + norms
    assert found(use_4bit=True) == embeddings + int(linear // 4 * BYTES_4BIT) + norms
    assert found(use_cpu_offload=True) == embeddings + 4 * 64 * 172 + norms


def test_advice_names_what_fits() -> None:
    run = config("training.calibrate=false")
    plain = plan_run(run, SHAPE)
    assert advice(run, plain.peak, SHAPE, plain)[0] == []
    changes, least = advice(run, plain.peak - 1000, SHAPE, plain)
    assert changes == ["model.dtype=bfloat16"] and least.peak < plain.peak
    changes, least = advice(run, 0, SHAPE, plain)
    assert "training.objective=local" in changes and "optimization.use_cpu_offload=true" in changes
    assert "training.gradient_accumulation_steps=4" in changes
    assert with_overrides(config(), {"training.batch_size": 2}).training.batch_size == 2
    with pytest.raises(ConfigError, match="use_cpu_offload"):
        with_overrides(config(), {"optimization.use_8bit": True, "optimization.use_cpu_offload": True})


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("1.5 GB", 1.5e9), ("300", 300), ("2k", 2000)])
def test_sizes(text: str, size: float) -> None:
    assert parse_bytes(text) == size


def test_what_is_no_size_is_an_error() -> None:
    with pytest.raises(NPTError, match="--limit plenty: not a size"):
        parse_bytes("plenty")


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    from npt.cli import main

    settings = [
        *SMALL,
        "model.base_model_name=builtin:tiny",
        "model.npt_layers=[5]",
        "training.objective=local",
        "training.calibrate=false",
    ]
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert main(["memory", *arguments, "--limit", "1MiB"]) in (0, None)
    shown = capsys.readouterr().out
    assert "peak of the run" in shown and "does not fit even with" in shown and "a training step" in shown
