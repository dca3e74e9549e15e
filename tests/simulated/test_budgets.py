"""Counts that may not grow: launches, waits of the host, and copies, of each part of the work.

Counts are exact, so a budget is the measured number. Lower it when the work becomes less. What the
numbers are made of: python -m tests.simulated.counts --operators
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cookbook_core.backend.local.sampling import graph, sampler
from tests.simulated.counts import client, datums, measure, sample, score, train
from tests.simulated.device import Counts, counting
from tests.test_cuda import (
    PROMPTS,
    Connect,
    connect_to,  # noqa: F401  a fixture
    same_samples,
    samples,
)

import pytest

BUDGETS: dict[str, tuple[float, float, float]] = {
    # launches over a base of bfloat16, over one of float32; waits
    "decode step, a layer": (42, 28, 0),
    "decode step, the rest": (54, 51, 1),  # the tokens are read
    "a row ends, a layer": (0, 0, 0),
    "a row ends, the rest": (5, 5, 0),
    "a prompt starts, a layer": (0, 0, 0),
    "a prompt starts, the rest": (0, 0, 0),
    "forward + backward, a layer": (148, 139, 0),
    "forward + backward, the rest": (50, 40, 2),  # the logprobs, and whether all is finite
    "forward, a layer": (40, 43, 0),
    "forward, the rest": (45, 39, 1),
    "a datum more": (0, 0, 0),
    "a datum more, half of it masked": (0, 0, 0),
    "accumulate, a layer": (0, 0, 0),
    "accumulate, the rest": (5, 5, 1),
    "optim_step, a layer": (0, 0, 0),
    "optim_step, the rest": (23, 23, 1),  # its metrics
    "optim_step after load, a layer": (0, 0, 0),
    "optim_step after load, the rest": (23, 23, 1),
}
COPIES = {
    "decode step, the rest": 1,
    "a row ends, the rest": 1,
    "forward + backward, the rest": 4,
    "forward, the rest": 3,
    "optim_step, the rest": 1,
    "optim_step after load, the rest": 1,
}
"""Copies between host and device, both ways; none where no number stands."""


@pytest.mark.parametrize(("column", "dtype"), enumerate(["bfloat16", "float32"]))
def test_nothing_takes_more_than_its_budget(column: int, dtype: str) -> None:
    rows = measure(dtype)
    assert rows.keys() == BUDGETS.keys()
    over = [
        f"{name}: {what} {found:.2f}, budget {budget}"
        for name, counts in rows.items()
        for what, found, budget in (
            ("launches", counts.launches, BUDGETS[name][column]),
            ("waits", counts.waits, BUDGETS[name][2]),
            ("copies", counts.copies, COPIES.get(name, 0)),
        )
        # a share of what happens every 64 steps is no budget's business
        if found > budget + 0.1
    ]
    assert over == []


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("run", [train, score])
def test_copies_and_waits_are_per_batch_not_per_datum(
    run: Callable[..., Counts], masked: bool
) -> None:
    own = client(2, "bfloat16")
    few, many = (run(own, datums(n, masked=masked)) for n in (8, 64))
    for key in ("h2d", "d2h"):
        assert many.moved[key] == few.moved[key] > 0
    assert many.by_reason == few.by_reason


def test_one_wait_per_decoded_token_or_fewer() -> None:
    counts = sample(client(2, "bfloat16"), [20])
    assert counts.waits <= 20 + 1
    assert counts.moved["d2h bytes"] <= 20 * 16 + 64  # a token and its logprob; never the logits


# ---- captured steps ------------------------------------------------------------------------------


class RunAgain:
    """Instead of a CUDA graph, the step itself; a capture fails where one waits or copies."""

    steps: list[Counts]

    def __init__(self, device: Any) -> None:
        del device

    def run(self, key: Any, step: Callable[[], None], times: int) -> None:
        del key
        for _ in range(times):
            with counting() as counts:
                step()
            self.steps.append(counts)

    def clear(self) -> None:
        pass


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Counts]]:
    """What each step did that CUDA would capture; on the simulated device, too, it is one."""
    steps: list[Counts] = []
    monkeypatch.setattr(RunAgain, "steps", steps, raising=False)
    monkeypatch.setattr(graph, "Graphs", RunAgain)

    def can_capture(decoder: Any, rows: Any) -> bool:
        enough = max(row.limit for row in rows) >= graph.WORTH
        return decoder.device.type == "sim" and decoder.pads and enough

    monkeypatch.setattr(sampler, "can_capture", can_capture)
    return steps


@pytest.mark.parametrize("arch", ["qwen3", "llama", "mistral", "gpt2"])
def test_a_step_that_cuda_captures_neither_waits_nor_copies(
    arch: str,
    captured: list[Counts],
    connect_to: Connect,  # noqa: F811
) -> None:
    """And gives the CPU's tokens: rows that end early, top-k and top-p, prompts of any length."""
    cpu, own = connect_to("cpu", arch)(), connect_to("sim", arch)()
    for params in (
        {"max_tokens": 20},
        {"max_tokens": 30, "stop": list(range(10, 60))},
        {"max_tokens": 17, "top_k": 9, "top_p": 0.8, "temperature": 0.7},
    ):
        want, found = (samples(c, PROMPTS, 3, **params) for c in (cpu, own))
        same_samples(found, want)
    assert len(captured) > 40
    assert {(c.waits, c.copies) for c in captured} == {(0, 0)}


def test_captured_steps_are_read_eight_at_a_time(captured: list[Counts]) -> None:
    own = client(2, "bfloat16")
    few, many = sample(own, [24] * 4), sample(own, [64] * 4)
    assert len(captured) == 24 + 64
    assert (many - few).waits <= 40 / 8
    assert (many - few).copies <= 40 / 8
