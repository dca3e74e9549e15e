"""One pass == two passes == plain autograd, for any loss, on every architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cookbook_core import weighted_sums, with_inputs
from cookbook_core.builtin_losses import BUILTIN_LOSSES, cross_entropy
from cookbook_core.custom_loss import forward_backward_two_pass
from cookbook_core.tinker import Datum, ServiceClient, TrainingClient
from tests.oracles.logprobs import (
    adapter_of,
    assert_close,
    engine_of,
    plain_model,
    randomize,
    slow_gradient,
    slow_logprobs,
    take_gradient,
)

import numpy as np
import pytest
import torch

ARCHS = ["qwen3", "llama", "mistral", "gemma2", "granite", "gpt2", "bert"]
SECONDS = 60


def tolerance(arch: str, dtype: str = "float64") -> float:
    """Relative error allowed. transformers computes Gemma 2's attention softmax in float32 even
    in a float64 model, so there padding shows in the eighth digit."""
    if dtype == "float32":
        return 1e-4
    return 1e-6 if arch == "gemma2" else 1e-9


# ---- losses ---------------------------------------------------------------------------------


def dpo_like(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    """-log sigmoid(beta * margin) over interleaved pairs: datums depend on one another."""
    ratios = weighted_sums(data, logprobs) - weighted_sums(data, "ref_logprobs").to(logprobs[0])
    margin = ratios[0::2] - ratios[1::2]
    return -torch.nn.functional.logsigmoid(0.1 * margin).mean(), {"margin": margin.mean()}


def squared(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    """Sum of squared logprobs: the gradient depends on the logprobs' own values."""
    del data
    return sum((lp**2).sum() for lp in logprobs), {}


