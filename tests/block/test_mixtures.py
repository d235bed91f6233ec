"""Mixtures of experts: the shift reaches the router and every expert, and attention's part joins what they give together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from npt import EditStore, NPTConfig, calibrate, evaluate
from npt.block.families import FAMILIES, Family, family_of
from npt.block.mixture import mixture_deltas, routing_of
from npt.block.modes import watching, watching_deltas
from npt.block.probing import BlockParts, logit_head
from npt.equivalence.objectives import Objective
from npt.errors import ConversionError
from npt.evaluation.look import observe
from npt.evaluation.weight_deltas import WeightDeltas
from npt.finetuning.other_methods import places_of
from npt.tuner.converted import active_layers, run_backbone
from tests.helpers import checked_as_original, randomize, spelling_tokenizer
from tests.mixtures import MIXTURES, Mixture, named

#: One of each way to write the experts: plain, a shared expert behind a gate, transposed with biases, a router that scales
#: what experts read.
WRITTEN_OUT = ("mixtral", "qwen2_moe", "gpt_oss", "llama4_text")
#: Those of the default suite: these, a dense first block, post-norm, parallel, a multiplier.
FEW = {*WRITTEN_OUT, "deepseek_v3", "flex_olmo", "cohere2_moe", "granitemoeshared"}
EACH = pytest.mark.parametrize(
    "mixture",
    [pytest.param(m, id=m.name, marks=[] if m.name in FEW else [pytest.mark.slow]) for m in MIXTURES],
)
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def converted(mixture: Mixture, layers: Any = "all", **options: Any) -> Any:
    """A converted model that differs from its base."""
    model = get_peft_model(mixture.build(), NPTConfig(npt_layers=layers, rank=3, **options)).eval()
    randomize(model, 0.05)
    return model


@EACH
@torch.no_grad()
def test_exact_and_denominator_are_the_original(mixture: Mixture) -> None:
    layers = active_layers(checked_as_original(mixture.build, IDS))
    assert tuple(i for i, layer in enumerate(layers) if layer.parts.experts is not None) == mixture.blocks


@EACH
@torch.no_grad()
def test_logits_are_made_of_the_last_hidden_states(mixture: Mixture) -> None:
    base = mixture.build()
    logits = logit_head(base)(run_backbone(base, {"input_ids": IDS}))
    torch.testing.assert_close(logits, base(IDS).logits, rtol=1e-6, atol=1e-6)


@EACH
@torch.no_grad()
def test_a_block_is_its_mlp_of_the_shifted_input_and_the_value(mixture: Mixture) -> None:
    for options in ({"carry": "diagonal", "gain": "state"}, {"carry": "none", "gain": "none"}, {"gain": "denominator"}):
        model, seen = converted(mixture, **options), []
        layers = active_layers(model)
        with watching(layers, lambda layer, record, seen=seen: seen.append((layer, record))):
            model(IDS, use_cache=False)
        for layer, record in seen:
            h, a, y = record.hidden_states, record.attention, record.output
            parts, component = layer.parts, layer.component
            z, _ = parts.mlp_inputs(h, a)
            shift = component.input_values(a, z, None, component.norm_scale(h, z)).shift
            value = component.down_value(a, z, component.modulation(a))
            update = parts.module("mlp").forward(z + shift)
            update = update[0] if isinstance(update, tuple) else update
            if parts.family.beside is not None:
                update = update + parts.module("beside").forward(z + shift)
            update = update.view_as(z) if parts.family.out is None else parts.module("out").forward(update.view_as(z))
            expected = h + parts.multiplier * update + value
            assert (y - expected).norm() <= 1e-10 * (expected - h).norm(), f"block {layer.index}, {options}"


def experts_of(name: str, mlp: Any, z: Tensor) -> dict[str, Any]:
    """One token's routed experts, written out: {weights (k,), chosen (k,), scales (k,) of what they read, if any}."""
    router = getattr(mlp, "router", None) or mlp.gate
    logits = router.weight @ z + (router.bias if name == "gpt_oss" else 0)
    values, chosen = logits.topk(2)
    if name == "gpt_oss":
        return {"weights": values.softmax(-1), "chosen": chosen}
    if name == "llama4_text":
        return {"weights": torch.ones(2), "chosen": chosen, "scales": torch.sigmoid(values.float()).double()}
    values, chosen = logits.float().softmax(-1).double().topk(2)
    return {"weights": values / values.sum() if name == "mixtral" else values, "chosen": chosen}


def half(name: str, mlp: Any, expert: int, path: str) -> tuple[Tensor, Tensor | float]:
    """(W (out, in), bias) of an expert."""
    weight = getattr(mlp.experts, path)[expert]
    bias = getattr(mlp.experts, f"{path}_bias")[expert] if name == "gpt_oss" else 0.0
    return (weight.T if name in ("gpt_oss", "llama4_text") else weight), bias


