"""`EditStore` on plain and on NPT models: what it refuses, what it keeps, and what its figures mean."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import EditStore, NPTConfig, calibrate
from npt.builtin import model_folder
from npt.editing import export as export_module
from npt.editing import folder as folder_module
from npt.editing.measure import divergences, follows
from npt.errors import CheckpointError, ConversionError, DataError, NPTError
from tests.helpers import OPEN, random_base, spelling_tokenizer

TEXTS = [
    "Once upon a time, there was a little girl named Lily. She liked to play.",
    "Tom had a ball.",
    "It was a big dog.",
]
FACT = {"prompt": "One day, Tim saw a big", "subject": "Tim", "target": "cat"}
OTHER = {"prompt": "Sara found a red", "subject": "Sara", "target": "hat"}
#: The small model needs long values.
SETTINGS: dict[str, Any] = {"terminator": None, "clamp": 50.0, "decay": 0.0, "steps": 25}
THIRD = {"prompt": "The girl is called", "target": "Ben"}
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))


def store(model: Any, tokenizer: Any = None, **options: Any) -> EditStore:
    options = {"layer": 2, "metric": "text", "statistics": TEXTS, "progress": False, **SETTINGS, **options}
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model_folder("builtin:tiny"))
    OPEN.append(EditStore(model, tokenizer, **options))
    return OPEN[-1]


@pytest.fixture(scope="module")
def tiny() -> Any:
    """(model, tokenizer) of the package's own small model, which writes English."""
    folder = model_folder("builtin:tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def base(tiny: Any) -> Any:
    return tiny[0]


@pytest.fixture
def written(base: Any) -> EditStore:
    found = store(base)
    found.write(**FACT)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


# -- writing ---------------------------------------------------------------------------------------------------------------


def test_the_target_follows_and_is_generated_not_assumed(written: EditStore) -> None:
    (edit,) = written.edits
    assert edit.holds and edit.after.startswith(" cat") and not edit.before.startswith(" cat")
    assert written.bench.write(FACT["prompt"], 8).startswith(" cat")
    (found,) = written.verify()
    assert found.holds and (found.id, found.before, found.after) == (edit.id, edit.before, edit.after)
    with written.disabled():
        assert written.bench.write(FACT["prompt"], 40)[: len(edit.before)] == edit.before
        assert not written.verify()[0].holds


def test_a_paraphrase_is_averaged_into_the_key_and_follows(base: Any) -> None:
    other = "Then Tim found a"
    found = store(base)
    found.write(**FACT, paraphrases=[other])
    assert found.bench.write(other, 8).startswith(" cat") and found.edits[0].holds


def test_a_protected_prompt_moves_less(base: Any) -> None:
    text = "One day, Tom saw a big"
    moved = {}
    for protect in ([], [text]):
        found = store(base)
        found.write(**FACT, protect=protect)
        moved[bool(protect)] = found.preview(text, 1).kl
        found.close()
    assert moved[True] < moved[False] / 3


def test_free_memory_goes_back_while_many_edits_are_found(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr("npt.editing.writing.trim_heap", lambda: given.append(1))
    facts = [{"prompt": f"One day, Tim {'really ' * n}saw a big", "subject": "Tim", "target": "cat"} for n in range(9)]
    store(base, steps=1, read_back=False).write_many(facts)
    assert len(given) == 2


def test_without_a_subject_the_edit_says_so(base: Any) -> None:
    found = store(base)
    edit = found.write("She had a big", target="dog")
    assert "other wordings will mostly not follow" in edit.note and edit.holds


def test_a_subject_at_the_start_needs_bos(base: Any) -> None:
    fact = {"prompt": "A was born in", "subject": "A", "target": "X"}
    random = random_base("llama", torch.float32)
    with_bos = store(random, spelling_tokenizer())
    with_bos.write(**fact)
    with_bos.close()
    without = store(random, spelling_tokenizer(bos=False))
    with pytest.raises(DataError, match="'A' is the first token, whose key is the same.*put words in front"):
        without.write(**fact)
    assert without.edits == []
    without.close()


def test_the_last_mention_of_a_subject_counts(base: Any) -> None:
    found = store(random_base("llama", torch.float32), spelling_tokenizer())
    place = found.bench.prompts.place("Ada, called Ada, is", "Ada")
    assert place.position == 1 + "Ada, called Ada".index("Ada", 3) + 2  # BOS, then the last letter


def test_an_edit_that_fails_leaves_the_store_as_it_was(written: EditStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before = logits(written.model)

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("npt.editing.measure.readings", fail)
    with pytest.raises(MemoryError):
        written.write(**OTHER)
    assert len(written.edits) == 1 and torch.equal(logits(written.model), before)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a b"}, "edit 1: target is missing"),
        ({"prompt": " ", "target": "x"}, "edit 1, prompt: is blank"),
        ({"prompt": "a", "target": 3}, "edit 1, target=3: use text"),
        ({"prompt": "a b", "target": "x", "subject": "c"}, "the subject 'c' does not stand in the prompt"),
        ({"prompt": "a b", "target": "x", "paraphrases": "c"}, "paraphrases='c': use a list of texts"),
        ({"prompt": "a b", "target": "x", "protect": [""]}, "protect, text 1: is blank"),
        ({"prompt": "a b", "target": "x", "promt": "c"}, "unknown name 'promt'"),
    ],
)
def test_records_that_are_refused(base: Any, record: dict[str, Any], words: str) -> None:
    found = store(base)
    with pytest.raises(DataError, match=words):
        found.write_many([record])


def test_one_prompt_has_one_target(written: EditStore) -> None:
    with pytest.raises(DataError, match="has the target 'cat' already, by an edit of the store.*undo that one first"):
        written.write(**{**FACT, "target": "Rome"})
    with pytest.raises(DataError, match="edit 2: .* has that target already, by edit 1"):
        written.write_many([OTHER, OTHER])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 9}, "layer=9: the model has 6 blocks; use 0 to 5"),
        ({"layer": "first"}, "layer='first': use 'auto'"),
        ({"metric": "none"}, "metric='none' is unknown; use domain"),
        ({"values": "best"}, "values='best' is unknown; use newton"),
        ({"ridge": -1}, "ridge=-1: use 'auto', or a number from 0"),
        ({"statistics": "wiki"}, "statistics='wiki': use 'self', or a list of texts"),
        ({"statistics": [3]}, "statistics: text 1 is int"),
        ({"statistics": [""]}, None),
        ({"domain": "x"}, "domain='x': use a list"),
        ({"marign": 3}, "marign=3: no setting"),
        ({"steps": 0}, "steps=0: use a whole number from 1"),
        ({"clamp": -1}, "clamp=-1: use a number from 0"),
        ({"terminator": ""}, "terminator='': use text, or None"),
    ],
)
def test_options_that_are_refused(base: Any, options: dict[str, Any], words: str | None) -> None:
    if words is None:  # a text of BOS alone has a token
        store(base, **options).close()
        return
    with pytest.raises(NPTError, match=words):
        store(base, **options)


