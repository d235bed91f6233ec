"""Evaluation: --checkpoint checkpoints/best_model.pt --config config.yaml --output evaluation_report.json."""

import sys

from npt.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
