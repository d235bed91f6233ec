"""Command lines, and the folders of runs that some commands show."""

from __future__ import annotations

from tests.catalogue.entries import Entry, bad_run, sets

PROMPT = ("--checkpoint", "{adapter}", *sets("model.base_model_name={model}"))
ARGUMENTS = [
    Entry("prompt: empty", ("generate", "", *PROMPT), ("prompt 1, ''", "is blank", "write some text"), script=True),
    Entry(
        "prompt: white space", ("generate", "a", " \n", *PROMPT), ("prompt 2, ' \\n'", "is blank", "write some text")
    ),
    Entry("prompt: unknown bytes", ("generate", "caf\udce9", *PROMPT), ("prompt 1, 'caf\\udce9'", "write it in UTF-8")),
    Entry(
        "prompt: longer than the context",
        ("generate", "a" * 200, *PROMPT),
        ("prompt 1", "more than the model's context of 128", "shorten"),
    ),
    Entry(
        "prompt: a continuation longer than the context",
        ("generate", "a", "--max-new-tokens", "128", *PROMPT),
        ("--max-new-tokens 128", "more than the model's context of 128", "shorten"),
    ),
    Entry("prompt: none", ("generate",), ("Missing argument", "see npt generate --help")),
    Entry(
        "tokens: none", ("generate", "a", "--max-new-tokens", "0"), ("--max-new-tokens", "1", "see npt generate --help")
    ),
    Entry(
        "tokens: text",
        ("generate", "a", "--max-new-tokens", "few"),
        ("--max-new-tokens", "integer", "see npt generate --help"),
    ),
    Entry(
        "tokens: a line break",
        ("generate", "a", "--max-new-tokens", "1\n2"),
        ("--max-new-tokens", "see npt generate --help"),
    ),
    Entry("command: unknown", ("fly",), ("No such command 'fly'", "see npt --help"), script=True),
    Entry("command: an escape", ("\x1b[31mfly",), ("No such command", "x1b[31mfly", "see npt --help")),
    Entry("option: unknown", ("train", "--fast"), ("--fast", "see npt train --help")),
    Entry("init: unknown preset", ("init", "--preset", "tiny"), ("--preset", "optimized", "see npt init --help")),
    Entry("init: no YAML", ("init", "small"), ("npt init small", "end the name in .yaml")),
    Entry("init: unknown base", ("init", "--model", "builtin:huge"), ("builtin:huge", "no such name in the package")),
    Entry(
        "init: a file is there", ("init", "c.yaml"), ("c.yaml: is there already", "--force"), {"c.yaml": b"model: {}\n"}
    ),
    Entry(
        "init: a folder that can't be", ("init", "c.yaml/d.yaml"), ("c.yaml is a file", "name another"), {"c.yaml": b""}
    ),
    Entry("option: misspelt", ("train", "--confg", "x"), ("--confg", "did you mean --config?", "see npt train --help")),
    Entry(
        "option: misspelt before the command",
        ("--quite", "train"),
        ("--quite", "did you mean --quiet?", "see npt --help"),
    ),
    Entry(
        "option: after the command", ("train", "--quiet"), ("--quiet", "goes before the command", "npt --quiet train")
    ),
    Entry("command: misspelt", ("trian",), ("No such command 'trian'", "Did you mean 'train'?")),
    Entry("option: without its value", ("train", "--config"), ("--config", "see npt --help")),
    Entry("option: missing", ("evaluate",), ("Missing option '--checkpoint'", "see npt evaluate --help")),
    Entry(
        "limit: no size",
        ("memory", "--limit", "12parsecs"),
        ("--limit 12parsecs: not a size", "such as 24GiB"),
        script=True,
    ),
    Entry("limit: negative", ("memory", "--limit=-1GiB"), ("--limit -1GiB: not a size", "such as 24GiB")),
    Entry(
        "output: under a file",
        ("evaluate", "--checkpoint", "{adapter}", "--output", "f/r.json", *sets("model.base_model_name={model}")),
        ("--output f/r.json: can't be made, f is a file", "name another folder"),
        {"f": b"x"},
        script=True,
    ),
    Entry(
        "output: a folder",
        ("evaluate", "--checkpoint", "{adapter}", "--output", "d.json"),
        ("--output d.json: is a folder", "name a file in it"),
        {"d.json/x": b""},
    ),
    Entry(
        "output: the page's own name",
        ("evaluate", "--checkpoint", "{adapter}", "--output", "report.html"),
        ("--output report.html: can't be written as '.html'", "end the name in .json"),
    ),
    Entry(
        "output: no such user",
        ("evaluate", "--checkpoint", "{adapter}", "--output", "~no-such-user/r.json"),
        ("--output ~no-such-user/r.json", "no home folder for ~no-such-user", "write the whole path"),
    ),
    Entry(
        "output: output_dir of no such user",
        ("train", *sets("paths.output_dir=~no-such-user/o")),
        ("paths.output_dir", "no home folder for ~no-such-user", "write the whole path"),
    ),
    Entry(
        "checkpoint: of no such user",
        ("generate", "hello", "--checkpoint", "~no-such-user/a"),
        ("--checkpoint ~no-such-user/a", "no home folder for ~no-such-user", "write the whole path"),
    ),
    Entry(
        "output: output_dir under a file",
        ("train", *sets("paths.output_dir=f/o")),
        ("paths.output_dir=f/o: can't be made, f is a file", "name another folder"),
        {"f": b"x"},
    ),
    Entry(
        "output: checkpoint_dir is a file",
        ("train", *sets("paths.checkpoint_dir=f")),
        ("paths.checkpoint_dir=f: can't be made", "name another folder"),
        {"f": b"x"},
    ),
    Entry(
        "output: a name too long",
        ("train", *sets(f"paths.output_dir={'a' * 300}")),
        ("paths.output_dir=aaa", "can't be made (File name too long)", "name another folder"),
    ),
    Entry("tasks: of no text", ("make-tasks", "t"), ("'--text'", "see npt make-tasks --help")),
    Entry(
        "tasks: of a missing text",
        ("make-tasks", "t", "--text", "nowhere.txt"),
        ("--text", "nowhere.txt", "no such file"),
    ),
    Entry(
        "tasks: of too little text",
        ("make-tasks", "t", "--text", "a.txt"),
        ("--text a.txt: has 0 passages", "--items 200 needs 200", "name more text", "--words"),
        {"a.txt": b"One day it rained. Then it stopped."},
        script=True,
    ),
    Entry(
        "tasks: a folder with files",
        ("make-tasks", "t", "--text", "a.txt"),
        ("t: is there and not empty", "name a new folder"),
        {"t/x": b"", "a.txt": b"One day it rained. Then it stopped."},
    ),
    Entry(
        "tasks: under a file",
        ("make-tasks", "f/t", "--text", "a.txt"),
        ("f/t: can't be made, f is a file", "name another folder"),
        {"f": b"x", "a.txt": b"One day it rained. Then it stopped."},
    ),
    Entry(
        "tasks: one item",
        ("make-tasks", "t", "--text", "a.txt", "--items", "1"),
        ("--items", "see npt make-tasks --help"),
    ),
    Entry(
        "lm-eval: no adapter to leave the base out of",
        ("lm-eval", "--no-base", "--tasks", "x"),
        ("lm-eval --no-base: only --checkpoint FOLDER", "leave --no-base out"),
    ),
    Entry("merge: none", ("merge-adapters", "-o", "m"), ("Missing argument", "see npt merge-adapters --help")),
    Entry(
        "merge: without an output",
        ("merge-adapters", "{adapter}", "{adapter}"),
        ("'--output'", "see npt merge-adapters --help"),
    ),
    Entry("merge: one", ("merge-adapters", "{adapter}", "-o", "m"), ("nothing to join", "two adapter folders or more")),
    Entry(
        "merge: one twice",
        ("merge-adapters", "{adapter}", "{adapter}", "-o", "m"),
        ("checkpoint", "is named twice", "name each adapter once"),
        script=True,
    ),
    Entry(
        "merge: a missing one",
        ("merge-adapters", "{adapter}", "nowhere", "-o", "m"),
        ("checkpoint nowhere: no adapter folder there", "run `npt train` first"),
    ),
    Entry(
        "merge: an output under a file",
        ("merge-adapters", "{adapter}", "nowhere", "-o", "f/m"),
        ("--output=f/m: can't be made, f is a file", "name another folder"),
        {"f": b"x"},
    ),
    Entry(
        "merge: an output that is full",
        ("merge-adapters", "{adapter}", "nowhere", "-o", "d"),
        ("--output=d: is there and not empty", "name a new folder"),
        {"d/x": b""},
    ),
]

