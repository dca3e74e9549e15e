"""The versions of what the package builds on: what is promised, tested, and checked at import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from cookbook_core.backend import local
from cookbook_core.errors import VersionError

import pytest

ROOT = Path(__file__).parents[1]
SUITES = (
    *("test_checkpoints", "test_export", "test_fused_layer", "test_fused_lora", "test_fused_norm"),
    *("test_gradient_parity", "test_packing", "test_sampler", "test_scoring"),
    *("test_vocab_logprobs", "serve/test_protocol", "serve/test_chat"),
)
# each architecture in float64, one loss of each shape; the losses and limits are arithmetic of ours
FEWER = (
    "not (three_ways and (float32 or squared or variance or cross_entropy)) "
    "and not (shared_prefixes and (float32 or 0-float64))"
)


def test_the_backend_with_the_oldest_versions() -> None:
    """`make test` puts them into the environment's folder oldest."""
    folder = Path(sys.prefix) / "oldest"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; make test installs it, up to Python 3.12")
    path = os.pathsep.join([str(ROOT), str(folder)])
    suites = [f"tests/{name}.py" for name in SUITES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *suites, "-k", FEWER],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def pins(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, flags=re.MULTILINE))


def ranges() -> dict[str, tuple[str, str]]:
    """Low and high ("" without any) of each dependency, those of the extra serve included."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    starts = ("\ndependencies = [", "\nserve = [")
    listed = "".join(text.split(start, 1)[1].split("]", 1)[0] for start in starts)
    found = re.findall(r'"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?"', listed)
    assert len(found) == listed.count('"') / 2
    return {name: (low, high) for name, low, high in found}


def numbers(version: str) -> tuple[int, ...]:
    parts = [int(x) for x in version.partition("+")[0].split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def test_ranges_are_those_that_are_tested() -> None:
    """The lower bound is the oldest set; what CI installs is inside; the import check agrees."""
    oldest, newest, promised = pins("constraints-oldest.txt"), pins("constraints.txt"), ranges()
    for name, (low, high) in promised.items():
        assert numbers(oldest[name]) == numbers(low), name
        assert numbers(newest[name]) >= numbers(low), name
        assert not high or numbers(newest[name]) < numbers(high), name
    assert {name: promised[name] for name in local.SUPPORTED} == local.SUPPORTED


@pytest.mark.parametrize(
    ("package", "version", "accepted"),
    [
        ("torch", "2.9.0", False),
        ("torch", "2.9.1+cpu", True),
        ("torch", "2.11.0a0+5228986c39.nv26.1", True),
        ("torch", "2.15.0", False),
        ("transformers", "5.4.0", False),
        ("transformers", "5.17.0", True),
        ("transformers", "6.0.0.dev0", False),
        ("peft", "0.22.0", False),
    ],
)
def test_a_version_outside_the_range_is_one_message(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, accepted: bool
) -> None:
    inside = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2"}
    monkeypatch.setattr(local, "version", {**inside, package: version}.get)
    if accepted:
        local.check_versions()
        return
    with pytest.raises(VersionError) as caught:
        local.check_versions()
    low, high = local.SUPPORTED[package]
    assert (caught.value.where, caught.value.got) == (package, version)
    assert caught.value.fix == f'Run: pip install "{package}>={low},<{high}"'
    assert caught.value.others == []


def test_a_recipe_reports_an_old_version_before_it_starts(tmp_path: Path) -> None:
    """Metadata alone is read: the package that claims to be old is not even there."""
    metadata = tmp_path / "transformers-5.4.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.4.0\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "recipes.sft", "--log_path", str(tmp_path / "run")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "transformers: version not supported." in done.stderr
    assert "got 5.4.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
