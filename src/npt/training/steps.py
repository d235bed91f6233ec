"""Counts of a run: its optimiser steps, and the blocks that are kept out of training to choose the best adapter by."""

from __future__ import annotations

import math

#: The most blocks taken from the end of the training set to choose the best adapter by.
VALIDATION_BLOCKS = 32


def held_back(blocks: int) -> int:
    """How many of the training blocks choose the best adapter: a tenth, at least 1, at most `VALIDATION_BLOCKS`."""
    return min(VALIDATION_BLOCKS, max(1, blocks // 10))


def run_steps(items: int, per_step: int, num_epochs: float, num_train_steps: int | None = None) -> int:
    """Optimiser steps of a run, as Trainer counts them.

    Args:
        items: blocks that are trained on (or batches of them). per_step: how many of these a step takes, over all processes
            and accumulated batches. num_train_steps: decides alone where it is given.
    """
    return math.ceil(num_epochs * -(-items // per_step)) if num_train_steps is None else num_train_steps


def untrained_blocks(calibration: int) -> int:
    """How many blocks a run without a step needs: so many to calibrate on, and those that are held back."""
    return max(2, calibration + held_back(-(-10 * calibration // 9)))