GOOD_ROW = b'{"step": 1, "loss": 1.0, "eval_mean_kl": 0.1}\n'
RUNS = [
    bad_run("missing folder", "plot nothing", {}, "nothing: no metrics.jsonl there", "run `npt train` first"),
    bad_run("a file", "plot run/f", {"f": b"x"}, "run/f", "no metrics.jsonl"),
    bad_run("not JSON", "plot run", {"metrics.jsonl": b"{\n" + GOOD_ROW}, "metrics.jsonl line 1: not JSON", "remove"),
    bad_run("not an object", "plot run", {"metrics.jsonl": b"[1]\n"}, "line 1: not a JSON object but list", "remove"),
    bad_run("empty", "plot run", {"metrics.jsonl": b""}, "no logged step to draw", "train longer"),
    bad_run("text for a loss", "plot run", {"metrics.jsonl": b'{"step": 1, "loss": "low"}\n'}, "run", "malformed"),
    bad_run(
        "a list for a report", "plot run", {"metrics.jsonl": GOOD_ROW, "evaluation_report.json": b"[]"},
        "evaluation_report.json: not a JSON object", "write it again",
    ),
    bad_run(
        "a number for a section", "plot run", {"metrics.jsonl": GOOD_ROW, "evaluation_report.json": b'{"evaluations": 3}'},
        "malformed", "restore the file",
    ),
    bad_run("missing folder", "report nothing", {}, "nothing: neither evaluation_report.json nor metrics.jsonl", "run"),
    bad_run("a file", "report run/f", {"f": b"x"}, "run/f: neither evaluation_report.json nor", "run"),
    bad_run("missing folder", "compare nothing", {}, "nothing: neither evaluation_report.json nor metrics", "name a run"),
    bad_run("no run", "compare", {}, "Missing argument", "see npt compare --help"),
    bad_run(
        "deep", "compare run", {"evaluation_report.json": b"[" * 100_000}, "evaluation_report.json: not JSON",
        "write it again",
    ),
    bad_run(
        "text for a section", "compare run", {"evaluation_report.json": b'{"evaluations": {"corpora": "x"}}'}, "run",
        "malformed",
    ),
    bad_run(
        "unknown picture", "compare run --output p.xyz", {"metrics.jsonl": GOOD_ROW},
        "--output p.xyz: can't be written as '.xyz'", "end the name in .png",
    ),
    bad_run(
        "output under a file", "compare run --output run/metrics.jsonl/p.png", {"metrics.jsonl": GOOD_ROW},
        "can't be made, run/metrics.jsonl is a file", "name another folder",
    ),
    bad_run("missing folder", "watch nothing --once", {}, "nothing: no metrics.jsonl there", "name the output folder"),
    bad_run("a file", "watch run/f --once", {"f": b"x"}, "run/f: no metrics.jsonl", "name the output folder"),
    bad_run("text for a step", "watch run --once", {"metrics.jsonl": b'{"step": 1, "loss": "x"}\n'}, "run", "malformed"),
    bad_run("no time", "watch run --interval 0", {"metrics.jsonl": GOOD_ROW}, "--interval", "0.1", "see npt watch --help"),
    bad_run("NaN seconds", "watch run --once --interval nan", {"metrics.jsonl": GOOD_ROW}, "--interval", "3600"),
]  # fmt: skip
