"""The dtype that weights take where nobody named one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import npt
from npt.common import precision
from npt.common.precision import DTYPE_REASON, choose_dtype, has_units
from npt.config import OptimizationSection, RunConfig, with_overrides
from npt.planning.shapes import load_shapes, with_own_dtype
from npt.runs.base_model import base_config, base_dtype
from tests.gguf_files import random_llama

CPU = torch.device("cpu")


@pytest.fixture
def no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU of before 2020, with 1 MB of free memory."""
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    monkeypatch.setattr(precision.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))


def test_float32_where_the_processor_has_no_units_and_memory_is_there(no_units: None) -> None:
    fits = choose_dtype(torch.bfloat16, CPU, lambda: 2**17)
    assert fits == (
        torch.float32, "this CPU has no bfloat16 units, and 512.00 KiB of weights fit the 1.00 MiB of free memory"
    )  # fmt: skip
    dtype, reason = choose_dtype(torch.bfloat16, CPU, lambda: 2**17 + 1)
    assert dtype == torch.bfloat16 and reason.startswith(
        "as the checkpoint: this CPU has no bfloat16 units, but float32"
    )

    def never() -> int:
        raise AssertionError("the model is counted only where that decides")

    assert choose_dtype(torch.float32, CPU, never) == (torch.float32, "as the checkpoint")
    assert choose_dtype(torch.bfloat16, torch.device("cuda"), never)[0] == torch.bfloat16


def test_a_processor_with_units_keeps_the_checkpoint_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert has_units(torch.bfloat16, CPU) and choose_dtype(torch.bfloat16, CPU, int)[0] == torch.bfloat16


def test_bases_and_plans_follow(no_units: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    config = with_overrides(RunConfig(), {"model.base_model_name": str(tmp_path / "m"), "model.rank": 4})
    shapes = load_shapes(config)
    assert with_own_dtype(config, shapes).model.dtype == "bfloat16", "0.5 MB of weights are over half of the memory"
    monkeypatch.setattr(precision.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    assert with_own_dtype(config, shapes).model.dtype == "float32"
    for name in ("bfloat16", "float32"):
        named = with_overrides(config, {"model.dtype": name})
        assert base_dtype(named.model, named.optimization, base_config(named.model)) == (
            getattr(torch, name), "model.dtype",
        )  # fmt: skip
    quantized = OptimizationSection(use_8bit=True)
    assert base_dtype(config.model, quantized, shapes) == ("auto", "as the checkpoint")
    npt.load_base("builtin:tiny")[1].save_pretrained(tmp_path / "m")
    base, _ = npt.load_base(str(tmp_path / "m"))
    assert base.dtype == torch.float32 and "no bfloat16 units" in getattr(base, DTYPE_REASON)
    half, _ = npt.load_base(str(tmp_path / "m"), dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and getattr(half, DTYPE_REASON) == "model.dtype"
