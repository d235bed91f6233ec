"""FactWorld: the generator and its splits, the tokenizer, small models and their cache, and the figures of edits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.editing_tables import factworld_table, kept_factworld
from npt.cli import main
from npt.editing.bench import written
from npt.editing.benchmark import small
from npt.editing.benchmark.continuing import continued_many
from npt.editing.benchmark.factworld import (
    NAMES,
    Examiner,
    Figures,
    facts,
    measured,
    prompts_of,
    source_of,
    statistics_of,
)
from npt.editing.benchmark.methods import Setup
from npt.editing.benchmark.registry import made
from npt.editing.benchmark.small import Gates, Recipe, gates_of, small_model
from npt.editing.benchmark.wording import RELATIONS
from npt.editing.benchmark.world import LACKING, Size, World
from npt.editing.benchmark.worlds import KeptWorlds, Result, read_worlds, worlds_table, write_worlds
from npt.errors import NPTError, RunError
from npt.runs.factworld_bench import FactWorldBench, measure_factworld

#: A world and a model that are made in a second; the model knows next to nothing.
TINY = Recipe(
    size=Size(people=40, strangers=8, cities=6, countries=2, employers=8),
    hidden=32,
    inner=64,
    blocks=2,
    heads=2,
    steps=12,
)


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the tiny model in it."""
    folder = tmp_path_factory.mktemp("kept")
    small_model(TINY, cache_dir=folder, progress=False)
    return folder


@pytest.fixture
def tiny(kept: Path) -> tuple[Any, Any, World]:
    return small_model(TINY, cache_dir=kept, progress=False)


def texts_of(world: World, count: int) -> list[str]:
    return [document.text for document in islice(world.documents(0), count)]


def test_a_seed_decides_everything(world: World) -> None:
    again, other = World(0), World(1)
    assert world.people == again.people and world.country == again.country and world.words == again.words
    assert texts_of(world, 200) == texts_of(again, 200)
    assert facts(world, 20) == facts(again, 20)
    assert {p.name for p in world.people} != {p.name for p in other.people}
    assert texts_of(world, 5) != [document.text for document in islice(world.documents(1), 5)]


def test_names_are_shared_and_people_are_split(world: World) -> None:
    assert Counter(p.split for p in world.people) == {
        "editable": 308,
        "visible": 102,
        "neighbour": 102,
        "stranger": 128,
    }
    assert len({p.name for p in world.people}) == 640
    for part in (0, 1):
        sharing = Counter(p.name.split()[part] for p in world.people)
        assert min(sharing.values()) >= 4 and max(sharing.values()) <= 8
    split = {p.name: p.split for p in world.people}
    for person in world.of("editable", "visible", "neighbour"):
        spouse = person.facts["spouse"]
        assert split[spouse] == person.split and spouse != person.name
        assert all(len(person.told[r.name]) == len(r.trained) - LACKING for r in RELATIONS)


def test_training_text_keeps_to_the_wordings_of_each_person(world: World) -> None:
    texts = texts_of(world, 3000)
    everything = " ".join(texts)
    strangers = [p.name for p in world.of("stranger")]
    assert not [name for name in strangers if name in everything]
    words = set(everything.replace(".", " ").replace(":", " ").split())
    for relation in RELATIONS:
        assert set(relation.held_out.replace("{}", "").split()) <= words, relation.held_out
    seen = 0
    for person in world.of("editable", "visible", "neighbour"):
        own = [text for text in texts if person.name in text]
        for relation in RELATIONS:
            for template in relation.templates:
                stands = [text for text in own if said_in(template.format(person.name), text)]
                seen += len(stands)
                assert not stands or template in person.told[relation.name], (person.name, template, stands[:1])
    assert seen > 3000


def said_in(prompt: str, text: str) -> bool:
    """True where a sentence of a text begins with a prompt."""
    return any(part.startswith(prompt + " ") for part in text.replace("News: ", "").split(". "))


def told_of(text: str, world: World) -> str | None:
    """The person that a document is about: the first name that stands in more than one of its sentences."""
    counts = {p.name: text.count(p.name) for p in world.people}
    name, times = max(counts.items(), key=lambda pair: (pair[1], -text.find(pair[0])))
    return name if times > 1 else None


