"""Phase 1 with every memory option: as train_npt_equivalence.py, config_optimized.yaml by default."""

import sys
from pathlib import Path

from npt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--config", str(Path(__file__).with_name("config_optimized.yaml")), *sys.argv[1:]]))
