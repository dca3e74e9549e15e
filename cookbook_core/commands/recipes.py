"""`cookbook list` and `cookbook new`: the recipes and tutorials, and a copy of a recipe to change.

Recipes are read as text from the installed package, or from the checkout it is installed from, so a
copy always fits the core it will run on.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from importlib import metadata
from pathlib import Path

from cookbook_core.errors import ConfigError, nearest


def find_recipes() -> dict[str, Path]:
    """Map the name of each recipe to its file, sorted by name."""
    files = sorted(_folder("recipes").glob("*.py"))
    return {file.stem: file for file in files if file.stem != "__init__"}


def find_tutorials() -> dict[str, Path]:
    """Map the name of each tutorial to its notebook; {} where the package has none."""
    return {file.stem: file for file in sorted(_folder("tutorials").glob("*.ipynb"))}


def listing() -> str:
    """List the recipes and tutorials, a line each: the name and what it is for."""
    recipes, tutorials = find_recipes(), find_tutorials()
    width = max(map(len, [*recipes, *tutorials]), default=0)
    lines = ["Recipes (copy one: cookbook new RECIPE FILE)"]
    lines += [f"  {name:{width}}  {_first_line(file)}" for name, file in recipes.items()]
    if tutorials:
        lines += ["", f"Tutorials (in {_folder('tutorials')})"]
    lines += [f"  {name:{width}}  {_first_line(file)}" for name, file in tutorials.items()]
    return "\n".join(lines)


SHADOWED = ("cookbook_core", "datasets", "matplotlib", "numpy", "peft", "torch", "transformers")
"""Modules that recipes import: a script of such a name would be imported in their place."""


def new(recipe: str, target: Path | None = None) -> Path:
    """Copy a recipe to a new file; commands in its text are changed to name that file.

    Args:
        recipe: its name, such as "dpo".
        target: the file to write; None takes my_<recipe>.py in the current folder.
    Returns:
        The file.
    Raises:
        ConfigError: no such recipe, or a target that exists, does not end in .py, has no folder, or
            has the name of a module that recipes import.
    """
    recipes = find_recipes()
    if recipe not in recipes:
        raise ConfigError("cookbook new", f'no recipe "{recipe}"', fix=nearest(recipe, recipes))
    path = target or Path(f"my_{recipe}.py")
    if path.suffix != ".py":
        rule = f"a name ending in .py, such as my_{recipe}.py"
        raise ConfigError("cookbook new", "not a Python file's name", expected=rule, got=path)
    if path.stem in sys.stdlib_module_names or path.stem in SHADOWED:
        fix = f"Give another name, such as my_{recipe}.py."
        raise ConfigError("cookbook new", "hides the module of that name", got=path, fix=fix)
    if not path.parent.is_dir():
        fix = "Create it first."
        raise ConfigError("cookbook new", "no such folder", got=path.parent, fix=fix)

    def command(match: re.Match[str]) -> str:
        own = match[2] == recipe
        return f"python {quoted(path.name)}" if own else f"python -m cookbook_core.{match[1]}"

    text = recipes[recipe].read_text(encoding="utf-8")
    text = re.sub(r"python -m (recipes\.(\w+))", command, text)
    text = text.replace(f"runs/{recipe}-", f"runs/{path.stem}-")
    try:
        with open(path, "x", encoding="utf-8", newline="\n") as file:
            file.write(f"# From recipes/{recipe}.py of cookbook-core {version()}.\n{text}")
    except FileExistsError as error:
        fix = f"Give another name: cookbook new {recipe} OTHER.py."
        raise ConfigError(str(path), "exists", fix=fix) from error
    return path


def next_commands(recipe: str, path: Path) -> str:
    """Describe a fresh copy of a recipe and list the commands to run on it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    loss = next((name for name in functions if name.endswith("_loss")), "")
    return (
        f"{path}: a copy of the recipe {recipe}. Its loss is {loss}().\n"
        f"  run it           python {quoted(path)}\n"
        f"  flags            python {quoted(path)} --help\n"
        f"  check the loss   cookbook doctor {quoted(f'{path}:{loss}')}"
    )


def version() -> str:
    """The installed package's version; "(not installed)" for a checkout that is only imported."""
    try:
        return metadata.version("cookbook-core")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def quoted(path: Path | str) -> str:
    """The path as a shell takes it: in quotes where it has a space."""
    return f'"{path}"' if " " in str(path) else str(path)


def _folder(name: str) -> Path:
    """A folder of the repository: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def _first_line(file: Path) -> str:
    """The first line of a recipe's docstring, or the title of a notebook."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        source = json.loads(text)["cells"][0]["source"]
        return "".join(source).lstrip("# ").split("\n")[0]
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
