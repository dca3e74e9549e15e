"""Datasets by name or path, in the columns TRL's users already have; and which rows a step uses.

Names, paths and what may follow them (`NAME@TRAIN/TEST`) are those of cookbook_core/sources.py.
Nothing is dropped in silence: a row that lacks a value is an error with its line.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cookbook_core.data.files import Row
from cookbook_core.data.sources import asset_path, open_splits
from cookbook_core.errors import (
    ConfigError,
    DataError,
    check_choice,
    check_text,
    nearest,
    raise_all,
)

__all__ = ["asset_path", "batch_indices", "load_rows", "train_test"]

Columns = Sequence[str] | Sequence[Sequence[str]]

_SHAREGPT = (
    '.map(lambda r: {"messages": [{"role": {"human": "user", "gpt": "assistant"}.get(m["from"], '
    'm["from"]), "content": m["value"]} for m in r["conversations"]]})'
)
_FOREIGN: list[tuple[tuple[str, ...], tuple[str, ...], str, str]] = [
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
        "prompt and completion in one: say where it parts",
        '.map(lambda r: dict(zip(("prompt", "completion"), r["text"].split("\\n", 1))))',
    ),
]
"""Columns others have, the columns meant here, their meaning in words, and how to rename them."""


class PlacedRow(Row):
    """A row that knows where it stood: `where` is "file.jsonl:17" or "name[16]"."""

    def __init__(self, where: str, values: Row) -> None:
        super().__init__(values)
        self.where = where


def load_rows(dataset: str, columns: Columns, split: str = "train") -> list[Row]:
    """Read one split of a dataset, keeping the columns asked for.

    Args:
        dataset: a name or path, see cookbook_core/sources.py.
        columns: the columns needed, or alternatives to choose from; the first alternative of which
            the dataset has every column is used: `[("prompt", "completion"), ("messages",)]`.
        split: the name of the split; a single file is "train". In a name with `@TRAIN/TEST`, those
            two are "train" and "test".
    Returns:
        One dict per row, in file order, with exactly the columns of that alternative; `chat.naming`
        names its place in errors. Values of a .csv are strings, but for conversations, which stand
        there as JSON.
    Raises:
        DataError: no such dataset or split; broken text (`file.jsonl:17`); no rows; columns
            missing; a row whose value is missing, None or empty.
    """
    return _select(dataset, open_splits(dataset), split, columns)


def train_test(
    dataset: str, columns: Columns, test_rows: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Load rows to train on and `test_rows` others to evaluate on.

    A dataset with a "test" split, or a name with `@TRAIN/TEST`, gives the first `test_rows` of it;
    from any other, as many rows drawn with `seed` are held out of "train", so no row is in both
    (equal rows may be).

    Raises:
        DataError: as for load_rows, and when too few rows are there.
    """
    if not isinstance(test_rows, int) or test_rows < 1:
        raise ConfigError(
            "test_rows", "no number of rows", expected="an integer >= 1", got=test_rows
        )
    _check_seed(seed)
    splits = open_splits(dataset)
    train = _select(dataset, splits, "train", columns)
    if "test" in splits:
        test = _select(dataset, splits, "test", columns)
        if len(test) < test_rows:
            rule, mend = f"test_rows <= {len(test)}", f"Pass --test_rows {len(test)}."
            where = f"{dataset} (test split)"
            raise DataError(where, "too few rows", expected=rule, got=test_rows, fix=mend)
        return train, test[:test_rows]
    if len(train) <= test_rows:
        rule = f"test_rows < {len(train)}, the rows there are"
        mend = f"Pass --test_rows {max(1, len(train) // 10)}, a tenth of them."
        what = "holding out leaves no row to train on"
        raise DataError(
            dataset, what, expected=rule, got=test_rows, fix=mend if len(train) > 1 else ""
        )
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
            raise ConfigError(name, "wrong type", expected="an integer", got=f"{value!r:.80}")
    _check_seed(seed)
    if not 1 <= batch_size <= num_rows:
        mend = "Lower batch_size or give more rows."
        raise ConfigError(
            "Config.batch_size",
            "does not fit the rows",
            expected=f"1..{num_rows}",
            got=batch_size,
            fix=mend,
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


def _select(
    dataset: str, splits: Mapping[str, Iterable[tuple[str, Row]]], split: str, columns: Columns
) -> list[Row]:
    """Read one split and keep the first alternative of columns that it has; see load_rows."""
    alternatives: Any = [columns] if _are_names(columns) else columns
    listed = isinstance(alternatives, (list, tuple)) and alternatives
    if not listed or not all(map(_are_names, alternatives)):
        rule = 'names such as ["prompt"], or alternatives of them'
        raise ConfigError("columns", "not a list", expected=rule, got=repr(columns))
    choices: list[tuple[str, ...]] = [tuple(choice) for choice in alternatives]
    check_choice(DataError, dataset, f'no split "{split!s:.80}"', split, splits)
    rows = list(splits[split])
    if not rows:
        raise DataError(dataset, f'split "{split}" is empty', expected="at least 1 row", got=0)
    found = sorted({key for _, row in rows for key in row})
    chosen = next((choice for choice in choices if set(choice) <= set(found)), None)
    if chosen is None:
        lacking = [name for choice in choices for name in choice if name not in found]
        rule = " or ".join(" + ".join(choice) for choice in choices)
        mend = _foreign(found, choices) or (
            f'No column "{lacking[0]}". {nearest(lacking[0], found)}'
        )
        raise DataError(
            dataset, "columns are missing", expected=rule, got=", ".join(found), fix=mend
        )
    problems = [
        DataError(
            where, f'column "{name}" has no value', expected="a value", got=repr(row.get(name))
        )
        for where, row in rows
        for name in chosen
        if row.get(name) is None or row[name] in ("", [], {})
    ]
    raise_all(problems)
    return [PlacedRow(where, {name: row[name] for name in chosen}) for where, row in rows]


def _foreign(found: Sequence[str], choices: Sequence[Sequence[str]]) -> str:
    """What the columns of another tool's format mean here, and the line that renames them."""
    for theirs, ours, meaning, renamed in _FOREIGN:
        if set(theirs) <= set(found) and ours in choices:
            names = " + ".join(theirs)
            return (
                f"{names} looks like {meaning}. With the dataset as ds: "
                f'ds{renamed}.to_json("mine.jsonl"), then --dataset mine.jsonl.'
            )
    return ""


def _are_names(choice: Any) -> bool:
    listed = isinstance(choice, (list, tuple)) and bool(choice)
    return listed and all(isinstance(name, str) for name in choice)
