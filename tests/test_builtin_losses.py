"""The built-in losses: values by hand, signs of gradients, zero weights, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cookbook_core import with_inputs
from cookbook_core.backend.remote.convert import named_datums
from cookbook_core.builtin_losses import (
    BUILTIN_LOSSES,
    builtin_loss,
    cispo,
    cross_entropy,
    dro,
    importance_sampling,
    needed_inputs,
    ppo,
    with_entropy_bonus,
)
from cookbook_core.custom_loss import differentiate
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.tinker import AdamParams, Datum, ModelInput, ServiceClient

import pytest
import torch

RL = [importance_sampling, ppo, cispo, dro]
LN2 = math.log(2)


def datum(n: int = 2, **inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints([3] * n), {"target_tokens": [4] * n, **inputs})


def rl_datum(ratios: list[float], advantages: list[float], **inputs: Any) -> Any:
    """One datum at logprobs -1, -1, ... whose ratios to the sampling policy are these."""
    sampled = [-1.0 - math.log(r) for r in ratios]
    more = {"logprobs": sampled, "advantages": advantages, **inputs}
    return [datum(len(ratios), **more)], [torch.full((len(ratios),), -1.0, requires_grad=True)]


def run(loss: Callable[..., Any], data: Any, logprobs: Any, **options: float) -> Any:
    """Value, and gradient of the first datum's logprobs."""
    value, metrics = loss(data, logprobs, **options)
    assert metrics == {}
    (grad,) = torch.autograd.grad(value, logprobs[0])
    return value.item(), grad.tolist()


# ---- values and gradients ---------------------------------------------------------------------


def test_cross_entropy_by_hand() -> None:
    """-(0.5 * -1 + 2 * -3) - (1 * -4) = 0.5 + 6 + 4 = 10.5; gradient = -weights."""
    logprobs = [torch.tensor([-1.0, -3.0], requires_grad=True), torch.tensor([-4.0])]
    data = [datum(2, weights=[0.5, 2.0]), datum(1, weights=[1.0])]
    assert run(cross_entropy, data, logprobs) == (10.5, [-0.5, -2.0])


def test_cross_entropy_without_weights_counts_every_token() -> None:
    """-(-1 - 3) = 4."""
    logprobs = [torch.tensor([-1.0, -3.0], requires_grad=True)]
    assert run(cross_entropy, [datum(2)], logprobs) == (4.0, [-1.0, -1.0])


def test_cross_entropy_against_soft_labels() -> None:
    """(N, K): -(0.25 * -1 + 0.75 * -2 + 1 * -3 + 0 * -4) = 0.25 + 1.5 + 3 = 4.75."""
    soft = Datum(
        ModelInput.from_ints([3, 3]),
        {"target_tokens": [[4, 5], [6, 7]], "weights": [[0.25, 0.75], [1.0, 0.0]]},
    )
    logprobs = [torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)]
    assert run(cross_entropy, [soft], logprobs) == (4.75, [[-0.25, -0.75], [-1.0, 0.0]])


def test_importance_sampling_by_hand() -> None:
    """-(2 * 3 + 0.5 * -4) = -4; d(-ratio A)/dlp = -ratio A = [-6, 2]."""
    value, grad = run(importance_sampling, *rl_datum([2.0, 0.5], [3.0, -4.0]))
    assert value == pytest.approx(-4.0, rel=1e-6)
    assert grad == pytest.approx([-6.0, 2.0], rel=1e-6)


