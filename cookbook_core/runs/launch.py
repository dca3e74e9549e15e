"""Several processes, started by torchrun, as one run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType


def join_processes() -> None:
    """Call once at the start of a script that torchrun starts; `parse_config` does.

        torchrun --nproc_per_node=2 my_script.py

    Process 0 goes on with the script, and what its clients compute is shared out. In the others
    this does not return: they compute for process 0, and exit with 0 when it has ended, with 1
    when it is gone. Without torchrun, or with one process, nothing happens.
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

    for number in (signal.SIGINT, signal.SIGTERM):  # process 0 decides when the run ends
        signal.signal(number, signal.SIG_IGN)
    try:
        Follower(group).serve()
    except ProcessError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(0)


def _end(number: int, _: FrameType | None) -> None:
    """End, unless the run is about to end by itself: torchrun sends SIGTERM when a process dies,
    and the error that says so is on its way."""
    from cookbook_core.backend.local.multiprocess.group import joined

    group = joined()
    if group is None or group.lost is None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def silent_follower() -> Iterator[None]:
    """Within, nothing is printed in a process that will serve another: process 0 says it."""
    with contextlib.ExitStack() as silenced:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
            nowhere = silenced.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silenced.enter_context(contextlib.redirect_stdout(nowhere))
            silenced.enter_context(contextlib.redirect_stderr(nowhere))
        yield
