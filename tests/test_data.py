"""Datasets by name or path, and the rows a step uses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from cookbook_core import chat
from cookbook_core.data import asset_path, batch_indices, load_rows, train_test
from cookbook_core.errors import ConfigError, DataError, ModelError

import pytest

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


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "bom"])
def test_a_csv_separated_by_semicolons_or_tabs(tmp_path: Path, separator: str, start: str) -> None:
    """Spreadsheets of many countries write semicolons; the header pattern which separator it is."""
    path = tmp_path / "rows.csv"
    lines = ['prompt;"completion";"extra, more"', '"a; b, c";d, e;7', '"f\n""g""";h;']
    lines[1:] = [line.replace("; b", "\0").replace(";", separator) for line in lines[1:]]
    lines[0] = lines[0].replace(";", separator)
    path.write_bytes((start + "\r\n".join(lines)).replace("\0", "; b").encode("utf-8"))
    rows = load_rows(str(path), PAIR)
    assert rows == [
        {"prompt": "a; b, c", "completion": "d, e"},
        {"prompt": 'f\n"g"', "completion": "h"},
    ]
    path.write_text(f"prompt{separator}completion\na{separator}b{separator}c\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.csv:2: too many fields.*Expected 2 .*got 3"):
        load_rows(str(path), PAIR)


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
    """NAME and CONFIG reach load_dataset(); its failure becomes one DataError."""
    import datasets

    requests = []

    def answer(name: str, config: str | None, streaming: bool):
        requests.append((name, config, streaming))
        if name == "no/such":
            raise ConnectionError("offline")
        return {"train": datasets.Dataset.from_list(ROWS)}

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert load_rows("owner/name:main", PAIR) == WANTED
    assert load_rows("owner/name", PAIR) == WANTED
    assert requests == [("owner/name", "main", False), ("owner/name", None, False)]
    with pytest.raises(
        DataError, match=r"no/such: .*ConnectionError: offline.*Accepted: tiny/NAME"
    ):
        load_rows("no/such", PAIR)


