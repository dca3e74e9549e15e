"""Run reward functions over completions: several with weights, those that are async concurrently.

    functions = {"exact": (1.0, exact_match), "polite": (0.2, judge)}
    rewards, metrics = grade(functions, rows, [clients.texts_of(tokenizer, g) for g in groups])

A reward function is called with a row of the dataset, all its columns included, and the
completions of its prompt, and returns a number for each. One that waits for something (a judge
behind an API, a sandbox) is `async def`: up to `limit` of its calls run at a time. `in_threads`
makes an ordinary function that blocks into such a one.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from cookbook_core import chat
from cookbook_core.errors import (
    ConfigError,
    RewardError,
    check_choice,
    is_finite,
    raise_all,
)
from cookbook_core.types import SampledSequence

Row: TypeAlias = Mapping[str, Any]
RewardFn: TypeAlias = Callable[[Any, Any], "Sequence[float] | Awaitable[Any]"]
"""reward(row, completions) -> one finite number per completion; it may be `async def`. Completions
that `clients.texts_of` made are `Completion`s."""

REPORT_SECONDS = 10.0
"""Time between two lines on how many prompts are graded."""


class Completion(str):
    """The text of a completion, with what else a reward may read.

    tokens: the sampled ids, the end token included.
    stop_reason: "stop", or "length" where max_tokens cut it off.
    """

    tokens: list[int]
    stop_reason: str

    @classmethod
    def of(cls, text: str, sequence: SampledSequence) -> Completion:
        """A sequence's decoded text, with its ids and the reason why it ended."""
        made = cls(text)
        made.tokens, made.stop_reason = sequence.tokens, sequence.stop_reason
        return made


def in_threads(reward_fn: Callable[[Any, Any], Sequence[float]]) -> RewardFn:
    """The async form of a reward function that blocks, such as one that waits for a request.

    It is called from several threads at a time.
    """

    @functools.wraps(reward_fn)
    async def threaded(row: Any, completions: Any) -> Sequence[float]:
        return await asyncio.to_thread(reward_fn, row, completions)

    return threaded


def grade(
    functions: Mapping[str, tuple[float, RewardFn]],
    rows: Sequence[Row],
    completions: Sequence[list[str]],
    *,
    limit: int = 16,
) -> tuple[list[list[float]], dict[str, float]]:
    """Grade the completions of each row's prompt.

        reward = sum over functions of weight * value

    Args:
        functions: name: (weight, function). Ordinary functions are called one by one in this
            thread, before any that is async.
        rows: P rows with a column "prompt".
        completions: P lists.
        limit: calls of async functions that run at a time.
    Returns:
        rewards: P lists, in the order of the completions.
        metrics: "reward_NAME", the mean value of each function before weighting.
    Raises:
        RewardError: a function raised, or returned another count or something that is no finite
            number; names the function, the row and its prompt. Async calls that are running then
            are finished, and every one that failed is listed.
    """
    values: dict[tuple[str, int], list[float]] = {}
    waiting = []
    for name, (_, function) in functions.items():
        for i, row in enumerate(rows):
            if inspect.iscoroutinefunction(function):
                waiting.append((name, i))
                continue
            where = _where(name, row)
            try:
                returned = function(row, completions[i])
            except Exception as error:
                raise RewardError.caused_by(where, error) from error
            values[name, i] = _numbers(where, returned, len(completions[i]))
    if waiting:

        async def run() -> None:
            await _grade_waiting(functions, rows, completions, waiting, limit, values)

        with ThreadPoolExecutor(1) as thread:  # a notebook's own thread has a loop already
            thread.submit(asyncio.run, run()).result()
    rewards = [
        [sum(functions[name][0] * values[name, i][g] for name in functions) for g in range(len(c))]
        for i, c in enumerate(completions)
    ]
    count = max(1, sum(map(len, completions)))
    return rewards, {
        f"reward_{name}": sum(sum(values[name, i]) for i in range(len(rows))) / count
        for name in functions
    }


