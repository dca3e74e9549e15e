"""Rules of the house, checked: import direction, sizes, encodings, documentation, the README."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cookbook_core

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "cookbook_core").rglob("*.py"))
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*.py") if p.stem != "__init__")
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SOURCES = [*CORE, *RECIPES, *sorted((ROOT / "scripts").glob("*.py"))]
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "tyro")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path, *, top_level: bool) -> Iterator[str]:
    """Modules a file imports; top_level leaves out functions and `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_imports_run_downwards(path):
    modules = list(imports_of(path, top_level=False))
    assert not [m for m in modules if m.split(".")[0] in ("recipes", "tests", "scripts")]
    if "backend/local" not in name_of(path):
        top = [m.split(".")[0] for m in imports_of(path, top_level=True)]
        assert not set(top) & set(HEAVY)
        at_import = [m for m in imports_of(path, top_level=True) if "backend.local" in m]
        assert not at_import


def test_importing_the_core_loads_nothing_heavy():
    code = "import sys, cookbook_core; print([m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, *HEAVY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_sizes():
    """Hard caps in lines: recipe 350, core module 350, backend file 400, function 60, loop 90."""
    too_long = []
    for path in [*CORE, *RECIPES]:
        text = path.read_text(encoding="utf-8")
        cap = 400 if "backend" in name_of(path) else 350
        if len(text.splitlines()) > cap:
            too_long.append(f"{name_of(path)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                words = len((ast.get_docstring(node, clean=False) or "").splitlines())
                lines = (node.end_lineno or 0) - node.lineno + 1 - words
                if lines > (90 if node.name == "train" else 60):
                    too_long.append(f"{name_of(path)}: {node.name}() {lines} lines")
    assert not too_long


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_text_files_name_their_encoding(path):
    """Pitfall 38: text files without an encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if ast.unparse(node.func) == "os.open" or called not in ("open", "read_text", "write_text"):
            continue
        mode = next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), "")
        named = any(k.arg == "encoding" for k in node.keywords)
        assert named or "b" in str(mode), f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("path", [*CORE, *RECIPES], ids=name_of)
def test_nothing_is_unpickled(path):
    text = path.read_text(encoding="utf-8")
    forbidden = r"\bpickle\b(?!d)|allow_pickle|torch\.load\b|import load\b|trust_remote_code=True"
    assert not re.search(rf"{forbidden}|\b(dill|cloudpickle|joblib|shelve|marshal)\b", text)


def test_public_names_are_few_and_documented():
    assert len(cookbook_core.__all__) <= 15
    for name in cookbook_core.__all__:
        assert (getattr(cookbook_core, name).__doc__ or "").strip(), name


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipes(path):
    """Every Config field is documented and read; the recipe is in the README with its command."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    body = [n for n in config.body if not isinstance(n, ast.FunctionDef)][1:]
    fields = [n.target.id for n in body[0::2]]
    assert all(isinstance(n, ast.Expr) for n in body[1::2]), "a string under each field"
    assert len(fields) <= 22
    for field in fields:
        read = re.search(rf"\bconfig\.{field}\b", text)
        assert read or field == "log_path", f"Config.{field} is never read"
    own = sum(
        len(n.names)
        for n in tree.body
        if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("cookbook_core")
    )
    assert own <= 8, "own names imported by a recipe"
    losses = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.endswith("_loss")]
    assert losses, "the loss is a top-level function"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"recipes/{path.name}" in readme
    assert f"python -m recipes.{path.stem}" in readme
    module = importlib.import_module(f"recipes.{path.stem}")  # nothing runs at import
    assert callable(module.train)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks(path):
    """In the table, short, run in order, outputs stored without noise, something checked."""
    table = (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^\|.*\]\({path.name}\)", table, flags=re.MULTILINE)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) <= 20
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    checked = [c for c in code if "".join(c["source"]).startswith("# NBVAL_CHECK_OUTPUT")]
    assert checked
    assert all(cell["outputs"] for cell in checked)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert max(map(len, pictures), default=0) < 80_000  # base64 of 60 kB
    for before, cell in zip([None, *cells], cells, strict=False):
        if cell["cell_type"] == "markdown":
            assert len("".join(cell["source"]).splitlines()) <= 5
            assert before is None or before["cell_type"] == "code"


def test_readme_commands_and_links_exist():
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    folders = (ROOT, ROOT / "recipes", ROOT / "tutorials")
    for document in [path for folder in folders for path in folder.glob("*.md")]:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"^\s*make (\w+)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", make, flags=re.MULTILINE), target
        for module in re.findall(r"python -m (recipes\.\w+)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in run
