"""Evaluation of a converted model against its original; `evaluate` is the entry point."""

from npt.evaluation.evaluate import evaluate, overlapping

__all__ = ["evaluate", "overlapping"]
