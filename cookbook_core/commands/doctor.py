"""`cookbook doctor my_dpo.py:my_loss`: examine a loss on example datums.

The file is imported, nothing in it is trained, and no model is loaded. The datums come from its
function example_data(), called without arguments or with the loss's name, else they are made from
what the loss reads. Where the file has a function advantages(rewards), that is examined too.
Further arguments of the loss come from flags (--beta 0.1), else from the defaults of the file's
Config, else from its own.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import ModuleType
from typing import Any

from cookbook_core.custom_loss import LossFn, name_of
from cookbook_core.doctor import Finding, Report, examine
from cookbook_core.doctor.advantages import examine_advantages
from cookbook_core.errors import ConfigError, nearest
from cookbook_core.runs.config import without_bool_values
from cookbook_core.types import Datum


def examine_file(
    target: str, words: Sequence[str] = (), loss_type_input: str | None = None
) -> Report:
    """Examine the loss that a command line names.

    Args:
        target: `file.py:name` or `package.module:name`; without a name, the file's one function
            called `..._loss`, or of several the one that --loss or Config.loss names.
        words: flags with the loss's further arguments, such as ["--beta", "0.1"].
        loss_type_input: see `doctor.examine`.
    Returns:
        The report, with a note on each flag that the file's Config does not have yet.
    Raises:
        ConfigError: the loss cannot be imported, or a flag is unknown or has no valid value.
    """
    choice = re.search(r"--loss[ =](\w+)", " ".join(words))
    loss_fn, module = load(target, choice[1] if choice else "")
    flags = parse_flags(words, booleans(loss_fn, module))
    loss_fn, config = bind(loss_fn, module, flags)
    size = getattr(config, "group_size", 1)
    data = _example_data(module, name_of(loss_fn))
    report = examine(loss_fn, data, loss_type_input=loss_type_input, group_size=size)
    estimator: Any = getattr(module, "advantages", None)
    if inspect.isfunction(estimator):
        findings = (*examine_advantages(estimator), *report.findings)
        report = dataclasses.replace(report, findings=findings)
    new = [flag for flag in flags if config is not None and not hasattr(config, flag)]
    if report.ok and new:
        what = f"{', '.join(new)}: no field of Config yet"
        fix = "Add it there, and where train() binds the loss."
        note = Finding("config", "note", what, fix=fix)
        report = dataclasses.replace(report, findings=(*report.findings, note))
    return report


def _example_data(module: ModuleType, loss: str) -> list[Datum] | None:
    """The datums of the file's own `example_data()`, or `example_data(loss)` where it takes the
    loss's name; None where it has no such function.

    Raises:
        ConfigError: it raised.
    """
    make: Any = getattr(module, "example_data", None)
    try:
        if make is None:
            return None
        return make(loss) if inspect.signature(make).parameters else make()
    except Exception as error:
        where, got = f"{module.__name__}.example_data()", f"{type(error).__name__}: {error}"
        fix = "It takes nothing, or the loss's name, and returns datums that the loss runs on."
        raise ConfigError(where, "failed", got=got, fix=fix) from error


def load(target: str, choice: str = "") -> tuple[LossFn, ModuleType]:
    """Import the loss that `file.py:name` or `package.module:name` names, and its module.

    choice: without a name and with several losses, NAME of NAME_loss; "" takes Config.loss.

    Raises:
        ConfigError: no such file, module or function, or the import fails.
    """
    place, colon, name = target.rpartition(":")
    place, name = (place, name) if colon else (target, "")
    try:
        module = _from_file(place) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        got, fix = f"{type(error).__name__}: {error}", "Give file.py:name or package.module:name."
        raise ConfigError(place, "cannot be imported", got=got, fix=fix) from error
    own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    losses = [k for k in own if k.endswith("_loss")]
    if not name and len(losses) > 1:
        choice = choice or getattr(getattr(module, "Config", None), "loss", "")
        losses = [loss for loss in losses if loss == f"{choice}_loss"] or losses
    if not name and len(losses) == 1:
        name = losses[0]
    if not callable(getattr(module, name, None)):
        what = f'no function "{name}"' if name else "not one function called NAME_loss"
        raise ConfigError(place, what, fix=nearest(name, losses or own))
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


def _arguments(loss_fn: LossFn) -> list[inspect.Parameter]:
    """The loss's parameters after data and logprobs."""
    parameters = list(inspect.signature(loss_fn).parameters.values())[2:]
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _config_of(module: ModuleType) -> tuple[Any, list[dataclasses.Field[Any]]]:
    """The module's dataclass Config and its fields; (None, []) without one."""
    config_class = getattr(module, "Config", None)
    if not dataclasses.is_dataclass(config_class):
        return None, []
    return config_class, list(dataclasses.fields(config_class))


