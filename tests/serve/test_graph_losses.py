"""Uploaded losses: what they compute, what they may not do, and their limits."""

from __future__ import annotations

import inspect
import math

from cookbook_core.custom_loss import differentiate
from cookbook_core.errors import CookbookError, LossError, RequestError
from cookbook_core.serve import graph_losses
from cookbook_core.serve.fields import Fields
from cookbook_core.serve.graph_losses import GraphLoss
from tests.conftest import make_random_data
from tests.serve.running import Running, Wire, scoring

import pytest
import torch
import torch.fx


def encoded(arg):
    """An argument in the wire's form."""
    if isinstance(arg, torch.fx.Node):
        return {"ref": arg.name}
    if isinstance(arg, list):
        return [encoded(item) for item in arg]
    if isinstance(arg, tuple):
        return {"tuple": [encoded(item) for item in arg]}
    if isinstance(arg, dict):
        return {"dict": {key: encoded(item) for key, item in arg.items()}}
    if isinstance(arg, slice):
        return {"slice": [encoded(item) for item in (arg.start, arg.stop, arg.step)]}
    if arg is Ellipsis:
        return {"ellipsis": True}
    if isinstance(arg, torch.dtype):
        return {"dtype": str(arg).removeprefix("torch.")}
    return {"float": str(arg)} if isinstance(arg, float) and not math.isfinite(arg) else arg


def body_of(function, ranks=None) -> dict:
    """The body of create_custom_loss for a function, as the SDK makes it."""
    names = list(inspect.signature(function).parameters)
    nodes = [
        {
            "op": node.op, "name": node.name, "target": target_of(node),
            "args": [encoded(arg) for arg in node.args],
            "kwargs": {key: encoded(arg) for key, arg in node.kwargs.items()},
        }
        for node in torch.fx.symbolic_trace(function).graph.nodes
    ]  # fmt: skip
    inputs = [{"name": n, "rank": (ranks or {}).get(n, 1)} for n in names]
    return {"name": function.__name__, "inputs": inputs, "graph": {"format": 1, "nodes": nodes}}


def target_of(node) -> str:
    if node.op != "call_function":
        return str(node.target)
    return torch.fx.node._get_qualified_name(node.target).replace("_operator.", "operator.")


def loss_of(function, ranks=None) -> GraphLoss:
    return GraphLoss(Fields(body_of(function, ranks)))


def clipped(logprobs, weights):
    ratio = torch.exp(torch.clamp(logprobs - logprobs.detach(), max=20.0))
    inside = torch.minimum(ratio * weights, ratio.clamp(0.8, 1.2) * weights)
    masked = torch.where(weights > 0, inside, torch.zeros_like(inside))
    kept = logprobs[weights > 0]
    total = -masked.sum() + 0.5 * kept.pow(2).mean() - torch.logsumexp(logprobs, dim=0)
    tail = logprobs[-2:].sum() + logprobs[0] * math.sqrt(2.0)
    softened = torch.nn.functional.softplus(tail) + torch.nn.functional.logsigmoid(total)
    return total + softened, {"custom/a:mean": kept.mean(), "custom/b:sum": masked.sum()}


def test_values_and_gradients_are_those_of_the_function():
    data = make_random_data(4)
    logprobs = [
        -5 * torch.rand(d.model_input.length, dtype=torch.float64, generator=seeded(i))
        for i, d in enumerate(data)
    ]

    def expected(data, logprobs):
        rows = [
            clipped(lp, d.loss_fn_inputs["weights"].to_torch())
            for d, lp in zip(data, logprobs, strict=True)
        ]
        means = [metrics["custom/a:mean"].detach() for _, metrics in rows]
        sums = [metrics["custom/b:sum"].detach() for _, metrics in rows]
        metrics = {"custom/a:mean": sum(means) / len(means), "custom/b:sum": sum(sums)}
        return sum(loss for loss, _ in rows), metrics

    loss = loss_of(clipped)
    assert loss.needs == ["target_tokens", "weights"]
    one, two = (differentiate(fn, data, logprobs) for fn in (loss, expected))
    assert one.loss == pytest.approx(two.loss, rel=1e-12)
    assert one.metrics == pytest.approx(two.metrics)
    for a, b in zip(one.grads, two.grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simple(logprobs):
    return -logprobs.sum(), {}


def changed(**nodes) -> dict:
    """The body of `simple` with fields of its second node replaced."""
    body = body_of(simple)
    body["graph"]["nodes"][1] |= nodes
    return body


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (changed(target="builtins.eval", op="call_function"), "not among those"),
        (changed(target="torch.load", op="call_function"), "not among those"),
        (changed(target="os.system", op="call_function"), "not among those"),
        (changed(target="builtins.getattr", op="call_function"), "not among those"),
        (changed(target="__class__", op="call_method"), "not among those"),
        (changed(target="numpy", op="call_method"), "not among those"),
        (changed(target="backward", op="call_method"), "not among those"),
        (changed(target="data_ptr", op="call_method"), "not among those"),
        (changed(target="map_", op="call_method"), "not among those"),
        (changed(op="get_attr"), "not allowed in a loss"),
        (changed(op="call_module"), "not allowed in a loss"),
        (changed(args=[{"ref": "later"}]), "not before it"),
        (changed(args=[{"python": "1"}]), "unknown argument"),
        (changed(args=[{"ref": "a", "dict": {}}]), "unknown argument"),
        (changed(hook="x"), "unknown field"),
        ({**body_of(simple), "graph": {"format": 2, "nodes": []}}, "graph.format"),
        ({**body_of(simple), "inputs": []}, "inputs"),
        ({**body_of(simple), "inputs": [{"name": "weights", "rank": 1}]}, "inputs"),
    ],
)
def test_graphs_that_are_refused(body, text):
    with pytest.raises(RequestError, match=text):
        GraphLoss(Fields(body))


