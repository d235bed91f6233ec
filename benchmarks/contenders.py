"""What is measured: the frozen base, NPT and PEFT LoRA on one set of weights, and what one does with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import Run
from npt import NPTConfig, calibrate, evaluate, load_base
from npt.data import sample_blocks
from npt.equivalence.objectives import OBJECTIVES, Objective, update_scales
from npt.equivalence.teacher import ROW, teacher_cache
from npt.evaluation.divergence import token_divergences
from npt.tuner.converted import run_backbone

RANK = 16


def llama_shape(vocabulary: int, hidden: int = 1024, layers: int = 8, **more: Any) -> LlamaConfig:
    """A Llama of full-width heads of 64 channels and an MLP of 11/4 the hidden size."""
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers, **heads, **more}
    return LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4096, **shape)


#: Llama-3.2-1B's, for GPUs.
ONE_BILLION = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip


def frozen(source: LlamaConfig | str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A random model of a shape, or a checkpoint's, with nothing to train."""
    torch.manual_seed(0)
    if isinstance(source, str):
        base, _ = load_base(source, dtype=str(dtype).removeprefix("torch."))
    else:
        base = LlamaForCausalLM(source).to(dtype)
    return base.to(device).eval().requires_grad_(False)


def converted(base: Any, rank: int = RANK) -> Any:
    """NPT on the upper half of the blocks of a copy of base that shares its weights."""
    return get_peft_model(sharing(base), NPTConfig(rank=rank)).eval()


def with_lora(base: Any, rank: int = RANK) -> Any:
    """LoRA of the same rank on the same blocks' MLP projections, on a copy that shares base's weights."""
    layers = base.config.num_hidden_layers
    upper = [f"model.layers.{i}.mlp.{name}_proj" for i in range(layers // 2, layers) for name in ("gate", "up", "down")]
    config = LoraConfig(r=rank, target_modules=upper, lora_dropout=0.0, bias="none")
    return get_peft_model(sharing(base), config).eval()


def sharing(base: Any) -> Any:
    """A copy whose parameters are base's own: where weights lie in memory changes a time by more than an adapter does."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def forward(model: Any, ids: torch.Tensor) -> Run:
    """A forward without gradient, logits included."""

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    return run


def prefill(model: Any, ids: torch.Tensor) -> Run:
    """As `generate` begins: a prompt into an empty cache, logits of the last position."""

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def decode(model: Any, ids: torch.Tensor, steps: int = 8) -> Run:
    """`steps` tokens, one at a time, after a prompt of ids in the cache."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    def run() -> None:
        with torch.no_grad():
            past = copy.deepcopy(cache)
            for _ in range(steps):
                model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)

    return run


def npt_steps(model: Any, ids: torch.Tensor) -> dict[str, Run]:
    """One optimiser step of each objective."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    scales = update_scales(model, batch)

    return {name: objective_step(model, Objective(name, scales=scales), batch) for name in OBJECTIVES}


def objective_step(model: Any, objective: Objective, batch: dict[str, torch.Tensor]) -> Run:
    """One optimiser step on a batch."""
    optimizer, items = optimizer_of(model), float(batch["labels"][:, 1:].numel())

    def run() -> None:
        objective(model, batch, items).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def cached_step(model: Any, ids: torch.Tensor, folder: str | Path) -> Run:
    """One optimiser step of `local` with the original's side read from disk, without the frozen forward."""
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    blocks = datasets.Dataset.from_dict({name: value.tolist() for name, value in text.items()})
    cache = teacher_cache(folder, model, blocks, "hidden")
    batch = {**text, ROW: torch.arange(len(ids))}
    return objective_step(model, Objective("local", scales=update_scales(model, text), teacher=cache), batch)


def lora_step(model: Any, ids: torch.Tensor) -> Run:
    """One optimiser step of LoRA on the language-model loss."""
    optimizer = optimizer_of(model)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """AdamW on what can be trained; the rate is so small that no round changes the next one."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)


def calibration(model: Any, ids: torch.Tensor, batch: int) -> Run:
    """Calibration over ids."""
    return lambda: calibrate(model, [{"input_ids": part} for part in ids.split(batch)])


class NoWords:
    """The part of a tokenizer that a report without prompts asks for, and sampling; random models have none."""

    bos_token_id = eos_token_id = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        """The ids themselves."""
        return " ".join(map(str, ids))


def divergence(model: Any, ids: torch.Tensor) -> Run:
    """Both models on ids, compared token by token."""
    blocks = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    return lambda: token_divergences(model, blocks)


def report(model: Any, ids: torch.Tensor) -> Run:
    """Every figure of a report on ids, without the texts that both models write."""
    blocks = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    return lambda: evaluate(model, NoWords(), blocks, context_length=ids.shape[1], prompts=[])


def greedy(model: Any, rows: int, tokens: int) -> Run:
    """Plain decoding with a cache: rows of so many tokens at once, each token the likeliest."""

    def run() -> None:
        ids, past = torch.zeros(rows, 1, dtype=torch.long, device=model.device), None
        with torch.inference_mode():
            for _ in range(tokens - 1):
                found = model(input_ids=ids, past_key_values=past, use_cache=True)
                ids, past = found.logits[:, -1:].argmax(-1), found.past_key_values

    return run


def sampling(model: Any, rows: int, tokens: int) -> Run:
    """Text that the model writes itself, of the same shape."""
    return lambda: sample_blocks(model, NoWords(), rows, tokens, seed=0, progress=False)


def forwards(model: Any, ids: torch.Tensor, batch: int) -> Run:
    """The frozen forward over ids, logits included."""
    runs = [forward(model, part) for part in ids.split(batch)]
    return lambda: [run() for run in runs]


def backbone(model: Any, ids: torch.Tensor, batch: int) -> Run:
    """The frozen forward over ids without the language-model head: what calibration has to do in any case."""

    def run() -> None:
        with torch.no_grad():
            for part in ids.split(batch):
                run_backbone(model, {"input_ids": part})

    return run
