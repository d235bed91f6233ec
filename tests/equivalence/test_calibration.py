"""The closed-form fit recovers what it can express, bears outliers and survives degenerate text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from npt import NPTConfig, calibrate
from npt.block.layer import BlockRecord, NPTLayer
from npt.equivalence import block_fit
from npt.equivalence.block_fit import BlockFit
from npt.equivalence.parts import shift_of
from npt.errors import NPTError
from npt.evaluation.divergence import token_divergences
from npt.tuner.converted import active_layers
from tests.helpers import blocks, random_base


def batches(count: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 96, (4, 64), generator=generator)} for _ in range(count)]


def model_with(kind: str = "llama", **options: Any) -> Any:
    return get_peft_model(random_base(kind, torch.float32), NPTConfig(**{"npt_layers": "all", "rank": 4, **options}))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"gain": "overlap"}, {"gain": "norm"}, {"low_rank_at": "projection"}])
def test_every_block_comes_closer(kind: str, options: Any) -> None:
    errors = calibrate(model_with(kind, **options), batches())
    assert sorted(errors) == ["layer_0", "layer_1", "layer_2", "layer_3"]
    assert all(e["error_after"] < 0.7 * e["error_before"] and e["tokens"] == 1024 for e in errors.values()), errors


def test_better_gains_fit_better() -> None:
    after = {}
    for gain in ("none", "norm", "overlap", "state"):
        errors = calibrate(model_with(gain=gain, rank=0), batches())
        after[gain] = sum(e["error_after"] for e in errors.values())
    assert after["state"] < after["overlap"] < after["norm"] < after["none"], after


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gain_denominator_has_nothing_to_fit(kind: str) -> None:
    model, text = model_with(kind, gain="denominator"), batches()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert calibrate(model, text) == {}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    divergence = token_divergences(model, blocks())
    assert divergence["kl"].mean() <= 1e-7
    # Without the carry it is the low-rank part that has to bring a: that is fitted, with the gain still exact.
    errors = calibrate(model_with(kind, gain="denominator", carry="none", rank=16), text)
    worse = calibrate(model_with(kind, gain="none", carry="none", rank=16), text)
    assert all(errors[name]["error_after"] < worse[name]["error_after"] for name in errors), (errors, worse)


def test_low_rank_takes_what_is_linear_in_attention() -> None:
    """Without carry and gain, a higher rank fits better, and full rank does better than the diagonal alone could."""
    after = []
    for rank in (1, 4, 16, 24):
        errors = calibrate(model_with(carry="none", gain="none", rank=rank), batches())
        after.append(sum(e["error_after"] for e in errors.values()))
    assert after == sorted(after, reverse=True) and after[-1] < 0.8 * after[0]


def test_result_does_not_depend_on_how_text_is_batched() -> None:
    one, other = model_with(), model_with()
    other.load_state_dict(one.state_dict())
    text = batches()
    calibrate(one, text)
    joined = torch.cat([b["input_ids"] for b in text])
    calibrate(other, [{"input_ids": row[None]} for row in joined])
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        if "npt_components" in name and ".A" not in name and ".B" not in name:
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    ids = text[0]["input_ids"]
    torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)


def test_padding_is_left_out() -> None:
    one, other = model_with(), model_with()
    other.load_state_dict(one.state_dict())
    text = batches(1)[0]["input_ids"]
    calibrate(one, [{"input_ids": text[:, :40]}])
    padded, mask = text.clone(), torch.ones_like(text)
    padded[:, 40:], mask[:, 40:] = 5, 0
    errors = calibrate(other, [{"input_ids": padded, "attention_mask": mask}])
    assert errors["layer_0"]["tokens"] == 160
    torch.testing.assert_close(one(text).logits, other(text).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"gain": "state"}, {"gain": "overlap"}, {"carry": "none", "gain": "none", "rank": 24}]
)
def test_planted_outliers_do_not_dominate(options: Any) -> None:
    """Massive attention in a few tokens (attention sinks) barely moves the fit of the others."""
    errors = []
    for outliers in (0, 8):
        (layer,) = active_layers(model_with(npt_layers=[1], **{"rank": 0, **options}))
        generator = torch.Generator().manual_seed(3)
        h = torch.randn(3000, 24, generator=generator)
        a = 0.3 * torch.randn(3000, 24, generator=generator)
        clean = (h[1000:], a[1000:])
        h, a = h[:1000].clone(), a[:1000].clone()
        a[:outliers] = 100 * torch.randn(24, generator=generator) + a[:outliers]
        errors.append(fitted_error(layer, h, a, *clean))
    assert errors[1] < 1.1 * errors[0], errors


@torch.no_grad()
def fitted_error(
    layer: NPTLayer, h: torch.Tensor, a: torch.Tensor, h_test: torch.Tensor, a_test: torch.Tensor
) -> float:
    """Relative error of the shift on other tokens, after a fit to (h, a)."""
    fit = BlockFit(layer, len(h))
    fit.see(BlockRecord(h[None], a[None], h[None]), torch.ones(1, len(h), dtype=torch.bool))
    fit.finish()
    z, delta = shift_of(layer, h_test, a_test)
    return float((delta - layer.component.input_values(a_test, z).shift).norm() / delta.norm())


@pytest.mark.parametrize("ids", [torch.full((2, 32), 7), torch.tensor([[3, 4]])])
def test_degenerate_text_gives_finite_values(ids: torch.Tensor) -> None:
    model = model_with(rank=16)
    calibrate(model, [{"input_ids": ids}])
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(ids).logits.isfinite().all()


def test_no_text_is_an_error() -> None:
    with pytest.raises(NPTError, match="no text"):
        calibrate(model_with(), [])
    ids = torch.ones(1, 8, dtype=torch.long)
    with pytest.raises(NPTError, match="no text"):
        calibrate(model_with(), [{"input_ids": ids, "attention_mask": 0 * ids}])


def test_base_is_not_touched_and_mode_is_kept() -> None:
    model = model_with()
    before = {n: p.clone() for n, p in model.named_parameters() if "npt_components" not in n}
    model.train()
    calibrate(model, batches())
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_real_checkpoint_without_a_gradient_step(pretrained_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The design's table for the closed form: gain `overlap` 0.045 relative block error, `state` a third less."""
    monkeypatch.setattr(block_fit, "PROBE_TOKENS", 1 << 30)  # measured on all that is kept: 512 tokens vary by 5 %
    errors = {}
    text = real_batches(pretrained_model)
    for gain in ("overlap", "state"):
        model, _ = pretrained_model(gain=gain)
        errors[gain] = [e["error_after"] for e in calibrate(model, text).values()]
    assert all(s < 0.8 * o < 0.05 for s, o in zip(errors["state"], errors["overlap"], strict=True)), errors


def real_batches(pretrained_model: Any) -> list[dict[str, torch.Tensor]]:
    from npt.data import sample_blocks

    model, tokenizer = pretrained_model()
    blocks = sample_blocks(model, tokenizer, 64, 128, seed=0, label="calibration")
    return [{"input_ids": torch.tensor(blocks[i : i + 16]["input_ids"])} for i in range(0, 64, 16)]
