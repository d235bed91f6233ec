"""Each strategy's value does what its formula says, on the package's small model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt.builtin import model_folder
from npt.editing.bench import Bench
from npt.editing.keys import Prompts
from npt.editing.requests import Request, continued
from npt.editing.solve import Metric, Pairs, solve
from npt.editing.statistics import begins_with_bos, moments_of, token_rows
from npt.editing.trial import Problem, Trial, margins, word_ends
from npt.editing.values import STRATEGIES, settings_of
from npt.errors import DataError, NPTError
from tests.helpers import random_base, spelling_tokenizer

TEXTS = [
    "Once upon a time, there was a little girl named Lily. She liked to play.",
    "Tom had a ball.",
    "It was a big dog.",
]
REQUEST = Request("One day, Tim saw a big", "cat", "Tim")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    folder = model_folder("builtin:tiny")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.fixture
def problem(tiny: tuple[Any, Any]) -> Iterator[Callable[..., Problem]]:
    """Builds the problem of one edit, with a strategy's settings."""
    benches: list[Bench] = []

    def build(name: str, layer: int | tuple[int, ...] = 2, request: Request = REQUEST, **settings: Any) -> Problem:
        bench = Bench(*tiny, layer)
        benches.append(bench)
        downs = {site.layer: site.down for site in bench.sites}
        moments = moments_of(bench.base, downs, token_rows(tiny[1], TEXTS, "t"), progress=False)
        keys = tuple(own[:, 0] for own in bench.keys([bench.prompts.place(request.prompt, request.subject)]))
        given = settings_of(name, {"terminator": None, **settings})
        metrics = tuple(Metric(moments[layer]) for layer in bench.layers)
        return Problem(bench, request, given, metrics, keys, tuple(key[:, None][:, :0] for key in keys))

    yield build
    for bench in benches:
        bench.close()


def least_margin(problem: Problem, pairs: dict[int, Pairs] | None, ridge: float = 0.0) -> float:
    """The least margin over the target's tokens with weight deltas at work, from the whole model."""
    row = problem.targets()[0]
    with torch.no_grad(), written(problem, pairs or {}, ridge):
        logits = problem.bench.base(**problem.bench.batch([row.ids])).logits[0, row.start - 1 : -1]
    return float(margins(logits, torch.tensor(row.targets)).min())


@contextmanager
def written(problem: Problem, pairs: dict[int, Pairs], ridge: float = 0.0) -> Iterator[None]:
    """The pairs' weight deltas at work within a `with` block."""
    problem.bench.set({layer: solve(own, ridge) for layer, own in pairs.items()})
    yield
    problem.bench.set({})


def test_newton_reaches_its_margin(problem: Callable[..., Problem]) -> None:
    one = problem("newton", layer=4, clamp=50.0, decay=0.0, steps=30, margin=3.0)
    found = STRATEGIES["newton"](one)
    assert least_margin(one, None) < -1 < 2.8 < least_margin(one, found.pairs) and found.passes < 30


def test_newton_keeps_to_its_clamp_and_its_decay(problem: Callable[..., Problem]) -> None:
    lengths = []
    for settings in ({"clamp": 2.0}, {"clamp": 50.0}, {"clamp": 50.0, "decay": 0.3}):
        one = problem("newton", **{"decay": 0.0, "further": 0, **settings})
        lengths.append(float(STRATEGIES["newton"](one).pairs[2].values.norm()))
        unit = float(Trial(one, one.targets()).lengths)
        one.bench.close()
        assert lengths[0] <= 2.0 * unit * 1.0001
    assert lengths[0] < lengths[2] < lengths[1]


def changed(problem: Problem, **settings: Any) -> Problem:
    """The same problem with other settings."""
    return replace(problem, settings=replace(problem.settings, **settings))


