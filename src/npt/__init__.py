"""npt: the Neuro-Plastic Transformer. Importing it makes PEFT know the method.

from peft import get_peft_model
from npt import NPTConfig, calibrate, evaluate

model = get_peft_model(base, NPTConfig(npt_layers="upper_half"))
calibrate(model, batches)
report = evaluate(model, tokenizer, texts)
"""

from npt.calibration import calibrate
from npt.component import NPComponent, WeightDelta
from npt.evaluation import evaluate
from npt.merging import merge_adapters
from npt.objectives import Objective
from npt.training import EquivalenceTrainer
from npt.tuner import NPTConfig, NPTModel, register, weight_delta

__all__ = [
    "EquivalenceTrainer",
    "NPComponent",
    "NPTConfig",
    "NPTModel",
    "Objective",
    "WeightDelta",
    "calibrate",
    "evaluate",
    "merge_adapters",
    "weight_delta",
]
__version__ = "0.1.0"

register()