def gated(name: str, out: Tensor) -> Tensor:
    """down's input of an expert, from gate and up together."""
    if name == "gpt_oss":
        gate, up = out[::2].clamp(max=7.0), out[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = out.chunk(2)
    return torch.nn.functional.silu(gate) * up


def written_out(name: str, mlp: Any, z: Tensor, shift: Tensor, value: Tensor) -> tuple[Tensor, dict[str, float]]:
    """(the MLP's output with every dW formed as a matrix, {projection: sum of |dW|_F^2}) of one token; vectors (d,)."""
    key, squares = z / (z @ z), {"up": 0.0, "down": 0.0}

    def moved(weight: Tensor) -> Tensor:
        delta = torch.outer(weight @ shift, key)
        squares["up"] += float(delta.square().sum())
        return weight + delta

    routed = experts_of(name, mlp, z + shift)
    router = getattr(mlp, "router", None) or mlp.gate
    logits = moved(router.weight) @ z + (router.bias if name == "gpt_oss" else 0)
    assert set(logits.topk(2).indices.tolist()) == set(routed["chosen"].tolist())
    # (W + dW, bias, down's input, its weight) of every projection at work
    work: list[tuple[Tensor, Any, Tensor, Tensor]] = []
    scales = routed.get("scales", [1.0, 1.0])
    for weight, expert, scale in zip(routed["weights"], routed["chosen"].tolist(), scales, strict=True):
        up, bias = half(name, mlp, expert, "gate_up_proj")
        work.append((*half(name, mlp, expert, "down_proj"), gated(name, scale * (moved(up) @ z) + bias), weight))
    if hasattr(mlp, "shared_expert"):
        shared = mlp.shared_expert
        inner = torch.nn.functional.silu(moved(shared.gate_proj.weight) @ z) * (moved(shared.up_proj.weight) @ z)
        share = torch.ones(())
        if name == "qwen2_moe":
            share = torch.sigmoid(mlp.shared_expert_gate.weight @ (z + shift))[0]
        work.append((shared.down_proj.weight, 0.0, inner, share))
    v = value / sum(weight for *_, weight in work)
    total = torch.zeros_like(z)
    for down, bias, inner, weight in work:
        delta = torch.outer(v, inner / (inner @ inner))
        squares["down"] += float(delta.square().sum())
        total = total + weight * ((down + delta) @ inner + bias)
    return total, squares


@pytest.mark.parametrize("name", WRITTEN_OUT)
@torch.no_grad()
def test_deltas_formed_in_router_experts_and_shared_expert_give_the_block(name: str) -> None:
    """To 1e-6: the routers of transformers compute in float32."""
    model, records, norms = converted(named(name), [2]), [], []
    (layer,) = active_layers(model)
    with (
        watching([layer], lambda layer, record: records.append(record)),
        watching_deltas([layer], lambda layer, deltas: norms.append(deltas)),
    ):
        model(IDS, use_cache=False)
    (record,), (deltas,) = records, norms
    z, _ = layer.parts.mlp_inputs(record.hidden_states, record.attention)
    component = layer.component
    shift = component.input_values(record.attention, z, None, None).shift
    value = component.down_value(record.attention, z, component.modulation(record.attention))
    for token in ((0, 0), (0, 5), (1, 7)):
        found, squares = written_out(name, layer.module("mlp"), z[token], shift[token], value[token])
        expected = record.output[token] - record.hidden_states[token]
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        for projection, square in squares.items():
            assert float(deltas[projection].frobenius_norm_square()[token]) == pytest.approx(square, rel=1e-6)


#: Factors on routing weights, under the names that configurations have for them: in the router or behind the experts.
SCALED = {
    "routed_scaling_factor": 2.5,
    "moe_routed_scaling_factor": 2.5,
    "router_scaling_factor": 2.5,
    "route_scale": 2.5,
}


@pytest.mark.parametrize(
    "mixture",
    [
        pytest.param(
            m,
            id=m.name,
            marks=[] if m.name in {"qwen2_moe", "cohere2_moe", "laguna", "granitemoehybrid"} else [pytest.mark.slow],
        )
        for m in MIXTURES
    ],
)
@torch.no_grad()
def test_one_value_for_each_down_at_work_is_the_value_behind_the_mlp(mixture: Mixture) -> None:
    """Added to what each expert at work and the shared expert give, in float64; `average` of cohere2_moe is its default."""
    base = replace(mixture, options={**mixture.options, **SCALED}).build()
    family = family_of(base)
    parts = BlockParts(base.get_submodule(family.blocks)[mixture.blocks[0]], family)
    mlp, routed = parts.module("mlp"), []
    if hasattr(mlp, "post_mlp_layernorm"):  # axk1's: the value of `down` is in the units of what the norm reads
        mlp.post_mlp_layernorm = torch.nn.Identity()
    z, shift, value = torch.randn(3, 1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    beside = [parts.module("beside")] if family.beside is not None else []

    def output() -> Tensor:
        found = mlp(z + shift)
        found = (found[0] if isinstance(found, tuple) else found).view_as(z)
        return sum((module(z + shift) for module in beside), found)

    parts.experts.register_forward_pre_hook(lambda m, args: routed.append(routing_of(args, mlp)))
    before = output()
    v = mixture_deltas(parts, shift, value, z, routed[0])["down"].value[0]

    def add(module: Any, args: Any, out: Tensor) -> Tensor:
        if len(args) == 3:
            return out + (args[2].sum(-1, keepdim=True) * v).view_as(out)
        return out + args[0].any(-1, keepdim=True) * v.repeat(len(out) // len(v), 1)  # all experts, one below the other

    parts.experts.register_forward_hook(add)
    shared = [child for name, child in mlp.named_children() if name.startswith("shared") and not name.endswith("gate")]
    for child in shared + beside:
        child.register_forward_hook(lambda m, args, out: out + v.view_as(out))
    # hy_v3 adds experts and shared expert up in float32.
    torch.testing.assert_close(output() - before, value, rtol=1e-5, atol=1e-6)


@EACH
@torch.no_grad()
def test_report_figures_of_the_exact_value_are_those_of_a_model_that_starts_exact(mixture: Mixture) -> None:
    """Also in the dense blocks of such a model."""
    model = get_peft_model(mixture.build(), NPTConfig(npt_layers="all", rank=3, gain="denominator")).eval()
    deltas = WeightDeltas(model)
    observe(model, [BATCH], [deltas])
    figures = deltas.figures()
    assert figures["mean_frobenius"] == pytest.approx(figures["exact_frobenius"], rel=1e-3)
    for entry in figures["per_layer"].values():
        assert set(entry) == {"up", "down"}
        for name, own in entry.items():
            zero = name == "up" and family_of(model.get_base_model()).parallel  # attention leaves the MLP's input alone
            assert own["weight_frobenius"] > 0 and (own["rms_entry"] == 0) == zero, name


class _Hidden(torch.nn.Module):
    """Experts whose weights nobody can see, as those of a quantiser's kernel."""

    def __init__(self, experts: Any):
        super().__init__()
        self.call = lambda *args: experts(*args)

    def forward(self, *args: Any) -> Tensor:
        return self.call(*args)


@pytest.mark.parametrize("name", ["qwen2_moe", "llama4_text"])
@torch.no_grad()
def test_the_forward_reads_no_weight_of_an_expert_and_norms_say_what_they_lack(name: str) -> None:
    expected = converted(named(name))(IDS).logits
    base = named(name).build()
    for index in named(name).blocks:
        mlp = BlockParts(base.model.layers[index], family_of(base)).module("mlp")
        mlp.experts = _Hidden(mlp.experts)
    model = get_peft_model(base, NPTConfig(npt_layers="all", rank=3)).eval()
    randomize(model, 0.05)
    assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(ConversionError, match="experts' weights are not one tensor.*the model itself runs"):
        observe(model, [BATCH], [WeightDeltas(model)])


@EACH
@torch.no_grad()
def test_cached_generation_equals_uncached_also_after_save_and_load(mixture: Mixture, tmp_path: Path) -> None:
    model = converted(mixture, "upper_half")
    arguments: dict[str, Any] = {
        "input_ids": IDS, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0
    }  # fmt: skip
    cached = model.generate(**arguments, use_cache=True)
    assert torch.equal(cached, model.generate(**arguments, use_cache=False))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(mixture.build(), str(tmp_path)).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@EACH
def test_calibration_brings_it_nearer(mixture: Mixture) -> None:
    ids = torch.randint(3, 96, (48, 16), generator=torch.Generator().manual_seed(7))
    model = get_peft_model(mixture.build(torch.float32), NPTConfig(npt_layers=[1, 3], rank=4))
    family = family_of(model.get_base_model())
    for figures in calibrate(model, [{"input_ids": part} for part in ids[:32].split(8)]).values():
        if family.parallel or family.norm is None:  # nothing but sums to replace, and the start has them already
            assert figures["error_before"] < 1e-6 and figures["error_after"] < 1e-6
        else:
            assert figures["error_after"] <= 0.95 * figures["error_before"]


@pytest.mark.parametrize("name", ["mixtral", "granitemoeshared", "flex_olmo"])
def test_a_planted_wrong_line_is_caught_at_conversion(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = named(name).build()
    right = family_of(base)
    wrong = [replace(right, parallel=not right.parallel)]
    if right.norm is not None:
        wrong.append(replace(right, norm="input_layernorm"))
    if right.multiplier:
        wrong.append(replace(right, multiplier=None))
    if right.beside:
        wrong.append(replace(right, beside=None))
    if right.out:
        wrong.append(replace(right, out=None, down="mlp.experts"))
    for line in wrong:
        monkeypatch.setitem(FAMILIES, name, line)
        with pytest.raises(ConversionError):
            get_peft_model(named(name).build(), NPTConfig(npt_layers="all"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"mlp": "mlp.experts", "up": "mlp.experts", "down": "mlp"},  # the router is not shifted
        {"down": "mlp.shared_expert"},  # the value joins the shared expert's output alone, times its gate
        {"down": "mlp.experts", "up": "mlp.experts", "mlp": "mlp.experts"},  # the shared expert is forgotten
    ],
)
def test_a_wrong_place_inside_the_mixture_is_caught(wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = FAMILIES["qwen2_moe"]
    assert isinstance(right, Family)
    monkeypatch.setitem(FAMILIES, "qwen2_moe", replace(right, **wrong))  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="breaks the conversion contract"):
        get_peft_model(named("qwen2_moe").build(), NPTConfig(npt_layers="all"))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"key": "learned"}, "key='learned'.*for every expert.*key='input'"),
        ({"key": "tied", "target_projections": ["up"]}, "key='tied'.*for every expert"),
        ({"low_rank_at": "projection"}, "low_rank_at='projection'.*for every expert"),
        ({"target_projections": ["gate"]}, "MLP has up, down only"),
    ],
)
def test_options_that_need_weights_of_each_expert_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        get_peft_model(named("mixtral").build(), NPTConfig(**options))


