"""Edits, files of them, and folders of stores."""

from __future__ import annotations

import json
from typing import Any

from tests.catalogue.entries import Entry

BASE = ("--model", "{model}", "--layer", "1")
FACT = ("--prompt", "the home of Ada is", "--subject", "Ada", "--target", "Oslo")
GOOD = {
    "format_version": 1, "base": "nowhere", "layer": 1, "module": "model.layers.1.mlp.down_proj", "metric": "text self",
    "ridge": "auto", "chosen_ridge": 0.0, "lora": {"rank": 8, "lost": []},
    "pairs": "edits-000000000000.safetensors", "edits": [], "base_fingerprint": None,
}  # fmt: skip
EDIT = {
    "prompt": "the home of Ada is", "target": "Oslo", "subject": "Ada", "paraphrases": [], "protect": [], "id": "3a826fc0",
    "layer": 1, "values": "newton", "passes": 3, "before": "", "after": "", "holds": True, "note": "",
}  # fmt: skip


def bad_file(name: str, content: str | bytes, *words: str, script: bool = False) -> Entry:
    """A file of edits."""
    data = content.encode() if isinstance(content, str) else content
    return Entry(
        f"edits: {name}", ("edit", "write", "--store", "s", *BASE, "--file", "e.jsonl"), words, {"e.jsonl": data},
        script=script,
    )  # fmt: skip


def bad_write(name: str, arguments: tuple[str, ...], *words: str, files: dict[str, bytes] | None = None) -> Entry:
    """Options of `npt edit write`."""
    return Entry(f"edit: {name}", ("edit", "write", "--store", "s", *arguments), words, files or {})


def bad_store(name: str, record: Any, *words: str, command: str = "list", script: bool = False) -> Entry:
    """The edits.json of a store: values that replace good ones, or bytes."""
    content = record if isinstance(record, bytes) else json.dumps({**GOOD, **record}).encode()
    arguments = ("edit", *command.split(), "--store", "s")
    return Entry(f"store: {name}", arguments, words, {"s/edits.json": content}, script=script)


