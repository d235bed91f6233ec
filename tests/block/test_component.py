"""The component and its weight deltas are right on their own, in the corners that no model of the suite reaches."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from npt import NPTConfig
from npt.block.component import ComponentSpec, NPComponent
from npt.block.deltas import down_deltas, input_deltas
from npt.block.terms import has_key
from npt.block.weight_delta import WeightDelta

D, F, R = 12, 20, 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def component(like: torch.dtype = torch.float64, **options: Any) -> NPComponent:
    """One whose parameters are all random."""
    made = NPComponent(ComponentSpec(D, F, **{"rank": R, **options}), like=torch.empty(0, dtype=like))
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters()):
            parameter.copy_(0.2 * normal(*parameter.shape, seed=seed))
    return made


def test_options_not_given_are_those_of_the_configuration() -> None:
    spec, config = ComponentSpec(D, F), NPTConfig().component_options()
    assert {name: getattr(spec, name) for name in config} == config
    assert (spec.centered, spec.reads) == (False, "norm(h + a)")


@pytest.mark.parametrize("rank, low_rank", [(0, False), (1, True)])
def test_rank_zero_has_no_low_rank_part(rank: int, low_rank: bool) -> None:
    made = component(rank=rank)
    assert ({"A", "B_in", "B_down"} <= set(dict(made.named_parameters()))) == low_rank
    assert (made.modulation(normal(2, D)) is not None) == low_rank


def test_a_seed_fixes_the_random_start() -> None:
    """Whatever torch's own random state is; another seed gives another start."""
    spec, starts = ComponentSpec(D, F, rank=R, key="learned"), {}
    for seed in (1, 1, 2):
        torch.manual_seed(len(starts))
        made = NPComponent(spec, seed=seed)
        starts.setdefault(seed, []).append((made.A, made.C_in, made.C_down))
    for one, same, other in zip(*starts[1], *starts[2], strict=True):
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_features_have_the_digits_of_the_parameters() -> None:
    made = component(torch.float64)
    a, z, phi = made.features(normal(3, D, dtype=torch.float32), normal(3, D, seed=1, dtype=torch.float32))
    assert {x.dtype for x in (a, z, *phi)} == {torch.float64}


def test_only_parameters_are_saved() -> None:
    made = NPComponent(ComponentSpec(D, F), normal(D), normal(D, seed=1))
    assert set(made.state_dict()) == set(dict(made.named_parameters()))


def test_random_parameters_begin_at_unit_gain() -> None:
    """A a and C x of unit-variance inputs have unit variance."""
    torch.manual_seed(0)
    made = NPComponent(ComponentSpec(400, 900, rank=50, key="learned"))
    for name, size in {"A": 400, "C_in": 400, "C_down": 900}.items():
        assert float(getattr(made, name).detach().std()) == pytest.approx(size**-0.5, rel=0.02), name


def test_a_norm_weight_of_zero_does_no_harm() -> None:
    weight = torch.tensor([0.0, 1e-3, -0.5, 2.0], dtype=torch.float64)
    made = NPComponent(ComponentSpec(4, 8), weight)
    torch.testing.assert_close(made.norm_inverse, weight / (weight**2 + 1e-6), rtol=1e-12, atol=0)


