"""Reward functions: weights, names, what they see, async ones, and errors that name the row."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

from cookbook_core import rewards
from cookbook_core.data.rows import PlacedRow
from cookbook_core.errors import ConfigError, RewardError
from cookbook_core.rewards import Completion, grade, in_threads, weights_by_name
from cookbook_core.types import SampledSequence

import numpy as np
import pytest

ROWS = [PlacedRow(f"sums.jsonl:{i + 1}", {"prompt": f"{i} + 1?", "n": i}) for i in range(3)]
TEXTS = [[Completion("a"), Completion("bb")] for _ in ROWS]


def length(row: Any, completions: list[Completion]) -> list[float]:
    return [float(len(text)) for text in completions]


def number(row: Any, completions: list[Completion]) -> list[float]:
    return [row["n"]] * len(completions)


def test_the_weighted_sum_and_each_functions_mean() -> None:
    """Lengths 1 and 2, minus half of the row's number 0, 1, 2."""
    found, metrics = grade({"length": (1.0, length), "number": (-0.5, number)}, ROWS, TEXTS)
    assert found == [[1.0, 2.0], [0.5, 1.5], [0.0, 1.0]]
    assert metrics == {"reward_length": 1.5, "reward_number": 1.0}


def test_a_completion_is_its_text_with_tokens_and_stop_reason() -> None:
    cut = SampledSequence("length", "s", np.array([5, 6]), np.array([-1.0, -1.0]))
    made = Completion.of("four", cut)
    assert made == "four"
    assert (made.tokens, made.stop_reason, made.upper()) == ([5, 6], "length", "FOUR")


def test_async_functions_run_concurrently_up_to_the_limit() -> None:
    """All of the six calls that may run at a time wait for each other: one by one would hang."""
    running, most = 0, 0

    async def slow(row: Any, completions: list[Completion]) -> list[float]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.wait_for(together.wait(), 20)
        running -= 1
        return number(row, completions)

    together = asyncio.Barrier(3) if hasattr(asyncio, "Barrier") else None
    if together is None:
        pytest.skip("asyncio.Barrier is new in Python 3.11")
    six = [*ROWS, *ROWS]
    found, _ = grade({"slow": (1.0, slow)}, six, [TEXTS[0]] * 6, limit=3)
    assert found == [[0, 0], [1, 1], [2, 2]] * 2
    assert most == 3


def test_a_blocking_function_runs_in_threads() -> None:
    together = threading.Barrier(3, timeout=20)  # breaks where the calls come one after another

    def blocking(row: Any, completions: list[Completion]) -> list[float]:
        together.wait()
        return number(row, completions)

    assert grade({"b": (1.0, in_threads(blocking))}, ROWS, TEXTS)[0] == [[0, 0], [1, 1], [2, 2]]


def test_it_works_inside_a_running_loop() -> None:
    """As in a notebook."""

    async def cell() -> Any:
        return grade({"t": (1.0, in_threads(number))}, ROWS, TEXTS)

    assert asyncio.run(cell())[0] == [[0, 0], [1, 1], [2, 2]]


def test_progress_is_printed_now_and_then(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(rewards, "REPORT_SECONDS", -1.0)
    grade({"t": (1.0, in_threads(number))}, ROWS, TEXTS, limit=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["rewards: 1 of 3 calls done", "rewards: 2 of 3 calls done"]


# ---- errors --------------------------------------------------------------------------------------

WHERE = r'reward "mine" for sums.jsonl:2, the prompt \'1 \+ 1\?\''


def bad(row: Any, completions: list[Completion], *, returned: Any) -> Any:
    if row["n"] != 1:
        return [0.0] * len(completions)
    if isinstance(returned, Exception):
        raise returned
    return returned


async def bad_later(row: Any, completions: list[Completion], *, returned: Any) -> Any:
    return bad(row, completions, returned=returned)


@pytest.mark.parametrize("function", [bad, bad_later])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (RuntimeError("judge is down"), r"raised RuntimeError: judge is down.*See line \d+"),
        ([1.0], r"wrong return value. Expected 2 finite numbers.*got 1: \[1.0\]"),
        (None, "wrong return value.*got None"),
        ("01", "wrong return value.*got '01'"),
        ([0.0, float("nan")], "not a number for completion 1.*got nan"),
        (["high", 1.0], "not a number for completion 0.*got 'high'"),
        ([None, 1.0], "not a number for completion 0.*got None"),
    ],
)
def test_an_error_names_the_function_the_row_and_the_prompt(
    function: Any, returned: Any, message: str
) -> None:
    mine = partial(function, returned=returned)
    with pytest.raises(RewardError, match=f"(?s){WHERE}.*{message}") as caught:
        grade({"length": (1.0, length), "mine": (1.0, mine)}, ROWS, TEXTS)
    if isinstance(returned, Exception):
        assert caught.value.__cause__ is returned


def test_after_a_failure_no_further_async_call_is_started() -> None:
    """Those that run then are finished, and every failure is listed."""
    started = []

    async def failing(row: Any, completions: list[Completion]) -> list[float]:
        started.append(row["n"])
        await asyncio.sleep(0)
        raise ValueError(f"no {row['n']}")

    with pytest.raises(RewardError, match=r"(?s):1, .*no 0.*:2, .*no 1") as caught:
        grade({"f": (1.0, failing)}, ROWS, TEXTS, limit=2)
    assert started == [0, 1]
    assert "no 2" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["exakt"], 'unknown.*Did you mean "exact"'),
        (["exact", "exact=2"], "given twice"),
        (["exact=much"], "weight is not a finite number.*got exact=much"),
        (["exact=inf"], "weight is not a finite number"),
        ([], "empty.*exact, overlong"),
    ],
)
def test_a_bad_entry_names_the_field(entries: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"Config.rewards: {message}"):
        weights_by_name("Config.rewards", entries, ["exact", "overlong"])


def test_a_path_needs_no_known_name() -> None:
    found = weights_by_name("Config.rewards", ["runs/a=b/final=0.5", "exact"], ["exact"])
    assert found == {"runs/a=b/final": 0.5, "exact": 1.0}
