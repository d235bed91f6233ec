"""The block is chosen by the overlap of keys; the statistics behind it are kept for the next store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import EditStore
from npt.builtin import model_folder
from npt.editing import metrics as metrics_module
from npt.editing import scan
from npt.editing.metrics import DOMAIN_WEIGHT, Source
from npt.editing.probes import probes, texts
from npt.editing.requests import Request
from npt.editing.statistics import moments_of, token_rows
from npt.errors import DataError
from tests.helpers import random_base, spelling_tokenizer

TEXTS = ["Once upon a time, there was a little girl named Lily.", "Tom had a ball."]
SUBJECT = Request("One day, Tim saw a big", "cat", "Tim")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    folder = model_folder("builtin:tiny")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def source(tiny: tuple[Any, Any], metric: str = "text", folder: Path | None = None, **more: Any) -> Source:
    options: dict[str, Any] = {"statistics": TEXTS, "domain": None, "cache_dir": folder, "progress": False, **more}
    return Source(*tiny, metric, **options)


def test_probes_are_no_part_of_the_text_behind_the_domain_metric() -> None:
    subjects = {probe.subject for probe in probes()}
    assert len(subjects) == len(list(probes())) >= 24
    assert not any(subject in text for subject in subjects for text in texts())
    assert all(probe.subject in probe.prompt and probe.subject in probe.paraphrase for probe in probes())
    assert all(probe.subject not in probe.neighbour for probe in probes())


@pytest.mark.parametrize(
    ("blocks", "first", "last", "count"), [(30, 6, 21, 8), (4, 0, 2, 3), (1, 0, 0, 1), (80, 16, 56, 8)]
)
def test_candidates(blocks: int, first: int, last: int, count: int) -> None:
    found = scan.candidates(blocks, 1536)
    assert (found[0], found[-1], len(found)) == (first, last, count)
    assert len(scan.candidates(80, 28_672)) == 2  # second moments of 6 GiB each


def test_overlaps_are_those_of_keys(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first probe's, without a metric, from inputs that a hook sees."""
    (probe, *_) = probes()
    monkeypatch.setattr(scan, "probes", lambda: iter([probe]))
    model, tokenizer = tiny
    seen: list[torch.Tensor] = []
    handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(
        lambda m, args: seen.append(args[0][0].double())
    )
    with torch.no_grad():
        for text in (probe.prompt, probe.paraphrase, probe.neighbour):
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()

    def last_of(text: str) -> int:
        return len(tokenizer(text[: text.index(probe.subject) + len(probe.subject)])["input_ids"]) - 1

    key = seen[0][last_of(probe.prompt)]
    same = float(seen[1][last_of(probe.paraphrase)] @ key / (key @ key))
    other = float((seen[2] @ key / (key @ key)).abs().max())
    found = scan.overlaps(source(tiny, "identity"), [2])[2]
    assert found == pytest.approx((same, other), rel=1e-4)


def test_the_best_score_is_chosen(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scan, "overlaps", lambda source, layers: {4: (0.9, 0.5), 1: (0.6, 0.1), 2: (0.4, 0.2)})
    with caplog.at_level("INFO", "npt"):
        assert scan.choose_layer(source(tiny), [SUBJECT]) == 1
    assert "layer: 1 of 6" in caplog.text and "1 0.60/0.10" in caplog.text
    assert scan.choose_layer(source(tiny), [Request("The girl is", "Ben")]) == 5


def test_a_store_finds_its_block_at_the_first_edit(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[int]] = []

    def counted(model: Any, downs: Any, *arguments: Any, **more: Any) -> Any:
        passes.append(sorted(downs))
        return moments_of(model, downs, *arguments, **more)

    monkeypatch.setattr(metrics_module, "moments_of", counted)
    store = EditStore(*tiny, metric="text", statistics=TEXTS, progress=False, steps=1)
    assert store.layers == ()
    store.write(SUBJECT.prompt, SUBJECT.subject, SUBJECT.target)
    seen = list(passes)
    expected = scan.choose_layers(source(tiny), [SUBJECT], 3)
    assert len(expected) == 3 and scan.choose_layer(source(tiny), [SUBJECT]) in expected
    assert store.layers == expected == store.edits[0].layers
    # The scan's moments serve the edit.
    assert seen[0] == [1, 2, 3, 4] and {layer for part in seen[1:] for layer in part} == set(expected) - {1, 2, 3, 4}
    store.close()


def test_neighbouring_blocks_are_chosen_within_the_model(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for best in (0, 3, 5):
        monkeypatch.setattr(scan, "choose_layer", lambda source, requests, best=best: best)
        found[best] = [scan.choose_layers(source(tiny), [SUBJECT], count) for count in (1, 3, 9)]
    everything = tuple(range(6))
    assert found == {
        0: [(0,), (0, 1, 2), everything],
        3: [(3,), (2, 3, 4), everything],
        5: [(5,), (3, 4, 5), everything],
    }


def test_a_tokenizer_without_any_probe_is_told() -> None:
    base, tokenizer = random_base("llama", torch.float32), spelling_tokenizer()
    found = scan.overlaps(Source(base, tokenizer, "identity", "self", None, None, False), [1])
    assert set(found) == {1}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match="name a layer"):
        patch.setattr(scan, "probes", lambda: iter([]))
        scan.overlaps(Source(base, tokenizer, "identity", "self", None, None, False), [1])


# -- the text behind a metric ----------------------------------------------------------------------------------------------


def test_the_domain_metric_adds_prompts(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    downs = {2: model.model.layers[2].mlp.down_proj}
    prompts = ["The home of Max is", "The dog of Max is called"]

    def moment(given: list[str]) -> torch.Tensor:
        return moments_of(model, downs, token_rows(tokenizer, given, "t"), progress=False)[2].float().double()

    found = source(tiny, "domain", domain=prompts).moments(downs)[2]
    assert torch.allclose(found, moment(TEXTS) + DOMAIN_WEIGHT * moment(prompts))
    assert torch.allclose(source(tiny, "domain").moments(downs)[2], moment(TEXTS) + DOMAIN_WEIGHT * moment(texts()))
    assert torch.equal(source(tiny).moments(downs)[2], moment(TEXTS)) and source(tiny, "identity").moments(downs) == {}


def test_the_name_of_a_metric_says_what_it_is_made_of(tiny: tuple[Any, Any]) -> None:
    names = {
        source(tiny, metric, **more).name
        for metric in ("domain", "text")
        for more in ({}, {"statistics": "self"}, {"statistics": TEXTS[:1]}, {"domain": ["a b"]})
    }
    assert len(names) == 7  # `domain` says nothing beside metric="text"


def test_statistics_are_kept_for_their_base(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny
    downs = {2: model.model.layers[2].mlp.down_proj}
    first = source(tiny, folder=tmp_path).moments(downs)[2]
    passes: list[int] = []

    def counted(*arguments: Any, **more: Any) -> Any:
        passes.append(1)
        return moments_of(*arguments, **more)

    monkeypatch.setattr(metrics_module, "moments_of", counted)
    assert torch.equal(source(tiny, folder=tmp_path).moments(downs)[2], first) and not passes
    (file,) = tmp_path.glob("moment-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(source(tiny, folder=tmp_path).moments(downs)[2], first) and len(passes) == 1
    source(tiny, folder=tmp_path, statistics=TEXTS[:1]).moments(downs)
    assert len(passes) == 2
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    try:
        source(tiny, folder=tmp_path).moments(downs)
    finally:
        with torch.no_grad():
            model.model.norm.weight.sub_(0.5)
    assert len(passes) == 3
