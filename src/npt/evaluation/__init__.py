"""Evaluation of a converted model against its original; `evaluate` is the entry point."""

from npt.evaluation.report import evaluate

__all__ = ["evaluate"]