def test_ppo_by_hand() -> None:
    """Clip to [0.8, 1.2], advantage +-1; the smaller of ratio A and clip(ratio) A counts.

    ratio 2.0, A +1: min(2, 1.2) = 1.2, clipped away, gradient 0
    ratio 2.0, A -1: min(-2, -1.2) = -2, gradient +2
    ratio 0.5, A +1: min(0.5, 0.8) = 0.5, gradient -0.5
    ratio 0.5, A -1: min(-0.5, -0.8) = -0.8, gradient 0
    ratio 1.1, A +1: 1.1, inside, gradient -1.1
    L = -(1.2 - 2 + 0.5 - 0.8 + 1.1) = 0
    """
    data, logprobs = rl_datum([2.0, 2.0, 0.5, 0.5, 1.1], [1.0, -1.0, 1.0, -1.0, 1.0])
    value, grad = run(ppo, data, logprobs)
    assert value == pytest.approx(0.0, abs=1e-6)
    assert grad == pytest.approx([0.0, 2.0, -0.5, 0.0, -1.1], rel=1e-6)


def test_ppo_bounds_are_absolute_ratios() -> None:
    """clip_high 1.5, ratio 2, A 1: L = -1.5; clip_low 0.9, ratio 0.5, A -1: L = 0.9."""
    bounds = {"clip_low": 0.9, "clip_high": 1.5}
    assert run(ppo, *rl_datum([2.0], [1.0]), **bounds)[0] == pytest.approx(-1.5)
    assert run(ppo, *rl_datum([0.5], [-1.0]), **bounds)[0] == pytest.approx(0.9)


def test_cispo_by_hand() -> None:
    """-(clip(ratio) * lp * A) at lp = -1: the clipped ratio is a constant, so gradient -clip * A.

    ratio 2, A 1: 1.2; ratio 0.5, A -2: -(0.8 * -1 * -2) = -1.6; ratio 1.1, A 1: 1.1. L = 0.7.
    """
    value, grad = run(cispo, *rl_datum([2.0, 0.5, 1.1], [1.0, -2.0, 1.0]))
    assert value == pytest.approx(0.7, rel=1e-5)
    assert grad == pytest.approx([-1.2, 1.6, -1.1], rel=1e-6)


def test_dro_by_hand() -> None:
    """-(lp A - beta/2 (lp - sampled)^2) at lp = -1, beta 0.4, log-ratio ln 2, A 3.

    L = 3 + 0.2 * 0.480453 = 3.0960906; gradient = -A + beta * ln 2 = -3 + 0.2772589.
    """
    value, grad = run(dro, *rl_datum([2.0], [3.0]), beta=0.4)
    assert value == pytest.approx(3 + 0.2 * LN2**2, rel=1e-6)
    assert grad == pytest.approx([-3 + 0.4 * LN2], rel=1e-6)
    assert run(dro, *rl_datum([2.0], [3.0]))[0] == pytest.approx(3 + 0.025 * LN2**2, rel=1e-6)


@pytest.mark.parametrize("loss", RL)
def test_gradient_sign_follows_the_advantage(loss: Any) -> None:
    """A descent step makes a good token likelier, a bad one less likely, at ratio exactly 1."""
    _, grad = run(loss, *rl_datum([1.0, 1.0], [2.0, -0.5]))
    assert grad == [-2.0, 0.5]


@pytest.mark.parametrize(
    ("loss", "value"), [(importance_sampling, -1.5), (ppo, -1.5), (cispo, 1.5), (dro, 1.5)]
)
def test_on_policy_the_ratio_is_exactly_one(loss: Any, value: float) -> None:
    """Pitfall 20: equal logprobs, A = [2, -0.5]: -sum A = -1.5; with lp = -1: -sum lp A = 1.5."""
    assert run(loss, *rl_datum([1.0, 1.0], [2.0, -0.5]))[0] == value


@pytest.mark.parametrize("loss", [cross_entropy, *RL])
def test_zero_weight_means_zero_gradient(loss: Any) -> None:
    """The middle token has weight 0: no gradient there, not even from a logprob of -inf."""
    data = [
        datum(3, weights=[1.0, 0.0, 2.0], logprobs=[-1.0, -2.0, -1.0], advantages=[1.0, 9.0, 1.0])
    ]
    logprobs = [torch.tensor([-1.0, -math.inf, -1.0], requires_grad=True)]
    value, grad = run(loss, data, logprobs)
    assert math.isfinite(value)
    assert grad == [-1.0, 0.0, -2.0]


