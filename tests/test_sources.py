"""Dataset names with splits and slices, streaming, and the forms and formats of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cookbook_core.chat import check_messages
from cookbook_core.data import load_rows, sources, train_test
from cookbook_core.errors import DataError

import datasets
import pytest

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)]
PAIR = ("prompt", "completion")
CHAT = [{"role": "user", "content": "é, a"}, {"role": "assistant", "content": '"b"\nc'}]


def write(path: Path, rows: list[dict] = ROWS, end: str = "\n", start: str = "") -> Path:
    text = start + "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    path.write_bytes(text.encode("utf-8"))
    return path


def numbers(rows: list[dict]) -> list[int]:
    return [int(row["prompt"][1:]) for row in rows]


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirect the cache of `datasets` to a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# ---- splits and slices ---------------------------------------------------------------------


def make_kinds(folder: Path) -> dict[str, str]:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": table, "extra": table}).save_to_disk(str(folder / "two"))
    for name in ("files", "clone/data"):
        (folder / name).mkdir(parents=True)
    write(folder / "files" / "train.jsonl")
    write(folder / "files" / "extra.jsonl")
    table.to_parquet(folder / "clone" / "data" / "train-00000-of-00001.parquet")
    table.to_parquet(folder / "rows.parquet")
    table.to_csv(folder / "ROWS.CSV", index=False)
    kinds = ("saved", "two", "files", "clone", "rows.parquet", "ROWS.CSV")
    return {kind: str(folder / kind) for kind in kinds}


@pytest.mark.usefixtures("cache")
def test_slices_of_every_kind_are_those_of_the_library(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    slices = [
        "",
        "[:5]",
        "[5:]",
        "[3:7]",
        "[-4:]",
        "[:-4]",
        "[:33%]",
        "[33%:61%]",
        "[-10%:]",
        "[:]",
    ]
    for name in make_kinds(tmp_path).values():
        for cut in slices:
            instruction = datasets.ReadInstruction.from_spec(f"train{cut}")
            (expected,) = instruction.to_absolute({"train": len(whole)})
            places = list(range(expected.from_, expected.to))
            assert numbers(load_rows(f"{name}@train{cut}", PAIR)) == places, (name, cut)
        for cut in ("[20:]", "[30:]", "[7:3]"):
            with pytest.raises(DataError, match='split "train" is empty'):
                load_rows(f"{name}@train{cut}", PAIR)
    name = str(tmp_path / "two")
    train, test = train_test(f"{name}@extra[:6]/train[10:]", PAIR, 3, seed=0)
    assert (numbers(train), numbers(test)) == ([0, 1, 2, 3, 4, 5], [10, 11, 12])
    assert numbers(load_rows(f"{tmp_path}/files@extra[18:]", PAIR)) == [18, 19]


def test_without_a_test_part_rows_are_held_out_of_the_train_part(tmp_path: Path) -> None:
    """Also where the dataset has a split "test": only the named split is used."""
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl")
    train, test = train_test(f"{tmp_path}@train[:10]", PAIR, 2, seed=0)
    assert sorted(numbers(train + test)) == list(range(10))
    assert len(load_rows("tiny/sft@train[:3]/test[:2]", PAIR, "test")) == 2
    assert len(load_rows("tiny/sft@train[:3]/test[:2]", PAIR)) == 3


@pytest.mark.parametrize(
    ("tail", "pattern"),
    [
        ("trian", 'no split "trian".*Did you mean "train"'),
        ("train/validation", 'no split "validation".*one of extra, train'),
        ("train[:5", r"after the @: malformed split.*got 'train\[:5'"),
        ("train[5]", "after the @: malformed split"),
        ("train[a:b]", "after the @: malformed split"),
        ("train[:5]+extra", "after the @: malformed split"),
        ("train/extra/train", "after the @: malformed split"),
        ("", "after the @: malformed split"),
        ("train/", "after the @: malformed split"),
        ("train[5:5]", 'split "train" is empty'),
        ("train[30:]", 'split "train" is empty'),
        ("train/train", r"slices overlap. Got train\[0:\], train\[0:\]"),
        ("train[:11]/train[50%:]", r"slices overlap. Got train\[0:11\], train\[10:\]"),
    ],
)
def test_malformed_or_unknown_splits(tmp_path: Path, tail: str, pattern: str) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "extra.jsonl")
    with pytest.raises(DataError, match=pattern):
        train_test(f"{tmp_path}@{tail}", PAIR, 1, 0)
    train_test(f"{tmp_path}@train[:10]/train[50%:]", PAIR, 1, 0)


@pytest.mark.parametrize(
    "name", ["me@home/x.jsonl", "x@train.jsonl", "x[1:2]@train[:3].jsonl", "a@train/x.jsonl", "b@c"]
)
def test_paths_that_look_like_splits_are_paths(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix:
        path.parent.mkdir(exist_ok=True)
        write(path)
    else:
        path.mkdir()
        write(path / "train.jsonl")
    assert numbers(load_rows(str(path), PAIR)) == list(range(20))
    assert numbers(load_rows(f"{path}@train[:2]", PAIR)) == [0, 1]
    with pytest.raises(DataError, match="no such file"):
        load_rows(f"{path.parent}/no/{path.name}".removesuffix("b@c") + "x@y.jsonl", PAIR)


@pytest.mark.parametrize(
    "name",
    [r"C:\data\x.jsonl", "C:/data/x.csv", r"C:\data\rows", r"data\rows", r"C:\me@home\x.jsonl"],
)
@pytest.mark.parametrize("tail", ["", "@train[:5]/test[:2]"])
def test_windows_paths_are_not_hub_names(
    name: str, tail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("Hub request"))
    with pytest.raises(DataError) as error:
        load_rows(name + tail, PAIR)
    assert str(error.value).startswith(f"{name}{tail}: no such file")


# ---- streaming -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "streamed"),
    [
        ("", False),
        ("@train_prefs/test_prefs", False),
        ("@train_prefs[:5]", True),
        ("@train_prefs[:5]/test_prefs[:2]", True),
        ("@train_prefs[2:5]/test_prefs", True),
        ("@train_prefs[:5]/test_prefs[-2:]", False),
        ("@train_prefs[:50%]/test_prefs[:2]", False),
        ("@train_prefs[5:]", False),
    ],
)
def test_which_slices_are_streamed(
    monkeypatch: pytest.MonkeyPatch, tail: str, streamed: bool
) -> None:
    """A hub dataset is streamed unless its rows must be counted; no row after the slice is read."""
    read: dict[str, list[int]] = {"train_prefs": [], "test_prefs": []}

    def rows(split: str) -> Any:
        for i, row in enumerate(ROWS):
            read[split].append(i)
            yield row

    def load_dataset(name: str, config: str | None, *, streaming: bool) -> Any:
        assert (name, config, streaming) == ("owner/name", "main", streamed)
        if not streaming:
            return datasets.DatasetDict({split: datasets.Dataset.from_list(ROWS) for split in read})
        return datasets.IterableDatasetDict(
            {
                split: datasets.IterableDataset.from_generator(rows, gen_kwargs={"split": split})
                for split in read
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if not tail:
        assert list(sources.open_splits("owner/name:main")) == ["train_prefs", "test_prefs"]
        return
    train, test = train_test(f"owner/name:main{tail}", PAIR, 2, seed=0)
    assert len(test) == 2
    assert train
    if streamed:
        assert max(read["train_prefs"]) == 4
        assert max([*read["test_prefs"], 0]) == (1 if "[:2]" in tail else 19 if "/" in tail else 0)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_streaming_through_the_library_builders(tmp_path: Path, suffix: str) -> None:
    """A folder with the files of a hub dataset, loaded by the library."""
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_list(ROWS)
    for split in ("train", "test"):
        file = tmp_path / "data" / f"{split}-00000-of-00001.{suffix}"
        {"jsonl": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}[suffix](file)
    train, test = train_test(f"{tmp_path}@train[:6]/test[2:5]", PAIR, 3, seed=0)
    assert (numbers(train), numbers(test)) == ([0, 1, 2, 3, 4, 5], [2, 3, 4])
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))
    with pytest.raises(DataError, match=r'no split "dev".*one of test, train'):
        load_rows(f"{tmp_path}@dev[:6]", PAIR)


def test_a_connection_that_fails_while_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield ROWS[0]
        raise ConnectionError("reset by peer")

    broken = {"train": datasets.IterableDataset.from_generator(rows)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: broken)
    with pytest.raises(DataError, match=r"a/b@train\[:5\]\[1\]: cannot .*reset by peer"):
        load_rows("a/b@train[:5]", PAIR)


def test_a_slice_of_a_file_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    with open(path, "a", encoding="utf-8") as file:
        file.write("broken\n")
    assert len(load_rows(f"{path}@train[:20]", PAIR)) == 20
    with pytest.raises(DataError, match=r"a\.jsonl:21: broken JSON"):
        load_rows(f"{path}@train[:21]", PAIR)


# ---- forms of rows -------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "pair": {"prompt": "p", "completion": " c"},
    "pair of messages": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "preference": {"prompt": "p", "chosen": " c", "rejected": " r"},
    "preference of messages": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "bom"])
def test_every_form_in_every_format(tmp_path: Path, form: dict, end: str, start: str) -> None:
    """TRL's columns, plain and conversational; in a .csv a conversation is JSON."""
    files = [write(tmp_path / f"rows.{kind}", [form] * 2, end, start) for kind in ("jsonl", "json")]
    datasets.Dataset.from_list([form] * 2).to_parquet(tmp_path / "rows.parquet")
    fields = [json.dumps(v) if isinstance(v, list) else v for v in form.values()]
    line = ",".join('"' + field.replace('"', '""') + '"' for field in fields)
    text = start + end.join([",".join(form), line, line]) + end
    (tmp_path / "rows.csv").write_bytes(text.encode("utf-8"))
    for path in [*files, tmp_path / "rows.parquet", tmp_path / "rows.csv"]:
        assert load_rows(str(path), list(form)) == [form] * 2, path.name