def test_gain_denominator_begins_exact() -> None:
    """For an RMSNorm, also where a channel's weight is nearly zero; z shows nothing of one whose weight is zero."""
    torch.manual_seed(0)
    h, a, weight = normal(40, D), normal(40, D, seed=1), normal(D, seed=2)
    weight[3] = 1e-5

    def norm(x: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()

    made = NPComponent(ComponentSpec(D, F, gain="denominator"), weight)
    scale = made.norm_scale(h, norm(h))
    torch.testing.assert_close(scale[:, 0], (h.square().mean(-1) + 1e-3).rsqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(made.keyed_shift(a, norm(h), scale), norm(h + a) - norm(h), rtol=1e-9, atol=1e-12)
    assert float(made.norm_scale(0 * h, 0 * h).abs().max()) == 0
    weight[3] = 0
    made = NPComponent(ComponentSpec(D, F, gain="denominator"), weight)
    torch.testing.assert_close(made.norm_scale(h, norm(h)), scale, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="needs scale"):
        made.input_values(a, norm(h))
    assert NPComponent(ComponentSpec(D, F, gain="state"), weight).norm_scale(h, norm(h)) is None


@pytest.mark.parametrize("reads, c", [("norm(h + a)", 0.0), ("h + a", 1.0)])
@pytest.mark.parametrize("gain", ["none", "norm", "overlap", "state"])
def test_before_calibration(reads: str, c: float, gain: str) -> None:
    """Nothing but the carries writes, and a carry of one is exact where the MLP reads h + a itself."""
    made = NPComponent(ComponentSpec(D, F, reads=reads, gain=gain, key="learned"))
    for name, parameter in made.named_parameters():
        if name[0] not in "AC" and name != "scale_hidden":
            assert (parameter == {"c": c, "e": 1.0}.get(name, 0.0)).all(), name
    assert hasattr(made, "gain") == (gain != "none" and reads != "h + a")


@pytest.mark.parametrize("site", ["input", "projection"])
@pytest.mark.parametrize("rank", [0, R])
@pytest.mark.parametrize("carry", ["none", "diagonal", "exact"])
@pytest.mark.parametrize("key", ["input", "learned"])
@torch.no_grad()
def test_weight_deltas_are_the_matrices_of_the_documentation(key: str, carry: str, rank: int, site: str) -> None:
    """A value on the input key, and with a learned key B^T diag(m) C^T beside it; nothing for a token without a key."""
    gain = "none" if carry == "none" else "state"  # with neither, the low-rank part is alone
    p = component(key=key, carry=carry, rank=rank, low_rank_at=site, gain=gain)
    a, z, i, exact = normal(3, D), normal(3, D, seed=1), normal(3, F, seed=2), normal(3, D, seed=3)
    z[1], i[1] = 0, 0
    weights = {"gate": normal(F, D, seed=4), "up": normal(F, D, seed=5)}
    products = {name: (lambda x, w=w: x @ w.T) for name, w in weights.items()}
    found = {**input_deltas(p, a, z, products, exact), **down_deltas(p, a, i)}
    assert list(found) == ["gate", "up", "down"]
    for name, delta in found.items():
        for t in (0, 2, 1):
            x = i[t] if name == "down" else z[t]
            x_key = x / (x @ x) if x.any() else x
            if carry == "exact":
                value = a[t] if name == "down" else weights[name] @ (exact[t] - z[t])
            else:
                shift = p.keyed_shift(a[t], z[t])
                written = shift if name != "down" else p.e * a[t] if carry == "diagonal" else None
                written = torch.zeros(D, dtype=x.dtype) if written is None else written
                value = written if name == "down" else weights[name] @ written
            low_rank = torch.zeros(len(value), len(x), dtype=x.dtype)
            if rank and carry != "exact":
                own = "in" if site == "input" and name != "down" else name
                m, b = torch.tanh(a[t] @ p.A), getattr(p, f"B_{own}")
                b = b @ weights[name].T if own == "in" else b
                low_rank = b.T * m @ getattr(p, f"C_{own}").T if key == "learned" else torch.outer(m @ b, x_key)
            torch.testing.assert_close(delta.matrix(t), torch.outer(value, x_key) + low_rank)
            torch.testing.assert_close(delta.matrix(t).norm(), delta.frobenius_norm()[t])


@pytest.mark.parametrize("site", ["input", "projection"])
@torch.no_grad()
def test_a_token_without_a_key_gets_nothing(site: str) -> None:
    p, a, z = component(low_rank_at=site), normal(3, D), normal(3, D, seed=1)
    z[1] = 0
    found = p.input_values(a, z)
    for value in (found.shift, *found.values.values()):
        assert value[1].abs().max() == 0 and value[0].abs().max() > 0
    assert len(found.values) == 2 * (site == "projection")
    assert component(carry="exact").input_values(a, z, exact_input=a).shift[1].abs().max() == 0


def test_exact_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="needs exact_input"):
        component(carry="exact").input_values(normal(2, D), normal(2, D))


def test_modulation_scale() -> None:
    """m = s tanh(a A), also where tanh is far from linear."""
    a = 5 * normal(4, D, seed=7)
    for scale in (0.0, 0.5, 1.0, 2.0):
        made = component(modulation_scale=scale)
        torch.testing.assert_close(made.modulation(a), scale * torch.tanh(a @ made.A), rtol=1e-12, atol=0)


def test_modulation_is_computed_once_for_both_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = NPComponent.modulation
    monkeypatch.setattr(NPComponent, "modulation", lambda self, a: calls.append(1) or whole(self, a))
    for projections in (("gate", "up", "down"), ("down",)):
        made, a = component(projections=projections), normal(2, D)
        m = made.input_values(a, normal(2, D)).modulation
        made.down_value(a, normal(2, F), m)
        assert len(calls) == 1, projections
        calls.clear()


def test_attention_that_cancels_the_state_leaves_gain_finite() -> None:
    """|zhat + sigma a| near zero: the norm's formula divides by it, the component by at least 1/100."""
    made = component(gain="state")
    with torch.no_grad():
        made.log_scale.zero_()
        made.scale_direction.zero_()
        made.scale_out.zero_()
        made.gain.fill_(1)
    z = normal(1, D).sign()
    phi = made.features(-z, z)[2]
    g, w = made.gains(z, phi)
    torch.testing.assert_close(torch.cat([g, w]), torch.tensor([[99.0], [100.0]], dtype=torch.float64))


def test_the_mask_of_tokens_without_a_key_carries_no_gradient() -> None:
    """Nothing is kept for a backward pass that would be zero."""
    x = normal(3, D).requires_grad_()
    assert not has_key(x, x).requires_grad
    assert has_key(torch.stack([x[0], 0 * x[1]]), x).tolist() == [[1.0], [0.0]]


DELTAS = [
    WeightDelta(normal(4, F), normal(4, D, seed=1)),
    WeightDelta(normal(4, F), normal(4, D, seed=1), (normal(4, R), normal(D, R), normal(R, F))),
]


@pytest.mark.parametrize("delta", DELTAS, ids=["key", "low rank"])
def test_weight_delta_equals_its_matrix(delta: WeightDelta) -> None:
    """Norm, product and multiples, also of a token that has no key, whose value no norm may count."""
    inputs = 0.1 * delta.inputs
    inputs[2] = 0
    for found in (dataclasses.replace(delta, inputs=inputs), delta):
        for factor in (0.0, 0.5, 1.0, 2.0, -3.0):
            scaled = found.scaled(factor)
            for token in range(4):
                matrix = factor * found.matrix(token)
                torch.testing.assert_close(scaled.matrix(token), matrix, rtol=1e-12, atol=1e-14)
                torch.testing.assert_close(scaled.frobenius_norm()[token], matrix.norm(), rtol=1e-10, atol=1e-14)
                if not found.skipped[token]:
                    torch.testing.assert_close(scaled.apply()[token], matrix @ found.inputs[token])
    assert delta.scaled(1) is delta


def test_the_norm_has_a_gradient_where_a_token_has_no_key() -> None:
    value, x = normal(3, F).requires_grad_(), normal(3, D)
    x[1] = 0
    x.requires_grad_()
    WeightDelta(value, x).frobenius_norm_square().sum().backward()
    assert value.grad.isfinite().all() and x.grad.isfinite().all()
    torch.testing.assert_close(value.grad[0], 2 * value[0] / x[0].square().sum())


def test_cancelling_parts_have_a_norm_of_zero_not_of_nan() -> None:
    """A value that undoes a low-rank part along its own key leaves nothing but rounding."""
    x, b = normal(200, D, dtype=torch.float32), normal(1, F, dtype=torch.float32)
    for row in x:
        low_rank = (torch.ones(1, 1), row[:, None], b)
        delta = WeightDelta(-(row @ row)[None, None] * b, row[None], low_rank)
        assert delta.frobenius_norm()[0] <= 1e-2 * b.norm() * row.norm()
