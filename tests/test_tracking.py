"""Trackers: what they hand to their libraries. wandb and trackio are stood in for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from cookbook_core.errors import ConfigError
from cookbook_core.runs.tracking import open_tracker

import pytest

CONFIG = {"beta": 0.1, "verdicts": (" yes", " no"), "name": "größe"}


class FakeRun:
    def __init__(self, **settings: Any) -> None:
        self.settings, self.logged, self.finished = settings, [], 0

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_wandb_and_trackio(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[FakeRun] = []
    module = ModuleType(kind)
    module.init = lambda **settings: (runs.append(FakeRun(**settings)), runs[-1])[1]
    monkeypatch.setitem(sys.modules, kind, module)
    monkeypatch.delenv(f"{kind.upper()}_PROJECT", raising=False)
    tracker = open_tracker(kind, "dpo-1", CONFIG, tmp_path)
    tracker.log(0, {"test_loss": 2.0})
    tracker.log(0, {"loss": 1, "kl": None})
    tracker.close()
    place = {"dir": str(tmp_path)} if kind == "wandb" else {}
    assert runs[0].settings == {"project": "cookbook", "name": "dpo-1", "config": CONFIG, **place}
    assert runs[0].logged == [(0, {"test_loss": 2.0}), (0, {"loss": 1.0})]
    assert runs[0].finished == 1
    monkeypatch.setenv(f"{kind.upper()}_PROJECT", "mine")
    open_tracker(kind, "dpo-2", CONFIG, tmp_path)
    assert runs[1].settings["project"] == "mine"


def test_tensorboard_writes_what_tensorboard_reads(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker("tensorboard", "dpo-1", CONFIG, tmp_path)
    tracker.log(0, {"test_loss": 2.0})
    for step in range(3):
        tracker.log(step, {"loss": 1 / (step + 1), "kl": None if step else 0.5})
    tracker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {k: [(e.step, e.value) for e in events.Scalars(k)] for k in events.Tags()["scalars"]}
    assert scalars["test_loss"] == [(0, 2.0)]
    assert scalars["kl"] == [(0, 0.5)]
    assert scalars["loss"] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    (text,) = events.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert '\n        "beta": 0.1,' in shown
    assert '"name": "größe"' in shown


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_missing_library_is_named_with_its_fix(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "torch.utils.tensorboard" if kind == "tensorboard" else kind
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"track: {kind} cannot.*pip install {kind}`") as caught:
        open_tracker(kind, "dpo-1", CONFIG, tmp_path)
    assert isinstance(caught.value.__cause__, ImportError)
    assert list(tmp_path.iterdir()) == []


def test_each_kind_has_its_extra() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for kind in ("tensorboard", "wandb", "trackio"):
        assert f'\n{kind} = ["{kind}>=' in text


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'no tracker "tensorbord". Did you mean "tensorboard"\?'):
        open_tracker("tensorbord", "dpo-1", CONFIG, tmp_path)
