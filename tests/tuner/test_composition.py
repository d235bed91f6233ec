"""NPT models of several families work with what transformers and PEFT offer, from caches to LoRA and compilation."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from npt import NPTConfig, calibrate
from npt.block.families import hand_on
from npt.equivalence.objectives import Objective
from npt.errors import ConversionError
from npt.tuner.converted import active_layers, npt_layers
from tests.families import CASES, Case, marks_of
from tests.helpers import randomize, transformers_own_adapters

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))
BY_NAME = {case.name: case for case in CASES}
#: One of each kind of block: gated, fused, plain, parallel, scaled, post-norm, sandwich, flattened tokens, recurrent.
KINDS = ("llama", "phi3", "gpt2", "cohere", "granite", "olmo2", "gemma2", "opt", "qwen3_5_text")
EACH = pytest.mark.parametrize("name", KINDS)
EVERY = pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=marks_of(case)) for case in CASES])


def convert(name: str | Case, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    case = BY_NAME[name] if isinstance(name, str) else name
    return _converted(case, dtype, **options)


def convert_few(name: str, blocks: int, **options: Any) -> Any:
    """As `convert`, with so many blocks: compiling takes a second for each."""
    case = BY_NAME[name]
    return _converted(replace(case, options={**case.options, "num_hidden_layers": blocks}), torch.float64, **options)


def _converted(case: Case, dtype: torch.dtype, **options: Any) -> Any:
    model = get_peft_model(case.build(dtype), NPTConfig(**{"npt_layers": "all", "rank": 3, **options})).eval()
    randomize(model, 0.05)
    return model


def gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(case: Case, reentrant: bool) -> None:
    model = convert(case, torch.float64)
    if not model.base_model.model.supports_gradient_checkpointing:
        pytest.skip("transformers has no gradient checkpointing for this family")
    if reentrant and hand_on(model.get_base_model()):
        pytest.skip(
            "keys and values that blocks hand on have no gradient in a reentrant checkpoint, in transformers either"
        )
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    calls = []
    npt_layers(model)[0].module("down").register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(model)
    assert len(calls) == 2, "the block was not recomputed"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


COMPILED = [
    *((name, {}) for name in KINDS if name != "qwen3_5_text"),  # whose own linear attention breaks the graph
    ("llama", {"carry": "exact"}),
    ("llama", {"key": "learned", "low_rank_at": "projection"}),
]


@pytest.mark.parametrize("name, options", COMPILED, ids=lambda part: part if isinstance(part, str) else "-".join(part))
def test_compiled_whole_equals_eager(name: str, options: dict[str, Any]) -> None:
    """Logits and, but for the exact adapter, which has none, gradients."""
    model = convert_few(name, 2 if name == "llama" else 1, **options)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = None if name == "gpt2" else IDS  # transformers' loss warns of its configuration, which breaks the graph
    found, expected = (run(input_ids=IDS, labels=labels, use_cache=False) for run in (compiled, model))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert bool(trained) == (options.get("carry") != "exact")
    if trained:
        losses = [out.logits.square().mean() if labels is None else out.loss for out in (found, expected)]
        for a, b in zip(*(torch.autograd.grad(loss, trained) for loss in losses), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def generate(model: Any, rows: int = 2, **options: Any) -> torch.Tensor:
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **options}
    ids = IDS[:rows]
    result: torch.Tensor = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    return result


@EACH
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches(name: str, cache: str) -> None:
    model = convert(name)
    assert torch.equal(generate(model, cache_implementation=cache), generate(model, use_cache=False))


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_sliding_window_cache(name: str) -> None:
    """Their windows of 4 tokens are far shorter than the 21 tokens of the text."""
    model = convert(name)
    assert model.config.sliding_window == 4
    assert torch.equal(generate(model), generate(model, use_cache=False))


@pytest.mark.slow
def test_quantised_cache() -> None:
    """A cache of 4 bits changes what any model writes; the exact adapter must write what its base does with it."""
    pytest.importorskip("optimum.quanto")
    model = convert("llama", carry="exact")
    options = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4},
    }
    with model.disable_adapter():
        expected = generate(model, **options)
    assert torch.equal(generate(model, **options), expected)


@EACH
def test_beam_search(name: str) -> None:
    model = convert(name)
    if name == "qwen3_5_text":
        pytest.skip("transformers can't reorder its recurrent states")
    assert torch.equal(generate(model, num_beams=3), generate(model, num_beams=3, use_cache=False))


def test_assisted_generation_and_prompt_lookup() -> None:
    model = convert("llama")
    expected = generate(model, rows=1, use_cache=False)
    assert torch.equal(generate(model, rows=1, assistant_model=BY_NAME["llama"].build(torch.float32)), expected)
    assert torch.equal(generate(model, rows=1, prompt_lookup_num_tokens=3), expected)


@torch.no_grad()
def test_an_npt_model_can_assist() -> None:
    base, helper = BY_NAME["llama"].build(torch.float32), convert("llama", carry="exact")
    assert torch.equal(generate(base, rows=1, assistant_model=helper), generate(base, rows=1))


@EACH
@torch.no_grad()
def test_left_padding(name: str) -> None:
    model = convert(name)
    row = IDS[:1]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), row], 1)
    mask = (padded != 0).long()
    positions = {} if name == "opt" else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    found = model(padded, attention_mask=mask, **positions).logits[:, 4:]
    torch.testing.assert_close(found, model(row).logits, rtol=1e-4, atol=1e-4)


@EACH
@torch.no_grad()
def test_hidden_states_and_inputs_embeds(name: str) -> None:
    model = convert(name, torch.float64)
    out = model(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    head_in = model.get_base_model().get_output_embeddings()
    assert out.hidden_states[-1].shape[-1] == head_in.weight.shape[1]
    embeds = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, out.logits, rtol=1e-12, atol=1e-12)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_as_near_as_the_base_is(name: str, dtype: torch.dtype) -> None:
    model = convert(name, torch.float32)
    expected, weights = model(IDS).logits, model.state_dict()
    half = convert(name, dtype)
    half.load_state_dict(weights)
    assert {p.dtype for layer in active_layers(half) for p in layer.component.parameters()} == {torch.float32}
    found = half(IDS).logits
    with model.disable_adapter(), half.disable_adapter():
        base, base_half = model(IDS).logits, half(IDS).logits
    assert found.dtype == base_half.dtype
    rounding = (base_half.float() - base).norm() / base.norm()
    assert (found.float() - expected).norm() / expected.norm() < 4 * rounding


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model = convert(name)
    expected = gradients(model)
    with torch.autocast("cpu", dtype):
        found = gradients(model)
    a, b = (torch.cat([g.flatten() for g in parts]) for parts in (found, expected))
    assert torch.isfinite(a).all()
    assert torch.nn.functional.cosine_similarity(a, b, 0) > 0.99


@torch.no_grad()
def test_low_cpu_mem_usage_and_device_map(tmp_path: Path) -> None:
    model = convert("llama")
    expected = model(IDS).logits
    model.save_pretrained(str(tmp_path / "adapter"))
    with model.disable_adapter():
        BY_NAME["llama"].build(torch.float32).save_pretrained(str(tmp_path / "base"))
    for base_options, options in (
        ({}, {"low_cpu_mem_usage": True}),
        ({"device_map": "auto"}, {}),
        ({"device_map": {"": "cpu"}, "low_cpu_mem_usage": True}, {"device_map": {"": "cpu"}}),
    ):
        base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"), **base_options)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), **options)
        assert torch.equal(loaded(IDS).logits, expected)


@torch.no_grad()
def test_transformers_own_load_adapter(tmp_path: Path) -> None:
    model = convert("llama", npt_layers=[1, 3])
    model.save_pretrained(str(tmp_path / "adapter"))
    base = BY_NAME["llama"].build(torch.float32)
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(base(IDS).logits, model(IDS).logits)


@transformers_own_adapters
@torch.no_grad()
def test_transformers_own_disable_adapters() -> None:
    base = BY_NAME["llama"].build(torch.float32)
    before = base(IDS).logits
    base.add_adapter(NPTConfig(npt_layers=[1, 3]))
    assert not torch.equal(base(IDS).logits, before)
    base.disable_adapters()
    assert torch.equal(base(IDS).logits, before)


@torch.no_grad()
def test_deepcopy_is_independent_of_the_original() -> None:
    model = convert("gemma2")
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    for layer in active_layers(twin):
        layer.component.e.add_(1.0)
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(twin(IDS).logits, expected)


LORA_TARGETS = pytest.mark.parametrize("targets", [["q_proj"], ["o_proj"], ["gate_proj", "up_proj", "down_proj"]])


def lora(targets: list[str]) -> LoraConfig:
    return LoraConfig(target_modules=targets, r=2, init_lora_weights=False)


@LORA_TARGETS
@torch.no_grad()
def test_lora_before_and_after_give_the_same_model(targets: list[str]) -> None:
    """Also with LoRA on the very linears the hooks were on: attention's part of it must not reach the residual stream."""
    options: dict[str, Any] = {"npt_layers": "all", "rank": 3, "target_projections": ["up", "down"]}
    first = get_peft_model(BY_NAME["llama"].build(), lora(targets))
    first = get_peft_model(first.get_base_model(), NPTConfig(**options)).eval()
    randomize(first)
    second = get_peft_model(BY_NAME["llama"].build(), NPTConfig(**options))
    second = get_peft_model(second.get_base_model(), lora(targets)).eval()
    values = {key.split(".model.", 1)[1]: value for key, value in first.state_dict().items()}
    own = second.state_dict()
    second.load_state_dict({key: _named_alike(key.split(".model.", 1)[1], values) for key in own})
    torch.testing.assert_close(second(IDS).logits, first(IDS).logits, rtol=1e-12, atol=1e-12)


