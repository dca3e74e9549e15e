"""The command `cookbook`: recipes to copy, and tools for losses, runs and services.

    cookbook list
    cookbook new dpo my_dpo.py
    cookbook doctor my_dpo.py:dpo_loss
    cookbook compare runs/dpo-1 runs/dpo-2
    cookbook export runs/dpo-1 --to merged
    cookbook check --base_url http://127.0.0.1:8000
    cookbook serve --model tiny
    cookbook memory Qwen/Qwen3-8B --device_memory 24GB

Exit code: 0 done; 1 a file is broken, a check failed or the loss has a defect; 2 the command is
mistaken.
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cookbook_core.commands import recipes
from cookbook_core.commands.export import DTYPES, FORMS, export
from cookbook_core.errors import ConfigError, CookbookError
from cookbook_core.runs.config import safe_output


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        argv: the arguments; None takes the command line's.
    Raises:
        SystemExit: 0 after --help and --version; 2 after unknown or missing arguments.
    """
    parser = _parser()
    try:
        with safe_output():
            arguments, words = parser.parse_known_args(argv)
            if not arguments.command:
                parser.print_help(sys.stderr)
                return 2
            if arguments.command == "doctor":
                arguments.words = words  # flags of the loss that the doctor examines
            elif words:
                parser.error(f"unknown arguments: {' '.join(words)}")
            return arguments.run(arguments) or 0
    except (CookbookError, OSError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


# ---- arguments -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cookbook", description="Recipes for post-training with your own loss function."
    )
    version = f"cookbook-core {recipes.version()}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    commands.add_parser("list", help="list the recipes and tutorials").set_defaults(run=_list)
    for add_command in (
        _add_new, _add_doctor, _add_compare, _add_export, _add_check, _add_serve, _add_memory
    ):  # fmt: skip
        add_command(commands)
    return parser


def _add_new(commands: Any) -> None:
    command = commands.add_parser("new", help="copy a recipe into a file of your own")
    command.set_defaults(run=_new)
    add = command.add_argument
    add("recipe", metavar="RECIPE", help="a name that `cookbook list` shows")
    add("file", metavar="FILE", nargs="?", type=Path, help="default: my_RECIPE.py")


def _add_doctor(commands: Any) -> None:
    command = commands.add_parser(
        "doctor",
        allow_abbrev=False,
        help="examine a loss before a run is spent on it",
        usage="cookbook doctor [-h] [--loss_type_input FORM] FILE.py:LOSS [--ARGUMENT VALUE ...]",
        description="Examine a loss on example datums; no model is loaded and nothing is trained. "
        "Further arguments of the loss come from flags (--beta 0.1), else from the defaults of the "
        "file's Config, else from its own. Exit code: 0 no defect, 1 a defect, 2 the command is "
        "mistaken.",
    )
    command.set_defaults(run=_doctor)
    add = command.add_argument
    add("loss", metavar="FILE.py:LOSS", help="or package.module:LOSS; LOSS may be left out")
    add(
        "--loss_type_input",
        metavar="FORM",
        choices=("logprobs", "vocab_logprobs"),
        help="logprobs or vocab_logprobs; default: by the name of the second parameter (*vocab*)",
    )


def _add_compare(commands: Any) -> None:
    command = commands.add_parser(
        "compare",
        help="draw runs in one picture and one table",
        description="Draw the runs' metrics over each other, and print a table of the config "
        "fields that differ and of the final held-out metrics.",
    )
    command.set_defaults(run=_compare)
    add, default = command.add_argument, "held-out ones that all runs logged, then training's"
    add("runs", metavar="RUN", nargs="+", help="a run folder, such as runs/dpo-1")
    add("--metrics", metavar="A,B", help=f"1 to 6 metrics to draw; default: {default}")
    add("--out", metavar="FILE", type=Path, default="compare.png", help="default: %(default)s")


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write a trained adapter as a PEFT folder, a merged model, or for llama.cpp",
        description="Write a run's adapter in a form that other programs read (docs/export.md).",
    )
    command.set_defaults(run=_export)
    add, which = command.add_argument, "final (default), best, or a step"
    add("folder", metavar="RUN", help="a run folder, or a folder with a LoRA")
    add("--to", required=True, choices=FORMS)
    add("--out", metavar="FOLDER", help="a new folder; default: RUN/export/FORM")
    add("--checkpoint", metavar="WHICH", default="final", help=which)
    add("--dtype", choices=DTYPES, help="dtype of merged weights; default: the base's")
    add("--base_model", metavar="NAME", help="folder or name of the base model, if it was moved")


