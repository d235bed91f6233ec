"""Malformed inputs and the one line each must give: words of it that name the value, the place and the remedy.

`tests/system/test_catalogue.py` runs them. In arguments, {model} is a working base model, {adapter} an adapter for it and
{run} the output folder of a finished run; an entry's own files lie in the folder it runs in.
"""

from __future__ import annotations

from tests.catalogue.absorbing import ABSORBING
from tests.catalogue.bench import BENCH
from tests.catalogue.commands import ARGUMENTS, RUNS
from tests.catalogue.configurations import CONFIG_FILES, OVERRIDES
from tests.catalogue.edits import EDITS
from tests.catalogue.entries import Entry, Kit, tensors
from tests.catalogue.finetunings import FINETUNINGS
from tests.catalogue.models import ADAPTERS, BASES
from tests.catalogue.texts import DATA

CATALOGUE = [
    *CONFIG_FILES, *OVERRIDES, *DATA, *BASES, *ADAPTERS, *ARGUMENTS, *RUNS, *EDITS, *BENCH, *ABSORBING, *FINETUNINGS,
]  # fmt: skip

__all__ = ["CATALOGUE", "Entry", "Kit", "tensors"]
