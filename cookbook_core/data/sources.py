"""Find the rows of a dataset from its name or path, its splits and slices.

    tiny/NAME                 bundled with this package (see cookbook_core/assets/data)
    FILE.jsonl .json .csv .parquet
    FOLDER                    with train.jsonl and optionally test.jsonl, from save_to_disk, or one
                              that `datasets` loads (a clone of a hub dataset)
    OWNER/NAME[:CONFIG]       on the Hugging Face Hub

After any of them, `@TRAIN` or `@TRAIN/TEST` names the splits to train on and to hold out, each
optionally with a slice, as in `datasets` (quote it, since shells expand brackets):

    "HuggingFaceH4/ultrafeedback_binarized@train_prefs/test_prefs"
    "my_rows.jsonl@train[:90%]/train[90%:]"
    "OWNER/NAME@train[:5000]/test[:200]"     streamed: later rows are not downloaded

With `@TRAIN` alone the held-out rows are drawn from TRAIN. Rows are read lazily, none beyond the
slice. A hub dataset is streamed, without a cache, if a slice ends at a row number and no bound
needs the number of rows (a percentage, or counted from the end); `datasets` itself downloads the
whole split for a slice. A path that exists is used as a path, whatever its name contains.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

from cookbook_core.data.files import SUFFIXES, Row, read_file, without_nulls
from cookbook_core.data.images import holds_images, with_image_files
from cookbook_core.errors import DataError, check_choice
from cookbook_core.storage.hub import asking_hub
from cookbook_core.storage.paths import asset_path, usable_path

_KINDS = (
    "Accepted: tiny/NAME (bundled), a .jsonl, .json, .csv or .parquet file, a folder with "
    "train.jsonl, a folder from save_to_disk, or OWNER/NAME[:CONFIG] on the Hugging Face hub; "
    "after each of them @TRAIN or @TRAIN/TEST to name splits."
)
_SPLIT = re.compile(r"(\w+(?:[.-]\w+)*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_PLACES = re.compile(r"(/|\.|~|[A-Za-z]:[\\/]|.*\\)")  # what begins like a path, Windows' included
Wanted = tuple[str, str | None, str | None]
"""The name of a split and the bounds of its slice, such as ("train", None, "90%")."""


def open_splits(dataset: str) -> dict[str, Iterable[tuple[str, Row]]]:
    """Map each split to its rows, read lazily: (where, row) with `where` file:line or name[row].

    Args:
        dataset: a name or path, see the top of this file. With `@TRAIN/TEST` the splits are those
            two, called "train" and "test".
    Returns:
        An iterable per split, to be read only one time.
    Raises:
        DataError: no such dataset or split, a malformed slice, or slices that overlap. While a
            split is read: broken text, or a failed connection.
    """
    usable_path("dataset", dataset, DataError)
    name, wanted = _parse(str(dataset))
    known = all(_is_count(low) and _is_count(high) for _, low, high in wanted)
    streaming = known and any(high is not None for _, _, high in wanted)
    splits = _find(name, dataset, streaming)
    if not wanted:
        return {split: _rows(dataset, source, 0, None) for split, source in splits.items()}
    cuts = []
    for split, low, high in wanted:
        check_choice(DataError, dataset, f'no split "{split}"', split, splits)
        rows = None if _is_count(low) and _is_count(high) else _length(splits[split])
        cuts.append((split, _place(low, rows) or 0, _place(high, rows)))
    _check_apart(dataset, cuts)
    return {
        role: _rows(dataset, splits[split], start, stop)
        for role, (split, start, stop) in zip(("train", "test"), cuts, strict=False)
    }


# ---- names -----------------------------------------------------------------------------------


def _parse(dataset: str) -> tuple[str, list[Wanted]]:
    """Return the name before the @ and the splits after it; none if the @ is part of a path."""
    name, at, tail = dataset.rpartition("@")
    if not at or _is_file_name(tail) or usable_path("dataset", dataset, DataError).exists():
        return dataset, []
    matches = [_SPLIT.fullmatch(part) for part in tail.split("/")]
    if not name or len(matches) > 2 or not all(matches):
        what, rule = "malformed split", "SPLIT or SPLIT/SPLIT"
        fix = "Write a split as train, train[:2000], train[-100:] or train[:90%]."
        raise DataError(f"{dataset}: after the @", what, expected=rule, got=repr(tail), fix=fix)
    return name, [(match[1], match[2], match[3]) for match in matches if match]


def _is_file_name(text: str) -> bool:
    return Path(text).suffix.lower() in SUFFIXES


def _is_count(bound: str | None) -> bool:
    """Whether the bound is known without counting the rows."""
    return bound is None or bound.isdecimal()


def _place(bound: str | None, count: int | None) -> int | None:
    """Return the row number of a bound, rounded and clipped as `datasets` does."""
    if bound is None or count is None:
        return None if bound is None else int(bound)
    place = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    return min(max(place + count, 0) if place < 0 else place, count)


def _check_apart(dataset: str, cuts: list[tuple[str, int, int | None]]) -> None:
    """Raise DataError if the train and test slices are of one split and overlap."""
    if len({split for split, _, _ in cuts}) == len(cuts):
        return
    ends = [float("inf") if stop is None else stop for _, _, stop in cuts]
    if max(cuts[0][1], cuts[1][1]) < min(ends):
        got = ", ".join(f"{s}[{start}:{'' if end is None else end}]" for s, start, end in cuts)
        fix = "Use disjoint slices, as in train[:90%]/train[90%:]."
        raise DataError(dataset, "train and test slices overlap", got=got, fix=fix)


# ---- sources ---------------------------------------------------------------------------------


def _find(name: str, dataset: str, streaming: bool) -> Mapping[str, Any]:
    """Map split names to a file (Path) or to a dataset of the `datasets` library."""
    path = usable_path("dataset", name, DataError)
    if name.startswith("tiny/"):
        return _bundled(name.removeprefix("tiny/"))
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return {"train": path}
    if path.is_dir():
        files = {p.stem: p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES}
        if "train" in files:
            return files
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _saved(path, dataset)
        if files or any(map(_is_file_name, map(str, path.glob("data/*")))):
            return _load(str(path), None, dataset, streaming)
        names = [p.name for p in sorted(path.iterdir())[:10]]
        what = "no dataset in this folder"
        raise DataError(dataset, what, expected="train.jsonl", got=names, fix=_KINDS)
    if path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".zip"):
        raise DataError(dataset, "a compressed file", fix=f"Unpack it first. {_KINDS}")
    if path.exists() or _is_file_name(name) or _PLACES.match(name):
        what = "not a dataset file" if path.exists() else "no such file"
        raise DataError(dataset, what, fix=_KINDS)
    hub_name, _, config = name.partition(":")
    import datasets  # before asking_hub, which changes its settings if it is imported

    del datasets
    with asking_hub(hub_name, "file"):
        return _load(hub_name, config, dataset, streaming)


def _saved(path: Path, dataset: str) -> Mapping[str, Any]:
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(path))
    except Exception as error:
        raise _unreadable(dataset, error) from error
    return saved if isinstance(saved, dict) else {"train": saved}


def _load(name: str, config: str | None, dataset: str, streaming: bool) -> Mapping[str, Any]:
    import datasets

    try:
        loaded: Any = datasets.load_dataset(name, config or None, streaming=streaming)
        return loaded
    except Exception as error:  # hub, network and format errors share no base class
        raise _unreadable(dataset, error) from error


def _unreadable(dataset: str, error: Exception) -> DataError:
    got = f"{type(error).__name__}: {error}".removesuffix(" (OfflineModeIsEnabled)")
    return DataError(dataset, "cannot be loaded", got=got, fix=_KINDS)


def _bundled(name: str) -> dict[str, Path]:
    folder = asset_path("data")
    files = {path.stem: path for path in folder.iterdir() if path.suffix in SUFFIXES}
    names = {stem.removesuffix("_train") for stem in files if not stem.endswith("_test")}
    check_choice(DataError, f"tiny/{name}", "no such bundled dataset", name, names)
    if name in files:
        return {"train": files[name]}
    stems = {split: f"{name}_{split}" for split in ("train", "test")}
    return {split: files[stem] for split, stem in stems.items() if stem in files}


def _length(source: Any) -> int:
    return sum(1 for _ in read_file(source)) if isinstance(source, Path) else len(source)


def _rows(dataset: str, source: Any, start: int, stop: int | None) -> Iterator[tuple[str, Row]]:
    """Read the rows from `start` up to `stop`, and none beyond; their images as ImageFile."""
    if isinstance(source, Path):
        for where, row in islice(read_file(source), start, stop):
            yield where, with_image_files(where, row, source.parent)
        return
    if holds_images(getattr(source, "features", None)):
        source = source.with_format("arrow")  # the files' bytes, not decoded
    if hasattr(source, "__len__") and start >= len(source):
        return  # skip() raises at the end
    rows = iter(source.skip(start) if start else source)
    for place in count(start) if stop is None else range(start, stop):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # a failed connection, or a broken file of a streamed dataset
            raise _unreadable(f"{dataset}[{place}]", error) from error
        where = f"{dataset}[{place}]"
        row = row if isinstance(row, dict) else row.to_pylist()[0]
        yield where, with_image_files(where, without_nulls(row))
