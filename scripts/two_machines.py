"""Try a run over two machines on one, each a network namespace, and pull the cable between them.

    sudo python -m scripts.two_machines

Needs Linux, root, and iproute2 and util-linux (ip, unshare). The machines are called cookbook-a and
cookbook-b, and know their own names as 127.0.1.1, as Debian and Ubuntu set it up. Prints what each
process said, and the seconds from pulling the cable to each error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cookbook_core.backend.local.multiprocess.heartbeat import VARIABLE
from cookbook_core.runs import read_metrics

ROOT = Path(__file__).parents[1]
NAMES = ("cookbook-a", "cookbook-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = ("veth-a", "veth-b")
SECONDS = 600
RECIPE = ["-m", "recipes.dpo", "--test_rows=2", "--batch_size=2", "--eval_every=1000"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def machines() -> Iterator[None]:
    """Two network namespaces with a cable between them, and a file of hosts in each."""
    folders = [Path("/etc/netns") / name for name in NAMES]
    try:
        for i, (name, folder) in enumerate(zip(NAMES, folders, strict=True)):
            ip("netns", "add", name)
            folder.mkdir(parents=True)
            other = f"{ADDRESSES[1 - i]} {NAMES[1 - i]}"
            hosts = f"127.0.0.1 localhost\n127.0.1.1 {name}\n{other}\n"
            (folder / "hosts").write_text(hosts, encoding="utf-8")
        ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
        for name, cable, address in zip(NAMES, CABLE, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name, folder in zip(NAMES, folders, strict=True):
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(folder, ignore_errors=True)


def start(machine: int, folder: Path, master: str, *flags: str) -> subprocess.Popen[bytes]:
    """One process of the run, with its output in a file."""
    launcher = ["--nnodes=2", f"--node_rank={machine}", f"--master_addr={master}"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, *RECIPE, *flags]
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', NAMES[machine]]
    with open(folder / NAMES[machine], "wb") as output:
        return subprocess.Popen(
            ["ip", "netns", "exec", NAMES[machine], *named, *command],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def said(folder: Path, machine: int) -> str:
    """The lines of the run and its errors; torchrun's own are left out."""
    lines = (folder / NAMES[machine]).read_text(encoding="utf-8", errors="replace").splitlines()
    words = ("process ", "MASTER_ADDR", "resuming", "adapter:")
    return "\n".join(f"    {line}" for line in lines if line.strip().startswith(words))


def whole_run(folder: Path) -> None:
    """Three steps by address: the machines' names being 127.0.1.1 does not matter."""
    run = folder / "run"
    flags = ("--num_steps=3", f"--log_path={run}")
    both = [start(machine, folder, ADDRESSES[0], *flags) for machine in (0, 1)]
    codes = [process.wait(SECONDS) for process in both]
    losses = [row["loss"] for row in read_metrics(run) if "loss" in row]
    print(f"three steps: exit codes {codes}, losses {losses}")


def loopback_name(folder: Path) -> None:
    """By the first machine's name, which only the other one can use, the run is refused."""
    flags = ("--num_steps=3", f"--log_path={folder / 'named'}")
    both = [start(machine, folder, NAMES[0], *flags) for machine in (0, 1)]
    print(f"by name: exit code {both[0].wait(SECONDS)}\n{said(folder, 0)}")
    both[1].terminate()
    both[1].wait(SECONDS)


def pulled_cable(folder: Path, limit: float) -> None:
    """Both machines notice that the cable between them was pulled."""
    run = folder / "pulled"
    flags = ("--num_steps=400", "--save_every=2", f"--log_path={run}")
    os.environ[VARIABLE] = str(limit)
    both = [start(machine, folder, ADDRESSES[0], *flags) for machine in (0, 1)]
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 5:
        time.sleep(0.2)
        assert all(process.poll() is None for process in both), said(folder, 0)
    ip("-n", NAMES[0], "link", "set", CABLE[0], "down")
    pulled = time.monotonic()
    noticed: dict[int, float] = {}
    while any(process.poll() is None for process in both):
        time.sleep(0.2)
        for machine in (0, 1):
            if "hangs" in said(folder, machine):
                noticed.setdefault(machine, time.monotonic() - pulled)
    print(f"cable pulled, {VARIABLE}={limit:g}; torchrun took {time.monotonic() - pulled:.0f} s")
    for machine, seconds in noticed.items():
        print(f"{NAMES[machine]} noticed after {seconds:.0f} s\n{said(folder, machine)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--limit", type=float, default=20.0, help=f"{VARIABLE}, seconds")
    options = parser.parse_args()
    with machines(), tempfile.TemporaryDirectory() as folder:
        whole_run(Path(folder))
        loopback_name(Path(folder))
        pulled_cable(Path(folder), options.limit)


if __name__ == "__main__":
    main()