async def _grade_waiting(
    functions: Mapping[str, tuple[float, RewardFn]],
    rows: Sequence[Row],
    completions: Sequence[list[str]],
    jobs: Sequence[tuple[str, int]],
    limit: int,
    values: dict[tuple[str, int], list[float]],
) -> None:
    """Fill in the values of the async functions; after a failure no further call is started."""
    gate, problems = asyncio.Semaphore(limit), []
    done, report_at = 0, time.monotonic() + REPORT_SECONDS

    async def call(name: str, i: int) -> None:
        nonlocal done, report_at
        async with gate:
            if problems:
                return
            where = _where(name, rows[i])
            try:
                returned: Any = functions[name][1](rows[i], completions[i])
                values[name, i] = _numbers(where, await returned, len(completions[i]))
            except RewardError as error:
                problems.append(error)
            except Exception as error:
                problem = RewardError.caused_by(where, error)
                problem.__cause__ = error
                problems.append(problem)
            done += 1
            if time.monotonic() > report_at and done < len(jobs):
                print(f"rewards: {done} of {len(jobs)} calls done", flush=True)
                report_at = time.monotonic() + REPORT_SECONDS

    await asyncio.gather(*(call(name, i) for name, i in jobs))
    raise_all(problems)


def _where(name: str, row: Row) -> str:
    """How an error names a call: the function, the row's place in its dataset, the prompt."""
    place = getattr(row, "where", "")  # a plain dict has no place
    prompt = f"the prompt {chat.last_text(row['prompt'])!r}"
    return f'reward "{name}" for {f"{place}, " if place else ""}{prompt}'


def _numbers(where: str, returned: Any, count: int) -> list[float]:
    """Check that a function returned one finite number per completion."""
    rule = f"{count} finite numbers, one per completion"
    fix = "Return them in the order of the completions; a failed one can be 0."
    listed = isinstance(returned, Iterable) and not isinstance(returned, (str, Mapping))
    values = list(returned) if listed else []
    if not listed or len(values) != count:
        got = f"{len(values)}: {values}" if listed else repr(returned)
        raise RewardError(where, "wrong return value", expected=rule, got=got, fix=fix)
    numbers = [_number(value) for value in values]
    for i, number in enumerate(numbers):
        if number is None:
            what, got = f"not a number for completion {i}", repr(values[i])
            raise RewardError(where, what, expected=rule, got=got, fix=fix)
    return [number for number in numbers if number is not None]


def _number(value: Any) -> float | None:
    """A number, bool or 0-d array as a float; None for anything else, NaN and infinity."""
    try:
        number = None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return number if is_finite(number) else None


def weights_by_name(where: str, entries: Sequence[str], known: Iterable[str]) -> dict[str, float]:
    """Read `["exact", "overlong=0.5"]` as weights by name; one without "=" weighs 1.

    Args:
        where: how to name the entries in an error, such as "Config.rewards".
        entries: NAME, or NAME=WEIGHT. A name with a "/" is a path, and need not be known.
        known: the names there are.
    Raises:
        ConfigError: no entry, a name that is unknown or given twice, a weight that is not a finite
            number.

    >>> weights_by_name("Config.rewards", ["exact", "overlong=0.5"], ["exact", "overlong"])
    {'exact': 1.0, 'overlong': 0.5}
    """
    known, weights = list(known), {}
    if not entries:
        rule = "at least one of " + ", ".join(known)
        raise ConfigError(where, "empty", expected=rule, fix=f"Give {known[0]}.")
    for entry in entries:
        name, equals, text = entry.rpartition("=")
        name, text = (name, text) if equals else (entry, "1")
        if "/" not in name:
            check_choice(ConfigError, where, "unknown", name, known)
        try:
            weight = float(text)
        except ValueError:
            weight = float("nan")
        if name in weights or not is_finite(weight):
            what = "given twice" if name in weights else "weight is not a finite number"
            rule, fix = "NAME or NAME=WEIGHT, each name once", f"Write {name}=0.5."
            raise ConfigError(where, what, expected=rule, got=entry, fix=fix)
        weights[name] = weight
    return weights
