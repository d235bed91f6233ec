"""Options of methods, METHOD.NAME=VALUE."""

from __future__ import annotations

import re

import pytest

from benchmarks.editing.__main__ import BASELINES
from npt import load_base
from npt.editing.benchmark.methods import Setup
from npt.editing.benchmark.registry import METHODS, made, options_of
from npt.editing.metrics import Source
from npt.errors import NPTError


@pytest.fixture
def setup() -> Setup:
    model, tokenizer = load_base("builtin:tiny")
    texts = ["Once upon a time, there was a little dog.", "Tom had a red ball."]
    return Setup(model, tokenizer, Source(model, tokenizer, "text", texts, None, None, False), (1, 2))


def test_baselines_take_the_number_of_texts_that_values_are_found_behind(setup: Setup) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, known in BASELINES.items():
            patch.setitem(METHODS, name, known)
        for name in ("rome", "memit", "alphaedit"):
            assert made(name, setup, {"value_prefixes": 1}).setup.value_prefixes == 1 and setup.value_prefixes is None
            with pytest.raises(NPTError, match=f"--option {name}.value_prefixes=-1: use a whole number from 0"):
                options_of([f"{name}.value_prefixes=-1"])
        with pytest.raises(NPTError, match="newton.value_prefixes=1: no setting"):
            options_of(["newton.value_prefixes=1"])


def test_options_are_literals_or_text_and_known_to_their_method() -> None:
    assert options_of(["newton.clamp=3", "newton.terminator=.", "margin.layers=(2,)", "newton.ridge=0.1"]) == {
        "newton": {"clamp": 3, "terminator": ".", "ridge": 0.1}, "margin": {"layers": (2,)},
    }  # fmt: skip
    for text, message in (
        ("newton.clamp", "use METHOD.NAME=VALUE"),
        ("none.clamp=3", "use METHOD.NAME=VALUE"),
        ("newton.clam=3", "--option newton.clam=3: no setting"),
        ("newton.metric='text'", "newton.metric='text': no setting"),
        ("newton.steps=0", "--option newton.steps=0: use a whole number"),
        ("context.clamp=3", "context takes no such option; use none"),
        ("newton.layers=3", "use blocks in brackets"),
        ("margin.layers=(4,5,6)", "margin.layers=(4, 5, 6): margin edits one block; name it alone, as in (5,)"),
        ("context.layers=(4,)", "context.layers=(4,): context edits no block; leave it out"),
    ):
        with pytest.raises(NPTError, match=re.escape(message)):
            options_of([text])
