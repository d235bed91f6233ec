"""The shard plan is torch's own fully_shard's, memory a real sharded step's; figures of launches and times are arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from peft import get_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from npt import NPTConfig
from npt.block.families import blocks_of
from npt.common.display import duration
from npt.common.sharded import through
from npt.config import RunConfig, load_config
from npt.equivalence.block_fit import CHUNK_TOKENS
from npt.equivalence.objectives import Objective
from npt.errors import NPTError
from npt.planning.advice import advice
from npt.planning.devices import BANDWIDTH_SHARE, DEVICES, EFFICIENCY, planned_launch
from npt.planning.plan import OVERHEAD, Plan, plan_run
from npt.planning.shapes import KNOWN_SHAPES, shapes_of
from npt.planning.shards import DDP, FSDP2, Spread, local_size, shard_units, strategy_of
from npt.planning.timing import planned_steps, step_time, time_lines
from npt.tuner.converted import active_layers, parameter_counts
from tests.helpers import allocated

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=509, max_position_embeddings=64,
)  # fmt: skip
TIED = GPT2Config(vocab_size=200, n_embd=64, n_layer=3, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None)
SMALL = ["data.max_length=64", "training.batch_size=2", "data.dataset_name=builtin:python-docs", "model.dtype=float32"]
SHARDED = ("optimization.fsdp=true", "training.objective=logits")


def config(*overrides: str) -> RunConfig:
    return load_config(None, [*SMALL, *overrides])


@cache
def planned(*overrides: str, count: int = 1) -> Plan:
    """The plan of LLAMA, made once for all tests that look at it."""
    return plan_run(config(*overrides), LLAMA, count)


@pytest.fixture
def processes() -> Iterator[Callable[[int], None]]:
    """Makes this process the first one of a group of so many that does not exist: collectives do nothing."""

    def start(count: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: Any) -> None:
    """As npt.runs.processes does it, with accelerate's own function."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=sorted({type(block).__name__ for block in blocks_of(model.get_base_model())}),
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator: Any = SimpleNamespace(state=state, mixed_precision="no", is_main_process=True, torch_device_mesh=None)
    fsdp2_prepare_model(accelerator, model)


