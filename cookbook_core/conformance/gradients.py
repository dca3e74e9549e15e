"""Checks of logprobs and gradients: what a custom loss rests on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cookbook_core.backend.gradient_probe import (
    SAME_PATH,
    CannotBeRead,
    arrays,
    difference,
    is_near,
    said,
    weigh,
)
from cookbook_core.conformance.report import Outcome, passes
from cookbook_core.conformance.subject import IDLE, NotOffered, Subject, logprobs
from cookbook_core.tinker import Datum


def arithmetic(name: str) -> Callable[[Subject], Outcome]:
    """The reading of this name, out of those that the core takes together."""

    def check(s: Subject) -> Outcome:
        found = s.readings()
        if name in found:
            reading = found[name]
            if reading.ok is None:
                raise CannotBeRead(reading.figure)
            return passes(reading.ok, reading.figure)
        last = list(found.values())[-1]
        if last.name == "requests" and name == "forward equals forward_backward":
            return Outcome("fail", last.figure)
        raise CannotBeRead(last.figure.removeprefix("cannot be read: "))

    return check


def custom_loss(s: Subject) -> Outcome:
    """The loss sum(l * l) / 2, whose surrogate has the weights -l, all positive.

    Both together give twice the surrogate's gradient; with the sign wrong they would cancel.
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
    """One batch of lengths 1, 33, 2 and 12 scores as four batches of one."""
    client = s.client()
    data = [s.datum(n, seed) for seed, n in enumerate((1, 33, 2, 12))]
    gap = difference(logprobs(client, data), [logprobs(client, [d])[0] for d in data])
    return passes(gap <= SAME_PATH, f"logprobs differ by {gap:.2g} nats")


def several_targets(s: Subject) -> Outcome:
    """The logprobs of [N, K] targets are those of K batches of [N]."""
    client = s.client()
    datum, singles = _several(s)
    try:
        found = arrays(client.forward([datum], "cross_entropy").result())[0]
    except Exception as error:
        raise NotOffered(said(error)) from error
    if found.shape != (6, 3):
        return Outcome("fail", f"logprobs of shape {found.shape} for targets (6, 3)")
    gap = difference(list(found.T), [logprobs(client, [single])[0] for single in singles])
    return passes(gap <= SAME_PATH, f"logprobs differ by {gap:.2g} nats")


def several_gradient(s: Subject) -> Outcome:
    """The gradient of [N, K] targets is that of K calls with [N]."""
    reader, (datum, singles) = s.reader(), _several(s)
    try:
        reader.add([[datum]])
    except Exception as error:
        s.forget()
        raise NotOffered(said(error)) from error
    s.client().optim_step(IDLE).result()
    return _ratio(s, lambda: reader.add([[datum]]), lambda: reader.add([[d] for d in singles]))


def weights_absent(s: Subject) -> Outcome:
    """No weights means weights of 1, as in the SDK's own cross_entropy."""
    reader, bare, full = s.reader(), s.datum(9, weights=None), s.datum(9)
    try:
        s.send([bare]).result(s.patience)
    except Exception as error:
        s.forget()
        raise NotOffered(said(error)) from error
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