@pytest.mark.parametrize("loss", RL)
def test_side_data_of_a_token_without_weight_does_not_matter(loss: Any) -> None:
    """Prompt tokens were never sampled: what fills their place, NaN or -inf, must not spread."""
    for filler in (math.nan, -math.inf):
        data = [datum(2, weights=[0.0, 1.0], logprobs=[filler, -1.0], advantages=[filler, 1.0])]
        value, grad = run(loss, data, [torch.tensor([-2.0, -1.0], requires_grad=True)])
        assert math.isfinite(value)
        assert grad == [0.0, -1.0]


@pytest.mark.parametrize("loss", [cross_entropy, *RL])
def test_weights_scale_the_terms_and_datums_add_up(loss: Any) -> None:
    """Pitfall 32: L(both) = L(first) + L(second), and doubling weights doubles L."""
    make = lambda w: datum(2, weights=w, logprobs=[-1.2, -2.0], advantages=[1.0, -0.5])  # noqa: E731
    one = [torch.tensor([-1.0, -2.1])]
    single = loss([make([1.0, 0.5])], one)[0]
    assert loss([make([2.0, 1.0])], one)[0] == pytest.approx(2 * float(single))
    long = datum(3, weights=[1, 1, 1], logprobs=[-1.0, -1.0, -1.0], advantages=[1.0, 1.0, 1.0])
    other = [torch.tensor([-3.0, -1.0, -0.5])]
    both = loss([make([1.0, 0.5]), long], one + other)[0]
    assert both == pytest.approx(float(single + loss([long], other)[0]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("loss", RL)
def test_a_log_ratio_of_100_is_finite(loss: Any, sign: float) -> None:
    """Pitfall 34: exp(100) = 2.7e43 overflows float32; one stray token must not end the run."""
    for log_ratio in (100.0, -100.0):
        logprobs = [torch.tensor([-1.0], requires_grad=True)]
        data = [datum(1, logprobs=[-1.0 - log_ratio], advantages=[sign])]
        value, grad = run(loss, data, logprobs)
        assert math.isfinite(value)
        assert math.isfinite(grad[0])


def test_dro_still_pulls_back_at_a_log_ratio_of_100() -> None:
    """Squares need no cap. A 0, beta 0.05, log-ratio 100: gradient 0.05 * 100 = 5, not 0.

    Capping the log-ratio here would switch the pull to the sampling policy off where it matters.
    """
    logprobs = [torch.tensor([-1.0], requires_grad=True)]
    value, grad = run(dro, [datum(1, logprobs=[-101.0], advantages=[0.0])], logprobs)
    assert value == pytest.approx(250.0)
    assert grad == pytest.approx([5.0])


# ---- by name ------------------------------------------------------------------------------------


def test_needed_inputs() -> None:
    assert needed_inputs("cross_entropy") == ("target_tokens",)
    assert {needed_inputs(f.__name__) for f in RL} == {("target_tokens", "logprobs", "advantages")}


@pytest.mark.parametrize("name", ["ppo", "cispo"])
def test_options_are_bound_under_the_sdks_names(name: str) -> None:
    """Both bounds, at ratios 2 and 0.5: as the function with clip_low and clip_high, to the bit."""
    bound = builtin_loss(name, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.5})
    data, logprobs = rl_datum([2.0, 0.5, 0.5], [1.0, -1.0, 1.0])
    expected = run(BUILTIN_LOSSES[name], data, logprobs, clip_low=0.9, clip_high=1.5)
    assert run(bound, data, logprobs) == expected
    assert expected != run(BUILTIN_LOSSES[name], data, logprobs)
    assert bound.config == {"clip_low_threshold": 0.9, "clip_high_threshold": 1.5}  # as it is sent
    assert set(BUILTIN_LOSSES) == {"cross_entropy", "importance_sampling", "ppo", "cispo", "dro"}


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("cross_entrpy", None, r"'cross_entrpy'\. Did you mean \"cross_entropy\"\?"),
        ("zzz", None, r"one of cispo, cross_entropy.*'zzz'"),
        ("ppo", {"clip_low": 0.8}, r'\["clip_low"\].*Did you mean "clip_low_threshold"\?'),
        ("cross_entropy", {"beta": 1.0}, r'\["beta"\].*cross_entropy has no options'),
        ("dro", {"beta": "0.1"}, r"\[\"beta\"\].*got '0\.1'"),
    ],
)
def test_unknown_names_and_options_are_refused(name: str, config: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        builtin_loss(name, config)


@pytest.mark.parametrize("loss", RL)
def test_sampling_logprobs_have_our_name_or_the_sdks(loss: Any) -> None:
    """Recipes write "sampling_logprobs", the SDK "logprobs"; with both, ours counts."""
    (sdk,), logprobs = rl_datum([2.0, 0.5, 1.1], [1.0, -2.0, 1.0], weights=[1.0, 0.5, 0.0])
    inputs = dict(sdk.loss_fn_inputs)
    own = Datum(sdk.model_input, {**inputs, "sampling_logprobs": inputs.pop("logprobs")})
    both = with_inputs(own, logprobs=[9.0, 9.0, 9.0])
    assert run(loss, [own], logprobs) == run(loss, [sdk], logprobs) == run(loss, [both], logprobs)


def test_a_service_gets_sampling_logprobs_under_its_own_name() -> None:
    (sdk,), _ = rl_datum([2.0, 0.5], [1.0, -2.0])
    inputs = dict(sdk.loss_fn_inputs)
    own = Datum(sdk.model_input, {**inputs, "sampling_logprobs": inputs.pop("logprobs")})
    (sent,) = named_datums([own], builtin_loss("ppo"))
    assert sent.loss_fn_inputs == sdk.loss_fn_inputs


def test_a_client_takes_sampling_logprobs_too(
    service: ServiceClient, model_folder: Callable[..., str]
) -> None:
    """Loss and update of the two names are equal to the bit."""
    steps = []
    for name in ("logprobs", "sampling_logprobs"):
        client = service.create_lora_training_client(model_folder(), rank=2, seed=0).result(60)
        data = [datum(2, advantages=[1.0, -2.0], **{name: [-4, -5]})]
        loss = client.forward_backward(data, "ppo").result(60).loss
        steps.append((loss, client.optim_step(AdamParams()).result(60).metrics))
    assert steps[0] == steps[1]


@pytest.mark.parametrize("missing", ["logprobs", "advantages"])
@pytest.mark.parametrize("method", ["forward", "forward_backward"])
def test_missing_inputs_are_named_by_datum(
    method: str, missing: str, service: ServiceClient, model_folder: Callable[..., str]
) -> None:
    """Datums 1 and 2 lack an input, datum 0 is complete: both are named, before queueing."""
    client = service.create_lora_training_client(model_folder(), rank=2).result(60)
    full = datum(2, logprobs=[-1.0, -1.0], advantages=[1.0, 1.0])
    kept = {k: v for k, v in full.loss_fn_inputs.items() if k != missing}
    data = [full, Datum(full.model_input, kept), Datum(full.model_input, kept)]
    with pytest.raises(DatumError) as caught:
        getattr(client, method)(data, "ppo")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f'data[{i}].loss_fn_inputs["{missing}"]' for i in (1, 2)
    ]
    assert all("missing" in line for line in lines)


