"""PEFT knows the method whichever of the two is imported first, and importing npt brings in nothing of other packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

from npt import NPTConfig, load_base
from npt.builtin import source_of

KNOWN = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known; assert 'NPT' in known"
LIGHT = (
    "import npt, sys, importlib.util; importlib.util.find_spec('peft')\n"
    "heavy = {'peft', 'torch', 'transformers', 'pydantic', 'typer', 'rich', 'yaml'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
    "import peft"
)
NO_MORE_THAN_PEFT = (
    "import peft, sys; before = set(sys.modules); import npt\n"
    "more = {name for name in set(sys.modules) - before if name.partition('.')[0] != 'npt'}\n"
    "assert 'npt.tuner.model' in sys.modules and not more, more\n"
    "assert not {'datasets', 'matplotlib', 'transformers.trainer'} & set(sys.modules)"
)


def run(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize(
    "imports",
    [
        LIGHT,
        pytest.param(NO_MORE_THAN_PEFT, marks=pytest.mark.slow),
        pytest.param("from npt.block.layer import NPTLayer", marks=pytest.mark.slow),
        pytest.param("import npt.tuner.config", marks=pytest.mark.slow),
        pytest.param("import npt.common.fingerprint, npt.common.inside", marks=pytest.mark.slow),
        pytest.param("import npt.data.sampling", marks=pytest.mark.slow),
    ],
)
def test_peft_knows_the_method(imports: str) -> None:
    run(f"{imports}\n{KNOWN}")


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import npt, peft", "from peft import AutoPeftModelForCausalLM\nimport npt, peft"])
def test_peft_s_auto_class_loads_an_adapter(imports: str, tmp_path: Path) -> None:
    base, _ = load_base(source_of("builtin:tiny"))
    get_peft_model(base, NPTConfig(rank=1)).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": source_of("builtin:tiny")}))
    load = f"model = peft.AutoPeftModelForCausalLM.from_pretrained({str(tmp_path)!r}); print(type(model.base_model).__name__)"
    assert run(f"{imports}\n{load}") == "NPTModel\n"
