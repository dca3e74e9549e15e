"""The command `cookbook`: recipes to copy, and tools for losses, runs and services.

    cookbook list
    cookbook new dpo my_dpo.py
    cookbook doctor my_dpo.py:dpo_loss
    cookbook compare runs/dpo-1 runs/dpo-2
    cookbook export runs/dpo-1 --to merged
    cookbook check --base_url http://127.0.0.1:8000

Recipes are read as text out of the installed package, or out of the checkout it is installed from,
so a copy always fits the core it will run on. Exit code: 0 done; 1 a file is broken, a check failed
or the loss has a defect; 2 the command is mistaken.
"""

from __future__ import annotations

import argparse
import ast
import glob
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cookbook_core.commands.export import DTYPES, FORMS, export
from cookbook_core.errors import ConfigError, CookbookError, ModelError, nearest
from cookbook_core.runs.config import never_fail_to_print, to_a_closed_pipe


def find_recipes() -> dict[str, Path]:
    """Name -> file of every recipe, by name."""
    files = sorted(_folder("recipes").glob("*.py"))
    return {file.stem: file for file in files if file.stem != "__init__"}


def find_tutorials() -> dict[str, Path]:
    """Name -> notebook of every tutorial, by name; none where the package came without them."""
    return {file.stem: file for file in sorted(_folder("tutorials").glob("*.ipynb"))}


def new(recipe: str, target: Path | None = None) -> Path:
    """Copy a recipe to a file of one's own; the commands in its text then name that file.

    Args:
        recipe: its name, such as "dpo".
        target: the file to write; None takes my_<recipe>.py in the current folder.
    Returns:
        The file.
    Raises:
        ConfigError: no such recipe, or a target that exists, does not end in .py or has no folder.
    """
    recipes = find_recipes()
    if recipe not in recipes:
        raise ConfigError("cookbook new", f'no recipe "{recipe}"', fix=nearest(recipe, recipes))
    path = target or Path(f"my_{recipe}.py")
    if path.suffix != ".py":
        rule = f"such as my_{recipe}.py"
        raise ConfigError("cookbook new", "not a Python file's name", expected=rule, got=path)
    if not path.parent.is_dir():
        mend = "Create it first."
        raise ConfigError(
            "cookbook new", "no such folder", expected="one", got=path.parent, fix=mend
        )

    def command(match: re.Match[str]) -> str:
        own = match[2] == recipe
        return f"python {_quoted(path.name)}" if own else f"python -m cookbook_core.{match[1]}"

    text = recipes[recipe].read_text(encoding="utf-8")
    text = re.sub(r"python -m (recipes\.(\w+))", command, text)
    text = text.replace(f"runs/{recipe}-", f"runs/{path.stem}-")
    try:
        with open(path, "x", encoding="utf-8", newline="\n") as file:
            file.write(f"# From recipes/{recipe}.py of cookbook-core {version()}.\n{text}")
    except FileExistsError as error:
        mend = "Give another name: nothing is overwritten."
        raise ConfigError(
            str(path), "exists", expected="the name of a new file", got="that of one", fix=mend
        ) from error
    return path


