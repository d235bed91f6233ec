"""python fuzz/config.py fuzz/corpus/config -max_total_time=1800"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(
    include=["npt.config.load", "npt.config.sections", "npt.config.strict_yaml", "npt.common.display", "yaml"]
):
    from fuzz import targets

if __name__ == "__main__":
    atheris.Setup(sys.argv, targets.config)
    atheris.Fuzz()
