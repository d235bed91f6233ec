"""`npt check`: tests the method's promises with this installation on a small random model, in a few seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from npt.block.modes import Mode, running_as
from npt.equivalence.calibration import calibrate
from npt.tuner.config import NPTConfig
from npt.tuner.converted import ConvertedModel, active_layers


def tiny_model(kind: str) -> Any:
    """A random causal LM of 3 blocks, hidden size 32."""
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def run_checks() -> Iterator[tuple[str, str | None]]:
    """Yields (name, None or the error in words) of every check."""
    for kind in ("llama", "gpt2"):
        base = tiny_model(kind)
        ids = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            original = base(ids).logits
        model = get_peft_model(base, NPTConfig(rank=4))
        checks: dict[str, Callable[[], bool]] = {
            "disabled adapter gives the original's logits bit for bit": partial(_disabled, model, ids, original),
            "exact value gives the original's logits": partial(_exact, model, ids, original),
            "calibration brings the model closer": partial(_calibrates, model, ids),
            "saved and loaded adapter gives the same logits": partial(_round_trip, model, kind, ids),
        }
        for name, check in checks.items():
            with torch.no_grad():
                yield f"{kind}: {name}", None if check() else "it does not"


def _disabled(model: ConvertedModel, ids: torch.Tensor, original: torch.Tensor) -> bool:
    with model.disable_adapter():
        return torch.equal(model(ids).logits, original)


def _exact(model: ConvertedModel, ids: torch.Tensor, original: torch.Tensor) -> bool:
    with running_as(active_layers(model), Mode.EXACT):
        return bool((model(ids).logits - original).abs().max() < 1e-4)


def _calibrates(model: ConvertedModel, ids: torch.Tensor) -> bool:
    errors = calibrate(model, [{"input_ids": ids}])
    return all(e["error_after"] < e["error_before"] for e in errors.values())


def _round_trip(model: ConvertedModel, kind: str, ids: torch.Tensor) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(tiny_model(kind), folder)
    return torch.equal(loaded(ids).logits, model(ids).logits)