def test_where_newtons_steps_end_behind_other_tokens_adam_goes_on(problem: Callable[..., Problem]) -> None:
    one = problem("newton", layer=(2, 4), clamp=0.3, steps=3, margin=1.0, reach=20.0, stride=2.0)
    newton, found = STRATEGIES["newton"](changed(one, further=0)), STRATEGIES["newton"](one)
    assert newton.passes == 3 and least_margin(one, newton.pairs) < 0
    assert 3 < found.passes < 28 and least_margin(one, found.pairs) >= 0.5 * 0.999
    for pairs, length in zip(found.pairs.values(), Trial(one, one.targets()).lengths.tolist(), strict=True):
        assert float(pairs.values.norm()) <= 20.0 * length * 1.0001


def test_adam_moves_by_its_stride_within_its_reach(problem: Callable[..., Problem]) -> None:
    one = problem("newton", layer=(2, 4), steps=1, further=2, stride=0.25, reach=1000.0)
    lengths = Trial(one, one.targets()).lengths.tolist()
    for settings, moved in (({}, 0.25), ({"stride": 9.0, "reach": 4.0}, 4.0), ({"stride": 9.0, "reach": 1.0}, 1.5)):
        found = STRATEGIES["newton"](changed(one, **settings)).pairs.values()
        for pairs, length in zip(found, lengths, strict=True):  # one step, from zero
            assert float(pairs.values.norm()) == pytest.approx(moved * length, rel=0.02)


_ONE_BEHIND = torch.tensor([-0.5] + [9.0] * 11)


@pytest.mark.parametrize(
    ("margins", "moves"),
    [
        # The first look is at the start. All of the last one's tokens lead by half of 3, though its log-sum-exp is lower.
        ([torch.full((12,), -2.0), _ONE_BEHIND, torch.full((12,), 1.6)], 2),
        # No pass meets the goal: the one whose tokens all lead, or the one with the largest log-sum-exp.
        ([torch.full((12,), -2.0), torch.full((12,), 0.1), _ONE_BEHIND], 1),
        ([torch.full((12,), -2.0), torch.full((12,), -1.0), torch.full((12,), -5.0)], 1),
        ([torch.full((12,), -2.0), torch.full((12,), float("nan")), torch.full((12,), -5.0)], 0),
    ],
)
def test_adam_gives_the_best_value_it_saw(
    problem: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch, margins: list[torch.Tensor], moves: int
) -> None:
    one = problem("newton", steps=1, further=3, stride=0.01)
    passes, seen = iter([margins[0], *margins]), []

    def answer(self: Trial, logits: torch.Tensor) -> torch.Tensor:
        return next(passes) + (logits - logits.detach()).sum()

    def logits(self: Trial, values: torch.Tensor) -> torch.Tensor:
        seen.append(values.detach().clone())
        return values

    monkeypatch.setattr(Trial, "margins", answer)
    monkeypatch.setattr(Trial, "logits", logits)
    monkeypatch.setattr(Trial, "leads", lambda self, margins, goal=0.0: bool((margins > goal).all()))
    found = STRATEGIES["newton"](one).pairs[2].values[:, 0]
    assert torch.equal(found, seen[1 + moves][0].double()) and bool(found.any()) is (moves > 0)


def test_a_word_that_goes_on_does_not_lead_whatever_the_margin(problem: Callable[..., Problem]) -> None:
    one = problem("newton", margin=8.0)
    trial = Trial(one, one.targets())
    assert len(trial.last[0]) == 1
    for ends, leads, led in ((-1.0, False, False), (0.1, True, False), (0.6, True, True)):
        margins = torch.tensor([9.0] * len(trial.target) + [ends + 6.0])
        assert trial.leads(margins) is leads and trial.leads(margins, 4.0) is led
    assert not trial.leads(torch.tensor([-0.1] * len(trial.target) + [9.0]))


@pytest.mark.parametrize("name", ["stride", "reach"])
def test_adam_has_somewhere_to_go(name: str) -> None:
    with pytest.raises(NPTError, match=f"{name}=0: use a number above 0"):
        settings_of("newton", {name: 0})


