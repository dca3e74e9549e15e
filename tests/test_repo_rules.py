"""Rules of the house, checked: import direction, sizes, encodings, documentation, the README."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import cookbook_core
from cookbook_core import errors
from cookbook_core.commands import cli

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "cookbook_core").rglob("*.py"))
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*.py") if p.stem != "__init__")
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SOURCES = [*CORE, *RECIPES, *sorted((ROOT / "scripts").glob("*.py"))]
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "tyro")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


LAYERS = (
    "errors",
    "storage",
    "types",
    "datums datum_checks alignment custom_loss token_set builtin_losses regularise",
    "image_files images",
    "data chat",
    "backend",
    "tinker",
    "runs",
    "clients environments rewards",
    "doctor conformance serve",
    "commands",
)
"""Low to high: a module imports from its own layer and from those before it."""
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names.split()}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in CORE}


def imports_of(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Modules a file imports; top_level leaves out functions and `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                yield name if name in MODULES else node.module or ""


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_imports_run_downwards(path):
    modules = set(imports_of(path))
    assert not [m for m in modules if m.split(".")[0] in ("recipes", "tests", "scripts")]
    if module_of(path) != "cookbook_core":
        own = LAYER_OF[module_of(path).split(".")[1]]
        assert "cookbook_core" not in modules, "import from the module that defines the name"
        parts = (m.split(".")[1] for m in modules if m.startswith("cookbook_core."))
        assert [part for part in parts if LAYER_OF[part] > own] == []
    if "backend/local" not in name_of(path):
        top = list(imports_of(path, top_level=True))
        assert not {m.split(".")[0] for m in top} & set(HEAVY)
        assert not [m for m in top if "backend.local" in m]


def test_imports_have_no_circle():
    """Neither between modules nor between the folders of a layer."""

    def folder(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:-1]) if MODULES[module].name != "__init__.py" else module

    graph = {m: {i for i in imports_of(p) if i in MODULES} for m, p in MODULES.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError
    folders: dict[str, set[str]] = {}
    for module, imported in graph.items():
        if module.startswith("cookbook_core.backend.local."):
            inside = {i for i in imported if i.startswith("cookbook_core.backend.local.")}
            own = folders.setdefault(folder(module), set())
            own |= {folder(i) for i in inside} - {folder(module)}
    folders.pop("cookbook_core.backend.local")  # files beside the folders use, and serve, them
    tuple(TopologicalSorter(folders).static_order())


def test_importing_the_core_loads_nothing_heavy():
    code = "import sys, cookbook_core; print([m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, *HEAVY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_functions_are_short():
    """At most 60 lines without the docstring, a training loop 90; long modules are warned of."""
    too_long = []
    for path in [*CORE, *RECIPES]:
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > 400:
            warnings.warn(f"{name_of(path)} has {lines} lines: is it one thing?", stacklevel=1)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                words = len((ast.get_docstring(node, clean=False) or "").splitlines())
                lines = (node.end_lineno or 0) - node.lineno + 1 - words
                if lines > (90 if node.name == "train" else 60):
                    too_long.append(f"{name_of(path)}: {node.name}() {lines} lines")
    assert not too_long


def test_recipes_are_read_in_one_sitting():
    assert [name_of(p) for p in RECIPES if len(p.read_text("utf-8").splitlines()) > 350] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_text_files_name_their_encoding(path):
    """Pitfall 38: text files without an encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if ast.unparse(node.func) in ("os.open", "runs.Run.open", "Image.open") or called not in (
            "open",
            "read_text",
            "write_text",
        ):
            continue
        mode = next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), "")
        named = any(k.arg == "encoding" for k in node.keywords)
        assert named or "b" in str(mode), f"{name_of(path)}:{node.lineno}"


FILLERS = {"it", "this", "that", "one", "another", "others", "none", "nothing", "none of it"} | {
    "this one", "that of one", "this exception", "something else", "what is there", "a call",
}  # fmt: skip
"""Words in `expected` or `got` that say nothing; a slot without a value is left out."""


