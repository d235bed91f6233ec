"""Greedy and sampled texts are what they say, whatever settings of generation come with the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, GenerationConfig

from npt import NPTConfig, load_base
from npt.builtin import model_folder
from npt.cli import main
from npt.data import sample_blocks
from npt.errors import NPTError
from npt.evaluation.generation import (
    continue_by_own_settings,
    continue_text,
    continue_texts,
    own_settings,
    side_by_side,
    side_by_side_with_seeds,
)
from tests.families import CASES
from tests.helpers import converted, randomize

PROMPT = "Once upon a time"

#: Settings that a base's generation_config.json holds in practice, and every rarer one that would change a text.
SETTINGS: dict[str, dict[str, Any]] = {
    "a penalty on repetition": {"repetition_penalty": 1.8},
    "n-grams that must not come again": {"no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "forbidden words": {"bad_words_ids": [[i] for i in range(3, 96)]},
    "suppressed tokens": {"suppress_tokens": list(range(3, 96))},
    "suppressed at the start": {"begin_suppress_tokens": list(range(3, 96))},
    "a forced end": {"forced_eos_token_id": 2},
    "a forced start": {"forced_bos_token_id": 7},
    "a bias": {"sequence_bias": [[[30], 100.0]]},
    "a shortest length": {"min_length": 60, "min_new_tokens": 50},
    "a longest length": {"max_length": 6},
    "a decay of length": {"exponential_decay_length_penalty": [1, 9.0]},
    "guidance": {"guidance_scale": 3.0},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "sampling": {"do_sample": True, "temperature": 0.2, "top_k": 3, "top_p": 0.3},
    "rare cut-offs": {"do_sample": True, "min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    "a newer cut-off": {"do_sample": True, "top_h": 0.1},
    "a static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant settings": {"is_assistant": True, "num_assistant_tokens": 1, "assistant_early_exit": 2},
    "layers that contrast": {"dola_layers": "high"},
    "a watermark": {"watermarking_config": {"bias": 8.0}},
    "a stop string": {"stop_strings": ["e"]},
    "no time": {"max_time": 1e-9},
    "several texts": {"num_return_sequences": 2, "return_dict_in_generate": True},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 5.0},
}


class Letters:
    """A tokenizer of single characters."""

    eos_token_id, pad_token_id = None, 0

    def __call__(self, text: str, **_: Any) -> Any:
        ids = torch.tensor([[3 + ord(c) % 90 for c in text]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids)


@pytest.fixture(scope="module")
def pair() -> Any:
    return converted("llama", torch.float32), Letters()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_of_the_base_changes_greedy_or_sampled_text(name: str, pair: Any, monkeypatch: Any) -> None:
    model, tokenizer = pair
    base = model.get_base_model()
    monkeypatch.setattr(base, "generation_config", GenerationConfig(eos_token_id=2))
    expected = [side_by_side(model, tokenizer, [PROMPT], 12, seed) for seed in (None, 3)]
    changed = GenerationConfig(eos_token_id=2)
    for key, value in SETTINGS[name].items():
        setattr(changed, key, value)
    monkeypatch.setattr(base, "generation_config", changed)
    assert [side_by_side(model, tokenizer, [PROMPT], 12, seed) for seed in (None, 3)] == expected


def test_settings_in_config_json_change_nothing_either(tmp_path: Path) -> None:
    """Older checkpoints keep them there; also the text that the frozen model writes to train on."""
    found = []
    for name, more in (("plain", {}), ("older", {"repetition_penalty": 1.9, "min_p": 0.5, "no_repeat_ngram_size": 2})):
        folder = shutil.copytree(model_folder("builtin:tiny"), tmp_path / name)
        (folder / "generation_config.json").unlink(missing_ok=True)
        values = json.loads((folder / "config.json").read_text()) | more
        (folder / "config.json").write_text(json.dumps(values))
        base, tokenizer = load_base(str(folder), dtype="float32")
        own = sample_blocks(base, tokenizer, 2, 12, seed=0, progress=False)["input_ids"][:]
        torch.manual_seed(0)
        model = get_peft_model(base, NPTConfig(rank=2)).eval()
        found.append((own, [continue_text(model, tokenizer, PROMPT, 12, seed) for seed in (None, 3)]))
    assert found[0] == found[1]


def test_greedy_text_takes_the_likeliest_token_and_sampling_follows_the_distribution(pair: Any) -> None:
    model, tokenizer = pair
    text, new = continue_text(model, tokenizer, PROMPT, 8)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for token in new:
        logits = model(input_ids=ids).logits[0, -1]
        assert int(logits.argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    probabilities = model(input_ids=prompt).logits[0, -1].double().softmax(-1)
    state = torch.random.get_rng_state()
    drawn = torch.tensor([continue_text(model, tokenizer, PROMPT, 1, seed)[1][0] for seed in range(400)])
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state is left alone"
    likeliest = int(probabilities.argmax())
    p = probabilities[likeliest].item()
    assert abs(float((drawn == likeliest).double().mean()) - p) < 4 * (p * (1 - p) / 400) ** 0.5


def test_texts_of_several_seeds_are_those_of_each_alone(pair: Any, monkeypatch: Any) -> None:
    """Also where one of them ends before the others."""
    model, tokenizer = pair
    seeds = (None, 3, 4)
    alone = [continue_text(model, tokenizer, PROMPT, 12, seed) for seed in seeds]
    own = GenerationConfig(eos_token_id=max((new for _, new in alone), key=len)[4])
    for config in (model.get_base_model().generation_config, own):
        monkeypatch.setattr(model.get_base_model(), "generation_config", config)
        alone = [continue_text(model, tokenizer, PROMPT, 12, seed) for seed in seeds]
        assert continue_texts(model, tokenizer, PROMPT, 12, seeds) == alone
        columns = [side_by_side(model, tokenizer, [PROMPT, "b"], 6, seed) for seed in seeds]
        assert side_by_side_with_seeds(model, tokenizer, [PROMPT, "b"], 6, seeds) == columns
    assert len({len(new) for _, new in alone}) > 1, "one ends early"
    calls: list[int] = []
    model.get_base_model().register_forward_hook(lambda m, a, o: calls.append(len(o.logits)))
    continue_texts(model, tokenizer, PROMPT, 1, seeds)
    assert calls == [3], "one batch"


def test_every_end_of_text_that_the_base_names_ends_one(pair: Any, monkeypatch: Any) -> None:
    """Chat models name several: the tokenizer's EOS alone would let them write on."""
    model, tokenizer = pair
    _, new = continue_text(model, tokenizer, PROMPT, 12)
    own = GenerationConfig(eos_token_id=[95, new[4]])
    monkeypatch.setattr(model.get_base_model(), "generation_config", own)
    assert continue_text(model, tokenizer, PROMPT, 12)[1] == new[: new.index(new[4]) + 1]
    assert continue_by_own_settings(model, tokenizer, PROMPT, 12)[1] == new[: new.index(new[4]) + 1]