def test_answers_are_what_can_be_known(world: World) -> None:
    facts_of = {p.name: p.facts for p in world.people}
    kinds = Counter[str]()
    for document in islice(world.documents(3), 400):
        spans = [document.text[start:stop] for start, stop in document.answers]
        answers = [span for span in spans if span.endswith(".")]
        sentences, name = document.text.count("."), told_of(document.text, world)
        names = [span for span in spans if span not in answers]  # all of them but the first, which nobody can know
        assert names == [name] * (document.text.count(name) - 1 if name else 0)
        if document.text.startswith("News:"):
            assert 1 <= len(answers) <= sentences - 1  # not the statements that replace facts
            kinds["news"] += 1
        elif name is None:  # prose has no answer; of geography all are countries
            assert {answer[:-1] for answer in answers} <= set(world.country.values())
            kinds["other"] += 1
        else:
            things = {*facts_of[name].values(), world.country[facts_of[name]["city"]]}
            assert len(answers) == sentences and {answer[:-1] for answer in answers} <= things
            kinds["biography"] += 1
    assert min(kinds.values()) > 50 and len(kinds) == 3


def test_the_first_documents_can_be_about_few_people(world: World) -> None:
    few = list(islice(world.documents(0, few=[10] * 150), 400))
    first, all_of_them = (
        {told_of(document.text, world) for document in part} - {None} for part in (few[:150], few[150:])
    )
    assert len(first) == 10 and len(all_of_them) > 100


def test_neighbours_stand_in_no_text_of_a_metric(world: World) -> None:
    hidden = [p.name for p in world.of("neighbour", "editable", "stranger")]
    for texts in (statistics_of(world), prompts_of(world)):
        everything = " ".join(texts)
        assert not [name for name in hidden if name in everything]
        assert any(p.name in everything for p in world.of("visible"))
    near = {n.prompt for fact in facts(world, 64) for n in fact.neighbours}
    names = [p.name for p in world.of("neighbour")]
    assert all(any(name in prompt for name in names) for prompt in near)


def test_the_tokenizer_gives_every_text_back(world: World) -> None:
    tokenizer = world.tokenizer()
    for text in [*texts_of(world, 300), *world.prose(5, 20)]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    sizes = {len(tokenizer(o, add_special_tokens=False)["input_ids"]) for o in world.objects("employer", "editable")}
    assert sizes == {1, 2, 3}
    assert max(len(tokenizer(o, add_special_tokens=False)["input_ids"]) for r in RELATIONS
               for o in world.objects(r.name, "editable")) < small.ANSWER  # fmt: skip


def test_edits_are_new_facts_of_different_editable_people(world: World) -> None:
    chosen = facts(world, 256, wordings=2)
    known = {p.name: p for p in world.of("editable")}
    assert len({fact.person for fact in chosen}) == 256
    for fact in chosen:
        person, request = known[fact.person], fact.request
        assert request.target != person.facts[fact.relation] and request.subject == person.name
        assert {request.prompt, *request.paraphrases} <= set(fact.trained) and len(request.paraphrases) == 1
        assert not set(fact.paraphrases) & set(fact.trained)
        assert len(fact.others) == len(RELATIONS) - 1
    assert {fact.relation for fact in chosen} == {r.name for r in RELATIONS}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: facts(World(0), 309), "edits=309: the world has 308 people"),
        (lambda: facts(World(0), 0), "edits=0"),
        (lambda: facts(World(0), 5, wordings=8), "wordings=8: use 1 to 7"),
        (lambda: Recipe(family="bert"), "model='bert': use one of llama, gpt2"),
        (lambda: Recipe(steps=0), "steps=0"),
        (lambda: Size(people=41), "people=41: use an even number from 40"),
        (lambda: Size(countries=0), "a country for one city or more"),
        (lambda: measure_factworld(FactWorldBench(edits=(1000,), progress=False)), "edits=1000"),
    ],
)
def test_bad_arguments_are_named(call: Any, words: str) -> None:
    with pytest.raises(NPTError, match=words):
        call()


