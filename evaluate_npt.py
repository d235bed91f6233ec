"""Evaluation: --checkpoint checkpoints/best_model.pt --config config.yaml --output evaluation_report.json."""

import sys

from npt.cli import main
from npt.common.launch import wait_briefly

if __name__ == "__main__":
    wait_briefly()
    sys.exit(main(["evaluate", *sys.argv[1:]]))
