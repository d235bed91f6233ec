"""Phase 2: the low-rank part of a converted model is fine-tuned on text or chats (docs/finetuning.md)."""