def test_graphs_have_limits():
    nodes = body_of(simple)
    extra = {**nodes["graph"]["nodes"][1]}
    many = [{**extra, "name": f"n{i}"} for i in range(graph_losses.MOST_NODES)]
    nodes["graph"]["nodes"][1:1] = many
    with pytest.raises(RequestError, match="too many"):
        GraphLoss(Fields(nodes))
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RequestError, match="nested too deeply"):
        GraphLoss(Fields(changed(args=[deep])))


def huge_product(logprobs):
    return (logprobs[:, None] * logprobs[None, :]).sum(), {}


def huge_outer(logprobs):
    return torch.outer(logprobs, logprobs).sum(), {}


def huge_expand(logprobs):
    return logprobs[:, None].expand(5000, 5000).sum(), {}


def huge_stack(logprobs):
    return torch.stack([logprobs] * 4000).sum(), {}


def test_results_that_would_be_too_large_are_not_computed():
    data = make_random_data(1)
    logprobs = [torch.zeros(5000)]
    for function in (huge_product, huge_outer, huge_expand, huge_stack):
        with pytest.raises(LossError, match="too large"):
            loss_of(function)(data, logprobs)
    for target, args in (("pow", [10**9, 10**9]), ("mul", [[1, 2], 10**9])):
        body = changed(op="call_function", target=f"operator.{target}", args=args)
        with pytest.raises(LossError, match="too large"):  # Python's own numbers and lists
            GraphLoss(Fields(body))(data, logprobs)


def test_a_loss_that_takes_too_long_ends(monkeypatch):
    monkeypatch.setattr(graph_losses, "MOST_SECONDS", 0.05)
    loss, data = loss_of(simple), make_random_data(1)
    times = iter([0.0, 0.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(graph_losses.time, "monotonic", lambda: next(times))
    with pytest.raises(LossError, match="too long"):
        loss(data, [torch.zeros(3)])


def two_values(logprobs):
    return logprobs, {}


def no_tuple(logprobs):
    return logprobs.sum()


def bad_metric(logprobs):
    return logprobs.sum(), {"m": logprobs.sum()}


@pytest.mark.parametrize("function", [two_values, no_tuple, bad_metric])
def test_wrong_returns_are_errors_of_the_loss(function):
    with pytest.raises(CookbookError, match=r"wrong return structure|not usable"):
        loss_of(function)(make_random_data(1), [torch.zeros(3)])


def test_ranks_and_missing_inputs_name_the_datum():
    data = make_random_data(2)
    with pytest.raises(CookbookError, match=r"data\[0\]: logprobs: wrong rank"):
        loss_of(simple, {"logprobs": 2})(data, [torch.zeros(3), torch.zeros(3)])

    def wants(logprobs, advantages):
        return (logprobs * advantages).sum(), {}

    with pytest.raises(CookbookError, match=r'data\[0\].loss_fn_inputs\["advantages"\]: missing'):
        loss_of(wants)(data, [torch.zeros(3), torch.zeros(3)])


def test_one_pass_over_the_wire(running: Running):
    """And a loss that raises stops the step behind it."""
    data = make_random_data(3)
    with Wire(running.url) as client:
        model = client.start()
        made = {
            name: client.call("create_custom_loss", {"session_id": client.session, **body})
            for name, body in (("good", body_of(clipped)), ("bad", body_of(two_values)))
        }
        config = {"loss_id": made["good"]["loss_id"]}
        reply = client.call("forward_backward", scoring(model, 1, data, "custom", config))
        assert reply["metrics"]["passes:max"] == 1.0
        assert {"custom/a:mean", "custom/b:sum", "loss:sum"} <= reply["metrics"].keys()
        config = {"loss_id": made["bad"]["loss_id"]}
        failed = client.promise("forward_backward", scoring(model, 2, data, "custom", config))
        step = client.promise("optim_step", {"model_id": model, "seq_id": 3,
                                             "adam_params": {"learning_rate": 1e-3}})  # fmt: skip
        assert "wrong return structure" in client.result(failed)["error"]
        assert "before it failed" in client.result(step)["error"]
        refused = client.call(
            "create_custom_loss",
            {"session_id": client.session, **changed(target="torch.load", op="call_function")},
        )
        assert "torch.load" in refused["error"]
    with Wire(running.url) as other:  # losses belong to their session
        model = other.start()
        config = {"loss_id": made["good"]["loss_id"]}
        reply = other.call("forward_backward", scoring(model, 1, data, "custom", config))
        assert "no such loss in this session" in reply["error"]
