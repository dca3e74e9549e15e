"""One path from datums to logprobs: batching must not show in the numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cookbook_core import weighted_sums, with_inputs
from cookbook_core.backend.local.scoring import attention, packing_check
from cookbook_core.backend.local.scoring.scorer import Scorer
from cookbook_core.tinker import (
    AdamParams,
    Datum,
    ModelInput,
    SamplingParams,
    ServiceClient,
    TrainingClient,
)
from tests.oracles.logprobs import (
    adapter_of,
    engine_of,
    plain_model,
    randomize,
    slow_logprobs,
    take_gradient,
)

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SECONDS = 60
ARCHS = ["qwen3", "llama", "mistral", "gemma2", "granite", "gpt2", "bert"]


@pytest.fixture
def connect(
    make_service: Callable[..., ServiceClient], model_folder: Callable[..., str]
) -> Callable[..., TrainingClient]:
    """A client with random A and B on a tiny model of this architecture."""

    def make(arch: str = "qwen3", dtype: str = "float32", **options: Any) -> TrainingClient:
        made = make_service(dtype=dtype).create_lora_training_client(
            model_folder(arch), **{"rank": 4, "seed": 0, **options}
        )
        client = made.result(SECONDS)
        randomize(client)
        return client

    return make


def logprobs_of(client: TrainingClient, data: list[Datum]) -> list[torch.Tensor]:
    output = client.forward(data, "cross_entropy").result(SECONDS)
    return [out["logprobs"].to_torch() for out in output.loss_fn_outputs]


# ---- batching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_ragged_batch_equals_one_by_one(
    arch: str,
    k: int | None,
    connect: Callable[..., TrainingClient],
    random_data: Callable[..., list[Datum]],
    model_folder: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pitfalls 4, 5, 32: padding, positions and neighbours change no datum's logprobs.

    Absolute and rotary positions, sliding windows shorter than the datums; against a plain model
    with eager attention, which shares no kernel with what is tested.
    """
    client = connect(arch, "float64")
    data = random_data(7, seed=2, k=k, lengths=(1, 25))
    assert len({d.model_input.length for d in data}) >= 5
    model = plain_model(model_folder(arch), adapter_of(client), attention="eager")
    expected = [slow_logprobs(model, d).detach() for d in data]
    for budget in (2048, 40, 1):
        monkeypatch.setattr(engine_of(client).scorer, "micro_batch_tokens", budget)
        for found, single, datum in zip(logprobs_of(client, data), expected, data, strict=True):
            assert found.shape == single.shape
            # eager attention takes its softmax in float32
            torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-5)
            (alone,) = logprobs_of(client, [datum])
            torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)


def test_the_oracle_sees_a_shift_of_positions(
    connect: Callable[..., TrainingClient], model_folder: Callable[..., str]
) -> None:
    """Pitfall 5: a guard of the guard: with positions off by one the numbers above do differ."""
    client = connect("gpt2", "float64")
    model = plain_model(model_folder("gpt2"), adapter_of(client))
    ids = torch.tensor([[5, 6, 7, 8]])
    shifted = model(input_ids=ids, position_ids=torch.arange(1, 5)[None]).logits
    straight = model(input_ids=ids).logits
    assert float((shifted - straight).abs().max()) > 0.1