@pytest.mark.parametrize("loss", RL)
@pytest.mark.parametrize("key", ["logprobs", "advantages"])
def test_inputs_of_another_length_name_the_datum(loss: Any, key: str) -> None:
    """Pitfall 3: one advantage, or a shifted row, must not be spread over all tokens."""
    for wrong in ([1.0], [1.0, 1.0]):
        inputs = {"logprobs": [-1.0] * 3, "advantages": [1.0] * 3, key: wrong}
        good = datum(3, logprobs=[-1.0] * 3, advantages=[1.0] * 3)
        with pytest.raises(DatumError, match=rf'data\[1\].*"{key}".*3.*got.*{len(wrong)}'):
            loss([good, datum(3, **inputs)], [torch.full((3,), -1.0)] * 2)


@pytest.mark.parametrize("loss", RL)
def test_one_value_per_token_is_not_spread_over_candidates(loss: Any) -> None:
    """(2, 2) targets with (2,) advantages: torch would pair advantage t with candidate t."""
    data = [
        Datum(
            ModelInput.from_ints([3, 3]),
            {
                "target_tokens": [[4, 5], [6, 7]],
                "logprobs": [[-1.0, -1.0], [-1.0, -1.0]],
                "advantages": [1.0, -1.0],
            },
        )
    ]
    with pytest.raises(DatumError, match=r'data\[0\].*"advantages".*\(2, 2\), got \(2,\)'):
        loss(data, [torch.full((2, 2), -1.0)])


