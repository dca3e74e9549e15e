"""A file of rows, one by one: .jsonl, .json, .csv or .parquet, in UTF-8.

Lines may end in LF or CRLF, and a byte order mark is skipped. In a .csv, which holds nothing but
text, a conversation is its JSON.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from cookbook_core.errors import DataError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) as they are read; `where` is file:line, or file[row] without lines.

    Raises:
        DataError: broken text or JSON, with its line; not UTF-8; compressed.
    """
    if path.suffix.lower() == ".parquet":
        yield from _read_parquet(path)
        return
    with open(path, "rb") as file:
        start = file.read(3)
    if start[:2] == b"\x1f\x8b":
        mend = f"Unpack it: gunzip < {path.name} > rows{path.suffix}"
        raise DataError(path.name, "compressed by gzip", expected="UTF-8 text", got=start, fix=mend)
    # "\n": not at U+2028 and the like, which JSON strings may hold; "": as csv wants it
    newline = "" if path.suffix.lower() == ".csv" else "\n"
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            if path.suffix.lower() == ".csv":
                yield from _parse_csv(path.name, file)
            elif path.suffix.lower() == ".json":
                yield from _parse_json_file(path.name, file)
            else:
                yield from _parse_lines(path.name, file)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, start) from error


def without_nulls(row: Mapping[str, Any]) -> Row:
    """A row of a table, whose messages all have every key: those without a value are left out."""
    return {
        name: [_held(item) for item in value] if isinstance(value, list) else value
        for name, value in row.items()
    }


def _held(item: Any) -> Any:
    if not isinstance(item, dict) or "role" not in item:
        return item
    return {key: value for key, value in item.items() if value is not None or key == "content"}


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield f"{path.name}[{number}]", without_nulls(row)
                    number += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(path.name, "broken", expected="a parquet file", got=error) from error


def _not_utf8(path: Path, start: bytes) -> DataError:
    """Say on which line; the decoder itself knows only a place in a buffer."""
    try:
        path.read_bytes().decode("utf-8")
        where, got = path.name, "other bytes"
    except UnicodeDecodeError as error:
        where = f"{path.name}:{error.object[: error.start].count(10) + 1}"
        got = str(error)
    utf16 = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    mend = "It is UTF-16, as PowerShell's > writes: save it as UTF-8." if utf16 else ""
    return DataError(where, "not UTF-8", expected="UTF-8 text", got=got, fix=mend)


def _parse_lines(name: str, lines: TextIO, first: int = 1) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, start=first):
        if line.strip():
            where = f"{name}:{number}"
            yield where, _as_row(where, _parse_json(name, number, line.rstrip()))


def _parse_json_file(name: str, file: TextIO) -> Iterator[tuple[str, Row]]:
    """A .json file: one list of rows, or else a row in each line."""
    text = file.read()
    if text.lstrip().startswith("["):
        for i, row in enumerate(_parse_json(name, 1, text)):
            yield f"{name}[{i}]", _as_row(f"{name}[{i}]", row)
    else:
        file.seek(0)
        yield from _parse_lines(name, file)


def _parse_json(name: str, first_line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{name}:{first_line + error.lineno - 1}"
        near = text[max(0, error.pos - 20) : error.pos + 20]
        what = f"broken JSON, {error.msg.removesuffix(' starting at')} at column {error.colno}"
        mend = "Write one JSON object per line." if name.endswith(".jsonl") else ""
        raise DataError(where, what, expected="valid JSON", got=repr(near), fix=mend) from error
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        where, near = f"{name}:{first_line}", f"{text[:40]!r}..."
        what = f"JSON that cannot be read, {error}"
        raise DataError(where, what, expected="a row of text and numbers", got=near) from error


def _parse_csv(name: str, file: TextIO) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            where = f"{name}:{reader.line_num}"
            if None in row:
                got = len(reader.fieldnames or ()) + len(row[None])
                rule = f"{len(reader.fieldnames or ())} as in the header"
                raise DataError(
                    where, "too many fields", expected=rule, got=got, fix='Quote fields: "a, b".'
                )
            yield where, {key: _csv_value(where, key, value) for key, value in row.items()}
    except csv.Error as error:
        where = f"{name}:{reader.line_num}"
        raise DataError(where, "broken CSV", expected="quoted fields", got=error) from error


def _csv_value(where: str, column: str, text: str | None) -> Any:
    """The text of a field; where it is the JSON of messages, these."""
    if not text or not re.match(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:", text):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        what, rule = (
            f'column "{column}" looks like messages but is no JSON',
            "what json.dumps gives",
        )
        mend = "Write messages with json.dumps, or the whole as .jsonl or .parquet."
        raise DataError(where, what, expected=rule, got=repr(text[:60]), fix=mend) from error


def _as_row(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise DataError(where, "not a row", expected="a JSON object {...}", got=repr(row)[:80])
    return row
