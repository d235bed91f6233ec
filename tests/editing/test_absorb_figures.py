"""Figures of absorbed contexts, the choice of a setting, and steps by gradient in a store."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from npt.editing.absorbing.absorbed import Absorbed
from npt.editing.absorbing.choice import Choice
from npt.editing.absorbing.general import CHOOSING, REPORTING, GeneralText
from npt.editing.absorbing.gradient import Trained
from npt.errors import DataError, NPTError
from tests.absorbing import ONE, OPTIONS, OTHER, TEXTS, absorb, base_of, logits, store

pytestmark = pytest.mark.usefixtures("short_questions")


@pytest.fixture(scope="module")
def llama() -> Any:
    return base_of("llama")


# -- figures ---------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_model(llama: Any) -> None:
    """KL of the reported questions from logits of whole passes, teacher with the context and student without."""
    one = store(llama)
    edit = absorb(one, ONE)
    assert len(edit.reported) == len(edit.compared) >= 1
    for conversation, row in zip(edit.reported, edit.compared, strict=True):
        n = conversation.answer
        assert conversation.student[-n:] == conversation.teacher[-n:]
        with torch.no_grad():
            after = llama(torch.tensor([conversation.student])).logits[0, -n - 1 : -1].double().log_softmax(-1)
            with one.disabled():
                before = llama(torch.tensor([conversation.student])).logits[0, -n - 1 : -1].double().log_softmax(-1)
                taught = llama(torch.tensor([conversation.teacher])).logits[0, -n - 1 : -1].double().log_softmax(-1)
        for name, found in (("kl_before", before), ("kl_after", after)):
            assert getattr(row, name) == pytest.approx(
                float((taught.exp() * (taught - found)).sum(-1).mean()), rel=1e-4
            )
    assert one.divergence(TEXTS) > 0 and one.preview("a river", 2).kl > 0


def test_a_lower_block_is_absorbed_after_a_higher_one(llama: Any) -> None:
    """The text on which damage is measured stays at the model's input, whatever blocks the contexts before were in."""
    one = store(llama)
    absorb(one, ONE, blocks=[2])
    edit = absorb(one, OTHER, blocks=[0])
    both = edit.figures.text_kl
    one.close()
    other = store(llama)
    absorb(other, OTHER, blocks=[0])
    edit = absorb(other, ONE, blocks=[2])
    assert edit.figures.text_kl == pytest.approx(both, rel=1e-4)


def test_damage_is_reported_on_text_that_chose_nothing(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    watched = GeneralText.watched

    def noted(self: GeneralText, seed: int) -> Any:
        seeds.append(seed)
        return watched(self, seed)

    monkeypatch.setattr(GeneralText, "watched", noted)
    one = store(llama)
    edit = absorb(one, ONE)
    assert seeds == [CHOOSING, REPORTING]
    found = {seed: one.contexts.watched(seed) for seed in seeds}
    assert not torch.equal(found[CHOOSING].last, found[REPORTING].last)
    kl = {seed: float(text.kl().sum() / text.tokens.sum()) for seed, text in found.items()}
    assert edit.figures.text_kl == pytest.approx(kl[REPORTING], rel=1e-6) and kl[CHOOSING] != kl[REPORTING]


def test_a_preview_reads_the_text_as_generation_does(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, where it is longer than a piece of statistics, and none that the window does not hold."""
    one = store(llama)
    absorb(one, ONE)
    text = "a river flows by the old town " * 8
    tokens = len(one.tokenizer(text)["input_ids"])
    monkeypatch.setattr(llama.config, "max_position_embeddings", 512)
    assert len(one.preview(text, 2).logits) == tokens > 128
    monkeypatch.setattr(llama.config, "max_position_embeddings", tokens)
    with pytest.raises(DataError, match="tokens"):
        one.preview(text, 2)


def test_the_choice_keeps_the_limit_and_never_sees_what_is_reported(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    best = Choice.best

    def watched(self: Choice, sets: Any) -> Any:
        seen.append((self, best(self, sets)))
        return seen[-1][1]

    monkeypatch.setattr(Choice, "best", watched)
    one = store(llama)
    edit = absorb(one, ONE, blocks="auto", mu=None, lam=None, limit=0.05, phrasings=2)
    ((choice, chosen),) = seen
    assert edit.setting == chosen.setting and len({trial.setting.blocks for trial in choice.trials.values()}) > 1
    within = [trial for trial in choice.trials.values() if trial.text <= 0.05]
    assert (
        chosen.held == min(trial.held for trial in within)
        if within
        else chosen.text == min(trial.text for trial in choice.trials.values())
    )
    used = {c.question for c in (*choice.lesson.conversations, *choice.held.conversations)}
    assert not used & {c.question for c in edit.reported} and used == {c.question for c in edit.learnt}


# -- steps by gradient -----------------------------------------------------------------------------------------------------


def test_steps_change_the_weight_deltas_and_what_fails_in_them_leaves_the_store(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, one = logits(llama), store(llama)
    absorb(one, ONE)
    closed = logits(llama)
    one.undo(one.edits[0].id)
    with torch.inference_mode():
        absorb(one, ONE, steps=3)
    trained = logits(llama)
    assert not torch.equal(trained, closed)

    def stop(self: Trained, steps: int, progress: bool) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trained, "train", stop)
        absorb(one, OTHER, steps=3)
    assert torch.equal(logits(llama), trained) and len(one.edits) == 1
    with pytest.raises(NPTError, match="not finite after step .; use a lower rate than 1e\\+30"):
        absorb(one, OTHER, steps=3, rate=1e30, start="closed")
    assert torch.equal(logits(llama), trained) and len(one.edits) == 1
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("npt.editing.descent._begun", lambda *args: (_ for _ in ()).throw(MemoryError))
        absorb(one, OTHER, steps=3)
    one.close()
    assert torch.equal(logits(llama), plain)
    store(llama).close()  # no hook was left behind


def test_a_setting_is_tried_on_some_conversations_and_solved_for_with_all(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    best = Choice.best

    def watched(self: Choice, sets: Any) -> Any:
        seen.append(len(self.lesson.conversations))
        return best(self, sets)

    monkeypatch.setattr(Choice, "best", watched)
    asked = [f"Is Bo {word}?" for word in ("red", "a cat", "old", "new", "here", "in town", "a dog", "long", "sold")]
    for most in (48, 1):
        monkeypatch.setattr("npt.editing.absorbing.contexts.SOLVED", most)
        one = store(llama)
        found = one.absorb(ONE, asked, **OPTIONS)
        assert isinstance(found, Absorbed)
        seen.append(len(found.learnt))
        one.close()
    whole, all_of_them, few, still_all = seen
    assert few == 1 < whole <= all_of_them == still_all
