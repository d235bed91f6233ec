"""Phase 1 on a small mixture of experts beside a dense model of the same active size: python -m benchmarks.mixture

Trains both here, on text that builtin:tiny writes (seeded; some minutes on two CPU cores), converts the upper half of each,
calibrates on training text and measures on text that neither saw. `--forward` measures, instead, the forward pass of a random
mixture of hidden size 1,024 beside the frozen one. Writes benchmarks/results/mixture.json and the table in docs/families.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from benchmarks.contenders import forward as forward_of
from benchmarks.contenders import sharing
from benchmarks.tables import RESULTS, markdown
from benchmarks.timing import interleaved
from npt import NPTConfig, calibrate, evaluate, load_base
from npt.data.sampling import sample_blocks
from scripts.marked import write_section

KEPT = RESULTS / "mixture.json"
BATCH, LENGTH, RATE = 16, 128, 3e-3
SHAPE = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def shapes(vocabulary: int) -> dict[str, PreTrainedConfig]:
    """{name: configuration}: four experts of which a token uses two, and an MLP as wide as two of them."""
    more = {**SHAPE, "vocab_size": vocabulary}
    return {
        "mixture": MixtralConfig(intermediate_size=256, num_local_experts=4, num_experts_per_tok=2, **more),
        "dense": LlamaConfig(intermediate_size=512, **more),
    }


def train(config: PreTrainedConfig, ids: torch.Tensor, steps: int) -> Any:
    """A model trained on blocks (n, tokens) by AdamW, its rate falling as a cosine."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    warm = max(1, steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = ids[torch.randint(len(ids), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} of {steps}: loss {float(loss.detach()):.3f}", flush=True)
    return model.eval()


def measure(model: Any, tokenizer: Any, seen: Any, unseen: Any) -> dict[str, Any]:
    """The figures of Phase 1 on a model: upper half, rank 16, calibration alone."""
    converted = get_peft_model(model, NPTConfig(npt_layers="upper_half", rank=16))
    calibrate(converted, seen)
    found = evaluate(converted.eval(), tokenizer, unseen, context_length=LENGTH, prompts=[])["evaluations"]
    divergence, perplexity = found["divergence"], found["perplexity"]
    names = ("mean_kl", "mean_kl_standard_error", "top1_agreement")
    return {
        **{name: divergence[name] for name in names},
        **{name: perplexity[name] for name in ("original_perplexity", "perplexity_ratio")},
        "perplexity_ratio_standard_error": perplexity["perplexity_ratio_standard_error"],
        "routing": found.get("routing", {}),
    }


def forward(rounds: int) -> dict[str, float]:
    """{ratio, spread, experts, tokens}: medians of a forward over the frozen one's, in interleaved rounds."""
    torch.manual_seed(0)
    more = {"num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 8000}
    config = MixtralConfig(hidden_size=1024, intermediate_size=1408, num_local_experts=8, num_experts_per_tok=2, **more)
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    converted = get_peft_model(sharing(base), NPTConfig(npt_layers="upper_half", rank=16)).eval()
    ids = torch.randint(3, 8000, (4, 256), generator=torch.Generator().manual_seed(1))
    runs = {"base": forward_of(base, ids), "npt": forward_of(converted, ids)}
    times = interleaved(runs, rounds)
    ratio = times["npt"]["seconds"] / times["base"]["seconds"]
    spread = ratio * times["npt"]["spread"] / times["npt"]["seconds"]
    return {"ratio": ratio, "spread": spread, "experts": 8, "tokens": ids.numel()}


def table(kept: dict[str, Any]) -> str:
    """A row for each model."""
    head = ["", "parameters", "perplexity", "mean KL", "perplexity ratio", "same top token", "same experts"]
    rows = []
    for name, f in kept["models"].items():
        routing = f["routing"].get("mean_agreement")
        rows.append(
            [
                name,
                f"{f['parameters']:,}",
                f"{f['original_perplexity']:.2f}",
                f"{f['mean_kl']:.5f} ± {f['mean_kl_standard_error']:.5f}",
                f"{f['perplexity_ratio']:.4f} ± {f['perplexity_ratio_standard_error']:.4f}",
                f"{100 * f['top1_agreement']:.1f} %",
                "" if routing is None else f"{100 * routing:.1f} % of tokens",
            ]
        )
    found = markdown(head, rows)
    if (f := kept.get("forward")) is not None:
        found += (
            f"\n\nA forward pass of a random mixture of hidden size 1,024 with {f['experts']} experts, upper half, rank 16, "
            f"takes {f['ratio']:.3f} ± {f['spread']:.3f} times as long as the frozen one."
        )
    return found


def phase_one(options: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures both models."""
    writer, tokenizer = load_base("builtin:tiny")
    held = 64
    blocks = sample_blocks(writer, tokenizer, options.blocks + held, LENGTH, seed=0)
    seen, unseen = blocks.select(range(options.blocks)), blocks.select(range(options.blocks, len(blocks)))
    ids = torch.tensor(seen["input_ids"][:])
    kept: dict[str, Any] = {"steps": options.steps, "blocks": options.blocks, "length": LENGTH, "models": {}}
    for name, config in shapes(len(tokenizer)).items():
        begun = time.perf_counter()
        model = train(config, ids, options.steps)
        count = sum(p.numel() for p in model.parameters())
        seconds = time.perf_counter() - begun
        found = measure(model, tokenizer, seen.select(range(min(256, len(seen)))), unseen)
        kept["models"][name] = {"parameters": count, "seconds": round(seconds), **found}
        print(name, kept["models"][name], flush=True)
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, measures, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixture", description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--blocks", type=int, default=1024, help=f"of {LENGTH} tokens, to train on")
    parser.add_argument("--forward", action="store_true", help="measure the forward pass alone; the rest is kept")
    options = parser.parse_args(arguments)
    kept: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {"models": {}}
    if options.forward:
        kept["forward"] = forward(rounds=15)
    else:
        kept |= phase_one(options)
    KEPT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    write_section("docs/families.md", "mixture", table(kept))
    print(table(kept))


if __name__ == "__main__":
    main()
