"""Weighted terms around a loss: value, gradient and telemetry by hand, and what is refused."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from cookbook_core import datum_from_prompt_completion
from cookbook_core.builtin_losses import with_entropy_bonus
from cookbook_core.custom_loss import differentiate, evaluate
from cookbook_core.doctor import examine
from cookbook_core.errors import ConfigError, DatumError, LossError, NoGradientError
from cookbook_core.regularise import drift, keep_apart, regularised, replay
from recipes.dpo import dpo_loss
from recipes.sft import sft_loss

import pytest
import torch


def answer(tokens: list[int], **inputs: Any) -> Any:
    """A datum of a one-token prompt: as many logprobs as tokens of the answer."""
    return datum_from_prompt_completion([1], tokens, **inputs)


def test_value_gradient_and_telemetry_by_hand() -> None:
    """sft on one answer: -(-1 - 3) / 2 = 2, slope -1/2 per token. Drift on the same tokens, ref -1
    and -1: (0^2 + 2^2) / 2 / 2 = 1, slopes (lp - ref) / 2 = 0 and -1; weight 0.5: share 0.5, slopes
    0 and -0.5. Lengths sqrt(1/2) and 1/2; cosine (0.25) / (0.7071 * 0.5)."""
    data = [answer([2, 3], ref_logprobs=-1.0)]
    logprobs = [torch.tensor([-1.0, -3.0])]
    result = differentiate(regularised(sft_loss, drift=(0.5, drift)), data, logprobs)
    assert result.loss == pytest.approx(2.5)
    assert result.grads[0].tolist() == pytest.approx([-0.5, -1.0])
    assert result.metrics == pytest.approx(
        {
            "perplexity": math.exp(2),
            "base": 2.0,
            "base_grad": math.sqrt(0.5),
            "drift": 1.0,
            "drift_share": 0.5,
            "drift_grad": 0.5,
            "drift_cos": math.sqrt(0.5),
        }
    )


def test_replay_is_of_the_datums_kept_apart_and_the_loss_does_not_get_them() -> None:
    """sft of -2 alone, replay of -4 and -6: 2 + 0.1 * 5. Other tokens: cosine 0."""
    data = [answer([2]), *keep_apart([answer([3, 4])])]
    logprobs = [torch.tensor([-2.0]), torch.tensor([-4.0, -6.0])]
    result = differentiate(regularised(sft_loss, replay=(0.1, replay)), data, logprobs)
    assert result.loss == pytest.approx(2.5)
    assert [g.tolist() for g in result.grads] == [[-1.0], pytest.approx([-0.05, -0.05])]
    assert (result.metrics["replay"], result.metrics["replay_cos"]) == (5.0, 0.0)


def test_a_loss_of_pairs_keeps_its_pairs() -> None:
    """A datum kept apart between the two of a pair does not take a partner's place."""
    pair = [answer([2], ref_logprobs=-1.0), answer([3], ref_logprobs=-1.0)]
    data = [pair[0], *keep_apart([answer([5])]), pair[1]]
    logprobs = [torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([-1.0])]
    loss_fn = regularised(partial(dpo_loss, beta=0.1), replay=(1.0, replay))
    assert differentiate(loss_fn, data, logprobs).loss == pytest.approx(math.log(2) + 2.0)


def test_drift_holds_the_datums_that_have_a_reference() -> None:
    data = [answer([2]), *keep_apart([answer([3], ref_logprobs=-1.0)])]
    loss_fn = regularised(sft_loss, drift=(1.0, drift))
    result = differentiate(loss_fn, data, [torch.tensor([-2.0]), torch.tensor([-4.0])])
    assert result.metrics["drift"] == pytest.approx(4.5)
    assert result.grads[1].tolist() == pytest.approx([-3.0])


