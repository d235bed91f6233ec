"""NaN and infinity are named and stop the step; degenerate text gives a finite fit or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from npt import NPTConfig, calibrate, evaluate
from npt.cli import main
from npt.common.precision import all_finite
from npt.equivalence.objectives import Objective
from npt.errors import ConversionError, NPTError, RunError
from npt.tuner.converted import active_layers, npt_layers
from npt.tuner.nonfinite import find_nonfinite
from tests.helpers import blocks, random_base, settings, trainer


def component_values(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for layer in npt_layers(model) for p in layer.npt_components.parameters()]


def plant(model: Any, block: int, value: float) -> None:
    """One weight of a frozen block's MLP."""
    with torch.no_grad():
        model.get_base_model().model.layers[block].mlp.down_proj.weight[0, 0] = value


@pytest.mark.parametrize("objective", ["logits", "local"])
def test_a_loss_that_is_not_finite_stops_before_the_step(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, objective=objective)
    before = component_values(run.model)
    # Finite, and too large for what it is multiplied with.
    plant(run.model, 1, 3e38)
    monkeypatch.setattr(
        "npt.equivalence.objectives.check_logit_head", lambda *_: None
    )  # which would see it before the first step
    with pytest.raises(RunError, match=r"step 1: the loss is not finite, first in block 1 of the original") as caught:
        run.train()
    assert all(map(torch.equal, before, component_values(run.model)))
    kept = load_file(tmp_path / "checkpoints" / "bad_batch-1.safetensors")
    assert str(tmp_path / "checkpoints" / "bad_batch-1.safetensors") in str(caught.value)
    rows = torch.tensor(blocks()["input_ids"][:])
    assert kept["input_ids"].shape == (4, 16) and all((rows == row).all(-1).any() for row in kept["input_ids"])
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    plant(run.model, 2, float("nan"))
    with pytest.raises(
        RunError, match=r"weight base_model\.model\.model\.layers\.2\.mlp\.down_proj\.weight is not finite"
    ):
        run.train()


def test_a_block_of_the_npt_model_alone_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with torch.no_grad():
        active_layers(run.model)[1].component.e.fill_(3e38)  # type: ignore[union-attr]
    with pytest.raises(RunError, match="first in block 3 of the NPT model"):
        run.train()


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, steps = Objective.__call__, []

    def call(self: Any, model: Any, inputs: Any, items: Any) -> Any:
        losses = original(self, model, inputs, items)
        steps.append(1)
        if len(steps) == 6:
            e = active_layers(model)[0].component.e  # type: ignore[union-attr]
            losses = losses._replace(total=losses.total + (0 * e.sum()).sqrt())  # zero, with an infinite slope
        return losses

    monkeypatch.setattr(Objective, "__call__", call)
    run = trainer(tmp_path)
    with pytest.raises(RunError, match=r"step 6: the gradient of \S+layers\.1\.\S+\.e is not finite"):
        run.train()
    assert (tmp_path / "checkpoints" / "checkpoint-4").is_dir() and (
        tmp_path / "checkpoints/bad_batch-6.safetensors"
    ).is_file()


def test_padding_may_be_anything() -> None:
    """What stands in positions that do not count is not searched."""
    model = get_peft_model(random_base("llama", torch.float32), NPTConfig(rank=3))
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[0] = 1e38
    ids, mask = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])
    assert "every block's output is finite" in find_nonfinite(model, {"input_ids": ids, "attention_mask": mask})
    assert (
        all_finite([]) and all_finite([torch.ones(3)]) and not all_finite([torch.ones(2), torch.tensor([float("inf")])])
    )


