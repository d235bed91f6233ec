"""The kinds of file that hold text: how each is opened and taken apart into documents, in one table.

Files are read here line by line and not by the builders of `datasets`, which take "NA" and empty fields of a csv for nulls,
guess the type of a column from its first rows, fill up short rows, and name no line of a file that they can't read.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow
import pyarrow.parquet

from npt.common.display import one_line
from npt.data.documents import (
    JSON,
    Document,
    column_problem,
    columns_to_read,
    document_of,
    kinds_of_schema,
    without_plain,
)
from npt.errors import DataError

#: (path, its bytes unpacked, data.text_column) -> its documents.
Reader = Callable[[Path, BinaryIO, str], Iterator[Document]]
#: Endings of packed files, and the name that pyarrow has for each; it comes with both.
PACKED = {".gz": "gzip", ".zst": "zstd"}
_ROWS = 1024


def kind_of(path: Path) -> tuple[str, str]:
    """(kind of file, way of packing or ""), the two endings of its name in small letters, such as (".csv", ".gz")."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1] if suffixes and suffixes[-1] in PACKED else ""
    rest = suffixes[:-1] if packed else suffixes
    return (rest[-1] if rest else ""), packed


def is_text_name(name: str | Path) -> bool:
    """True for a name that ends as one of a file that is read."""
    return kind_of(Path(name))[0] in READERS


def short_name(path: Path) -> str:
    """The name of a file without its folder and the endings of its kind."""
    return path.name.removesuffix(path.suffix).removesuffix(Path(path.stem).suffix) if kind_of(path)[1] else path.stem


def kinds() -> str:
    """The endings that are read, for messages."""
    return f"{', '.join(READERS)}, each also with {' or '.join(PACKED)} after it"


def read_documents(path: Path, text_column: str, *, chats_only: bool = False) -> Iterator[Document]:
    """The documents of one file that aren't blank; a file without any is an error.

    Args:
        chats_only: text is an error too.
    """
    (kind, packed), empty = kind_of(path), True
    reader = READERS.get(kind)
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a folder; {_files_in(path)}")
        if reader is None:
            raise DataError(f"{path}: unknown kind of file '{kind + packed}'; use {kinds()}")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty; give a file with text")
        with ExitStack() as opened:
            for document in reader(path, _unpacked(path, packed, opened), text_column):
                if isinstance(document, str) and not document.strip():
                    continue
                empty = False
                yield without_plain(document, str(path), chats_only)
    except OSError as error:
        if packed and error.errno is None:  # pyarrow's, of what is in the file
            why = one_line(error, 100)
            raise DataError(
                f"{path}: not a whole {PACKED[packed]} file ({why}); pack it again, or unpack it and name the file that comes "
                "out"
            ) from error
        raise DataError(f"{path}: can't be read ({one_line(error.strerror or error, 200)}); check the file") from error
    if empty:
        raise DataError(f"{path}: holds only white space; give a file with text")


def _unpacked(path: Path, packed: str, opened: ExitStack) -> BinaryIO:
    if not packed:
        return opened.enter_context(path.open("rb"))
    file = opened.enter_context(path.open("rb"))
    stream = opened.enter_context(pyarrow.CompressedInputStream(file, PACKED[packed]))
    return opened.enter_context(io.BufferedReader(stream))


def _files_in(folder: Path) -> str:
    """The remedy where a folder is named for its files."""
    for pattern in ("", "**"):
        found = (path for path in folder.glob(f"{pattern}/*".strip("/")) if is_text_name(path))
        if (path := next(found, None)) is not None:
            ending = path.name[-len("".join(kind_of(path))) :]
            return f"name its files, for example {folder / pattern / f'*{ending}'}"
    return f"it holds no file of a kind that is read ({kinds()}); name another"