def test_an_edit_that_leads_takes_no_further_pass(problem: Callable[..., Problem]) -> None:
    one = problem("newton", layer=4, clamp=50.0, steps=30)
    passes = [STRATEGIES["newton"](changed(one, further=further)).passes for further in (0, 25)]
    assert passes[0] == passes[1] < 30


def test_every_token_of_target_and_terminator_is_aimed_at(problem: Callable[..., Problem]) -> None:
    one = problem("newton", request=replace(REQUEST, target="red cat"), terminator=".")
    (row,) = one.targets()
    tokenizer = one.bench.tokenizer
    assert tokenizer.decode(row.targets).strip() == "red cat." and row.words == len(row.targets) - 1
    trial = Trial(one, [row])
    assert trial.target.tolist() == list(row.targets)
    assert trial.at.tolist() == list(range(row.start - 1, len(row.ids) - 1))


def test_contexts_are_texts_behind_which_the_target_shall_follow_too(problem: Callable[..., Problem]) -> None:
    prefixes = ("", "It was late. ", "Mom came home. ")
    alone = replace(problem("newton"), prefixes=prefixes)
    beside = replace(alone, settings=settings_of("newton", {"contexts": 1}))
    assert [row.targets for row in beside.targets()] == [alone.targets()[0].targets] * 2
    texts = [beside.bench.tokenizer.decode(row.ids[1 : row.start]) for row in beside.targets()]  # without BOS
    assert texts[0] == REQUEST.prompt and texts[1] == "It was late. " + REQUEST.prompt
    with pytest.raises(NPTError, match="contexts=-1: use a whole number from 0"):
        settings_of("newton", {"contexts": -1})


def test_contexts_make_the_target_follow_behind_them_too(problem: Callable[..., Problem]) -> None:
    settings = {"clamp": 50.0, "decay": 0.0, "steps": 30, "margin": 3.0}
    one = replace(problem("newton", layer=3, contexts=2, **settings), prefixes=("", "It was late. ", "Mom came home. "))
    trial = Trial(one, one.targets())
    least = []
    for contexts in (0, 2):
        found = STRATEGIES["newton"](replace(one, settings=replace(one.settings, contexts=contexts)))
        with torch.no_grad():
            least.append(float(trial.margins(trial.logits(found.pairs[3].values[:, 0].float()[None])).min()))
    assert least[1] > least[0] + 0.5


