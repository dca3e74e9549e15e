"""Whether a service computes the gradient it is asked for: the core of `cookbook check`.

A custom loss reaches a service as the surrogate sum(-w * l): logprobs l, weights w of any sign and
size. That is the loss's gradient only if the service adds up -w * dl over all positions of all
datums. Means over weights or over the batch give another gradient, and say nothing.

A gradient is read as one number, in one of two ways:

    norm    the gradient norm that optim_step reports, at learning rate 0
    step    Adam with betas 0 and an eps far above |g| moves the weights by lr * g / eps, so the
            change of the probe's logprobs is proportional to the gradient, its sign included

Readings are compared with each other only, so no scale needs to be known.
"""

from __future__ import annotations

import concurrent.futures
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from cookbook_core.backend.interface import TrainingBackend
from cookbook_core.builtin_losses import builtin_loss
from cookbook_core.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput

PATIENCE = 120.0
"""Seconds that one request may take; the first one may load or compile a model."""

EPS = 1e4
"""Adam's eps for readings by step: far above every element of a gradient."""

SAME_PATH = 0.15
"""Largest difference (nats) between two ways to score a token; bfloat16 gives up to 0.1."""

TOLERANCE = 0.3
"""Of a ratio, relative; what is to be told apart differs by factors of 2 or more."""

TARGETS = (0.5, 4.0, 16.0)
"""Change (nats, summed over the probe's 36 tokens) to read by; the second where float32 is not."""

NO_ANSWER = "no answer in time"
LOSS = builtin_loss("cross_entropy")

Calls: TypeAlias = Sequence[Sequence[Datum]]
"""Batches, each handed to forward_backward in a call of its own."""


class CannotBeRead(Exception):
    """No number proportional to the gradient comes out of this service."""


@dataclass(frozen=True)
class Reading:
    """One property of a service's arithmetic.

    ok: None where it cannot be read.
    figure: what was measured, and what should have been.
    """

    name: str
    ok: bool | None
    figure: str

    def __str__(self) -> str:
        return f"{self.name}: {self.figure}"


def core_problems(make_training: Callable[[], TrainingBackend]) -> list[str]:
    """What is wrong with a service's arithmetic; empty where a custom loss trains as it should.

    Args:
        make_training: a new adapter, used up by this: its weights are changed, perhaps ruined.
    """
    return [str(reading) for reading in measure(make_training()) if not reading.ok]


def measure(training: TrainingBackend, patience: float = PATIENCE) -> list[Reading]:
    """All readings of one adapter, whose weights they may ruin: some 60 requests of few tokens."""
    try:
        found = [_same_logprobs(training, patience)]
        if not found[0].ok:
            return found
        reader = GradientReader(training, patience)
        uphill = reader.uphill()
    except CannotBeRead as error:
        return [Reading("gradient", None, f"cannot be read: {error}")]
    except Exception as error:
        return [Reading("requests", False, said(error))]
    way = f"a step {'raises' if uphill else 'lowers'} the logprobs of what is weighted"
    found.append(Reading("sign", uphill, way))
    for case in cases(training):
        found.append(_measured(reader, *case))
        if found[-1].figure == NO_ANSWER:
            break
    return found


def said(error: BaseException) -> str:
    """An error in one line; a time-out as what it is."""
    if isinstance(error, TimeoutError | concurrent.futures.TimeoutError):
        return NO_ANSWER
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first:.110}"


# ---- the probe and what is asked of it -------------------------------------------------------


