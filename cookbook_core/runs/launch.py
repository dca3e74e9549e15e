"""Several processes, started by torchrun, that work as one run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType


def join_processes() -> None:
    """Join the processes that torchrun started; call it first in a script (`runs.main` does).

        torchrun --nproc_per_node=2 my_script.py

    Rank 0 returns and runs the script; its clients' work is divided among all ranks. The other
    ranks do not return: they compute for rank 0, and exit with 0 when it ends, with 1 when it
    dies. Without torchrun, or with one process, nothing happens.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    from cookbook_core.backend.local.multiprocess.group import join, joined

    if joined() is not None:
        return
    group = join()
    if group.rank == 0:
        signal.signal(signal.SIGTERM, _end)
        return
    from cookbook_core.backend.local.multiprocess.engine import Follower
    from cookbook_core.errors import ProcessError

    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides when the run ends
        signal.signal(number, signal.SIG_IGN)
    try:
        Follower(group).serve()
    except ProcessError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # a thread may wait in gloo, and aborts a process that takes its modules apart
    raise SystemExit(0)


def _end(number: int, _: FrameType | None) -> None:
    """Exit on SIGTERM, unless another process has died: torchrun sends SIGTERM then too, and the
    error that names the dead process ends the run."""
    from cookbook_core.backend.local.multiprocess.group import joined

    group = joined()
    if group is None or group.lost is None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def silent_follower() -> Iterator[None]:
    """Print nothing inside the block on ranks other than 0: rank 0 prints the same."""
    with contextlib.ExitStack() as silenced:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
            devnull = silenced.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silenced.enter_context(contextlib.redirect_stdout(devnull))
            silenced.enter_context(contextlib.redirect_stderr(devnull))
        yield
