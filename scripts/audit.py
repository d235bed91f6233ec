"""Known vulnerabilities of the pinned dependencies, by pip-audit in an environment of its own: python scripts/audit.py

Exit status 0 when none is known, 1 when one is. Where the database can't be reached, it says so and exits with 0: that is no
finding, and no fault of the tree.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def audit(program: str, pins: Path) -> dict[str, list[str]]:
    """{package: its vulnerabilities' names} of what could be looked up; empty lists are good news."""
    command = [program, "-r", str(pins), "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    found = subprocess.run(command, capture_output=True, text=True)
    if not found.stdout.strip():
        raise RuntimeError(found.stderr[-500:])
    rows = json.loads(found.stdout)["dependencies"]
    return {row["name"]: [v["id"] for v in row["vulns"]] for row in rows if "skip_reason" not in row}


def main() -> int:
    """Installs pip-audit, asks, prints."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        programs = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin")
        subprocess.run([str(programs / "python"), "-m", "pip", "install", "--quiet", "pip-audit"], check=True)
        found = audit(str(programs / "pip-audit"), ROOT / "constraints.txt")
    if not found:
        print("not audited: the vulnerability database can't be reached from here")
        return 0
    bad = {name: ids for name, ids in found.items() if ids}
    for name, ids in bad.items():
        print(f"{name}: {', '.join(ids)}")
    print(f"{len(found)} pinned packages looked up, {len(bad)} with known vulnerabilities")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
