"""Check that a service computes right gradients: the core of `cookbook check`.

A custom loss reaches a service as the surrogate sum(-w * l): logprobs l, weights w of any sign and
size. Its gradient is the loss's only if the service sums -w * dl over all positions of all datums.
Means over weights or over the batch give another gradient without any error.

A gradient is read as one number, in one of two ways:

    norm    the gradient norm that optim_step reports, at learning rate 0
    step    Adam with betas 0 and an eps far above |g| moves the weights by lr * g / eps, so the
            change of the probe's logprobs is proportional to the gradient, its sign included

Readings are only compared with each other, so their scale does not matter.
"""

from __future__ import annotations

import concurrent.futures
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cookbook_core.backend.interface import TrainingBackend
from cookbook_core.builtin_losses import builtin_loss
from cookbook_core.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput

import numpy as np

TIMEOUT_SECONDS = 120.0
"""Of one request; the first one may load or compile a model."""

EPS = 1e4
"""Adam's eps for readings by step: far above every element of a gradient."""

SAME_PATH = 0.15
"""Largest difference (nats) between two ways to score a token; bfloat16 gives up to 0.1."""

TOLERANCE = 0.3
"""Of a ratio, relative; the errors to detect change it by factors of 2 or more."""

TARGETS = (0.5, 4.0, 16.0)
"""Changes (nats, summed over the probe's 36 tokens) to try to read gradients by: larger ones for
services that compute in less than float32."""

NO_ANSWER = "no answer in time"
LOSS = builtin_loss("cross_entropy")

Calls: TypeAlias = Sequence[Sequence[Datum]]
"""Batches, each the argument of one forward_backward."""


class CannotBeRead(Exception):
    """No response of this service is proportional to the gradient."""


@dataclass(frozen=True)
class Reading:
    """One property of a service's gradients.

    Attributes:
        ok: None where it cannot be read.
        figure: the measured and the right value, with units.
        error: what a request raised, so that nothing was measured; None otherwise.
    """

    name: str
    ok: bool | None
    figure: str
    error: Exception | None = None

    def __str__(self) -> str:
        return f"{self.name}: {'cannot be read: ' * (self.ok is None)}{self.figure}"


def core_problems(
    make_training: Callable[[], TrainingBackend], timeout: float = TIMEOUT_SECONDS
) -> list[str]:
    """Errors in a service's gradients; empty if a custom loss trains as it should.

    Args:
        make_training: returns a new adapter, whose weights are changed and perhaps ruined.
        timeout: seconds for one request.
    Raises:
        Exception: what a request raised, a TimeoutError for instance, if nothing that was measured
            is wrong: then the gradients may be right.
    """
    readings = [reading for reading in measure(make_training(), timeout) if not reading.ok]
    problems = [str(reading) for reading in readings if reading.error is None]
    errors = [reading.error for reading in readings if reading.error is not None]
    if errors and not problems:
        raise errors[0]
    return problems


def measure(training: TrainingBackend, timeout: float = TIMEOUT_SECONDS) -> list[Reading]:
    """Measure all gradient properties on a scratch adapter.

    About 60 small requests; the adapter is unusable afterwards.
    """
    try:
        readings = [_same_logprobs(training, timeout)]
        if not readings[0].ok:
            return readings
        reader = GradientReader(training, timeout)
        uphill = reader.uphill()
    except CannotBeRead as error:
        return [Reading("gradient", None, str(error))]
    except Exception as error:
        return [Reading("requests", False, error_line(error), error)]
    change = f"a step {'raises' if uphill else 'lowers'} the logprobs of what is weighted"
    readings.append(Reading("sign", uphill, change))
    for case in cases(training):
        readings.append(_measured(reader, *case))
        if readings[-1].figure == NO_ANSWER:
            break
    return readings


def error_line(error: BaseException) -> str:
    """An error in one line; NO_ANSWER for a timeout."""
    if isinstance(error, TimeoutError | concurrent.futures.TimeoutError):
        return NO_ANSWER
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first:.110}"


# ---- the probe and its cases -----------------------------------------------------------------