def test_no_datum_is_an_error() -> None:
    for loss in (cross_entropy, *RL):
        with pytest.raises(DatumError, match="data: empty"):
            loss([], [])


@pytest.mark.parametrize("loss", RL)
def test_missing_inputs_of_a_direct_call_are_named_by_datum(loss: Any) -> None:
    """Used inside a custom loss nothing has checked the datums before."""
    full = datum(1, logprobs=[-1.0], advantages=[1.0])
    with pytest.raises(DatumError) as caught:
        loss([full, datum(1, logprobs=[-1.0]), datum(1, advantages=[1.0])], [torch.zeros(1)] * 3)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        'data[1].loss_fn_inputs["advantages"]',
        'data[2].loss_fn_inputs["logprobs"]',
    ]
    assert lines[1].endswith("Pass sampling_logprobs=values to datum_from_prompt_completion().")


def test_an_entropy_bonus_needs_weights() -> None:
    with pytest.raises(DatumError, match=r'data\[0\].loss_fn_inputs\["weights"\]: missing'):
        differentiate(with_entropy_bonus(cross_entropy, 0.1), [datum(2)], [torch.zeros(2, 5)])


def test_an_entropy_bonus_is_taken_where_weights_are_not_zero() -> None:
    """Two positions, the first without weight. At the second p = (0.25, 0.75), target 1, weight 2:
    L = -2 log 0.75 - 0.1 * 2 * H, and dL/dlp = -2 [target] + 0.1 * 2 * p (log p + 1)."""
    p = torch.tensor([0.25, 0.75])
    datum = Datum(ModelInput.from_ints([0, 1]), {"target_tokens": [0, 1], "weights": [0.0, 2.0]})
    rows = torch.stack([torch.tensor([0.9, 0.1]).log(), p.log()])
    seen = []

    def loss_fn(data, logprobs):
        seen.append(logprobs[0].tolist())
        return cross_entropy(data, logprobs)

    result = differentiate(with_entropy_bonus(loss_fn, 0.1), [datum], [rows])
    entropy = -(p * p.log()).sum().item()
    assert seen == [[0.0, pytest.approx(math.log(0.75))]]
    assert result.loss == pytest.approx(-2 * math.log(0.75) - 0.2 * entropy)
    assert result.metrics["entropy"] == pytest.approx(entropy)
    slope = 0.2 * p * (p.log() + 1)
    assert result.grads[0][0].tolist() == [0.0, 0.0]
    assert result.grads[0][1].tolist() == pytest.approx((slope - torch.tensor([0.0, 2.0])).tolist())