def test_the_window_of_the_sliding_model_bites(
    random_data: Callable[..., list[Datum]], model_folder: Callable[..., str]
) -> None:
    """A guard of the guard: a token 9 back is out of the window of 8 in both layers' first step."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("mistral"), num_hidden_layers=1)
    ids = torch.arange(10, 30)[None]
    other = ids.clone()
    other[0, 0] = 99
    with torch.no_grad():
        change = (model(input_ids=ids).logits - model(input_ids=other).logits)[0].abs().amax(-1)
    assert float(change[7]) > 1e-4
    assert float(change[8:].max()) == 0.0


def test_padded_batches_cover_every_datum_once_within_the_budget(
    connect: Callable[..., TrainingClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where packing does not fit: padded tokens stay within the budget unless a single datum
    exceeds it; ties keep order."""
    scorer = engine_of(connect()).scorer
    monkeypatch.setattr(scorer, "packs", False)
    monkeypatch.setattr(scorer, "micro_batch_tokens", 30)
    rng = random.Random(0)
    lengths = [rng.randint(1, 40) for _ in range(50)]
    data = [Datum(ModelInput.from_ints([1] * n), {"target_tokens": [2] * n}) for n in lengths]
    batches = scorer.batches(data)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(50))
    for batch in batches:
        assert batch.tokens == len(batch.indices) * max(lengths[i] for i in batch.indices)
        assert batch.tokens <= 30 or len(batch.indices) == 1
    assert len(batches) < 45, "nothing was batched"
    even = [Datum(ModelInput.from_ints([1] * 10), {"target_tokens": [2] * 10})] * 7
    assert [b.indices for b in scorer.batches(even)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_pad_token_inside_a_sequence_is_a_token(
    connect: Callable[..., TrainingClient], model_folder: Callable[..., str]
) -> None:
    """Pitfall 5: id 0 is the pad token and pads the batch, and may be real as well."""
    client = connect("qwen3", "float64")
    model = plain_model(model_folder("qwen3"), adapter_of(client))
    data = [
        Datum(ModelInput.from_ints(ids), {"target_tokens": [7] * len(ids)})
        for ids in ([0, 0, 5, 0], [0], [5, 0, 0, 0, 0, 6])
    ]
    for found, datum in zip(logprobs_of(client, data), data, strict=True):
        torch.testing.assert_close(found, slow_logprobs(model, datum).detach())


# ---- the same function everywhere ---------------------------------------------------------------


@pytest.mark.parametrize("train_unembed", [False, True])
@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "bert"])
def test_forward_and_forward_backward_give_the_same_bits(
    arch: str,
    train_unembed: bool,
    connect: Callable[..., TrainingClient],
    random_data: Callable[..., list[Datum]],
) -> None:
    """Pitfall 20: reference logprobs from `forward` are the policy's: the margin is exactly 0."""
    client, data = connect(arch, train_unembed=train_unembed), random_data(6)
    reference = logprobs_of(client, data)
    data = [with_inputs(d, ref_logprobs=lp) for d, lp in zip(data, reference, strict=True)]

    def dpo(got: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        ratios = weighted_sums(got, logprobs) - weighted_sums(got, "ref_logprobs")
        margin = ratios[0::2] - ratios[1::2]
        return -torch.nn.functional.logsigmoid(margin).mean(), {"margin": margin.abs().max()}

    output = client.forward_backward_custom(data, dpo).result(SECONDS)
    assert output.metrics["margin"] == 0.0
    for out, lp in zip(output.loss_fn_outputs, reference, strict=True):
        assert torch.equal(out["logprobs"].to_torch(), lp)


def test_scoring_and_sampling_leave_no_trace(
    connect: Callable[..., TrainingClient], random_data: Callable[..., list[Datum]]
) -> None:
    """Pitfall 29: forward, compute_logprobs and sample change neither gradient nor weights."""
    client, data = connect(), random_data(4)
    client.forward_backward(data, "cross_entropy").result(SECONDS)
    adapter = adapter_of(client)
    grads = [g.clone() for g in adapter.grads]
    params = [p.detach().clone() for p in adapter.params]
    logprobs_of(client, data)
    sampler = client.save_weights_and_get_sampling_client().result(SECONDS)
    sampler.compute_logprobs(data[0].model_input).result(SECONDS)
    sampler.sample(data[0].model_input, 2, SamplingParams(max_tokens=3, stop=[])).result(SECONDS)
    assert all(torch.equal(a, b) for a, b in zip(grads, adapter.grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(params, adapter.params, strict=True))
    assert all(p.grad is None for p in engine_of(client).base.model.parameters())


def test_forward_alone_accumulates_nothing(
    connect: Callable[..., TrainingClient], random_data: Callable[..., list[Datum]]
) -> None:
    """Pitfall 29: after an evaluation only, there is nothing to step on."""
    from cookbook_core.errors import RequestError

    client = connect()
    logprobs_of(client, random_data(2))
    assert adapter_of(client).grads is None
    with pytest.raises(RequestError, match="no gradient"):
        client.optim_step(AdamParams()).result(SECONDS)


def test_prompt_logprobs_come_through_the_same_path(
    connect: Callable[..., TrainingClient],
) -> None:
    """compute_logprobs of a snapshot equals forward, None in front."""
    client, tokens = connect(), [5, 9, 33, 2, 71]
    sampler = client.save_weights_and_get_sampling_client().result(SECONDS)
    found = sampler.compute_logprobs(ModelInput.from_ints(tokens)).result(SECONDS)
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    (expected,) = logprobs_of(client, [datum])
    assert found == [None, *expected.tolist()]


def test_the_adapter_matters(
    connect: Callable[..., TrainingClient], random_data: Callable[..., list[Datum]]
) -> None:
    """Pitfall 24: with random A and B logprobs differ from the bare model's: nothing is scored
    by accident on the base; and a fresh adapter (B = 0) is the bare model to the bit (without LoRA
    on the unembedding, which takes other kernels)."""
    client, data = connect(train_unembed=False), random_data(2)
    trained = logprobs_of(client, data)
    for key, p in zip(adapter_of(client).slot.params, adapter_of(client).params, strict=True):
        if ".lora_B." in key:
            p.data.zero_()
    fresh = logprobs_of(client, data)
    with engine_of(client).bank.active(None), torch.no_grad():
        bare = engine_of(client).scorer.score(data)
    assert all(torch.equal(a, b) for a, b in zip(fresh, bare, strict=True))
    assert float((torch.cat(trained) - torch.cat(fresh)).abs().max()) > 0.1


# ---- bfloat16 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train_unembed", [False, True])
@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "bert"])
def test_bfloat16_model_gives_float32_logprobs(
    arch: str,
    train_unembed: bool,
    connect: Callable[..., TrainingClient],
    random_data: Callable[..., list[Datum]],
    model_folder: Callable[..., str],
) -> None:
    """Pitfall 22: float32, <= 0, between bfloat16's steps, close to a softmax in float32.

    The plain model's own bfloat16 logits, widened to float32 before the softmax, are the mark; a
    logit of 8 has steps of 1/32, so 0.15 leaves room for two roundings and catches a wrong head.
    """
    client = connect(arch, "bfloat16", train_unembed=train_unembed)
    data = random_data(5, lengths=(4, 14))
    found = logprobs_of(client, data)
    model = plain_model(model_folder(arch), adapter_of(client), torch.bfloat16)
    for lp, datum in zip(found, data, strict=True):
        assert lp.dtype == torch.float32
        assert float(lp.max()) <= 0
        logits = model(input_ids=torch.tensor([datum.model_input.to_ints()])).logits[0]
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()[:, None]
        wide = torch.log_softmax(logits.detach().float(), -1).gather(1, targets)[:, 0]
        torch.testing.assert_close(lp, wide, rtol=0, atol=0.15)
    every = torch.cat(found)
    assert not torch.equal(every, every.bfloat16().float()), "rounded to bfloat16 on the way"


