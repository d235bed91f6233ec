"""The report's figures against independent float64 computations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import NPTConfig, evaluate
from npt.attach import layer_mode
from npt.data import pack
from npt.errors import DataError
from npt.evaluation.deltas import delta_records
from npt.evaluation.divergence import block_error, token_divergences
from npt.evaluation.report import expected_outcomes, overlapping
from npt.tuner import active_layers
from tests.conftest import randomize

TEXT = ["The cat sat on the mat and looked at the moon.", "A second document, a little longer than the first one."] * 6


@pytest.fixture
def pair(local_model: Path) -> Any:
    def build(**options: Any) -> tuple[Any, Any]:
        base = AutoModelForCausalLM.from_pretrained(local_model, dtype=torch.float64).eval()
        model = get_peft_model(base, NPTConfig(**{"rank": 3, **options}))
        return model, AutoTokenizer.from_pretrained(local_model)

    return build


def test_report_equals_an_independent_computation(pair: Any) -> None:
    model, tokenizer = pair()
    randomize(model, 0.05)
    report = evaluate(model, tokenizer, TEXT, context_length=32, prompts=["The"], seed=4)
    blocks = pack(TEXT, tokenizer, 32)
    ids, labels = (torch.tensor(blocks[name][:]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        student = model(ids).logits.double().log_softmax(-1)[:, :-1]
        with model.disable_adapter():
            teacher = model(ids).logits.double().log_softmax(-1)[:, :-1]
    keep = labels[:, 1:] != -100
    target = ids[:, 1:, None]
    own, original = (-x.gather(-1, target)[..., 0][keep] for x in (student, teacher))
    kl = (teacher.exp() * (teacher - student)).sum(-1)[keep].numpy()
    change = (torch.exp(-own) - torch.exp(-original)).numpy()
    expected = {
        "npt_perplexity": np.exp(own.mean()),
        "original_perplexity": np.exp(original.mean()),
        "perplexity_ratio": np.exp(own.mean() - original.mean()),
        "mean_kl": kl.mean(),
        "median_kl": np.median(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "kl_p999": np.quantile(kl, 0.999),
        "max_kl": kl.max(),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1))[keep].double().mean(),
        "rms_delta_p": np.sqrt((change**2).mean()),
    }
    figures = {**report["evaluations"]["perplexity"], **report["evaluations"]["divergence"]}
    for name, value in expected.items():
        assert abs(figures[name] - float(value)) <= 1e-6 * abs(float(value)), name
    assert report["protocol"]["tokens"] == int(keep.sum()) and report["protocol"]["seed"] == 4
    assert report["model_config"]["npt_layers"] == [2, 3] and report["model_config"]["rank"] == 3
    assert json.loads(json.dumps(report)) == report


@torch.no_grad()
def test_weight_delta_figures_are_those_of_the_matrices(pair: Any) -> None:
    model, tokenizer = pair(npt_layers=[1, 2])
    randomize(model, 0.05)
    report = evaluate(model, tokenizer, TEXT[:2], context_length=24, prompts=[])
    stats = report["evaluations"]["weight_delta_stats"]
    ids = torch.tensor(pack(TEXT[:2], tokenizer, 24)["input_ids"][:])
    for override, key in ((None, "frobenius"), ("exact", "exact_frobenius")):
        norms: dict[str, list[float]] = {}
        seen: list[Any] = []
        with layer_mode(active_layers(model), override=override, observer=lambda q, d, s=seen: s.append((q.index, d))):
            model(ids)
        for index, deltas in seen:
            for name, delta in deltas.items():
                cells = [delta.matrix(*divmod(n, ids.shape[1])).norm() for n in range(ids.numel())]
                norms[f"layer_{index}.{name}"] = [float(c) for c in cells]
        records = delta_records(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], override)
        for path, values in norms.items():
            layer, name = path.split(".")
            found = records[int(layer.removeprefix("layer_"))][name].norms()
            np.testing.assert_allclose(np.sort(found), np.sort(values), rtol=1e-5)
            assert abs(stats["per_layer"][layer][name][key] - np.mean(values)) < 1e-6 * np.mean(values)
    up = active_layers(model)[0].module("up").weight
    entry = stats["per_layer"]["layer_1"]["up"]
    assert abs(entry["relative"] - entry["frobenius"] / float(up.norm())) < 1e-9
    assert abs(entry["rms_entry"] - entry["frobenius"] / up.numel() ** 0.5) < 1e-12


def test_layer_equivalence_of_a_perturbed_component(pair: Any) -> None:
    """The exact adapter has no error; a larger perturbation has a larger one, in the block it is in."""
    model, tokenizer = pair(carry="exact")
    layers = evaluate(model, tokenizer, TEXT, context_length=32, prompts=[])["evaluations"]["layer_equivalence"]
    assert sorted(layers) == ["layer_2", "layer_3"]
    assert all(f["relative_error"] < 1e-6 and f["cosine_similarity"] > 1 - 1e-9 for f in layers.values())
    model, tokenizer = pair()
    errors = []
    for scale in (0.0, 0.3):
        randomize(model, scale)
        layers = evaluate(model, tokenizer, TEXT, context_length=32, prompts=[])["evaluations"]["layer_equivalence"]
        errors.append(
            [layers["layer_2"]["relative_error"], layers["layer_2"]["mse"], layers["layer_2"]["max_absolute_diff"]]
        )
    assert all(b > a > 0 for a, b in zip(*errors, strict=True))


def test_exact_adapter_is_the_original(pair: Any) -> None:
    model, tokenizer = pair(carry="exact", npt_layers="all")
    report = evaluate(model, tokenizer, TEXT, context_length=32)
    assert report["evaluations"]["divergence"]["mean_kl"] < 1e-8
    assert abs(report["evaluations"]["perplexity"]["perplexity_ratio"] - 1) < 1e-6
    assert report["model_config"]["trainable_parameters"] == 0
    samples = report["evaluations"]["generation_samples"]
    assert samples["npt_generations"] == samples["original_generations"] and len(samples["prompts"]) == 4
    stats = report["evaluations"]["weight_delta_stats"]
    assert stats["mean_frobenius"] == stats["exact_frobenius"] > 0


def test_several_corpora_stand_side_by_side(pair: Any) -> None:
    model, tokenizer = pair()
    report = evaluate(model, tokenizer, {"one": TEXT[:4], "two": TEXT[1:7]}, context_length=16, prompts=[])
    corpora = report["evaluations"]["corpora"]
    assert list(corpora) == ["one", "two"] == report["protocol"]["corpora"]
    assert corpora["one"]["perplexity"] == report["evaluations"]["perplexity"] != corpora["two"]["perplexity"]


def test_stride_scores_every_token_once_with_more_context(pair: Any) -> None:
    model, tokenizer = pair()
    blocks = pack(TEXT, tokenizer, 32)
    windows = overlapping(blocks, 32, 8)
    assert len(windows) == 4 * (len(blocks) - 1) + 1
    scored = [sum(label != -100 for label in row[1:]) for row in windows["labels"][1:]]
    assert max(scored) <= 8
    flat = [token for row in blocks["input_ids"][:] for token in row]
    assert [token for row in windows["input_ids"][:1] for token in row] == flat[:32]
    assert windows["input_ids"][3] == flat[24:56]
    with pytest.raises(DataError, match="stride=33"):
        evaluate(model, tokenizer, TEXT, context_length=32, stride=33)


def test_batch_size_changes_nothing(pair: Any) -> None:
    model, tokenizer = pair()
    blocks = pack(TEXT, tokenizer, 32)
    one, many = (token_divergences(model, blocks, batch_size=size) for size in (1, 7))
    for name in one:
        np.testing.assert_allclose(one[name], many[name], rtol=1e-6, atol=1e-9)


def test_standard_error_is_over_blocks() -> None:
    """Tokens of one block move together: the error must not shrink with the tokens per block."""
    generator = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        block = np.repeat(np.arange(20), 50)
        values = generator.normal(size=20)[block] + 0.01 * generator.normal(size=1000)
        means.append(values.mean())
        errors.append(block_error(values, {"block": block}))
    assert 0.8 < np.mean(errors) / np.std(means) < 1.25


def test_outcomes_can_be_missed() -> None:
    def outcomes(kl: float, ratio: float, rms: float, norm: float) -> dict[str, bool]:
        evaluations = {
            "divergence": {"mean_kl": kl},
            "perplexity": {"perplexity_ratio": ratio},
            "weight_delta_stats": {"rms_entry": rms, "mean_frobenius": norm, "exact_frobenius": 1.0},
        }
        return {name: outcome["met"] for name, outcome in expected_outcomes(evaluations).items()}

    assert all(outcomes(0.001, 1.001, 0.004, 1.05).values())
    assert not outcomes(0.02, 1.0, 0.004, 1.0)["functional_fidelity"]
    assert (
        not outcomes(0.001, 1.06, 0.004, 1.0)["perplexity_ratio"]
        and not outcomes(0.001, 0.94, 0.004, 1.0)["perplexity_ratio"]
    )
    assert not outcomes(0.001, 1.0, 0.02, 1.0)["low_magnitude_delta"]
    assert not outcomes(0.001, 1.0, 0.004, 1.2)["low_magnitude_delta"]


def test_empty_corpus_is_an_error(pair: Any) -> None:
    model, tokenizer = pair()
    with pytest.raises(DataError, match="no text"):
        evaluate(model, tokenizer, ["  "])
