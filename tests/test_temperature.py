"""Sampling at a temperature and scoring at it agree: logits are divided by it, everywhere."""

from __future__ import annotations

from typing import Any

from cookbook_core import clients, datum_from_prompt_completion, with_inputs
from cookbook_core.backend.local.kept_graphs import digest
from cookbook_core.backend.remote import convert
from cookbook_core.custom_loss import surrogate_datums
from cookbook_core.datums import temperature_of
from cookbook_core.errors import DatumError
from cookbook_core.tinker import Datum, ModelInput, SamplingParams
from tests.follower import float64_norm
from tests.oracles.logprobs import (
    adapter_of,
    assert_close,
    engine_of,
    plain_model,
    take_gradient,
)
from tests.test_gradient_parity import check_parity, squared, tolerance

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

TEMPERATURES = (0.5, 1.0, 1.75, 0.75, 3.0, 1.25)
SECONDS = 60


def tempered(data: list[Datum]) -> list[Datum]:
    pairs = zip(data, TEMPERATURES, strict=True)
    return [with_inputs(d, temperature=t) for d, t in pairs]


def with_shared_prompt() -> list[Datum]:
    """Six answers to one prompt, whose last position all of them score, each at its own T."""
    prompt = list(range(3, 25))
    return tempered([datum_from_prompt_completion(prompt, [30 + i, 40 - i]) for i in range(6)])


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("unembed", [False, True])
@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "granite", "gpt2", "bert"])
def test_equal_to_plain_autograd_in_float64(
    arch: str, unembed: bool, connect: Any, model_folder: Any, random_data: Any, monkeypatch: Any
) -> None:
    """Plain, capped, scaled, padded and no head; one pass, kept graphs dropped, the surrogate."""
    client = connect(arch, "float64", unembed)
    model = plain_model(model_folder(arch), adapter_of(client))
    data = tempered(random_data(6, seed=3, k=3))
    check_parity(client, model, data, squared, tolerance(arch), monkeypatch)


def test_a_shared_row_is_scored_at_each_temperature(
    connect: Any, model_folder: Any, monkeypatch: Any
) -> None:
    """Positions of the prompt are one row of the model's states, but six of logits."""
    monkeypatch.setattr(Qwen3RMSNorm, "forward", float64_norm)  # its own rounds to float32
    client, data = connect("qwen3"), with_shared_prompt()
    model = plain_model(model_folder("qwen3"), adapter_of(client))
    check_parity(client, model, data, squared, 1e-9, monkeypatch)
    assert engine_of(client).scorer.packs
    (batch,) = engine_of(client).scorer.batches(data)
    assert len(batch.targets.rows) == len(set(batch.targets.rows)) + 5 * 22
    together = clients.score(client, data)
    alone = [clients.score(client, [d])[0] for d in data]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_temperature_1_changes_no_bit(connect: Any, random_data: Any) -> None:
    client, data = connect("qwen3", "float32"), random_data(4)
    found = clients.score(client, [with_inputs(d, temperature=1.0) for d in data])
    assert all(map(torch.equal, found, clients.score(client, data)))


@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "bert"])
def test_the_whole_vocabulary_at_a_temperature(arch: str, connect: Any, random_data: Any) -> None:
    """Rows of the vocabulary, indexed at the targets, are what the targets alone give."""
    client, data = connect(arch), tempered(random_data(6, seed=5))

    def indexed(data: list[Datum], rows: list[Any]) -> Any:
        targets = [d.loss_fn_inputs["target_tokens"].to_torch() for d in data]
        at = [torch.arange(len(t)) for t in targets]
        return squared(data, [lp[i, t] for lp, i, t in zip(rows, at, targets, strict=True)])

    want = client.forward_backward_custom(data, squared).result(SECONDS)
    grads = take_gradient(client)
    form = {"loss_type_input": "vocab_logprobs"}
    found = client.forward_backward_custom(data, indexed, **form).result(SECONDS)
    assert found.loss == pytest.approx(want.loss, rel=1e-12)
    assert_close(take_gradient(client), grads, 1e-9)
    assert client.forward(data, indexed, **form).result(SECONDS).loss == pytest.approx(want.loss)


