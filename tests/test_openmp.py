"""libgomp, loaded with torch, finds the spin count that was chosen before: it is asked itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*.py") if p.stem != "__init__")
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
OWN = "300000"  # libgomp's

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torch has libgomp on Linux alone")


def spin_count(code: str, **chosen: str) -> str:
    """What libgomp says that it uses, in a process that runs this code."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    inherited = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT), **chosen},
        capture_output=True,
        text=True,
        check=True,
    )
    return re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)[0]


def test_the_core_before_torch() -> None:
    assert spin_count("import cookbook_core, torch") == "1000"
    assert spin_count("import torch, cookbook_core") == OWN


@pytest.mark.parametrize(
    ("chosen", "found"),
    [({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    ids=["count", "policy"],
)
def test_what_the_user_chose_stays(chosen: dict[str, str], found: str) -> None:
    assert spin_count("import cookbook_core, torch", **chosen) == found


def imports_of(text: str) -> list[str]:
    """The packages that a program imports, in order, without those of a function."""
    return re.findall(r"^(?:from|import) (\w+)", text, re.M)


@pytest.mark.parametrize("path", [*RECIPES, *NOTEBOOKS], ids=lambda p: p.stem)
def test_programs_import_the_core_first(path: Path) -> None:
    """Those that people copy: a recipe's file and a notebook's first cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [c["source"] for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
        text = "\n".join("".join(cell) for cell in cells)
    packages = imports_of(text)
    ours = min(packages.index(name) for name in ("cookbook_core", "recipes") if name in packages)
    for name in ("torch", "numpy", "peft", "transformers", "matplotlib"):
        assert name not in packages or packages.index(name) > ours


def test_a_recipe() -> None:
    assert spin_count("import recipes.sft") == "1000"
