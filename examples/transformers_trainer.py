"""Trains the components of a converted model with transformers' trainers: first towards the original, then on a text.

python examples/transformers_trainer.py
"""

from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import npt
from npt.data import load_documents, pack

MODEL = "builtin:tiny"  # or "builtin:smollm2-135m", a hub id, a local folder
DOCUMENTS = load_documents("builtin:python-docs")  # any list of texts

base, tokenizer = npt.load_base(MODEL)
train = pack(DOCUMENTS[8:], tokenizer, 128, max_blocks=64)  # input_ids, attention_mask, labels: 128 tokens a row
held_out = pack(DOCUMENTS[:8], tokenizer, 128, max_blocks=8)

model = get_peft_model(base, npt.NPTConfig(npt_layers="upper_half", rank=16))
npt.calibrate(model, train)


def arguments(name, learning_rate):
    return TrainingArguments(
        f"outputs/{name}", max_steps=10, per_device_train_batch_size=4, learning_rate=learning_rate,
        warmup_steps=2, logging_steps=5, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip


def show(when):  # without samples of text, and with few figures per block
    found = npt.evaluate(model, tokenizer, held_out, prompts=[], detail_blocks=1)["evaluations"]
    perplexity, kl = found["perplexity"], found["divergence"]["mean_kl"]
    print(
        f"{when}: perplexity {perplexity['npt_perplexity']:.2f}, the original's "
        f"{perplexity['original_perplexity']:.2f}; KL from the original {kl:.4f}"
    )


# The original model is the teacher: the loss is the KL of its next-token distributions from the converted model's.
npt.EquivalenceTrainer(model, arguments("equivalence", 1e-3), npt.Objective("logits"), train_dataset=train).train()
show("after EquivalenceTrainer")

# Trainer's own loss, that of the next token. Only the components learn; disable_adapter() still gives the original.
Trainer(model, arguments("next-token", 1e-2), train_dataset=train).train()
show("after Trainer")
model.save_pretrained("outputs/adapter")