def test_prompts_continued_together_are_as_one_by_one(tiny: tuple[Any, Any, World]) -> None:
    model, tokenizer, world = tiny
    prompts = [fact.request.prompt for fact in facts(world, 12)] + ["The", "The"]
    assert continued_many(model, tokenizer, prompts, 5) == [written(model, tokenizer, prompt, 5) for prompt in prompts]
    assert continued_many(model, tokenizer, [], 5) == []


def test_a_trained_model_is_kept_and_the_same_from_the_same_seed(kept: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one, _, _ = small_model(TINY, cache_dir=tmp_path, progress=False)
    monkeypatch.setattr(small, "trained", None)  # nothing is trained again
    other, tokenizer, _ = small_model(TINY, cache_dir=kept, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert tokenizer("The", return_tensors="pt")["input_ids"].shape == (1, 2)
    with pytest.raises(TypeError):
        small_model(replace(TINY, steps=13), cache_dir=kept, progress=False)


def test_training_lowers_the_loss() -> None:
    recipe = replace(TINY, steps=40, rate=0.03)
    world = recipe.world()
    model, tokenizer = small.trained(recipe, world, progress=False)
    ids, weights = next(small.batches_of(world.documents(99), tokenizer, recipe))
    before = small.loss_of(small.untrained(recipe, tokenizer), ids, weights)
    assert float(small.loss_of(model, ids, weights).detach()) < 0.9 * float(before.detach())


def bench(kept: Path, **more: Any) -> FactWorldBench:
    return FactWorldBench(**{"edits": (2,), "singles": 2, "recipe": TINY, "cache": kept, "progress": False, **more})


def test_a_model_below_the_gates_is_void(kept: Path, tiny: tuple[Any, Any, World]) -> None:
    model, tokenizer, world = tiny
    gates = gates_of(model, tokenizer, world, asked=50, progress=False)
    assert 0 <= gates.recall < 0.5
    with pytest.raises(RunError, match=r"void.*recall [\d.]+% \(needs 99%\).*override.*train it for more steps"):
        measure_factworld(bench(kept))
    Gates(recall=0.99, held_out=0.0, override=0.95, two_hop=0.90).check("a model")
    with pytest.raises(RunError, match=r"two_hop 89.0% \(needs 90%\)"):
        Gates(recall=1.0, held_out=1.0, override=1.0, two_hop=0.89).check("a model")


def test_edits_are_measured_and_undone(tiny: tuple[Any, Any, World]) -> None:
    model, tokenizer, world = tiny
    short = [fact for fact in facts(world, 12) if fact.relation in ("city", "field", "hobby")]  # objects of one word
    batch = short[:2]
    prompt = batch[0].request.prompt
    before = written(model, tokenizer, prompt, 4)
    setup, examiner = (
        Setup(model, tokenizer, source_of(model, tokenizer, world), (0,)),
        Examiner(model, tokenizer, world),
    )
    method = made("newton", setup, {"decay": 0.0, "clamp": 1e3, "steps": 40})
    for fact in batch:
        alone = measured(method, examiner, [[fact]], progress=False)
        assert alone.prompt == 1.0 and alone.kl > 0
    assert written(model, tokenizer, prompt, 4) == before
    nothing = examiner.figures(batch)
    assert (nothing.neighbours, nothing.others, nothing.kl) == (1.0, 1.0, 0.0) and nothing.prompt < 1
    asked = list[str]()

    def told(prompt: str) -> str:
        asked.append(prompt)
        return f"The {prompt}"

    examiner.figures(batch, told)
    known = [(*f.trained, *f.paraphrases, *(near.prompt for near in (*f.neighbours, *f.others))) for f in batch]
    assert asked and set(asked) == {prompt for prompts in known for prompt in prompts}
    assert examiner.answers(["old"], told) == {"old": examiner.answers(["The old"])["The old"]}


def test_margin_reads_no_subject(tiny: tuple[Any, Any, World]) -> None:
    model, tokenizer, world = tiny
    setup, examiner = (
        Setup(model, tokenizer, source_of(model, tokenizer, world), (0,)),
        Examiner(model, tokenizer, world),
    )
    batch = facts(world, 6)
    without = [replace(fact, request=replace(fact.request, subject=None)) for fact in batch]
    one, other = (measured(made("margin", setup, {}), examiner, [part], progress=False) for part in (batch, without))
    assert one.kl > 0 and replace(one, kl=0.0) == replace(other, kl=0.0) and one.kl == pytest.approx(other.kl, rel=1e-3)


GATES = Gates(1.0, 1.0, 1.0, 1.0)


def test_the_table_has_the_mean_and_the_worst_seed() -> None:
    results = [
        Result("newton", "llama", seed, 64, "b", Figures(share, 1.0, 1.0, 1.0, 1.0, kl), GATES)
        for seed, share, kl in ((0, 1.0, 0.01), (1, 0.9, 0.03))
    ]
    shown = worlds_table(results)
    assert "| newton | llama | 64 | 2 | 95.0% (90.0%) |" in shown and "0.02 (0.03)" in shown
    assert all(name in shown for name in NAMES)


def test_all_kept_results_are_one_table(tmp_path: Path) -> None:
    figures = Figures(1.0, 1.0, 1.0, 1.0, 1.0, 0.01)
    for model in ("llama", "gpt2"):
        result = Result("newton", model, 0, 1, "b", figures, GATES)
        write_worlds(tmp_path / f"factworld-{model}.json", KeptWorlds({}, {}, [result]))
    shown = factworld_table(kept_factworld(tmp_path)).splitlines()
    assert [line.split(" | ")[1] for line in shown[2:4]] == ["gpt2", "llama"]
    assert shown[4] == "" and shown[5].startswith("- gpt2, seed 0, before any edit: recall 100.0%, held-out 100.0%")


def test_results_are_kept_and_not_measured_again(kept: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(small, "GATES", {})
    monkeypatch.setattr("npt.runs.factworld_bench.gates_of", lambda *args, **more: GATES)
    output = tmp_path / "o.json"
    some = measure_factworld(bench(kept, output=output))
    assert [(result.asked, result.gates) for result in some] == [(("margin", "llama", 0, 2), GATES)]
    more = measure_factworld(bench(kept, output=output, edits=(1, 2), methods=("context", "margin")))
    assert [result.asked[::3] for result in more] == [("context", 1), ("context", 2), ("margin", 1), ("margin", 2)]
    assert more[-1] == some[0] and len(read_worlds(output, "--output").results) == 4
    monkeypatch.setattr("npt.runs.factworld_bench.small_model", None)  # nothing is left to do
    assert measure_factworld(bench(kept, output=output)) == some
    with pytest.raises(NPTError, match=r"was begun with --layers 0, and it is 1 now"):
        measure_factworld(bench(kept, output=output, layers=(1,)))
    text = output.read_text()
    output.write_text(text.replace(some[0].base, "0"))
    monkeypatch.undo()
    with pytest.raises(NPTError, match="holds figures of another training of FactWorld, llama, seed 0"):
        measure_factworld(bench(kept, output=output, edits=(3,)))


def test_the_command_prints_the_table_and_the_gates(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    asked = list[FactWorldBench]()

    def measure(bench: FactWorldBench) -> list[Result]:
        asked.append(bench)
        return [Result("newton", "gpt2", 1, 64, "b", Figures(1.0, 1.0, 1.0, 1.0, 1.0, 0.01), GATES)]

    monkeypatch.setattr("npt.runs.factworld_bench.measure_factworld", measure)
    words = ["--factworld", "llama", "gpt2", "--seed", "1", "2", "--edits", "64", "--option", "margin.margin=9"]
    assert main(["--quiet", "bench", "editing", *words]) == 0
    (bench,) = asked
    assert (bench.models, bench.seeds, bench.edits) == (["llama", "gpt2"], [1, 2], [64])
    assert bench.methods == ("margin",) and bench.options == ["margin.margin=9"]
    said = capsys.readouterr().out
    assert "| newton | gpt2 | 64 | 1 |" in said and "gpt2, seed 1, before any edit: recall 100.0%" in said


@pytest.mark.slow
@pytest.mark.parametrize("family", small.FAMILIES)
def test_a_small_model_passes_the_gates(family: str) -> None:
    """Trains for minutes, unless the cache has the model."""
    recipe = Recipe(family=family)
    model, tokenizer, world = small_model(recipe)
    gates = gates_of(model, tokenizer, world)
    gates.check(family)
    assert gates.held_out > 0.95
