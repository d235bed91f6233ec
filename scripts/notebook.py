"""Runs the example notebook and writes its outputs into it: python -m scripts.notebook

The outputs are kept, so that a reader on the code host and on the documentation site sees figures and shapes without running
anything. Warnings of libraries, which name folders of one machine, times and versions are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from scripts.marked import ROOT

NOTEBOOK = ROOT / "examples" / "first_look.ipynb"


def executed(path: Path, timeout: int = 300) -> Any:
    """A notebook with fresh outputs. The kernel starts in its folder.

    Raises:
        CellExecutionError: a cell ended in an error.
    """
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    options = {"kernel_name": "python3", "coalesce_streams": True, "record_timing": False}
    client = NotebookClient(notebook, timeout=timeout, resources=place, **options)
    client.execute()
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(NOTEBOOK), NOTEBOOK)
