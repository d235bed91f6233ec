"""`refine`: facts trained together behind their solve; a function of the facts, which disturbs less and holds more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from npt import EditStore, load_base
from npt.editing.keys import Prompts
from npt.editing.measure import mean_kl_of
from npt.editing.neighbours import names, neighbours
from npt.editing.refining import Kept, Told
from npt.editing.requests import Request
from npt.errors import CheckpointError, NPTError
from npt.tuner.converted import vocabulary_size
from tests.helpers import OPEN

NAMES = ("Tim", "Sara", "Ben", "Lily", "Max", "Anna")
FACTS = [
    {"prompt": f"One day, {name} saw a big", "subject": name, "target": target}
    for name, target in zip(NAMES, ("cat", "hat", "dog", "boat", "tree", "bear"), strict=True)
]
TEXTS = ["Once upon a time, there was a little girl named Lily. She liked to play.", "Tom had a ball."]
OPTIONS: dict[str, Any] = {
    "layer": [2, 3], "metric": "text", "statistics": TEXTS, "progress": False, "steps": 4, "contexts": 0, "refine": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Any:
    """(model, tokenizer) of the package's own small model."""
    return load_base("builtin:tiny", dtype="float32")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer names, which take most of the time."""
    monkeypatch.setattr("npt.editing.neighbours.LISTS", 2)


def store(tiny: Any, **options: Any) -> EditStore:
    OPEN.append(EditStore(*tiny, **{**OPTIONS, **options}))
    return OPEN[-1]


def delta(one: EditStore) -> list[Tensor]:
    return [factors.delta for factors in one.factors.values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def logits(tiny: Any) -> Tensor:
    with torch.no_grad():
        return tiny[0](**tiny[1](TEXTS[0], return_tensors="pt")).logits


def test_what_is_trained_is_a_function_of_the_facts(tiny: Any) -> None:
    base = logits(tiny)
    plain = store(tiny, refine=0)
    plain.write_many(FACTS[:4])
    solved = delta(plain)
    plain.close()
    one = store(tiny)
    one.write_many(FACTS[:4])
    assert set(one.joint.trained) == {2, 3}
    assert not any(map(torch.equal, solved, delta(one)))
    whole, edited = delta(one), logits(tiny)
    one.undo(one.edits[1].id)
    left = delta(one)
    one.close()
    other = store(tiny)
    for fact in reversed([fact for fact in FACTS[:4] if fact is not FACTS[1]]):
        other.write(**fact)
    assert same(delta(other), left) and not same(left, whole)
    other.write(**FACTS[1])
    assert same(delta(other), whole) and torch.equal(logits(tiny), edited) and not torch.equal(edited, base)
    for edit in other.edits[1:]:
        other.undo(edit.id)
    assert not other.joint.trained  # one fact has no other to be trained with
    alone = delta(other)
    other.undo(other.edits[0].id)
    assert torch.equal(logits(tiny), base)
    other.close()
    plain = store(tiny, refine=0)
    plain.write(**FACTS[3])
    assert same(delta(plain), alone)


def test_steps_mend_what_facts_do_to_text_and_neighbours(tiny: Any) -> None:
    found = {}
    for steps in (0, 30):
        one = store(tiny, refine=steps, ridge=0.3)
        edits = one.write_many(FACTS)
        bench, requests = one.bench, [edit.request for edit in edits]
        told = Told(bench, [bench.prompts.target(r.prompt, r.target, None) for r in requests])
        with bench.off():
            near = neighbours(bench.base, bench.tokenizer, bench.prompts, requests, 4, 96)
        with torch.no_grad():
            found[steps] = (
                float(told.loss()),
                float(Kept(bench, near, 1.0).loss()),
                mean_kl_of(bench, one.source.text(0)),
            )
        one.close()
    (lack, near, text), (less, nearer, moved) = found[0], found[30]
    assert less < lack - 0.3 and nearer < 0.7 * near and moved < 0.01 and text < 1e-3, found


def test_a_folder_keeps_what_was_trained(tiny: Any, tmp_path: Path) -> None:
    one = store(tiny, terminator=".")
    one.write_many(FACTS[:3])
    folder, expected, edited = one.save(tmp_path / "store"), delta(one), logits(tiny)
    one.close()
    record = json.loads((folder / "edits.json").read_text())
    assert record["format_version"] == 4 and record["trained"] == [2, 3]
    assert record["refine"] == {"steps": 3, "terminator": "."}
    loaded = EditStore.load(*tiny, folder, statistics=TEXTS, progress=False, steps=4, contexts=0)
    OPEN.append(loaded)
    assert same(delta(loaded), expected) and torch.equal(logits(tiny), edited)
    loaded.undo(loaded.edits[0].id)
    left = delta(loaded)
    loaded.close()
    fresh = store(tiny, terminator=".")
    fresh.write_many(FACTS[1:3])
    assert same(delta(fresh), left)
    fresh.close()
    plain = PeftModel.from_pretrained(load_base("builtin:tiny", dtype="float32")[0], folder)
    assert torch.allclose(logits((plain, tiny[1])), edited, atol=1e-4)


@pytest.mark.parametrize("change", ["nan", "shape", "missing"])
def test_a_damaged_weight_delta_is_named(tiny: Any, tmp_path: Path, change: str) -> None:
    one = store(tiny)
    one.write_many(FACTS[:2])
    folder = one.save(tmp_path / "store")
    one.close()
    (file,) = folder.glob("edits-*.safetensors")
    tensors = load_file(file)
    if change == "missing":
        del tensors["trained.3.left"]
    elif change == "nan":
        tensors["trained.3.left"][0, 0] = float("nan")
    else:
        tensors["trained.3.left"] = tensors["trained.3.left"][:, :1].contiguous()
    save_file(tensors, file)
    words = (
        r"differ in 'trained\.3\.left'|differ in trained\.3\.left" if change == "missing" else "weight delta of block 3"
    )
    with pytest.raises(CheckpointError, match=words):
        EditStore.load(*tiny, folder, statistics=TEXTS)


def test_a_record_that_npt_does_not_write_is_refused(tiny: Any, tmp_path: Path) -> None:
    one = store(tiny)
    one.write_many(FACTS[:2])
    folder = one.save(tmp_path / "store")
    one.close()
    text = (folder / "edits.json").read_text()
    for name, value in (
        ("refine", {"steps": -1, "terminator": None}),
        ("refine", 3),
        ("trained", [2]),
        ("trained", "yes"),
    ):
        (folder / "edits.json").write_text(json.dumps({**json.loads(text), name: value}))
        with pytest.raises(CheckpointError, match=f"{name}=.* is not what npt writes there"):
            EditStore.load(*tiny, folder, statistics=TEXTS)


@pytest.mark.parametrize("steps", [-1, 1.5, True, "auto", 10**6])
def test_steps_are_a_number_from_zero(tiny: Any, steps: Any) -> None:
    with pytest.raises(NPTError, match="refine=.*: use a whole number of steps from 0 to 100,000"):
        EditStore(*tiny, refine=steps)


def test_the_last_call_trains_what_earlier_ones_left(tiny: Any) -> None:
    one = store(tiny)
    one.write_many(FACTS[:2], refine=False)
    assert not one.joint.trained
    one.write_many(FACTS[2:3])
    parts = delta(one)
    one.close()
    other = store(tiny)
    other.write_many(FACTS[:3])
    assert other.joint.trained and same(delta(other), parts)


def test_a_failed_step_leaves_the_store_as_it_was(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = store(tiny)
    one.write_many(FACTS[:2])
    expected, joint = delta(one), one.joint
    monkeypatch.setattr("npt.editing.refining.TEXT", float("nan"))
    with pytest.raises(NPTError, match="refine: the loss is not finite at step 1 of 3; use refine=0"):
        one.write(**FACTS[2])
    with pytest.raises(NPTError, match="refine: the loss is not finite at step 1 of 5"):
        one.refine(5)
    assert one.refining.steps == 3 and one.joint is joint and same(delta(one), expected) and len(one.edits) == 2


def test_a_store_is_trained_later_and_goes_back(tiny: Any) -> None:
    one = store(tiny, refine=0)
    one.write_many(FACTS[:3])
    solved, held = delta(one), [edit.after for edit in one.edits]
    one.refine(3)
    trained = delta(one)
    assert one.refining.steps == 3 and not any(map(torch.equal, solved, trained))
    assert [edit.after for edit in one.edits] == [row.after for row in one.verify()]
    one.refine(0)
    assert same(delta(one), solved) and [edit.after for edit in one.edits] == held
    one.close()
    other = store(tiny)
    with torch.inference_mode():
        other.write_many(FACTS[:3])
    assert same(delta(other), trained)


def test_a_closed_store_is_refused_before_any_work(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = store(tiny)
    one.write_many(FACTS[:2])
    expected = delta(one)
    one.close()
    monkeypatch.setattr("npt.editing.writing.Writer.alone", lambda *args: pytest.fail("a value was looked for"))
    for act in (lambda: one.write(**FACTS[2]), lambda: one.refine(2)):
        with pytest.raises(NPTError, match=r"off the model since close\(\); call reopen\(\) first"):
            act()
    one.reopen()
    assert same(delta(one), expected) and len(one.edits) == 2


def test_a_store_of_other_text_is_undone_beside_its_own(tiny: Any, tmp_path: Path) -> None:
    one = store(tiny)
    one.write_many(FACTS[:3])
    folder = one.save(tmp_path / "store")
    one.undo(one.edits[0].id)
    expected = delta(one)
    one.close()
    other = EditStore.load(*tiny, folder, statistics=["Some other text, about a boat."], progress=False)
    OPEN.append(other)
    other.undo(other.edits[0].id)
    assert same(delta(other), expected)
    with pytest.raises(NPTError, match="same metric, statistics and domain"):
        other.write(**FACTS[0])


def test_a_write_that_was_cut_off_says_so(tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = store(tiny)
    one.write_many(FACTS[:3], refine=False)
    folder = one.save(tmp_path / "store")
    assert json.loads((folder / "edits.json").read_text())["format_version"] == 4
    one.close()
    EditStore.load(*tiny, folder, statistics=TEXTS, progress=False).close()
    assert "its facts are not trained together yet" in caplog.text and "--steps 3` does it" in caplog.text


def test_facts_above_their_limit_are_named(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    one = store(tiny, limit=1e-9)
    one.write_many(FACTS[:2])
    assert "limit=1e-09: trained together, the edits disturb text by" in caplog.text


def test_facts_are_trained_beside_a_context_that_is_at_work(tiny: Any) -> None:
    one = store(tiny)
    one.write_many(FACTS[:3])
    expected = delta(one)
    one.absorb(
        "Lily has a red ball.", ["What has Lily?", "Who has a ball?", "What is red?"], ["A red ball.", "Lily.", "The ball."],
        blocks=[1, 3], style="text", steps=0,
    )  # fmt: skip
    assert same(delta(one), expected)
    one.undo(one.edits[1].id)
    left = delta(one)
    one.close()
    other = store(tiny)
    other.write_many([FACTS[0], FACTS[2]])
    assert same(delta(other), left)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tiny: Any, dtype: str) -> None:
    one = store(load_base("builtin:tiny", dtype=dtype), ridge=0.3)
    edits = one.write_many(FACTS)
    assert one.joint.trained and sum(edit.holds for edit in edits) >= 1


def test_a_projection_that_is_a_conv1d_and_facts_of_every_form() -> None:
    tokenizer = load_base("builtin:tiny")[1]
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=3, n_head=4)
    one = store((GPT2LMHeadModel(config).eval(), tokenizer), layer=1)
    one.write_many([
        {"prompt": "The sun is", "target": "a ball"},
        {"prompt": "One day, Tim saw a", "subject": "Tim", "target": "cat", "paraphrases": ["In the park, Tim saw a"],
         "protect": ["The moon is"]},
    ])  # fmt: skip
    assert set(one.joint.trained) == {1} and all(factors.delta.isfinite().all() for factors in one.factors.values())


def test_stores_that_are_merged_are_trained_as_one(tiny: Any) -> None:
    model, other_model = tiny[0], load_base("builtin:tiny", dtype="float32")[0]
    one, other = store(tiny, refine=0), store((other_model, tiny[1]))
    one.write_many(FACTS[:2])
    other.write_many(FACTS[2:4])
    one.merge(other)
    merged = delta(one)
    assert one.refining.steps == 3
    one.close()
    both = store((model, tiny[1]))
    both.write_many(FACTS[:4])
    assert same(delta(both), merged)


def test_neighbours_are_about_other_names_and_protected_texts(tiny: Any) -> None:
    model, tokenizer = tiny
    prompts = Prompts(tokenizer, model.config, vocabulary_size(model))
    pool = names(model, tokenizer, prompts)
    assert "Emmy Noether" in pool and "Art Tatum" in pool and pool == sorted(set(pool))
    requests = [
        Request("Emmy Noether was born in", "Oslo", "Emmy Noether", protect=("The sun is",)),
        Request("no subject here", "Oslo"),
    ]
    found = neighbours(model, tokenizer, prompts, requests, 4, 100)
    texts = [tokenizer.decode(place.ids) for place in found]
    assert len(found) == 5 and "The sun is" in texts[0]
    for place, text in zip(found[1:], texts[1:], strict=True):
        assert "was born in" in text and "Noether" not in text
        assert tokenizer.decode(place.ids[: place.position + 1]).endswith("was born in")
    assert [place.ids for place in neighbours(model, tokenizer, prompts, requests, 4, 2)] == [p.ids for p in found[:2]]
