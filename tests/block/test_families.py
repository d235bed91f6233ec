"""Every family, on small random models in float64, equals a formula written from the block's own submodules."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor

from npt import NPTConfig, calibrate
from npt.block.component import NORM_WEIGHT_EPSILON
from npt.block.families import FAMILIES, Family, family_of, register_family
from npt.block.modes import Mode, running_as, watching, watching_deltas
from npt.block.probing import logit_head
from npt.errors import ConversionError
from npt.evaluation.least_norm import LeastNorms
from npt.evaluation.look import observe
from npt.tuner.converted import active_layers, npt_layers, run_backbone
from scripts.family_list import DOCUMENT, NAME, family_list
from scripts.marked import ROOT, section
from tests.families import CASES, FEW, SIZES, Case, marks_of, raw
from tests.helpers import checked_as_original, randomize
from tests.mixtures import MIXTURES

EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
MANY = pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=marks_of(case)) for case in CASES])
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))
OPTIONS = [
    dict(zip(("key", "carry", "gain", "low_rank_at"), options, strict=True))
    for options in itertools.product(
        ("input", "tied", "learned"),
        ("none", "diagonal", "exact"),
        ("none", "norm", "overlap", "state"),
        ("input", "projection"),
    )
    if options[1] != "exact" or options[2:] == ("none", "input")
]
OPTIONS.append({"key": "input", "carry": "diagonal", "gain": "denominator", "low_rank_at": "input"})


def test_every_family_has_a_case() -> None:
    assert {case.model_type for case in CASES} | {mixture.name for mixture in MIXTURES} == set(FAMILIES)


def test_the_few_are_among_the_cases() -> None:
    assert {case.name for case in CASES} > FEW


def run_blocks(case: Case, model: Any) -> dict[int, dict[str, Any]]:
    """Per converted block h, a and its output, over the NPT model's own stream; a from the output projection's input."""
    seen: dict[int, dict[str, Any]] = {}
    handles = []
    for layer in npt_layers(model):
        entry, block = seen.setdefault(layer.index, {}), layer.get_base_layer()

        def attention(module: Any, args: Any, entry: Any = entry, block: Any = block) -> None:
            weight, bias = raw(module)
            entry["a"] = case.multiplier * case.after_attention(block, args[0] @ weight.T + bias)

        def keep(module: Any, args: Any, kwargs: Any, output: Any, entry: Any = entry) -> None:
            entry["h"], entry["rest"] = args[0] if args else kwargs["hidden_states"], args[1:2]
            entry["y"] = output[0] if isinstance(output, tuple) else output

        handles.append(case.source_of(block).register_forward_pre_hook(attention))
        handles.append(block.register_forward_hook(keep, with_kwargs=True))
    model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def output_of(case: Case, block: Any, stream: Tensor, rest: Any, token: tuple[int, int]) -> Tensor:
    """What a block makes of the residual stream behind its MLP, (d,)."""
    if case.tail is None:
        return stream
    return case.tail(block, stream, *(x[token] for x in rest if isinstance(x, Tensor)))


def explicit_update(case: Case, layer: Any, h: Tensor, a: Tensor, z: Tensor, original: Tensor) -> Tensor:
    """One token's update y - h from raw weights, every dW formed as an (out, in) matrix; vectors (d,)."""
    p, spec, block = layer.component, layer.component.spec, layer.get_base_layer()
    norm_weight, norm_bias, centered = case.norm_parts(block)
    ac = a - a.mean() if centered else a
    zb = z - norm_bias
    size, overlap = ac @ ac / len(a), zb * norm_weight / (norm_weight**2 + NORM_WEIGHT_EPSILON) @ ac / len(a)
    m = spec.modulation_scale * torch.tanh(ac @ p.A) if hasattr(p, "A") else None
    g: Any = 0.0
    w: Any = 1.0
    has_gain = not case.parallel and case.norm is not None and spec.gain != "none" and spec.carry != "exact"
    has_gain = has_gain and spec.projections != ("down",)
    if has_gain and spec.gain in ("state", "denominator"):
        if spec.gain == "state":
            units = torch.nn.functional.gelu(zb @ p.scale_hidden + p.scale_bias) @ p.scale_out
            sigma = torch.exp(p.log_scale[0] + p.scale_direction @ zb + units)
        else:
            sigma = (zb / norm_weight).norm() / (h - h.mean() * centered).norm()
            overlap = zb / norm_weight @ ac / len(a)
        q = (1 + 2 * sigma * overlap + sigma**2 * size) ** -0.5
        g, w = p.gain[0] * (q - 1), sigma * q
    elif has_gain:
        phi = torch.stack([size, overlap] if spec.gain == "overlap" else [size])
        g = p.gain[0] + phi @ p.gain[1:]
        w = 1 + phi @ p.carry_gain if spec.carry == "diagonal" else 1.0

    def value_and_delta(name: str, x: Tensor, weight: Tensor) -> Tensor:
        """dW of one projection; for down in the units of the residual stream."""
        key = x / (x @ x)
        if spec.carry == "exact":
            return torch.outer(a if name == "down" else weight @ (original - z), key)
        value = torch.zeros(len(weight), dtype=x.dtype)
        if name == "down" and spec.carry == "diagonal":
            value = p.e * a
        if name != "down":
            shift = g * zb
            if spec.carry == "diagonal" and not case.parallel:
                shift = shift + w * p.c * ac
            value = weight @ shift
        at_input = name != "down" and spec.low_rank_at == "input"
        b = p.B_in @ weight.T if at_input else getattr(p, f"B_{name}")
        if spec.key == "input":
            return torch.outer(value + m @ b, key)
        c = p.A if spec.key == "tied" else getattr(p, "C_in" if at_input else f"C_{name}")
        return torch.outer(value, key) + b.T @ torch.diag(m) @ c.T

    def project(name: str, x: Tensor) -> Tensor:
        weight, bias = case.projection(block, name)
        delta = value_and_delta(name, x, weight) if name in spec.projections else torch.zeros_like(weight)
        return (weight + delta) @ x + bias

    act = case.act(block)
    up = project("up", z)
    i = act(up) if case.gate is None else act(project("gate", z)) * up
    i = case.inner(block, i)
    weight, bias = case.projection(block, "down")
    # In the batch's shape: norms that compute in float32 round a lone row differently.
    update = case.multiplier * case.after(block, (weight @ i + bias).repeat(*IDS.shape, 1))[0, 0]
    return update + value_and_delta("down", i, weight) @ i if "down" in spec.projections else update