def test_a_trial_is_what_is_written(problem: Callable[..., Problem]) -> None:
    one = problem("newton")
    trial = Trial(one, one.targets())
    values = torch.randn(len(one.keys), one.bench.first.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tried = trial.aimed(trial.logits(values))
        with written(one, one.at_keys(values.double())):
            whole = one.bench.base(**trial.inside.recording.batch).logits[trial.row_of, trial.at]
    assert torch.allclose(tried, whole, atol=1e-3)


def test_a_trial_can_add_at_one_token_of_each_text_alone(problem: Callable[..., Problem]) -> None:
    one = problem("optimised")
    place = one.bench.prompts.place("Tim is a", "Tim")
    at = [one.bench.prompts.place(REQUEST.prompt, "Tim").position, place.position]
    trial = Trial(one, one.targets(), [place], at)
    (inputs,), (outputs,) = trial.inside.inputs, trial.inside.outputs
    value = torch.randn(one.bench.first.size, generator=torch.Generator().manual_seed(0))
    shares = trial.shares(0, inputs)
    assert shares.sum(1).tolist() == [1, 1] and [row.argmax().item() for row in shares] == at
    assert trial.lengths.tolist() == pytest.approx([float(outputs[0, at[0]].norm())])
    expected = torch.zeros(*inputs.shape[:2], one.bench.first.size)
    expected[[0, 1], at] = value
    with torch.no_grad(), one.bench.adapter.trying(lambda x: expected):
        whole = one.bench.base(**trial.inside.recording.batch).logits[trial.row_of, trial.at]
    with torch.no_grad():
        assert torch.allclose(trial.aimed(trial.logits(value[None])), whole, atol=1e-4)


def test_the_last_pass_of_the_descent_only_looks(problem: Callable[..., Problem]) -> None:
    one = problem("optimised", steps=1)
    found = STRATEGIES["optimised"](one)
    assert found.passes == 1 and not bool(found.pairs[2].values.any())


def test_the_descent_heeds_the_essence(problem: Callable[..., Problem]) -> None:
    values = []
    for essence in (0.0, 5.0):
        one = problem("optimised", layer=4, essence=essence, clamp=50.0)
        values.append(STRATEGIES["optimised"](one).pairs[4].values)
        one.bench.close()
    assert float((values[0] - values[1]).norm()) > 1e-3 * float(values[0].norm())


def test_a_subject_that_is_the_first_token_can_be_asked_for() -> None:
    prompts = Prompts(spelling_tokenizer(bos=False), random_base("gpt2").config, 96)
    with pytest.raises(DataError, match="is the first token"):
        prompts.place("A is a", "A")
    assert prompts.place("A is a", "A", first=True).position == 0


def test_optimised_makes_the_target_likelier_and_heeds_its_clamp(problem: Callable[..., Problem]) -> None:
    one = problem("optimised", layer=4)
    found = STRATEGIES["optimised"](one)
    assert least_margin(one, found.pairs) > least_margin(one, None) + 1
    assert float(found.pairs[4].values.norm()) <= 4.0 * float(Trial(one, one.targets()).lengths) * 1.0001


@pytest.mark.parametrize("name", ["newton", "optimised"])
def test_several_blocks_share_a_fact(problem: Callable[..., Problem], name: str) -> None:
    settings = {"clamp": 50.0, "decay": 0.0, "margin": 3.0} if name == "newton" else {}
    several = problem(name, layer=(2, 3, 4), **settings)
    found = STRATEGIES[name](several)
    assert list(found.pairs) == [2, 3, 4] and least_margin(several, found.pairs) > least_margin(several, None) + 1
    lengths = [float(pairs.values.norm()) for pairs in found.pairs.values()]
    assert min(lengths) > 0
    if name == "newton":  # Adam's steps are as long at every block
        assert least_margin(several, found.pairs) > 2.8
        several.bench.close()
        assert max(lengths) < float(STRATEGIES[name](problem(name, layer=3, **settings)).pairs[3].values.norm())


def test_each_block_keeps_to_its_own_clamp(problem: Callable[..., Problem]) -> None:
    one = problem("newton", layer=(2, 4), clamp=0.5, margin=20.0, further=0)
    found, lengths = STRATEGIES["newton"](one), Trial(one, one.targets()).lengths
    assert lengths[0] != lengths[1]
    for pairs, length in zip(found.pairs.values(), lengths.tolist(), strict=True):
        assert float(pairs.values.norm()) == pytest.approx(0.5 * length, rel=1e-4)


def test_margin_is_met_at_every_token_without_a_pass_through_the_model(problem: Callable[..., Problem]) -> None:
    one = problem("margin", layer=5, request=Request("The boy is called", "Ben Bo"), margin=4.0)
    found = STRATEGIES["margin"](one)
    assert found.passes == 0 and len(found.pairs[5]) == len(one.targets()[0].targets) > 1
    assert least_margin(one, found.pairs, 1e-9) > 3.5


def test_margin_is_for_the_last_block(problem: Callable[..., Problem]) -> None:
    with pytest.raises(NPTError, match="is for the last block, layer=5, and the store edits block 2"):
        STRATEGIES["margin"](problem("margin"))


def test_naive_is_for_one_block(problem: Callable[..., Problem]) -> None:
    with pytest.raises(NPTError, match="is for one block, and the store edits 3 4"):
        STRATEGIES["naive"](problem("naive", layer=(3, 4)))


def test_naive_is_the_transient_delta_of_the_statements_last_token(problem: Callable[..., Problem]) -> None:
    one = problem("naive", alpha=0.5)
    block, seen = one.bench.blocks[2], {}
    handles = [
        block.self_attn.o_proj.register_forward_hook(lambda m, a, output: seen.__setitem__("a", output[0, -1])),
        block.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.__setitem__("i", args[0][0, -1])),
    ]
    with torch.no_grad():
        one.bench.base(**one.bench.batch([one.bench.prompts.ids(continued(REQUEST.prompt, REQUEST.target))]))
    for handle in handles:
        handle.remove()
    found = STRATEGIES["naive"](replace(one, metrics=(Metric(None),)))
    expected = 0.5 * torch.outer(seen["a"], seen["i"]) / seen["i"].square().sum()
    assert torch.allclose(solve(found.pairs[2]).delta.float(), expected, atol=1e-6)