def real_units(model: Any) -> list[tuple[int, int]]:
    """(bytes whole, bytes kept) of every group of parameters that fully_shard has made."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                found[id(group)] = group
    return [
        (
            sum(p._orig_size.numel() * p._sharded_param_data.element_size() for p in group.fsdp_params),
            sum(p._sharded_param_data.numel() * p._sharded_param_data.element_size() for p in group.fsdp_params),
        )
        for group in found.values()
    ]


@pytest.mark.parametrize("count", [2, 3, 8, 100])
@pytest.mark.parametrize("hf_config", [LLAMA, TIED], ids=["llama", "tied"])
def test_the_shard_plan_is_what_fully_shard_does(processes: Any, hf_config: Any, count: int) -> None:
    model = shapes_of(hf_config, {"rank": 5}, torch.bfloat16)
    planned = shard_units(model, count)
    processes(count)
    shard(model)
    assert sorted((unit.full, unit.local) for unit in planned) == sorted(real_units(model))
    assert sum(unit.full for unit in planned) < count * sum(unit.local for unit in planned)  # padding


def test_every_parameter_is_in_one_unit() -> None:
    model = shapes_of(LLAMA, None, torch.bfloat16)
    units = shard_units(model, 1)
    assert [unit.name for unit in units] == ["embedding", *(f"block {i}" for i in range(4)), "head", "rest"]
    assert sum(unit.full for unit in units) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(unit.own for unit in units) == parameter_counts(model)[0]
    assert sum(unit.base for unit in units) == 2 * parameter_counts(model)[1]
    assert local_size(torch.empty(7, 3), 4) == 6 and local_size(torch.empty(()), 4) == 1


@pytest.mark.parametrize("objective", ["local", "logits"])
def test_a_sharded_step_takes_what_was_planned(processes: Any, objective: str) -> None:
    """Wide and shallow, so that weights count; torch's own allocator is asked."""
    wide = LlamaConfig(**{**LLAMA.to_dict(), "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6})
    plan = plan_run(config("optimization.fsdp=true", f"training.objective={objective}"), wide, 4)
    step = next(phase.bytes for phase in plan.phases if phase.name == "training step")
    model = get_peft_model(AutoModelForCausalLM.from_config(wide, dtype=torch.float32), NPTConfig())
    processes(4)
    shard(model)
    kept = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters())
    assert kept == pytest.approx(plan.weights, rel=0.001)
    ids = torch.arange(128).view(2, 64) % 200
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    loss = Objective(objective, scales={layer.index: 1.0 for layer in active_layers(model)})
    model.train()
    peak = allocated(lambda: through(model, lambda: loss(model, inputs, 128.0)).total.backward())
    assert peak == pytest.approx(step + plan.spread.gathered, rel=0.1)
    assert plan.spread.gathered > step / 4  # else the comparison says little about it


def test_what_each_process_holds() -> None:
    alone, ddp, sharded = planned(), planned(count=4), planned(*SHARDED, count=4)
    own = alone.optimizer // 8
    assert (alone.spread.strategy, ddp.spread.strategy, sharded.spread.strategy) == ("one process", DDP, FSDP2)
    assert ddp.weights == alone.weights + 4 * own and ddp.optimizer == alone.optimizer
    assert alone.weights / 4 < sharded.weights < 1.05 * alone.weights / 4
    assert sharded.optimizer == pytest.approx(alone.optimizer / 4, rel=0.05)
    assert sharded.peak == sharded.weights + sharded.spread.gathered + OVERHEAD + max(
        phase.bytes + sharded.optimizer * (phase.name not in ("loading", "sampling text", "calibration"))
        for phase in sharded.phases
    )


def test_what_processes_send_one_another() -> None:
    def spread(*options: str) -> Spread:
        return planned(*options, count=4).spread

    own = parameter_counts(shapes_of(LLAMA, None, torch.float32))[0]
    assert planned().spread.step_bytes == planned().spread.forward_bytes == 0
    assert spread().step_bytes == 2 * 3 / 4 * 4 * own
    local = spread("optimization.fsdp=true", "training.objective=local")
    size = {unit.name: unit.full for unit in local.units}
    assert local.forward_bytes == 3 / 4 * (sum(size.values()) - size["head"])
    assert local.step_bytes == 3 / 4 * 4 * own
    logits = spread(*SHARDED)
    twice = 2 * (size["embedding"] + size["block 0"] + size["block 1"])
    expected = twice + 3 * (size["block 2"] + size["block 3"]) + size["head"] + size["rest"]
    assert logits.forward_bytes == 3 / 4 * expected


def test_calibration_text_is_shared() -> None:
    shallow = LlamaConfig(**{**LLAMA.to_dict(), "max_position_embeddings": 512})
    options = ["data.max_length=512", "data.num_calibration_samples=64"]

    def saved(*more: str) -> float:
        found = (plan_run(config(*options, *more), shallow, count).phases for count in (1, 8))
        one, eight = (next(p.bytes for p in phases if p.name == "calibration") for phases in found)
        return one - eight

    # Of one block, the inputs of its scale; h and a are on disk. With hidden units each process gathers those of all tokens.
    assert saved("model.gain_units=0") == pytest.approx(CHUNK_TOKENS * 64 * 4 * 7 / 8, rel=0.15)
    assert saved() == pytest.approx(64 * 512 * 64 * 4 * (7 / 8 - 2), rel=0.15)


def test_one_process_can_not_shard() -> None:
    with pytest.raises(NPTError, match="fsdp=true with one process.*--processes N"):
        plan_run(config("optimization.fsdp=true"), LLAMA)
    assert strategy_of(True, 4) == FSDP2


@pytest.mark.slow
def test_advice_of_several_processes_is_to_shard() -> None:
    plan = plan_run(config(), LLAMA, 4)
    changes, least = advice(config(), 0, LLAMA, plan)
    assert "optimization.fsdp=true" in changes and not any("bit" in change or "offload" in change for change in changes)
    assert least.spread.strategy == FSDP2 and least.weights < plan.weights / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1, "b200"), "--device b200: not known; use one of a100-80gb, h100-80gb, h200"),
        ((8, 3), "--nodes 3: does not divide --processes 8"),
        ((0, 1), "--processes 0: use a whole number from 1 up"),
    ],
)
def test_launches_that_make_no_sense(arguments: Any, message: str) -> None:
    with pytest.raises(NPTError, match=message):
        planned_launch(*arguments)


