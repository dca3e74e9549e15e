"""Sharded base models: what is refused, and how a run ends whose process fails in a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cookbook_core.backend import local
from cookbook_core.backend.local.model.sharding import loading_options
from cookbook_core.backend.local.multiprocess import group
from cookbook_core.backend.local.multiprocess.heartbeat import Heartbeat
from cookbook_core.errors import ConfigError, DatumError, ProcessError, VersionError
from cookbook_core.runs import Run, RunFlags
from cookbook_core.tinker import Datum, ServiceClient, TrainingClient
from tests import follower
from tests.follower import Two
from tests.test_process_runs import Config
from tests.test_processes import grouped, squared

import pytest
import torch

CPU, PLAIN = torch.device("cpu"), SimpleNamespace(model_type="llama")
DETECTED = 60
"""Seconds within which a failure has to be noticed on a busy machine; about one on an idle one."""


# ---- refused -------------------------------------------------------------------------------------


def test_without_other_processes(tmp_path: Path) -> None:
    """By the flag, as recipes take it; no run folder is left."""
    folder = tmp_path / "run"
    with (
        pytest.raises(ConfigError, match=r"^shard: needs several processes.* torchrun"),
        Run.open("r", Config(str(folder)), 6, RunFlags(shard=True)) as run,
    ):
        run.service_client().create_lora_training_client("tiny", rank=4)
    assert not folder.exists()
    with pytest.raises(ConfigError, match=r"^shard: not supported with base_url"):
        ServiceClient(base_url="http://127.0.0.1:9", shard=True)


@pytest.mark.parametrize(
    ("config", "dtype", "device", "said"),
    [
        (PLAIN, "nf4", CPU, "quantized"),
        (SimpleNamespace(quantization_config={"load_in_4bit": True}), "auto", CPU, "quantized"),
        (SimpleNamespace(vision_config={}, model_type="qwen3_vl"), "auto", CPU, "got qwen3_vl"),
        (PLAIN, "auto", torch.device("mps"), "device.* got mps"),
    ],
)
def test_what_is_not_sharded(config: Any, dtype: str, device: torch.device, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^shard: .*{said}"):
        loading_options(config, dtype, device, 2)


def test_versions_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "transformers": "5.22.1", "peft": "0.21.2"}
    monkeypatch.setattr(local, "version", installed.get)
    with pytest.raises(VersionError, match=r"transformers: .*--shard.*>=5.23,.*5.22.1") as caught:
        loading_options(PLAIN, "auto", CPU, 2)
    assert caught.value.others == []
    installed["transformers"] = "5.23.0"
    assert loading_options(PLAIN, "auto", CPU, 2)["distributed_config"].fsdp_size == 2


# ---- a process that fails or dies inside a forward -----------------------------------------------


@pytest.fixture
def sharded(
    tmp_path: Path, model_folder: Callable[..., str]
) -> Iterator[tuple[Two, TrainingClient]]:
    two = Two(tmp_path)
    with ServiceClient(
        device="cpu", dtype="float64", checkpoint_dir=tmp_path, shard=True
    ) as service:
        yield two, service.create_lora_training_client(model_folder(), rank=4).result(60)
    group.leave()
    two.other.wait(60)


def with_token(token: int) -> list[Datum]:
    return [follower.beginning_with(token, datum) for datum in grouped(3, 2, 20)]


@pytest.mark.parametrize(
    ("token", "status"), [(follower.FAILS_IN_LAYER, 1), (follower.KILLED_IN_LAYER, -9)]
)
def test_the_other_process_ends_inside_a_forward(
    sharded: tuple[Two, TrainingClient], token: int, status: int
) -> None:
    two, client = sharded
    with pytest.raises(ProcessError, match="process 1 of 2: died"):
        client.forward_backward_custom(with_token(token), squared).result(DETECTED)
    assert two.other.wait(DETECTED) == status
    said = two.said.read_text(encoding="utf-8")
    assert ("process 1 of 2: failed" in said and "the layer broke" in said) == (status == 1)
    with pytest.raises(ProcessError, match="process 1 of 2: died"):
        client.forward(grouped(1, 2, 5), "cross_entropy").result(DETECTED)


def test_a_failure_here_while_all_compute() -> None:
    """An exception of this process's own, and that of a collective whose peer is gone."""
    for error, said in (
        (
            RuntimeError("the layer broke"),
            r"process 0 of 2: failed.* RuntimeError: the layer broke",
        ),
        (DatumError("data[2]", "too long"), r"process 0 of 2: failed.* DatumError: data\[2\]"),
        (RuntimeError("[gloo/pair.cc:5] Connection closed"), r"process 1 of 2: died.*Connection"),
    ):
        ours = object.__new__(group.Group)
        ours.rank, ours.size, ours.lost = 0, 2, None
        ours.heartbeat = Heartbeat(torch.distributed.HashStore(), 0, 2)
        with pytest.raises(ProcessError, match=said) as caught, ours.in_step():
            raise error
        assert ours.lost is caught.value