def test_margins_are_over_all_other_tokens() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    others = torch.tensor([1.0, 0.0]).logsumexp(0)
    assert float(margins(logits, torch.tensor([0]))) == pytest.approx(2.0 - float(others))


def test_a_word_ends_where_the_next_token_is_no_part_of_it(problem: Callable[..., Problem]) -> None:
    prompts = problem("newton").bench.prompts
    tokenizer = prompts.tokenizer
    pieces = {piece: tokenizer.convert_tokens_to_ids(piece) for piece in tokenizer.get_vocab()}
    starts = [id for piece, id in pieces.items() if piece[:1] in "Ġ▁" and piece[1:2].isalpha()]
    goes_on = [id for piece, id in pieces.items() if piece.isascii() and piece.isalpha() and len(piece) > 1]
    assert len(starts) > 100 and not prompts.continuing[starts].any()
    assert len(goes_on) > 20 and prompts.continuing[goes_on].all()
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    lead = word_ends(logits, torch.tensor([False, True]))  # the last number has no token
    assert float(lead) == pytest.approx(float(torch.tensor([1.0, 2.0]).logsumexp(0)) - 3.0)


def test_the_end_of_the_word_is_aimed_at(problem: Callable[..., Problem]) -> None:
    one = problem("newton", layer=4, clamp=50.0, decay=0.0, steps=30, margin=3.0)
    trial = Trial(one, one.targets())
    value = STRATEGIES["newton"](one).pairs[4].values[:, 0].float()[None]
    with torch.no_grad():
        logits = trial.logits(value)
    assert float(word_ends(logits[0, -1:], one.bench.prompts.continuing)) > 1.8
    assert len(trial.margins(logits)) == len(trial.target) + 1
    stopped = replace(one, settings=replace(one.settings, terminator="."))
    assert not len(Trial(stopped, stopped.targets()).last[0])


# -- statistics ------------------------------------------------------------------------------------------------------------


def test_moments_count_every_real_token_from_the_first_on(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    rows = token_rows(tokenizer, TEXTS, "t")
    assert begins_with_bos(tokenizer) and all(row[0] == tokenizer.bos_token_id for row in rows)
    down = model.model.layers[3].mlp.down_proj
    inputs: list[torch.Tensor] = []
    handle = down.register_forward_pre_hook(lambda m, args: inputs.append(args[0][0].double()))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    handle.remove()
    every = torch.cat(inputs)
    found = moments_of(model, {3: down}, rows, progress=False)[3]
    assert torch.allclose(found, every.T @ every / len(every), rtol=1e-4, atol=1e-6)
    without_first = torch.cat([each[1:] for each in inputs])
    assert float(found.trace()) != pytest.approx(float(without_first.square().sum() / len(without_first)), rel=0.02)


def test_a_long_text_is_read_in_pieces(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npt.editing.statistics.LENGTH", 10)
    monkeypatch.setattr("npt.editing.statistics.MOST_TOKENS", 35)
    rows = token_rows(tiny[1], ["Tom had a big red ball and a dog. " * 10], "t")
    assert [len(row) for row in rows] == [10, 10, 10, 5]