def test_links() -> None:
    h100 = DEVICES["h100-80gb"]
    assert planned_launch(8).wire is None
    assert planned_launch(8, 1, "h100-80gb").wire == BANDWIDTH_SHARE * h100.link
    # Eight rings over the node's eight adapters: together slower than NVLink; one process per node has one.
    assert planned_launch(16, 2, "h100-80gb").wire == BANDWIDTH_SHARE * 8 * h100.network
    assert planned_launch(2, 2, "h100-80gb").wire == BANDWIDTH_SHARE * h100.network


def test_time_is_work_over_the_data_sheet() -> None:
    launch = planned_launch(4, 1, "a100-80gb")
    plan, sheet = planned(*SHARDED, count=4), DEVICES["a100-80gb"]
    found = step_time(plan, 3, launch)
    assert found.products == 3 * plan.step_flops / (EFFICIENCY * sheet.flops)
    assert found.traffic == 3 * plan.step_traffic / (BANDWIDTH_SHARE * sheet.bandwidth)
    sent = 3 * plan.spread.forward_bytes + plan.spread.step_bytes
    assert found.communication == sent / (BANDWIDTH_SHARE * sheet.link)
    assert found.most == found.products + found.traffic + found.communication
    assert found.least == max(found.products + found.traffic, found.communication)


def test_no_time_of_float32_is_predicted_from_a_16_bit_figure() -> None:
    launch = planned_launch(1, 1, "h200")
    assert "no time is predicted" in " ".join(time_lines(planned(), config(), launch, "float32"))
    assert "40 % of h200's 990 TFLOP/s" in " ".join(time_lines(planned(), config(), launch, "bfloat16"))


def test_products_of_a_step() -> None:
    """`local`: one forward of all blocks, then of the converted ones' MLP once forward and once backward to its input."""
    plan = planned("training.objective=local", "model.rank=0", "model.gain=none")
    tokens, attention, mlp = 2 * 64, 2 * (2 * 64 * 64 + 2 * 64 * 32), 2 * 3 * 64 * 172
    scores = 2 * 64 * 64  # 2 x 2 x keys x d, half of it causal
    forward = tokens * 4 * (attention + mlp + scores)
    assert plan.step_flops == pytest.approx(forward + tokens * 2 * 2 * mlp, rel=0.02)


def test_steps_of_a_run() -> None:
    assert planned_steps(config("training.num_train_steps=7"), 4) == 7
    # 100 blocks, 10 of them to choose by; 90 in batches of 4 x 2 make 12, in steps of 3 batches 4, twice.
    options = ["training.gradient_accumulation_steps=3", "training.num_epochs=2", "data.num_train_samples=100"]
    assert planned_steps(config(*options), 4) == 8
    assert planned_steps(config("data.num_train_samples=null"), 4) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "0.0123 s"), (119, "119 s"), (150, "2.5 min"), (9000, "2.5 h"), (2e5, "2.31 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496)],
)
def test_known_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    model = shapes_of(LlamaConfig(**KNOWN_SHAPES[name]), None, torch.bfloat16)
    assert parameter_counts(model)[1] == parameters
    if "3.1" in name:
        assert model.config.dtype == torch.bfloat16
        rope = model.config.rope_parameters
        assert (rope["rope_theta"], rope["factor"], model.config.max_position_embeddings) == (500_000, 8, 131_072)
        assert not model.config.tie_word_embeddings
