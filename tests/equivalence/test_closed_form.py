"""Each piece of the closed-form fit equals the formulas of docs/maths.md, section 4, written out in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from npt import NPTConfig
from npt.block.layer import BlockRecord
from npt.block.modes import Mode, running_as
from npt.equivalence import block_fit, closed_form, parts
from npt.equivalence.block_fit import BlockFit, _fit_low_rank, first_tokens, fit_gain_and_carry
from npt.equivalence.closed_form import solve_ridge
from npt.equivalence.parts import Part
from npt.tuner.converted import active_layers
from tests.equivalence.stand_ins import CUTOFF, NO_CUTOFF, Block, D, normal, parts_of, tokens, weights_of
from tests.helpers import random_base


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("carry", ["diagonal", "none"])
@pytest.mark.parametrize("gain", ["none", "norm", "overlap", "state"])
@torch.no_grad()
def test_gain_and_carry(gain: str, carry: str, centered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rounds: c of each channel given the gains, then the gains given c, each an explicit weighted least squares."""
    monkeypatch.setattr(parts, "SLICE_TOKENS", 16)
    block: Any = Block(gain=gain, carry=carry, centered=centered)
    p, (h, a) = block.component, tokens()
    fit_gain_and_carry(block, p, parts_of(h, a), CUTOFF)
    z, original = block.mlp_inputs(h, a)
    target = original - z
    root = weights_of(target, a, CUTOFF).sqrt()
    assert 0.05 < (root < 1).double().mean() < 0.5  # the cutoff has something to do
    z = z - p.norm_bias
    ac = a - a.mean(-1, keepdim=True) if centered else a
    size, overlap = ac.square().mean(-1, keepdim=True), (z * p.norm_inverse * ac).mean(-1, keepdim=True)
    phi = {"none": [], "norm": [size], "overlap": [size, overlap], "state": []}[gain]
    of_z, of_a = [z, *(f * z for f in phi)], [ac, *(f * ac for f in phi)]
    if gain == "state":
        sigma = torch.exp(p.log_scale + z @ p.scale_direction[:, None])
        q = (1 + 2 * sigma * overlap + sigma**2 * size) ** -0.5
        of_z, of_a = [(q - 1) * z], [sigma * q * ac]
    of_z, of_a = of_z * (gain != "none"), of_a * (carry != "none")
    k, slope, c = torch.zeros(len(of_z)), torch.zeros(max(0, len(of_a) - 1)), torch.zeros(D)
    for _ in range(10):
        if of_a:
            v = of_a[0] + sum(s * x for s, x in zip(slope, of_a[1:], strict=True))
            rest = target - sum(s * x for s, x in zip(k, of_z, strict=True))
            c = (root**2 * v * rest).sum(0) / (root**2 * v * v).sum(0)
        if of_z:
            columns = torch.stack([(root * x).flatten() for x in [*of_z, *(c * x for x in of_a[1:])]], -1)
            rest = target - c * of_a[0] if of_a else target
            k, slope = torch.linalg.lstsq(columns, (root * rest).flatten()).solution.split([len(k), len(slope)])
    for name, expected in {"c": c, "gain": k, "carry_gain": slope}.items():
        if len(expected) and hasattr(p, name):
            torch.testing.assert_close(getattr(p, name), expected, rtol=1e-7, atol=1e-8, msg=name)
    assert hasattr(p, "c") == (carry == "diagonal") and hasattr(p, "gain") == (gain != "none")


@pytest.mark.parametrize("gain", ["none", "norm", "overlap", "state"])
@torch.no_grad()
def test_a_channel_attention_never_writes_to_has_no_carry(gain: str) -> None:
    block: Any = Block(gain=gain)
    h, a = tokens()
    a[:, 3] = 0
    fit_gain_and_carry(block, block.component, [Part(0, h, a)], CUTOFF)
    c = block.component.c
    assert c[3] == 0 and c.isfinite().all() and (c != 0).sum() == D - 1


