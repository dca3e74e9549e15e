"""`python -m cookbook_core.doctor my_dpo.py:my_loss`: examine a loss on made-up data.

The file is imported, nothing in it is trained, and no model is loaded. Further arguments of the
loss come from flags (--beta 0.1), else from the defaults of the file's Config, else from its own.
Exit code: 0 no defect, 1 a defect, 2 the command is mistaken.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from cookbook_core.custom_loss import LossFn, name_of
from cookbook_core.doctor import examine
from cookbook_core.doctor.report import Finding
from cookbook_core.errors import ConfigError, CookbookError, nearest


def load(target: str) -> tuple[LossFn, ModuleType]:
    """Import what `file.py:name` or `package.module:name` names.

    Without a name the file's one function called `..._loss` is taken.

    Raises:
        ConfigError: no such file, module or function, or the import fails.
    """
    place, colon, name = target.rpartition(":")
    place, name = (place, name) if colon else (target, "")
    read = _from_file if place.endswith(".py") else importlib.import_module
    try:
        module = read(place)
    except (Exception, SystemExit) as error:
        what, got = "cannot be imported", f"{type(error).__name__}: {error}"
        mend = "The loss goes by file.py:name or package.module:name."
        raise ConfigError(
            place, what, expected="a Python file or module", got=got, fix=mend
        ) from error
    own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    losses = [k for k in own if k.endswith("_loss")]
    if not name and len(losses) == 1:
        name = losses[0]
    if not callable(getattr(module, name, None)):
        raise ConfigError(place, f"no loss {name!r} there", fix=nearest(name, losses or own))
    return getattr(module, name), module


def _from_file(place: str) -> ModuleType:
    path = Path(place)
    name = f"examined_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no Python source at {path}")
    sys.path.append(str(path.resolve().parent))  # its neighbours can be imported, as when it is run
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def bind(loss_fn: LossFn, module: ModuleType, flags: Mapping[str, Any]) -> tuple[LossFn, Any]:
    """The loss with its further arguments filled in, and the file's Config or None.

    Raises:
        ConfigError: a flag that neither the loss nor Config knows, an argument nobody gives, or a
            Config that refuses its values.
    """
    asked = list(inspect.signature(loss_fn).parameters.values())[2:]
    asked = [p for p in asked if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    config_class: Any = getattr(module, "Config", None)
    known = {f.name for f in dataclasses.fields(config_class)} if config_class else set[str]()
    for flag in flags:
        if flag not in known | {p.name for p in asked}:
            names = nearest(flag, known | {p.name for p in asked}) if known or asked else ""
            raise ConfigError(f"--{flag}", f"{name_of(loss_fn)} has no such argument", fix=names)
    try:
        config = config_class(**{k: v for k, v in flags.items() if k in known}) if known else None
    except TypeError as error:
        raise ConfigError("Config", str(error)) from error
    bound: dict[str, Any] = {}
    for p in asked:
        if p.name in flags:
            bound[p.name] = flags[p.name]
        elif p.name in known:
            bound[p.name] = getattr(config, p.name)
        elif config is not None and (
            p.name == "config" or p.annotation in (config_class, "Config")
        ):
            bound[p.name] = config
        elif p.default is p.empty:
            where, mend = f"{name_of(loss_fn)}({p.name})", f"Pass --{p.name} VALUE."
            rule = f"a flag, or {p.name} in the file's Config"
            raise ConfigError(where, "no value for it", expected=rule, got="neither", fix=mend)
    return (functools.partial(loss_fn, **bound) if bound else loss_fn), config


def parse_flags(words: Sequence[str]) -> dict[str, Any]:
    """`--beta 0.1 --clip=(0.1,0.2)` as a dict; values are Python literals, or else text.

    Raises:
        ConfigError: a flag without a value, or a word that is no flag.
    """
    flags: dict[str, Any] = {}
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--") or not (equals or rest):
            raise ConfigError(flag, "not understood", expected="--name value", got=" ".join(words))
        value = value if equals else rest.pop(0)
        try:
            flags[flag[2:].replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            flags[flag[2:].replace("-", "_")] = value
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Examine the loss that the command line names; returns the exit code."""
    usage = "python -m cookbook_core.doctor [-h] FILE.py:LOSS [--ARGUMENT VALUE ...]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("loss", help="file.py:name or package.module:name")
    parser.add_argument(
        "--loss_type_input",
        choices=("logprobs", "vocab_logprobs"),
        help="what the loss is given; by default its second parameter's name says (*vocab*)",
    )
    parser.add_argument(
        "--argument", metavar="VALUE", help="any argument of the loss, or of Config"
    )
    given, words = parser.parse_known_args(argv)
    try:
        loss_fn, module = load(given.loss)
        flags = parse_flags(words)
        loss_fn, config = bind(loss_fn, module, flags)
        size = getattr(config, "group_size", 1)
        report = examine(loss_fn, loss_type_input=given.loss_type_input, group_size=size)
    except CookbookError as error:
        print(error, file=sys.stderr)
        return 2
    new = [flag for flag in flags if config is not None and not hasattr(config, flag)]
    if report.ok and new:
        names = ", ".join(new)
        words = f"{names}: no field of Config yet. Add it there, and where train() binds the loss."
        notes = (*report.findings, Finding("config", "note", words))
        report = dataclasses.replace(report, findings=notes)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
