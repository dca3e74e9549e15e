"""Recipes from end to end with --device sim: the numbers of the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes import dpo, grpo, sft

import pytest

RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (sft, {"batch_size": 4, "eval_every": 3, "test_rows": 4, "max_tokens": 8}),
    "dpo": (dpo, {"batch_size": 2, "eval_every": 3, "test_rows": 4}),
    "grpo": (
        grpo,
        {"batch_size": 2, "group_size": 2, "eval_every": 3, "test_rows": 4, "max_tokens": 8},
    ),
}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_three_steps(name: str, tmp_path: Path) -> None:
    recipe, flags = RUNS[name]
    flags = {**flags, "dataset": f"tiny/{name}@train[:40]/test"}
    logs = []
    for device in ("cpu", "sim"):
        folder = tmp_path / device
        recipe.train(recipe.Config(num_steps=3, device=device, log_path=str(folder), **flags))
        logs.append(lines_of(folder))
    assert len(logs[0]) == len(logs[1]) > 2
    for expected, found in zip(*logs, strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if "seconds" not in key and "per_s" not in key:
                assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
