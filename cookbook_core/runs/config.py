"""The command line of a recipe: the fields of its Config, and of RunFlags, as flags."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from cookbook_core.errors import ConfigError, CookbookError, LossError, nearest
from cookbook_core.runs.fields import PositiveInt, Rule, check_fields
from cookbook_core.runs.launch import join_processes, silent_follower
from cookbook_core.runs.run_folder import read_config

ConfigT = TypeVar("ConfigT")


def _is_object(text: str) -> bool:
    """Whether a text is empty or a JSON object."""
    try:
        return not text or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Flags that every recipe has besides those of its Config."""

    save_every: PositiveInt = 20
    """Steps between checkpoints; an interrupted run repeats at most that many."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep; the best one is kept as well."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run of the same parameters."""
    resume: str = ""
    """Run folder to resume, with its own parameters, even if the script has changed since."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics go besides metrics.jsonl; each needs the extra of its name."""
    base_url: str = ""
    """URL of a Tinker-compatible service to train on; empty trains on this machine. Needs the extra
    "remote"; --model then names one of the service's models, or a local folder of that name."""
    trust_service: bool = False
    """Train on the service even if it fails the check of its arithmetic."""
    sampler_url: str = ""
    """URL of a vLLM server of the same base model that draws all samples; empty samples on this
    machine. See docs/scaling.md."""
    shard: bool = False
    """Under torchrun, for a model larger than one GPU: each process holds a part of every layer
    instead of the whole base model. See docs/scaling.md."""
    chat_template_kwargs: Annotated[str, Rule(_is_object, 'such as {"enable_thinking": false}')] = (
        ""
    )
    """Arguments of the chat template, as JSON, for every prompt and answer; a row's own column of
    this name goes first. Empty: none."""

    def __post_init__(self) -> None:
        check_fields(self)


# ---- flags ---------------------------------------------------------------------------------------