def error_sites(path: Path) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Every place that makes an error of ours: file and line, and the slots it fills by name."""
    kinds = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    ours = {name for name, kind in kinds.items() if issubclass(kind, errors.CookbookError)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ours or (name == "error" and len(node.args) > 1):
                slots = {keyword.arg or "**": keyword.value for keyword in node.keywords}
                yield f"{name_of(path)}:{node.lineno}", slots


def test_half_of_all_errors_name_a_fix():
    """And none has a filler in a slot. A call that passes slots on (`**slots`) is not counted."""
    sites = [site for path in [*CORE, *RECIPES] for site in error_sites(path)]
    sites = [(place, slots) for place, slots in sites if "**" not in slots]
    assert len(sites) > 200
    words = [
        (place, slot, slots[slot].value)
        for place, slots in sites
        for slot in ("expected", "got")
        if isinstance(slots.get(slot), ast.Constant)
    ]
    assert [word for word in words if str(word[2]).lower() in FILLERS] == []
    without = [place for place, slots in sites if "fix" not in slots]
    share = 1 - len(without) / len(sites)
    assert share >= 0.5, f"{share:.0%} of {len(sites)} errors name a fix; these do not: {without}"
    full = [place for place, slots in sites if {"expected", "got", "fix"} <= slots.keys()]
    share = len(full) / len(sites)
    assert share >= 0.5, f"{share:.1%} of {len(sites)} errors have expected, got and fix"


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


@pytest.mark.parametrize("path", [*RECIPES, *NOTEBOOKS], ids=name_of)
def test_programs_import_the_core_first(path):
    """Those that people copy: --help and mistyped flags are answered before torch is imported."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [c["source"] for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
        text = "\n".join("".join(cell) for cell in cells)
    packages = re.findall(r"^(?:from|import) (\w+)", text, re.M)  # without those of a function
    ours = min(packages.index(name) for name in ("cookbook_core", "recipes") if name in packages)
    for name in ("torch", "numpy", "peft", "transformers", "matplotlib"):
        assert name not in packages or packages.index(name) > ours


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


FOLDERS = ("", "recipes", "tutorials", "docs", "benchmarks")
OWN = ("recipes", "cookbook_core", "benchmarks", "scripts", "tests")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))


def commands_in(document: Path) -> list[str]:
    """Indented lines and `spans` that begin with a program, with continued lines joined."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    start = r"(?:make|cookbook|python3?|torchrun|pip) "
    lines = re.findall(rf"^ {{4,}}({start}.*)", text, flags=re.MULTILINE)
    return [*lines, *re.findall(rf"`({start}[^`]*)`", text)]


def flags_of(module: str) -> set[str]:
    """The flags a module of this repository takes: its Config's fields, or those in its text."""
    if module.startswith("recipes."):
        own = dataclasses.fields(importlib.import_module(module).Config)
        common = (ROOT / "cookbook_core" / "runs" / "config.py").read_text(encoding="utf-8")
        names = [field.name for field in own] + re.findall(r"^    (\w+): ", common, flags=re.M)
        return {f"--{name}" for name in names} | {"--help"}
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert spec is not None, f"no module {module}"
    text = Path(str(spec.origin)).read_text(encoding="utf-8")
    return set(re.findall(r"--\w+", text)) | {"--help"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_exist(document):
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_exist(document, capsys):
    """Targets of make, subcommands and flags of cookbook, modules and flags of python -m."""
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    wrong = []
    for command in commands_in(document):
        words = command.partition(" #")[0].split()
        if "-m" in words:  # flags before it are those of python or torchrun
            words = words[words.index("-m") :]
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        known = flags
        if words[0] == "make" and not re.search(rf"^{words[1]}:", make, flags=re.MULTILINE):
            wrong.append(command)
        elif words[0] == "cookbook":
            with pytest.raises(SystemExit) as caught:
                cli.main([words[1], "--help"])
            known = set(re.findall(r"--\w+", capsys.readouterr().out))
            known |= flags if words[1] == "doctor" else set()  # it takes the loss's own arguments
            wrong += [command] if caught.value.code else []
        elif words[0] == "-m" and words[1].split(".")[0] in OWN:
            known = flags_of(words[1])
        wrong += [f"{command}: {flag}" for flag in sorted(flags - known)]
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_named_in_documents_exist(document):
    """Sources, and the words by which tests are chosen."""
    text = document.read_text(encoding="utf-8")
    if document.stem != "CHANGELOG":
        sources = r"[( `]((?:cookbook_core|recipes|tests|scripts)/\w[\w/]*\.py)"
        named = [f for f in re.findall(sources, text) if not f.endswith("my_recipe.py")]
        assert [file for file in named if not (ROOT / file).exists()] == []
    for file, quoted, word in re.findall(r'pytest (\S+\.py) -k (?:"([^"]+)"|(\w+))', text):
        code = (ROOT / file).read_text(encoding="utf-8")
        assert [part for part in (quoted or word).split(" or ") if part not in code] == []


def test_ci_runs_the_readme_command():
    """The same script in every CI: .ci/run, which runs make test."""
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: .ci/run" in workflow
    assert "secrets." not in workflow
    assert re.findall(r"uses: (?!actions/[\w-]+@v\d+$).*", workflow, flags=re.MULTILINE) == []
