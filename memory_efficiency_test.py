"""What formed weight deltas would cost, and what this implementation uses, measured."""

import sys

from npt.cli import main

if __name__ == "__main__":
    sys.exit(main(["memory", *sys.argv[1:]]))
