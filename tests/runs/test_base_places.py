"""The folders that a base's name may mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import npt
from npt import builtin
from npt.common.kept import RECORD
from npt.errors import NPTError
from npt.runs.base_places import snapshot_of


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A hub's cache folder of one model, with two snapshots; main is the second."""
    folder = tmp_path / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("b" * 40)
    for name in "ab":
        shutil.copytree(builtin.model_folder("builtin:tiny"), folder / "snapshots" / (name * 40))
    return folder


def test_a_hub_cache_s_folder_means_its_main_branch(hub_cache: Path) -> None:
    main = hub_cache / "snapshots" / ("b" * 40)
    base, tokenizer = npt.load_base(str(hub_cache))
    assert base.name_or_path == tokenizer.name_or_path == str(main)
    assert npt.load_base(str(main))[0].name_or_path == snapshot_of(str(main)) == str(main)
    (main / "config.json").unlink()
    with pytest.raises(NPTError, match=f"name the folder in it that has one: .*/snapshots/{'a' * 40}$"):
        npt.load_base(str(hub_cache))


def test_a_folder_can_t_pass_for_another_name(tmp_path: Path) -> None:
    """A record is a file that anyone may put beside a model."""
    for source in ("org/another", "builtin:tiny", "m.gguf", "\x1b[31m"):
        (tmp_path / RECORD).write_text(json.dumps({"source": source}))
        assert builtin.name_of(str(tmp_path)) == str(tmp_path)
    (tmp_path / RECORD).write_text("[")
    assert builtin.recorded_name(str(tmp_path)) == str(tmp_path)