def test_the_best_adapter_is_never_one_that_is_not_finite(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.evaluate()
    good = (tmp_path / "best_model" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        active_layers(run.model)[0].component.e[0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(RunError, match=r"evaluation: the logits are not finite, weight \S+\.e is not finite"):
        run.evaluate()
    assert (tmp_path / "best_model" / "adapter_model.safetensors").read_bytes() == good


def test_half_precision_overflow_is_caught(tmp_path: Path) -> None:
    """float16 reaches 65,504: a block whose MLP writes more is named, in calibration already."""
    model = get_peft_model(random_base("llama", torch.float16), NPTConfig(npt_layers=[1, 3], rank=3))
    with torch.no_grad():
        model.get_base_model().model.layers[2].mlp.down_proj.weight.mul_(1e5)
    batch = {"input_ids": torch.tensor(blocks(2)["input_ids"][:])}
    with pytest.raises(
        RunError, match=r"after 32 tokens: hidden states are not finite, first in block 2 of the original"
    ):
        calibrate(model, [batch])
    with pytest.raises(
        ConversionError, match=r"block 3 .*: what reaches it is not finite in the unconverted model; use mod"
    ):
        get_peft_model(model.unload(), NPTConfig(npt_layers=[3], rank=3))
    base = random_base("llama", torch.float16)
    with torch.no_grad():
        for matrix in (base.model.layers[1].mlp.up_proj, base.model.layers[1].mlp.down_proj):
            matrix.weight.mul_(1e4)  # finite, and their products are not
        assert matrix.weight.isfinite().all()
    with pytest.raises(
        ConversionError, match=r"block 1 .*: its output is not finite in the unconverted model; use model\."
    ):
        get_peft_model(base, NPTConfig(npt_layers=[1], rank=3))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("gain", ["none", "norm", "overlap", "state"])
@pytest.mark.parametrize("site", ["input", "projection"])
@pytest.mark.parametrize("text", ["one token", "one token each", "shorter than the rank", "two tokens in turn"])
def test_degenerate_text_gives_finite_values(kind: str, gain: str, site: str, text: str) -> None:
    ids = {
        "one token": torch.full((4, 32), 7),
        "one token each": torch.tensor([[7], [8]]),
        "shorter than the rank": torch.tensor([[3, 4, 5]]),
        "two tokens in turn": torch.tensor([[3, 4] * 16]),
    }[text]
    model = get_peft_model(
        random_base(kind, torch.float32), NPTConfig(npt_layers="all", rank=8, gain=gain, low_rank_at=site)
    )
    errors = calibrate(model, [{"input_ids": ids}])
    assert all_finite([p for layer in active_layers(model) for p in layer.component.parameters()])  # type: ignore[union-attr]
    # A fit to nearly nothing must not be worse than no fit on what it saw.
    assert all(e["error_after"] <= 1.01 * e["error_before"] for e in errors.values())


def test_attention_that_is_constant_or_nothing(tmp_path: Path) -> None:
    for scale in (0.0, 1e-30):
        base = random_base("llama", torch.float32)
        with torch.no_grad():
            for block in base.model.layers:
                block.self_attn.v_proj.weight.mul_(scale)
        model = get_peft_model(base, NPTConfig(npt_layers="all", rank=4))
        errors = calibrate(model, [{"input_ids": torch.tensor(blocks(4)["input_ids"][:])}])
        assert all_finite([p for layer in active_layers(model) for p in layer.component.parameters()])  # type: ignore[union-attr]
        assert all(e["error_after"] < 1e-6 for e in errors.values())


@pytest.mark.usefixtures("quick_reports")
def test_an_adapter_that_changes_nothing_is_reported(local_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local_model)

    def notes(change: Any) -> list[str]:
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(local_model, dtype=torch.float32), NPTConfig(rank=2)
        )
        with torch.no_grad():
            change(model)
        return list(
            evaluate(model, tokenizer, ["a document of some length, twice over"] * 4, context_length=16)["notes"]
        )

    def zero(model: Any) -> None:
        for value in [p for layer in active_layers(model) for p in layer.component.parameters()]:
            value.zero_()

    def no_attention(model: Any) -> None:
        zero(model)
        for block in model.get_base_model().model.layers:
            block.self_attn.o_proj.weight.zero_()

    assert notes(lambda model: None) == []
    assert ["weight delta is zero everywhere" in note for note in notes(zero)] == [True]
    assert any("the adapter changes nothing" in note for note in notes(no_attention))


@pytest.mark.usefixtures("quick_reports")
def test_training_that_moves_nothing_is_reported(
    local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--quiet", "train", *settings(local_model, tmp_path, training__learning_rate=1e-30)]) == 0
    assert "4 training steps moved the parameters by" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "outputs" / "report.html").read_text()
    assert "<strong>Note:</strong> 4 training steps moved the" in page
    assert main(["--quiet", "train", *settings(local_model, tmp_path)]) == 0
    assert "moved the parameters" not in capsys.readouterr().out


@pytest.mark.usefixtures("quick_reports")
def test_the_command_ends_with_one_line_and_status_1(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Objective.__call__

    def call(self: Any, model: Any, inputs: Any, items: Any) -> Any:
        losses = original(self, model, inputs, items)
        losses = losses._replace(total=losses.total * float("nan"))
        return losses

    monkeypatch.setattr(Objective, "__call__", call)
    assert main(["--quiet", "train", *settings(local_model, tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("npt: ")]
    assert len(lines) == 1 and "step 1: the loss is not finite, in the loss: every block's output is finite" in lines[0]
    # The calibrated adapter is the last good one.
    assert (tmp_path / "checkpoints" / "best_model" / "adapter_model.safetensors").is_file()


def test_no_text_is_refused() -> None:
    model = get_peft_model(random_base("llama", torch.float32), NPTConfig(rank=3))
    with pytest.raises(NPTError, match="calibration got no text"):
        calibrate(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4)}])
