"""`npt bench editing`: its options, files of records, files of figures."""

from __future__ import annotations

import json
from typing import Any

from tests.catalogue.entries import Entry

RECORD = {
    "prompt": "the home of Ada is", "subject": "Ada", "target_new": "Oslo", "rephrase_prompt": "a house of Ada is in",
    "locality_prompt": "the home of Cam is", "case_id": 4,
}  # fmt: skip
GOOD = json.dumps([RECORD]).encode()
#: A file of figures: one row of one record.
ROW: dict[str, Any] = {
    "method": "newton", "batch": 1, "sequential": False, "sizes": [1], "asked": "0",
    "records": {
        "efficacy": [1], "paraphrase": [1], "locality": [1], "ordering": [None], "forced": [1], "forced_all": [1],
        "fluency": [None], "fluency_change": [None],
    },
    "batches": {
        "kl": [0.1], "rise": [0], "skill": [None], "skill_change": [None], "seconds": [1], "passes": [3], "bytes": [8],
    },
    "examples": [],
}  # fmt: skip
FIGURES: dict[str, Any] = {"format_version": 1, "about": {}, "arguments": {}, "rows": [ROW]}


def bad_bench(name: str, arguments: tuple[str, ...], *words: str, **files: bytes) -> Entry:
    """Options beside a good file of records."""
    found = {"r.json": GOOD, **{file.replace("_", "."): content for file, content in files.items()}}
    given = ("bench", "editing", "--records", "r.json", "--model", "{model}", *arguments)
    return Entry(f"bench: {name}", given, words, found)


def bad_worlds(name: str, arguments: tuple[str, ...], *words: str, **files: bytes) -> Entry:
    """Options beside --factworld."""
    found = {file.replace("_", "."): content for file, content in files.items()}
    return Entry(f"bench worlds: {name}", ("bench", "editing", "--factworld", "llama", *arguments), words, found)


def bad_records(name: str, content: str, *words: str) -> Entry:
    """A file of records."""
    return Entry(
        f"bench records: {name}", ("bench", "editing", "--records", "r.json"), words, {"r.json": content.encode()}
    )


def bad_figures(name: str, content: Any, *words: str, script: bool = False) -> Entry:
    """A file of figures for --from: values that replace good ones, or bytes."""
    data = content if isinstance(content, bytes) else json.dumps({**FIGURES, **content}).encode()
    return Entry(
        f"bench figures: {name}", ("bench", "editing", "--from", "f.json"), words, {"f.json": data}, script=script
    )


def row(**changes: Any) -> dict[str, Any]:
    return {"rows": [{**ROW, **changes}]}