@torch.no_grad()
def test_the_report_says_how_often_both_models_route_alike() -> None:
    """Against the routers' own logits; block 1 is not converted, and block 0 is below the first that is."""
    model = converted(named("mixtral"), [1, 3])
    routed: list[dict[int, Tensor]] = []
    base = model.get_base_model()
    for off in (True, False):
        chosen: dict[int, Tensor] = {}
        handles = [
            block.mlp.gate.register_forward_hook(lambda m, a, o, i=i, c=chosen: c.update({i: o[2].sort(-1).values}))
            for i, block in enumerate(base.model.layers)
        ]
        if off:
            with model.disable_adapter():
                model(IDS, use_cache=False)
        else:
            model(IDS, use_cache=False)
        routed.append(chosen)
        for handle in handles:
            handle.remove()
    report = evaluate(model, spelling_tokenizer(), datasets.Dataset.from_dict({"input_ids": IDS.tolist()}),
                      context_length=9, prompts=[])  # fmt: skip
    routing = report["evaluations"]["routing"]
    assert list(routing["per_layer"]) == ["layer_1", "layer_2", "layer_3"]
    for index in (1, 2, 3):
        one, other = routed[0][index], routed[1][index]
        same = float((one == other).all(-1).double().mean())
        figures = routing["per_layer"][f"layer_{index}"]
        assert figures["agreement"] == pytest.approx(same) and figures["experts_per_token"] == 2
        assert figures["agreement"] <= figures["shared_experts"] <= 1
    assert 0 < routing["mean_agreement"] < 1
    assert report["evaluations"]["weight_delta_stats"]["least_joint_norm"] == {}


def test_edits_and_other_methods_on_a_mixture_are_refused_with_the_reason() -> None:
    base = named("mixtral").build()
    with pytest.raises(ConversionError, match="mixture of experts: edits are written into one down projection.*dense"):
        EditStore(base, spelling_tokenizer())
    with pytest.raises(ConversionError, match="mixture of experts: LoRA and DoRA.*dense"):
        places_of(base, [1], ("up", "down"))


@pytest.mark.parametrize("name", [*WRITTEN_OUT, "flex_olmo", "granitemoehybrid"])
def test_training_steps_are_those_of_a_checkpointed_model(name: str) -> None:
    """Both objectives with the norms of deltas as regulariser, which read the experts."""
    model = get_peft_model(named(name).build(), NPTConfig(npt_layers=[2, 3], rank=2))
    randomize(model, 0.05)
    batch = {**BATCH, "labels": IDS}
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        for objective in ("local", "logits"):
            losses = Objective(objective, scales={2: 1.0, 3: 1.0}, regularization_weight=0.1)(model, batch, 16.0)
            assert float(losses.regularization) > 0
            losses.total.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0] and len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
