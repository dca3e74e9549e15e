"""Recipes that sample only to show or to measure, on a service that trains and does not sample."""

from __future__ import annotations

import json

from cookbook_core import tinker
from cookbook_core.errors import RequestError
from recipes import dpo, sft

import pytest


@pytest.fixture
def no_sampling(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise RequestError("sample", "capability disabled")

    monkeypatch.setattr(tinker.ServiceClient, "create_sampling_client", refuse)
    monkeypatch.setattr(tinker.TrainingClient, "save_weights_and_get_sampling_client", refuse)


@pytest.mark.parametrize("recipe", [sft, dpo])
def test_trains_on_and_says_so(recipe, no_sampling, tmp_path, capsys):
    config = recipe.Config(
        dataset=f"tiny/{recipe.__name__.rpartition('.')[2]}@train[:20]/test",
        num_steps=2,
        batch_size=2,
        test_rows=4,
        eval_every=1,
        log_path=str(tmp_path / "run"),
    )
    after = recipe.train(config)
    assert "test_loss" in after
    assert "test_exact_match" not in after
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum("test_loss" in json.loads(row) for row in rows) == 3
    assert "capability disabled" in capsys.readouterr().out
    assert "(not sampled)" in (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")