def variance(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    """Variance of the sequences' mean logprobs: every datum acts on every other."""
    del data
    return torch.stack([lp.mean() for lp in logprobs]).var(), {}


def token_set_kl(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    """KL(target || model renormalised over K candidates), summed over all positions."""
    total = logprobs[0].new_zeros(())
    for datum, lp in zip(data, logprobs, strict=True):
        target = datum.loss_fn_inputs["probs"].to_torch().to(lp)
        total = total + (target * (target.log() - lp.log_softmax(-1))).sum()
    return total, {}


LOSSES: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (dpo_like, squared, variance, token_set_kl, cross_entropy)
}


def data_for(loss_name: str, random_data: Callable[..., list[Datum]]) -> list[Datum]:
    """Ragged datums (6, so 3 pairs) with the side data the loss asks for."""
    rng = np.random.default_rng(7)
    if loss_name == "token_set_kl":
        data = random_data(6, seed=3, k=4)
        shapes = [tuple(d.loss_fn_inputs["target_tokens"].shape) for d in data]
        return [
            with_inputs(d, probs=rng.dirichlet(np.ones(s[1]), size=s[0]))
            for d, s in zip(data, shapes, strict=True)
        ]
    data = random_data(6, seed=4)
    return [with_inputs(d, ref_logprobs=-rng.uniform(1, 5, d.model_input.length)) for d in data]


# ---- clients ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(model_folder: Callable[..., str]) -> Callable[..., Any]:
    """The plain float64 peft model with the client's adapter."""
    made: dict[int, Any] = {}

    def model(arch: str, client: TrainingClient) -> Any:
        if id(client) not in made:
            made[id(client)] = plain_model(model_folder(arch), adapter_of(client))
        return made[id(client)]

    return model


def gradient(client: TrainingClient, data: list[Datum], loss_fn: Any) -> tuple[Any, Any]:
    output = client.forward_backward_custom(data, loss_fn).result(SECONDS)
    return output, take_gradient(client)


def double(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: g.double() for key, g in grads.items()}


def check_parity(
    client: TrainingClient,
    model: Any,
    data: list[Datum],
    loss_fn: Any,
    rel: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss, logprobs and gradient of the three ways against the slow one."""
    value, expected = slow_gradient(model, data, loss_fn)
    engine = engine_of(client)

    one, one_grads = gradient(client, data, loss_fn)
    surrogate = forward_backward_two_pass(client, data, loss_fn)
    surrogate_grads = take_gradient(client)
    with monkeypatch.context() as patch:
        patch.setattr(engine.limits, "graph_tokens", 0)
        patch.setattr(engine.scorer, "micro_batch_tokens", 24)  # several micro-batches
        two, two_grads = gradient(client, data, loss_fn)

    assert one.metrics["passes"] == 1.0
    assert two.metrics["passes"] == 2.0
    for output, grads in (
        (one, one_grads),
        (surrogate, surrogate_grads),
        (two, two_grads),
    ):
        assert output.metrics["loss"] == pytest.approx(value, rel=rel)
        assert_close(double(grads), expected, rel)
        for out, datum in zip(output.loss_fn_outputs, data, strict=True):
            want = slow_logprobs(model, datum).detach()
            torch.testing.assert_close(
                out["logprobs"].to_torch().double(), want, rtol=rel, atol=rel
            )


# ---- parity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("arch", ARCHS)
def test_three_ways_equal_autograd_in_float64(
    arch: str,
    loss_name: str,
    connect: Callable[..., TrainingClient],
    oracle: Callable[..., Any],
    random_data: Callable[..., list[Datum]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pitfall 4: ragged datums in padded batches have exactly the gradient of one by one."""
    client = connect(arch)
    data = data_for(loss_name, random_data)
    check_parity(
        client, oracle(arch, client), data, LOSSES[loss_name], tolerance(arch), monkeypatch
    )


@pytest.mark.parametrize("loss_name", ["dpo_like", "token_set_kl"])
@pytest.mark.parametrize("arch", ARCHS)
def test_three_ways_equal_autograd_in_float32(
    arch: str,
    loss_name: str,
    connect: Callable[..., TrainingClient],
    oracle: Callable[..., Any],
    random_data: Callable[..., list[Datum]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pitfall 5: the default dtype stays within 1e-4 of the float64 oracle, positions included."""
    client = connect(arch, "float32")
    data = data_for(loss_name, random_data)
    check_parity(
        client,
        oracle(arch, client),
        data,
        LOSSES[loss_name],
        tolerance(arch, "float32"),
        monkeypatch,
    )


@pytest.mark.parametrize("loss_name", ["dpo_like", "token_set_kl"])
@pytest.mark.parametrize("arch", ["qwen3", "llama", "gemma2", "granite", "gpt2", "bert"])
def test_lora_on_the_unembedding_tied_and_untied(
    arch: str,
    loss_name: str,
    connect: Callable[..., TrainingClient],
    oracle: Callable[..., Any],
    random_data: Callable[..., list[Datum]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pitfall 3: with the unembedding trained too, gradients stay those of plain autograd."""
    client = connect(arch, "float64", True)
    trained = adapter_of(client).slot.params
    assert any("lm_head" in key or "decoder" in key for key in trained)
    data = data_for(loss_name, random_data)
    check_parity(
        client, oracle(arch, client), data, LOSSES[loss_name], tolerance(arch), monkeypatch
    )


def test_each_architecture_takes_the_path_it_is_here_for(
    connect: Callable[..., TrainingClient],
) -> None:
    """The suite above covers: plain, soft-capped and scaled heads, and the fallback without one."""
    heads = {arch: engine_of(connect(arch)).scorer.head for arch in ARCHS}
    assert heads.pop("bert") is None
    found = {arch: (head.scale, head.softcap) for arch, head in heads.items()}
    plain = dict.fromkeys(["qwen3", "llama", "mistral", "gpt2"], (1.0, None))
    assert found == {**plain, "gemma2": (1.0, 3.0), "granite": (pytest.approx(1 / 3), None)}


@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "granite"])
def test_fallback_without_a_head_gives_the_same(
    arch: str,
    connect: Callable[..., TrainingClient],
    random_data: Callable[..., list[Datum]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Soft-capped and scaled logits: the shortcut equals log_softmax of the model's own logits."""
    client = connect(arch)
    data = data_for("squared", random_data)
    output, expected = gradient(client, data, squared)
    monkeypatch.setattr(engine_of(client).scorer, "head", None)
    again, found = gradient(client, data, squared)
    assert_close(found, expected, 1e-9)
    assert again.loss == pytest.approx(output.loss, rel=1e-12)


def test_a_frozen_unembedding_under_another_clients_lora(
    model_folder: Callable[..., str],
    make_service: Callable[..., ServiceClient],
    random_data: Callable[..., list[Datum]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pitfall 28: LoRA that another client put on lm_head neither acts nor gets a gradient here."""
    folder, service = model_folder("qwen3"), make_service(dtype="float64")
    makers = [
        service.create_lora_training_client(folder, rank=4, seed=i, train_unembed=unembed)
        for i, unembed in enumerate((True, False))
    ]
    data = data_for("dpo_like", random_data)
    clients = [made.result(SECONDS) for made in makers]
    for seed, client in enumerate(clients):
        randomize(client, seed)
    for client in (*clients, *clients):  # each after the other one has been active
        model = plain_model(folder, adapter_of(client))
        check_parity(client, model, data, dpo_like, 1e-9, monkeypatch)


def test_one_batch_may_mix_single_and_multiple_targets(
    connect: Callable[..., TrainingClient],
    oracle: Callable[..., Any],
    random_data: Callable[..., list[Datum]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Datums of (N,), (N, 1) and (N, 3) targets in one batch come back in order and in shape."""
    data = [
        datum
        for group in zip(
            random_data(2, seed=1),
            random_data(2, seed=2, k=1),
            random_data(2, seed=3, k=3),
            strict=True,
        )
        for datum in group
    ]
    client = connect("gpt2")
    check_parity(client, oracle("gpt2", client), data, squared, 1e-9, monkeypatch)
    output = client.forward(data, "cross_entropy").result(SECONDS)
    shapes = [out["logprobs"].shape for out in output.loss_fn_outputs]
    assert shapes == [d.loss_fn_inputs["target_tokens"].shape for d in data]


def test_a_step_along_the_gradient_changes_the_loss_as_the_gradient_says(
    connect: Callable[..., TrainingClient], random_data: Callable[..., list[Datum]]
) -> None:
    """Central difference along a random direction: (L(+h) - L(-h)) / 2h == gradient . direction.

    Independent of autograd altogether. GPT-2, because its norms stay in float64; h = 1e-5, where
    the error of the difference is below 1e-6.
    """
    client, data = connect("gpt2"), data_for("dpo_like", random_data)
    _, grads = gradient(client, data, dpo_like)
    params = adapter_of(client).params
    start = [p.detach().clone() for p in params]
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]

    def loss_at(h: float) -> float:
        for p, s, d in zip(params, start, along, strict=True):
            p.data.copy_(s + h * d)
        output, _ = gradient(client, data, dpo_like)
        return output.loss

    slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    loss_at(0.0)
    expected = sum(float((g * d).sum()) for g, d in zip(grads.values(), along, strict=True))
    assert slope == pytest.approx(expected, rel=1e-5)


# ---- accumulation -------------------------------------------------------------------------------


def with_rl_inputs(data: list[Datum]) -> list[Datum]:
    """Sampling logprobs and advantages, as the built-in policy-gradient losses need them."""
    rng = np.random.default_rng(5)
    return [
        with_inputs(
            d,
            logprobs=-rng.uniform(3, 7, d.model_input.length),
            advantages=rng.normal(size=d.model_input.length),
        )
        for d in data
    ]


@pytest.mark.parametrize("loss_name", BUILTIN_LOSSES)
def test_one_call_of_8_equals_8_calls_of_1(
    loss_name: str,
    connect: Callable[..., TrainingClient],
    random_data: Callable[..., list[Datum]],
) -> None:
    """Pitfall 1: for losses that sum over tokens gradients add up, whatever the lengths."""
    client = connect("qwen3")
    data = with_rl_inputs(random_data(8, seed=9, lengths=(2, 20)))
    assert len({d.model_input.length for d in data}) > 3, "lengths should differ"
    whole = client.forward_backward(data, loss_name).result(SECONDS)
    expected = take_gradient(client)
    parts = [client.forward_backward([d], loss_name).result(SECONDS) for d in data]
    assert sum(p.loss for p in parts) == pytest.approx(whole.loss, rel=1e-12)
    assert_close(take_gradient(client), expected, 1e-9)


def test_accumulated_calls_step_like_one_call(
    model_folder: Callable[..., str],
    make_service: Callable[..., ServiceClient],
    random_data: Callable[..., list[Datum]],
) -> None:
    """Pitfall 1: 1 x 8 and 8 x 1 lead to the same weights after the optimizer step."""
    from cookbook_core.tinker import AdamParams

    service = make_service(dtype="float64")
    data = random_data(8, seed=10)
    adapters = []
    for batches in ([data], [[d] for d in data]):
        client = service.create_lora_training_client(model_folder(), rank=4, seed=0).result(SECONDS)
        randomize(client, 3)
        for batch in batches:
            client.forward_backward(batch, "cross_entropy")
        step = client.optim_step(AdamParams(learning_rate=1e-2)).result(SECONDS)
        assert step.metrics["update_norm"] > 0
        adapters.append([p.detach().clone() for p in adapter_of(client).params])
    for one, other in zip(*adapters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss_name", ["squared", "variance", "cross_entropy"])
def test_order_of_datums_does_not_matter(
    loss_name: str,
    connect: Callable[..., TrainingClient],
    random_data: Callable[..., list[Datum]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same loss, same gradient, and each datum keeps its own logprobs, in any order."""
    client = connect("llama")
    monkeypatch.setattr(engine_of(client).scorer, "micro_batch_tokens", 24)
    data = data_for(loss_name, random_data)
    order = [4, 0, 5, 2, 1, 3]
    straight, expected = gradient(client, data, LOSSES[loss_name])
    shuffled, found = gradient(client, [data[i] for i in order], LOSSES[loss_name])
    assert shuffled.loss == pytest.approx(straight.loss, rel=1e-12)
    assert_close(found, expected, 1e-9)
    for place, i in enumerate(order):
        torch.testing.assert_close(
            shuffled.loss_fn_outputs[place]["logprobs"].to_torch(),
            straight.loss_fn_outputs[i]["logprobs"].to_torch(),
            rtol=1e-12,
            atol=1e-12,
        )


def test_the_sum_of_two_different_losses_accumulates(
    connect: Callable[..., TrainingClient],
    oracle: Callable[..., Any],
    random_data: Callable[..., list[Datum]],
) -> None:
    """Pitfall 1: two calls with different losses leave the sum of their gradients."""
    client = connect("qwen3")
    data = data_for("dpo_like", random_data)
    client.forward_backward_custom(data, dpo_like)
    client.forward_backward(data[:3], "cross_entropy").result(SECONDS)
    found = take_gradient(client)
    model = oracle("qwen3", client)
    _, first = slow_gradient(model, data, dpo_like)
    _, second = slow_gradient(model, data[:3], cross_entropy)
    assert_close(found, {key: first[key] + second[key] for key in first}, 1e-9)
