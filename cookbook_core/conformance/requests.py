"""Checks of requests: bad input is refused, a refusal leaves no trace, and the order holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np

from cookbook_core.backend.gradient_probe import (
    NO_ANSWER,
    SAME_PATH,
    CannotBeRead,
    arrays,
    difference,
    is_near,
    said,
)
from cookbook_core.conformance.report import Outcome, passes
from cookbook_core.conformance.subject import IDLE, RATE, Subject, logprobs
from cookbook_core.errors import AnswerError
from cookbook_core.tinker import AdamParams, Datum, ModelInput

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
    """A weight that is no number."""
    return [s.datum(5, weights=[1.0, 1.0, np.nan, 1.0, 1.0])]


def no_tokens(s: Subject) -> list[Datum]:
    """A datum of length 0."""
    return [s.datum(0, target_tokens=np.zeros(0, np.int64), weights=np.zeros(0))]


def no_datums(s: Subject) -> list[Datum]:
    """A batch of no datums."""
    del s
    return []


def refuses(bad: Callable[[Subject], list[Datum]]) -> Callable[[Subject], Outcome]:
    """An error in time, whatever its words; accepting `bad` fails.

    So does an answer that only this package refuses: the service has worked on it by then.
    """

    def check(s: Subject) -> Outcome:
        data = bad(s)
        try:
            output = s.send(data).result(min(s.patience, 60))
        except Exception as error:
            if said(error) == NO_ANSWER:
                s.forget()
                return Outcome("fail", NO_ANSWER)
            if data:
                s.refused = data
            if isinstance(error, AnswerError):
                s.forget()
                return Outcome("fail", f"accepted; this package refuses the answer: {said(error)}")
            _replace_dead_client(s)
            return Outcome("pass", f"{s.refuser(error)}{said(error)}")
        finite = all(np.isfinite(a).all() for a in arrays(output))
        s.forget()
        return Outcome("fail", "accepted" if finite else "accepted, with logprobs of NaN")

    return check


def alive(s: Subject) -> Outcome:
    """After a refusal the same client gives the same logprobs, trains and steps."""
    client, data = s.client(), s.data()
    before = logprobs(client, data)
    _be_refused(s, [])
    after = logprobs(client, data)
    client.forward_backward(data, "cross_entropy").result()
    client.optim_step(IDLE).result()
    gap = difference(before, after)
    return passes(gap <= SAME_PATH, f"logprobs differ by {gap:.2g} nats")


def no_partial_gradient(s: Subject) -> Outcome:
    """A good datum in a batch that is refused adds nothing to the next gradient."""
    reader, good = s.reader(), s.datum(9)

    def submit() -> None:
        _be_refused(s, [good])
        reader.add([[good]])

    ratio = reader.ratio(submit, lambda: reader.add([[good]]))
    return passes(is_near(ratio, 1.0), f"{ratio:.3g} of the reference, right is 1")


def no_blind_step(s: Subject) -> Outcome:
    """An optim_step behind a forward_backward that failed must fail too."""
    if s.refused is None:
        raise CannotBeRead("nothing that was sent has been refused")
    failing = None
    with contextlib.suppress(Exception):  # refused on this side, at once
        failing = s.send(s.refused)
    try:
        s.step_blindly().result(s.patience)
        outcome = Outcome("fail", "optim_step succeeded")
    except Exception as error:
        outcome = passes(said(error) != NO_ANSWER, f"{s.refuser(error)}{said(error)}")
    if failing is not None:
        with contextlib.suppress(Exception):
            failing.result(s.patience)
    _replace_dead_client(s)
    return outcome


def submission_order(s: Subject) -> Outcome:
    """optim_step, submitted before forward_backward is done, uses that gradient."""
    client, data = s.client(), s.data()
    before = logprobs(client, data)
    backward = client.forward_backward(data, "cross_entropy")
    stepped = client.optim_step(AdamParams(learning_rate=RATE))
    backward.result()
    stepped.result()
    rise = sum(map(np.sum, logprobs(client, data))) - sum(map(np.sum, before))
    return passes(bool(rise > 0.1), f"the step raises logprobs by {rise:.3g} nats, right is > 0.1")


def forward_sees_step(s: Subject) -> Outcome:
    """Forward, submitted before optim_step is done, scores with the new weights."""
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


def _be_refused(s: Subject, good: list[Datum]) -> None:
    """Send, behind good datums, what the service has refused before."""
    if s.refused is None:
        raise CannotBeRead("nothing that was sent has been refused")
    try:
        s.send([*good, *s.refused]).result(s.patience)
    except Exception as error:
        if said(error) == NO_ANSWER:
            raise
        return
    raise CannotBeRead("what was refused once is accepted now")


def _replace_dead_client(s: Subject) -> None:
    """A client that a refusal killed is no one's fault but that of the check `alive`."""
    try:
        logprobs(s.client(), [s.datum(3)])
    except Exception:
        s.forget()