@EACH
@torch.no_grad()
def test_block_equals_explicit_formula_for_every_option(case: Case) -> None:
    model: Any = None
    for number, options in enumerate(OPTIONS):
        targets = ["gate", "up"] if options["key"] == "tied" else ["gate", "up", "down"]
        layers = [3] if isinstance(case.source, str) else [1, 3]  # of a hybrid one block of each kind
        config = NPTConfig(npt_layers=layers, rank=3, target_projections=targets, **options)
        if model is None:
            model = get_peft_model(case.build(), config, adapter_name="option-0").eval()
        else:
            model.add_adapter(f"option-{number}", config)
            model.set_adapter(f"option-{number}")
        randomize(model)
        seen = run_blocks(case, model)
        for layer in active_layers(model):
            block, (h, a, y) = layer.get_base_layer(), (seen[layer.index][k] for k in "hay")
            z = case.before(block, h)
            original = z if case.parallel else case.before(block, h + a)
            for token in ((0, 0), (1, 7)):
                expected = explicit_update(case, layer, h[token], a[token], z[token], original[token])
                found = output_of(case, block, h[token] + expected, seen[layer.index]["rest"], token)
                error = (y[token] - found).norm() / expected.norm()
                assert error <= 1e-10, f"{options}, block {layer.index}, token {token}: {error:.2g}"


@MANY
@pytest.mark.parametrize("targets", [["gate"], ["up"], ["down"], ["gate", "down"]])
@torch.no_grad()
def test_any_subset_of_projections(case: Case, targets: list[str]) -> None:
    if case.gate is None and targets == ["gate"]:
        pytest.skip("no gate in this family")
    for site in ("input", "projection"):
        config = NPTConfig(npt_layers=[2], rank=3, target_projections=targets, low_rank_at=site)
        model = get_peft_model(case.build(), config).eval()
        randomize(model)
        (layer,) = active_layers(model)
        seen = run_blocks(case, model)[2]
        h, a, y = (seen[k] for k in "hay")
        z = case.before(layer.get_base_layer(), h)
        expected = explicit_update(case, layer, h[1, 5], a[1, 5], z[1, 5], z[1, 5])
        found = output_of(case, layer.get_base_layer(), h[1, 5] + expected, seen["rest"], (1, 5))
        assert (y[1, 5] - found).norm() <= 1e-10 * expected.norm()


