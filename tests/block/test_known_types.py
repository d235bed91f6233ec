"""`npt families`: every causal type of the installed transformers stands in the list, once, with what npt makes of it."""

from __future__ import annotations

import pytest
from transformers.models.auto import modeling_auto

from npt.block import known_types
from npt.block.families import FAMILIES
from npt.block.known_types import State, standing_of, standings
from npt.cli import main


def test_every_type_stands_there_once_and_the_converted_ones_are_the_table() -> None:
    found = standings()
    names = [one.model_type for one in found]
    assert sorted(set(names)) == names and set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(names)
    assert {one.model_type for one in found if one.state is State.CONVERTED and not one.reason} == set(FAMILIES)
    assert all(one.reason for one in found if one.state is not State.CONVERTED)


@pytest.mark.parametrize(
    ("model_type", "state", "reason"),
    [
        ("llama", State.CONVERTED, ""),
        ("gpt-sw3", State.CONVERTED, "as gpt2"),
        ("mixtral", State.CONVERTED, ""),
        ("qwen3_5_moe", State.CONVERTED, "as qwen3_5_moe_text"),
        ("emu3", State.NOT_TRIED, "register_family adds one"),
        ("deepseek_v4", State.REFUSED, "several streams"),
        ("dots3_note", State.REFUSED, "mixtures of experts"),
        ("bart", State.REFUSED, "has an encoder"),
        ("mamba", State.REFUSED, "no MLP"),
        ("git", State.NOT_TRIED, "register_family adds one"),
        ("a_type_of_next_year", State.NOT_TRIED, "its default configuration can't be made"),
    ],
)
def test_a_type_has_its_reason(model_type: str, state: State, reason: str) -> None:
    found = standing_of(model_type)
    assert found.state is state and reason in found.reason


def test_a_type_that_breaks_is_not_tried_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model_type: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(known_types.AutoConfig, "for_model", broken)
    assert standing_of("git").reason == "its default configuration can't be made (ZeroDivisionError)"


def test_the_command_counts_and_chooses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_types, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {"llama": "", "jetmoe": ""})
    monkeypatch.setattr(known_types, "FAMILIES", {"llama": FAMILIES["llama"]})
    assert main(["families"]) == 0
    whole = capsys.readouterr().out
    assert "llama" in whole and "jetmoe" in whole and "mixture" in whole
    assert main(["families", "--only", "converted"]) == 0
    part = capsys.readouterr().out
    assert "llama" in part and "jetmoe" not in part
