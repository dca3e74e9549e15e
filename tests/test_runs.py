"""The command line, and what a run leaves in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cookbook_core.custom_loss import differentiate
from cookbook_core.errors import ConfigError, DataError, LossError
from cookbook_core.runs import (
    Panel,
    PositiveInt,
    Rule,
    Run,
    RunFlags,
    check_fields,
    main,
    parse_config,
    read_metrics,
    run_folder,
    tracking,
)
from cookbook_core.runs.progress import Progress

import pytest


@dataclass
class Config:
    """Parameters."""

    num_steps: int = 30
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Adam step size [none]."""
    shuffle: bool = True
    """Draw rows at random."""
    log_path: str = ""
    """Run folder."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError("Config.num_steps", "too few")


# ---- command line --------------------------------------------------------------------------


def test_flags_set_fields() -> None:
    argv = ["--num_steps", "7", "--learning-rate=1e-4", "--no_shuffle", "--log_path", "a b"]
    assert parse_config(Config, argv) == (Config(7, 1e-4, False, "a b"), RunFlags())
    assert parse_config(Config, []) == (Config(), RunFlags())
    argv = ["--save_every", "3", "--keep_last", "1", "--fresh"]
    assert parse_config(Config, argv) == (Config(), RunFlags(3, 1, True))


@pytest.mark.parametrize(
    ("argv", "shuffle"),
    [
        (["--shuffle"], True),
        (["--shuffle", "True"], True),
        (["--shuffle", "false"], False),
        (["--shuffle=False"], False),
        (["--no_shuffle"], False),
        (["--no-shuffle", "--shuffle", "true", "--num_steps", "3"], True),
    ],
)
def test_boolean_flags_take_a_value_or_none(argv: list[str], shuffle: bool) -> None:
    assert parse_config(Config, argv)[0].shuffle is shuffle
    assert parse_config(Config, ["--fresh", "true"])[1].fresh


def test_a_field_without_a_default_is_a_flag_that_must_be_given(
    capsys: pytest.CaptureFixture,
) -> None:
    @dataclass
    class Required:
        beta: float
        log_path: str = ""

    assert parse_config(Required, ["--beta", "2"])[0] == Required(2.0)
    with pytest.raises(SystemExit, match="2"):
        parse_config(Required, [])
    assert "--beta" in capsys.readouterr().err


def test_help_shows_each_docstring_default_and_the_recipe(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_config(Config, ["--help"])
    shown = capsys.readouterr().out
    assert "The command line, and what a run leaves in its folder." in shown
    for text in ("--num_steps", "Optimizer steps. (default: 30)", "Adam step size [none]."):
        assert text in shown


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--num_step", "3"], '--num_step: no such flag. Did you mean "num_steps"?'),
        (["--learning-rat=3"], '--learning-rat: no such flag. Did you mean "learning_rate"?'),
        (
            ["--zzz"],
            "Known: base_url, chat_template_kwargs, fresh, keep_last, learning_rate, log_path",
        ),
        (["--save_every", "0"], "Config.save_every: out of range"),
        (
            ["--num_steps", "many"],
            "Error parsing --num_steps: invalid literal for int() with base 10",
        ),
        (["--num_steps"], "Missing value for argument '--num_steps'. Expected 1 values.\npyt"),
        (["--lr", "1"], '--lr: no such flag. Did you mean "learning_rate"?'),
        (["--epochs", "1"], '--epochs: no such flag. Did you mean "num_steps"?'),
        (["--num_steps", "0"], "Config.num_steps: too few"),
        (
            ["--shuffle", "maybe"],
            "maybe: unexpected argument. Names of flags begin with --; a bool",
        ),
        (["--resume", "runs/nope-1"], "runs/nope-1: not a run folder. Expected the config.json of"),
        (["--track", "wand"], "invalid choice 'wand' for argument '--track'"),
    ],
)
def test_bad_flags_exit_with_2(argv: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_config(Config, argv)
    err = capsys.readouterr().err
    assert says in err
    assert len(err.splitlines()) <= 2


def test_help_whose_reader_has_gone() -> None:
    """`--help | head -1`: no traceback, neither at once nor when Python ends."""
    command = [sys.executable, "-m", "recipes.sft", "--help"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], **streams) as done:
        done.stdout.close()
        assert done.stderr.read() == b""
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (DataError("rows.jsonl:3", "broken"), 1, "rows.jsonl:3: broken.\n"),
        (ConfigError("Config.log_path", "in use"), 2, "Config.log_path: in use.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
    ],
)
def test_exit_codes(
    error: BaseException | None,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """What went wrong is one message; there is nothing to read in our own frames."""

    def train(config: Config, saving: RunFlags) -> None:
        assert (config, saving) == (Config(num_steps=3), RunFlags(fresh=True))
        if error:
            raise error

    monkeypatch.setattr(sys, "argv", ["my_sft.py", "--num_steps", "3", "--fresh"])
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as end:
        main(Config, train)
    assert not code or end.value.code == code
    assert capsys.readouterr().err == says


def test_a_loss_that_raises_is_shown_with_its_own_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ours are left out; an exception that is none of ours is Python's to show."""
    import torch

    def my_loss(data: list, logprobs: list) -> tuple:
        return {}["beta"], {}

    def train(config: Config, saving: RunFlags) -> None:
        differentiate(my_loss, [], [torch.zeros(1)])

    monkeypatch.setattr(sys, "argv", ["my_sft.py"])
    with pytest.raises(SystemExit, match="1"):
        main(Config, train)
    err = capsys.readouterr().err
    assert err.startswith(f'  File "{__file__}", line ')
    assert 'in my_loss\n    return {}["beta"], {}' in err
    assert err.splitlines()[-1].startswith("my_loss(): raised KeyError: 'beta'.")
    assert "custom_loss.py" not in err
    with pytest.raises(KeyError):
        main(Config, lambda *_: my_loss([], []))


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--help"], 0, ""),
        (["--batch_sise", "2"], 2, 'Did you mean "batch_size"?'),
        (["--dataset", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file"),
        (["--dataset", "tiny/sft@trian"], 1, 'Did you mean "train"?'),
        (["--batch_size", "0"], 2, "Config.batch_size: out of range. Expected > 0, got 0."),
    ],
)
def test_a_recipe_on_the_command_line(
    flags: list[str], code: int, says: str, tmp_path: Path
) -> None:
    """Also where the stream's encoding holds less than what is printed, as on Windows. Help and
    unknown flags are answered without torch: here it cannot be imported."""
    root = Path(__file__).parents[1]
    path = [str(root)]
    if flags[0] in ("--help", "--batch_sise"):
        (tmp_path / "torch.py").write_text("raise ImportError", encoding="utf-8")
        path.insert(0, str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "recipes.sft", *flags],
        cwd=root,
        capture_output=True,
        encoding="ascii",
        env={
            **os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80",
            "PYTHONPATH": os.pathsep.join(path),
        },
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if not code:
        assert "usage: python -m recipes.sft [-h]" in done.stdout
        docs = done.stdout.split("usage:")[0].splitlines()
        assert docs[2].startswith("    L = - sum over tokens")
        assert all(len(line) <= 80 for line in docs if not line.startswith("    "))
        assert "instead of --lora_rank. Empty starts" in " ".join(done.stdout.split()).replace(
            " ? ? ", " "
        )


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("import cookbook_core\nprint('mine')", "mine"),
        (
            "import dataclasses\nfrom cookbook_core import runs\nimport heavy\n\n"
            "@dataclasses.dataclass\nclass Config:\n    size: int = heavy.size\n\n"
            "train = print\nif __name__ == '__main__':\n    runs.main(Config, train)",
            "--size INT",
        ),
    ],
    ids=["no recipe", "a Config that needs more"],
)
def test_other_programs_answer_their_own_help(program: str, printed: str, tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("size = 3", encoding="utf-8")
    (tmp_path / "mine.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "mine.py", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert printed in done.stdout, done.stderr
    assert done.returncode == 0


def test_the_command_line_needs_no_heavy_import() -> None:
    """Chat, data and runs, with a config parsed, load neither torch nor the libraries on top."""
    code = (
        "import sys, dataclasses\n"
        "import cookbook_core.chat, cookbook_core.data, cookbook_core.runs as runs\n"
        "runs.parse_config(dataclasses.make_dataclass('C', [('a', int, 1)]), ['--a', '2'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'pandas', 'tqdm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@dataclass
class Checked:
    """Fields of each kind that `check_fields` knows."""

    count: PositiveInt = 3
    share: Annotated[float, Rule(lambda share: 0 <= share < 1, "in [0, 1)")] = 0.5
    flag: bool = False
    name: str = "a"
    kind: Literal["last", "all"] = "last"
    pair: tuple[str, str] = ("a", "b")
    words: tuple[str, ...] = ("a",)
    others: list[int] = dataclasses.field(default_factory=list)
    either: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"count": True}, r"Config\.count: wrong type\. Expected int, got True \(bool\)\."),
        ({"count": "3"}, r"Config\.count: wrong type\. Expected int, got '3' \(str\)\."),
        ({"count": 3.0}, r"Config\.count: wrong type\. Expected int, got 3\.0 \(float\)\."),
        ({"count": 0}, r"Config\.count: out of range\. Expected > 0, got 0\."),
        ({"share": 1}, r"Config\.share: out of range\. Expected in \[0, 1\), got 1\."),
        ({"share": math.nan}, r"Config\.share: out of range\. Expected a finite number, got nan\."),
        ({"share": True}, r"Config\.share: wrong type\. Expected float, got True"),
        ({"flag": 1}, r"Config\.flag: wrong type\. Expected bool, got 1"),
        ({"name": 1}, r"Config\.name: wrong type\. Expected str, got 1"),
        ({"kind": "al"}, r"Config\.kind: unknown choice\. .*got 'al'\. Did you mean \"all\"\?"),
        ({"pair": ("a",)}, r"Config\.pair: wrong type\. Expected 2 values, got \('a',\)"),
        ({"pair": ("a", 1)}, r"Config\.pair\[1\]: wrong type\. Expected str, got 1"),
        ({"words": "ab"}, r"Config\.words: wrong type\. Expected a list of values, got 'ab'"),
        ({"either": 3}, r"Config\.either: wrong type\. Expected str \| None, got 3"),
        ({"words": ("a", 2)}, r"Config\.words\[1\]: wrong type"),
        ({"count": 0, "flag": "x"}, r"Config\.count: out(.|\n)*Config\.flag: wrong type"),
    ],
)
def test_fields_are_checked_against_their_annotations(values: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Checked(**values)
    Checked(count=1, share=0, name=Path("a"), pair=["a", "b"], words=())  # type: ignore[arg-type]


def test_a_run_that_never_began_leaves_its_folder_to_another(tmp_path: Path) -> None:
    """After a mistaken model name the corrected command uses the same folder."""
    first = make_run(tmp_path)
    first.close()
    corrected = Config(shuffle=False, log_path=str(tmp_path / "run"))
    with Run.open("sft", corrected, 30) as run:
        written = json.loads((run.path / "config.json").read_text(encoding="utf-8"))
        assert written["config"]["shuffle"] is False
        run.log(0, {"loss": 1.0})
    with pytest.raises(ConfigError, match="holds a run with other parameters"):
        make_run(tmp_path)


def test_a_log_path_that_cannot_be_made_is_a_mistaken_command(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"Config\.log_path: not usable"):
            Run.open("sft", Config(log_path=str(path)), 30)


# ---- metrics -------------------------------------------------------------------------------


def make_run(tmp_path: Path, num_steps: int = 30, **kwargs: object) -> Run:
    return Run.open("sft", Config(log_path=str(tmp_path / "run")), num_steps, **kwargs)


def test_metrics_are_strict_json_and_nan_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import numpy

    run = make_run(tmp_path)
    run.log(0, {"loss": numpy.array(0.5), "kl": math.inf})
    run.log(1, {"loss": 1, "kl": math.nan})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (run.path / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert rows == [{"step": 0, "loss": 0.5, "kl": None}, {"step": 1, "loss": 1.0, "kl": None}]
    assert capsys.readouterr().out.count('metric "kl" is') == 1


def test_a_first_evaluation_that_is_nan_does_not_end_the_run(tmp_path: Path) -> None:
    with make_run(tmp_path) as run:
        before = run.once("before", lambda: {"test_loss": math.nan, "test_kl": math.inf})
        assert math.isnan(before["test_loss"])
        run.log(0, before)
        run.once("other", lambda: 1)
        run.save_before_after("Held out", before, {"test_loss": math.nan})
    assert read_metrics(run.path) == [{"step": 0, "test_loss": None, "test_kl": None}]
    again = run_folder.read_record(run.path)["values"]
    assert math.isnan(again["before"]["test_loss"])
    assert again["before"]["test_kl"] == math.inf


def test_once_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(ConfigError, match=r'Run\.once\("bad"\): not a JSON value'):
        run.once("bad", lambda: {1, 2})
    assert run.once("good", lambda: (1, 2)) == [1, 2]


@pytest.mark.parametrize("value", ["x", None, [1.0, 2.0]])
def test_a_metric_that_is_no_number_is_refused(tmp_path: Path, value: object) -> None:
    run = make_run(tmp_path)
    with pytest.raises(LossError, match=r'metrics\["kl"\]: not a number'):
        run.log(0, {"loss": 1.0, "kl": value})  # type: ignore[dict-item]
    with pytest.raises(LossError, match='"step"'):
        run.log(0, {"step": 1.0})
    assert read_metrics(run.path) == []


def test_broken_metrics_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics.jsonl:2: broken"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(("num_steps", "least", "most"), [(3, 3, 3), (30, 9, 12), (1000, 9, 12)])
def test_plain_progress_lines(
    tmp_path: Path, num_steps: int, least: int, most: int, capsys: pytest.CaptureFixture
) -> None:
    """Without a terminal about ten lines, first and last step among them."""
    with make_run(tmp_path, num_steps, progress=("loss", "accuracy")) as run:
        for step in range(num_steps):
            run.log(step, {"test_loss": float(step), "accuracy": 0.125})
            run.log(step, {"loss": 0.5, "accuracy": 0.25, "grad_norm": 9.0})
        run.log(num_steps, {"test_loss": 1.0, "accuracy": 0.5})
    shown = capsys.readouterr().out
    assert "\r" not in shown
    lines = shown.splitlines()[1:]
    assert (run.path / "config.json").exists()
    assert least <= len(lines) <= most
    assert lines[0].startswith(f"step 1/{num_steps}  loss 0.5  accuracy 0.25")
    assert "  ETA 00:0" in lines[1]
    assert lines[-1] == f"step {num_steps}/{num_steps}  loss 0.5  accuracy 0.25"


@pytest.mark.parametrize(("out", "err"), [(True, True), (True, False), (False, True)])
def test_progress_bar_where_both_streams_are_terminals(
    tmp_path: Path,
    out: bool,
    err: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """One line with step, loss, the recipe's metric, tokens/s and what is left; else a log."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: out)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: err)
    run = make_run(tmp_path, 4, progress=("loss", "test_accuracy"))
    run._progress.begin()
    run.log(0, {"test_accuracy": 0.5})
    for step in range(2):
        run.log(step, {"loss": 0.125, "tokens": 1e6})
    run._progress.say("said")
    for step in range(2, 4):
        run.log(step, {"loss": 0.125, "tokens": 1e6})
    run.close()
    streams = capsys.readouterr()
    assert "said\n" in streams.out
    if out and err:
        last = streams.err.split("\r")[-1]
        assert re.search(r"sft: 100%.* 4/4 \[\d\d:\d\d<00:00,", last)
        assert re.search(r"loss=0.125, test_accuracy=0.5, tokens/s=\d{5,}\]", last)
        assert "step 1/4" not in streams.out
    else:
        assert streams.err == ""
        assert "step 4/4  loss 0.125  test_accuracy 0.5  tokens/s " in streams.out


def test_the_rate_is_tokens_of_this_process_over_its_wall_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By hand: 3 steps of 300 tokens and an evaluation in 6 s; 10 of 20 steps were done before."""
    now = [100.0]
    monkeypatch.setattr("cookbook_core.runs.progress.time.perf_counter", lambda: now[0])
    progress = Progress("sft", 20, 10, ["loss"])
    now[0] = 150.0  # the model is loaded meanwhile
    progress.begin()
    progress.show(10, {"test_loss": 1.0})
    for step, at in ((10, 152.0), (11, 155.0), (12, 156.0)):
        now[0] = at
        progress.show(step, {"loss": 0.5, "tokens": 300.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 11/20  loss 0.5  tokens/s 150  ETA 00:18",  # 300 / 2 s; 9 steps at 2 s
        "step 13/20  loss 0.5  tokens/s 150  ETA 00:14",  # 900 / 6 s; 7 steps at 2 s
    ]
    progress.show(14, {"loss": 0.5, "tokens": 300.0, "tokens_per_second": 12.34})
    assert "tokens/s 12.3  " in capsys.readouterr().out  # what a recipe counts itself


def test_metrics_go_to_the_tracker_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[object] = []
    tracker = tracking.Tracker(
        lambda step, metrics: sent.append((step, dict(metrics))), lambda: sent.append("closed")
    )
    monkeypatch.setattr("cookbook_core.runs.run.open_tracker", lambda kind, *_: (kind, tracker)[1])
    with make_run(tmp_path, flags=RunFlags(track="trackio")) as run:
        run.log(0, {"loss": 0.5, "kl": math.nan})
    assert sent == [(0, {"loss": 0.5, "kl": None}), "closed"]


def test_what_results_depend_on_is_recorded_and_a_change_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json says which threads, dtype and batch sizes a run had, on this machine too."""
    run = make_run(tmp_path)
    client = run.service_client("cpu", "float32").create_lora_training_client("tiny", 1).result()
    assert {"device": "cpu", "dtype": "float32", "threads": 1, "processes": 1}.items() <= (
        client.machine.items()
    )
    run.log(0, {"loss": 1.0})
    assert next(run.steps(client)) == 0
    text = (run.path / "config.json").read_text(encoding="utf-8")
    assert json.loads(text)["machine"] == client.machine
    run._save(1)
    run.close()
    client._backend.machine["threads"] = 3
    with make_run(tmp_path) as again:
        assert again.first_step == 1
        capsys.readouterr()
        next(again.steps(client))
        assert "threads 1 -> 3" in capsys.readouterr().out
    text = (run.path / "config.json").read_text(encoding="utf-8")
    assert json.loads(text)["machine"]["threads"] == 3


def test_service_client_saves_in_the_run_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    client = run.service_client("cpu", "float32").create_lora_training_client("tiny", 1).result()
    path = Path(client.save_state("mine").result().path)
    assert path.is_relative_to(run.path / "checkpoints")
    with pytest.raises(ConfigError, match="base_url"):
        make_run(tmp_path / "other", flags=RunFlags(base_url="nonsense")).service_client()


def test_rows_that_are_all_too_long_are_refused_with_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path)
    run.report_rows("pairs", 3, 1, 6, 512)
    printed = "pairs: 3 to train on, 1 held out; dropped as longer than 512 tokens: 2\n"
    assert printed in capsys.readouterr().out
    for train, test, purpose in ((0, 3, "to train on"), (3, 0, "held out")):
        says = rf"dataset: no pairs {purpose}: all are longer than 8 tokens.*larger --max_length"
        with pytest.raises(ConfigError, match=says):
            run.report_rows("pairs", train, test, 6, 8)


# ---- nothing is learnt ---------------------------------------------------------------------


def rows_of(**columns: list) -> list[dict[str, float]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("rows", "warned_at", "says"),
    [
        (rows_of(loss=[1.0, 0.9, 0.8], grad_norm=[1.0, 0.0, 0.0]), [1], "exactly 0 at 2 of 3"),
        (rows_of(loss=[1.0, 0.9, 0.8], grad_norm=[1.0, 0.5, 1e-9]), [], ""),
        (rows_of(zero_variance=[1.0] * 7), [4], "same reward at each of the 7 steps"),
        (rows_of(zero_variance=[1.0] * 2), [], "same reward at each of the 2 steps"),
        (rows_of(zero_variance=[1.0] * 6 + [0.5]), [4], ""),
        (rows_of(zero_variance=[0.5] + [1.0] * 6), [], ""),
        (rows_of(test_loss=[6.0884232] * 3), [2], "no held-out metric moved over the last 3"),
        (rows_of(test_loss=[6.0884232, 6.0884235]), [], "no held-out metric moved over the last 2"),
        (rows_of(test_loss=[6.0, 7.2276625, 7.2276621, 7.2276625]), [3], "no held-out metric"),
        (rows_of(test_loss=[6.0, 5.0, 5.0], test_match=[0.0, 0.0, 0.1]), [], ""),
    ],
)
def test_a_run_that_learns_nothing_says_so(
    rows: list[dict], warned_at: list[int], says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """While it happens, and below the table of its summary."""
    run = make_run(tmp_path)
    for step, row in enumerate(rows):
        run.log(step, row)
        assert ("warning: step" in capsys.readouterr().out) == (step in warned_at)
    run.save_before_after("Held out", {"test_x": 1.0}, {"test_x": 2.0})
    summary = (run.path / "summary.md").read_text(encoding="utf-8")
    assert ("warning: " in summary) == bool(says)
    assert says in summary
    assert says in capsys.readouterr().out


# ---- what is kept --------------------------------------------------------------------------


def test_plot_draws_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every metric as a line, evaluation metrics with points, the null as a labelled line."""
    from matplotlib import figure

    figures = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    run = make_run(tmp_path)
    for step in range(30):
        run.log(step, {"loss": 1 / (step + 1), "kl": math.nan if step == 3 else 0.1})
        if step % 10 == 0:
            run.log(step, {"test_loss": 0.5 if step else 0.25})
    panels = [
        Panel("Loss", "loss (nats)", ["loss", "test_loss", "nope"], math.log(2), "nothing learnt"),
        Panel("KL", "KL (nats per token)", ["kl", "test_loss"]),
        Panel("Empty", "none", ["nope"]),
        Panel("More", "loss (nats)", ["loss"]),
    ]
    for count in (2, 3, 4):
        path = run.plot(panels[:count])
        assert path.read_bytes().startswith(b"\x89PNG")
    axes = figures[-1].axes
    assert [axis.get_title() for axis in axes] == ["Loss", "KL", "Empty", "More"]
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    assert list(lines) == ["loss", "test_loss", "nope (not logged)", "nothing learnt: 0.693"]
    assert list(lines["test_loss"].get_xdata()) == [0, 10, 20]
    assert lines["test_loss"].get_marker() != "None"
    assert lines["loss"].get_marker() == "None"
    assert lines["nothing learnt: 0.693"].get_ydata()[0] == math.log(2)
    assert axes[0].get_ylabel() == "loss (nats)"
    assert 3 not in axes[1].get_lines()[0].get_xdata()
    assert axes[1].get_lines()[2].get_label() == "untrained: 0.25"
    assert len(axes[3].get_lines()) == 1
    with pytest.raises(ConfigError, match=r"panels: .*2 to 4, got 1"):
        run.plot(panels[:1])


def test_a_plot_names_its_run_and_shows_small_changes_as_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's folder and parameters as the title; every axis labelled; at least 0.05 high."""
    from cookbook_core.runs.plots import draw_panels

    from matplotlib import figure

    figures = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    rows = [{"step": step, "margin": step * 0.002, "kl": 1e-4 * step} for step in range(4)]
    config = {"model": "/data/models/" + "long/" * 9 + "qwen", "beta": 0.1, "learning_rate": 2e-4}
    config |= {"init_from": "", "clip": [0.8, 1.2], "device": "auto", "log_path": "runs/dpo-7"}
    folder = tmp_path / "dpo-7"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": config}), encoding="utf-8")
    panels = [Panel("Margin", "", ["margin"], 0.0), Panel("KL", "nats", ["kl"], min_range=0.0)]
    draw_panels(panels, rows, folder / "plot.png")
    text = " ".join(figures[0].get_suptitle().split())
    assert text.startswith("dpo-7: model ...")
    assert text.endswith("/qwen, beta 0.1, learning_rate 0.0002, clip (0.8, 1.2)")
    assert [axis.get_ylabel() for axis in figures[0].axes] == ["value", "nats"]
    low, high = figures[0].axes[0].get_ylim()
    assert high - low == pytest.approx(0.05)
    assert -0.001 < low < 0 < 0.006 < high  # no negative half for values that are not negative
    assert figures[0].axes[1].get_ylim()[1] < 0.001
    draw_panels(panels, rows, tmp_path / "plot.png")
    assert figures[1].get_suptitle() == tmp_path.name
    draw_panels(panels, rows, folder / "plot.png", "mine")
    assert figures[2].get_suptitle() == "mine"


def test_summary_and_samples_are_markdown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path)
    run.save_before_after("Held-out pairs", {"test_accuracy": 0.5}, {"test_accuracy": 0.97123456})
    run.save_before_after("Second", {"a|b": 1}, {"a|b": 2, "new": 0.5})
    summary = (run.path / "summary.md").read_text(encoding="utf-8")
    assert "| accuracy | 0.5    | 0.9712 |" in summary
    assert "a\\|b" in summary
    assert "| new    | -      | 0.5   |" in summary
    assert "Held-out pairs" in capsys.readouterr().out
    run.save_samples([{"prompt": "a|b\nc", "after": "<think>`é`"}])
    samples = (run.path / "samples.md").read_text(encoding="utf-8")
    assert "| ` a\\|b\\nc ` | `` <think>`é` `` |" in samples


@pytest.mark.parametrize(
    ("best", "before", "after", "says"),
    [
        (
            "test_accuracy",
            0.5,
            0.13,
            "test_accuracy fell from 0.5 to 0.13: is the sign of the loss",
        ),
        ("-test_accuracy", 0.5, 2.0, "test_accuracy rose from 0.5 to 2: is the sign of the loss"),
        ("test_accuracy", 0.5, 0.5, ""),
        ("test_accuracy", 0.5, 0.6, ""),
        ("-test_accuracy", 0.5, 0.4, ""),
        ("test_other", 0.5, 0.4, ""),
    ],
)
def test_a_run_that_made_its_best_metric_worse_says_so(
    best: str, before: float, after: float, says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path, best=best)
    run.save_before_after("Held out", {"test_accuracy": before}, {"test_accuracy": after})
    summary = (run.path / "summary.md").read_text(encoding="utf-8")
    for text in (summary, capsys.readouterr().out):
        assert ("doctor" in text) == bool(says)
        assert says in text
    if says:
        file = (
            Path(__file__).relative_to(Path.cwd()) if Path.cwd() in Path(__file__).parents else ""
        )
        assert f"cookbook doctor {file or __file__}:" in summary
