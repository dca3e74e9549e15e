"""Check a service for everything that a training run relies on: `cookbook check`.

Each check is a function from a `Subject` to an `Outcome`; `CHECKS` lists them. A check that fails,
raises or hangs does not stop the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cookbook_core.backend.gradient_probe import (
    NO_ANSWER,
    TIMEOUT_SECONDS,
    CannotBeRead,
    error_line,
)
from cookbook_core.conformance import gradients, images, requests, sampling
from cookbook_core.conformance.report import Outcome, Row, row_text, summary
from cookbook_core.conformance.subject import NotOffered, Subject, logprobs
from cookbook_core.tinker import TrainingClient

__all__ = [
    "CHECKS", "CORE", "IMAGES", "Check", "Outcome", "Row", "check_service", "row_text", "summary",
]  # fmt: skip


class Check(NamedTuple):
    """One row of the table.

    Attributes:
        run: the check.
        harm: what a failure does to a training run, one sentence.
    """

    name: str
    run: Callable[[Subject], Outcome]
    harm: str


def _core(name: str, harm: str) -> Check:
    return Check(name, gradients.arithmetic(name), harm)


def _refuses(what: str, bad: Callable[..., list], harm: str) -> Check:
    return Check(f"refuses {what}", requests.refuses(bad), harm)


CORE: tuple[Check, ...] = (
    _core(
        "forward equals forward_backward",
        "A custom loss is computed from logprobs that its gradient does not belong to.",
    ),
    _core("sign", "Training drives the model away from what the loss asks for."),
    _core(
        "linear in the weights",
        "The size of a custom loss's gradient is lost: beta, kl_coef and advantages change nothing "
        "or the wrong thing.",
    ),
    _core(
        "positions add up",
        "Tokens of one sequence pull with the wrong strength against those of another.",
    ),
    _core(
        "length does not matter",
        "Long sequences count for less (or more) than the loss says.",
    ),
    _core(
        "calls add up",
        "Accumulating small batches trains something other than one large batch.",
    ),
    _core(
        "copies count",
        "The gradient shrinks with the batch: a loss that sums over datums is trained as a mean.",
    ),
    _core(
        "opposite weights cancel",
        "Terms that should balance (a KL term, a baseline) do not, and drift instead.",
    ),
    _core(
        "negative weights",
        "What a loss pushes down (rejected answers, bad samples) is pushed wrongly or explodes.",
    ),
)

_HARM_BAD = "A mistake in the data is trained on without an error."

CHECKS: tuple[Check, ...] = (
    *CORE,
    Check(
        "custom loss",
        gradients.custom_loss,
        "forward_backward_custom trains another loss than yours.",
    ),
    Check(
        "ragged lengths",
        gradients.ragged,
        "Logprobs depend on what else is in the batch: padding leaks into the loss.",
    ),
    Check(
        "[N, K] targets",
        gradients.several_targets,
        "Losses over token sets (recipes bradley_terry, token_set_kl) read the wrong tokens.",
    ),
    Check(
        "[N, K] gradient",
        gradients.several_gradient,
        "Losses over token sets (recipes bradley_terry, token_set_kl) train the wrong gradient.",
    ),
    Check(
        "weights absent",
        gradients.weights_absent,
        "Data without weights are trained with other weights than 1, or not at all.",
    ),
    _refuses("an unknown input token", requests.unknown_input, _HARM_BAD),
    _refuses("an unknown target token", requests.unknown_target, _HARM_BAD),
    _refuses("missing target_tokens", requests.no_targets, _HARM_BAD),
    _refuses("target_tokens too short", requests.short_targets, _HARM_BAD),
    _refuses("weights too short", requests.short_weights, _HARM_BAD),
    _refuses("a datum of no tokens", requests.no_tokens, _HARM_BAD),
    _refuses("a batch of no datums", requests.no_datums, "A step that trained nothing counts."),
    Check(
        "alive after a refusal",
        requests.alive,
        "One bad batch ends the run: everything since the last checkpoint is lost.",
    ),
    Check(
        "no gradient of what failed",
        requests.no_partial_gradient,
        "A batch that is sent again after an error counts twice.",
    ),
    Check(
        "no step after a failure",
        requests.no_blind_step,
        "A failed batch goes unnoticed: the step counts and nothing was learnt.",
    ),
    Check(
        "submission order",
        requests.submission_order,
        "A pipelined optim_step uses the gradient of another batch, or none.",
    ),
    Check(
        "forward sees the step",
        requests.forward_sees_step,
        "Logprobs and losses belong to weights that are one step old.",
    ),
    Check(
        "sampled logprobs",
        sampling.sampled_logprobs,
        "Importance ratios are wrong from the first step: GRPO and PPO train on noise.",
    ),
    Check(
        "sampled logprobs, top_k",
        sampling.truncated_logprobs,
        "With top_k or top_p importance ratios are wrong.",
    ),
    Check(
        "sampled logprobs, temperature",
        sampling.tempered_logprobs,
        "At temperatures other than 1 importance ratios are wrong.",
    ),
    Check("seeds", sampling.seeds, "A run cannot be repeated, nor an evaluation compared."),
    Check(
        "prompt logprobs",
        sampling.prompt_logprobs,
        "Reference logprobs taken from a sampler do not fit those of training.",
    ),
    Check(
        "saved for sampling",
        sampling.saved_for_sampler,
        "What is sampled or served is not what was trained.",
    ),
    Check(
        "save and load",
        sampling.load_weights,
        "An interrupted run resumes from other weights; a reference is not the reference.",
    ),
    Check(
        "save and load, optimizer",
        sampling.load_optimizer,
        "An interrupted run resumes with another step size: losses jump after each restart.",
    ),
    _refuses(  # last: in SkyRL one NaN spoils the weights of every client, until a restart
        "a weight of NaN", requests.nan_weight, "One NaN ends the run's weights for good."
    ),
)
IMAGES: tuple[Check, ...] = (
    Check("images", images.images_read, "The model is trained on text alone."),
    _refuses(
        "an image of another length",
        images.miscounted,
        "Targets and weights belong to other positions than those that are trained.",
    ),
)
"""For a service whose model reads images."""


def check_service(
    make_client: Callable[[], TrainingClient],
    checks: Sequence[Check] = CHECKS,
    *,
    below: bool,
    timeout: float = TIMEOUT_SECONDS,
) -> Iterator[Row]:
    """Run the checks one after another; yield a row as each finishes.

    Args:
        make_client: returns a training client of the service, with a fresh LoRA adapter.
        checks: the checks to run.
        below: send bad input past this package's own validation, to the service itself.
        timeout: seconds for a request; a check gets three times as many.
    """
    subject = Subject(make_client, below=below, timeout=timeout)
    unresponsive = False
    for check in checks:
        if unresponsive:
            outcome = Outcome("cannot be read", "the service no longer answers")
        else:
            outcome = _run(check.run, subject, 3 * timeout)
            if outcome.result != "pass":
                subject.replace_client()
            if outcome.figure.startswith(NO_ANSWER):
                unresponsive = _run(_answers, subject, 3 * timeout).result != "pass"
        yield Row(check.name, outcome, check.harm)


def _answers(s: Subject) -> Outcome:
    logprobs(s.client(), [s.datum(3)])
    return Outcome("pass", "")


def _run(run: Callable[[Subject], Outcome], subject: Subject, seconds: float) -> Outcome:
    """Run a check in a thread of its own, which is abandoned if it hangs."""
    outcomes: list[Outcome] = []

    def work() -> None:
        try:
            outcomes.append(run(subject))
        except NotOffered as error:
            outcomes.append(Outcome("not offered", str(error)))
        except CannotBeRead as error:
            outcomes.append(Outcome("cannot be read", str(error)))
        except Exception as error:
            outcomes.append(Outcome("fail", error_line(error)))

    thread = threading.Thread(target=work, name="cookbook-check", daemon=True)
    thread.start()
    thread.join(seconds)
    return outcomes[0] if outcomes else Outcome("fail", f"{NO_ANSWER} ({seconds:.0f} s)")
