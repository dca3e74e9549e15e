"""Rows of a dataset, in the columns that TRL uses, and the rows of each optimizer step.

cookbook_core/data/sources.py explains the names and paths of datasets (`NAME@TRAIN/TEST`). No row
is dropped silently: one that lacks a value raises an error with its line.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cookbook_core.data.files import Row
from cookbook_core.data.images import IMAGE_COLUMNS
from cookbook_core.data.sources import open_splits
from cookbook_core.errors import (
    ConfigError,
    DataError,
    DatumError,
    check_choice,
    check_text,
    nearest,
    raise_all,
)

Columns = Sequence[str] | Sequence[Sequence[str]]

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that are read beside the others where a row has them: see `chat.template_arguments`."""

_SHAREGPT = (
    '.map(lambda r: {"messages": [{"role": {"human": "user", "gpt": "assistant"}.get(m["from"], '
    'm["from"]), "content": m["value"]} for m in r["conversations"]]})'
)
_RENAMES: list[tuple[tuple[str, ...], tuple[str, ...], str, str]] = [
    (("conversations",), ("messages",), "ShareGPT's messages", _SHAREGPT),
    (
        ("instruction", "output"),
        ("prompt", "completion"),
        "prompt and completion",
        '.rename_columns({"instruction": "prompt", "output": "completion"})',
    ),
    (
        ("question", "answer"),
        ("prompt", "completion"),
        "prompt and completion",
        '.rename_columns({"question": "prompt", "answer": "completion"})',
    ),
    (
        ("question", "answer"),
        ("prompt", "answer"),
        "prompt and answer",
        '.rename_column("question", "prompt")',
    ),
    (
        ("text",),
        ("prompt", "completion"),
        "prompt and completion in one text; say where to split it",
        '.map(lambda r: dict(zip(("prompt", "completion"), r["text"].split("\\n", 1))))',
    ),
]
"""Columns of other formats, the columns used here, what they are, and code that renames them."""


class PlacedRow(Row):
    """A row with its place in the dataset: `where` is "file.jsonl:17" or "name[16]"."""

    def __init__(self, where: str, values: Row) -> None:
        super().__init__(values)
        self.where = where

    def __or__(self, more: Any) -> PlacedRow:
        """This row with more columns, at the same place."""
        return PlacedRow(self.where, {**self, **more})


@contextlib.contextmanager
def naming(row: Mapping[str, Any], **columns: str) -> Iterator[None]:
    """Add the row's place and column to a DataError or DatumError raised in this block.

    Args:
        row: a row of `load_rows`.
        columns: the column's name in the row, where the error uses another:
            `naming(row, completion="chosen")`.
    """
    try:
        yield
    except (DataError, DatumError) as error:
        place, where = getattr(row, "where", ""), error.where  # a plain dict has no place
        if place and where.startswith(place):
            raise
        names = [name for name in (*columns, *row) if where.startswith(name)]
        if names:
            name = max(names, key=len)
            where = f"column {columns.get(name, name)}{where[len(name) :]}"
        raise error.replace(where=f"{place}, {where}" if place else where) from error


def load_rows(
    dataset: str, columns: Columns, split: str = "train", *, all_columns: bool = False
) -> list[Row]:
    """Read the given columns of one split of a dataset.

    Args:
        dataset: a name or path, see cookbook_core/data/sources.py.
        columns: the columns needed, or alternatives: the first of which the dataset has every
            column is used: `[("prompt", "completion"), ("messages",)]`.
        split: the name of the split; a single file is "train". Where the dataset is
            `NAME@TRAIN/TEST`, these two are "train" and "test".
        all_columns: keep the other columns too, which may be empty or missing in some rows.
    Returns:
        One dict per row, in file order, with exactly the columns of that alternative, and those of
        TEMPLATE_COLUMNS and IMAGE_COLUMNS where it has a value there (unless all_columns); images
        are of `image_files.ImageFile`, read when a batch needs them. In a block
        `with chat.naming(row)`, errors name its place. Values of a .csv are strings, except
        conversations, which are parsed from JSON.
    Raises:
        DataError: no such dataset or split; broken text (`file.jsonl:17`); no rows; columns
            missing; a row whose value is missing, None or empty.
    """
    return _select(dataset, open_splits(dataset), split, columns, all_columns)