@MANY
@torch.no_grad()
def test_logits_are_made_of_the_last_hidden_states(case: Case) -> None:
    base = case.build()
    hidden = run_backbone(base, {"input_ids": IDS})
    torch.testing.assert_close(logit_head(base)(hidden), base(IDS).logits, rtol=1e-6, atol=1e-6)


@MANY
@torch.no_grad()
def test_observers_see_the_stream_behind_the_mlp(case: Case) -> None:
    """Of both models: h and the update, from which the block makes its output."""
    model = get_peft_model(case.build(), NPTConfig(npt_layers=[1, 3], rank=3)).eval()
    randomize(model)
    layers = active_layers(model)
    for mode, own in ((Mode.ORIGINAL, Mode.EXACT), (None, None)):
        records: dict[int, Any] = {}
        with running_as(layers, mode), watching(layers, lambda layer, r, found=records: found.update({layer.index: r})):
            seen = run_blocks(case, model)
        for layer in layers:
            record = records[layer.index]
            update = layer.update_from(record.hidden_states, record.attention, own)
            assert (record.output - record.hidden_states - update).norm() <= 1e-6 * update.norm()
            entry, token = seen[layer.index], (1, 5)
            made = output_of(case, layer.get_base_layer(), record.output[token], entry["rest"], token)
            assert (made - entry["y"][token]).norm() <= 1e-10 * entry["y"][token].norm()


@EACH
@torch.no_grad()
def test_exact_and_denominator_are_the_original_and_disabling_gives_it_back_bit_for_bit(case: Case) -> None:
    checked_as_original(case.build, IDS)


@MANY
@torch.no_grad()
def test_cached_generation_equals_uncached_also_after_save_and_load(case: Case, tmp_path: Path) -> None:
    model = get_peft_model(case.build(), NPTConfig(npt_layers="upper_half", rank=3)).eval()
    randomize(model)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    arguments: dict[str, Any] = {
        "input_ids": IDS.masked_fill(mask == 0, 0), "attention_mask": mask, "max_new_tokens": 12, "do_sample": False,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    cached = model.generate(**arguments, use_cache=True)
    assert torch.equal(cached, model.generate(**arguments, use_cache=False))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(case.build(), str(tmp_path)).eval()
    assert torch.equal(loaded.generate(**arguments, use_cache=True), cached)


@MANY
def test_calibration_brings_every_family_nearer_to_its_base(case: Case) -> None:
    base = case.build(torch.float32)
    ids = torch.randint(3, 96, (48, 16), generator=torch.Generator().manual_seed(7))
    model = get_peft_model(base, NPTConfig(npt_layers=[1, 3], rank=4))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids[:32].split(8)]
    errors = calibrate(model, batches)
    for figures in errors.values():
        if case.parallel or case.norm is None:  # nothing but sums to replace, and the start has them already
            assert figures["error_before"] < 1e-6 and figures["error_after"] < 1e-6, errors
        else:
            assert figures["error_after"] <= 0.95 * figures["error_before"], errors


