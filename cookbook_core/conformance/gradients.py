"""Checks of logprobs and gradients: what a custom loss rests on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cookbook_core.backend.gradient_probe import (
    SAME_PATH,
    CannotBeRead,
    arrays,
    difference,
    error_line,
    is_near,
    weigh,
)
from cookbook_core.conformance.report import Outcome, passes
from cookbook_core.conformance.subject import IDLE, NotOffered, Subject, logprobs
from cookbook_core.tinker import Datum

import numpy as np


def arithmetic(name: str) -> Callable[[Subject], Outcome]:
    """The check of one reading; all are taken together by `gradient_probe.measure`."""

    def check(s: Subject) -> Outcome:
        readings = s.readings()
        if name in readings:
            reading = readings[name]
            if reading.ok is None:
                raise CannotBeRead(reading.figure)
            return passes(reading.ok, reading.figure)
        last = list(readings.values())[-1]
        if last.name == "requests" and name == "forward equals forward_backward":
            return Outcome("fail", last.figure)
        raise CannotBeRead(last.figure)

    return check


def custom_loss(s: Subject) -> Outcome:
    """The loss sum(l * l) / 2, whose surrogate has the weights -l, all positive.

    Loss and surrogate together give twice the surrogate's gradient; with a wrong sign they cancel.
    """

    def loss(data: list[Datum], lps: list[Any]) -> tuple[Any, dict[str, float]]:
        del data
        return sum(lp.square().sum() for lp in lps) / 2, {}

    client, reader, data = s.client(), s.reader(), s.data()
    surrogates = [weigh(d, -lp) for d, lp in zip(data, logprobs(client, data), strict=True)]

    def both() -> None:
        client.forward_backward_custom(data, loss).result()
        reader.add([surrogates])

    ratio = reader.ratio(both, lambda: reader.add([surrogates]), 2.0) - 1
    return passes(is_near(ratio, 1.0), f"{ratio:.3g} of the reference, right is 1")


def ragged(s: Subject) -> Outcome:
    """One batch of lengths 1, 33, 2 and 12 gives the logprobs of four batches of one."""
    client = s.client()
    data = [s.datum(n, seed) for seed, n in enumerate((1, 33, 2, 12))]
    gap = difference(logprobs(client, data), [logprobs(client, [d])[0] for d in data])
    return passes(gap <= SAME_PATH, f"logprobs differ by {gap:.2g} nats")


def several_targets(s: Subject) -> Outcome:
    """The logprobs of [N, K] targets equal those of K batches of [N]."""
    client = s.client()
    datum, singles = _several(s)
    try:
        scored = arrays(client.forward([datum], "cross_entropy").result())[0]
    except Exception as error:
        raise NotOffered(error_line(error)) from error
    if scored.shape != (6, 3):
        return Outcome("fail", f"logprobs of shape {scored.shape} for targets (6, 3)")
    gap = difference(list(scored.T), [logprobs(client, [single])[0] for single in singles])
    return passes(gap <= SAME_PATH, f"logprobs differ by {gap:.2g} nats")


def several_gradient(s: Subject) -> Outcome:
    """The gradient of [N, K] targets equals that of K calls with [N]."""
    reader, (datum, singles) = s.reader(), _several(s)
    try:
        reader.add([[datum]])
    except Exception as error:
        s.replace_client()
        raise NotOffered(error_line(error)) from error
    s.client().optim_step(IDLE).result()
    return _ratio(s, lambda: reader.add([[datum]]), lambda: reader.add([[d] for d in singles]))


def weights_absent(s: Subject) -> Outcome:
    """Missing weights count as 1, as in the SDK's own cross_entropy."""
    reader, bare, full = s.reader(), s.datum(9, weights=None), s.datum(9)
    try:
        s.send([bare]).result(s.timeout)
    except Exception as error:
        s.replace_client()
        raise NotOffered(error_line(error)) from error
    s.client().optim_step(IDLE).result()
    return _ratio(s, lambda: s.send([bare]).result(), lambda: reader.add([[full]]))


def _several(s: Subject) -> tuple[Datum, list[Datum]]:
    targets = np.array(s.ids(18, 6)).reshape(6, 3)
    weights = np.linspace(0.5, 1.5, 18).reshape(6, 3)
    singles = [s.datum(6, 5, target_tokens=targets[:, k], weights=weights[:, k]) for k in range(3)]
    return s.datum(6, 5, target_tokens=targets, weights=weights), singles


def _ratio(s: Subject, submit: Callable[[], Any], reference: Callable[[], Any]) -> Outcome:
    ratio = s.reader().ratio(submit, reference)
    return passes(is_near(ratio, 1.0), f"{ratio:.3g} of the reference, right is 1")
