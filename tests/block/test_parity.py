"""Every component option equals an explicit formula in float64 that forms each token's weight delta as a matrix."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from npt.block.component import NORM_WEIGHT_EPSILON
from npt.block.deltas import down_deltas
from npt.block.modes import watching_deltas
from npt.tuner.converted import active_layers, npt_layers
from tests.helpers import converted

OPTIONS = [
    options
    for options in itertools.product(
        ("input", "tied", "learned"),
        ("none", "diagonal", "exact"),
        ("none", "norm", "overlap", "state"),
        ("input", "projection"),
    )
    if not (options[1] == "exact" and options[2:] != ("none", "input"))
]


def raw(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(W (out, in), bias) of a Linear or Conv1D."""
    weight = module.weight.T if hasattr(module, "nf") else module.weight
    bias = module.bias if getattr(module, "bias", None) is not None else weight.new_zeros(len(weight))
    return weight, bias


def run_blocks(model: Any, ids: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """h, a (as the NPT model itself sees them) and the block's output, per block, over the NPT model's own stream."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    handles = []
    for layer in npt_layers(model):
        entry = seen.setdefault(layer.index, {})
        block = layer.get_base_layer()

        def before(module: Any, args: Any, entry: dict[str, Any] = entry) -> None:
            entry["h"] = args[0]

        def after(module: Any, args: Any, output: Any, entry: dict[str, Any] = entry) -> None:
            entry["y"] = output[0] if isinstance(output, tuple) else output

        def attention(module: Any, args: Any, entry: dict[str, Any] = entry) -> None:
            entry["a"] = args[0]

        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
        # What enters the tap decides `a`: through o_proj for Llama, a (switched off) dropout for GPT-2.
        handles.append(layer.module("tap").register_forward_pre_hook(attention))
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    for layer in npt_layers(model):
        tap = layer.module("tap")
        if hasattr(tap, "weight"):
            seen[layer.index]["a"] = seen[layer.index]["a"] @ tap.weight.T
    return seen


def norm_of(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(norm, torch.nn.LayerNorm):
        centered = x - x.mean()
        return centered / (centered.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias
    return norm.forward(x[None])[0]  # transformers' RMSNorm rounds to float32 inside, whatever its input


def explicit_block(layer: Any, h: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """One token's block output, from raw weights, with every dW formed as an (out, in) matrix."""
    p, spec = layer.component, layer.component.spec
    norm = layer.module("norm")
    is_layer_norm = isinstance(norm, torch.nn.LayerNorm)
    d = len(h)
    z = norm_of(norm, h)
    bias = norm.bias if is_layer_norm else torch.zeros_like(z)
    ac = a - a.mean() if is_layer_norm else a
    zhat = (z - bias) * norm.weight / (norm.weight**2 + NORM_WEIGHT_EPSILON)
    size, overlap = ac @ ac / d, zhat @ ac / d
    m = spec.modulation_scale * torch.tanh(ac @ p.A) if hasattr(p, "A") else None
    g, w = 0.0, 1.0
    if not hasattr(p, "gain"):
        pass
    elif spec.gain == "state":
        units = torch.nn.functional.gelu((z - bias) @ p.scale_hidden + p.scale_bias) @ p.scale_out
        sigma = torch.exp(p.log_scale[0] + p.scale_direction @ (z - bias) + units)
        q = (1 + 2 * sigma * overlap + sigma**2 * size) ** -0.5
        g, w = p.gain[0] * (q - 1), sigma * q
    else:
        phi = torch.stack([size, overlap][: len(p.gain) - 1])
        g = p.gain[0] + phi @ p.gain[1:]
        w = 1 + phi @ p.carry_gain if spec.carry == "diagonal" else 1.0

    def delta(name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        key = x / (x @ x)
        if spec.carry == "exact":
            value = a if name == "down" else weight @ (norm_of(norm, h + a) - z)
            return torch.outer(value, key)
        value = torch.zeros(len(weight), dtype=x.dtype)
        if name == "down" and spec.carry == "diagonal":
            value = value + p.e * a
        if name != "down":
            shift = g * (z - bias)
            if spec.carry == "diagonal":
                shift = shift + w * p.c * ac
            value = value + weight @ shift
        at_input = name != "down" and spec.low_rank_at == "input"
        b = getattr(p, "B_in" if at_input else f"B_{name}")
        b = b @ weight.T if at_input else b
        if spec.key == "input":
            return torch.outer(value + m @ b, key)
        c = p.A if spec.key == "tied" else getattr(p, "C_in" if at_input else f"C_{name}")
        return torch.outer(value, key) + b.T @ torch.diag(m) @ c.T

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias_ = raw(layer.module(name))
        if name in spec.projections:
            weight = weight + delta(name, x, weight)
        return weight @ x + bias_

    up = project("up", z)
    if layer.family.gate is not None:
        i = torch.nn.functional.silu(project("gate", z)) * up
    else:
        i = torch.nn.functional.gelu(up, approximate="tanh")
    return h + project("down", i)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("key,carry,gain,site", OPTIONS)
@torch.no_grad()
def test_block_equals_explicit_formula(
    kind: str, key: str, carry: str, gain: str, site: str, token_ids: torch.Tensor
) -> None:
    targets = ["gate", "up"] if key == "tied" else ["gate", "up", "down"]
    model = converted(
        kind, key=key, carry=carry, gain=gain, low_rank_at=site, target_projections=targets, npt_layers=[1, 3]
    )
    seen = run_blocks(model, token_ids)
    for layer in active_layers(model):
        entry = seen[layer.index]
        for row, column in ((0, 0), (0, 7), (1, 4)):
            expected = explicit_block(layer, entry["h"][row, column], entry["a"][row, column])
            got = entry["y"][row, column]
            assert (got - expected).norm() <= 1e-10 * expected.norm(), f"block {layer.index}, token {row},{column}"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", [["gate"], ["up"], ["down"], ["gate", "down"], ["up", "down"]])
@torch.no_grad()
def test_any_subset_of_projections(kind: str, targets: list[str], token_ids: torch.Tensor) -> None:
    if kind == "gpt2" and targets == ["gate"]:
        pytest.skip("GPT-2 has no gate")
    model = converted(kind, target_projections=targets, npt_layers=[2])
    entry = run_blocks(model, token_ids)[2]
    (layer,) = active_layers(model)
    expected = explicit_block(layer, entry["h"][1, 5], entry["a"][1, 5])
    assert (entry["y"][1, 5] - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("key", ["input", "tied", "learned"])
@pytest.mark.parametrize("site", ["input", "projection"])
@torch.no_grad()
def test_norm_and_matrix_of_weight_delta(kind: str, key: str, site: str, token_ids: torch.Tensor) -> None:
    """The norm without forming dW equals that of the matrix; the matrix times x is what the projection receives."""
    targets = ["gate", "up"] if key == "tied" else ["gate", "up", "down"]
    model = converted(kind, key=key, low_rank_at=site, target_projections=targets)
    seen = []
    with watching_deltas(active_layers(model), lambda layer, deltas: seen.append((layer, deltas))):
        model(token_ids)
    names = set()
    for layer, deltas in seen:
        for name, delta in deltas.items():
            names.add(name)
            weight, _ = raw(layer.module(name))
            matrix = delta.matrix(1, 3)
            assert matrix.shape == weight.shape
            torch.testing.assert_close(delta.frobenius_norm()[1, 3], matrix.norm(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(matrix @ delta.inputs[1, 3], delta.apply()[1, 3], rtol=1e-9, atol=1e-12)
    present = [name for name in targets if kind == "llama" or name != "gate"]
    assert names == set(present)


@torch.no_grad()
def test_input_key_is_the_least_norm() -> None:
    """No other dW with the same product has a smaller norm."""
    model = converted("llama", npt_layers=[1])
    seen: dict[str, Any] = {}
    with watching_deltas(active_layers(model), lambda layer, deltas: seen.update(deltas)):
        model(torch.arange(6)[None])
    delta = seen["down"]
    x, value = delta.inputs[0, 2], delta.value[0, 2]
    least = torch.linalg.lstsq(x[None].repeat(1, 1), value[None]).solution.T  # the minimum-norm solution of dW x = v
    torch.testing.assert_close(delta.frobenius_norm()[0, 2], least.norm(), rtol=1e-9, atol=0)


@torch.no_grad()
def test_zero_input_has_no_key_and_is_counted() -> None:
    """A token whose projection input is all zero (a ReLU MLP) gets no value, since dW 0 = 0, and is counted."""
    model = converted("llama", npt_layers=[1])
    component = active_layers(model)[0].component
    a, i = torch.randn(3, 24, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    i[1] = 0
    value = component.down_value(a, i)
    assert value[1].abs().max() == 0 and value[0].abs().max() > 0
    delta = down_deltas(component, a, i)["down"]
    assert delta.skipped.tolist() == [False, True, False]
    assert delta.frobenius_norm()[1] == 0 and delta.matrix(1).abs().max() == 0
