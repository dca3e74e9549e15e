"""How long OpenMP's threads spin while they wait, chosen before torch is loaded."""

import os

SPINS = "1000"


def limit_spinning() -> None:
    """Let threads that wait sleep after 1,000 turns, unless the user chose a number.

    libgomp reads the number when torch is loaded; its own is 300,000, some ten milliseconds. On a
    machine that is busy with other work the thread waited for may not be running: spinning then
    takes the core that it needs, and a step takes many times as long (`benchmarks/busy.py`).
    Results are the same.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
