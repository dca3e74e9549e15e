"""Datasets by name or path, and the rows a step uses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from cookbook_core.data import asset_path, batch_indices, load_rows, train_test
from cookbook_core.errors import ConfigError, DataError

PAIR = ("prompt", "completion")
ROWS = [{"prompt": f"p{i} é\u2028x", "completion": f"c{i}", "extra": str(i)} for i in range(6)]
WANTED = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write rows with non-ASCII text as it is, U+2028 (a line break to splitlines()) included."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path) -> Path:
    lines = [",".join(f'"{row[key]}"' for key in ROWS[0]) for row in ROWS]
    path.write_bytes(("\ufeff" + "\r\n".join([",".join(ROWS[0]), *lines])).encode("utf-8"))
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return path


def write_parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def write_saved(path: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


def write_saved_splits(path: Path) -> Path:
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": table, "other": table}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", lambda path: write_jsonl(path, ROWS)),
        ("lines.json", lambda path: write_jsonl(path, ROWS)),
        ("list.json", write_json),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
        ("saved", write_saved),
        ("saved_splits", write_saved_splits),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, write) -> None:
    """Pitfall 38 too: text is UTF-8 whatever the locale, with or without a byte order mark."""
    assert load_rows(str(write(tmp_path / name)), PAIR) == WANTED


def test_folder_with_train_and_test_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:4])
    write_jsonl(tmp_path / "test.jsonl", ROWS[4:])
    assert load_rows(str(tmp_path), PAIR, "test") == WANTED[4:]
    with pytest.raises(DataError, match=r'no split "tset".* Did you mean "test"'):
        load_rows(str(tmp_path), PAIR, "tset")


def test_bundled_datasets_load() -> None:
    names = {path.stem.removesuffix("_train") for path in asset_path("data").glob("*_train.jsonl")}
    assert "sft" in names
    for name in names:
        with open(asset_path("data", f"{name}_test.jsonl"), encoding="utf-8") as file:
            expected = json.loads(file.readline())
        assert load_rows(f"tiny/{name}", list(expected), "test")[0] == expected
    with pytest.raises(DataError, match=r'tiny/stf: .*Did you mean "sft"'):
        load_rows("tiny/stf", PAIR)


def test_hub_names_and_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked for NAME and CONFIG; what it answers badly is told in one DataError."""
    import datasets

    asked = []

    def answer(name: str, config: str | None, streaming: bool):
        asked.append((name, config, streaming))
        if name == "no/such":
            raise ConnectionError("offline")
        return {"train": datasets.Dataset.from_list(ROWS)}

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert load_rows("owner/name:main", PAIR) == WANTED
    assert load_rows("owner/name", PAIR) == WANTED
    assert asked == [("owner/name", "main", False), ("owner/name", None, False)]
    with pytest.raises(
        DataError, match=r"no/such: .*ConnectionError: offline.*Accepted: tiny/NAME"
    ):
        load_rows("no/such", PAIR)


