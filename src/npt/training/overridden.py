"""The methods of HF Trainer that npt overrides. A rename upstream would silently bring HF's own back, pickle among it."""

from __future__ import annotations

import transformers

#: (method, why it is overridden). The first part belongs to `DurableTrainer`, the second to `ObjectiveTrainer`, the third to
#: `EquivalenceTrainer`.
OVERRIDDEN = (
    ("_save_checkpoint", "a checkpoint is sealed last, and an older one goes only once it is whole"),
    ("_save_optimizer_and_scheduler", "safetensors instead of pickle, whole also when sharded"),
    ("_load_optimizer_and_scheduler", "reads that file, and cuts the moments into shards again"),
    ("_save_scaler", "safetensors instead of pickle"),
    ("_load_scaler", "reads that file"),
    ("_save_rng_state", "safetensors instead of pickle, with the place of streamed text"),
    ("_load_rng_state", "reads that file"),
    ("_load_from_checkpoint", "loads the adapter into the model as it is, sharded or not"),
    ("save_model", "writes the adapter alone; HF's gathers the base too and pickles the arguments"),
    ("get_train_dataloader", "streamed text is split by process already"),
    ("create_optimizer", "remembers the parameters of a model that is sharded before Trainer starts"),
    ("create_scheduler", "gives the optimiser those parameters back after accelerate has prepared it"),
    # ObjectiveTrainer
    ("train", "checks and constants of the objective come first, teacher targets are made"),
    ("_move_model_to_device", "a model with offloaded weights stays in its place"),
    ("compute_loss", "the objective's loss"),
    ("training_step", "a gradient that is not finite stops the run before the optimiser sees it"),
    ("log", "adds the figures that a phase is judged by"),
    ("evaluate", "perplexity of both models and KL, instead of the loss"),
    # EquivalenceTrainer
    ("_clip_grad_norm", "each block is clipped by its own norm where it has a loss of its own"),
)


def check_overridden(trainer: type) -> None:
    """Checks that a Trainer class still has every method that npt overrides.

    Raises:
        ImportError: one is gone; names it and the version of transformers.
    """
    for name, why in OVERRIDDEN:
        if not callable(getattr(trainer, name, None)):
            raise ImportError(
                f"transformers {transformers.__version__}: Trainer has no method {name}, which npt overrides ({why}); "
                "install an earlier transformers, or a newer npt"
            )