def train_test(
    dataset: str, columns: Columns, test_rows: int, seed: int, *, all_columns: bool = False
) -> tuple[list[Row], list[Row]]:
    """Load rows to train on and `test_rows` held-out rows to evaluate on.

    The held-out rows are the first `test_rows` of the split "test" (or of TEST in `@TRAIN/TEST`).
    Without such a split they are drawn from "train" with `seed`, and removed from it; so no row is
    in both, though two rows may be equal.

    Raises:
        DataError: as for load_rows, and if the dataset has too few rows.
        ConfigError: test_rows is not an integer >= 1, or the seed is neither int nor text.
    """
    if not isinstance(test_rows, int) or test_rows < 1:
        raise ConfigError("test_rows", "out of range", expected="an integer >= 1", got=test_rows)
    _check_seed(seed)
    splits = open_splits(dataset)
    train = _select(dataset, splits, "train", columns, all_columns)
    if "test" in splits:
        test = _select(dataset, splits, "test", columns, all_columns)
        if len(test) < test_rows:
            rule, fix = f"test_rows <= {len(test)}", f"Pass --test_rows {len(test)}."
            where = f"{dataset} (test split)"
            raise DataError(where, "too few rows", expected=rule, got=test_rows, fix=fix)
        return train, test[:test_rows]
    if len(train) <= test_rows:
        what, rule = "no row left to train on", f"test_rows < {len(train)} (the number of rows)"
        fix = f"Pass --test_rows {max(1, len(train) // 10)}, a tenth of them."
        fix = fix if len(train) > 1 else "Add rows."
        raise DataError(dataset, what, expected=rule, got=test_rows, fix=fix)
    held_out = random.Random(seed).sample(range(len(train)), test_rows)
    drawn = set(held_out)
    return [row for i, row in enumerate(train) if i not in drawn], [train[i] for i in held_out]


def batch_indices(num_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the rows that optimizer step `step` (counted from 0) uses.

    Each epoch is a permutation of all rows, drawn from (seed, epoch). Batches are cut from the
    sequence of epochs, so one may span two. The result depends on the arguments alone: to resume
    at step n, pass n.

    Returns:
        batch_size row numbers, each in [0, num_rows).
    Raises:
        ConfigError: no rows, or batch_size not in 1..num_rows (a larger batch would repeat rows).

    >>> sorted(batch_indices(6, 3, step=0, seed=1) + batch_indices(6, 3, step=1, seed=1))
    [0, 1, 2, 3, 4, 5]
    """
    for name, value in {"num_rows": num_rows, "batch_size": batch_size, "step": step}.items():
        if not isinstance(value, int):
            raise ConfigError(name, "wrong type", expected="an integer", got=f"{value!r:.80}")
    _check_seed(seed)
    if num_rows < 1:
        fix = "Add rows; if all were dropped as too long, raise --max_length."
        raise ConfigError("num_rows", "no rows to train on", fix=fix)
    if not 1 <= batch_size <= num_rows:
        fix = f"Pass --batch_size {num_rows}, the number of rows, or less."
        where, what, rule = "Config.batch_size", "out of range", f"1..{num_rows}"
        raise ConfigError(where, what, expected=rule, got=batch_size, fix=fix)
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


def _select(
    dataset: str,
    splits: Mapping[str, Iterable[tuple[str, Row]]],
    split: str,
    columns: Columns,
    all_columns: bool,
) -> list[Row]:
    """Read one split, and of it the first of the alternatives of columns that it has."""
    alternatives: Any = [columns] if _are_names(columns) else columns
    listed = isinstance(alternatives, (list, tuple)) and alternatives
    if not listed or not all(map(_are_names, alternatives)):
        rule = 'names such as ["prompt"], or alternatives of them'
        raise ConfigError("columns", "not a list", expected=rule, got=repr(columns))
    choices: list[tuple[str, ...]] = [tuple(choice) for choice in alternatives]
    check_choice(DataError, dataset, f'no split "{split!s:.80}"', split, splits)
    rows = list(splits[split])
    if not rows:
        fix = "Add rows, or name another split or slice after an @."
        raise DataError(dataset, f'split "{split}" is empty', fix=fix)
    present = sorted({key for _, row in rows for key in row})
    chosen = next((choice for choice in choices if set(choice) <= set(present)), None)
    if chosen is None:
        rule = " or ".join(" + ".join(choice) for choice in choices)
        fix, got = _column_fix(present, choices), ", ".join(present)
        raise DataError(dataset, "columns are missing", expected=rule, got=got, fix=fix)
    problems = [
        DataError(
            where,
            f'column "{name}" has no value',
            got=repr(row.get(name)),
            fix="Fill it in, or drop the row.",
        )
        for where, row in rows
        for name in chosen
        if row.get(name) is None or row[name] in ("", [], {})
    ]
    raise_all(problems)
    return [
        PlacedRow(
            where,
            row
            if all_columns
            else {name: row[name] for name in chosen}
            | {name: row[name] for name in (*TEMPLATE_COLUMNS, *IMAGE_COLUMNS) if row.get(name)},
        )
        for where, row in rows
    ]


def _column_fix(present: Sequence[str], choices: Sequence[Sequence[str]]) -> str:
    """Return how to rename the columns present: of a known format, else the nearest match."""
    for theirs, ours, meaning, code in _RENAMES:
        if set(theirs) <= set(present) and ours in choices:
            names = " + ".join(theirs)
            return (
                f"{names} looks like {meaning}. With the dataset as ds: "
                f'ds{code}.to_json("renamed.jsonl"), then --dataset renamed.jsonl.'
            )
    missing = next(name for choice in choices for name in choice if name not in present)
    hint = nearest(missing, present).partition("Known: ")[0].rstrip()
    return f'No column "{missing}". {hint or "Rename the column that holds it."}'


def _are_names(choice: Any) -> bool:
    listed = isinstance(choice, (list, tuple)) and bool(choice)
    return listed and all(isinstance(name, str) for name in choice)