def test_one_store_at_a_time(written: EditStore) -> None:
    with pytest.raises(NPTError, match="has an edit store at work"):
        store(written.model, layer=3)
    written.close()
    other = store(written.model, layer=3)
    with pytest.raises(NPTError, match="has an edit store at work"):
        written.reopen()
    other.close()
    written.reopen()
    assert written.verify()[0].holds


def test_an_unknown_id_is_named(written: EditStore) -> None:
    with pytest.raises(NPTError, match=f"'nobody': no edit has that id; use one of {written.edits[0].id}"):
        written.undo("nobody")


def test_half_precision_is_edited_in_float32() -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("builtin:tiny"), dtype=torch.bfloat16).eval()
    plain = logits(model)
    found = store(model)
    edit = found.write(**FACT)
    assert edit.holds and found.bench.adapter.dtype == torch.float32 and logits(model).dtype == torch.bfloat16
    found.undo(edit.id)
    assert torch.equal(logits(model), plain)


# -- the ridge -------------------------------------------------------------------------------------------------------------


def test_the_largest_ridge_at_which_all_hold_is_taken(base: Any) -> None:
    found = store(base)
    found.write_many([FACT, OTHER])
    assert all(edit.holds for edit in found.edits) and found.chosen_ridge in (0.3, 0.1, 0.03, 0.01)


