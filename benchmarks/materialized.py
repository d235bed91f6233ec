"""The strawman: each token's weight matrix formed, W + dW, and multiplied, as a reading of the idea by the letter does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import converted, forward, frozen, llama_shape, sharing
from benchmarks.timing import interleaved, peak, ratios
from npt.block.deltas import down_deltas, input_deltas
from npt.block.layer import NPTLayer
from npt.block.weight_delta import WeightDelta
from npt.tuner.converted import active_layers


class MaterializedMLP(nn.Module):
    """A converted block's MLP with one (out, in) matrix per token and projection. Batch and tokens are flattened.

    Args:
        layer: of a converted model, for its component. mlp: the block's MLP.
    """

    def __init__(self, layer: NPTLayer, mlp: Any):
        super().__init__()
        self.component: Any = layer.component
        self.mlp, self.attention = mlp, torch.empty(0)

    def tap(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Takes the attention output out of the residual stream."""
        self.attention = output
        return torch.zeros_like(output)

    def forward(self, z: Tensor) -> Tensor:
        """z (batch, tokens, d) to (batch, tokens, d)."""
        a, x, mlp = self.attention.flatten(0, 1), z.flatten(0, 1), self.mlp
        deltas = input_deltas(self.component, a, x, {"gate": mlp.gate_proj, "up": mlp.up_proj})
        inner = mlp.act_fn(_product(mlp.gate_proj, deltas["gate"])) * _product(mlp.up_proj, deltas["up"])
        return _product(mlp.down_proj, down_deltas(self.component, a, inner)["down"]).view_as(z)


def _product(linear: nn.Linear, delta: WeightDelta) -> Tensor:
    """(W + dW) x per token, the matrices formed: (tokens, out)."""
    x = delta.inputs
    key = x / x.square().sum(-1, keepdim=True)
    weights = torch.einsum("to,ti->toi", delta.value, key)
    if delta.low_rank is not None:
        m, c, b = delta.low_rank
        weights += torch.einsum("tr,ir,ro->toi", m, c, b)
    return torch.bmm(weights.add_(linear.weight), x[..., None])[..., 0]


def materialized(model: Any) -> Any:
    """A model with the weights of a converted one whose deltas are formed."""
    base = sharing(model.get_base_model())
    for layer in active_layers(base):
        layer.detach()
        block: Any = layer.get_base_layer()
        block.mlp = MaterializedMLP(layer, block.mlp)
        block.self_attn.o_proj.register_forward_hook(block.mlp.tap)
    return base


def measure(rounds: int, hidden: int = 256, tokens: int = 256) -> dict[str, Any]:
    """Forward of the frozen base, NPT and the strawman: seconds, peaks, ratios and how far both NPT outputs differ.

    Raises:
        RuntimeError: they do not compute the same.
    """
    base = frozen(llama_shape(8000, hidden))
    models = {"base": base, "npt": converted(base)}
    with torch.no_grad():
        for name, parameter in models["npt"].named_parameters():
            if "npt" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    models["materialized"] = materialized(models["npt"])
    ids = torch.randint(3, 8000, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, formed, original = (models[name](input_ids=ids).logits for name in ("npt", "materialized", "base"))
    difference = float((ours - formed).norm() / (ours - original).norm())
    if not difference < 1e-3:
        raise RuntimeError(f"the strawman computes something else: relative difference {difference:.3g}")
    contenders = {name: forward(model, ids) for name, model in models.items()}
    times = interleaved(contenders, rounds)
    peaks = {name: peak(run) for name, run in contenders.items()}
    return {
        "hidden": hidden, "tokens": tokens, "times": times, "peaks": peaks, "difference": difference,
        "slower": ratios({k: v["seconds"] for k, v in times.items()}, "npt")["materialized"],
        "memory": ratios(peaks, "npt")["materialized"],
    }  # fmt: skip
