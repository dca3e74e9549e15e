"""Errors are objects: the message is made of their slots, and nothing needs to read it back."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from cookbook_core import errors
from cookbook_core.errors import (
    LISTED,
    LONGEST_GOT,
    ConfigError,
    CookbookError,
    DatumError,
    LossError,
    check_choice,
    raise_all,
)

import pytest

SLOTS: dict[str, Any] = {
    "where": "train.jsonl:17",
    "what": "wrong type",
    "expected": "text",
    "got": 3,
    "fix": "Quote it.",
}


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ((), "train.jsonl:17: wrong type. Expected text, got 3. Quote it."),
        (("where",), "Wrong type. Expected text, got 3. Quote it."),
        (("expected",), "train.jsonl:17: wrong type. Got 3. Quote it."),
        (("got",), "train.jsonl:17: wrong type. Expected text. Quote it."),
        (("expected", "got"), "train.jsonl:17: wrong type. Quote it."),
        (("fix",), "train.jsonl:17: wrong type. Expected text, got 3."),
        (("expected", "got", "fix"), "train.jsonl:17: wrong type."),
    ],
)
def test_a_slot_that_is_left_out_is_left_out_of_the_message(
    left_out: tuple[str, ...], message: str
) -> None:
    slots = {name: value for name, value in SLOTS.items() if name not in left_out}
    slots.setdefault("where", "")
    if not slots["where"]:
        slots["what"] = "Wrong type"
    assert str(OwnError(**slots)) == message


class OwnError(CookbookError, ValueError):
    pass


def test_none_is_a_value_but_no_rule() -> None:
    """A caller may well have passed None; a rule that is None is no rule."""
    assert str(ConfigError("rank", "wrong type", expected=None, got=None)) == (
        "rank: wrong type. Got None."
    )


@pytest.mark.parametrize("end", [".", "...", "!", "?"])
def test_a_slot_that_ends_a_sentence_gets_no_second_full_stop(end: str) -> None:
    error = LossError("my_loss()", f"raised E: no{end}", got=f"x{end}", fix="Do this.")
    assert str(error) == f"my_loss(): raised E: no{end} Got x{end} Do this."


def test_slots_make_an_equal_error_in_another_process() -> None:
    """Every subset of slots, a value that is too long included."""
    for names in itertools.chain.from_iterable(
        itertools.combinations(("expected", "got", "fix"), n) for n in range(4)
    ):
        given = {**SLOTS, "got": "x" * 5 * LONGEST_GOT}
        error = DatumError("data[3]", "empty", **{name: given[name] for name in names})
        again = DatumError(**error.slots())
        assert again.slots() == error.slots()
        assert str(again) == str(error)


def test_a_long_value_is_shortened_and_its_length_shown() -> None:
    error = DatumError("x", "long", got="a" * 10_000)
    assert len(error.got) == LONGEST_GOT
    assert error.got.endswith("aaa... (10000 characters)")
    assert DatumError("x", "long", got="a" * LONGEST_GOT).got == "a" * LONGEST_GOT


def test_replace_changes_a_copy() -> None:
    """Class, other slots and listed errors stay; the first error is as it was."""
    error, other = DatumError(**SLOTS), DatumError("b", "empty")
    error.others = [other]
    changed = error.replace(where="data[0]", got="y" * 10_000)
    assert type(changed) is DatumError
    assert str(changed).startswith("data[0]: wrong type. Expected text, got yyy")
    assert (len(changed.got), list(changed.others)) == (LONGEST_GOT, [other])
    assert error.slots() == {**SLOTS, "got": "3"}
    with pytest.raises(TypeError, match="place"):
        error.replace(place="data[0]")


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
def test_copies_and_pickles_keep_every_slot(again: Any) -> None:
    error = ConfigError(**SLOTS)
    error.others = [ConfigError("b", "empty")]
    other = again(error)
    assert type(other) is ConfigError
    assert other.slots() == error.slots()
    assert str(other) == str(error)
    assert "b: empty." in str(other)


@pytest.mark.parametrize("count", [1, LISTED - 1, LISTED, LISTED + 1, 40])
def test_raise_all_lists_the_first_and_counts_the_rest(count: int) -> None:
    with pytest.raises(DatumError) as caught:
        raise_all([DatumError(f"data[{i}]", "empty") for i in range(count)])
    lines = str(caught.value).splitlines()
    assert lines[:LISTED] == [f"data[{i}]: empty." for i in range(min(count, LISTED))]
    rest = count - LISTED
    assert lines[LISTED:] == ([f"(and {rest} more like these)"] if rest > 0 else [])
    assert len(caught.value.others) == count - 1
    raise_all([])


def test_errors_that_list_others_are_all_listed() -> None:
    """Two batches with two faults each: the message has all four, in order."""
    faults = [DatumError(f"data[{i}]", "empty") for i in range(4)]
    halves = []
    for half in (faults[:2], faults[2:]):
        with pytest.raises(DatumError) as caught:
            raise_all(half)
        halves.append(caught.value)
    with pytest.raises(DatumError) as caught:
        raise_all(halves)
    assert str(caught.value).splitlines() == [f"data[{i}]: empty." for i in range(4)]


def every(kind: type[CookbookError]) -> list[type[CookbookError]]:
    return [kind, *(k for child in kind.__subclasses__() for k in every(child))]


def test_every_class_is_also_a_built_in_exception() -> None:
    """`except ValueError` in a user's code keeps working; other processes find a class by name."""
    kinds = [k for k in every(CookbookError)[1:] if k.__module__ == errors.__name__]
    assert len(kinds) >= 10
    for kind in kinds:
        assert issubclass(kind, (ValueError, RuntimeError, ImportError))
        assert getattr(errors, kind.__name__) is kind
        assert kind(**SLOTS).slots() == {**SLOTS, "got": "3"}


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("cross_entrpy", ["ppo", "cross_entropy"], "one of cross_entropy, ppo, got 'cross_entrpy'. "
         'Did you mean "cross_entropy"?'),
        ("zzz", ["ppo"], "one of ppo, got 'zzz'."),
        (None, ["ppo"], "one of ppo, got None."),
    ],
)  # fmt: skip
def test_a_choice_names_the_known_and_the_nearest(
    name: Any, known: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_choice(ConfigError, "loss_fn", "unknown loss", name, known)
    assert str(caught.value) == f"loss_fn: unknown loss. Expected {message}"


def test_without_choices_the_fix_is_to_leave_it_out() -> None:
    with pytest.raises(ConfigError) as caught:
        check_choice(ConfigError, "config", "cross_entropy has no options", "beta", [])
    assert str(caught.value) == "config: cross_entropy has no options. Got 'beta'. Leave it out."


# ---- the user's lines first ----------------------------------------------------------------------


def deeper(value: int) -> float:
    return 1 / value


def failing_loss(data: Any, logprobs: Any) -> Any:
    return deeper(0), {}


def test_a_failing_loss_shows_the_users_lines_first() -> None:
    """What Python prints of it: the loss's own frames, its exception, and only then ours."""
    from cookbook_core.custom_loss import differentiate

    with pytest.raises(LossError) as caught:
        differentiate(failing_loss, [], [])
    error = caught.value
    printed = traceback.format_exception(type(error), error, error.__traceback__)
    frames = [line for line in "".join(printed).splitlines() if line.startswith("  File ")]
    assert [line.rpartition(" in ")[2] for line in frames[:2]] == ["failing_loss", "deeper"]
    line = deeper.__code__.co_firstlineno + 1
    assert str(error) == (
        "failing_loss(): raised ZeroDivisionError: division by zero. "
        f"See line {line} of test_errors.py."
    )


def test_a_long_exception_of_a_loss_is_shortened() -> None:
    error = LossError.caused_by("my_loss()", ValueError("x" * 10_000))
    assert len(str(error)) < LONGEST_GOT + 200
    assert "(10000 characters)" in str(error)


def test_a_loss_that_cannot_be_called_has_no_lines_to_show() -> None:
    """The arguments do not fit: the only frame is ours, and it would mislead."""
    from cookbook_core.custom_loss import differentiate

    with pytest.raises(LossError, match=r"raised TypeError: .*1 positional argument") as caught:
        differentiate(lambda data: None, [], [])  # type: ignore[arg-type, misc]
    assert "arguments" in caught.value.fix
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.__traceback__ is None


def test_a_helper_of_the_package_inside_the_loss_does_not_hide_its_lines() -> None:
    """with_entropy_bonus calls the user's loss: its frame comes before the user's, and is cut."""
    from cookbook_core.builtin_losses import with_entropy_bonus
    from cookbook_core.custom_loss import differentiate
    from cookbook_core.types import Datum, ModelInput

    import torch

    datum = Datum(ModelInput.from_ints([0]), {"target_tokens": [1], "weights": [1.0]})
    rows = [torch.tensor([[0.5, 0.5]]).log()]
    with pytest.raises(LossError, match=r"See line \d+ of test_errors.py"):
        differentiate(with_entropy_bonus(failing_loss, 0.1), [datum], rows)


SCRIPT = '''
"""A recipe whose loss fails."""
from dataclasses import dataclass

from cookbook_core import runs
from cookbook_core.custom_loss import differentiate


@dataclass(frozen=True)
class Config:
    """Flags."""

    steps: int = 1
    """Steps."""


def my_loss(data, logprobs):
    return data[0].missing, {}


def train(config, flags):
    differentiate(my_loss, [None], [])


if __name__ == "__main__":
    runs.main(Config, train)
'''


def test_the_command_line_shows_the_users_lines_then_the_message(tmp_path: Path) -> None:
    """Nothing of this package in between: the lines of the loss, one line of error, exit code 1."""
    script = tmp_path / "my_recipe.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    number = SCRIPT.splitlines().index("    return data[0].missing, {}") + 1
    assert f'my_recipe.py", line {number}, in my_loss' in lines[0]
    assert lines[1].strip() == "return data[0].missing, {}"
    assert lines[-1] == (
        "my_loss(): raised AttributeError: 'NoneType' object has no attribute 'missing'. "
        f"See line {number} of my_recipe.py."
    )
    assert "cookbook_core" not in done.stderr