def least_joint_norms(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """The figures of block 1."""
    norms = LeastNorms(model)
    observe(model, [batch], [norms])
    return norms.figures()["layer_1"]


@MANY
def test_least_joint_norm_is_below_the_exact_values(case: Case) -> None:
    """Searched for in float64 on every kind of block; the starting point is the exact value's own norm."""
    model = get_peft_model(case.build(), NPTConfig(npt_layers=[1], rank=2)).eval()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    found = least_joint_norms(model, batch)
    seen: list[Any] = []
    (layer,) = active_layers(model)
    with (
        torch.no_grad(),
        running_as([layer], Mode.EXACT),
        watching_deltas([layer], lambda q, deltas: seen.append(deltas)),
    ):
        model(IDS, use_cache=False)
    joint = sum(delta.frobenius_norm_square() for deltas in seen for delta in deltas.values()).sqrt().flatten()
    chosen = torch.linspace(0, joint.numel() - 1, found["tokens"]).round().long()
    assert abs(found["exact"] - float(joint[chosen].mean())) < 1e-8 * found["exact"]
    assert 0 < found["least_found"] < found["exact"]


def test_least_joint_norm_of_a_half_precision_base() -> None:
    (llama,) = (case for case in CASES if case.name == "llama")
    model = get_peft_model(llama.build(torch.bfloat16), NPTConfig(npt_layers=[1], rank=2)).eval()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    figures = least_joint_norms(model, batch)
    wide = get_peft_model(llama.build(), NPTConfig(npt_layers=[1], rank=2)).eval()
    expected = least_joint_norms(wide, batch)
    assert abs(figures["exact"] / expected["exact"] - 1) < 0.05
    assert figures["least_found"] < 0.8 * figures["exact"]


def wrong_lines(right: Family, weightless: bool) -> list[tuple[str, Family]]:
    """The table's line with one thing wrong each, where that makes a difference."""
    lines = [("parallel", replace(right, parallel=not right.parallel))]
    if not right.parallel and right.norm is not None and not weightless:
        lines.append(("norm", replace(right, norm="input_layernorm" if right.norm != "ln_2" else "ln_1")))
    if right.multiplier:
        lines.append(("multiplier", replace(right, multiplier=None)))
    if right.out:
        lines.append(("tap", replace(right, tap="self_attn.o_proj")))
    if right.out and right.tail is None:
        lines.append(("out", replace(right, out=None)))
    if right.tail is not None:
        lines.append(("tail", replace(right, tail=None)))
    return lines


@MANY
def test_a_planted_wrong_line_is_caught_at_conversion(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    base = case.build()
    weightless = case.model_type in ("olmo", "nanochat")  # one norm of theirs is as good as the other
    for name, line in wrong_lines(family_of(base), weightless):
        if name == "norm" and not hasattr(base.get_submodule(line.blocks)[0], str(line.norm)):
            continue
        monkeypatch.setitem(FAMILIES, case.model_type, line)
        with pytest.raises(ConversionError):
            get_peft_model(case.build(), NPTConfig(npt_layers="all"))
            pytest.fail(f"a wrong {name} was not noticed")


def test_the_documentation_lists_the_table() -> None:
    text = (ROOT / DOCUMENT).read_text(encoding="utf-8")
    assert section(text, NAME) == family_list(), "run python -m scripts.family_list"


def test_post_norm_opt_is_refused_with_the_reason() -> None:
    (opt,) = (case for case in CASES if case.model_type == "opt")
    base = replace(opt, options={**opt.options, "do_layer_norm_before": False}).build()
    with pytest.raises(ConversionError, match="do_layer_norm_before=false.*another size"):
        get_peft_model(base, NPTConfig())


MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
REFUSED = [
    ("beam", MOE, "mixtures of experts.*register_family"),
    ("jetmoe", MOE, "its attention is a mixture too"),
    ("longcat_flash", {"head_dim": None, "num_key_value_heads": 4}, "two attentions"),
    ("t5", {}, "encoder"),
    ("bart", {}, "is not supported; npt families lists the"),
    ("mamba", {}, "no MLP"),
    ("openai-gpt", {}, "normalises the residual stream itself"),
]


@pytest.mark.parametrize("model_type, options, reason", REFUSED)
def test_architectures_that_do_not_fit_are_refused_with_the_reason(model_type: str, options: Any, reason: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type](**SIZES, **{k: v for k, v in options.items() if k not in SIZES})
    kind = transformers.AutoModelForSeq2SeqLM if model_type == "t5" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        base = kind.from_config(config)
    with pytest.raises(ConversionError, match=reason):
        get_peft_model(base, NPTConfig())


def test_every_test_the_documentation_names_exists() -> None:
    ecosystem = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", ecosystem)
    assert len(named) > 35
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_a_tail_without_what_it_reads_is_refused() -> None:
    line = family_of(next(case for case in CASES if case.model_type == "gemma4_text").build())
    for wrong in ({"out": None}, {"multiplier": "layer_scalar"}):
        with pytest.raises(ConversionError, match="known with `out`"):
            replace(line, **wrong)  # type: ignore[arg-type]


def test_a_family_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "starcoder2")
    (case,) = (case for case in CASES if case.model_type == "starcoder2")
    with pytest.raises(ConversionError, match="'starcoder2'.*register_family"):
        get_peft_model(case.build(), NPTConfig())
    line = Family("model.layers", "self_attn.o_proj", "post_attention_layernorm", "mlp", "mlp.c_fc", "mlp.c_proj")
    register_family("starcoder2", line)
    get_peft_model(case.build(), NPTConfig())