def test_adapters_stay_float32_over_a_bfloat16_base(
    connect: Callable[..., TrainingClient], random_data: Callable[..., list[Datum]]
) -> None:
    """Pitfall 25: parameters and gradients are float32, and a step at lr 1e-5 moves them all."""
    client = connect("qwen3", "bfloat16")
    client.forward_backward(random_data(4), "cross_entropy").result(SECONDS)
    adapter = adapter_of(client)
    assert {p.dtype for p in adapter.params} == {torch.float32}
    assert {g.dtype for g in adapter.grads} == {torch.float32}
    before = [p.detach().clone() for p in adapter.params]
    client.optim_step(AdamParams(learning_rate=1e-5)).result(SECONDS)
    assert not any(torch.equal(a, b) for a, b in zip(before, adapter.params, strict=True))


def test_gradients_of_a_bfloat16_model_point_the_right_way(
    connect: Callable[..., TrainingClient], random_data: Callable[..., list[Datum]]
) -> None:
    """Pitfall 22: cosine with the float32 gradient above 0.99 over all parameters."""
    grads = []
    for dtype in ("bfloat16", "float32"):
        client = connect("qwen3", dtype)
        client.forward_backward(random_data(8), "cross_entropy").result(SECONDS)
        grads.append(torch.cat([g.flatten() for g in take_gradient(client).values()]))
    assert float(torch.nn.functional.cosine_similarity(*grads, dim=0)) > 0.99


