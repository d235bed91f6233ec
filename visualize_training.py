"""Plots of a run: [--output-dir outputs]."""

import sys

from npt.cli import main

if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))
