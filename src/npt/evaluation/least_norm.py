"""The least joint norm of a weight delta of gate, up and down that gives a block's original output, by optimisation.

Per token one minimises, over values v_g and v_u of the input projections,

    (|v_g|^2 + |v_u|^2) / |z|^2 + |t - f(v_g, v_u)|^2 / |i|^2

where a value v is carried by the input key, so that |dW|_F = |v| / |x|; f is the block's update y - h with v_g and v_u
added, t the original's update, and i the input of the down projection. The rest t - f is down's own value. Every point is
therefore a solution, and the least value found is an upper bound of the least possible one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from npt.block.layer import BlockRecord, NPTLayer
from npt.block.modes import Mode
from npt.block.spec import INPUT_PROJECTIONS
from npt.common.precision import wide_dtype
from npt.common.sharded import gathered
from npt.evaluation.look import Batch, Observer
from npt.tuner.converted import ConvertedModel, chosen_layers

#: Tokens per block, of so many sequences, and steps of L-BFGS.
TOKENS, SEQUENCES, STEPS = 16, 4, 80


class LeastNorms(Observer):
    """The report's `least_joint_norm`: mean joint norm sqrt(sum over projections |dW|_F^2) of some tokens.

    The tokens are spread over the first sequences, with the original model's h and a.

    Args:
        blocks: converted blocks; None for all.
    """

    def __init__(self, model: ConvertedModel, blocks: Collection[int] | None = None):
        # A mixture has one value for each expert, and which of them are at work would change while it is searched.
        self.layers = [layer for layer in chosen_layers(model, blocks) if layer.family.experts is None]
        self.kept: dict[int, list[tuple[Tensor, Tensor]]] = {layer.index: [] for layer in self.layers}
        self.seen = 0

    def begin(self, batch: Batch) -> None:
        """Settles which of the batch's sequences are among the first."""
        self.rows = batch["attention_mask"].bool()[: max(0, SEQUENCES - self.seen)]
        self.seen += len(self.rows)

    def see_original(self, layer: NPTLayer, record: BlockRecord) -> None:
        """Keeps h and a of the first sequences."""
        if len(self.rows) and layer.index in self.kept:
            pair = (x[: len(self.rows)][self.rows].detach() for x in (record.hidden_states, record.attention))
            self.kept[layer.index].append(tuple(pair))  # type: ignore[arg-type]

    def figures(self) -> dict[str, dict[str, float]]:
        """{"layer_<i>": {exact, least_found, tokens}}."""
        found = {}
        for layer in self.layers:
            h, a = (torch.cat(parts) for parts in zip(*self.kept[layer.index], strict=True))
            chosen = torch.linspace(0, len(h) - 1, min(TOKENS, len(h)), dtype=torch.float32).round().long().to(h.device)
            with gathered(layer.get_base_layer()):
                exact, least = _search(layer, h[chosen][None], a[chosen][None])
            found[f"layer_{layer.index}"] = {
                "exact": float(exact.sqrt().mean()),
                "least_found": float(least.sqrt().mean()),
                "tokens": len(chosen),
            }
        return found


def _search(layer: NPTLayer, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Squared joint norms (tokens,) of the exact value and of the least found, for h and a (1, tokens, d)."""
    names = [name for name in INPUT_PROJECTIONS if name in layer.family.projections]
    with torch.no_grad():
        target = layer.update_from(h, a, Mode.EXACT)
    z, original = layer.mlp_inputs(h, a)
    wide = wide_dtype(z.dtype)  # the search needs more digits than a half-precision base has
    start = [layer.product(name)(original - z).detach().to(wide) for name in names]

    def squares(values: list[Tensor]) -> Tensor:
        with _added(layer, dict(zip(names, values, strict=True))) as seen:
            missing = (target.to(wide) - layer.update_from(h, a, Mode.ORIGINAL).to(wide)) / layer.parts.multiplier
        inputs = torch.stack([v.square().sum(-1) for v in values]).sum(0) / _square(z.to(wide))
        return (inputs + missing.square().sum(-1) / _square(seen[0].to(wide)))[0]

    with torch.no_grad():
        exact = squares(start)
    best = exact.clone()
    for first in (start, [torch.zeros_like(v) for v in start]):
        values = [v.clone().requires_grad_() for v in first]
        optimizer = torch.optim.LBFGS(values, max_iter=STEPS, history_size=8, line_search_fn="strong_wolfe")

        def closure(values: list[Tensor] = values, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = squares(values).sum()
                loss.backward(inputs=values)
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            best = torch.minimum(best, squares(values))
    return exact, best


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1).clamp_min(torch.finfo(x.dtype).tiny)


@contextmanager
def _added(layer: NPTLayer, values: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """Adds values to the outputs of gate and up; the list it yields holds the input of down, (1, tokens, f)."""
    seen: list[Tensor] = []
    order = [values[name] for name in INPUT_PROJECTIONS if name in values]

    def keep(module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].view(*order[0].shape[:-1], -1))

    def add(value: Tensor) -> Any:
        return lambda module, args, output: output + value.to(output.dtype).view_as(output)

    handles = [layer.module("down").register_forward_pre_hook(keep)]
    if layer.family.fused:
        handles.append(layer.module("up").register_forward_hook(add(torch.cat(order, -1))))
    else:
        handles += [layer.module(name).register_forward_hook(add(value)) for name, value in values.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