@pytest.mark.parametrize("saved", [False, True])
def test_keys_that_only_some_messages_have(tmp_path: Path, saved: bool) -> None:
    """A table gives every message every key: keys without a value are removed again."""
    rows = [{"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}]
    table, path = datasets.Dataset.from_list(rows), tmp_path / "rows.parquet"
    assert table[0]["messages"][0]["weight"] is None
    if saved:
        path = tmp_path / "saved"
        table.save_to_disk(str(path))
    else:
        table.to_parquet(path)
    assert load_rows(str(path), ["messages"]) == rows
    check_messages(rows[0]["messages"], "messages")


def test_messages_in_a_csv_that_are_not_json(tmp_path: Path) -> None:
    """pandas writes a list as Python, not as JSON; text in other brackets stays text."""
    path = tmp_path / "a.csv"
    path.write_text(f'prompt\n"{CHAT!s}"\n'.replace('"b"', "b"), encoding="utf-8")
    with pytest.raises(DataError, match=r'a\.csv:2: column "prompt" looks like messages'):
        load_rows(str(path), ["prompt"])
    path.write_text('prompt\n[1]\n"[{a}]"\n', encoding="utf-8")
    assert load_rows(str(path), ["prompt"]) == [{"prompt": "[1]"}, {"prompt": "[{a}]"}]


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("a.jsonl", b"\x1f\x8b\x08\x00", r"a\.jsonl: compressed by gzip.*gunzip"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", r"a\.jsonl\.gz: a compressed file\. Unpack it"),
        ("a.csv", "prompt\na".encode("utf-16"), r"a\.csv:1: not UTF-8.*UTF-16, as PowerShell"),
        ("a.csv", b"prompt\n" + b"a\n" * 9000 + b"\xe9\n", r"a\.csv:9002: not UTF-8"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": "\xe9"}', r"a\.json:2: not UTF-8"),
    ],
)
def test_files_that_are_not_plain_text(
    tmp_path: Path, name: str, content: bytes, pattern: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=pattern):
        load_rows(str(tmp_path / name), ["prompt"])