def version() -> str:
    """The installed package's version; "not installed" where a checkout is merely on the path."""
    try:
        return metadata.version("cookbook-core")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command; returns the exit code.

    Args:
        argv: the arguments; None takes the command line's.
    Raises:
        SystemExit: after --help and --version (0), and after arguments that are not understood (2).
    """
    never_fail_to_print()
    parser = _parser()
    arguments, words = parser.parse_known_args(argv)
    if not arguments.command:
        parser.print_help(sys.stderr)
        return 2
    if arguments.command == "doctor":
        arguments.words = words  # flags of the loss that the doctor examines
    elif words:
        parser.error(f"unknown arguments: {' '.join(words)}")
    try:
        commands = {
            "list": _list,
            "new": _new,
            "doctor": _doctor,
            "compare": _compare,
            "export": _export,
            "check": _check,
        }
        with to_a_closed_pipe():
            return commands[arguments.command](arguments) or 0
    except (CookbookError, OSError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cookbook", description="Recipes for post-training with your own loss function."
    )
    parser.add_argument("--version", action="version", version=f"cookbook-core {version()}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    commands.add_parser("list", help="the recipes and tutorials there are")
    add = commands.add_parser("new", help="copy a recipe into a file of your own")
    add.add_argument("recipe", metavar="RECIPE", help="a name that `cookbook list` shows")
    add.add_argument("file", metavar="FILE", nargs="?", type=Path, help="default: my_RECIPE.py")
    _add_doctor(commands)
    compare = commands.add_parser(
        "compare",
        help="overlay runs in one picture and one table",
        description="Draw the runs' metrics over each other, and print a table of the config "
        "fields that differ and of the final held-out metrics.",
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="a run folder, such as runs/dpo-1")
    compare.add_argument(
        "--metrics",
        metavar="A,B",
        help="1 to 6 metrics to draw; default: held-out ones that all runs logged, then training's",
    )
    compare.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("compare.png"), help="default: %(default)s"
    )
    _add_export(commands)
    check = commands.add_parser(
        "check",
        help="whether a service computes what a training run relies on",
        description="Check a Tinker-compatible service, or without --base_url this machine: one "
        "line per check, and under what did not pass what it does to a training run.",
    )
    check.add_argument("--base_url", metavar="URL", help="of the service; default: this machine")
    check.add_argument("--model", metavar="NAME", help="base model; default: the first it offers")
    check.add_argument("--api_key", metavar="KEY", help="of the service")
    check.add_argument("--core", action="store_true", help="only the gradient's arithmetic")
    return parser


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        allow_abbrev=False,
        help="examine a loss before a run is spent on it",
        usage="cookbook doctor [-h] [--loss_type_input FORM] FILE.py:LOSS [--ARGUMENT VALUE ...]",
        description="Examine a loss on example datums; no model is loaded and nothing is trained. "
        "Further arguments of the loss come from flags (--beta 0.1), else from the defaults of the "
        "file's Config, else from its own. Exit code: 0 no defect, 1 a defect, 2 the command is "
        "mistaken.",
    )
    doctor.add_argument(
        "loss", metavar="FILE.py:LOSS", help="or package.module:LOSS; LOSS may be left out"
    )
    doctor.add_argument(
        "--loss_type_input",
        metavar="FORM",
        choices=("logprobs", "vocab_logprobs"),
        help="logprobs or vocab_logprobs; default: by the name of the second parameter (*vocab*)",
    )


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write a trained adapter as a PEFT folder, a merged model, or for llama.cpp",
        description="Write a run's adapter in a form that other programs read (docs/export.md).",
    )
    command.add_argument("run", metavar="RUN", help="a run folder, or a folder with a LoRA in it")
    command.add_argument("--to", required=True, choices=FORMS)
    command.add_argument("--out", metavar="FOLDER", help="a new folder; default: RUN/export/FORM")
    command.add_argument(
        "--checkpoint", metavar="WHICH", default="final", help="final (default), best, or a step"
    )
    command.add_argument("--dtype", choices=DTYPES, help="of merged weights; default: the base's")
    command.add_argument(
        "--base_model", metavar="NAME", help="where the base model is now, if it was moved"
    )


def _list(_: argparse.Namespace) -> None:
    recipes, tutorials = find_recipes(), find_tutorials()
    width = max(map(len, [*recipes, *tutorials]), default=0)
    print("Recipes (copy one: cookbook new RECIPE FILE)")
    for name, file in recipes.items():
        print(f"  {name:{width}}  {_first_line(file)}")
    if tutorials:
        print(f"\nTutorials (in {_folder('tutorials')})")
    for name, file in tutorials.items():
        print(f"  {name:{width}}  {_first_line(file)}")


def _new(arguments: argparse.Namespace) -> None:
    path = new(arguments.recipe, arguments.file)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    loss = next((name for name in functions if name.endswith("_loss")), "")
    print(f"{path}: a copy of the recipe {arguments.recipe}. Its loss is {loss}().")
    print(f"  run it           python {_quoted(path)}")
    print(f"  flags            python {_quoted(path)} --help")
    print(f"  check the loss   cookbook doctor {_quoted(f'{path}:{loss}')}")


def _doctor(arguments: argparse.Namespace) -> int:
    from cookbook_core.commands.doctor import examine_file

    report = examine_file(arguments.loss, arguments.words, arguments.loss_type_input)
    print(report)
    return 0 if report.ok else 1


def _compare(arguments: argparse.Namespace) -> None:
    from cookbook_core.commands.compare import compare_runs

    # Shells expand runs/*, except on Windows.
    folders = [Path(p) for run in arguments.runs for p in sorted(glob.glob(run)) or [run]]
    metrics = None if arguments.metrics is None else arguments.metrics.split(",")
    print(compare_runs(folders, arguments.out, metrics))
    print(f"picture: {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(arguments).items() if k != "command"}
    print(f"{arguments.to}: {export(**options)}")


def _check(arguments: argparse.Namespace) -> int:
    from cookbook_core import conformance
    from cookbook_core.tinker import ServiceClient, TrainingClient

    url, checks = arguments.base_url, conformance.CORE if arguments.core else conformance.CHECKS
    with tempfile.TemporaryDirectory() as folder:
        service = ServiceClient(base_url=url, api_key=arguments.api_key, checkpoint_dir=folder)
        offered = [m.model_name for m in service.get_server_capabilities().supported_models]
        model = arguments.model or next(filter(None, offered), None)
        if model is None:
            raise ConfigError(
                "--model", "missing", expected="a name", got="a service that names none"
            )

        def make() -> TrainingClient:
            made = service.create_lora_training_client(model, rank=8, seed=0, train_unembed=False)
            return made.result()

        try:  # what keeps a first client from being made is no row of the table
            first, rows = [make()], []
        except ModelError as error:
            raise ConfigError(**error.slots()) from error
        print(f"{url or 'this machine'}, {model}")
        width = max(len(check.name) for check in checks)
        for row in conformance.check_service(
            lambda: first.pop() if first else make(), checks, below=url is not None
        ):
            rows.append(row)
            print(conformance.row_text(row, width), flush=True)
        print(conformance.summary(rows))
        service.close()
    return 0 if all(row.outcome.result in ("pass", "not offered") for row in rows) else 1


def _folder(name: str) -> Path:
    """A folder of the repository: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def _first_line(file: Path) -> str:
    """Of a recipe's docstring, or a notebook's title."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        source = json.loads(text)["cells"][0]["source"]
        return "".join(source).lstrip("# ").split("\n")[0]
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]


def _quoted(path: Path | str) -> str:
    return f'"{path}"' if " " in str(path) else str(path)


if __name__ == "__main__":
    raise SystemExit(main())