_ELSEWHERE = {
    "epochs": "num_steps",
    "num_epochs": "num_steps",
    "num_train_epochs": "num_steps",
    "output_dir": "log_path",
}
"""Names of flags in other tools."""


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None = None
) -> tuple[ConfigT, RunFlags]:
    """Build a recipe's config from command line flags; print help or the mistake, and exit.

    Args:
        config_class: a dataclass; each field is a flag, explained by the string under it. Booleans
            take `--flag`, `--no_flag`, `--flag true` and `--flag false`. The docstring of its
            module is the program's description. --resume takes the defaults from that run.
        argv: the flags; None takes the command line's.
    Returns:
        config, and the flags of `RunFlags`.
    Raises:
        SystemExit: 0 after --help; 2 after an unknown flag (the nearest known is named) or a value
            that `check_fields` or the config itself refuses.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(_filled(sys.modules[config_class.__module__].__doc__ or ""), "\n")
    try:
        given, unknown = _read_flags(config_class, arguments, {})
        if given.run.resume:
            defaults = read_config(given.run.resume)["config"]
            given, unknown = _read_flags(config_class, arguments, defaults)
        _refuse_unknown(config_class, unknown)
        return config_class(**vars(given.recipe)), RunFlags(**vars(given.run))
    except ConfigError as error:
        print(f"{error}\n{_program()} --help explains every flag.", file=sys.stderr)
        raise SystemExit(2) from None


def _read_flags(
    config_class: type, arguments: list[str], recorded: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """Parse with tyro into `.recipe` and `.run`, and the arguments that no flag takes."""
    import tyro

    recipe, run = _unchecked(config_class), _unchecked(RunFlags)
    booleans = {n for c in (recipe, run) for n, kind in get_type_hints(c).items() if kind is bool}
    names = {field.name for field in dataclasses.fields(recipe)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items() if k in names}
    flags = dataclasses.make_dataclass("Flags", [("recipe", recipe), ("run", run)])
    defaults = {"default": flags(recipe(**values), run())} if recorded else {}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                tyro.conf.OmitArgPrefixes[flags],
                args=without_bool_values(arguments, booleans),
                prog=_program(),
                description=" ",
                use_underscores=True,
                return_unknown_args=True,
                **defaults,
            )
    except SystemExit as end:
        if end.code:
            raise ConfigError("", _unboxed(printed.getvalue())) from None
        raise


def _unchecked(config_class: type) -> Any:
    """The class without its `__post_init__`, whose errors tyro would shorten."""
    kept = {name: getattr(config_class, name) for name in ("__module__", "__doc__")}
    return type(config_class.__name__, (config_class,), {"__post_init__": lambda _: None, **kept})


def without_bool_values(arguments: Sequence[str], booleans: AbstractSet[str]) -> list[str]:
    """Rewrite `--flag true` and `--flag=false` as `--flag` and `--no_flag`, which tyro reads."""
    rewritten: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if rewritten and not equals:
            flag, value = rewritten[-1], argument
        name = flag.removeprefix("--").replace("-", "_")
        if name not in booleans or value.lower() not in ("true", "false"):
            rewritten.append(argument)
            continue
        if not equals:
            rewritten.pop()
        rewritten.append(f"--{name}" if value.lower() == "true" else f"--no_{name}")
    return rewritten


def _refuse_unknown(config_class: Any, unknown: list[str]) -> None:
    """Raise ConfigError for the first argument that is no flag, naming the nearest."""
    if not unknown:
        return
    flag = unknown[0].split("=")[0]
    if not flag.startswith("-"):
        fix = "Names of flags begin with --; a boolean flag takes true, false or no value."
        raise ConfigError(flag, "unexpected argument", fix=fix)
    known = [field.name for part in (config_class, RunFlags) for field in dataclasses.fields(part)]
    name = flag.lstrip("-").replace("-", "_")
    name = _ELSEWHERE[name] if _ELSEWHERE.get(name) in known else name
    raise ConfigError(flag, "no such flag", fix=nearest(name, known))


def _unboxed(text: str) -> str:
    """The first paragraph of tyro's framed message, in one line."""
    lines = [line.strip(" │") for line in text.splitlines()[1:]]  # after its title
    start = itertools.dropwhile(lambda line: not line.strip("─-"), lines)
    paragraph = " ".join(itertools.takewhile(lambda line: line.strip("─-"), start))
    return (paragraph or text.strip()).removesuffix(".")


def _program() -> str:
    """The command as typed: python -m recipes.dpo, or python my_dpo.py."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"


def _filled(text: str) -> str:
    """A docstring with its paragraphs filled to the terminal; indented lines stay as they are."""
    width = min(shutil.get_terminal_size().columns, 100)
    blocks = itertools.groupby(text.splitlines(), key=lambda line: line[:1] not in ("", " "))
    return "\n".join(
        textwrap.fill(" ".join(lines), width) if prose else "\n".join(lines)
        for prose, lines in blocks
    )


# ---- the program ---------------------------------------------------------------------------------


def main(config_class: type[ConfigT], train: Callable[[ConfigT, RunFlags], object]) -> None:
    """Run a recipe from the command line: parse the flags, train, print an error as one line.

    An exception inside the recipe's own loss or reward is printed with the lines it came from.
    Under torchrun, rank 0 trains and the other ranks compute for it: see `launch.join_processes`.

    Raises:
        SystemExit: 0 after --help; 1 the run failed; 2 the command is mistaken (a flag, a value, a
            run folder in use); 130 and 143 after SIGINT and SIGTERM.
    """
    try:
        with safe_output():
            with silent_follower():
                config, flags = parse_config(config_class)
            join_processes()
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


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Print "?" for characters that a terminal or pipe cannot encode (cp1252 on Windows); exit with
    code 1 and no traceback when the reader of the output has closed it (`| head`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # discard what is still buffered, else Python prints an error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