def test_first_alternative_with_all_columns_is_used(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    assert load_rows(path, [("messages",), PAIR, ("prompt",)]) == WANTED
    assert load_rows(path, [("prompt",), PAIR]) == [{"prompt": row["prompt"]} for row in ROWS]
    assert load_rows(path, [("prompt", "text"), ("extra",)])[2] == {"extra": "2"}


def test_missing_columns_name_found_and_expected(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(DataError) as error:
        load_rows(path, [("prompt", "completions"), ("messages",)])
    says = str(error.value)
    assert says.startswith(path)
    assert "Expected prompt + completions or messages" in says
    assert "got completion, extra, prompt." in says
    assert 'Did you mean "completion"?' in says
    with pytest.raises(ConfigError, match="columns: not a list"):
        load_rows(path, "prompt")


@pytest.mark.parametrize("value", [None, "", [], "absent"])
def test_rows_without_a_value_are_named(tmp_path: Path, value: object) -> None:
    """The first five are listed with their lines; blank lines count as lines."""
    path = tmp_path / "a.jsonl"
    broken = {"prompt": "a"} if value == "absent" else {"prompt": "a", "completion": value}
    good = json.dumps(ROWS[0])
    path.write_text("\n".join([good, "", *[json.dumps(broken)] * 7, good]), encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_rows(str(path), PAIR)
    lines = str(error.value).split("\n")
    assert [line.split(":")[1] for line in lines[:5]] == ["3", "4", "5", "6", "7"]
    assert 'column "completion" has no value' in lines[0]
    assert lines[5] == "(and 2 more like these)"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', r"a\.jsonl:2: broken JSON"),
        ("a.json", b'[{"prompt": "a"},\n\n{"prompt": }]', r"a\.json:3: broken JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n["b"]\n', r"a\.jsonl:2: not a row.*got \['b'\]"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}', r"a\.jsonl:2: not UTF-8"),
        ("a.csv", b"prompt\na\nb,c\n", r"a\.csv:3: too many fields. Expected 1 .*got 2"),
        ("a.csv", b'prompt\na\n"b\n', r"a\.csv:\d: broken CSV"),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: JSON that cannot be read"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: JSON that cannot be read"),
        ("a.parquet", b"prompt", r"a\.parquet: broken"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: split \"train\" is empty"),
        ("a.csv", b"prompt\n", r"a\.csv: split \"train\" is empty"),
        ("a.txt", b"prompt", r"a\.txt: not a dataset file.*Accepted: tiny/NAME"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_rows(str(tmp_path / name), ["prompt"])


def test_missing_paths_say_what_is_accepted(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "none.jsonl"):
        with pytest.raises(DataError, match=r"none(.jsonl)?: no such file.*Accepted: tiny/NAME"):
            load_rows(str(path), PAIR)
    (tmp_path / "readme.md").touch()
    with pytest.raises(DataError, match=r"no dataset in this folder.*got \['readme.md'\]"):
        load_rows(str(tmp_path), PAIR)


# ---- train and test ------------------------------------------------------------------------


def test_own_test_split_is_used(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "test.jsonl", ROWS[3:])
    assert train_test(str(tmp_path), PAIR, 2, seed=0) == (WANTED[:3], WANTED[3:5])
    with pytest.raises(DataError, match=r"test split.*Expected test_rows <= 3, got 4"):
        train_test(str(tmp_path), PAIR, 4, seed=0)


def test_held_out_rows_are_disjoint_and_seeded(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    splits = [train_test(path, PAIR, 2, seed) for seed in range(8)]
    for train, test in splits:
        assert len(test) == 2
        assert sorted(map(str, train + test)) == sorted(map(str, WANTED))
    assert len({str(test) for _, test in splits}) > 1
    assert train_test(path, PAIR, 2, 3) == splits[3]
    with pytest.raises(DataError, match=r"Expected test_rows < 6.*got 6"):
        train_test(path, PAIR, 6, 0)


# ---- batches -------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 3), (10, 10), (7, 1), (12, 4)])
def test_each_epoch_deals_every_row_once(num_rows: int, batch_size: int) -> None:
    """Pitfall 33: whole epochs, each in its own order, whatever the batch size."""
    steps = 5 * num_rows  # batch_size * 5 epochs
    dealt = [i for step in range(steps) for i in batch_indices(num_rows, batch_size, step, seed=4)]
    epochs = [dealt[at : at + num_rows] for at in range(0, len(dealt), num_rows)]
    assert len(epochs) == 5 * batch_size
    assert all(Counter(epoch) == Counter(range(num_rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) * 0.9


def test_a_step_needs_no_earlier_step() -> None:
    in_order = [batch_indices(11, 4, step, seed=7) for step in range(30)]
    assert [batch_indices(11, 4, step, seed=7) for step in reversed(range(30))] == in_order[::-1]
    assert in_order != [batch_indices(11, 4, step, seed=8) for step in range(30)]


def test_order_is_the_same_on_every_machine() -> None:
    """A resumed run may continue under another Python: the order is pinned."""
    assert batch_indices(8, 8, 0, seed=0) == [0, 2, 1, 4, 6, 7, 3, 5]


def test_batch_larger_than_the_rows_is_refused() -> None:
    for batch_size in (0, 6):
        with pytest.raises(ConfigError, match=rf"batch_size: .*Expected 1..5, got {batch_size}"):
            batch_indices(5, batch_size, 0, seed=0)
