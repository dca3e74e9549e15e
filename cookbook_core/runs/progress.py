"""The progress of a run: one line on a terminal, about ten in a log.

    sft:  42%|####2     | 84/200 [00:15<00:21, 5.5step/s, loss=0.031, tokens/s=5312]

The line is drawn if both stdout and stderr are terminals. Otherwise (a pipe, a file, a notebook)
about ten plain lines are printed in all, without carriage returns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


class Progress:
    """Shows the step, the newest metrics, tokens per second and the time left.

    The rate is the mean since the first step of this process, with evaluations and checkpoints but
    without start-up; the time left assumes the same rate.

    Args:
        name: the recipe's name.
        num_steps: optimizer steps in the whole run.
        first_step: steps done before this process started.
        metrics: names of the metrics to show; a row with the first of them ends a step.
    """

    def __init__(self, name: str, num_steps: int, first_step: int, metrics: Sequence[str]) -> None:
        self._name, self._num_steps, self._first_step = name, num_steps, first_step
        self._metrics, self._next_line = tuple(metrics), first_step
        self._latest: dict[str, float] = {}
        self._began: float | None = None
        self._tokens = 0.0
        self._bar: Any = None

    def begin(self) -> None:
        """Start the clock and draw the line, as the first step begins. Later calls do nothing."""
        if self._began is not None:
            return
        self._began = time.perf_counter()
        if sys.stdout.isatty() and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._num_steps,
                initial=self._first_step,
                desc=self._name,
                unit="step",
                smoothing=0,  # the mean rate: a slow step with an evaluation does not move it much
                dynamic_ncols=True,
            )

    def show(self, step: int, row: Mapping[str, float | int | None]) -> None:
        """Show metrics measured after `step` optimizer steps.

        Args:
            step: as in `Run.log`.
            row: metrics. "tokens", the number a step trained on, counts towards the rate; a
                row's own "tokens_per_second" is shown instead.
        """
        done = step + 1
        if self._began is None:  # `begin` was not called: start the clock at this step's end
            self._first_step = done
            self.begin()
        else:
            self._tokens += row.get("tokens") or 0
        measured = {name: row.get(name) for name in self._metrics}
        self._latest |= {name: value for name, value in measured.items() if value is not None}
        if self._bar is not None:
            self._bar.set_postfix(self._shown(row), refresh=True)
        if self._metrics and self._metrics[0] not in row:
            return
        if self._bar is not None:
            self._bar.update(max(0, min(done, self._num_steps) - self._bar.n))
        elif step >= self._next_line or done == self._num_steps:
            self._next_line = step + max(1, round(self._num_steps / 10))
            words = [f"{name} {value}" for name, value in self._shown(row).items()]
            words = "  ".join(words + self._left(done))
            print(f"step {done}/{self._num_steps}  {words}", flush=True)

    def _shown(self, row: Mapping[str, float | int | None]) -> dict[str, str]:
        text = {n: f"{self._latest[n]:.4g}" for n in self._metrics if n in self._latest}
        rate = row.get("tokens_per_second") or self._tokens / max(self._elapsed(), 1e-9)
        if rate:
            text["tokens/s"] = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
        return text

    def say(self, text: str) -> None:
        """Print text, above the line if one is drawn."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """End the line, if one is drawn."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _elapsed(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def _left(self, done: int) -> list[str]:
        """The time left, as a list of one word; empty before the first and after the last step."""
        steps, left = done - self._first_step, self._num_steps - done
        if steps < 1 or left < 1:
            return []
        from tqdm import tqdm

        return [f"ETA {tqdm.format_interval(self._elapsed() / steps * left)}"]
