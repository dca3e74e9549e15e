"""Install the torch that a constraints file pins, as CPU build where there is no NVIDIA GPU.

    python scripts/install_torch.py [--cpu] [--target FOLDER] CONSTRAINTS [CONSTRAINTS ...]

On Linux, PyPI's torch needs CUDA packages of several gigabytes. Without a GPU this takes the CPU
build ("+cpu") from pip's own sources, else from PyTorch's index, which pip skips after TIMEOUT
seconds where it cannot be reached. Further files name alternatives: the first version that is
installed or offered is taken.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_SOURCE = ("--extra-index-url", CPU_INDEX)
TIMEOUT = 5
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
REFUSED = """\
torch: no CPU build of version {pins} in pip's sources or at {index}.
PyPI's build needs CUDA packages of several gigabytes, and this machine has no NVIDIA GPU.
Name a mirror of that index (export PIP_EXTRA_INDEX_URL=...), or accept the CUDA build:
    {python} -m pip install torch=={pin}"""


def has_gpu(driver: Path = Path("/proc/driver/nvidia")) -> bool:
    """Whether an NVIDIA driver is installed."""
    return shutil.which("nvidia-smi") is not None or driver.exists()


def pinned(constraints: str) -> str:
    """The version in the line `torch==VERSION`."""
    match = re.search(r"^torch==(\S+)", constraints, flags=re.MULTILINE)
    if match is None:
        raise SystemExit("no line torch==VERSION in the constraints file")
    return match[1]


def offered(sources: tuple[str, ...]) -> set[str]:
    """The versions of torch that pip finds in its own sources and in `sources`."""
    quick = ("--retries", "0", "--timeout", str(TIMEOUT))
    command = (*PIP, "index", "versions", "torch", *quick, *sources)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"^Available versions: (.*)", done.stdout, flags=re.MULTILINE)
    return set(match[1].split(", ")) if match else set()


def arguments_for(pins: list[str], *, cpu_build: bool, installed: str) -> list[str]:
    """What to hand to `pip install`; empty if a wanted version is installed.

    Args:
        pins: versions in order of preference.
        cpu_build: whether to take CPU builds only.
        installed: the version that is installed, "" without any.

    Raises:
        SystemExit: no CPU build is offered.
    """
    for pin in pins:
        if installed.partition("+")[0] == pin:
            return []
        if not cpu_build:
            return [f"torch=={pin}"]
        for sources in ((), CPU_SOURCE):
            if f"{pin}+cpu" in offered(sources):
                return [*sources, f"torch=={pin}+cpu"]
    names = {"pins": " or ".join(pins), "pin": pins[-1], "python": sys.executable}
    raise SystemExit(REFUSED.format(index=CPU_INDEX, **names))


def main(arguments: list[str] | None = None) -> None:
    """Install torch into the environment that runs this, or into a folder without what it needs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("constraints", nargs="+", type=Path)
    parser.add_argument("--cpu", action="store_true", help="the CPU build, with a GPU too")
    parser.add_argument("--target", help="folder to install into, without dependencies")
    options = parser.parse_args(arguments)
    pins = [pinned(path.read_text(encoding="utf-8")) for path in options.constraints]
    try:
        installed = version("torch")
    except PackageNotFoundError:
        installed = ""
    cpu_build = platform.system() == "Linux" and (options.cpu or not has_gpu())
    wanted = arguments_for(pins, cpu_build=cpu_build, installed=installed)
    if wanted:
        into = ("--no-deps", "--upgrade", "--target", options.target) if options.target else ()
        done = subprocess.run(
            [*PIP, "install", "--quiet", "--no-compile", *into, *wanted], check=False
        )
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