def probe_datums(training: TrainingBackend) -> list[Datum]:
    """Four datums of 14, 5, 9 and 8 tokens, ids below 256, weights 1."""
    top = min(training.info.model_data.vocab_size or 256, 256)
    rng = np.random.default_rng(7)
    ids = [rng.integers(top // 16, top, n + 1) for n in (14, 5, 9, 8)]
    return [_weighted(i[:-1], i[1:], np.ones(len(i) - 1)) for i in ids]


def cases(training: TrainingBackend) -> list[tuple[str, float, Calls, Calls]]:
    """Name, the right ratio, and the calls of which the first reading is divided by the second.

    Negative weights come last: a service that divides by their sum ruins the adapter.
    """
    data = probe_datums(training)
    long = data[0]
    n = long.model_input.length
    parts = [[weigh(long, np.arange(n) % 4 == k)] for k in range(4)]
    ids, targets = long.model_input.to_ints(), long.loss_fn_inputs["target_tokens"].to_numpy()
    prefix = _weighted(ids[:5], targets[:5], np.ones(5))
    return [
        ("linear in the weights", 4.0, [[weigh(d, 4.0) for d in data]], [data]),
        ("positions add up", 1.0, parts, [[long]]),
        ("length does not matter", 1.0, [[weigh(long, np.arange(n) < 5)]], [[prefix]]),
        ("calls add up", 1.0, [[d] for d in data], [data]),
        ("copies count", 4.0, [[long] * 4], [[long]]),
        ("opposite weights cancel", 0.0, [data, [weigh(d, -1.0) for d in data]], [data]),
        ("negative weights", -1.0, [[weigh(d, -1.0) for d in data]], [data]),
    ]


def weigh(datum: Datum, weights: Any) -> Datum:
    """The datum with these weights (a number: all the same) of its target_tokens."""
    targets = datum.loss_fn_inputs["target_tokens"]
    full = np.broadcast_to(np.asarray(weights, dtype=np.float32), targets.shape)
    return Datum(datum.model_input, {"target_tokens": targets, "weights": full})


def _weighted(ids: Any, targets: Any, weights: Any) -> Datum:
    inputs = {"target_tokens": targets, "weights": weights}
    return Datum(ModelInput.from_ints([int(i) for i in ids]), inputs)


def _same_logprobs(training: TrainingBackend, patience: float) -> Reading:
    data = probe_datums(training)
    forward = training.forward(data, LOSS).result(patience)
    backward = training.forward_backward(data, LOSS).result(patience)
    training.optim_step(_adam(0.0)).result(patience)
    gap = difference(arrays(forward), arrays(backward))
    shapes = [a.shape for a in arrays(forward)] == [(14,), (5,), (9,), (8,)]
    below = all((a <= 1e-3).all() for a in arrays(forward))
    ok = shapes and below and gap <= SAME_PATH
    return Reading("forward equals forward_backward", ok, f"logprobs differ by {gap:.2g} nats")


def arrays(output: ForwardBackwardOutput) -> list[np.ndarray]:
    """Logprobs of each datum, float64."""
    return [np.asarray(o["logprobs"].to_numpy(), np.float64) for o in output.loss_fn_outputs]


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """The largest difference of entries, in nats; inf for other shapes or what is not finite."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return math.inf
    gap = max((float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True) if x.size), default=0)
    return gap if math.isfinite(gap) else math.inf


def _measured(
    reader: GradientReader, name: str, expected: float, calls: Calls, reference: Calls
) -> Reading:
    try:
        ratio = reader.ratio(lambda: reader.add(calls), lambda: reader.add(reference), expected)
    except CannotBeRead as error:
        return Reading(name, None, f"cannot be read: {error}")
    except Exception as error:
        return Reading(name, False, said(error))
    want = reader.wanted(expected)
    return Reading(name, is_near(ratio, want), f"{ratio:.3g} of the reference, right is {want:.3g}")


def is_near(ratio: float, expected: float) -> bool:
    """Whether a ratio of readings is what it should be, rounding and curvature allowed for."""
    return abs(ratio - expected) <= TOLERANCE * max(abs(expected), 0.5)


# ---- reading ---------------------------------------------------------------------------------


class GradientReader:
    """Turns accumulated gradients into numbers proportional to them; each reading uses one up.

    Raises:
        CannotBeRead: the service reports no norm, and its steps are not proportional to gradients.
    """

    def __init__(self, training: TrainingBackend, patience: float = PATIENCE) -> None:
        self._training, self._patience = training, patience
        self._data = probe_datums(training)
        self._rate, self._height = 0.0, math.nan
        self.add([self._data])
        self.by_norm = (self._step(0.0) or 0.0) > 0
        if not self.by_norm:
            self._calibrate()

    def add(self, calls: Calls) -> None:
        """Accumulate the surrogate's gradient of each batch."""
        futures = [self._training.forward_backward(list(batch), LOSS) for batch in calls]
        for future in futures:
            future.result(self._patience)

    def ratio(
        self, submit: Callable[[], Any], reference: Callable[[], Any], expected: float = 1.0
    ) -> float:
        """The gradient that `submit` accumulates, in units of that of `reference`.

        Args:
            submit: accumulates, and waits until that is done.
            reference: the same.
            expected: readings by step are shortened by this, to stay where they are linear.
        """
        if not self.by_norm:
            self._height = self._probe_sum()  # others may have moved the weights
        unit = self._read(reference, 1.0)
        if not math.isfinite(unit) or (not self.by_norm and abs(unit) < 0.02):
            raise CannotBeRead(f"the reference reads {unit:.3g}")
        return self._read(submit, max(1.0, abs(expected))) / unit

    def wanted(self, ratio: float) -> float:
        """What a right `ratio` reads: norms have no sign."""
        return abs(ratio) if self.by_norm else ratio

    def uphill(self) -> bool:
        """Whether a step on positive weights raises their logprobs; moves the weights a little."""
        if not self.by_norm:
            return self._rate > 0
        rate, start = 1e-6, self._probe_sum()
        while rate < 0.1:
            self.add([self._data])
            self._step(rate, eps=1e-8)
            if abs(change := self._probe_sum() - start) > 0.5:
                return change > 0
            rate *= 8
        raise CannotBeRead("no step changes the logprobs")

    def _read(self, submit: Callable[[], Any], shorten: float) -> float:
        if self.by_norm:
            submit()
            return self._step(0.0) or 0.0
        before = self._height
        submit()
        self._step(abs(self._rate) / shorten)
        self._height = self._probe_sum()
        return math.copysign(1.0, self._rate) * (self._height - before) * shorten

    def _step(self, rate: float, eps: float = EPS) -> float | None:
        """One optimizer step without memory; the gradient norm if the service reports it."""
        response = self._training.optim_step(_adam(rate, eps)).result(self._patience)
        for key, value in (response.metrics or {}).items():
            name = key.lower().replace("unclipped", "")
            if re.search(r"grad.*(norm|l2)", name) and "clip" not in name and math.isfinite(value):
                return float(value)
        return None

    def _probe_sum(self) -> float:
        output = self._training.forward(self._data, LOSS).result(self._patience)
        return float(sum(a.sum() for a in arrays(output)))

    def _moved(self, rate: float, eps: float = EPS, weight: float = 1.0) -> float:
        self.add([[weigh(d, weight) for d in self._data]])
        self._step(rate, eps)
        before, self._height = self._height, self._probe_sum()
        return self._height - before

    def _calibrate(self) -> None:
        """Find the learning rate at which the probe moves by TARGETS nats, and try it out.

        Twice the eps must give half the change (eps is used, and far above the gradient), and a
        gradient of zero none (nothing is remembered, no weights decay).
        """
        self._height = self._probe_sum()
        halved = idle = math.nan
        for target in TARGETS:
            rate = abs(self._rate) or 1e-7 * EPS
            while not abs(moved := self._moved(rate)) >= 0.1 * target:
                rate *= 30
                if rate > 1e6 * EPS or not math.isfinite(moved):
                    raise CannotBeRead("no gradient norm is reported, and no step moves logprobs")
            rate *= target / abs(moved)
            first, half = self._moved(rate), self._moved(rate, 2 * EPS)
            nothing = self._moved(rate, weight=0.0)
            self._rate = math.copysign(rate, first)
            halved, idle = half / (first or math.nan), nothing / (first or math.nan)
            if is_near(halved, 0.5) and is_near(idle, 0.0):
                return
        raise CannotBeRead(
            "no gradient norm is reported, and steps are not proportional to the gradient (Adam's "
            f"eps or betas not as asked): {halved:.2g} at twice the eps, right is 0.5; "
            f"{idle:.2g} without a gradient, right is 0"
        )


def _adam(rate: float, eps: float = EPS) -> AdamParams:
    return AdamParams(learning_rate=rate, beta1=0.0, beta2=0.0, eps=eps)
