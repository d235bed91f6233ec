"""Fine-tunes a converted model on prompts and answers with TRL: pip install trl, then python examples/trl_sft.py"""

import datasets
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer

import npt
from npt.data import sample_blocks

MODEL = "builtin:tiny"  # or "builtin:smollm2-135m", a hub id, a local folder
NAMES = ["Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue"]
ROWS = [{"prompt": f"{name} opened the box. In it was", "completion": " a small green frog."} for name in NAMES]
ASKED = "Timmy opened the box. In it was"

base, tokenizer = npt.load_base(MODEL)
model = get_peft_model(base, npt.NPTConfig(npt_layers="upper_half", rank=16))
# Begins where the original is. With peft_config=npt.NPTConfig() SFTTrainer converts by itself, without a calibration.
npt.calibrate(model, sample_blocks(base, tokenizer, num_blocks=32, max_length=128, seed=0, progress=False))


def answer():
    tokens = tokenizer(ASKED, return_tensors="pt")
    return tokenizer.decode(model.generate(**tokens, max_new_tokens=10, do_sample=False)[0], skip_special_tokens=True)


before = answer()
arguments = SFTConfig(
    "outputs/trl", max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, max_length=64, logging_steps=10,
    save_strategy="no", report_to=[], bf16=False, gradient_checkpointing=False, disable_tqdm=True,
)  # fmt: skip
data = datasets.Dataset.from_list(ROWS)
SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
model.eval()

print("before:  ", before)
print("after:   ", answer())
with model.disable_adapter():
    print("original:", answer())
model.save_pretrained("outputs/adapter")