BENCH = [
    Entry("bench: nothing to do", ("bench", "editing"), ("give --records FILE or --factworld NAME", "--from FILE")),
    Entry("bench: unknown command", ("bench", "fly"), ("No such command 'fly'", "see npt bench --help")),
    bad_bench("an unknown method", ("--method", "newton", "best"), "--method best: no method has that name; use newton"),
    bad_bench("an option of no form", ("--option", "newton.clamp"), "--option 'newton.clamp': use METHOD.NAME=VALUE"),
    bad_bench("an unknown option", ("--option", "newton.clam=3"), "--option newton.clam=3: no setting of values", "margin"),
    bad_bench("an option out of range", ("--option", "newton.steps=0"), "--option newton.steps=0: use a whole number from 1"),
    bad_bench(
        "several blocks for a method of one", ("--option", "margin.layers=(1,2,3)"),
        "--option margin.layers=(1, 2, 3): margin edits one block; name it alone, as in (2,)",
    ),
    bad_bench(
        "an option of a method that is not measured", ("--method", "naive", "--option", "newton.steps=3"),
        "--option newton: --method does not name newton",
    ),
    bad_bench("an unknown figure", ("--with", "speed"), "--with speed: no figure has that name; use fluency, skill"),
    bad_bench("an unknown metric", ("--metric", "none"), "--metric none: is unknown; use domain, text, identity"),
    bad_bench("a batch of none", ("--batch", "1", "0"), "--batch 0: use a whole number from 1"),
    bad_bench("a batch that is too large", ("--batch", "1", "8"), "--batch 8: more than the 1 records there are", "smaller"),
    bad_bench("no records", ("--limit", "0"), "--limit 0: use a whole number from 1"),
    bad_bench("draws of single edits", ("--draws", "3"), "--draws 3: draws batches of more than one record", "--batch"),
    bad_bench(
        "more draws than records", ("--batch", "2", "--draws", "2"),
        "--batch 2 --draws 2: 4 records, of the 3 there are, none twice; use at most 1 draw of 2",
        r_json=json.dumps([RECORD] * 3).encode(),
    ),
    bad_bench("single edits in turn", ("--sequential", "--batch", "1"), "--sequential: a batch of 1 has no order", "leave"),
    bad_bench("falling layers", ("--layers", "3", "1"), "--layers 3 1: use block indices from 0, each once, rising"),
    bad_bench("a layer too high", ("--layers", "40"), "layers=(40,): the model has 4 blocks; use 0 to 3"),
    bad_bench("text that is not there", ("--text", "t.txt"), "--text t.txt: can't be read", "name a UTF-8 text file"),
    bad_bench("an output of another kind", ("--output", "o.csv"), "--output o.csv: can't be written as '.csv'", ".json"),
    bad_bench("a page of another kind", ("--page", "p.pdf"), "--page p.pdf: can't be written as '.pdf'", ".html"),
    bad_bench(
        "an output that holds something else", ("--output", "o.json"), "--output o.json: holds no figures", "--output",
        o_json=b"{}",
    ),
    bad_bench(
        "an output of other arguments", ("--output", "o.json"), "--output o.json: was begun with --model not given",
        "use the same arguments, or name another file", o_json=json.dumps(FIGURES).encode(),
    ),
    bad_bench(
        "records that were tuned on", ("--tuned-on", "d.json"),
        "--records r.json: record 1 ('the home of Ada is') is record 1 of --tuned-on d.json too", "nothing was chosen on",
        d_json=json.dumps([{**RECORD, "prompt": "the house of Ada is"}]).encode(),
    ),
    bad_bench("a base that is not there", ("--model", "nowhere"), "nowhere", "can't be loaded"),
    bad_bench("records and kept figures", ("--from", "f.json"), "--from: goes without --records"),
    Entry("bench: limit and kept figures", ("bench", "editing", "--from", "f.json", "--limit", "2"),
          ("--from: goes without --limit", "measured already")),
    bad_bench("records and worlds", ("--factworld", "llama"), "--factworld: goes without --records", "bring their models"),
    bad_bench("a seed of records", ("--seed", "1"), "--seed: goes with --factworld"),
    bad_bench("edits of records", ("--edits", "8"), "--edits: goes with --factworld", "--factworld llama gpt2"),
    bad_worlds("a page", ("--page", "p.html"), "--factworld: goes without --page"),
    bad_worlds("kept figures", ("--from", "f.json"), "--factworld: goes without --from"),
    bad_worlds("an unknown model", ("bert",), "--factworld bert: use llama or gpt2"),
    bad_worlds("more edits than people", ("--edits", "1", "900"), "edits=900: the world has 308 people"),
    bad_worlds("no edit", ("--edits", "0"), "edits=0", "use 1 to 308"),
    bad_worlds("a layer too high", ("--layers", "4"), "--layers 4: the model has 4 blocks; use 0 to 3"),
    bad_worlds("an unknown option", ("--option", "margin.clam=3"), "--option margin.clam=3: no setting of values"),
    bad_worlds("an option of another method", ("--option", "newton.clamp=3"), "--option newton: --method does not name"),
    bad_worlds(
        "an output that holds something else", ("--output", "o.json"),
        "--output o.json: holds no figures of npt bench editing --factworld", o_json=json.dumps(FIGURES).encode(),
    ),
    bad_worlds(
        "an output of other arguments", ("--output", "o.json"), "--output o.json: was begun with --layers not given",
        o_json=json.dumps({"format_version": 1, "about": {}, "arguments": {}, "results": []}).encode(),
    ),
    bad_records("empty", "", "r.json: not JSON", "name a JSON file of records"),
    bad_records("an object", "{}", "r.json: holds no list of records"),
    bad_records("of no format", '[{"prompt": "a b"}]', "r.json record 1: KeyError('subject')", "use CounterFact's format"),
    bad_records("deep", "[" * 100_000, "r.json: not JSON"),
    Entry("bench figures: missing", ("bench", "editing", "--from", "f.json"), ("--from f.json: can't be read (No such file",)),
    Entry(
        "bench figures: twice", ("bench", "editing", "--from", "f.json", "f.json"), ("--from: names a file twice",),
        {"f.json": json.dumps(FIGURES).encode()},
    ),
    bad_figures("not JSON", b"{", "--from f.json: not JSON", "name a file of --output", script=True),
    bad_figures("a list", b"[]", "--from f.json: holds no figures of npt bench editing", "name a file of --output"),
    bad_figures("deep", b"[" * 100_000, "--from f.json: not JSON"),
    bad_figures("of a newer npt", {"format_version": 9}, "format_version=9 was written by a newer npt; upgrade npt"),
    bad_figures("no row", {"rows": []}, "--from f.json: holds no row; run its command again"),
    bad_figures("text for a figure", row(batches={**ROW["batches"], "kl": ["x"]}), "rows.0.batches.kl.0", "valid number"),
    bad_figures("NaN for a figure", row(batches={**ROW["batches"], "kl": [float("nan")]}), "rows.0.batches.kl.0", "finite"),
    bad_figures("no efficacy", row(records={**ROW["records"], "efficacy": [None]}), "efficacy has a record without a figure"),
    bad_figures("a figure too few", row(batches={"kl": [0.1]}), "the figures lack bytes"),
    bad_figures("an unknown figure", row(records={**ROW["records"], "luck": [1]}), "no figure is named luck"),
    bad_figures("other records than its batches", row(sizes=[2]), "its figures are not of the records in sizes"),
    bad_figures("more than its batches", row(sizes=[]), "its figures are not of the batches in sizes"),
    bad_figures("unfinished", row(sizes=[1, 1]), "--from f.json: newton has 1 of 2 batches; run its command again"),
]  # fmt: skip
