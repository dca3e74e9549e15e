"""The command line of a recipe: a dataclass's fields as flags, and checks of their values."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import math
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from cookbook_core.errors import ConfigError, CookbookError, LossError, is_finite, nearest
from cookbook_core.runs.launch import join_processes, silent_follower

ConfigT = TypeVar("ConfigT")


_ELSEWHERE = {
    "epochs": "num_steps",
    "num_epochs": "num_steps",
    "num_train_epochs": "num_steps",
    "output_dir": "log_path",
}
"""What flags are called in other tools."""


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Flags that every recipe has besides those of its Config."""

    save_every: int = 20
    """Steps between checkpoints; an interrupted run repeats at most so many."""
    keep_last: int = 2
    """Newest checkpoints to keep; the best one stays besides."""
    fresh: bool = False
    """Start over, rather than go on with an interrupted run of the same parameters."""
    anyway: bool = False
    """Go on with an interrupted run also where the script's code is no longer what began it."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics go besides metrics.jsonl; each needs the extra of its name."""
    base_url: str = ""
    """Of a Tinker-compatible service to train on; empty trains on this machine. Needs the extra
    "remote"; --model then names one of the service's models, or a local folder of that name."""
    trust_service: bool = False
    """Train on the service even if its arithmetic, which is looked at first, is wrong."""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "save_every", "keep_last")


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None = None
) -> tuple[ConfigT, RunFlags]:
    """Build a recipe's config from command line flags; print help or the mistake, and exit.

    Under torchrun only process 0 comes back from here: see `launch.join_processes`.

    Args:
        config_class: a dataclass; each field is a flag (`--num_steps 30`, booleans `--flag` and
            `--no_flag`), explained by the string under it. The docstring of the module it stands
            in is the program's description.
        argv: the flags; None takes the command line's.
    Returns:
        config, and the flags of `RunFlags`.
    Raises:
        SystemExit: 0 after --help; 2 after an unknown flag (the nearest known is named) or a value
            that does not fit the field's type or that the config itself refuses.
    """
    with silent_follower():
        parsed = _parse(config_class, list(sys.argv[1:] if argv is None else argv))
    join_processes()
    return parsed


def _parse(config_class: type[ConfigT], arguments: list[str]) -> tuple[ConfigT, RunFlags]:
    import tyro

    parts = {"recipe": config_class, "run": RunFlags}
    fields = [(name, tyro.conf.OmitArgPrefixes[_shown(part)]) for name, part in parts.items()]
    program = _program()
    if {"-h", "--help"} & set(arguments):
        print(_filled(sys.modules[config_class.__module__].__doc__ or ""), "\n")
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            given, unknown = tyro.cli(
                dataclasses.make_dataclass("Flags", fields),
                args=arguments,
                prog=program,
                description=" ",
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit:
        if boxed.getvalue():
            print(f"{_unboxed(boxed.getvalue())}\n{_explains(program)}", file=sys.stderr)
        raise
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [f.name for part in parts.values() for f in dataclasses.fields(cast(Any, part))]
        name = flag.lstrip("-").replace("-", "_")
        name = _ELSEWHERE[name] if _ELSEWHERE.get(name) in known else name
        print(f"{flag}: no such flag. {nearest(name, known)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        return config_class(**vars(given.recipe)), RunFlags(**vars(given.run))
    except ConfigError as error:
        print(f"{error}\n{_explains(program)}", file=sys.stderr)
        raise SystemExit(2) from None


def main(config_class: type[ConfigT], train: Callable[[ConfigT, RunFlags], object]) -> None:
    """What `python -m recipes.NAME` does: parse the flags, train, tell mistakes in a line.

    An exception inside the recipe's own loss or reward is shown with the lines it came from.

    Raises:
        SystemExit: 0 after --help; 1 the run failed; 2 the command is mistaken (a flag, a value, a
            run folder in use); 130 and 143 after SIGINT and SIGTERM.
    """
    never_fail_to_print()
    try:
        with to_a_closed_pipe():
            config, flags = parse_config(config_class)
            train(config, flags)
    except CookbookError as error:
        cause = error.__cause__
        if isinstance(error, LossError) and cause and cause.__traceback__:
            lines = traceback.format_tb(cause.__traceback__)  # begins with the user's lines
            print(*lines, sep="", end="", file=sys.stderr)
        print(error, file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def never_fail_to_print() -> None:
    """Write "?" for what a terminal or pipe cannot hold (cp1252 on Windows), rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def to_a_closed_pipe() -> Iterator[None]:
    """Where the reader of the output has gone (`| head`), end with exit code 1 and no traceback."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # what is still buffered goes nowhere, else Python complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _explains(program: str) -> str:
    return f"{program} --help explains every flag."


def _unboxed(text: str) -> str:
    """The first paragraph of tyro's framed message, in one line."""
    lines = [line.strip(" │") for line in text.splitlines()[1:]]  # after its title
    start = itertools.dropwhile(lambda line: not line.strip("─-"), lines)
    return " ".join(itertools.takewhile(lambda line: line.strip("─-"), start)) or text.strip()


def _program() -> str:
    """The command as typed: python -m recipes.dpo, or python my_dpo.py."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"


def _shown(config_class: type) -> type:
    """The same fields, each with the string under it, in one piece, as its help."""
    import tyro

    words = {}
    with contextlib.suppress(OSError, TypeError):  # a class made in memory has no source
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
        for field, text in itertools.pairwise(tree.body[0].body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                words[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    hints = get_type_hints(config_class)
    fields = [
        (
            f.name,
            Annotated[hints[f.name], tyro.conf.arg(help=words.get(f.name, ""))],
            dataclasses.field(default=f.default),
        )
        for f in dataclasses.fields(config_class)
    ]
    shown = dataclasses.make_dataclass(config_class.__name__, fields)
    shown.__doc__ = config_class.__doc__
    return shown


def _filled(text: str) -> str:
    """A docstring with its paragraphs filled to the terminal; indented lines stay as they are."""
    width = min(shutil.get_terminal_size().columns, 100)
    blocks = itertools.groupby(text.splitlines(), key=lambda line: line[:1] not in ("", " "))
    return "\n".join(
        textwrap.fill(" ".join(lines), width) if prose else "\n".join(lines)
        for prose, lines in blocks
    )


def check_positive(config: Any, *names: str) -> None:
    """Raise ConfigError for the first of these fields that is not a finite number above 0."""
    for name in names:
        check(config, name, 0 < getattr(config, name) < math.inf, "> 0")


def check_types(config: Any) -> None:
    """Raise ConfigError for the first field whose value does not fit its annotation."""
    for name, hint in get_type_hints(type(config)).items():
        check(config, name, _fits(getattr(config, name), hint), f"{hint}")


def _fits(value: Any, hint: Any) -> bool:
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in kinds
    if get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        parts = kinds[:1] * len(value) if Ellipsis in kinds else kinds
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float) and not isinstance(value, bool):
        return isinstance(value, (int, hint)) and is_finite(value)
    return isinstance(value, (str, Path) if hint is str else hint)


def check(config: Any, name: str, good: bool, rule: str) -> None:
    """Raise ConfigError that the field's value breaks `rule`, unless it is `good`."""
    if not good:
        raise ConfigError(
            f"Config.{name}", "out of range", expected=rule, got=getattr(config, name)
        )