def _decode(data: bytes, place: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise DataError(f"{place}: not UTF-8 ({bad}); save it as UTF-8 text") from error
    if "\0" in text:
        raise DataError(f"{place}: binary, not text (a NUL at offset {text.index(chr(0))}); save it as UTF-8 text")
    return text


def _read_txt(path: Path, file: BinaryIO, text_column: str) -> Iterator[Document]:
    yield _decode(file.read(), str(path)).replace("\r\n", "\n")


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, data in enumerate(file, start=1):
        yield _decode(data, f"{path}, line {number}")


def _read_jsonl(path: Path, file: BinaryIO, text_column: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(path, file), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield document_of(_json_row(line, place), text_column, place)


def _read_json(path: Path, file: BinaryIO, text_column: str) -> Iterator[Document]:
    """A file that is one list of objects, as chats are often kept; else an object a line."""
    buffered: Any = file
    if not buffered.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_jsonl(path, file, text_column)
        return
    try:
        rows = json.loads(_decode(file.read(), str(path)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); write one list of objects, or one object per line") from error
    for number, row in enumerate(rows, start=1):
        place = f"{path}, entry {number}"
        if not isinstance(row, dict):
            raise DataError(f"{place}: {type(row).__name__}, not an object; write a list of objects")
        yield document_of(row, text_column, place)


def _json_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); write one JSON object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: {type(row).__name__}, not an object; write one JSON object per line")
    return row


def _read_csv(path: Path, file: BinaryIO, text_column: str, separator: str = ",") -> Iterator[Document]:
    """Rows of a table whose first line names the columns, as RFC 4180 has it."""
    csv.field_size_limit(2**31 - 1)  # of this process; else a document of more than 128 KiB would be an error
    rows = csv.reader(_lines(path, file), delimiter=separator, strict=True)
    header: list[str] | None = None
    try:
        for fields in rows:
            place = f"{path}, line {rows.line_num}"
            if not fields:
                continue
            if header is None:
                header = fields
                if header.count(text_column) > 1:
                    raise DataError(f"{place}: column '{text_column}' stands there twice; write it again with one")
                if text_column not in header:
                    problem = column_problem(text_column, dict.fromkeys(header, "string"))
                    raise DataError(f"{place}, which names the columns: {problem}")
            elif len(fields) != len(header):
                raise DataError(
                    f"{place}: {len(fields)} fields where the first line names {len(header)} columns; put text that holds "
                    'a separator, a quote or a line break in double quotes, and write its own quotes twice ("")'
                )
            else:
                yield document_of(dict(zip(header, fields, strict=True)), text_column, place)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {rows.line_num}: not a table of text ({one_line(error, 100)}); put text that holds a separator, a "
            'quote or a line break in double quotes, and write its own quotes twice ("")'
        ) from error


def _read_tsv(path: Path, file: BinaryIO, text_column: str) -> Iterator[Document]:
    return _read_csv(path, file, text_column, "\t")


def _read_parquet(path: Path, file: BinaryIO, text_column: str) -> Iterator[Document]:
    try:
        source: Any = path if file.seekable() else pyarrow.BufferReader(file.read())
        with pyarrow.parquet.ParquetFile(source) as table:
            names, kinds = table.schema_arrow.names, kinds_of_schema(table.schema_arrow)
            columns = columns_to_read(names, text_column, kinds)
            if not columns:
                raise DataError(f"{path}: {column_problem(text_column, kinds)}")
            if twice := next((name for name in columns if names.count(name) > 1), None):
                raise DataError(f"{path}: column '{twice}' stands there twice; write it again with one")
            batches = table.iter_batches(batch_size=_ROWS, columns=columns)
            rows: Iterator[Any] = (row for batch in batches for row in batch.to_pylist())
            if any(JSON in kind for kind in kinds.values()):
                features = datasets.Features.from_arrow_schema(table.schema_arrow)
                rows = map(datasets.Features({name: features[name] for name in columns}).decode_example, rows)
            for number, row in enumerate(rows, start=1):
                yield document_of(row, text_column, f"{path}, row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        why = one_line(error, 200)
        raise DataError(f"{path}: not a readable parquet file ({why}); write it again") from error


READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
