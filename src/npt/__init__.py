"""npt: the Neuro-Plastic Transformer. Importing it makes PEFT know the method.

from peft import get_peft_model
from npt import NPTConfig, calibrate, evaluate

model = get_peft_model(base, NPTConfig(npt_layers="upper_half"))
calibrate(model, batches)
report = evaluate(model, tokenizer, texts)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from npt.common.lazy import after_import, exports_of

if TYPE_CHECKING:
    from npt.adapters.join import merge_adapters
    from npt.block.component import NPComponent
    from npt.block.families import Family, register_family
    from npt.block.weight_delta import WeightDelta
    from npt.editing.store import EditStore
    from npt.equivalence.calibration import calibrate
    from npt.equivalence.objectives import Objective
    from npt.equivalence.trainer import EquivalenceTrainer
    from npt.evaluation.evaluate import evaluate
    from npt.finetuning.low_rank import train_low_rank
    from npt.finetuning.trainer import FinetuneTrainer
    from npt.runs.base_model import load_base
    from npt.tuner import NPTConfig, NPTModel, weight_delta

__all__ = [
    "EditStore",
    "EquivalenceTrainer",
    "Family",
    "FinetuneTrainer",
    "NPComponent",
    "NPTConfig",
    "NPTModel",
    "Objective",
    "WeightDelta",
    "calibrate",
    "evaluate",
    "load_base",
    "merge_adapters",
    "register_family",
    "train_low_rank",
    "weight_delta",
]
__version__ = "0.1.0"
__getattr__ = exports_of(
    __name__,
    {
        "EditStore": "npt.editing.store",
        "EquivalenceTrainer": "npt.equivalence.trainer",
        "Family": "npt.block.families",
        "FinetuneTrainer": "npt.finetuning.trainer",
        "NPComponent": "npt.block.component",
        "NPTConfig": "npt.tuner",
        "NPTModel": "npt.tuner",
        "Objective": "npt.equivalence.objectives",
        "WeightDelta": "npt.block.weight_delta",
        "calibrate": "npt.equivalence.calibration",
        "evaluate": "npt.evaluation.evaluate",
        "load_base": "npt.runs.base_model",
        "merge_adapters": "npt.adapters.join",
        "register_family": "npt.block.families",
        "train_low_rank": "npt.finetuning.low_rank",
        "weight_delta": "npt.tuner",
    },
)


# npt.tuner registers the method. peft is heavy, and `npt --help` or a refused configuration needs none of it.
after_import("peft", lambda: import_module("npt.tuner"))
