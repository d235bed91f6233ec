"""Checks the installation."""

import sys

from npt.cli import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
