"""The recipe dpo under `torchrun --max_restarts=1`: rank 1 is killed in the second step."""

from __future__ import annotations

import os
import signal
from typing import Any

from cookbook_core import runs
from cookbook_core.backend.local.multiprocess import group
from cookbook_core.tinker import TrainingClient
from recipes import dpo

optim_step = TrainingClient.optim_step
calls = 0


def step(*args: Any, **kwargs: Any) -> Any:
    """Kill rank 1 before the second step of the first life."""
    global calls
    calls += 1
    joined = group.joined()
    assert joined is not None
    if calls == 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(int(joined.heartbeat.places[1].split()[1]), signal.SIGKILL)
    return optim_step(*args, **kwargs)


if __name__ == "__main__":
    TrainingClient.optim_step = step
    runs.main(dpo.Config, dpo.train)
