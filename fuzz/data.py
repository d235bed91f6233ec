"""python fuzz/data.py fuzz/corpus/data -max_total_time=1800"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["npt.data.sources", "npt.common.display", "json"]):
    from fuzz import targets

if __name__ == "__main__":
    atheris.Setup(sys.argv, targets.data)
    atheris.Fuzz()