def probe_datums(training: TrainingBackend) -> list[Datum]:
    """Four datums of 14, 5, 9 and 8 tokens, ids below 256, weights 1."""
    top = min(training.info.model_data.vocab_size or 256, 256)
    rng = np.random.default_rng(7)
    ids = [rng.integers(top // 16, top, n + 1) for n in (14, 5, 9, 8)]
    return [_weighted(i[:-1], i[1:], np.ones(len(i) - 1)) for i in ids]


def cases(training: TrainingBackend) -> list[tuple[str, float, Calls, Calls]]:
    """Return (name, correct ratio, calls, reference calls).

    ratio = gradient of calls / gradient of reference. Negative weights come last: a service that
    divides by their sum ruins the adapter.
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
    """The datum with its target_tokens and these weights: a number, or one for each target."""
    targets = datum.loss_fn_inputs["target_tokens"]
    full = np.broadcast_to(np.asarray(weights, dtype=np.float32), targets.shape)
    return Datum(datum.model_input, {"target_tokens": targets, "weights": full})


def _weighted(ids: Any, targets: Any, weights: Any) -> Datum:
    inputs = {"target_tokens": targets, "weights": weights}
    return Datum(ModelInput.from_ints([int(i) for i in ids]), inputs)


def _same_logprobs(training: TrainingBackend, timeout: float) -> Reading:
    data = probe_datums(training)
    forward = training.forward(data, LOSS).result(timeout)
    backward = training.forward_backward(data, LOSS).result(timeout)
    training.optim_step(_adam(0.0)).result(timeout)
    gap = difference(arrays(forward), arrays(backward))
    shapes = [a.shape for a in arrays(forward)] == [(14,), (5,), (9,), (8,)]
    below = all((a <= 1e-3).all() for a in arrays(forward))
    ok = shapes and below and gap <= SAME_PATH
    return Reading("forward equals forward_backward", ok, f"logprobs differ by {gap:.2g} nats")


def arrays(output: ForwardBackwardOutput) -> list[np.ndarray]:
    """Return the logprobs: D float64 arrays, shape of target_tokens, nats."""
    return [np.asarray(o["logprobs"].to_numpy(), np.float64) for o in output.loss_fn_outputs]


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """The largest difference of entries, in nats; inf for unequal shapes or non-finite entries."""
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
        return Reading(name, None, str(error))
    except Exception as error:
        return Reading(name, False, error_line(error), error)
    right = reader.right_ratio(expected)
    figure = f"{ratio:.3g} of the reference, right is {right:.3g}"
    return Reading(name, is_near(ratio, right), figure)


def is_near(ratio: float, expected: float) -> bool:
    """Whether a ratio of readings is right, up to rounding and curvature."""
    return abs(ratio - expected) <= TOLERANCE * max(abs(expected), 0.5)


# ---- reading ---------------------------------------------------------------------------------


class GradientReader:
    """Reads accumulated gradients as numbers proportional to them; each reading uses one up.

    Args:
        training: the adapter; readings by step change its weights.
        timeout: seconds for one request.

    Raises:
        CannotBeRead: the service reports no norm, and its steps are not proportional to gradients.
    """

    def __init__(self, training: TrainingBackend, timeout: float = TIMEOUT_SECONDS) -> None:
        self._training, self._timeout = training, timeout
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
            future.result(self._timeout)

    def ratio(
        self, submit: Callable[[], Any], reference: Callable[[], Any], expected: float = 1.0
    ) -> float:
        """The gradient that `submit` accumulates, in units of that of `reference`.

        Args:
            submit: accumulates a gradient, and returns when that is done.
            reference: likewise.
            expected: the right ratio, by which steps are shortened to stay where the model is
                linear in them.
        """
        if not self.by_norm:
            self._height = self._probe_sum()  # the weights may have changed since
        unit = self._read(reference, 1.0)
        if not math.isfinite(unit) or (not self.by_norm and abs(unit) < 0.02):
            raise CannotBeRead(f"the reference reads {unit:.3g}")
        return self._read(submit, max(1.0, abs(expected))) / unit

    def right_ratio(self, ratio: float) -> float:
        """Return the value measured for a correct ratio: its absolute value when reading norms."""
        return abs(ratio) if self.by_norm else ratio

    def uphill(self) -> bool:
        """Whether a step on positive weights raises their logprobs; changes weights a little."""
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
        response = self._training.optim_step(_adam(rate, eps)).result(self._timeout)
        for key, value in (response.metrics or {}).items():
            name = key.lower().replace("unclipped", "")
            if re.search(r"grad.*(norm|l2)", name) and "clip" not in name and math.isfinite(value):
                return float(value)
        return None

    def _probe_sum(self) -> float:
        output = self._training.forward(self._data, LOSS).result(self._timeout)
        return float(sum(a.sum() for a in arrays(output)))

    def _moved(self, rate: float, eps: float = EPS, weight: float = 1.0) -> float:
        self.add([[weigh(d, weight) for d in self._data]])
        self._step(rate, eps)
        before, self._height = self._height, self._probe_sum()
        return self._height - before

    def _calibrate(self) -> None:
        """Find the learning rate at which the probe changes by TARGETS nats, and verify it.

        Doubling eps must halve the change (eps is used, and far above the gradient), and a zero
        gradient must give none (no moments, no weight decay).
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
            f"eps or betas are ignored): {halved:.2g} at twice the eps, right is 0.5; "
            f"{idle:.2g} without a gradient, right is 0"
        )


def _adam(rate: float, eps: float = EPS) -> AdamParams:
    return AdamParams(learning_rate=rate, beta1=0.0, beta2=0.0, eps=eps)
