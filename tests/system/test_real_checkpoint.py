"""The project's promises hold on pretrained checkpoints: the one in the package, and a real one where it is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from npt import calibrate, evaluate
from npt.cli import main
from npt.data import sample_blocks
from npt.data.batches import batches_of


@pytest.fixture(scope="module")
def text(pretrained: Path) -> Any:
    """(64 calibration blocks, 32 held-out blocks) of 128 tokens of the checkpoint's own text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tokenizer = AutoModelForCausalLM.from_pretrained(pretrained), AutoTokenizer.from_pretrained(pretrained)
    return tuple(
        sample_blocks(base, tokenizer, count, 128, seed=0, label=label)
        for count, label in ((64, "train"), (32, "eval"))
    )


@pytest.mark.parametrize(
    "layers,ratio,kl,top",
    [("upper_half", 1.005, 0.0045, 0.97), pytest.param("all", 1.006, 0.006, 0.96, marks=pytest.mark.slow)],
)
def test_calibration_alone_makes_it_equivalent(
    pretrained_model: Any, text: Any, layers: str, ratio: float, kl: float, top: float
) -> None:
    model, tokenizer = pretrained_model(npt_layers=layers)
    calibrate(model, batches_of(text[0], 16, torch.device("cpu")))
    report = evaluate(model, tokenizer, text[1])
    figures = {**report["evaluations"]["perplexity"], **report["evaluations"]["divergence"]}
    assert figures["perplexity_ratio"] <= ratio and figures["mean_kl"] <= kl and figures["top1_agreement"] >= top
    stats = report["evaluations"]["weight_delta_stats"]
    assert stats["rms_entry"] < 0.01 and stats["mean_frobenius"] <= 1.1 * stats["exact_frobenius"]
    assert all(outcome["met"] for outcome in report["expected_outcomes"].values())
    samples = report["evaluations"]["generation_samples"]
    assert samples["original_generations"][0].startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play "
    )


@torch.no_grad()
def test_exact_is_the_original_in_float32(pretrained_model: Any, text: Any) -> None:
    model, _ = pretrained_model(carry="exact", npt_layers="all")
    ids = torch.tensor(text[1][:8]["input_ids"])
    with model.disable_adapter():
        expected = model(ids).logits
    assert (model(ids).logits - expected).abs().max() <= 1e-4


def test_cached_generation_equals_uncached(pretrained_model: Any, text: Any) -> None:
    model, tokenizer = pretrained_model()
    calibrate(model, batches_of(text[0], 16, torch.device("cpu")))
    inputs = tokenizer(
        ["Once upon a time", "The little dog ran to the big tree and"],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    arguments = {**inputs, "max_new_tokens": 60, "do_sample": False}
    assert torch.equal(model.generate(**arguments, use_cache=True), model.generate(**arguments, use_cache=False))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "overrides,ratio,kl,top",
    [
        ([], 1.003, 0.0035, 0.97),
        (["training.num_train_steps=0"], 1.005, 0.0045, 0.97),
        (["model.npt_layers=all"], 1.006, 0.006, 0.96),
    ],
)
def test_the_command_reaches_the_documented_figures(
    overrides: list[str], ratio: float, kl: float, top: float, stories: Path, tmp_path: Path
) -> None:
    """`npt train` with defaults, then three evaluation seeds of 102,000 held-out tokens each."""
    base = ["--set", f"model.base_model_name={stories}", "--set", f"paths.cache_dir={tmp_path}/cache"]
    paths = ["--set", f"paths.output_dir={tmp_path}/o", "--set", f"paths.checkpoint_dir={tmp_path}/c"]
    assert main(["--quiet", "train", *base, *paths, *(w for o in overrides for w in ("--set", o))]) == 0
    for seed in (0, 1, 2):
        output = tmp_path / f"{seed}.json"
        command = ["--quiet", "evaluate", "--checkpoint", f"{tmp_path}/c/best_model", "--output", str(output)]
        assert main([*command, *base, "--set", f"training.seed={seed}"]) == 0
        report = json.loads(output.read_text())
        figures = {**report["evaluations"]["perplexity"], **report["evaluations"]["divergence"]}
        assert report["protocol"]["tokens"] >= 100_000
        assert figures["perplexity_ratio"] <= ratio and figures["mean_kl"] <= kl and figures["top1_agreement"] >= top


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_prose_the_model_never_saw(shared_dir: Path, stories: Path, tmp_path: Path) -> None:
    folder = shared_dir / "data" / "text"
    prose = [
        folder / f"{name}.txt"
        for name in ("pride-and-prejudice", "a-study-in-scarlet", "alice-in-wonderland", "wikitext-2-valid")
    ]
    base = ["--set", f"model.base_model_name={stories}"]
    paths = ["--set", f"paths.output_dir={tmp_path}/o", "--set", f"paths.checkpoint_dir={tmp_path}/c"]
    files = ["--set", f"data.calibration_files=[{','.join(map(str, prose))}]"]
    assert main(["--quiet", "train", *base, *paths, *files]) == 0
    for name, bar in (("grimms-fairy-tales", 0.008), ("wikitext-2-test", 0.013)):
        data = ["--set", "data.dataset_name=text", "--set", f"data.data_files=[{folder / name}.txt]"]
        command = ["--quiet", "evaluate", "--checkpoint", f"{tmp_path}/c/best_model", "--output", f"{tmp_path}/r.json"]
        assert main([*command, *base, *data]) == 0
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["protocol"]["tokens"] >= 100_000
        assert report["evaluations"]["divergence"]["mean_kl"] <= bar, name
