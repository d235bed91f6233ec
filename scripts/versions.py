"""Versions of the libraries around npt, in one line: python scripts/versions.py [--lowest]

With --lowest, exit status 1 where a requirement of the package or its dev extra is installed in another version than its lower
bound: a bound that the suite did not run on is no bound.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.version import Version

DISTRIBUTION = "neuroplastic"
SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "lm-eval")


def missed(requirements: list[str]) -> Iterator[str]:
    """A line for each requirement of which another version than its lower bound is installed."""
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": "dev"}):
            continue
        for bound in (part.version for part in wanted.specifier if part.operator == ">="):
            found = Version(version(wanted.name)).public
            if Version(found) != Version(bound):
                yield f"{wanted.name}: pyproject.toml allows {bound}, and {found} is the oldest that installs with the others"


def main(arguments: list[str]) -> int:
    """Prints the versions, or the bounds that were not reached."""
    print(", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in SHOWN)]))
    lines = list(missed(requires(DISTRIBUTION) or [])) if "--lowest" in arguments else []
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
