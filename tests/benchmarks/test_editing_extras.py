"""Fluency of the text that an edited model writes, and the skill that it keeps."""

from __future__ import annotations

from math import log2
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from npt.editing.benchmark.asking import Asker
from npt.editing.benchmark.extras import ITEMS, PROMPTS, Extras, entropy, probes
from npt.editing.benchmark.methods import Method, Setup
from npt.editing.benchmark.records import Record
from npt.editing.metrics import Source
from npt.editing.requests import Request
from npt.editing.solve import Factors
from npt.errors import NPTError
from tests.helpers import random_base, spelling_tokenizer

TEXT = [list(range(3, 40)), list(range(20, 60))]


@pytest.fixture
def setup() -> Setup:
    model, tokenizer = random_base("llama"), spelling_tokenizer()
    return Setup(model, tokenizer, Source(model, tokenizer, "identity", "self", None, None, False), (1,))


class Noise(Method):
    """A weight delta that changes much."""

    def write_many(self, requests: Any) -> None:
        down = self.setup.down(1)
        left = 50 * torch.eye(down.out_features, 4, dtype=torch.float64)
        self.deltas.add(1, Factors(left, torch.ones(4, down.in_features, dtype=torch.float64)))


def test_entropy_is_low_where_text_repeats_itself() -> None:
    # 2-grams ab, ba, ab: 2/3 and 1/3; 3-grams aba, bab: one bit.
    two = -(2 / 3 * log2(2 / 3) + 1 / 3 * log2(1 / 3))
    assert entropy("a b a b") == pytest.approx((2 / 3 * two + 4 / 3 * 1) / 2)
    assert entropy("no no no no no") == 0 == entropy("")
    assert entropy("one two, three four five") > entropy("one two one two one")


def test_every_probe_holds_its_answers() -> None:
    found = probes(TEXT, SimpleNamespace(all_special_ids=[3]))
    assert len(found) == 2 * PROMPTS and found == probes(TEXT, SimpleNamespace(all_special_ids=[3]))
    for probe in found:
        for at in probe.asked:
            earlier = [i for i in range(at - 1) if probe.ids[i] == probe.ids[at - 1]]
            assert [probe.ids[i + 1] for i in earlier] == [probe.ids[at]] and 3 not in probe.ids
    assert sum(len(probe.asked) for probe in found) == PROMPTS * (2 * ITEMS - 1)
    with pytest.raises(NPTError, match="--with skill: the running text has 15 different tokens"):
        probes([list(range(ITEMS * 2 - 1))], SimpleNamespace(all_special_ids=[]))


def test_figures_are_made_where_they_are_asked_for(setup: Setup) -> None:
    asker, method = Asker(setup.model, setup.tokenizer, TEXT, 1), Noise(setup)
    item = Record(Request("the home of Ada is", "Oslo", "Ada"), ("Ada lives in",), ())
    none, both = Extras(), Extras(["fluency", "skill"])
    assert none.skill(asker, method) == none.fluency(asker, method, item) == (None, None)
    base = both.skill(asker, method), both.fluency(asker, method, item)
    assert base[0][1] == 0 and base[1][1] == 0 and base[0][0] is not None
    method.write_many([])
    after = both.skill(asker, method), both.fluency(asker, method, item)
    assert after != base
    for (now, change), (was, _) in zip(after, base, strict=True):
        assert now is not None and was is not None and change == pytest.approx(now - was)
    with pytest.raises(NPTError, match="--with speed: no figure has that name; use fluency, skill"):
        Extras(["speed"])


def test_a_skill_is_right_where_the_model_repeats(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    asker, extras = Asker(setup.model, setup.tokenizer, TEXT, 1), Extras(["skill"])

    def induction(model: Any, blocks: Any, recording: Any) -> torch.Tensor:
        """Logits of what followed the token when it last stood there."""
        ids = recording.batch["input_ids"]
        logits = torch.zeros(*ids.shape, int(ids.max()) + 1)
        for row, at in ((r, a) for r in range(len(ids)) for a in range(1, ids.shape[1])):
            earlier = [i for i in range(at) if ids[row, i] == ids[row, at]]
            if earlier:
                logits[row, at, ids[row, earlier[0] + 1]] = 1
        return logits

    monkeypatch.setattr("npt.editing.benchmark.extras.run_again", induction)
    assert extras.skill(asker, Noise(setup)) == (1, 0)
