"""Two processes for tests: the one that runs them, and one that serves it. The latter is this file
run as a program; it fails when it meets certain tokens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from cookbook_core.backend.local.model.vision import VisionTower
from cookbook_core.backend.local.multiprocess import group
from cookbook_core.backend.local.scoring.scorer import Scorer
from cookbook_core.runs import join_processes
from cookbook_core.tinker import Datum, ModelInput
from cookbook_core.types import ImageChunk

import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

FAILS, FAILS_BACKWARD, TOO_LONG = 97, 98, 99
FAILS_IN_LAYER, KILLED_IN_LAYER = 95, 94

ROOT = Path(__file__).parents[1]

NORMS: tuple[Any, ...] = (Qwen3RMSNorm, Qwen3VLTextRMSNorm)
ENCODED = "encoded the image"

score_batch = Scorer.score_batch
run_tower = VisionTower._run


def float64_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    """In the model's own dtype: transformers' is in float32 even in a float64 model, so there a
    difference in the last bit, of batches cut otherwise, can come out as 1e-7."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, True) + self.variance_epsilon)


def failing(grad: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the backward broke")


def breaking(*_: Any) -> None:
    raise RuntimeError("the layer broke")


def killing(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def beginning_with(token: int, datum: Datum) -> Datum:
    ids = datum.model_input.to_ints()
    return Datum(ModelInput.from_ints([token, *ids[1:]]), datum.loss_fn_inputs)


def poisoned(self: Scorer, batch: Any) -> torch.Tensor:
    tokens = {token for datum in batch.data for token in datum.model_input.ids()}
    if FAILS in tokens:
        raise RuntimeError("the forward broke")
    if TOO_LONG in tokens:
        raise torch.OutOfMemoryError("out of memory")
    for token, end in ((FAILS_IN_LAYER, breaking), (KILLED_IN_LAYER, killing)):
        if token in tokens:
            self.model.model.layers[1].register_forward_pre_hook(end)
    found = score_batch(self, batch)
    if FAILS_BACKWARD in tokens and torch.is_grad_enabled():
        found.register_hook(failing)
    return found


def counted(self: VisionTower, chunk: ImageChunk) -> Any:
    print(ENCODED, chunk.key, flush=True)
    return run_tower(self, chunk)


class Two:
    """This process, as process 0, and another one that serves it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.env = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": "0",
        }
        self.said = folder / "follower.log"
        with open(self.said, "w", encoding="utf-8") as log:
            self.other = subprocess.Popen(
                [sys.executable, "-m", "tests.follower"],
                cwd=ROOT,
                env={**os.environ, **self.env, "RANK": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        before = {name: os.environ.get(name) for name in self.env}
        os.environ.update(self.env)
        try:
            join_processes()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def end(self) -> int:
        group.leave()
        return self.other.wait(60)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Scorer.score_batch = poisoned
    VisionTower._run = counted
    for norm in NORMS:
        norm.forward = float64_norm
    join_processes()
