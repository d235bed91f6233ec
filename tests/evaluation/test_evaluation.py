"""The report's figures equal independent float64 computations."""

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
from npt.block.modes import Mode, running_as, watching_deltas
from npt.data import pack
from npt.errors import DataError
from npt.evaluation.divergence import block_error, token_divergences
from npt.evaluation.evaluate import overlapping
from npt.evaluation.verdict import QUANTISATION_SCALE, expected_outcomes, grade
from npt.evaluation.weight_deltas import delta_records
from npt.tuner.converted import active_layers
from tests.helpers import randomize

TEXT = ["The cat sat on the mat and looked at the moon.", "A second document, a little longer than the first one."] * 6


@pytest.fixture
def pair(local_model: Path) -> Any:
    def build(folder: Path = local_model, **options: Any) -> tuple[Any, Any]:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        model = get_peft_model(base, NPTConfig(**{"rank": 3, **options}))
        return model, AutoTokenizer.from_pretrained(folder)

    return build


@pytest.mark.parametrize("checkpoint", ["local_model", "stories"])
def test_report_equals_an_independent_computation(pair: Any, checkpoint: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = pair(request.getfixturevalue(checkpoint), npt_layers=[2, 3])
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
        "npt_perplexity": own.mean().exp(),
        "original_perplexity": original.mean().exp(),
        "perplexity_ratio": (own.mean() - original.mean()).exp(),
        "mean_kl": kl.mean(),
        "median_kl": np.median(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "kl_p999": np.quantile(kl, 0.999),
        "max_kl": kl.max(),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1))[keep].double().mean(),
        "rms_delta_p": np.sqrt((change**2).mean()),
    }
    expected |= {
        "npt_log_perplexity": own.mean(),
        "original_log_perplexity": original.mean(),
        "log_perplexity_correlation": np.corrcoef(own, original)[0, 1],
        "perplexity_difference": own.mean().exp() - original.mean().exp(),
        "min_kl": kl.min(),
        **{f"kl_p{share}": np.percentile(kl, share) for share in (1, 5, 10, 90, 95)},
        "mean_delta_p": change.mean(),
    }
    figures = {**report["evaluations"]["perplexity"], **report["evaluations"]["divergence"]}
    for name, value in expected.items():
        assert abs(figures[name] - float(value)) <= 1e-6 * abs(float(value)), name
    shares = {
        "min": 0,
        "p0_1": 0.1,
        "p1": 1,
        "p5": 5,
        "p10": 10,
        "p25": 25,
        "median": 50,
        "p75": 75,
        "p90": 90,
        "p95": 95,
    }
    for name, share in {**shares, "p99": 99, "p99_9": 99.9, "max": 100}.items():
        assert abs(figures["delta_p"][name] - np.percentile(change, share)) <= 1e-9, name
    edges, counts = (np.array(figures["kl_histogram"][key]) for key in ("edges", "counts"))
    for low, high, count in zip(edges[1:], edges[2:], counts[1:], strict=False):
        assert count == np.sum((kl >= low) & (kl < high))
    assert counts.sum() == len(kl)
    rows = np.repeat(np.arange(len(ids)), keep.sum(1).numpy())
    by_block = np.array([[kl[rows == row].sum(), (rows == row).sum()] for row in np.unique(rows)])
    spread = np.square(by_block[:, 0] - kl.mean() * by_block[:, 1]).sum() * len(by_block) / (len(by_block) - 1)
    assert abs(figures["mean_kl_standard_error"] - np.sqrt(spread) / len(kl)) < 1e-9
    worst = report["evaluations"]["worst_tokens"]
    place = keep.nonzero()[int(kl.argmax())].tolist()
    assert abs(worst[0]["kl"] - kl.max()) < 1e-9 and [worst[0]["block"], worst[0]["position"]] == [
        place[0],
        place[1] + 1,
    ]
    assert worst[0]["npt_wanted"] == tokenizer.decode([int(student[place[0], place[1]].argmax())])
    assert worst[0]["original_wanted"] == tokenizer.decode([int(teacher[place[0], place[1]].argmax())])
    assert worst[0]["token"] == tokenizer.decode([int(target[place[0], place[1], 0])])
    assert worst[0]["text_before"].endswith(tokenizer.decode(ids[place[0], max(0, place[1] - 3) : place[1] + 1]))
    assert [t["kl"] for t in worst] == sorted((t["kl"] for t in worst), reverse=True) and len(worst) == 20
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
    for mode, key in ((None, "frobenius"), (Mode.EXACT, "exact_frobenius")):
        norms: dict[str, list[float]] = {}
        seen: list[Any] = []
        layers = active_layers(model)
        with running_as(layers, mode), watching_deltas(layers, lambda q, d, s=seen: s.append((q.index, d))):
            model(ids)
        for index, deltas in seen:
            for name, delta in deltas.items():
                cells = [delta.matrix(*divmod(n, ids.shape[1])).norm() for n in range(ids.numel())]
                norms[f"layer_{index}.{name}"] = [float(c) for c in cells]
        with running_as(layers, mode):
            records = delta_records(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
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
    for figures in (*layers.values(), *(f["own_stream"] for f in layers.values())):
        assert figures["relative_error"] < 1e-6 and figures["cosine_similarity"] > 1 - 1e-9
    model, tokenizer = pair()
    errors = []
    for scale in (0.0, 0.3):
        randomize(model, scale)
        layers = evaluate(model, tokenizer, TEXT, context_length=32, prompts=[])["evaluations"]["layer_equivalence"]
        errors.append(
            [layers["layer_2"]["relative_error"], layers["layer_2"]["mse"], layers["layer_2"]["max_absolute_diff"]]
        )
    assert all(b > a > 0 for a, b in zip(*errors, strict=True))


@pytest.mark.parametrize("checkpoint", ["local_model", "stories"])
def test_exact_adapter_is_the_original(pair: Any, checkpoint: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = pair(request.getfixturevalue(checkpoint), carry="exact", npt_layers="all")
    report = evaluate(model, tokenizer, TEXT, context_length=32)
    assert report["evaluations"]["divergence"]["mean_kl"] < 1e-8
    assert abs(report["evaluations"]["perplexity"]["perplexity_ratio"] - 1) < 1e-6
    assert report["model_config"]["trainable_parameters"] == 0
    samples = report["evaluations"]["generation_samples"]
    assert samples["npt_generations"] == samples["original_generations"] and len(samples["prompts"]) == 4
    stats = report["evaluations"]["weight_delta_stats"]
    assert stats["mean_frobenius"] == stats["exact_frobenius"] > 0


@pytest.mark.parametrize("checkpoint", ["local_model", "stories"])
def test_the_base_against_itself_differs_by_nothing(pair: Any, checkpoint: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = pair(request.getfixturevalue(checkpoint))
    randomize(model)
    with model.disable_adapter():
        report = evaluate(model, tokenizer, TEXT, context_length=32, prompts=["The cat"])
    divergence, perplexity = (report["evaluations"][key] for key in ("divergence", "perplexity"))
    for key in ("mean_kl", "max_kl", "rms_delta_p", "mean_delta_p", "mean_kl_standard_error"):
        assert divergence[key] == 0.0, key
    assert perplexity["perplexity_ratio"] == 1.0 == divergence["top1_agreement"]
    assert perplexity["perplexity_difference"] == 0.0
    assert report["grade"]["bits"] == 16


def test_the_same_run_gives_the_same_bytes(pair: Any) -> None:
    reports = []
    for _ in range(2):
        torch.manual_seed(1)
        model, tokenizer = pair()
        randomize(model, 0.05)
        torch.rand(3)  # the caller's random state has no part in it
        reports.append(json.dumps(evaluate(model, tokenizer, TEXT, context_length=32, prompts=["The cat"])))
    assert reports[0] == reports[1]


def test_evaluation_leaves_the_random_state_alone(pair: Any) -> None:
    model, tokenizer = pair()
    before = torch.get_rng_state()
    evaluate(model, tokenizer, TEXT, context_length=32, prompts=["The cat"])
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_streams_of_both_models(pair: Any) -> None:
    model, tokenizer = pair(npt_layers=[1, 3])
    randomize(model, 0.05)
    report = evaluate(model, tokenizer, TEXT, context_length=32, prompts=[])["evaluations"]
    ids = torch.tensor(pack(TEXT, tokenizer, 32)["input_ids"][:])[:32]
    base = model.get_base_model()
    outputs: list[Any] = []
    handles = [block.register_forward_hook(lambda m, a, o: outputs.append(o.double())) for block in base.model.layers]
    model(ids)
    with model.disable_adapter():
        model(ids)
        own, teacher = outputs[:4], outputs[4:8]
        assert list(report["residual_stream"]) == ["layer_1", "layer_2", "layer_3"]
        for index in (1, 2, 3):
            expected = (own[index] - teacher[index]).norm() / teacher[index].norm()
            assert abs(report["residual_stream"][f"layer_{index}"]["relative_error"] - expected) < 1e-9
        for handle in handles:
            handle.remove()
        # Block 3 of the original, on what the NPT model's block 2 left.
        base.model.layers[3].register_forward_pre_hook(lambda m, a: (own[2], *a[1:]))
        outputs.clear()
        base.model.layers[3].register_forward_hook(lambda m, a, o: outputs.append(o))
        model(ids)
    expected = (own[3] - outputs[0]).norm() / (outputs[0] - own[2]).norm()
    assert abs(report["layer_equivalence"]["layer_3"]["own_stream"]["relative_error"] - expected) < 1e-9


def test_positions_past_the_length_of_calibration(pair: Any) -> None:
    model, tokenizer = pair()
    randomize(model, 0.05)
    found = evaluate(model, tokenizer, TEXT, context_length=32, prompts=[])["evaluations"]["kl_by_position"]
    assert found["context_length"] == 64 and found["calibration_length"] == 32
    blocks = pack(TEXT, tokenizer, 32)
    ids, labels = (torch.tensor(blocks[key][:]) for key in ("input_ids", "labels"))
    pairs = len(ids) // 2
    ids, labels = (x[: 2 * pairs].reshape(pairs, 64) for x in (ids, labels))
    with torch.no_grad():
        student = model(ids).logits.log_softmax(-1)
        with model.disable_adapter():
            teacher = model(ids).logits.log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    for start, mean, count in zip(found["from"], found["mean_kl"], found["tokens"], strict=True):
        here = labels[:, max(1, start) : start + 4] != -100  # the position is that of the token foretold
        values = kl[:, max(1, start) - 1 : start + 3][here]
        assert count == len(values) and abs(mean - float(values.mean())) < 1e-9
    whole = evaluate(model, tokenizer, TEXT, context_length=128, prompts=[])["evaluations"]["kl_by_position"]
    assert whole["context_length"] == 128, "the model's context is 128"


@torch.no_grad()
def test_distribution_and_rank_of_the_deltas(pair: Any) -> None:
    model, tokenizer = pair(npt_layers=[2], rank=0, carry="diagonal", gain="none")
    stats = evaluate(model, tokenizer, TEXT, context_length=32, prompts=[])["evaluations"]["weight_delta_stats"]
    figures = stats["per_layer"]["layer_2"]["down"]
    spread = figures["distribution"]
    assert spread["min"] <= spread["p5"] <= spread["median"] <= spread["p95"] <= spread["p99"] <= spread["max"]
    ids = torch.tensor(pack(TEXT, tokenizer, 32)["input_ids"][:])[:32]
    seen: list[Any] = []
    (layer,) = active_layers(model)
    with watching_deltas([layer], lambda q, deltas: seen.append(deltas)):
        model(ids)
    delta = seen[1]["down"]
    norms = delta.frobenius_norm().flatten()
    assert abs(spread["median"] - float(norms.quantile(0.5))) < 1e-9
    values = torch.linalg.svdvals(delta.apply().flatten(0, 1)[: stats["effective_rank_tokens"]])
    share = values / values.sum()
    share = share[share > 1e-12]
    assert (
        abs(figures["effective_rank"] - float(torch.exp(-(share * share.log()).sum())))
        < 0.01 * figures["effective_rank"]
    )
    joint = sum(d.frobenius_norm_square() for deltas in seen for d in deltas.values()).sqrt()
    largest = stats["largest"][0]
    assert abs(largest["joint_norm"] - float(joint.max())) < 1e-6
    row, column = divmod(int(joint.argmax()), 32)
    assert (largest["block"], largest["position"]) == (row, column)
    assert largest["token"] == tokenizer.decode([int(ids[row, column])])


def test_text_of_both_models_and_where_they_part(pair: Any) -> None:
    model, tokenizer = pair()
    randomize(model, 1.0)
    found = evaluate(model, tokenizer, TEXT, context_length=32, prompts=["The cat"])["evaluations"][
        "generation_samples"
    ]
    for samples in (found, found["sampled"]):
        npt, original = samples["npt_generations"][0], samples["original_generations"][0]
        at = samples["first_difference"][0]
        assert npt != original and npt[:at] == original[:at] and npt[at : at + 1] != original[at : at + 1]
        assert samples["matching_tokens"][0] < samples["tokens"][0]
    assert found["sampled"]["original_generations"] != found["original_generations"]
    model, tokenizer = pair(carry="exact")
    found = evaluate(model, tokenizer, TEXT, context_length=32, prompts=["The cat"])["evaluations"][
        "generation_samples"
    ]
    for samples in (found, found["sampled"]):
        assert samples["first_difference"] == [None] and samples["matching_tokens"] == samples["tokens"]


def test_grade_on_the_scale_of_quantisation() -> None:
    assert [grade(kl)["bits"] for kl in (0, 0.0012, 0.0014, 0.01, 0.02, 0.1, 0.2, 0.6)] == [16, 8, 6, 5, 4, 3, 2, None]
    assert "further" in grade(0.6)["text"] and "6-bit" in grade(0.0014)["text"]
    kls = [kl for _, _, kl in QUANTISATION_SCALE]
    assert kls == sorted(kls)


def test_one_block_has_no_standard_error(pair: Any) -> None:
    model, tokenizer = pair()
    report = evaluate(model, tokenizer, TEXT[:1], context_length=32, max_tokens=32, prompts=[])
    assert report["evaluations"]["perplexity"]["perplexity_ratio_standard_error"] is None
    assert json.loads(json.dumps(report, allow_nan=False)) == report


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
