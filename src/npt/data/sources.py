"""Documents from the hub or from local txt, jsonl and parquet files, read through `datasets`."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from npt.errors import DataError

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_documents(
    dataset_name: str,
    *,
    dataset_config: str | None = None,
    data_files: Sequence[str | Path] = (),
    split: str = "train",
    text_column: str = "text",
    cache_dir: str | None = None,
) -> Any:
    """An indexable sequence of text documents.

    Args:
        dataset_name: a hub id, or "text" for `data_files`: .txt (one document a file), .jsonl and .parquet with
            `text_column`; glob patterns are expanded.

    Raises:
        DataError: every file that is missing, empty, not UTF-8, malformed or without the column, all in one message; a
            hub id that can't be loaded.
    """
    if dataset_name == "text":
        return _local_documents([Path(p) for p in data_files], text_column, cache_dir)
    try:
        table = datasets.load_dataset(dataset_name, dataset_config, split=split, cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"data.dataset_name={dataset_name!r} can't be loaded ({reason}); check the name and the network, or use "
            "dataset_name=text with data_files=[...], or dataset_name=self"
        ) from error
    if text_column not in table.column_names:
        raise DataError(
            f"data.text_column={text_column!r} is not in {dataset_name}; it has {', '.join(table.column_names)}"
        )
    return table[text_column]


def _local_documents(patterns: list[Path], text_column: str, cache_dir: str | None) -> list[str]:
    if not patterns:
        raise DataError("data.dataset_name=text needs data.data_files, a list of .txt, .jsonl or .parquet files")
    files, problems = _expand(patterns)
    documents: list[str] = []
    for file in files:
        try:
            documents += _read(file, text_column)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    if not any(document.strip() for document in documents):
        raise DataError(f"{', '.join(map(str, files))}: nothing but white space; give files with text")
    return documents


def _expand(patterns: list[Path]) -> tuple[list[Path], list[str]]:
    files: list[Path] = []
    problems = []
    for pattern in patterns:
        found = (
            [pattern] if pattern.is_file() else sorted(Path(p) for p in glob.glob(str(pattern)) if Path(p).is_file())
        )
        if not found:
            problems.append(f"{pattern}: no such file; check data.data_files and data.calibration_files")
        files += found
    for file in files:
        if file.suffix.lower() not in READERS:
            problems.append(f"{file}: unknown kind {file.suffix!r}; use {', '.join(READERS)}")
    return [file for file in files if file.suffix.lower() in READERS], problems


def _read(file: Path, text_column: str) -> list[str]:
    """The documents of one file; its errors name the line or column."""
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty; give one with text")
    kind = READERS[file.suffix.lower()]
    if kind == "parquet":
        return _read_parquet(file, text_column)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8; convert it, e.g. iconv -t utf-8") from error
    if "\0" in text:
        raise DataError(f"{file}: holds NUL bytes, so it is not text; give a text file")
    if kind == "text":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            documents.append(_json_document(file, number, line, text_column))
    return documents


def _json_document(file: Path, number: int, line: str, text_column: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{file} line {number}: not a JSON object ({error.msg}); mend or remove the line") from error
    if not isinstance(row, dict) or text_column not in row:
        columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{file} line {number}: no column {text_column!r} (it has {columns}); set data.text_column")
    if not isinstance(row[text_column], str):
        kind = type(row[text_column]).__name__
        raise DataError(f"{file} line {number}: column {text_column!r} is {kind}, not text; set data.text_column")
    return str(row[text_column])


def _read_parquet(file: Path, text_column: str) -> list[str]:
    try:
        schema = pyarrow.parquet.read_schema(file)
        if text_column not in schema.names:
            raise DataError(
                f"{file}: no column {text_column!r} (it has {', '.join(schema.names)}); set data.text_column"
            )
        values = pyarrow.parquet.read_table(file, columns=[text_column])[text_column].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({' '.join(str(error).split())[:100]})") from error
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{file}: column {text_column!r} is not all text; set data.text_column to one that is")
    return [str(value) for value in values]