EDITS = [
    bad_file("empty", "", "e.jsonl: holds no edit", "write lines such as"),
    bad_file("not JSON", '{"prompt": "a"', "e.jsonl line 1: not JSON", "write one object a line", script=True),
    bad_file("a list", "[1]\n", "e.jsonl line 1: not a JSON object but list", "write one object a line"),
    bad_file("not UTF-8", b"\xff\xfe", "e.jsonl: is not UTF-8", "save it as UTF-8"),
    bad_file("deep", "[" * 100_000, "e.jsonl line 1: not JSON"),
    bad_file("no target", '{"prompt": "a b"}\n', "e.jsonl line 1: target is missing", "a prompt and a target"),
    bad_file("an unknown name", '{"prompt": "a", "taget": "b"}\n', "line 1: unknown name 'taget'", "use prompt, target"),
    bad_file("a blank prompt", '{"prompt": " ", "target": "b"}\n', "line 1, prompt: is blank", "write some text"),
    bad_file("a number for a target", '{"prompt": "a", "target": 3}\n', "line 1, target=3: use text"),
    bad_file(
        "a subject that is not there", '{"prompt": "a b", "target": "c", "subject": "d"}\n',
        "line 1: the subject 'd' does not stand in the prompt 'a b'", "write it as the prompt has it",
    ),
    bad_file(
        "text for a list", '{"prompt": "a b", "target": "c", "paraphrases": "d"}\n', "paraphrases='d': use a list of texts"
    ),
    bad_file(
        "two targets", '{"prompt": "a b", "target": "c"}\n\n{"prompt": "a b", "target": "d"}\n',
        "e.jsonl line 3: 'a b' has the target 'c' already, by", "line 1", "leave one of the two out",
    ),
    bad_file(
        "one edit twice", '{"prompt": "a b", "target": "c"}\n' * 2, "line 2: 'a b' has that target already", "leave it out"
    ),
    bad_file(
        "half a character", '{"prompt": "a \\ud800", "target": "c"}\n', "line 1, prompt=", "write it in UTF-8"
    ),
    bad_write("a file that is not there", (*BASE, "--file", "e"), "e: can't be read (No such file", "JSON lines"),
    bad_write("a file and a prompt", (*BASE, "--file", "e", "--prompt", "a"), "--file e: goes without --prompt"),
    bad_write("no target", (*BASE, "--prompt", "a"), "give --prompt and --target, or --file"),
    bad_write("no base", FACT, "--model: no base is named", "builtin:smollm2-135m"),
    bad_write("a base that is not there", ("--model", "nowhere", *FACT), "nowhere", "can't be loaded"),
    bad_write("a layer that is no number", (*BASE[:2], "--layer", "first", *FACT), "--layer first: use 'auto' or a number"),
    bad_write("layers that are no numbers", (*BASE[:2], "--layer", "1,x", *FACT), "--layer x: use 'auto' or a number"),
    bad_write("a layer twice", (*BASE[:2], "--layer", "1,1", *FACT), "layer=[1, 1]: use 'auto', or the index of a block",
              "each once"),
    bad_write("margin on two blocks", (*BASE[:2], "--layer", "1,2", "--values", "margin", *FACT),
              "values='margin' is for the last block, layer=3, and the store edits block 1 2"),
    bad_write("a limit that leaves nothing", (*BASE, "--limit", "0", *FACT), "--limit 0: use nats above 0"),
    Entry("edit: steps below zero", ("edit", "refine", "--store", "s", "--steps", "-1"),
          ("--steps -1: use a whole number from 0 to 100,000",), {}),
    Entry("edit: a store to train that is not there", ("edit", "refine", "--store", "s"),
          ("store s: no edits.json there",), {}),
    bad_store("steps that are none", {"refine": {"steps": -1, "terminator": None}}, "edits.json: refine={'steps': -1",
              "is not what npt writes there"),
    bad_store("a block that was not trained", {"trained": [7]}, "edits.json: trained=[7] is not what npt writes there"),
    bad_write("a ridge that is no number", (*BASE, "--ridge", "x", *FACT), "--ridge x: use 'auto' or a number"),
    bad_write("text that is not there", (*BASE, "--statistics", "t.txt", *FACT), "t.txt: no such file", "--statistics"),
    bad_write("an unknown metric", (*BASE, "--metric", "none", *FACT), "metric='none' is unknown; use domain, text"),
    bad_write("unknown values", (*BASE, "--values", "best", *FACT), "values='best' is unknown; use newton"),
    bad_write("a layer too high", (*BASE[:2], "--layer", "40", *FACT), "layer=40: the model has 4 blocks; use 0 to 3"),
    bad_write("a store under a file", (*BASE, *FACT),
              "store=s: can't be made, s is a file", "name another folder", files={"s": b""}),
    bad_write("a folder of something else", (*BASE, *FACT), "store s: is there and holds no edits.json", "another folder",
              files={"s/notes.txt": b"mine"}),
    Entry("store: none", ("edit", "list", "--store", "s"), ("store s: no edits.json there", "npt edit write")),
    Entry("store: no option", ("edit", "list"), ("Missing option '--store'", "see npt edit list --help")),
    Entry("edit: unknown command", ("edit", "fly"), ("No such command 'fly'", "see npt edit --help")),
    bad_store("not JSON", b"{", "store s: edits.json is not a JSON object", "restore it from a backup", script=True),
    bad_store("a list", b"[]", "store s: edits.json: not a JSON object but list", "restore it"),
    bad_store("deep", b"[" * 100_000, "store s: edits.json is not a JSON object", "restore it"),
    bad_store("of a newer npt", {"format_version": 9}, "format_version=9 was written by a newer npt", "upgrade npt"),
    bad_store("no version", {"format_version": "1"}, "format_version=1 is no whole number", "restore it"),
    bad_store("falling layers", {"format_version": 3, "layer": [2, 1]}, "layer=[2, 1] is not what npt writes there"),
    bad_store("several layers in an old store", {"layer": [1, 2]}, "layer=[1, 2] is not what npt writes there"),
    bad_store("a layer below 0", {"layer": -1}, "layer=-1 is not what npt writes there"),
    bad_store("text for a layer", {"layer": "x"}, "layer='x' is not what npt writes there"),
    bad_store("a path for a file", {"pairs": "../x.safetensors"}, "pairs='../x.safetensors' is not what npt writes there"),
    bad_store("no keys", {"edits": [EDIT], "base": "builtin:tiny"}, "edits-000000000000.safetensors can't be read",
              command="verify"),
    bad_store("a cap that is no number", {"chosen_cap": "x"}, "chosen_cap='x' is not what npt writes there"),
    bad_store("a ridge below 0", {"chosen_ridge": -1}, "chosen_ridge=-1 is not what npt writes there"),
    bad_store("NaN for a ridge", {"ridge": float("nan")}, "ridge=nan is not what npt writes there"),
    bad_store("an edit that is a number", {"edits": [3]}, "edit 1 is not an object but int"),
    bad_store("an edit without a prompt", {"edits": [{**EDIT, "prompt": None}]}, "edit 1 is damaged", "prompt"),
    bad_store("text for passes", {"edits": [{**EDIT, "passes": "3"}]}, "edit 1 is damaged (passes='3')"),
    bad_store("another id", {"edits": [{**EDIT, "id": "00000000"}]}, "edit 1 has the id '00000000', which does not belong"),
    bad_store("an edit twice", {"edits": [EDIT, EDIT]}, "edit 2 has the id"),
    bad_store("an unknown edit", {"edits": [EDIT]}, "'x': no edit of s has that id", "npt edit list", command="undo x"),
    bad_store(
        "no weights", {"edits": [EDIT]}, "store s: adapter_model.safetensors can't be read",
        command="export --output o",
    ),
    bad_store("a GGUF file of another name", {}, "adapter_model", command="export --format gguf --output o.bin"),
    bad_store("merged with itself", {}, "nothing to join", "two stores or more", command="merge s s"),
]  # fmt: skip