def test_a_ridge_that_is_named_is_kept(base: Any) -> None:
    found = store(base, ridge=0.7)
    found.write_many([FACT, OTHER])
    assert found.chosen_ridge == 0.7


# -- figures ---------------------------------------------------------------------------------------------------------------


def test_a_preview_shows_both_models(written: EditStore) -> None:
    shown = written.preview(FACT["prompt"], 8)
    assert shown.after.startswith(" cat") and not shown.before.startswith(" cat") and shown.kl > 0
    batch = written.bench.batch([written.bench.prompts.ids(FACT["prompt"])])
    with torch.no_grad():
        edited = written.model(**batch).logits[0]
        with written.disabled():
            plain = written.model(**batch).logits[0]
    assert torch.equal(shown.logits, edited)
    assert shown.kl == pytest.approx(float(divergences(plain, edited).mean()))
    assert written.divergence([FACT["prompt"]]) == pytest.approx(shown.kl, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "target", "follows_it"),
    [(" Rome, Italy", "Rome", True), ("Romeo", "Rome", False), (" rome", "Rome", False), ("C++ and", "C++", True),
     ("Rome", "Rome", True), ("", "Rome", False)],
)  # fmt: skip
def test_follows(text: str, target: str, follows_it: bool) -> None:
    assert follows(text, target) is follows_it


# -- NPT models ------------------------------------------------------------------------------------------------------------


def test_on_an_npt_model_the_edited_base_is_under_disable_adapter() -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder("builtin:tiny"), dtype=torch.float32).eval()
    model = get_peft_model(base, NPTConfig(npt_layers="upper_half"))
    calibrate(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}])
    with torch.no_grad(), model.disable_adapter():
        plain = model(input_ids=IDS).logits
    npt = logits(model)
    found = store(model)
    edit = found.write(**FACT)
    assert edit.holds and found.model is model
    with torch.no_grad(), model.disable_adapter():
        edited = model(input_ids=IDS).logits
    assert float((edited - plain).abs().max()) > 1e-3 and float((logits(model) - npt).abs().max()) > 1e-3
    shown = found.preview(FACT["prompt"], 1)
    batch = found.bench.batch([found.bench.prompts.ids(FACT["prompt"])])
    with torch.no_grad():
        assert torch.equal(shown.logits, model(**batch).logits[0])
    found.undo(edit.id)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    assert torch.equal(logits(model), npt)


# -- files -----------------------------------------------------------------------------------------------------------------


def test_a_store_is_loaded_as_it_was(written: EditStore, tmp_path: Path) -> None:
    written.write(**OTHER)
    edited, edits = logits(written.model), written.edits
    written.save(tmp_path / "s")
    written.close()
    again = EditStore.load(
        written.model, written.tokenizer, tmp_path / "s", statistics=TEXTS, progress=False, **SETTINGS
    )
    OPEN.append(again)
    assert again.edits == edits and torch.equal(logits(written.model), edited)
    again.undo(edits[1].id)
    alone = logits(written.model)
    again.write(**OTHER)
    assert torch.allclose(logits(written.model), edited, atol=1e-5) and not torch.allclose(alone, edited, atol=1e-5)


def test_a_store_without_its_text_undoes_and_does_not_write(written: EditStore, tmp_path: Path) -> None:
    written.save(tmp_path / "s")
    written.close()
    again = EditStore.load(written.model, written.tokenizer, tmp_path / "s", progress=False)
    OPEN.append(again)
    with pytest.raises(NPTError, match="load it with the same metric, statistics and domain to write more"):
        again.write(**OTHER)
    again.undo(again.edits[0].id)
    assert again.edits == []


