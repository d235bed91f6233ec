"""The PEFT method: `NPTConfig` and `NPTModel`, the model card, and questions to a converted model."""

from npt.tuner.checks import refuse_unsupported
from npt.tuner.config import FORMAT_VERSION, LAYER_NAME, OPTIONS, PEFT_TYPE, Method, NPTConfig
from npt.tuner.converted import (
    ConvertedModel,
    active_layers,
    adapter_config,
    component_ids,
    context_length_of,
    device_of,
    eval_mode,
    npt_layers,
    own_parameters,
    parameter_counts,
    run_backbone,
    weight_delta,
)
from npt.tuner.model import NPTModel, register

__all__ = [
    "FORMAT_VERSION",
    "LAYER_NAME",
    "OPTIONS",
    "PEFT_TYPE",
    "ConvertedModel",
    "Method",
    "NPTConfig",
    "NPTModel",
    "active_layers",
    "adapter_config",
    "component_ids",
    "context_length_of",
    "device_of",
    "eval_mode",
    "npt_layers",
    "own_parameters",
    "parameter_counts",
    "refuse_unsupported",
    "register",
    "run_backbone",
    "weight_delta",
]

register()
