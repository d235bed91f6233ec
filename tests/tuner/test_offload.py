"""CPU offload keeps the frozen blocks' weights elsewhere and changes no result."""

from __future__ import annotations

import pytest
import torch

from npt import Objective, calibrate
from npt.block.modes import Mode, running_as
from npt.evaluation.look import observe
from npt.evaluation.weight_deltas import WeightDeltas
from npt.runs.base_model import offload_frozen
from npt.tuner.converted import active_layers, device_of
from tests.helpers import converted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_offloaded_blocks_compute_the_same(kind: str) -> None:
    """accelerate is asked to bring weights to the CPU, so that the mechanism is tested without a GPU."""
    ids = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    results = []
    for offload in (False, True):
        model = converted(kind, torch.float32)
        if offload:
            offload_frozen(model, torch.device("cpu"))
            blocks = [layer.get_base_layer() for layer in active_layers(model)]
            own = {id(p) for layer in active_layers(model) for p in layer.parameters()}
            assert all(p.is_meta for block in blocks for p in block.parameters() if id(p) not in own)
        assert device_of(model) == torch.device("cpu")
        with torch.no_grad():
            outputs = [model(ids).logits, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)]
            with running_as(active_layers(model), Mode.ORIGINAL):
                outputs.append(model(ids).logits)
        Objective("composite")(model, batch, 22.0).total.backward()
        outputs += [p.grad for layer in active_layers(model) for p in layer.component.parameters()]
        calibrate(model, [batch])
        outputs.append(model(ids).logits.detach())
        deltas = WeightDeltas(model)
        observe(model, [batch], [deltas])
        stats = deltas.figures()
        outputs.append(torch.tensor([stats["mean_frobenius"], stats["relative_frobenius"], stats["exact_frobenius"]]))
        results.append(outputs)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