def test_a_store_of_another_base_is_refused(written: EditStore, tmp_path: Path) -> None:
    written.save(tmp_path / "s")
    other = AutoModelForCausalLM.from_pretrained(model_folder("builtin:tiny"), dtype=torch.float32).eval()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.add_(0.01)
    with pytest.raises(
        CheckpointError, match="was written for another base than this one: its weights are not the same"
    ):
        EditStore.load(other, written.tokenizer, tmp_path / "s")
    store(other)  # nothing was left at work on it


def test_a_save_that_is_cut_off_leaves_the_store_before(
    written: EditStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every file that is replaced."""
    folder, (first,) = written.save(tmp_path / "s"), written.edits
    written.write(**OTHER)
    replace, edited = os.replace, logits(written.model)
    for count in range(4):
        done = []

        def cut(source: Any, target: Any, count: int = count, done: list[Any] = done) -> None:
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(target)
            replace(source, target)

        # Files that are written into the temporary folder are renamed too: only the last four renames count.
        real = folder_module.replace_files

        def cut_off(target: Path, fill: Any, *, last: str, cut: Any = cut, real: Any = real) -> None:
            def filled(temporary: Path) -> None:
                fill(temporary)
                monkeypatch.setattr(os, "replace", cut)

            real(target, filled, last=last)

        monkeypatch.setattr(folder_module, "replace_files", cut_off)
        with pytest.raises(KeyboardInterrupt):
            written.save(folder)
        monkeypatch.undo()
        written.close()
        again = EditStore.load(written.model, written.tokenizer, folder, progress=False)
        assert again.edits[0].id == first.id and len(again.edits) == 1
        again.close()
        written.reopen()
    written.save(folder)
    written.close()
    again = EditStore.load(written.model, written.tokenizer, folder, progress=False)
    OPEN.append(again)
    assert len(again.edits) == 2 and torch.equal(logits(written.model), edited)
    assert len(list(folder.glob("edits-*.safetensors"))) == 1


def test_a_folder_of_something_else_is_not_written_over(written: EditStore, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NPTError, match=r"is there and holds no edits\.json"):
        written.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_lora_has_a_rank_that_servers_accept(written: EditStore, tmp_path: Path) -> None:
    written.save(tmp_path / "s")
    config = json.loads((tmp_path / "s" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["target_modules"] == ["model.layers.2.mlp.down_proj"]
    assert config["bias"] == "none" and not config["use_dora"] and config["modules_to_save"] is None


def test_edits_that_a_lower_rank_loses_are_named(
    written: EditStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written.write_many([OTHER, THIRD])
    assert all(edit.holds for edit in written.verify())
    monkeypatch.setattr(export_module, "RANKS", (1,))
    whole = logits(written.model)
    written.save(tmp_path / "s")
    record = json.loads((tmp_path / "s" / "edits.json").read_text())
    lost = record["lora"]["lost"]
    assert record["lora"]["rank"] == 1 and 1 <= len(lost) <= 3 and set(lost) <= {edit.id for edit in written.edits}
    assert torch.equal(logits(written.model), whole)


def test_stores_of_two_layers_or_metrics_are_not_merged(base: Any) -> None:
    one = store(base)
    one.write(**FACT)
    one.close()
    for options, words in (
        ({"layer": 3}, "edit blocks 3 and 2"),
        ({"metric": "identity"}, "have the metrics identity"),
    ):
        other = store(base, **options)
        with pytest.raises(NPTError, match=words):
            other.merge(one)
        other.close()


def test_a_merge_refuses_two_targets_of_one_prompt(base: Any) -> None:
    one = store(base)
    one.write(**{**FACT, "target": "Rome"})
    one.close()
    other = store(base)
    other.write(**FACT)
    with pytest.raises(DataError, match="has the target 'cat' already"):
        other.merge(one)
    assert [edit.request.target for edit in other.edits] == ["cat"]
    other.close()


def test_the_identity_metric_needs_no_text(base: Any) -> None:
    found = store(base, metric="identity", statistics="self")
    found.write(**FACT)
    assert found.edits[0].holds and found.source.name == "identity"


def test_a_model_that_is_not_here_is_refused() -> None:
    base = random_base("llama", torch.float32).to("meta")
    with pytest.raises(ConversionError, match="edits need the whole model in one process"):
        store(base, spelling_tokenizer())
