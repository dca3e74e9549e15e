"""The custom-loss driver: what goes in, what comes out, and every way a loss can be wrong."""

from __future__ import annotations

import functools
import math
import re
import traceback
from collections.abc import Callable
from typing import Any

from cookbook_core import clients, with_inputs
from cookbook_core.custom_loss import (
    LossResult,
    differentiate,
    evaluate,
    forward_backward_two_pass,
    logprobs_from_output,
    merge_metrics,
    name_of,
    surrogate_datums,
)
from cookbook_core.errors import ConfigError, DatumError, LossError, RequestError
from cookbook_core.tinker import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    ServiceClient,
    TensorData,
    TrainingClient,
)
from tests.oracles.logprobs import adapter_of, engine_of, randomize, take_gradient

import numpy as np
import pytest
import torch

SECONDS = 60


def datum(targets: Any, **inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints([3] * len(targets)), {"target_tokens": targets, **inputs})


DATA = [datum([5, 6, 7]), datum([8, 9]), datum([4])]
LOGPROBS = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0, -5.0]), torch.tensor([-6.0])]


def total(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    """-sum of all logprobs."""
    del data
    return -torch.cat([lp.reshape(-1) for lp in logprobs]).sum(), {}


@pytest.fixture
def client(
    make_service: Callable[..., ServiceClient], model_folder: Callable[..., str]
) -> TrainingClient:
    made = make_service().create_lora_training_client(model_folder(), rank=4, seed=0)
    client = made.result(SECONDS)
    randomize(client)
    return client


# ---- differentiate --------------------------------------------------------------------------


def test_gradients_have_the_shape_and_order_of_the_logprobs() -> None:
    """L = sum_i (i + 1) * sum(lp_i^2): dL/dlp_i = 2 (i + 1) lp_i, datum by datum."""

    def loss(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        assert [d.model_input.length for d in data] == [lp.shape[0] for lp in logprobs]
        value = sum((i + 1) * (lp**2).sum() for i, lp in enumerate(logprobs))
        return value, {"first": logprobs[0][0], "two": 2, "half": np.float32(0.5)}

    shapes = [(3,), (2, 4), (1, 1)]
    logprobs = [-torch.rand(shape) - 1 for shape in shapes]
    result = differentiate(loss, [datum(np.zeros(s, int)) for s in shapes], logprobs)
    for i, (g, lp) in enumerate(zip(result.grads, logprobs, strict=True)):
        torch.testing.assert_close(g, 2 * (i + 1) * lp)
    assert result.loss == pytest.approx(
        sum((i + 1) * float((lp**2).sum()) for i, lp in enumerate(logprobs))
    )
    assert result.metrics == {"first": float(logprobs[0][0]), "two": 2.0, "half": 0.5}
    assert all(type(v) is float for v in result.metrics.values())


def test_the_logprobs_handed_in_are_not_touched() -> None:
    """A loss that works in place spoils its own copy only, and float64 stays float64."""

    def loss(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        with torch.no_grad():
            logprobs[0].zero_()
        return total(data, logprobs)

    logprobs = [lp.double().requires_grad_(True) for lp in LOGPROBS]
    result = differentiate(loss, DATA, logprobs)
    assert result.loss == 15.0  # 4 + 5 + 6: the first was zeroed by the loss
    assert logprobs[0].tolist() == [-1.0, -2.0, -3.0]
    assert all(lp.grad is None for lp in logprobs)
    assert {g.dtype for g in result.grads} == {torch.float64}


def test_an_unused_datum_gets_a_zero_gradient() -> None:
    """Of three datums the loss reads the second only."""
    result = differentiate(lambda data, lps: (lps[1].sum(), {}), DATA, LOGPROBS)
    assert [g.tolist() for g in result.grads] == [[0.0, 0.0, 0.0], [1.0, 1.0], [0.0]]


def test_gradients_are_found_under_no_grad_too() -> None:
    """A caller's torch.no_grad() must not turn a loss into a detached one."""
    with torch.no_grad():
        result = differentiate(total, DATA, LOGPROBS)
    assert result.grads[2].tolist() == [-1.0]


def broken(value: Any) -> Callable[..., Any]:
    def my_loss(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        del data
        return value(logprobs)

    return my_loss


WRONG: dict[str, tuple[Callable[[list[torch.Tensor]], Any], str]] = {
    "not a tuple": (lambda lps: lps[0].sum(), "got Tensor"),
    "three things": (lambda lps: (lps[0].sum(), {}, {}), r"\(loss, metrics\), got tuple"),
    "a list": (lambda lps: [lps[0].sum(), {}], "got list"),
    "nothing": (lambda lps: None, "got NoneType"),
    "a float": (lambda lps: (float(lps[0].sum()), {}), "0-d tensor, got float"),
    "per token": (lambda lps: (lps[0] * 2, {}), r"got shape \(3,\)"),
    "one in a row": (lambda lps: (lps[0].sum().reshape(1), {}), r"got shape \(1,\)"),
    "detached": (lambda lps: (lps[0].sum().detach(), {}), "requires_grad=False"),
    "rebuilt": (lambda lps: (torch.tensor(lps[0].sum().item()), {}), "detached"),
    "integer": (lambda lps: (lps[0].sum().long(), {}), "requires_grad=False"),
    "nan": (lambda lps: (lps[0].sum() * math.nan, {}), "finite loss, got nan"),
    "inf": (lambda lps: (lps[0].sum() * math.inf, {}), "finite loss, got -inf"),
    "metrics a list": (lambda lps: (lps[0].sum(), [1.0]), "got list"),
    "metrics none": (lambda lps: (lps[0].sum(), None), "got NoneType"),
    "metric text": (lambda lps: (lps[0].sum(), {"m": "0.5"}), r'metrics\["m"\].*0\.5'),
    "metric none": (lambda lps: (lps[0].sum(), {"m": None}), r'metrics\["m"\].*None'),
    "metric vector": (lambda lps: (lps[0].sum(), {"m": lps[0]}), r'metrics\["m"\].*\(3,\)'),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_loss_must_not_return(case: str) -> None:
    """Every error names the loss and what it returned."""
    value, match = WRONG[case]
    with pytest.raises(LossError, match=rf"(?s)my_loss\(\).*{match}"):
        differentiate(broken(value), DATA, LOGPROBS)


def test_a_gradient_that_is_not_finite_names_datum_and_position() -> None:
    """sqrt(lp - lp) is 0, its slope infinite: finite loss, no gradient."""

    def root(logprobs: list[torch.Tensor]) -> Any:
        zero = logprobs[1] - torch.tensor([-9.0, -5.0])  # 5, 0
        return logprobs[0].sum() + zero.sqrt().sum(), {}

    with pytest.raises(LossError, match=r"data\[1\] at \[1\].*got inf.*logprob there is -5"):
        differentiate(broken(root), DATA, LOGPROBS)


def test_bad_gradients_of_several_datums_are_all_reported() -> None:
    """0 * log(0) style NaN in datums 0 and 2; datum 1 is not mentioned."""

    def nan_slope(logprobs: list[torch.Tensor]) -> Any:
        bad = (logprobs[0][2:] + 3).sqrt() * 0 + (logprobs[2] + 6).sqrt() * 0
        return bad.sum() + logprobs[1].sum(), {}

    with pytest.raises(LossError) as caught:
        differentiate(broken(nan_slope), DATA, LOGPROBS)
    named = re.findall(r"data\[(\d)\] at \[(\d)\]", str(caught.value))
    assert named == [("0", "2"), ("2", "0")]


def test_a_loss_that_uses_no_datum_is_refused() -> None:
    """It has a gradient, but of something else than the logprobs."""
    other = torch.ones((), requires_grad=True)
    with pytest.raises(LossError, match=r"my_loss\(\): the loss uses no datum"):
        differentiate(broken(lambda lps: (other * 2, {})), DATA, LOGPROBS)


def test_an_error_in_the_loss_arrives_with_its_cause() -> None:
    """The user's own exception is the cause; its type and text are in the message."""

    def typo(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        return data[0].loss_fn_inputs["advantage"], {}

    with pytest.raises(LossError, match=r"typo\(\): raised KeyError: 'advantage'") as caught:
        differentiate(typo, DATA, LOGPROBS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_packages_own_errors_pass_through() -> None:
    """A DatumError raised by a helper inside the loss stays a DatumError."""
    from cookbook_core import weighted_sums

    with pytest.raises(DatumError, match=r'data\[0\].loss_fn_inputs\["weights"\]'):
        differentiate(lambda d, lps: (weighted_sums(d, lps).sum(), {}), DATA, LOGPROBS)


def test_partials_and_callables_are_named() -> None:
    """functools.partial(total) is called total, an object by its class."""

    class Margin:
        def __call__(self) -> None: ...

    assert name_of(functools.partial(total)) == "total"
    assert name_of(Margin()) == "Margin"


def test_evaluate_gives_the_value_without_gradients() -> None:
    """For `forward`: same value and metrics, no gradient, the same errors."""
    result = evaluate(lambda d, lps: (lps[0].sum(), {"m": 1}), DATA, LOGPROBS)
    assert result == LossResult(-6.0, {"m": 1.0}, [])
    with pytest.raises(LossError, match="got nan"):
        evaluate(lambda d, lps: (lps[0].sum() * math.nan, {}), DATA, LOGPROBS)
    with pytest.raises(LossError, match=r"raised ZeroDivisionError.*of test_custom_loss.py"):
        evaluate(lambda d, lps: 1 / 0, DATA, LOGPROBS)


# ---- logprobs_from_output, surrogate_datums, merge_metrics ---------------------------------------


def output_of(logprobs: list[Any]) -> ForwardBackwardOutput:
    outputs = [{"logprobs": TensorData(lp, "float32")} for lp in logprobs]
    return ForwardBackwardOutput("ArrayRecord", outputs)


def test_logprobs_come_back_in_order_and_shape() -> None:
    """(3,), (2, 2) and (1, 1) stay what they are; nothing is flattened."""
    data = [datum([5, 6, 7]), datum([[8, 9], [1, 2]]), datum([[4]])]
    values: list[Any] = [[-1, -2, -3], [[-4, -5], [-6, -7]], [[-8]]]
    found = logprobs_from_output(output_of(values), data)
    assert [lp.tolist() for lp in found] == values
    assert [tuple(lp.shape) for lp in found] == [(3,), (2, 2), (1, 1)]


def test_logprobs_of_another_shape_are_refused() -> None:
    """A flattened (4,) instead of (2, 2), and a missing one: both are reported."""
    data = [datum([5, 6, 7]), datum([[8, 9], [1, 2]]), datum([4])]
    output = output_of([[-1, -2, -3], [-4, -5, -6, -7], [-8]])
    del output.loss_fn_outputs[2]["logprobs"]
    with pytest.raises(DatumError) as caught:
        logprobs_from_output(output, data)
    assert re.search(r'output\[1\]\["logprobs"\].*\(2, 2\), got \(4,\)', str(caught.value))
    assert re.search(r'output\[2\]\["logprobs"\].*got no logprobs', str(caught.value))
    with pytest.raises(DatumError, match="Expected 2, got 3"):
        logprobs_from_output(output, data[:2])


def test_surrogates_carry_minus_the_gradient_and_nothing_private() -> None:
    """sum(-w * lp) with w = -g has slope g; advantages and the like are left out."""
    data = [datum([5, 6], advantages=[1.0, 2.0], weights=[9.0, 9.0]), datum([[7, 8]])]
    grads = [torch.tensor([0.5, -0.25]), torch.tensor([[1.0, 0.0]], dtype=torch.float64)]
    made = surrogate_datums(data, grads)
    assert [set(d.loss_fn_inputs) for d in made] == [{"target_tokens", "weights"}] * 2
    assert made[0].loss_fn_inputs["weights"].tolist() == [-0.5, 0.25]
    assert made[1].loss_fn_inputs["weights"].tolist() == [[-1.0, 0.0]]
    assert [d.loss_fn_inputs["weights"].dtype for d in made] == ["float32", "float64"]
    assert [d.model_input for d in made] == [d.model_input for d in data]
    assert made[0].loss_fn_inputs["target_tokens"].tolist() == [5, 6]


def test_metrics_are_merged_and_the_loss_is_the_losss() -> None:
    """Backend's, then the loss's own; "loss" and "loss:sum" are always the loss."""
    result = LossResult(0.5, {"margin": 1.0, "passes": 7.0}, [])
    merged = merge_metrics(result, {"passes": 1.0, "tokens": 9.0, "loss:sum": 3.0})
    assert merged == {"passes": 7.0, "tokens": 9.0, "margin": 1.0, "loss": 0.5, "loss:sum": 0.5}


@pytest.mark.parametrize("key", ["loss", "loss:sum"])
def test_a_reserved_metric_must_be_the_loss(key: str) -> None:
    """metrics["loss"] = the loss is harmless and common; another number would hide the loss."""
    assert merge_metrics(LossResult(2.0, {key: 2.0}, []), {})["loss"] == 2.0
    with pytest.raises(LossError, match=rf'metrics\["{key}"\].*2, got 3'):
        merge_metrics(LossResult(2.0, {key: 3.0}, []), {})


def test_a_reserved_metric_that_is_nan_is_refused() -> None:
    """NaN compares false with everything, so a careless check lets it through."""
    with pytest.raises(LossError, match=r'metrics\["loss"\].*got nan'):
        merge_metrics(LossResult(2.0, {"loss": math.nan}, []), {})


# ---- through a client ---------------------------------------------------------------------------


def test_a_failing_loss_is_printed_with_its_own_lines_first(
    client: TrainingClient, random_data: Callable[..., list[Datum]]
) -> None:
    """What a script prints as it dies: first the loss's lines and exception, last our message."""

    def typo(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        return data[0].loss_fn_inputs["advantage"], {}

    future = client.forward_backward_custom(random_data(2), typo)
    with pytest.raises(LossError) as caught:
        future.result(SECONDS)
    printed = "".join(traceback.format_exception(LossError, caught.value, caught.tb)).splitlines()
    assert printed[0] == "Traceback (most recent call last):"
    assert printed[1].endswith("in typo")
    assert 'loss_fn_inputs["advantage"]' in printed[2]
    cause = printed.index("KeyError: 'advantage'")
    assert not [line for line in printed[:cause] if "cookbook_core/" in line]
    assert printed[-1].startswith(
        "cookbook_core.errors.LossError: typo(): raised KeyError: 'advantage'. See line "
    )


def test_the_loss_runs_exactly_once(
    client: TrainingClient, random_data: Callable[..., list[Datum]]
) -> None:
    """One pass, two passes, and the surrogate scheme each call it once, with data in order."""
    data, seen = random_data(5), []

    def counted(got: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        seen.append([a is b for a, b in zip(got, data, strict=True)])
        return total(got, logprobs)

    client.forward_backward_custom(data, counted).result(SECONDS)
    assert seen == [[True] * 5]
    engine_of(client).limits.graph_tokens = 0
    client.forward_backward_custom(data, counted).result(SECONDS)
    assert len(seen) == 2
    forward_backward_two_pass(client, data, counted)
    assert len(seen) == 3


def test_side_data_reaches_the_loss_and_metrics_come_back(
    client: TrainingClient, random_data: Callable[..., list[Datum]]
) -> None:
    """Any key of loss_fn_inputs is the loss's; logprobs are float32, on the CPU, <= 0."""
    data = [with_inputs(d, reward=[float(i)]) for i, d in enumerate(random_data(3))]

    def loss(got: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        assert {(lp.dtype, lp.device.type) for lp in logprobs} == {(torch.float32, "cpu")}
        assert all(lp.requires_grad and float(lp.detach().max()) <= 0 for lp in logprobs)
        rewards = [d.loss_fn_inputs["reward"].to_torch().sum() for d in got]
        value = sum(r * lp.sum() for r, lp in zip(rewards, logprobs, strict=True))
        return value, {"reward": torch.stack(rewards).mean()}

    output = client.forward_backward_custom(data, loss).result(SECONDS)
    assert output.metrics["reward"] == 1.0
    assert output.loss == output.metrics["loss"] == output.metrics["loss:sum"]
    assert output.metrics["tokens"] == sum(d.model_input.length for d in data)
    expected = sum(i * sum(o["logprobs"].data) for i, o in enumerate(output.loss_fn_outputs))
    assert output.loss == pytest.approx(expected, rel=1e-5)


FAILING: dict[str, Callable[..., Any]] = {
    "raises": lambda data, lps: 1 / 0,
    "nan loss": lambda data, lps: (lps[0].sum() * math.nan, {}),
    "nan gradient": lambda data, lps: ((lps[0] - lps[0].detach()).sqrt().sum(), {}),
    "detached": lambda data, lps: (lps[0].sum().detach(), {}),
    "bad metric": lambda data, lps: (lps[0].sum(), {"m": "x"}),
    "reserved metric": lambda data, lps: (lps[0].sum(), {"loss": 1e9}),
    # finite loss and logprob gradient; the gradient of the parameters is not
    "overflow": lambda data, lps: (((lps[0] - lps[0].detach()) * 3e38).sum(), {}),
}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("case", FAILING)
def test_a_failing_loss_leaves_everything_as_it_was(
    case: str, passes: int, client: TrainingClient, random_data: Callable[..., list[Datum]]
) -> None:
    """Pitfall 2: gradients are byte-equal after a failed call, and the client still works."""
    data = random_data(4)
    if passes == 2:
        engine_of(client).limits.graph_tokens = 0
    client.forward_backward(data, "cross_entropy").result(SECONDS)
    adapter = adapter_of(client)
    grads = [g.clone() for g in adapter.grads]
    params = [p.detach().clone() for p in adapter.params]

    with pytest.raises((LossError, RequestError)):
        client.forward_backward_custom(data, FAILING[case]).result(SECONDS)

    assert all(torch.equal(a, b) for a, b in zip(grads, adapter.grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(params, adapter.params, strict=True))
    step = client.optim_step(AdamParams(learning_rate=1e-3)).result(SECONDS)
    norm = torch.stack([g.norm() for g in grads]).norm()
    assert step.metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


CALLS: dict[str, Callable[[TrainingClient, list[Datum]], Any]] = {
    "forward": lambda c, data: c.forward(data, "cross_entropy"),
    "forward_backward": lambda c, data: c.forward_backward(data, "cross_entropy"),
    "forward_backward_custom": lambda c, data: c.forward_backward_custom(data, total),
    "optim_step": lambda c, data: c.optim_step(AdamParams()),
    "save_state": lambda c, data: c.save_state("x"),
    "sampling": lambda c, data: c.save_weights_and_get_sampling_client(),
}


@pytest.mark.parametrize("name", CALLS)
def test_calling_the_client_inside_the_loss_is_refused(
    name: str, client: TrainingClient, random_data: Callable[..., list[Datum]]
) -> None:
    """It would wait in a queue behind itself: an error at once, no deadlock, no gradient."""
    data = random_data(2)

    def nested(got: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        CALLS[name](client, got)
        return total(got, logprobs)

    future = client.forward_backward_custom(data, nested)
    with pytest.raises(RequestError, match="inside a loss function"):
        future.result(SECONDS)
    assert adapter_of(client).grads is None
    output = client.forward_backward_custom(data, total).result(SECONDS)
    assert output.loss > 0


def test_waiting_inside_the_loss_for_a_request_behind_it_is_refused(
    client: TrainingClient, random_data: Callable[..., list[Datum]]
) -> None:
    """The future was made outside, in good order; waiting for it inside can never end."""
    import threading

    data, later, ready = random_data(2), [], threading.Event()

    def waits(got: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        assert ready.wait(SECONDS)
        later[0].result(5)
        return total(got, logprobs)

    future = client.forward_backward_custom(data, waits)
    later.append(client.forward(data, "cross_entropy"))
    ready.set()
    with pytest.raises(RequestError, match="inside a loss function"):
        future.result(SECONDS)
    assert later[0].result(SECONDS).loss > 0


def test_the_two_pass_scheme_sends_nothing_private(
    client: TrainingClient, random_data: Callable[..., list[Datum]]
) -> None:
    """A remote service gets tokens, targets, and in the second call weights."""
    sent: list[tuple[str, set[str]]] = []

    class Recorder:
        def forward(self, data: list[Datum], loss_fn: str) -> Any:
            sent.extend(("forward", set(d.loss_fn_inputs)) for d in data)
            return client.forward(data, loss_fn)

        def forward_backward(self, data: list[Datum], loss_fn: str) -> Any:
            sent.extend(("backward", set(d.loss_fn_inputs)) for d in data)
            return client.forward_backward(data, loss_fn)

    recorder: Any = Recorder()
    data = [with_inputs(d, ref_logprobs=[0.5]) for d in random_data(1)]
    output = forward_backward_two_pass(
        recorder, data, lambda d, lps: ((lps[0] ** 2).sum(), {"own": 3})
    )
    assert sent == [("forward", {"target_tokens"}), ("backward", {"target_tokens", "weights"})]
    logprobs = output.loss_fn_outputs[0]["logprobs"].to_torch()
    assert output.metrics["loss"] == pytest.approx(float((logprobs**2).sum()), rel=1e-5)
    assert output.metrics["own"] == 3.0
    take_gradient(client)


@pytest.mark.parametrize(
    ("loss_fn", "more", "match"),
    [
        ("cross_entropy", {}, "loss_fn: not a function.*'cross_entropy'"),
        (None, {}, "loss_fn: not a function.*None"),
        (total, {"loss_type_input": "logits"}, "loss_type_input.*'logits'"),
    ],
)
def test_a_wrong_loss_is_refused_before_anything_is_queued(
    loss_fn: Any,
    more: dict[str, Any],
    match: str,
    client: TrainingClient,
    random_data: Callable[..., list[Datum]],
) -> None:
    with pytest.raises(ConfigError, match=match):
        client.forward_backward_custom(random_data(1), loss_fn, **more)


def test_bad_data_is_refused_at_once(client: TrainingClient) -> None:
    """No future is made: the error is raised where the call is written."""
    bad = Datum(ModelInput.from_ints([1, 2]), {"weights": [1.0, 1.0]})
    with pytest.raises(DatumError, match=r'data\[0\].*"target_tokens".*got weights'):
        client.forward_backward_custom([bad], total)


def test_a_loss_on_held_out_data_is_checked_as_in_training(random_data):
    """Recipes measure before the first step: a bug in the loss first shows there."""
    data = random_data(2)
    logprobs = [torch.zeros(d.model_input.length) for d in data]

    def broken(data, logprobs):
        return data[0].loss_fn_inputs["nope"], {}

    with pytest.raises(LossError, match=r"broken\(\): raised KeyError: 'nope'. See line \d+ of"):
        clients.evaluate(broken, data, logprobs)
    with pytest.raises(LossError, match=r"not a tensor.*got float"):
        clients.evaluate(lambda data, lps: (float(lps[0].sum()), {}), data, logprobs)
    found = clients.evaluate(lambda data, lps: (lps[0].sum() / 0, {"a": 1}), data, logprobs)
    assert np.isnan(found["loss"])
    assert found["a"] == 1.0
