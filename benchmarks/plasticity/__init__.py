"""Fine-tuning of plastic blocks on tasks, beside LoRA and DoRA of as many trained parameters.

module    in -> out
tasks     a task, a seed and a part -> examples: a prompt and its answer
arms      a task, a seed and learning rates -> an `npt finetune` run with LoRA and DoRA beside, and what its adapters answer
tables    kept figures -> the table of docs/finetuning.md
"""
