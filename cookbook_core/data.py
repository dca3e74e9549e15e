"""Datasets by name or path, in the columns TRL's users already have; and which rows a step uses.

Four kinds of names:

    tiny/NAME                 bundled with this package (see cookbook_core/assets/data)
    FILE.jsonl .json .csv .parquet
    FOLDER                    with train.jsonl and perhaps test.jsonl, or from save_to_disk
    OWNER/NAME[:CONFIG]       on the Hugging Face hub

Text is UTF-8. Nothing is dropped in silence: a row that lacks a value is an error with its line.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cookbook_core.errors import (
    ConfigError,
    DataError,
    check_choice,
    check_text,
    message,
    nearest,
    raise_all,
)
from cookbook_core.paths import usable_path

Row = dict[str, Any]
Columns = Sequence[str] | Sequence[Sequence[str]]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_KINDS = (
    "Accepted: tiny/NAME (bundled), a .jsonl, .json, .csv or .parquet file, a folder with "
    "train.jsonl, a folder from save_to_disk, or OWNER/NAME[:CONFIG] on the Hugging Face hub."
)


def asset_path(*parts: str) -> Path:
    """Locate a file bundled with this package, such as `asset_path("data", "sft_train.jsonl")`."""
    return Path(__file__).parent.joinpath("assets", *parts)


def load_rows(dataset: str, columns: Columns, split: str = "train") -> list[Row]:
    """Read one split of a dataset, keeping the columns asked for.

    Args:
        dataset: a name or path, see the top of this file.
        columns: the columns needed, or alternatives to choose from; the first alternative of which
            the dataset has every column is used: `[("prompt", "completion"), ("messages",)]`.
        split: the name of the split; a single file is "train".
    Returns:
        One dict per row, in file order, with exactly the columns of that alternative. Values of a
        .csv are strings.
    Raises:
        DataError: no such dataset or split; broken text (`file.jsonl:17`); no rows; columns
            missing; a row whose value is missing, None or empty.
    """
    return _select(dataset, _open_splits(dataset), split, columns)


def train_test(
    dataset: str, columns: Columns, test_rows: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Load rows to train on and `test_rows` others to evaluate on.

    A dataset with a "test" split gives the first `test_rows` of it; from any other, as many rows
    drawn with `seed` are held out of "train", so no row is in both (equal rows may be).

    Raises:
        DataError: as for load_rows, and when too few rows are there.
    """
    if not isinstance(test_rows, int) or test_rows < 1:
        raise ConfigError(message("test_rows", "no number of rows", "an integer >= 1", test_rows))
    _check_seed(seed)
    splits = _open_splits(dataset)
    train = _select(dataset, splits, "train", columns)
    if "test" in splits:
        test = _select(dataset, splits, "test", columns)
        if len(test) < test_rows:
            rule = f"test_rows <= {len(test)}"
            raise DataError(message(f"{dataset} (test split)", "too few rows", rule, test_rows))
        return train, test[:test_rows]
    if len(train) <= test_rows:
        rule = f"test_rows < {len(train)}, the rows there are"
        raise DataError(message(dataset, "holding out leaves no row to train on", rule, test_rows))
    held_out = random.Random(seed).sample(range(len(train)), test_rows)
    rest = set(held_out)
    return [row for i, row in enumerate(train) if i not in rest], [train[i] for i in held_out]