def _named_alike(key: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value under a key, whatever prefix of wrappers it carries."""
    (found,) = (value for name, value in values.items() if name == key)
    return found


@LORA_TARGETS
@torch.no_grad()
def test_exact_carries_a_lora_model(targets: list[str]) -> None:
    base = get_peft_model(BY_NAME["llama"].build(), lora(targets)).eval()
    expected = base(IDS).logits
    model = get_peft_model(base.get_base_model(), NPTConfig(npt_layers="all", carry="exact")).eval()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-10, atol=1e-10)


def test_a_peft_model_is_refused_with_the_remedy() -> None:
    wrapped = get_peft_model(BY_NAME["llama"].build(), lora(["q_proj"]))
    with pytest.raises(ConversionError, match="get_base_model"):
        get_peft_model(wrapped, NPTConfig())


@torch.no_grad()
def test_adapters_switched_per_call() -> None:
    model = convert("llama")
    model.add_adapter("other", NPTConfig(npt_layers=[0, 2], rank=2))
    model.set_adapter("other")
    randomize(model, seed=3)
    outputs: dict[str, torch.Tensor] = {}
    for _ in range(2):
        for name in ("default", "other"):
            model.set_adapter(name)
            found = model(IDS).logits
            assert torch.equal(outputs.setdefault(name, found), found)
    assert not torch.equal(outputs["default"], outputs["other"])
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, BY_NAME["llama"].build(torch.float32)(IDS).logits)


@torch.no_grad()
def test_quantised_linears_are_called_and_their_weight_is_never_read() -> None:
    """What 8-bit and 4-bit bases need: a linear whose weight is no matrix any more."""

    class Packed(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.hidden, self.bias = [linear], None
            self.weight = torch.nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.hidden[0](x)
            return result

    base = BY_NAME["llama"].build()
    expected = base(IDS).logits
    for block in base.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(block.mlp, name, Packed(getattr(block.mlp, name)))
        block.self_attn.o_proj = Packed(block.self_attn.o_proj)
    for options in ({"carry": "exact"}, {"key": "learned"}, {"low_rank_at": "projection", "gain": "norm"}):
        model = get_peft_model(base, NPTConfig(npt_layers="all", rank=3, **options)).eval()
        found = model(IDS).logits
        assert torch.isfinite(found).all()
        if options.get("carry") == "exact":
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        base = model.unload()


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_base(bits: int, tmp_path: Path) -> None:
    """On a GPU where there is one, else on the CPU."""
    from transformers import BitsAndBytesConfig

    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    # 4 bits come in blocks of 64
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    BY_NAME["llama"].build(dtype, **wide).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map=place)
    linear = base.model.layers[0].mlp.up_proj
    assert type(linear).__module__.startswith("bitsandbytes"), "the base is not quantised"
    ids = IDS.to(place)
    with torch.no_grad():
        expected = base(ids).logits
        model = get_peft_model(base, NPTConfig(npt_layers="all", carry="exact")).eval()
        torch.testing.assert_close(model(ids).logits, expected, rtol=2e-2, atol=2e-2)
        base = model.unload()
    model = get_peft_model(base, NPTConfig(npt_layers=[1, 3], rank=4))
    text = torch.randint(3, 96, (32, 16), generator=torch.Generator().manual_seed(7)).to(place)
    for figures in calibrate(model, [{"input_ids": part} for part in text.split(8)]).values():
        assert figures["error_after"] < 0.95 * figures["error_before"]
    losses = Objective("local", scales={1: 1.0, 3: 1.0})(model, {"input_ids": text, "attention_mask": torch.ones_like(text),
                                                                "labels": text}, 480.0)  # fmt: skip
    losses.total.backward()
    grads = [p.grad for n, p in model.named_parameters() if ".npt" in n and p.requires_grad]
    assert grads and all(g is not None and g.isfinite().all() for g in grads)
