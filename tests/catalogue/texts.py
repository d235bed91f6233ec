"""Text to train on and to evaluate on."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pyarrow

from tests.catalogue.entries import Entry, bad_chat, bad_data, parquet, sets


def lines(**row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


HELLO = {"role": "user", "content": "hi"}
MANY = lines(messages=[HELLO]) * 99
ZSTD = pyarrow.compress(b"text\n" + b"words\n" * 99, "zstd", asbytes=True)

LINES = b'{"text": "one"}\n'
DATA = [
    Entry(
        "data: missing",
        ("train", *sets("data.dataset_name=text", "data.data_files=[none.txt]")),
        ("none.txt: no such file", "check data.data_files"),
    ),
    Entry(
        "data: a glob without a match",
        ("train", *sets("data.dataset_name=text", "data.data_files=['*.jsonl']")),
        ("*.jsonl: no such file", "check data.data_files"),
    ),
    Entry(
        "data: a name too long",
        ("train", *sets("data.dataset_name=text", f"data.data_files=[{'a' * 3000}.txt]")),
        ("can't be looked up", "check data.data_files"),
    ),
    Entry(
        "data: no such user",
        ("train", *sets("data.dataset_name=text", "data.data_files=['~no-such-user/a.txt']")),
        ("data.data_files", "~no-such-user/a.txt", "no home folder for ~no-such-user", "write the whole path"),
    ),
    Entry(
        "data: no such user, in an option",
        (
            "evaluate",
            "--checkpoint",
            "{adapter}",
            "--text",
            "~no-such-user/a.txt",
            *sets("model.base_model_name={model}"),
        ),
        ("~no-such-user/a.txt", "no home folder for ~no-such-user", "check --text"),
    ),
    Entry(
        "data: a folder",
        ("train", *sets("data.dataset_name=text", "data.data_files=[d]")),
        ("d: is a folder", "name its files, for example d/*.txt"),
        {"d/a.txt": b"text"},
    ),
    bad_data("empty.txt", b"", "is empty", "give a file with text"),
    bad_data("blank.txt", b" \n\t\n", "holds only white space", "give a file with text"),
    bad_data("binary.txt", b"ab\0cd", "binary, not text (a NUL at offset 2)", "save it as UTF-8", script=True),
    bad_data("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8 (byte 0xe9 at offset 3)", "save it as UTF-8"),
    bad_data("utf16.txt", "hello".encode("utf-16"), "not UTF-8 (byte 0xff at offset 0)"),
    bad_data("note.docx", b"x", "unknown kind of file '.docx'", "use .txt"),
    bad_data("none", b"x", "unknown kind of file ''", "use .txt"),
    bad_data("bad.jsonl", LINES + b'{"text": \n', "line 2: not JSON", "one JSON object per line", script=True),
    bad_data("array.jsonl", b'[{"text": "a"}]\n', "line 1: list, not an object", "one JSON object per line"),
    bad_data("entries.json", b'[{"text": "a"}, 3]\n', "entry 2: int, not an object", "write a list of objects"),
    bad_data("open.json", b'[{"text": "a"},\n', "not JSON", "one list of objects, or one object per line"),
    bad_data("none.json", b"[]", "holds only white space", "give a file with text"),
    bad_data("pretty.json", b'{\n  "text": "a"\n}\n', "line 1: not JSON"),
    bad_data("text.jsonl", b'"text"\n', "line 1: str, not an object"),
    bad_data("nan.jsonl", b"NaN\n", "line 1: float, not an object"),
    bad_data("number.jsonl", LINES + b'{"text": 3}\n', "line 2: column 'text' holds int", "data.text_column"),
    bad_data("nan-text.jsonl", b'{"text": NaN}\n', "line 1: column 'text' holds float"),
    bad_data("list.jsonl", b'{"text": ["a"]}\n', "line 1: column 'text' holds list"),
    bad_data("column.jsonl", b'{"body": "a"}\n', "line 1: no column 'text' (there are: body)", "data.text_column"),
    bad_data("column2.jsonl", b'{"body": "a", "n": 1}\n', "name one with text in data.text_column: body"),
    bad_data(
        "chat.parquet", parquet(messages=[["a"]]), "no column 'text' (there are: messages)", "a chat is a list of"
    ),
    bad_data(
        "torn.txt.gz", gzip.compress(b"some text " * 99)[:-9], "not a whole gzip file (Truncated", "pack it again"
    ),
    bad_data("torn.csv.zst", ZSTD[:-9], "not a whole zstd file (Truncated compressed stream)", "pack it again"),
    bad_data(
        "plain.jsonl.gz", LINES, "not a whole gzip file", "unpack it and name the file that comes out", script=True
    ),
    bad_data("plain.txt.zst", b"text", "not a whole zstd file", "pack it again"),
    bad_data("blank.txt.gz", gzip.compress(b""), "holds only white space"),
    bad_data(
        "torn.parquet.gz", gzip.compress(parquet(text=["a"])[:60]), "not a readable parquet file", "write it again"
    ),
    bad_data("note.docx.gz", b"x", "unknown kind of file '.docx.gz'", "use .txt, .jsonl, .json, .csv, .tsv, .parquet"),
    bad_data(
        "header.csv", b"some text,more\n1,2\n", "line 1, which names the columns: no column 'text' (there are: some"
    ),
    bad_data(
        "ragged.csv", b'text,n\n"a, b",1\na, b,1\n', "line 3: 3 fields where the first line names 2", "double quotes"
    ),
    bad_data("short.csv", b"n,text\n1\n", "line 2: 1 fields where the first line names 2 columns"),
    bad_data("twice.csv", b"text,text\na,b\n", "column 'text' stands there twice"),
    bad_data("quote.csv", b'text\n"a"b\n', "line 2: not a table of text", "double quotes"),
    bad_data("open.csv", b'text\n"a\n\nb\n', "line 4: not a table of text (unexpected end of data)", script=True),
    bad_data("mac.csv", b"text\ra\rb\r", "line 1: not a table of text"),
    bad_data("nul.tsv", b"text\na\0b\n", "line 2: binary, not text (a NUL at offset 1)"),
    bad_data("latin.csv", b"text\ncaf\xe9\n", "line 2: not UTF-8 (byte 0xe9 at offset 3)", "save it as UTF-8"),
    bad_data("utf16.tsv", "text\nx".encode("utf-16"), "line 1: not UTF-8 (byte 0xff at offset 0)"),
    bad_data("names.csv", b"text\n", "holds only white space"),
    bad_data("semicolon.csv", b"n;text\n1;a\n", "no column 'text' (there are: n;text)"),
    bad_data(
        "inside.jsonl",
        b'{"a": {"b": {"c": "x"}}, "n": 1}\n',
        "no column 'a.c' (there are: a.b.c, n)",
        "data.text_column: a.b.c",
        more=("data.text_column=a.c",),
    ),
    bad_data("inside.parquet", parquet(a=[{"b": 1, "c": "x"}]), "there are: a.b, a.c", "data.text_column: a.c"),
    bad_chat(
        "role", [{"role": "narrator", "content": "x"}], "message 1: unknown role 'narrator'", "rename it to one of"
    ),
    bad_chat("from", [{"from": "bot", "value": "x"}], "message 1: unknown role 'bot'"),
    bad_chat(
        "keys", [{"speaker": "user", "text": "x"}], "message 1: has the keys speaker, text", "a chat is a list of"
    ),
    bad_chat("null", [{"role": "user", "content": None}], "message 1: its content is NoneType, not text"),
    bad_chat("whole number", [{"from": "gpt", "value": 3}], "message 1: its value is int, not text"),
    bad_chat("picture", [{"role": "user", "content": [{"type": "image_url"}]}], "a part of kind 'image_url'", "take"),
    bad_chat("mixed", [{"role": "user", "content": "x"}, "y"], "message 2: str 'y' is no message"),
    bad_data("both.jsonl", lines(messages=[HELLO], conversations=[HELLO]), "chats in messages and in conversations"),
    bad_data("string.jsonl", lines(messages="[]"), "no column 'text' (there are: messages)"),
    bad_data("tools.jsonl", lines(messages=[HELLO], tools="{"), "line 1, column 'messages': 'tools' is not JSON"),
    bad_data(
        "chat.jsonl", MANY, "chat.jsonl, line 1", "no chat template", "put a chat_template.jinja into", script=True
    ),
    bad_data("plain.jsonl", LINES, "is text, and data.score=replies is for chats", more=("data.score=replies",)),
    bad_data("numbers.jsonl", b'{"n": 1}\n', "none holds text", "write each row's text into a column"),
    bad_data("escape.jsonl", b'{"\\u001b[31m": "a"}\n', "no column 'text' (there are: \\x1b[31m)"),
    bad_data("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "line 1: not JSON"),
    bad_data("digits.jsonl", b'{"text": ' + b"9" * 10_000 + b"}\n", "line 1: not JSON"),
    bad_data("pair.jsonl", b'{"text": "\\ud800"}\n', "line 1: column 'text' holds half a surrogate pair", "UTF-8"),
    bad_data("nul.jsonl", LINES + b'{"te\0xt": 1}\n', "line 2: binary, not text"),
    bad_data("latin.jsonl", b'{"text": "\xe9"}\n', "line 1: not UTF-8 (byte 0xe9"),
    bad_data("blank.jsonl", b'{"text": " "}\n{"text": null}\n', "holds only white space"),
    bad_data("torn.parquet", parquet(text=["a"])[:60], "not a readable parquet file", "write it again"),
    bad_data("text.parquet", b"hello", "not a readable parquet file", "write it again"),
    bad_data("column.parquet", parquet(body=["a"]), "no column 'text' (there are: body)", "data.text_column"),
    bad_data("number.parquet", parquet(text=[1]), "column 'text' holds int64", "none holds text"),
    bad_data("lists.parquet", parquet(text=[["a"]]), "column 'text' holds list"),
    bad_data("null.parquet", parquet(text=pyarrow.array([None], pyarrow.string())), "holds only white space"),
    Entry(
        "data: too short for two blocks",
        (
            "train",
            *sets("data.dataset_name=text", "data.data_files=[short.txt]", "model.base_model_name={model}"),
            *sets("data.eval_texts=[]"),
        ),
        ("the text makes 1 block(s)", "give more text, or lower data.max_length"),
        {"short.txt": b"A few words."},
    ),
    Entry(
        "data: one block to train on",
        (
            "train",
            *sets("data.dataset_name=text", "data.data_files=[short.txt]", "model.base_model_name={model}"),
            *sets("data.max_length=16", "data.eval_texts=[]"),
        ),
        ("1 block(s) of data.max_length=16 to train on", "give more text, or lower data.max_length"),
        {"short.txt": b"A few words are not so many words."},
    ),
    Entry(
        "data: evaluated on and trained on",
        ("train", *sets("data.dataset_name=text", "data.data_files=[a.txt]", "data.eval_texts=[a.txt]")),
        ("data.eval_texts: a.txt would be evaluated on after training on it", "take it out"),
        {"a.txt": b"text"},
    ),
    Entry(
        "data: evaluated on and trained on, by another name",
        ("train", *sets("data.dataset_name=text", "data.data_files=['*.txt']", "data.eval_texts=[d/../a.txt]")),
        ("data.eval_texts: d/../a.txt is also in data.data_files", "take it out of one"),
        {"a.txt": b"text " * 400, "d/b.md": b""},
    ),
    Entry(
        "data: evaluated on and calibrated with",
        ("train", *sets("data.calibration_files=[./a.txt]", "data.eval_texts=[a.txt]")),
        ("data.eval_texts: a.txt is also in data.calibration_files", "take it out of one"),
        {"a.txt": b"text"},
    ),
    Entry(
        "data: one document over and over",
        (
            "train",
            *sets("data.dataset_name=text", "data.data_files=[a.jsonl]", "data.max_length=32"),
            *sets("data.num_train_samples=40", "data.num_eval_samples=4", "model.base_model_name={model}"),
        ),
        ("a.jsonl: all", "were trained on, and nothing is left", "data.score_seen_text=true"),
        {"a.jsonl": b'{"text": "The same document again and again, word for word."}\n' * 60},
    ),
    Entry(
        "data: blocks beyond the model's context",
        (
            "train",
            *sets("data.dataset_name=text", "data.data_files=[a.txt]", "data.max_length=129"),
            *sets("model.base_model_name={model}"),
        ),
        ("data.max_length=129 is above the model's context of 128 tokens", "lower it"),
        {"a.txt": b"text " * 400},
    ),
    Entry(
        "data: evaluation beyond the model's context",
        ("evaluate", "--checkpoint", "{adapter}", *sets("data.max_length=129", "model.base_model_name={model}")),
        ("data.max_length=129 is above the model's context of 128 tokens", "lower it"),
    ),
    Entry(
        "data: missing calibration text",
        ("train", *sets("data.calibration_files=[none.jsonl]")),
        ("none.jsonl: no such file", "check data.calibration_files"),
    ),
    Entry(
        "data: missing evaluation text",
        ("train", *sets("data.eval_texts=[none.txt]")),
        ("none.txt: no such file", "check data.eval_texts"),
    ),
    Entry(
        "data: a hub data set out of reach",
        ("train", *sets("data.dataset_name=no-such-org/no-such-set", "model.base_model_name=no/model")),
        ("data.dataset_name='no-such-org/no-such-set'", "can't be loaded", "check the name and the network"),
    ),
    Entry(
        "data: --text that is missing",
        ("evaluate", "--checkpoint", "{adapter}", "--text", "none.txt", *sets("model.base_model_name={model}")),
        ("none.txt: no such file", "check --text"),
    ),
]
