"""Phase 1, equivalence pre-training: [--config FILE] [--set key=value ...] [--resume]; config.yaml by default."""

import sys
from pathlib import Path

from npt.cli import main
from npt.common.launch import wait_briefly

if __name__ == "__main__":
    wait_briefly()
    sys.exit(main(["train", "--config", str(Path(__file__).with_name("config.yaml")), *sys.argv[1:]]))