def batch_indices(num_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Say which rows optimizer step `step` (from 0) uses; no earlier step need have run.

    The rows are dealt in epochs: each epoch is all rows once, in an order of its own drawn from
    (seed, epoch). Batches are cut from that endless deal, so one may end an epoch and begin the
    next. Resuming at step n needs nothing but n.

    Returns:
        batch_size row numbers, each in [0, num_rows).
    Raises:
        ConfigError: batch_size not in 1..num_rows (a larger batch would only repeat rows).

    >>> sorted(batch_indices(6, 3, step=0, seed=1) + batch_indices(6, 3, step=1, seed=1))
    [0, 1, 2, 3, 4, 5]
    """
    for name, value in {"num_rows": num_rows, "batch_size": batch_size, "step": step}.items():
        if not isinstance(value, int):
            raise ConfigError(message(name, "wrong type", "an integer", f"{value!r:.80}"))
    _check_seed(seed)
    if not 1 <= batch_size <= num_rows:
        mend = "Lower batch_size or give more rows."
        raise ConfigError(
            message(
                "Config.batch_size", "does not fit the rows", f"1..{num_rows}", batch_size, mend
            )
        )
    places = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(num_rows, place // num_rows, seed)[place % num_rows] for place in places]


def _check_seed(seed: object) -> None:
    if not isinstance(seed, int):
        check_text(ConfigError, "seed", seed)


@functools.lru_cache(maxsize=4)
def _epoch_order(num_rows: int, epoch: int, seed: int) -> tuple[int, ...]:
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _select(dataset: str, splits: Mapping[str, Any], split: str, columns: Columns) -> list[Row]:
    """Read one split and keep the first alternative of columns that it has; see load_rows."""
    alternatives: Any = [columns] if _are_names(columns) else columns
    listed = isinstance(alternatives, (list, tuple)) and alternatives
    if not listed or not all(map(_are_names, alternatives)):
        rule = 'names such as ["prompt"], or alternatives of them'
        raise ConfigError(message("columns", "not a list", rule, repr(columns)))
    choices: list[tuple[str, ...]] = [tuple(choice) for choice in alternatives]
    check_choice(DataError, dataset, f'no split "{split!s:.80}"', split, splits)
    rows = list(_read(dataset, splits[split]))
    if not rows:
        raise DataError(message(dataset, f'split "{split}" is empty', "at least 1 row", 0))
    found = sorted({key for _, row in rows for key in row})
    chosen = next((choice for choice in choices if set(choice) <= set(found)), None)
    if chosen is None:
        lacking = [name for choice in choices for name in choice if name not in found]
        rule = " or ".join(" + ".join(choice) for choice in choices)
        mend = f'No column "{lacking[0]}". {nearest(lacking[0], found)}'
        raise DataError(message(dataset, "columns are missing", rule, ", ".join(found), mend))
    problems = [
        message(where, f'column "{name}" has no value', "a value", repr(row.get(name)))
        for where, row in rows
        for name in chosen
        if row.get(name) is None or row[name] in ("", [], {})
    ]
    raise_all(DataError, problems)
    return [{name: row[name] for name in chosen} for _, row in rows]


def _are_names(choice: Any) -> bool:
    listed = isinstance(choice, (list, tuple)) and bool(choice)
    return listed and all(isinstance(name, str) for name in choice)


# ---- where rows come from ------------------------------------------------------------------


def _open_splits(dataset: str) -> Mapping[str, Any]:
    """Map the dataset's split names to a file (Path) or to a table of the `datasets` library."""
    path = usable_path("dataset", dataset, DataError)
    if dataset.startswith("tiny/"):
        return _bundled(dataset.removeprefix("tiny/"))
    if path.is_file() and path.suffix in SUFFIXES:
        return {"train": path}
    if path.is_dir():
        files = {p.stem: p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES}
        if "train" in files:
            return {split: files[split] for split in ("train", "test") if split in files}
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            import datasets

            held: Any = datasets.load_from_disk(str(path))
            splits: Any = held if isinstance(held, datasets.DatasetDict) else {"train": held}
            return splits
        names = [p.name for p in sorted(path.iterdir())[:10]]
        raise DataError(message(dataset, "no dataset in this folder", "train.jsonl", names, _KINDS))
    if path.exists() or path.suffix in SUFFIXES or dataset[:1] in ("", "/", ".", "~"):
        what = "not a dataset file" if path.exists() else "no such file"
        raise DataError(message(dataset, what, "a dataset", "none there", _KINDS))
    import datasets

    name, _, config = dataset.partition(":")
    try:
        loaded: Any = datasets.load_dataset(name, config or None)
        return loaded
    except Exception as error:  # hub, network and format errors share no base class
        text = message(dataset, "cannot be loaded", "a dataset", f"{type(error).__name__}: {error}")
        raise DataError(f"{text} {_KINDS}") from error


def _bundled(name: str) -> dict[str, Path]:
    folder = asset_path("data")
    stems = {path.stem for path in folder.glob("*.jsonl") if not path.stem.endswith("_test")}
    names = {stem.removesuffix("_train") for stem in stems}
    check_choice(DataError, f"tiny/{name}", "no such bundled dataset", name, names)
    if name in stems:
        return {"train": folder / f"{name}.jsonl"}
    files = {split: folder / f"{name}_{split}.jsonl" for split in ("train", "test")}
    return {split: path for split, path in files.items() if path.exists()}


def _read(dataset: str, source: Path | Iterable[Row]) -> Iterable[tuple[str, Row]]:
    """Yield (where, row); `where` is file:line, or [row] where there are no lines."""
    if isinstance(source, Path):
        return _read_file(source)
    return ((f"{dataset}[{i}]", dict(row)) for i, row in enumerate(source))


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(message(path.name, "broken", "a parquet file", error)) from error
        yield from ((f"{path.name}[{i}]", row) for i, row in enumerate(rows))
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")  # UTF-8; a byte order mark is skipped
    except UnicodeDecodeError as error:
        where = f"{path.name}:{error.object[: error.start].count(10) + 1}"
        raise DataError(message(where, "not UTF-8", "UTF-8 text", str(error))) from error
    if path.suffix == ".csv":
        yield from _parse_csv(path.name, text)
    elif path.suffix == ".json" and text.lstrip().startswith("["):
        rows = _parse_json(path.name, 1, text)
        for i, row in enumerate(rows):
            yield f"{path.name}[{i}]", _as_row(f"{path.name}[{i}]", row)
    else:
        # not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{path.name}:{number}"
                yield where, _as_row(where, _parse_json(path.name, number, line))


def _parse_json(name: str, first_line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{name}:{first_line + error.lineno - 1}"
        near = text[max(0, error.pos - 20) : error.pos + 20]
        what = f"broken JSON, {error.msg} at column {error.colno}"
        mend = "Write one JSON object per line." if name.endswith(".jsonl") else ""
        raise DataError(message(where, what, "valid JSON", repr(near), mend)) from error
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        where, near = f"{name}:{first_line}", f"{text[:40]!r}..."
        what = f"JSON that cannot be read, {error}"
        raise DataError(message(where, what, "a row of text and numbers", near)) from error


def _parse_csv(name: str, text: str) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{name}:{reader.line_num}"
            if None in row:
                got = len(reader.fieldnames or ()) + len(row[None])
                rule = f"{len(reader.fieldnames or ())} as in the header"
                raise DataError(
                    message(where, "too many fields", rule, got, 'Quote fields: "a, b".')
                )
            yield where, row
    except csv.Error as error:
        where = f"{name}:{reader.line_num}"
        raise DataError(message(where, "broken CSV", "quoted fields", error)) from error


def _as_row(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise DataError(message(where, "not a row", "a JSON object {...}", repr(row)[:80]))
    return row