#: One of each kind of cache and of positions; the whole table agrees.
KINDS = {"llama", "gpt2", "gemma2", "gemma3_text", "bloom", "mpt", "opt", "lfm2", "qwen3_5_text", "cohere2", "gptj"}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in KINDS], ids=lambda case: case.name)
def test_greedy_text_is_that_of_generate_in_every_kind_of_family(case: Any) -> None:
    model = get_peft_model(case.build(), NPTConfig(npt_layers="upper_half", rank=3)).eval()
    randomize(model)
    base = model.get_base_model()
    base.generation_config.eos_token_id = None
    ids = Letters()("hello there")["input_ids"]
    plain = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0)
    expected = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    assert continue_text(model, Letters(), "hello there", 10)[1] == expected[0, ids.shape[1] :].tolist()


def test_the_base_s_own_settings_are_followed_when_asked_for(pair: Any, monkeypatch: Any) -> None:
    model, tokenizer = pair
    base = model.get_base_model()
    own = GenerationConfig(repetition_penalty=1.8, do_sample=True, top_k=5, eos_token_id=2, max_length=6)
    monkeypatch.setattr(base, "generation_config", own)
    assert own_settings(model) == {"repetition_penalty": 1.8, "do_sample": True, "top_k": 5, "max_length": 6}
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        expected = base.generate(**inputs, max_new_tokens=12, repetition_penalty=1.8, do_sample=True, top_k=5)
    (sample,) = side_by_side(model, tokenizer, [PROMPT], 12, 0, by_own_settings=True)
    assert sample["npt"] == tokenizer.decode(expected[0], skip_special_tokens=True)
    monkeypatch.setattr(own, "constraints", ["x"])
    with pytest.raises(NPTError, match="--decoding base: .* use --decoding greedy"):
        side_by_side(model, tokenizer, [PROMPT], 4, 0, by_own_settings=True)
    assert base.generation_config is own and own.max_length == 6, "the base's own object is left as it was"


def test_generate_command_decodes_as_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(model_folder("builtin:tiny"), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, NPTConfig(carry="exact")).save_pretrained(str(tmp_path / "adapter"))
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": list(range(3, 2000))}))
    lines = {}
    for how in ([], ["--decoding", "greedy"], ["--decoding", "sampled"], ["--decoding", "base"]):
        words = ["generate", PROMPT, "--checkpoint", str(tmp_path / "adapter"), "--max-new-tokens", "20", *how]
        assert main(["--quiet", *words, "--set", "training.seed=5"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        npt, original = shown.removeprefix("npt ").split(" original ")
        assert npt == original
        lines[" ".join(how)] = npt
    ids = base.generate(**AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt"), max_new_tokens=20)
    assert lines[""] == lines["--decoding greedy"]
    assert lines[""] == AutoTokenizer.from_pretrained(folder).decode(ids[0], skip_special_tokens=True)
    assert len(set(lines.values())) == 3
