"""`npt bench editing` with the baselines of this folder beside the package's own methods: python -m benchmarks.editing

Takes the same options, prints the same table and keeps the same file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.editing.closed_form import AlphaEdit, Memit, Rome, UltraEdit
from benchmarks.editing.finetuning import FineTuning
from npt.cli import main as npt_main
from npt.editing.benchmark.registry import METHODS, Known

BASELINES = {
    "rome": Known(Rome, settings="optimised", prefixed=True),
    "memit": Known(Memit, settings="optimised", blocks=None, prefixed=True),
    "alphaedit": Known(AlphaEdit, settings="optimised", blocks=None, prefixed=True),
    "ultraedit": Known(UltraEdit, blocks=None),
    "ft-m": Known(FineTuning),
    "locft": Known(partial(FineTuning, breadth=True)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    METHODS.update(BASELINES)
    return npt_main(["bench", "editing", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