def booleans(loss_fn: LossFn, module: ModuleType) -> set[str]:
    """Names of the loss's arguments and Config's fields that are true or false."""
    names = {p.name for p in _arguments(loss_fn) if isinstance(p.default, bool)}
    names |= {p.name for p in _arguments(loss_fn) if p.annotation in (bool, "bool")}
    return names | {f.name for f in _config_of(module)[1] if f.type in (bool, "bool")}


def parse_flags(words: Sequence[str], booleans: AbstractSet[str] = frozenset()) -> dict[str, Any]:
    """Read `--beta 0.1 --clip=(0.1,0.2) --normalise` as a dict.

    Args:
        words: the command line. Values are Python literals, true, false, or else text.
        booleans: names that also take `--name` and `--no_name` without a value.
    Raises:
        ConfigError: a flag without a value, or a word that is no flag.
    """
    flags: dict[str, Any] = {}
    rest = without_bool_values(words, booleans)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            raise ConfigError(word, "not a flag", fix="Give --name value.")
        if name in booleans and not equals:
            flags[name] = True
        elif name.removeprefix("no_") in booleans and not equals:
            flags[name.removeprefix("no_")] = False
        elif equals or (rest and not rest[0].startswith("--")):
            flags[name] = _value(value if equals else rest.pop(0))
        else:
            raise ConfigError(flag, "missing value", fix=f"Give {flag} VALUE.")
    return flags


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def bind(loss_fn: LossFn, module: ModuleType, flags: Mapping[str, Any]) -> tuple[LossFn, Any]:
    """Fill in the loss's further arguments; return it with the file's Config, None without one.

    Raises:
        ConfigError: a flag that neither the loss nor Config knows, an argument without a value, or
            a Config that rejects its values.
    """
    arguments, (config_class, config_fields) = _arguments(loss_fn), _config_of(module)
    fields = {field.name for field in config_fields}
    known = fields | {p.name for p in arguments}
    for flag in flags:
        if flag not in known:
            fix = nearest(flag, known) if known else ""
            raise ConfigError(f"--{flag}", f"{name_of(loss_fn)} has no such argument", fix=fix)
    try:
        values = {k: v for k, v in flags.items() if k in fields}
        config = config_class(**values) if config_class else None
    except TypeError as error:
        raise ConfigError("Config", str(error)) from error
    bound: dict[str, Any] = {}
    for p in arguments:
        if p.name in flags:
            bound[p.name] = flags[p.name]
        elif p.name in fields:
            bound[p.name] = getattr(config, p.name)
        elif config is not None and (
            p.name == "config" or p.annotation in (config_class, "Config")
        ):
            bound[p.name] = config
        elif p.default is p.empty:
            where, fix = f"{name_of(loss_fn)}({p.name})", f"Pass --{p.name} VALUE."
            rule = f"a flag, or a field {p.name} of the file's Config"
            raise ConfigError(where, "missing value", expected=rule, fix=fix)
    return (functools.partial(loss_fn, **bound) if bound else loss_fn), config
