"""The LoRA that other programs load: names, shapes and content, in PEFT's form and as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file

from npt import EditStore
from npt.editing.export import RANKS, gguf_name, loras_of
from npt.errors import NPTError
from tests.families import CASES
from tests.helpers import random_base, spelling_tokenizer

TEXTS = ["a river flows by the old town", "she reads a long letter", "many ships sail in spring", "no bread is left"]
FACTS = [{"prompt": f"the home of {name} is", "subject": name, "target": "Oslo"} for name in ("Ada", "Ben", "Eve")]
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))
MODULES = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}


@pytest.fixture(params=["llama", "gpt2"])
def store(request: pytest.FixtureRequest) -> Any:
    base = random_base(request.param, torch.float32)
    found = EditStore(
        base, spelling_tokenizer(), layer=1, metric="text", statistics=TEXTS, progress=False, steps=3, ridge=0.1
    )
    found.write_many(FACTS)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_names_shapes_and_rank(store: EditStore, tmp_path: Path) -> None:
    tensors = load_file(store.save(tmp_path / "s") / "adapter_model.safetensors")
    module, (size, width) = MODULES[store.model.config.model_type], (store.bench.first.size, store.bench.first.width)
    name = f"base_model.model.{module}"
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"{name}.lora_A.weight": (8, width),
        f"{name}.lora_B.weight": (size, 8),
    }
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    # Three edits: the other rows are padding.
    assert not tensors[f"{name}.lora_A.weight"][3:].any() and not tensors[f"{name}.lora_B.weight"][:, 3:].any()


def test_both_factors_have_one_size(store: EditStore) -> None:
    (lora,) = loras_of(store).values()
    assert torch.allclose(lora.a[:3].norm(dim=1), lora.b[:, :3].norm(dim=0), rtol=1e-4)
    assert torch.allclose(lora.b @ lora.a, store.factors[1].delta.float(), atol=1e-6)
    assert lora.rank in RANKS and lora.lost == ()


def test_merge_and_unload_gives_a_plain_model(store: EditStore, tmp_path: Path) -> None:
    edited = logits(store.model)
    store.save(tmp_path / "s")
    store.close()
    plain = logits(store.model)
    merged = PeftModel.from_pretrained(store.model, str(tmp_path / "s")).merge_and_unload()
    assert torch.allclose(logits(merged), edited, atol=1e-4) and not torch.allclose(plain, edited, atol=1e-2)


def test_gguf_holds_the_same_delta(store: EditStore, tmp_path: Path) -> None:
    reader = GGUFReader(store.export_gguf(tmp_path / "e.gguf"))
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert set(found) == {"blk.1.ffn_down.weight.lora_a", "blk.1.ffn_down.weight.lora_b"}
    a, b = (torch.from_numpy(found[f"blk.1.ffn_down.weight.lora_{part}"]) for part in "ab")
    assert tuple(a.shape) == (8, store.bench.first.width)
    assert torch.allclose(b @ a, store.factors[1].delta.float(), atol=1e-6)
    fields = {key: reader.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")}
    expected = {
        "general.type": "adapter",
        "general.architecture": store.model.config.model_type,
        "adapter.type": "lora",
    }
    assert fields == expected and reader.fields["adapter.lora.alpha"].contents() == 8.0


def test_gguf_ends_in_gguf(store: EditStore, tmp_path: Path) -> None:
    with pytest.raises(NPTError, match=r"end the name in \.gguf"):
        store.export_gguf(tmp_path / "e.bin")


@pytest.mark.parametrize(
    ("family", "architecture"), [("mistral", "llama"), ("phi", "phi2"), ("cohere", "command-r"), ("gpt_neox", "gptneox"),
                                 ("gemma3", "gemma3"), ("falcon", "falcon")],
)  # fmt: skip
def test_architectures_of_llama_cpp(family: str, architecture: str) -> None:
    base = next(case for case in CASES if case.model_type == family).build()
    found = EditStore(base, spelling_tokenizer(), layer=1, metric="identity", progress=False)
    assert gguf_name(found.contexts.blocks.name(1), base.config) == ("blk.1.ffn_down", architecture)


def test_a_family_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    base = next(case for case in CASES if case.model_type == "codegen").build()
    found = EditStore(base, spelling_tokenizer(), layer=1, metric="identity", progress=False, steps=1)
    with pytest.raises(NPTError, match=r"no place for transformer\.h\.1\.mlp\.fc_out of a codegen model"):
        found.export_gguf(tmp_path / "e.gguf")
    assert list(tmp_path.iterdir()) == []