def _add_check(commands: Any) -> None:
    command = commands.add_parser(
        "check",
        help="check that a service computes what a training run relies on",
        description="Check a Tinker-compatible service, or without --base_url this machine: one "
        "line per check, and below each failure what it does to a training run.",
    )
    command.set_defaults(run=_check)
    add = command.add_argument
    add("--base_url", metavar="URL", help="URL of the service; default: this machine")
    add("--model", metavar="NAME", help="base model; default: the first that the service offers")
    add("--api_key", metavar="KEY", help="key of the service")
    add("--core", action="store_true", help="only the gradient's arithmetic")


def _add_serve(commands: Any) -> None:
    command = commands.add_parser(
        "serve",
        help="serve this machine to programs written for Tinker",
        description="Serve models to any Tinker client: TINKER_BASE_URL=http://127.0.0.1:8000 "
        "TINKER_API_KEY=tml-local python PROGRAM.py (docs/serve.md). GET / is a page to look at.",
    )
    command.set_defaults(run=_serve)
    add = command.add_argument
    default = "default: %(default)s"
    add("--model", metavar="NAME[=FOLDER]", action="append", help="repeatable; default: tiny")
    add("--host", default="127.0.0.1", help=f"address to listen on; {default}")
    add("--port", type=int, default=8000, help=f"0 chooses one; {default}")
    add("--checkpoint_dir", metavar="FOLDER", default="checkpoints", help=default)
    add("--api_key", metavar="KEY", help="clients must send it; required beyond this machine")
    add("--allow_host", metavar="NAME", action="append", default=[], help="a name clients use")
    add("--device", default="auto", help=default)
    add("--dtype", default="auto", help="float32, bfloat16, nf4 or auto")
    add("--max_adapters", type=int, default=32, metavar="N", help=f"in training; {default}")
    add("--max_request_mb", type=int, default=256, metavar="N", help=f"of a request; {default}")


def _add_memory(commands: Any) -> None:
    command = commands.add_parser(
        "memory",
        help="say what fits into a device's memory, and in which dtype",
        description="Print, for a LoRA adapter in training, how many tokens' whole graphs are "
        "kept, the longest row that fits with layers recomputed, and the tokens of a KV cache "
        "(docs/memory.md). Only the model's config is read.",
    )
    command.set_defaults(run=_memory)
    add = command.add_argument
    add("models", metavar="MODEL", nargs="+", help="a folder, a hub name or tiny")
    add(
        "--device_memory",
        "--device-memory",
        metavar="SIZE",
        action="append",
        default=[],
        help="such as 24GB; repeatable; default: this machine's device",
    )
    add("--rank", type=int, default=32, help="of the adapter; default: %(default)s")
    add("--shard", type=int, default=1, metavar="N", help="of N devices, sharded over them")


# ---- commands ------------------------------------------------------------------------------------


def _list(_: argparse.Namespace) -> None:
    print(recipes.listing())


def _new(arguments: argparse.Namespace) -> None:
    path = recipes.new(arguments.recipe, arguments.file)
    print(recipes.next_commands(arguments.recipe, path))


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
    names = ("to", "out", "checkpoint", "dtype", "base_model")
    path = export(arguments.folder, **{name: getattr(arguments, name) for name in names})
    print(f"{arguments.to}: {path}")


def _check(arguments: argparse.Namespace) -> int:
    from cookbook_core.commands.check import check

    options = (arguments.base_url, arguments.model, arguments.api_key, arguments.core)
    return 0 if check(*options) else 1


def _serve(arguments: argparse.Namespace) -> None:
    from cookbook_core.commands.serve import Settings, serve

    given = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__}
    serve(Settings(**{**given, "model": arguments.model or ["tiny"]}))


def _memory(arguments: argparse.Namespace) -> None:
    from cookbook_core.commands.memory import table

    print(table(arguments.models, arguments.device_memory, arguments.rank, arguments.shard))


if __name__ == "__main__":
    raise SystemExit(main())
