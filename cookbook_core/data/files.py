"""Read the rows of one file: .jsonl, .json, .csv or .parquet, in UTF-8.

Lines may end in LF or CRLF, and a byte order mark is skipped. A .csv may be separated by commas,
semicolons or tabs: the first of these in its header. Its values are strings, except conversations,
which are written as JSON.

Not read with the `datasets` library: its errors name no line, its .csv turns the answer 007 into
7.0 and True into a bool, its .json turns dates into datetime, and each file is first copied to its
cache.
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
    """Yield (where, row) lazily; `where` is file:line, or file[row] in a format without lines.

    Raises:
        DataError: broken text or JSON, with its line; not UTF-8; compressed; not a parquet file.
    """
    if path.suffix.lower() == ".parquet":
        yield from _read_parquet(path)
        return
    with open(path, "rb") as file:
        start = file.read(3)
    if start[:2] == b"\x1f\x8b":
        fix = f"Unpack it: gunzip < {path.name} > rows{path.suffix}"
        raise DataError(path.name, "compressed by gzip", expected="UTF-8 text", fix=fix)
    # "\n": no line break at U+2028 and the like, which JSON may contain; "": required by csv
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
    """Drop the keys without a value from a table's messages, tools and template arguments.

    In a table every message has every key, and every tool call the arguments of all tools.
    """
    return {
        name: _without_null_keys(value)
        if name in ("tools", "chat_template_kwargs") or are_messages(value)
        else value
        for name, value in row.items()
    }


def are_messages(value: Any) -> bool:
    """Whether a value of a row is a conversation."""
    return isinstance(value, list) and any(isinstance(m, dict) and "role" in m for m in value)


def _without_null_keys(item: Any) -> Any:
    if isinstance(item, list):
        return [_without_null_keys(part) for part in item]
    if not isinstance(item, dict):
        return item
    kept = {k: v for k, v in item.items() if v is not None or (k == "content" and "role" in item)}
    return {key: _without_null_keys(value) for key, value in kept.items()}


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=100):
                for row in batch.to_pylist():
                    yield f"{path.name}[{number}]", without_nulls(row)
                    number += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        fix = "Write it again, as with pandas.DataFrame.to_parquet()."
        raise DataError(path.name, "not a readable parquet file", got=error, fix=fix) from error


def _not_utf8(path: Path, start: bytes) -> DataError:
    """Find the line of the first wrong byte, which the decoder's error does not know."""
    try:
        path.read_bytes().decode("utf-8")
        where, got = path.name, "other bytes"
    except UnicodeDecodeError as error:
        where = f"{path.name}:{error.object[: error.start].count(10) + 1}"
        got = str(error)
    fix = f"Convert it: iconv -f latin1 -t utf-8 {path.name} > utf8{path.suffix}"
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        fix = "It is UTF-16, as PowerShell's > writes: save it as UTF-8."
    return DataError(where, "not UTF-8", expected="UTF-8 text", got=got, fix=fix)


def _parse_lines(name: str, lines: TextIO, first: int = 1) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, start=first):
        if line.strip():
            where = f"{name}:{number}"
            yield where, _as_row(where, _parse_json(name, number, line.rstrip()))


def _parse_json_file(name: str, file: TextIO) -> Iterator[tuple[str, Row]]:
    """Read a .json file: one list of rows, or else one row per line."""
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
        form = "object per line" if name.endswith(".jsonl") else "array of objects"
        fix = f"Write one JSON {form}."
        raise DataError(where, what, got=repr(near), fix=fix) from error
    except (ValueError, RecursionError) as error:  # a number too long, or nested too deeply
        where, near = f"{name}:{first_line}", f"{text[:40]!r}..."
        what = f"JSON that cannot be read, {error}"
        raise DataError(where, what, expected="a row of text and numbers", got=near) from error


def _parse_csv(name: str, file: TextIO) -> Iterator[tuple[str, Row]]:
    header = re.sub(r'"[^"]*"', "", file.readline())
    file.seek(0)
    separator = next((mark for mark in ",;\t" if mark in header), ",")
    reader = csv.DictReader(file, delimiter=separator, strict=True)
    try:
        for row in reader:
            where = f"{name}:{reader.line_num}"
            if None in row:
                columns = len(reader.fieldnames or ())
                rule, got = f"{columns} as in the header", columns + len(row[None])
                fix = f'Quote fields that contain the separator: "a{separator} b".'
                raise DataError(where, "too many fields", expected=rule, got=got, fix=fix)
            yield where, {key: _csv_value(where, key, value) for key, value in row.items()}
    except csv.Error as error:
        where, fix = f"{name}:{reader.line_num}", 'Close every quote; write a quote inside as "".'
        raise DataError(where, "broken CSV", got=error, fix=fix) from error


def _csv_value(where: str, column: str, text: str | None) -> Any:
    """Return the text of a field, or the messages that it has as JSON."""
    if not text or not re.match(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:", text):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        what = f'column "{column}" looks like messages but is not valid JSON'
        fix = "Write messages with json.dumps(), or the file as .jsonl or .parquet."
        raise DataError(where, what, got=repr(text[:60]), fix=fix) from error


def _as_row(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        rule, fix = "a JSON object {...}", 'Write each row as {"column": value, ...}.'
        raise DataError(where, "not a row", expected=rule, got=repr(row)[:80], fix=fix)
    return row
