"""npt: the Neuro-Plastic Transformer. Importing it makes PEFT know the method."""

from npt.tuner import NPTConfig, NPTModel, register

register()
