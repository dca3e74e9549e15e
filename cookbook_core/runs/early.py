"""`--help` and mistyped flags of a recipe, answered before it imports torch, which takes seconds.

A recipe imports cookbook_core first. At that moment its file is `__main__`, and has run only up to
this import: its `Config` is read from the source.
"""

from __future__ import annotations

import ast
import contextlib
import os
import sys
from pathlib import Path
from typing import Any, get_type_hints

from cookbook_core.runs.config import RunFlags, parse_config, safe_output


def answer() -> None:
    """Print the help or the mistake and exit, if Python was started with a recipe and such a flag.

    Returns without a word in any other case, and where the recipe's Config needs more than the
    standard library and this package: `runs.main` then answers, a little later.

    Raises:
        SystemExit: 0 after --help, 2 after an unknown flag.
    """
    main = sys.modules["__main__"]
    file, given = getattr(main, "__file__", None), {flag.split("=")[0] for flag in sys.argv[1:]}
    if not file or not any(flag.startswith("-") for flag in given) or "RANK" in os.environ:
        return
    try:
        before = _until_config(ast.parse(Path(file).read_text(encoding="utf-8")))
        fields = [node.target for node in before[-1].body if isinstance(node, ast.AnnAssign)]
        known = {ast.unparse(field) for field in fields} | set(RunFlags.__dataclass_fields__)
        names = {flag[2:].replace("-", "_") for flag in given if flag.startswith("--")}
        names = {name.removeprefix("no_") for name in names}
        if not {"-h", "--help"} & given and names <= known:
            return
        for node in before:
            with contextlib.suppress(NameError):  # aliases of torch's types, for functions
                code = compile(ast.Module([node], []), file, "exec", dont_inherit=True)
                exec(code, vars(main))
        get_type_hints(main.Config)
    except Exception:
        return
    with safe_output():
        parse_config(main.Config)


def _until_config(tree: ast.Module) -> list[Any]:
    """The statements of a recipe up to its Config, without imports of other packages.

    Raises:
        ValueError: it is no recipe, which ends with `runs.main(Config, train)`.
    """
    last = ast.unparse(tree.body[-1]) if tree.body else ""
    if not last.endswith("main(Config, train)"):
        raise ValueError("no recipe")
    ours, kept = {"cookbook_core", *sys.stdlib_module_names}, list[ast.stmt]()
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        if not isinstance(node, ast.Expr) and all(n.partition(".")[0] in ours for n in names):
            kept.append(node)
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            return kept
    raise ValueError("no Config")
