"""The script that a run executes: its file, its text, and a hash of its code."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COPY = "script.py"
"""The script's copy in a run folder."""


@dataclass(frozen=True)
class Script:
    """A script as it was when a run started.

    Attributes:
        path: the file.
        text: its text.
        code: the hash of its code, from `code_of`.
    """

    path: Path
    text: str
    code: str

    def loss(self) -> str:
        """FILE:LOSS, as the doctor takes it; "FILE:LOSS" where no function is called NAME_loss."""
        body = ast.parse(self.text).body
        names = (node.name for node in body if isinstance(node, ast.FunctionDef))
        loss = next((name for name in names if name.endswith("_loss")), "LOSS")
        file = os.path.relpath(self.path) if self.path.is_relative_to(Path.cwd()) else self.path
        return f"{file}:{loss}"


def script_of(config: Any) -> Script | None:
    """The script that defines a config's class; None where there is no file, as in a notebook."""
    file = getattr(sys.modules.get(type(config).__module__), "__file__", None)
    try:
        text = importlib.util.decode_source(Path(str(file)).read_bytes())
        return Script(Path(str(file)).resolve(), text, code_of(text))
    except (OSError, SyntaxError, ValueError):
        return None


def code_of(text: str) -> str:
    """SHA-256 of a source's syntax tree, without layout, comments and docstrings.

    Versions of Python print the tree differently: compare hashes of one version only.

    Raises:
        SyntaxError, ValueError: the text is not Python.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode("utf-8", "surrogatepass")).hexdigest()


def _is_text(node: ast.AST) -> bool:
    value = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def described(script: Script | None) -> dict[str, str | None]:
    """config.json's entry of a script: its file's name and the hash of its code."""
    if script is None:
        return {"file": None, "code": None}
    return {"file": script.path.name, "code": script.code}


def recorded(folder: Path) -> dict[str, Any] | None:
    """The entry in a run folder's config.json, its hash that of this Python; None: no entry."""
    try:
        entry = json.loads((folder / "config.json").read_text(encoding="utf-8"))["script"]
        recorded = {"file": entry["file"], "code": entry["code"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        return recorded | {"code": code_of((folder / COPY).read_text(encoding="utf-8"))}
    except (OSError, SyntaxError, ValueError):
        return recorded
