"""PEFT knows the method whichever of the two is imported first, and the command imports neither before it has to."""

from __future__ import annotations

import subprocess
import sys

import pytest

KNOWN = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known; assert 'NPT' in known"


@pytest.mark.parametrize(
    "imports",
    [
        "import npt, sys, importlib.util; importlib.util.find_spec('peft'); assert 'peft' not in sys.modules; import peft",
        pytest.param("from npt.block.layer import NPTLayer", marks=pytest.mark.slow),
        pytest.param("import peft, npt", marks=pytest.mark.slow),
        pytest.param("import npt.tuner.config", marks=pytest.mark.slow),
        pytest.param("import npt.common.fingerprint, npt.common.inside", marks=pytest.mark.slow),
        pytest.param("import npt.data.sampling", marks=pytest.mark.slow),
    ],
)
def test_peft_knows_the_method(imports: str) -> None:
    found = subprocess.run([sys.executable, "-c", f"{imports}; {KNOWN}"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_help_and_early_refusals_import_no_heavy_library() -> None:
    code = (
        "import sys; from npt.cli import main; heavy = {'torch', 'peft', 'transformers', 'datasets', 'matplotlib'}\n"
        "assert main(['--help']) == 0 and main(['train', '--set', 'model.rnak=3']) == 2\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "did you mean model.rank?" in found.stderr, found.stderr
