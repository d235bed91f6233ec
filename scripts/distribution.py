"""Builds wheel and source distribution and checks what a stranger gets: python -m scripts.distribution [--output FOLDER]

The tools come from the registry into an environment of their own. Exit status 0 when `twine check --strict` passes and the
wheel holds every file of the package, its marker for type checkers, the command, and a description without dead links.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("build==1.6.1", "twine==7.0.0")
PACKAGE = ROOT / "src" / "npt"


def build(folder: Path) -> None:
    """Puts a wheel and a source distribution into a folder; `twine check` reads them."""
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, with_pip=True)
        python = str(Path(name) / ("Scripts" if os.name == "nt" else "bin") / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *TOOLS], check=True)
        subprocess.run(
            [python, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, stdout=subprocess.DEVNULL
        )
        files = sorted(map(str, folder.glob("neuroplastic-*")))
        subprocess.run([python, "-m", "twine", "check", "--strict", *files], check=True)


def problems(wheel: Path) -> list[str]:
    """A line for everything that a wheel lacks."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (place,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = BytesParser().parsebytes(archive.read(f"{place}/METADATA"))
        points = archive.read(f"{place}/entry_points.txt").decode()
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = [path.relative_to(ROOT / "src").as_posix() for path in files]
    wanted += [f"npt/config/preset_files/{path.name}" for path in ROOT.glob("config*.yaml")]
    found = [f"{name} is missing" for name in wanted if name not in names]
    if "npt/py.typed" not in names:
        found.append("npt/py.typed is missing: type checkers would take npt as untyped")
    if "npt = npt.cli:console_main" not in points:
        found.append("the command npt is missing")
    return found + metadata_problems(metadata)


def metadata_problems(metadata: Message) -> list[str]:
    """A line for everything that a stranger would miss on the package's page."""
    wanted = ("Summary", "Author", "License-Expression", "Requires-Python", "Project-URL", "Classifier", "Keywords")
    found = [f"the metadata has no {name}" for name in wanted if not metadata.get_all(name)]
    if metadata["Name"] != "neuroplastic":
        found.append(f"the name is {metadata['Name']}")
    description = metadata.get_payload()
    text = description if isinstance(description, str) else ""
    if len(text) < 5000 or metadata["Description-Content-Type"] != "text/markdown":
        found.append("the description is not README.md")
    return found + [f"the description links to {link}" for link in dead_links(text)]


def dead_links(text: str) -> list[str]:
    """The places that a text in Markdown links to and that exist only in a clone."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and not link.startswith("#")]


def main() -> int:
    """Builds, checks, prints; the exit status."""
    parser = argparse.ArgumentParser(description="Builds and checks wheel and source distribution.")
    parser.add_argument("--output", type=Path, help="folder that keeps the two files; by default none does")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if output is None else output
        build(folder)
        (wheel,) = folder.glob("neuroplastic-*.whl")
        found = problems(wheel)
    print("\n".join(found) or f"{wheel.name} is complete")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