def test_a_cosine_of_minus_one_is_a_term_that_undoes_the_loss() -> None:
    def pull_down(data: Any, logprobs: Any) -> torch.Tensor:
        return torch.cat(logprobs).mean()

    loss_fn = regularised(sft_loss, down=(0.25, pull_down))
    metrics = differentiate(loss_fn, [answer([2, 3])], [torch.tensor([-1.0, -1.0])]).metrics
    assert metrics["down_cos"] == pytest.approx(-1.0)
    assert metrics["down_grad"] == pytest.approx(0.25 * metrics["base_grad"])


def test_a_weight_of_zero_measures_without_effect() -> None:
    data, logprobs = [answer([2, 3], ref_logprobs=-1.0)], [torch.tensor([-1.5, -3.0])]
    plain = differentiate(sft_loss, data, logprobs)
    measured = differentiate(regularised(sft_loss, drift=(0.0, drift)), data, logprobs)
    assert measured.loss == plain.loss
    assert torch.equal(measured.grads[0], plain.grads[0])
    assert (measured.metrics["drift"], measured.metrics["drift_cos"]) == (1.0625, 0.0)


def test_without_a_gradient_and_over_the_vocabulary() -> None:
    """forward() has no gradient to measure; an entropy bonus goes around the whole."""
    data = [answer([2, 3], ref_logprobs=-1.0)]
    loss_fn = regularised(sft_loss, drift=(0.5, drift))
    metrics = evaluate(loss_fn, data, [torch.tensor([-1.0, -3.0])]).metrics
    assert set(metrics) == {"perplexity", "base", "drift", "drift_share"}
    rows = [torch.randn(2, 5, dtype=torch.float64).log_softmax(dim=-1)]
    result = differentiate(with_entropy_bonus(loss_fn, 0.1), data, rows)
    assert {"entropy", "drift", "base"} <= set(result.metrics)


def test_the_doctor_passes_it() -> None:
    report = examine(regularised(sft_loss, drift=(0.5, drift)))
    assert report.ok, str(report)
    assert "reads ref_logprobs, weights" in report.subject


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({}, "regularised: no term"),
        ({"drift": (-0.1, drift)}, r"drift=...\): weight out of range.*>= 0, got -0.1"),
        ({"drift": (math.nan, drift)}, "weight out of range"),
        ({"drift": ("1", drift)}, "weight out of range"),
        ({"drift": (0.1, "drift")}, r"unknown term.*got 'drift'.*regularise.drift or"),
        ({"entropy": (0.1, None)}, "unknown term.*with_entropy_bonus"),
        ({"drift": 0.1}, r"not a pair.*\(weight, term\), got 0.1"),
        ({"loss": (0.1, drift)}, "used by another metric"),
    ],
)
def test_what_is_refused_at_once(terms: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        regularised(sft_loss, **terms)


def test_what_is_refused_in_the_batch() -> None:
    data, logprobs = [answer([2])], [torch.tensor([-1.0])]
    with pytest.raises(DatumError, match=r'no datum has "kept".*keep_apart'):
        differentiate(regularised(sft_loss, replay=(1.0, replay)), data, logprobs)
    with pytest.raises(DatumError, match=r'no datum has "ref_logprobs".*add_ref_logprobs'):
        differentiate(regularised(sft_loss, drift=(1.0, drift)), data, logprobs)

    def constant(data: Any, logprobs: Any) -> Any:
        return torch.tensor(1.0)

    def with_metrics(data: Any, logprobs: Any) -> Any:
        return logprobs[0].sum(), {}

    with pytest.raises(NoGradientError, match=r"constant\(\): detached"):
        differentiate(regularised(sft_loss, flat=(1.0, constant)), data, logprobs)
    own = regularised(lambda *_: (torch.tensor(1.0), {}), down=(1.0, lambda _, lps: lps[0].sum()))
    with pytest.raises(NoGradientError, match=r"lambda>\(\): detached"):
        differentiate(own, data, logprobs)
    with pytest.raises(LossError, match=r"with_metrics\(\): not a scalar.*got tuple"):
        differentiate(regularised(sft_loss, pair=(1.0, with_metrics)), data, logprobs)
