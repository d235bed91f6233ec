"""Trainer plumbing of every phase: checkpoints without pickle, callbacks, signals, batches that are not finite.

`EquivalenceTrainer` is exported from here too; it lives in `npt.equivalence.trainer`.
"""

from npt.common.lazy import exports_of

__all__ = ["FIGURE_ROWS", "SCALE_BLOCKS", "EquivalenceTrainer", "only_components_train"]
__getattr__ = exports_of(__name__, dict.fromkeys(__all__, "npt.equivalence.trainer"))