# ---- the check of packed rows -------------------------------------------------------------------


def deep_model(device_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """28 layers in bfloat16, weights four times as large as they start: rounding adds up."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=28,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(4)
    if device_blocks:
        monkeypatch.setattr(packing_check, "SHORT", packing_check.LONG)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("device_blocks", [False, True])
def test_rounding_in_a_deep_model_does_not_count_against_packing(
    device_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a bound on the largest difference refused deep models in bfloat16."""
    model = deep_model(device_blocks, monkeypatch)
    ratios: list[float] = []
    rms_ratio = packing_check.rms_ratio

    def noted(*tensors: torch.Tensor) -> float:
        ratios.append(rms_ratio(*tensors))
        return ratios[-1]

    monkeypatch.setattr(packing_check, "rms_ratio", noted)
    scorer = Scorer(model, torch.device("cpu"))
    assert scorer.packs
    assert max(ratios) > 1e-3, "there is rounding to tolerate"


class WrongBackward(torch.autograd.Function):
    """The identity, whose gradient is halved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] / 2


class NoBackward(WrongBackward):
    """As a kernel that needs more shared memory than the device has."""

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "out of resource: shared memory, Required: 114688, Hardware limit: 101376"
        )


def window_ignored(*args: Any, **options: Any) -> Any:
    return attention.packed_attention(*args, **{**options, "sliding_window": None})


def prefix_unseen(*args: Any, layout: Any, **options: Any) -> Any:
    alone = [replace(s, above=(), subtree_stop=s.stop) for s in layout.segments]
    return attention.packed_attention(*args, layout=replace(layout, segments=alone), **options)


def through(function: Any) -> Any:
    def wrong(*args: Any, **options: Any) -> Any:
        out, _ = attention.packed_attention(*args, **options)
        return function.apply(out), None

    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (window_ignored, "hidden states differ by"),
        (prefix_unseen, "hidden states differ by"),
        (through(WrongBackward), "gradients differ by"),
        (through(NoBackward), "RuntimeError: out of resource: shared memory"),
    ],
    ids=["window ignored", "prefix unseen", "wrong backward", "no backward"],
)
def test_a_wrong_attention_is_found_out(
    wrong: Any,
    reason: str,
    dtype: torch.dtype,
    model_folder: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Bug: the check had no gradient: a backward that failed surfaced in the first step."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("mistral"), dtype=dtype)
    model.eval().requires_grad_(False)
    assert Scorer(model, torch.device("cpu")).packs
    assert not caplog.records
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, wrong)
    assert not Scorer(model, torch.device("cpu")).packs
    (record,) = caplog.records
    assert "MistralForCausalLM" in record.getMessage()
    assert f"on cpu ({reason}" in record.getMessage()


def test_running_out_of_memory_does_not_decide_how_a_model_is_scored(
    model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows differ from packed ones in last bits: free memory must not choose."""

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = AutoModelForCausalLM.from_pretrained(model_folder("qwen3")).eval()
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, full)
    with pytest.raises(torch.OutOfMemoryError):
        Scorer(model, torch.device("cpu"))