@torch.no_grad()
def test_features_that_say_the_same_share_the_gain() -> None:
    """Attention of one length: |a|^2 is a constant beside the constant, and neither may grow without bound."""
    block: Any = Block(gain="norm")
    h, a = tokens()
    a = torch.nn.functional.normalize(a, dim=-1)
    fit_gain_and_carry(block, block.component, [Part(0, h, a)], NO_CUTOFF)
    assert block.component.gain.abs().max() < 10 and block.component.carry_gain.abs().max() < 100


@pytest.mark.parametrize("site", ["input", "projection"])
@pytest.mark.parametrize("carry", ["diagonal", "none"])
@torch.no_grad()
def test_low_rank_part_is_the_reduced_rank_regression(carry: str, site: str) -> None:
    """A = L^-T U_r with standard deviation 0.1 of a A, B = (A^T S A)^-1 A^T T / s; U from the SVD of L^-1 T."""
    block: Any = Block(carry=carry, low_rank_at=site, modulation_scale=2.0)
    p, rank, total = block.component, 3, 50.0
    a = normal(60, D)
    s = a.T @ a
    t = torch.cat([a.T @ (normal(60, D, seed=1) + a @ normal(D, D, seed=2)), 30 * a.T @ normal(60, D, seed=3)], -1)
    t = t if carry == "none" else t[:, :D]  # with a carry, down needs no low rank
    _fit_low_rank(block, p, s, t, total)
    lower = torch.linalg.cholesky(s + 1e-4 * s.diagonal().mean() * torch.eye(D, dtype=torch.float64))
    whitened = torch.linalg.solve(lower, t)
    whitened = torch.cat([part / part.norm() for part in whitened.split(D, -1)], -1)
    expected = torch.linalg.solve(lower.T, torch.linalg.svd(whitened)[0][:, :rank]) * 0.1 * total**0.5
    signs = (p.A * expected).sum(0).sign()
    torch.testing.assert_close(p.A * signs, expected, rtol=1e-6, atol=1e-9)
    b = torch.linalg.solve(p.A.T @ s @ p.A, p.A.T @ t) / 2
    of_input = b[:, :D]
    if site == "input":
        torch.testing.assert_close(p.B_in, of_input, rtol=1e-6, atol=1e-9)
    else:
        torch.testing.assert_close(p.B_gate, of_input @ block.weight, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(p.B_up, of_input @ block.weight * 2, rtol=1e-6, atol=1e-9)
    if carry == "diagonal":
        assert p.B_down.abs().max() == 0
        return
    torch.testing.assert_close(p.B_down, b[:, D:], rtol=1e-6, atol=1e-9)
    t[:, :D] = 0  # a target with nothing left to explain
    _fit_low_rank(block, p, s, t, total)
    assert all(x.isfinite().all() for x in p.parameters()) and p.B_down.abs().max() > 0


@torch.no_grad()
def test_solve_ridge() -> None:
    x, right = normal(20, 4), normal(4, 3, seed=1)
    gram = x.T @ x
    expected = (gram + 0.3 * gram.trace() / 4 * torch.eye(4, dtype=torch.float64)).inverse() @ right
    torch.testing.assert_close(solve_ridge(gram, right, 0.3), expected)
    assert torch.equal(solve_ridge(0 * gram, right, 0.3), 0 * right)
    assert torch.equal(
        solve_ridge(gram.float(), right.float(), 0.3).double(), solve_ridge(gram.float(), right.float(), 0.3)
    )


def layer_of(**options: Any) -> Any:
    """An NPT layer of a random Llama in float64, none of whose parameters is fitted yet."""
    model = get_peft_model(random_base("llama"), NPTConfig(**{"npt_layers": [1], "rank": 4, **options}))
    return active_layers(model)[0]


@pytest.mark.parametrize("options", [{}, {"carry": "none"}, {"carry": "none", "gain": "none"}], ids=str)
@torch.no_grad()
def test_what_is_summed_over_text_and_what_is_measured(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches, one padded, of which the first two are the chunk: S, T, weights, tokens and both errors."""
    monkeypatch.setattr(parts, "SLICE_TOKENS", 7)
    layer = layer_of(**options)
    h, a = normal(3, 4, 10, 24), 0.1 * normal(3, 4, 10, 24, seed=1)
    a[0, :, 0] *= 40  # as attention sinks are
    mask = torch.ones(3, 4, 10, dtype=torch.bool)
    mask[1, 2, :6] = False
    fit = BlockFit(layer, 74)
    before = original_error(layer, h[:2][mask[:2]], a[:2][mask[:2]])
    for part in range(3):
        fit.see(BlockRecord(h[part], a[part], h[part]), mask[part])
    assert fit.cutoff is not None and not fit.chunk.parts()
    h, a, chunk = h[mask], a[mask], int(mask[:2].sum())
    z, original = layer.mlp_inputs(h, a)
    delta = original - z
    medians = torch.stack([x[:chunk].square().sum(-1).median() for x in (delta, a)])
    w = weights_of(delta, a, 10 * medians)
    assert all((x.square().sum(-1) > 10 * median).any() for x, median in zip((delta, a), medians, strict=True))
    shift = layer.component.keyed_shift(a, z)
    rest = [delta if shift is None else delta - shift, *([a] if options else [])]
    torch.testing.assert_close(fit.gram, a.T @ (w * a))
    torch.testing.assert_close(fit.cross, torch.cat([a.T @ (w * r) for r in rest], -1))
    assert fit.total_weight == pytest.approx(float(w.sum()))
    figures = fit.finish()
    after = original_error(layer, h[:chunk], a[:chunk])
    assert figures == {"error_before": pytest.approx(before), "error_after": pytest.approx(after), "tokens": 114}
    assert after < before


@torch.no_grad()
def test_weights_depend_on_no_unit() -> None:
    """(tokens, 2) |D|^2 and |a|^2 of which one, both or none lie beyond their cutoffs."""
    sizes = torch.tensor([[1.0, 1.0], [8.0, 1.0], [1.0, 10.0], [8.0, 20.0], [0.0, 0.0]], dtype=torch.float64)
    for unit in (1.0, 1e-9, 1e9):
        found = closed_form.outlier_weights(unit * sizes, unit * torch.tensor([2.0, 5.0], dtype=torch.float64))
        torch.testing.assert_close(found[:, 0], torch.tensor([1, 1 / 16, 1 / 4, 1 / 16, 1], dtype=torch.float64))
    x = normal(5, D).float()
    expected = x.double().square().sum(-1)
    torch.testing.assert_close(
        closed_form.token_sizes(x, 2 * x), torch.stack([expected, 4 * expected], -1), rtol=1e-6, atol=0
    )


@torch.no_grad()
def test_text_whose_attention_is_mostly_zero_is_fitted_unweighted() -> None:
    layer = layer_of()
    h, a = normal(1, 50, 24), normal(1, 50, 24, seed=1)
    a[0, ::2] = 0
    a[0, 1] = 0
    fit = BlockFit(layer, 50)
    fit.see(BlockRecord(h, a, h), torch.ones(1, 50, dtype=torch.bool))
    assert fit.cutoff.isinf().all() and fit.total_weight == 50
    figures = fit.finish()
    assert figures["error_after"] < 0.9 * figures["error_before"]


@pytest.mark.parametrize("scale", [0.0, 1e-4])
@torch.no_grad()
def test_the_error_of_a_block_that_does_little(scale: float) -> None:
    """Relative to what it does, and none where it does nothing."""
    layer = layer_of()
    h, a = normal(1, 50, 24), scale * normal(1, 50, 24, seed=1)
    layer.module("down").weight.mul_(scale)
    before = original_error(layer, h[0], a[0]) if scale else 0.0
    fit = BlockFit(layer, 50)
    fit.see(BlockRecord(h, a, h), torch.ones(1, 50, dtype=torch.bool))
    figures = fit.finish()
    after = original_error(layer, h[0], a[0]) if scale else 0.0
    assert figures == {"error_before": pytest.approx(before), "error_after": pytest.approx(after), "tokens": 50}


@torch.no_grad()
def test_the_error_of_a_half_precision_block_is_not_rounded() -> None:
    layer = layer_of().to(torch.bfloat16)
    layer.get_base_layer().to(torch.bfloat16)
    h, a = normal(1, 50, 24).bfloat16(), normal(1, 50, 24, seed=1).bfloat16()
    target = layer.update_from(h, a, Mode.EXACT)
    layer.component.float()
    expected = (layer.update_from(h, a) - target).double().norm() / target.double().norm()
    layer.component.bfloat16()
    fit = BlockFit(layer, 50)
    fit.see(BlockRecord(h, a, h), torch.ones(1, 50, dtype=torch.bool))
    assert fit.error_before == pytest.approx(float(expected), rel=1e-9)


@torch.no_grad()
def test_a_hidden_state_of_zero_does_no_harm() -> None:
    """Its norm has no logarithm."""
    layer = layer_of()
    h, a = normal(1, 50, 24), normal(1, 50, 24, seed=1)
    h[0, 3] = 0
    fit = BlockFit(layer, 50)
    fit.see(BlockRecord(h, a, h), torch.ones(1, 50, dtype=torch.bool))
    fit.finish()
    assert all(p.isfinite().all() for p in layer.component.parameters())


@torch.no_grad()
def test_products_on_a_gpu_are_float64_throughout() -> None:
    """A GPU may be set to TF32, whose sums of products are right to three digits."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    x, y = normal(40, D).float(), normal(40, D, seed=1).float()
    found = closed_form.token_product(x.as_subclass(OnGPU), y.as_subclass(OnGPU)).as_subclass(Tensor)
    torch.testing.assert_close(found, x.double().T @ y.double(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(closed_form.token_product(x, y), x.double().T @ y.double(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def original_error(layer: Any, h: Tensor, a: Tensor) -> float:
    """Root of the summed squares of the block's update's error, relative, on (tokens, d)."""
    block = layer.get_base_layer()
    found = layer.update_from(h[None], a[None])[0]
    mlp, norm = block.mlp, block.post_attention_layernorm
    with running_as([layer], Mode.ORIGINAL):
        target = a + mlp.forward(norm.forward((h + a)[None]))[0]
    return float((found - target).norm() / target.norm())


@torch.no_grad()
def test_the_error_is_measured_on_tokens_picked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many, from all over the chunk, each with its own attention, and the same ones in every run."""
    monkeypatch.setattr(block_fit, "PROBE_TOKENS", 12)
    picked = []
    for _ in range(2):
        torch.manual_seed(len(picked))
        fit = BlockFit(layer_of(), 10**6)
        for part in range(4):
            h = normal(1, 30, 24, seed=part)
            fit.see(BlockRecord(h, h.flip(-1), h), torch.ones(1, 30, dtype=torch.bool))
        fit.finish()
        h, a, _ = fit.probe
        whole = torch.cat([normal(30, 24, seed=part) for part in range(4)])
        where = [int(i) for row in h for i in (whole == row).all(-1).nonzero()]
        assert len(where) == 12 and len({i // 30 for i in where}) >= 3 and torch.equal(a, h.flip(-1))
        picked.append(where)
    assert picked[0] == picked[1]


def test_how_many_tokens_are_kept() -> None:
    """At least 8,192 or 4 d; with hidden units up to 65,536, as far as h and a of a block stay within 128 MiB."""

    def layers(hidden: int, count: int, units: bool) -> Any:
        own = SimpleNamespace(hidden_units=() if units else None)
        return [SimpleNamespace(own=own, weight=torch.zeros(1), shape=lambda _: (hidden, 0))] * count

    assert [first_tokens(layers(hidden, 1, False)) for hidden in (24, 4096)] == [8192, 16384]
    assert [first_tokens(layers(hidden, 15, True)) for hidden in (24, 576, 4096)] == [65536, 29127, 16384]
