"""The model's own text is plain ancestral sampling, depends on its seed alone, and is kept only for the same request."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt.data import sample_blocks
from npt.data.sampling import DRAW_BLOCK, _with_labels, draw
from npt.errors import DataError
from tests.helpers import converted, random_base

TOKENIZER = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def sampled(model: Any, blocks: int = 5, length: int = 12, *, seed: int = 0, **options: Any) -> list[list[int]]:
    return list(sample_blocks(model, TOKENIZER, blocks, length, seed=seed, progress=False, **options)["input_ids"])


def chi_square_is_plausible(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Pearson's statistic over the classes expected 5 times or more, the rest pooled; within 5 sigma of its mean."""
    often = expected >= 5
    observed = torch.cat((counts[often], counts[~often].sum()[None])).double()
    wanted = torch.cat((expected[often], expected[~often].sum()[None])).double()
    statistic = ((observed - wanted).square() / wanted.clamp_min(1e-9)).sum()
    return bool(statistic < often.sum() + 5 * (2 * often.sum()) ** 0.5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sampling_is_the_models_own_distribution(kind: str) -> None:
    """First and second draws follow the softmax of the full forward, whatever generation_config asks for."""
    base = random_base(kind, torch.float32)
    base.generation_config.update(
        do_sample=False, top_k=1, temperature=0.1, top_p=0.1, repetition_penalty=5.0, max_new_tokens=1, min_p=0.5,
        eos_token_id=list(range(90)), bos_token_id=7, suppress_tokens=[3, 4], no_repeat_ngram_size=1, num_beams=3,
    )  # fmt: skip
    count = 6000
    ids = torch.tensor(sampled(base, count, 3, batch_size=2000))
    assert (ids[:, 0] == 1).all()
    with torch.no_grad():
        first = base(torch.tensor([[1]])).logits[0, -1].softmax(-1)
        pairs = torch.tensor([[1, token] for token in range(96)])
        second = first @ base(pairs).logits[:, -1].softmax(-1)
    assert chi_square_is_plausible(ids[:, 1].bincount(minlength=96), first * count)
    assert chi_square_is_plausible(ids[:, 2].bincount(minlength=96), second * count)
    assert not chi_square_is_plausible(ids[:, 1].bincount(minlength=96), (first.log() / 0.8).softmax(-1) * count)


def test_cached_decoding_sees_the_whole_block() -> None:
    """With the same numbers, drawing from uncached full forwards gives the same tokens."""
    from npt.data.sampling import _uniforms

    base = random_base("llama", torch.float32)
    uniforms = _uniforms(3, 11, 0, "")
    ids = torch.ones(3, 1, dtype=torch.long)
    with torch.no_grad():
        for i in range(11):
            ids = torch.cat((ids, draw(base(ids).logits[:, -1], uniforms[:, i])[:, None]), dim=1)
    assert sampled(base, 3) == ids.tolist()


def test_draws_never_hit_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    uniforms = torch.tensor([0.0, 0.499, 0.501, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("vocabulary", [5, DRAW_BLOCK, 3 * DRAW_BLOCK, 3 * DRAW_BLOCK + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draws_invert_the_whole_distribution_function(vocabulary: int, dtype: torch.dtype) -> None:
    """Against cumulative sums of float64 over the whole vocabulary; within 1e-6 of a step either token is right."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(300, vocabulary, generator=generator)).to(dtype)
    logits[:, ::3] = float("-inf")
    logits[4:8, vocabulary // 2 :] = float("-inf")
    uniforms = torch.rand(300, generator=generator, dtype=torch.float64)
    uniforms[:8] = torch.tensor([0.0, 1 - 1e-16, 1 - 1e-9, 1e-12] * 2, dtype=torch.float64)
    found = draw(logits, uniforms)
    probabilities = logits.double().softmax(-1)
    ends = probabilities.cumsum(-1).gather(1, found[:, None])[:, 0]
    begins = ends - probabilities.gather(1, found[:, None])[:, 0]
    assert ((begins - 1e-6 <= uniforms) & (uniforms <= ends + 1e-6)).all()
    assert (probabilities.gather(1, found[:, None]) > 0).all(), "a token that can't be was drawn"


def test_a_rare_token_of_a_large_vocabulary_is_drawn_as_often_as_it_should_be() -> None:
    """Sums in float32 over all 60,000 tokens would have lost it."""
    logits = torch.zeros(1, 60_000)
    logits[0, 0] = 16.0
    inside = torch.linspace(0, 1, 60_001, dtype=torch.float64)[:-1] + 0.5 / 60_000
    weights = logits[0].double().exp()
    centres = (weights.cumsum(0) - weights / 2) / weights.sum()
    assert draw(logits.expand(500, -1), centres[-500:]).tolist() == list(range(59_500, 60_000))
    assert draw(logits.expand(3, -1), inside[:3] * float(weights[0] / weights.sum())).tolist() == [0, 0, 0]


def test_sampling_goes_on_after_a_separator() -> None:
    base = random_base("gpt2", torch.float32)
    with torch.no_grad():
        base.transformer.wte.weight[2] = 0.0
        base.transformer.wte.weight[2] = base.transformer.wte.weight.mean(0) * 5
    blocks = sampled(base, 40, 60)
    assert any(2 in row[1:-5] for row in blocks) and all(len(row) == 60 for row in blocks)


def test_what_follows_a_separator_does_not_count() -> None:
    rows = _with_labels(np.array([[1, 5, 2, 7, 1, 8, 2], [1, 2, 1, 6, 3, 3, 3]], dtype=np.int32), [1, 2])
    assert rows["labels"][0] == [1, 5, 2, -100, 1, -100, 2]
    assert rows["labels"][1] == [1, 2, -100, -100, 3, 3, 3]
    assert rows["attention_mask"][1] == [1] * 7


def test_seed_and_label_choose_the_text_and_global_state_is_left_alone() -> None:
    base = random_base("llama", torch.float32)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    one = sampled(base, label="train")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    torch.manual_seed(99)
    assert one == sampled(base, label="train") == sampled(base, label="train", batch_size=2)
    assert one != sampled(base, label="train", seed=1) and one != sampled(base, label="eval")


def test_adapters_are_off_and_modes_are_put_back() -> None:
    expected = sampled(random_base("llama", torch.float32))
    converted_model = converted("llama", torch.float32)
    converted_model.train()
    lora = get_peft_model(
        random_base("llama", torch.float32),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.5),
    )
    lora.train()
    lora.get_base_model().model.layers[1].eval()
    for model in (converted_model, lora):
        modes = [module.training for module in model.modules()]
        tokens = torch.tensor([[1, 5, 9]])
        torch.manual_seed(0)
        logits = model(tokens).logits
        assert sampled(model) == expected
        assert [module.training for module in model.modules()] == modes
        torch.manual_seed(0)
        assert torch.equal(model(tokens).logits, logits)


def test_dropout_is_off() -> None:
    base = random_base("gpt2", torch.float32)
    expected = sampled(base)
    base.train()
    assert sampled(base) == expected and base.training


def test_cache_hits_only_for_the_same_request_and_weights(tmp_path: Path) -> None:
    base = random_base("llama", torch.float32)
    first = sample_blocks(base, TOKENIZER, 5, 12, seed=0, cache_dir=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    again = sample_blocks(base, TOKENIZER, 5, 12, seed=0, cache_dir=tmp_path, progress=False)
    assert file.stat().st_mtime_ns == stamp
    assert all(list(first[name]) == list(again[name]) for name in ("input_ids", "labels", "attention_mask"))
    # The same weights inside adapters are the same text.
    sampled(converted("llama", torch.float32), cache_dir=tmp_path)
    sampled(
        get_peft_model(random_base("llama", torch.float32), LoraConfig(target_modules=["q_proj"])), cache_dir=tmp_path
    )
    assert list(tmp_path.iterdir()) == [file]
    for options in ({"label": "x"}, {"seed": 1}, {"blocks": 6}, {"length": 11}, {"batch_size": 2}):
        sampled(base, **options, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    with torch.no_grad():
        base.model.layers[2].mlp.up_proj.weight[17, 11] += 0.01
    changed = sampled(base, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 7 and changed == sampled(base)


def test_a_cache_hit_runs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_base("llama", torch.float32)
    expected = sampled(base, cache_dir=tmp_path)
    monkeypatch.setattr(type(base), "forward", lambda *args, **options: pytest.fail("the model ran"))
    assert sampled(base, cache_dir=tmp_path) == expected


def test_a_torn_cache_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_base("llama", torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sampled(base, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    expected = sampled(base, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    assert sampled(base, cache_dir=tmp_path) == expected
    assert list(tmp_path.iterdir()) == [file] and sampled(base, cache_dir=tmp_path) == expected


def test_errors() -> None:
    base = random_base("llama", torch.float32)
    with pytest.raises(DataError, match=r"data\.max_length=129 is above the model's context of 128"):
        sampled(base, 1, 129)
    with pytest.raises(DataError, match=r"data\.max_length=1: "):
        sampled(base, 1, 1)
    with pytest.raises(DataError, match="num_blocks=0"):
        sampled(base, 0)
    none = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    base.config.bos_token_id = 5
    assert sample_blocks(base, none, 1, 4, seed=0, progress=False)["input_ids"][0][0] == 5
    base.config.bos_token_id = None
    with pytest.raises(DataError, match="neither tokenizer nor model has a BOS or EOS"):
        sample_blocks(base, none, 1, 8, seed=0)


def test_real_checkpoint_writes_its_stories(pretrained: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pretrained), AutoTokenizer.from_pretrained(pretrained)
    blocks = sample_blocks(model, tokenizer, 16, 256, seed=0, progress=False)
    ids = torch.tensor(list(blocks["input_ids"]))
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    # Its own text costs a model its own entropy: near 1.5 and 1.7 nats here; a sharper or flatter sampler shows at once.
    assert ids.shape == (16, 256) and 1.2 < loss < 2.0
    assert "Once upon a time" in tokenizer.decode(ids[0]) or "there was" in " ".join(tokenizer.batch_decode(ids))
