"""The file that a run's code is in: its name, its text, and what of the text counts as code."""

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
    """A script as it stood when a run began.

    Attributes:
        path: the file.
        text: what is in it.
        code: hash of its code, as `code_of` gives it.
    """

    path: Path
    text: str
    code: str

    def loss(self) -> str:
        """FILE:LOSS, as the doctor takes it; "FILE:LOSS" where it has no function NAME_loss."""
        body = ast.parse(self.text).body
        names = (node.name for node in body if isinstance(node, ast.FunctionDef))
        loss = next((name for name in names if name.endswith("_loss")), "LOSS")
        file = os.path.relpath(self.path) if self.path.is_relative_to(Path.cwd()) else self.path
        return f"{file}:{loss}"


def script_of(config: Any) -> Script | None:
    """The script that a config's class is defined in; None where there is no file, as in a
    notebook."""
    file = getattr(sys.modules.get(type(config).__module__), "__file__", None)
    try:
        text = importlib.util.decode_source(Path(str(file)).read_bytes())
        return Script(Path(str(file)).resolve(), text, code_of(text))
    except (OSError, SyntaxError, ValueError):
        return None


def code_of(text: str) -> str:
    """SHA-256 of a source's syntax tree: layout, comments and docstrings do not count.

    Versions of Python write trees down differently: hashes compare within one.

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
    """What config.json holds of it."""
    if script is None:
        return {"file": None, "code": None}
    return {"file": script.path.name, "code": script.code}


def recorded(folder: Path) -> dict[str, Any] | None:
    """What `described` gave for a folder's run, the hash that of this Python; None: nothing."""
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))["script"]
        found = {"file": held["file"], "code": held["code"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        return found | {"code": code_of((folder / COPY).read_text(encoding="utf-8"))}
    except (OSError, SyntaxError, ValueError):
        return found
