"""An evaluation's memory stays flat, and its standard errors are the spread of repeated evaluations."""

from __future__ import annotations

import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from npt import NPTConfig
from npt.builtin import model_folder
from npt.evaluation.divergence import summarize, token_divergences
from npt.planning.counters import AllocationCounter
from tests.helpers import randomize

MEASURE = """
import resource, sys
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from npt import NPTConfig
from npt.evaluation.divergence import summarize, token_divergences
from npt.planning.counters import AllocationCounter

torch.manual_seed(0)
config = LlamaConfig(vocab_size=32000, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(config), NPTConfig(rank=2))
ids = torch.randint(3, 32000, (int(sys.argv[1]) // 128, 128)).tolist()
blocks = Dataset.from_dict({"input_ids": ids})
token_divergences(model, blocks.select(range(1)))  # what the libraries allocate once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
summarize(token_divergences(model, blocks))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak(tokens: int) -> int:
    """KiB above what was there before, of an evaluation of so many tokens with a vocabulary of 32,000."""
    command = [sys.executable, "-c", MEASURE, str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def test_memory_stays_flat() -> None:
    """Counted in allocations; the slow test below counts resident memory, which the heap's pieces can blow up."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), NPTConfig(rank=2))
    peaks = []
    for rows in (32, 256):
        ids = torch.randint(3, 8000, (rows, 64)).tolist()
        with AllocationCounter() as counter:
            token_divergences(model, datasets.Dataset.from_dict({"input_ids": ids}))
        peaks.append(counter.peak)
    assert peaks[1] <= 1.05 * peaks[0], peaks


@pytest.mark.slow
def test_memory_stays_flat_over_100000_tokens() -> None:
    few, many = peak(10_000), peak(100_000)
    assert many <= 1.2 * few, f"{few} KiB for 10,000 tokens, {many} KiB for 100,000"


@pytest.mark.slow
def test_standard_errors_are_the_spread_over_independent_evaluation_sets() -> None:
    """30 sets of 32 blocks; every block is text the model itself draws, so the sets are independent."""
    base = AutoModelForCausalLM.from_pretrained(model_folder("builtin:tiny"), dtype=torch.float32).eval()
    torch.manual_seed(0)
    start = torch.full((960, 1), base.config.bos_token_id)
    with torch.no_grad():
        ids = base.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=47, min_new_tokens=47
        )
    model = get_peft_model(base, NPTConfig(npt_layers=[-1], rank=4))
    randomize(model, 0.02)
    tokens = token_divergences(model, datasets.Dataset.from_dict({"input_ids": ids.tolist()}), batch_size=64)
    sets = []
    for number in range(30):
        keep = tokens["block"] // 32 == number
        sets.append(summarize({name: values[keep] for name, values in tokens.items()}))
    for group, key in (("perplexity", "perplexity_ratio"), ("divergence", "mean_kl"), ("divergence", "top1_agreement")):
        spread = np.std([figures[group][key] for figures in sets], ddof=1)
        printed = np.mean([figures[group][f"{key}_standard_error"] for figures in sets])
        assert 0.6 < spread / printed < 1.4, f"{key}: spread {spread:.3g}, mean printed error {printed:.3g}"
