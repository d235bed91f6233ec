"""An adapter's card and configuration say where its base is in words that other libraries act on."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from npt import NPTConfig, load_base, merge_adapters
from npt.builtin import model_folder
from npt.errors import NPTError
from tests.helpers import randomize

IDS = torch.arange(3, 20)[None]


def saved(base: Any, folder: Path, **options: Any) -> torch.Tensor:
    """Saves a random adapter for a base; the logits of the two."""
    model = get_peft_model(base, NPTConfig(rank=2, **options)).eval()
    randomize(model)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def code_of(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return str(code)


def run_card(folder: Path) -> Any:
    """The model that the card's code makes."""
    names: dict[str, Any] = {}
    exec(code_of(folder).replace('"path or hub name of this adapter"', repr(str(folder))), names)
    return names["model"].eval()


def in_hub_cache(source: Path, name: str, cache: Path) -> None:
    """Lays a model folder out as the hub's client keeps one that it has downloaded."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, place / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("kind", ["builtin", "folder", "relative folder", "hub"])
def test_the_card_s_code_loads_the_adapter(
    kind: str, local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    in_hub_cache(local_model, "org/model-1", tmp_path / "hub")
    monkeypatch.chdir(local_model.parent)
    name = {
        "builtin": "builtin:tiny",
        "folder": str(local_model),
        "relative folder": os.path.relpath(local_model),
        "hub": "org/model-1",
    }[kind]
    base = load_base(name)[0] if kind == "builtin" else AutoModelForCausalLM.from_pretrained(name)
    expected = saved(base, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        assert torch.equal(run_card(tmp_path / "adapter")(input_ids=IDS).logits, expected)
        auto = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")).eval()
        assert torch.equal(auto(input_ids=IDS).logits, expected)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == ("org/model-1" if kind == "hub" else None)
    recorded = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded == {"builtin": "builtin:tiny", "hub": "org/model-1"}.get(kind, str(local_model))


def test_a_base_from_the_builtin_s_folder_is_recorded_by_its_name(tmp_path: Path) -> None:
    """Its folder lies in one machine's installation; a second save and a join keep the name."""
    for number in (0, 1):
        base = AutoModelForCausalLM.from_pretrained(model_folder("builtin:tiny"))
        torch.manual_seed(0)
        saved(base, tmp_path / str(number), npt_layers=[number])
    base = AutoModelForCausalLM.from_pretrained(model_folder("builtin:tiny"))
    PeftModel.from_pretrained(base, str(tmp_path / "0")).save_pretrained(str(tmp_path / "again"))
    merge_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "joined")
    for folder in ("0", "again", "joined"):
        config, card = ((tmp_path / folder / name).read_text() for name in ("adapter_config.json", "README.md"))
        assert json.loads(config)["base_model_name_or_path"] == "builtin:tiny"
        assert str(model_folder("builtin:tiny")) not in config + card
        assert "npt.load_base('builtin:tiny')" in card and "to other libraries its name says nothing" in card


def test_a_base_without_a_name_is_said_to_have_none(tmp_path: Path) -> None:
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
    )
    saved(base, tmp_path)
    assert "from_pretrained('" not in code_of(tmp_path) and "base = ...  #" in code_of(tmp_path)
    assert "has no name that it could be loaded by" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_load_base(local_model: Path) -> None:
    model, tokenizer = load_base(str(local_model), dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training and len(tokenizer) == 259
    with pytest.raises(NPTError, match="model.dtype: .*use 'auto'"):
        load_base(str(local_model), dtype="int7")
    with pytest.raises(NPTError, match="no such name in the package; use builtin:tiny"):
        load_base("builtin:huge")