# ---- sampling and scoring ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_before_an_update_the_ratio_is_1(temperature: float, connect: Any) -> None:
    """Pitfall 20, at every temperature: the sampler's numbers against the scorer's, in float64."""
    client = connect()
    sampler = client.save_weights_and_get_sampling_client().result(SECONDS)
    params = SamplingParams(max_tokens=6, temperature=temperature, seed=1, stop=[])
    prompts = [[5, 9, 2, 11], [7, 8]]
    futures = sampler.sample_batch([ModelInput.from_ints(p) for p in prompts], 8, [params] * 2)
    pairs = [(p, s) for p, f in zip(prompts, futures, strict=True) for s in f.result().sequences]
    assert {s.temperature for _, s in pairs} == {temperature}
    data = [clients.sampled_datum(p, s) for p, s in pairs]
    ratios = [
        (lp - d.loss_fn_inputs["sampling_logprobs"].to_torch())[-6:].exp()
        for lp, d in zip(clients.score(client, data), data, strict=True)
    ]
    assert max(float((r - 1).abs().max()) for r in ratios) < 1e-6
    if temperature != 1:  # what scoring without the temperature would have given
        plain = [with_inputs(d, temperature=1.0) for d in data]
        off = zip(clients.score(client, plain), data, strict=True)
        gaps = [(lp - d.loss_fn_inputs["sampling_logprobs"].to_torch())[-6:] for lp, d in off]
        assert max(float(gap.abs().max()) for gap in gaps) > 0.1


def test_greedy_answers_are_scored_at_1(connect: Any) -> None:
    sampler = connect().save_weights_and_get_sampling_client().result(SECONDS)
    params = SamplingParams(max_tokens=3, temperature=0.0, stop=[])
    (s,) = sampler.sample(ModelInput.from_ints([4, 5]), 1, params).result(SECONDS).sequences
    assert s.temperature == 1.0
    assert temperature_of(clients.sampled_datum([4, 5], s)) == 1.0


# ---- what carries it, and what refuses it --------------------------------------------------------


def test_a_graph_kept_at_another_temperature_is_not_used(random_data: Any) -> None:
    data = random_data(2)
    digests = {digest([with_inputs(d, temperature=t) for d in data]) for t in (0.5, 1.0, 2.0)}
    assert len(digests) == 3
    assert digest(data) in digests  # the same as at 1


def test_the_surrogate_carries_it(random_data: Any) -> None:
    data = [with_inputs(d, temperature=0.5, mine=1.0) for d in random_data(2)]
    grads = [torch.ones(d.model_input.length) for d in data]
    found = surrogate_datums(data, grads)
    assert [sorted(d.loss_fn_inputs) for d in found] == [
        ["target_tokens", "temperature", "weights"]
    ] * 2
    assert list(map(temperature_of, found)) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (0.0, "got 0.0"),
        (-1.0, "got -1.0"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
        ([0.5, 0.5], r"got shape \(2,\)"),
    ],
)
def test_what_is_no_temperature_is_refused_by_name(
    wrong: Any, got: str, connect: Any, random_data: Any
) -> None:
    client, data = connect(), random_data(2)
    bad = [with_inputs(data[0], temperature=1.0), with_inputs(data[1], temperature=wrong)]
    with pytest.raises(DatumError, match=rf'data\[1\].*"temperature".*{got}'):
        client.forward_backward_custom(bad, squared)
    assert adapter_of(client).grads is None


def test_a_batch_states_it_on_every_datum_or_on_none(connect: Any, random_data: Any) -> None:
    """Rollouts at 0.7 mixed with datums that state nothing are a mistake, or say temperature=1."""
    client, data = connect(), random_data(2)
    mixed = [with_inputs(data[0], temperature=0.7), data[1]]
    with pytest.raises(DatumError, match=r'data\[1\].*"temperature".*data\[0\] has one'):
        clients.score(client, mixed)
    assert len(clients.score(client, [mixed[0], with_inputs(data[1], temperature=1.0)])) == 2


def test_services_refuse_it_by_name(random_data: Any) -> None:
    data = random_data(2)
    convert.refuse_temperatures([data[0], with_inputs(data[1], temperature=1.0)])
    with pytest.raises(DatumError, match=r'data\[1\].*"temperature".*temperature 1 only.*got 0.7'):
        convert.refuse_temperatures([data[0], with_inputs(data[1], temperature=0.7)])