def test_first_alternative_with_all_columns_is_used(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    assert load_rows(path, [("messages",), PAIR, ("prompt",)]) == WANTED
    assert load_rows(path, [("prompt",), PAIR]) == [{"prompt": row["prompt"]} for row in ROWS]
    assert load_rows(path, [("prompt", "text"), ("extra",)])[2] == {"extra": "2"}


def test_missing_columns_name_those_present_and_expected(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(DataError) as error:
        load_rows(path, [("prompt", "completions"), ("messages",)])
    message = str(error.value)
    assert message.startswith(path)
    assert "Expected prompt + completions or messages" in message
    assert "got completion, extra, prompt." in message
    assert 'Did you mean "completion"?' in message
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
    ("name", "content", "pattern"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', r"a\.jsonl:2: broken JSON"),
        ("a.json", b'[{"prompt": "a"},\n\n{"prompt": }]', r"a\.json:3: broken JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n["b"]\n', r"a\.jsonl:2: not a row.*got \['b'\]"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}', r"a\.jsonl:2: not UTF-8"),
        ("a.csv", b"prompt\na\nb,c\n", r"a\.csv:3: too many fields. Expected 1 .*got 2"),
        ("a.csv", b'prompt\na\n"b\n', r"a\.csv:\d: broken CSV"),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: JSON that cannot be read"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: JSON that cannot be read"),
        ("a.parquet", b"prompt", r"a\.parquet: not a readable parquet file"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: split \"train\" is empty"),
        ("a.csv", b"prompt\n", r"a\.csv: split \"train\" is empty"),
        ("a.txt", b"prompt", r"a\.txt: not a dataset file.*Accepted: tiny/NAME"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, pattern: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=pattern):
        load_rows(str(tmp_path / name), ["prompt"])


def test_missing_paths_say_what_is_accepted(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "none.jsonl"):
        with pytest.raises(DataError, match=r"none(.jsonl)?: no such file.*Accepted: tiny/NAME"):
            load_rows(str(path), PAIR)
    (tmp_path / "readme.md").touch()
    with pytest.raises(DataError, match=r"no dataset in this folder.*got \['readme.md'\]"):
        load_rows(str(tmp_path), PAIR)


# ---- train and test ------------------------------------------------------------------------


def test_the_test_split_is_used_if_there_is_one(tmp_path: Path) -> None:
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
def test_each_epoch_has_every_row_exactly_one_time(num_rows: int, batch_size: int) -> None:
    """Pitfall 33: each epoch is a permutation of all rows, for any batch size."""
    steps = 5 * num_rows  # batch_size * 5 epochs
    drawn = [i for step in range(steps) for i in batch_indices(num_rows, batch_size, step, seed=4)]
    epochs = [drawn[at : at + num_rows] for at in range(0, len(drawn), num_rows)]
    assert len(epochs) == 5 * batch_size
    assert all(Counter(epoch) == Counter(range(num_rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) * 0.9


def test_a_step_does_not_depend_on_earlier_steps() -> None:
    in_order = [batch_indices(11, 4, step, seed=7) for step in range(30)]
    assert [batch_indices(11, 4, step, seed=7) for step in reversed(range(30))] == in_order[::-1]
    assert in_order != [batch_indices(11, 4, step, seed=8) for step in range(30)]


def test_order_is_the_same_on_every_machine() -> None:
    """A run may resume under another version of Python: the order is pinned."""
    assert batch_indices(8, 8, 0, seed=0) == [0, 2, 1, 4, 6, 7, 3, 5]


def test_a_batch_larger_than_the_dataset_is_an_error() -> None:
    for batch_size in (0, 6):
        with pytest.raises(ConfigError, match=rf"batch_size: .*Expected 1..5, got {batch_size}"):
            batch_indices(5, batch_size, 0, seed=0)


def test_batches_of_no_rows_name_the_flag() -> None:
    """Not "Expected 1..0": every row was dropped, which --max_length decides."""
    with pytest.raises(ConfigError, match=r"num_rows: no rows.*--max_length"):
        batch_indices(0, 4, 0, seed=0)


# ---- rows and columns in errors -------------------------------------------------------------


@pytest.fixture
def tiny_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(asset_path("tiny_model"))


def turns(*roles_and_texts: str) -> list[dict]:
    """Messages user, assistant, user, ... with these texts; "role=text" names another role."""
    return [
        {"role": role or ("assistant" if i % 2 else "user"), "content": text}
        for i, (role, _, text) in enumerate(
            t.partition("=") if "=" in t else ("", "", t) for t in roles_and_texts
        )
    ]


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([{"messages": turns("hi", "a")}, {"messages": turns("hi", "")}],
         r"2, column messages\[1\] content: empty"),
        ([{"messages": turns("human=hi", "a")}],
         r"1, column messages\[0\] role: unknown.*'human'"),
        ([{"messages": turns("hi")}], "1, column messages: nothing to train on"),
        ([{"prompt": turns("hi"), "completion": turns("user=x")}],
         "1, column completion: not one answer"),
        ([{"prompt": turns("hi"), "completion": turns("assistant= ")}],
         r"1, column completion\[0\] content: empty"),
    ],
    ids=["empty answer", "role", "no answer", "not an answer", "empty completion"],
)  # fmt: skip
def test_sft_names_the_row_and_the_column(tmp_path: Path, tiny_tokenizer, rows, pattern) -> None:
    from recipes import sft

    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    loaded = load_rows(path, (PAIR, ("messages",)))
    with pytest.raises(DataError, match=rf"^a\.jsonl:{pattern}"):
        sft.build_data(loaded, tiny_tokenizer, 512, "last")


@pytest.mark.parametrize(
    ("row", "pattern"),
    [
        ({"prompt": "q", "chosen": turns("assistant=a"), "rejected": turns("assistant=b")},
         "column chosen: not in the form of the prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": turns("assistant=b")},
         "column rejected: not in the form of the prompt"),
        ({"chosen": "q a", "rejected": "q b"}, "column chosen: plain text without its prompt"),
        ({"chosen": turns("q", "a"), "rejected": turns("q", "b", "c", "d")},
         "column rejected: not one answer.*1 shared turns, then assistant, user, assistant"),
        ({"chosen": turns("q", "a"), "rejected": turns("r", "b")},
         "column chosen: .*0 shared turns"),
        ({"prompt": "else", "chosen": turns("q", "a"), "rejected": turns("q", "b")},
         "column prompt: does not match the turns shared"),
        ({"chosen": 5, "rejected": turns("q", "b")}, "column chosen: not a conversation"),
    ],
)  # fmt: skip
def test_malformed_pairs_name_the_row_and_the_column(
    tmp_path: Path, tiny_tokenizer, row, pattern
) -> None:
    from recipes import dpo

    loaded = load_rows(str(write_jsonl(tmp_path / "a.jsonl", [row])), chat.PAIRS)
    with pytest.raises(DataError, match=rf"^a\.jsonl:1, {pattern}"):
        dpo.build_pairs(loaded, tiny_tokenizer, 512)


def test_whole_conversations_are_the_same_pairs(tmp_path: Path, tiny_tokenizer) -> None:
    """TRL's implicit prompt, and the prompt's text beside whole conversations, as UltraFeedback."""
    from recipes import bradley_terry, dpo

    start, good, bad = turns("system=s", "user=q"), turns("assistant=a"), turns("assistant=b")
    forms = [
        {"prompt": start, "chosen": good, "rejected": bad},
        {"chosen": start + good, "rejected": start + bad},
        {"prompt": "q", "chosen": start + good, "rejected": start + bad},
        {"prompt": start, "chosen": start + good, "rejected": start + bad},
    ]
    judge = bradley_terry.Judge(tiny_tokenizer, "Good?", (" yes", " no"))
    tokens = []
    for i, form in enumerate(forms):
        rows = load_rows(str(write_jsonl(tmp_path / f"{i}.jsonl", [form])), chat.PAIRS)
        data, kept = dpo.build_pairs(rows, tiny_tokenizer, 512)
        judged, _ = bradley_terry.build_pairs(rows, judge, 512)
        assert kept == [forms[0]]
        tokens.append([d.model_input.to_ints() for d in data + judged])
    assert len(tokens[0]) == 4
    assert tokens[1:] == tokens[:1] * 3


@pytest.mark.parametrize(
    ("row", "column", "got"),
    [
        ({"prompt": "q", "completion": 0}, "completion", "0 (int)"),
        ({"prompt": "q", "completion": 1.5}, "completion", "1.5 (float)"),
        ({"prompt": turns("q"), "completion": True}, "completion", "True (bool)"),
        ({"prompt": 7, "completion": "a"}, "prompt", "7 (int)"),
        ({"prompt": "q", "completion": turns("assistant=a")[0]}, "completion", "(dict)"),
    ],
)
def test_values_that_are_neither_text_nor_messages(tiny_tokenizer, row, column, got) -> None:
    """The error names the type; the fix of a number, applied, is a row that can be trained on."""
    from recipes import sft

    with pytest.raises(DataError) as error:
        sft.build_data([row], tiny_tokenizer, 512, "last")
    assert error.value.where == f"column {column}"
    assert error.value.what == "wrong type"
    assert error.value.got.endswith(got)
    if not isinstance(row[column], dict) and isinstance(row["prompt"], (str, int)):
        text = error.value.fix.removeprefix('Write it as text: "').removesuffix('".')
        assert len(sft.build_data([{**row, column: text}], tiny_tokenizer, 512, "last")[0]) == 1


@pytest.mark.parametrize(
    ("row", "fixed"),
    [
        ({"prompt": "copy: ", "completion": "red"}, {"prompt": "copy:", "completion": " red"}),
        ({"prompt": "wha", "completion": "t now"}, {"prompt": "what", "completion": " now"}),
    ],
)
def test_a_token_across_the_boundary_has_a_fix_for_the_row(
    tmp_path: Path, tiny_tokenizer, row, fixed
) -> None:
    """Users of a recipe can change their rows, not the arguments of render_completion()."""
    from recipes import sft

    path = str(write_jsonl(tmp_path / "a.jsonl", [row]))
    with pytest.raises(DataError, match=r"^a\.jsonl:1, column prompt, token \d+ of") as error:
        sft.build_data(load_rows(path, PAIR), tiny_tokenizer, 512, "last")
    assert "boundary=" not in str(error.value)
    assert "space at the start of the completion" in error.value.fix
    assert "as messages" in error.value.fix
    chat_row = {
        "prompt": turns(row["prompt"]),
        "completion": turns(f"assistant={row['completion']}"),
    }
    for better in (fixed, chat_row):
        assert len(sft.build_data([better], tiny_tokenizer, 512, "last")[0]) == 1


def test_a_missing_chat_template_can_be_set_where_the_error_says(
    tmp_path: Path, tiny_tokenizer
) -> None:
    """Each place the error names, filled, renders the messages."""
    from transformers import AutoTokenizer

    template = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = None
    tiny_tokenizer.save_pretrained(tmp_path)
    bare = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no chat template") as error:
        chat.render_prompt(bare, turns("q"))
    for place in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.chat_template"):
        assert place in error.value.fix
    assert "plain text" in error.value.fix
    config = tmp_path / "tokenizer_config.json"
    without = config.read_text(encoding="utf-8")
    config.write_text(json.dumps({**json.loads(without), "chat_template": template}), "utf-8")
    wanted = chat.render_prompt(AutoTokenizer.from_pretrained(tmp_path), turns("q"))
    config.write_text(without, encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert chat.render_prompt(AutoTokenizer.from_pretrained(tmp_path), turns("q")) == wanted
    bare.chat_template = template
    assert chat.render_prompt(bare, turns("q")) == wanted
    assert chat.render_prompt(bare, "q")


def test_errors_name_the_longest_column_that_fits() -> None:
    """Of columns with a common prefix, the longest match, whatever order a set of them has."""
    row = {"prompt_text"[:i]: "a" for i in range(1, 12)}
    for place, column in {"prompt_text[0]": "prompt_text", "prompt, token 1": "prompt"}.items():
        with pytest.raises(DataError) as error, chat.naming(row):
            raise DataError(place, "wrong")
        assert error.value.where == f"column {column}{place[len(column) :]}"


def test_held_out_conversations_end_at_their_last_answer() -> None:
    from recipes import sft

    row = {"messages": turns("q", "a", "thanks")}
    assert sft.question_and_answer(row) == (turns("q"), "a")


@pytest.mark.parametrize(
    ("row", "wanted", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         (PAIR, ("messages",)), {"messages": turns("a", "b")}),
        ({"instruction": "a", "output": "b"}, (PAIR, ("messages",)),
         {"prompt": "a", "completion": "b"}),
        ({"question": "a", "answer": "b"}, (PAIR,), {"prompt": "a", "completion": "b"}),
        ({"question": "a", "answer": "b"}, (("prompt", "answer"),), {"prompt": "a", "answer": "b"}),
        ({"text": "a\nb"}, (PAIR,), {"prompt": "a", "completion": "b"}),
    ],
)  # fmt: skip
def test_columns_of_other_formats_come_with_code_that_renames_them(
    tmp_path, row, wanted, expected
) -> None:
    """The code is run as printed."""
    import datasets

    with pytest.raises(DataError, match=r"looks like .*With the dataset as ds: ds") as error:
        load_rows(str(write_jsonl(tmp_path / "a.jsonl", [row])), wanted)
    line = str(error.value).split("With the dataset as ds: ")[1].split(".to_json(")[0]
    renamed = eval(line, {"ds": datasets.Dataset.from_list([row])})[0]
    assert {key: renamed[key] for key in expected} == expected


def test_too_few_rows_name_the_flag(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS * 5))
    with pytest.raises(DataError, match=r"Pass --test_rows 3, a tenth"):
        train_test(path, PAIR, 100, 0)


def test_a_long_row_is_dropped_without_a_warning(tiny_tokenizer, caplog) -> None:
    import logging

    from recipes import sft

    from transformers.utils import logging as hf_logging

    tiny_tokenizer.model_max_length = 8
    hf_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            rows = [{"prompt": "a b c" * 20, "completion": " d"}]
            assert sft.build_data(rows, tiny_tokenizer, 8, "last") == ([], [])
    finally:
        hf_logging.disable_propagation()
    assert not caplog.records


def test_other_columns_can_be_kept(tmp_path):
    """What a reward may read: columns that some rows lack, at the row's place."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "tests": [1]}\n{"prompt": "b", "hint": ""}\n', "utf-8")
    assert load_rows(str(path), ("prompt",)) == [{"prompt": "a"}, {"prompt": "b"}]
    rows = load_rows(str(path), ("prompt",), all_columns=True)
    assert rows == [{"prompt": "a", "tests": [1]}, {"prompt": "b", "hint": ""}]
    assert (rows[1] | {"n": 1}).where == rows[1].where
    assert (rows[1] | {"n": 1})["n"] == 1
