"""Which torch `make` installs: the CPU build where there is no GPU, and nothing CUDA for nobody."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("pip")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "install_torch.py"
    spec = importlib.util.spec_from_file_location("install_torch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel(folder: Path, version: str, requires: str = "") -> None:
    """Put an empty torch of that version, and a page that lists it, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as archive:
        text = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        archive.writestr(
            f"{info}/METADATA", text + (f"Requires-Dist: {requires}\n" * bool(requires))
        )
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tag)
        archive.writestr(f"{info}/RECORD", "")
    links = (f'<a href="{path.as_uri()}">{path.name}</a>' for path in folder.glob("*.whl"))
    (folder / "index.html").write_text("<!DOCTYPE html>\n" + "\n".join(links), "utf-8")


@pytest.fixture
def index(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index with CUDA builds alone; the CPU index is down."""
    pypi = tmp_path / "pypi" / "torch"
    for version in ("2.9.1", "2.13.0"):
        wheel(pypi, version, "nvidia-cublas")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", pypi.parent.as_uri())
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(script, "CPU_SOURCE", ("--extra-index-url", "http://127.0.0.1:9/"))
    return tmp_path


def test_a_gpu_takes_the_plain_build(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do macOS and Windows, whose plain build is the CPU's; no index is asked."""
    monkeypatch.delattr(script, "offered")
    assert script.arguments_for(["2.13.0"], cpu_build=False, installed="") == ["torch==2.13.0"]
    assert script.arguments_for(["2.13.0"], cpu_build=False, installed="2.13.0") == []
    assert script.arguments_for(["2.13.0"], cpu_build=True, installed="2.13.0+cpu") == []


@pytest.mark.parametrize(
    ("system", "driver", "smi", "options", "cpu_build"),
    [
        ("Linux", False, False, [], True),
        ("Linux", True, False, [], False),
        ("Linux", False, True, [], False),
        ("Linux", True, True, ["--cpu"], True),
        ("Darwin", False, False, [], False),
        ("Windows", False, False, [], False),
    ],
)
def test_what_counts_as_a_gpu(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    driver: bool,
    smi: bool,
    options: list[str],
    cpu_build: bool,
) -> None:
    if driver:
        (tmp_path / "nvidia").touch()
    monkeypatch.setattr(script.has_gpu, "__defaults__", (tmp_path / "nvidia",))
    monkeypatch.setattr(script.shutil, "which", {"nvidia-smi": "found" if smi else None}.get)
    monkeypatch.setattr(script.platform, "system", lambda: system)
    chosen: list[bool] = []
    monkeypatch.setattr(
        script, "arguments_for", lambda pins, cpu_build, installed: chosen.append(cpu_build)
    )
    script.main([*options, str(ROOT / "constraints.txt")])
    assert chosen == [cpu_build]


def test_the_cpu_index_is_preferred(
    script: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = index / "cpu" / "torch"
    wheel(cpu, "2.13.0+cpu")
    monkeypatch.setattr(script, "CPU_SOURCE", ("--extra-index-url", cpu.parent.as_uri()))
    arguments = script.arguments_for(["2.13.0"], cpu_build=True, installed="")
    assert arguments == [*script.CPU_SOURCE, "torch==2.13.0+cpu"]
    arguments = script.arguments_for(["2.9.1", "2.13.0"], cpu_build=True, installed="")
    assert arguments == [*script.CPU_SOURCE, "torch==2.13.0+cpu"]


def test_a_build_among_pips_own_sources_needs_no_index(
    script: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(index / "wheels", "2.13.0+cpu")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "wheels"))
    arguments = script.arguments_for(["2.13.0"], cpu_build=True, installed="")
    assert arguments == ["torch==2.13.0+cpu"]


def test_without_any_cpu_build_nothing_is_installed(script: ModuleType, index: Path) -> None:
    assert script.offered(()) == {"2.9.1", "2.13.0"}
    with pytest.raises(SystemExit, match=r"no CPU build of version 2\.13\.0") as caught:
        script.arguments_for(["2.13.0"], cpu_build=True, installed="")
    assert f"{sys.executable} -m pip install torch==2.13.0" in str(caught.value)
    # the oldest set: the environment's own torch serves where the older one is not offered
    arguments = script.arguments_for(["2.9.1", "2.13.0"], cpu_build=True, installed="2.13.0+cpu")
    assert arguments == []


def test_it_installs(script: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's part for real: the folder has the CPU build although the index has the CUDA one."""
    wheel(index / "wheels", "2.9.1+cpu")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "wheels"))
    target = index / "target"
    with pytest.raises(SystemExit) as caught:
        script.main(["--cpu", "--target", str(target), str(ROOT / "constraints-oldest.txt")])
    assert caught.value.code == 0
    assert [path.name for path in target.glob("*.dist-info")] == ["torch-2.9.1+cpu.dist-info"]
