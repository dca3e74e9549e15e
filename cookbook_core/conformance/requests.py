"""Checks of requests: bad input is refused without side effects, and requests run in order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from cookbook_core.backend.gradient_probe import (
    NO_ANSWER,
    SAME_PATH,
    CannotBeRead,
    arrays,
    difference,
    error_line,
    is_near,
)
from cookbook_core.conformance.report import Outcome, passes
from cookbook_core.conformance.subject import IDLE, RATE, Subject, logprobs
from cookbook_core.errors import AnswerError
from cookbook_core.tinker import AdamParams, Datum, ModelInput

import numpy as np

NO_TOKEN = 10_000_000
"""An id beyond any vocabulary."""


def unknown_input(s: Subject) -> list[Datum]:
    """A token outside the vocabulary among the inputs."""
    datum = s.datum(5)
    ids = [*datum.model_input.to_ints()[:4], NO_TOKEN]
    return [Datum(ModelInput.from_ints(ids), datum.loss_fn_inputs)]


def unknown_target(s: Subject) -> list[Datum]:
    """A token outside the vocabulary among the targets."""
    return [s.datum(5, target_tokens=[*s.ids(4), NO_TOKEN])]


def no_targets(s: Subject) -> list[Datum]:
    """No target_tokens at all."""
    return [s.datum(5, target_tokens=None)]


def short_targets(s: Subject) -> list[Datum]:
    """One target too few."""
    return [s.datum(5, target_tokens=s.ids(4), weights=np.ones(4))]


def short_weights(s: Subject) -> list[Datum]:
    """One weight too few."""
    return [s.datum(5, weights=np.ones(4))]


def nan_weight(s: Subject) -> list[Datum]:
    """A weight of NaN."""
    return [s.datum(5, weights=[1.0, 1.0, np.nan, 1.0, 1.0])]


def no_tokens(s: Subject) -> list[Datum]:
    """A datum of length 0."""
    return [s.datum(0, target_tokens=np.zeros(0, np.int64), weights=np.zeros(0))]


def no_datums(s: Subject) -> list[Datum]:
    """A batch of no datums."""
    del s
    return []


def refuses(bad: Callable[[Subject], list[Datum]]) -> Callable[[Subject], Outcome]:
    """The check that `bad` data raise an error, whatever its text, before the timeout.

    A result that only this package rejects is a failure too: the service has computed it by then.
    """

    def check(s: Subject) -> Outcome:
        data = bad(s)
        try:
            output = s.send(data).result(min(s.timeout, 60))
        except Exception as error:
            if error_line(error) == NO_ANSWER:
                s.replace_client()
                return Outcome("fail", NO_ANSWER)
            if data:
                s.refused = data
            if isinstance(error, AnswerError):
                s.replace_client()
                figure = f"accepted; this package refuses the answer: {error_line(error)}"
                return Outcome("fail", figure)
            _replace_broken_client(s)
            return Outcome("pass", f"{s.refuser(error)}{error_line(error)}")
        finite = all(np.isfinite(a).all() for a in arrays(output))
        s.replace_client()
        return Outcome("fail", "accepted" if finite else "accepted, with logprobs of NaN")

    return check


def alive(s: Subject) -> Outcome:
    """After a refusal the same client returns the same logprobs, trains and steps."""
    client, data = s.client(), s.data()
    before = logprobs(client, data)
    _expect_refusal(s, [])
    after = logprobs(client, data)
    client.forward_backward(data, "cross_entropy").result()
    client.optim_step(IDLE).result()
    gap = difference(before, after)
    return passes(gap <= SAME_PATH, f"logprobs differ by {gap:.2g} nats")


def no_partial_gradient(s: Subject) -> Outcome:
    """A good datum in a refused batch adds nothing to the next gradient."""
    reader, good = s.reader(), s.datum(9)

    def submit() -> None:
        _expect_refusal(s, [good])
        reader.add([[good]])

    ratio = reader.ratio(submit, lambda: reader.add([[good]]))
    return passes(is_near(ratio, 1.0), f"{ratio:.3g} of the reference, right is 1")


def no_blind_step(s: Subject) -> Outcome:
    """An optim_step after a failed forward_backward fails too."""
    if s.refused is None:
        raise CannotBeRead("the service has refused no batch")
    failing = None
    with contextlib.suppress(Exception):  # refused by this package, before it is sent
        failing = s.send(s.refused)
    try:
        s.step_unchecked().result(s.timeout)
        outcome = Outcome("fail", "optim_step succeeded")
    except Exception as error:
        outcome = passes(error_line(error) != NO_ANSWER, f"{s.refuser(error)}{error_line(error)}")
    if failing is not None:
        with contextlib.suppress(Exception):
            failing.result(s.timeout)
    _replace_broken_client(s)
    return outcome


def submission_order(s: Subject) -> Outcome:
    """An optim_step submitted before forward_backward has finished uses its gradient."""
    client, data = s.client(), s.data()
    before = logprobs(client, data)
    backward = client.forward_backward(data, "cross_entropy")
    stepped = client.optim_step(AdamParams(learning_rate=RATE))
    backward.result()
    stepped.result()
    rise = sum(map(np.sum, logprobs(client, data))) - sum(map(np.sum, before))
    return passes(bool(rise > 0.1), f"the step raises logprobs by {rise:.3g} nats, right is > 0.1")


def forward_sees_step(s: Subject) -> Outcome:
    """A forward submitted before optim_step has finished uses the new weights."""
    client, data = s.client(), s.data()
    before = logprobs(client, data)
    client.forward_backward(data, "cross_entropy").result()
    stepped = client.optim_step(AdamParams(learning_rate=RATE))
    behind = client.forward(data, "cross_entropy")
    seen = arrays(behind.result())
    stepped.result()
    after = logprobs(client, data)
    gap, shift = difference(seen, after), difference(before, after)
    if shift < 1e-3:
        raise CannotBeRead("the step changes no logprob")
    return passes(gap <= 0.1 * shift, f"{gap:.2g} nats from the new weights, moved by {shift:.2g}")


def _expect_refusal(s: Subject, good: list[Datum]) -> None:
    """Send good datums followed by a batch that the service has refused before."""
    if s.refused is None:
        raise CannotBeRead("the service has refused no batch")
    try:
        s.send([*good, *s.refused]).result(s.timeout)
    except Exception as error:
        if error_line(error) == NO_ANSWER:
            raise
        return
    raise CannotBeRead("the service now accepts a batch that it refused before")


def _replace_broken_client(s: Subject) -> None:
    """Replace a client broken by a refused request; only the check `alive` reports that."""
    try:
        logprobs(s.client(), [s.datum(3)])
    except Exception:
        s.replace_client()
