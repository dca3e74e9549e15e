"""Results depend on seed and data alone: the short form of `tests.same_results`."""

from __future__ import annotations

from pathlib import Path

from tests.same_results import busy_machine, hashes


def test_every_repeat_gives_the_same_bits(tmp_path: Path) -> None:
    with busy_machine(processes=2, megabytes=100):
        seen = hashes(repeats=3, folder=tmp_path)
    assert {name: len(counts) for name, counts in seen.items()} == {
        "scored batch": 1,
        "rollout": 1,
        "ten GRPO steps": 1,
    }
