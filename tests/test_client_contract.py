"""What any backend behind the client must do; written against the client alone where it can be."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

from cookbook_core import datum_from_prompt_completion, tinker, with_inputs
from cookbook_core.errors import CheckpointError
from cookbook_core.tinker import AdamParams, ModelInput, SamplingParams
from recipes.dpo import dpo_loss

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

VOCAB = 100


def weights_of(client: Any) -> list[bytes]:
    """The adapter's bytes."""
    return [p.detach().numpy().tobytes() for p in client._backend._adapter.params]


def grads_of(client: Any) -> list[torch.Tensor] | None:
    grads = client._backend._adapter.grads
    return None if grads is None else [g.clone() for g in grads]


def logprobs_of(client: Any, data: list[tinker.Datum]) -> list[torch.Tensor]:
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    return [output["logprobs"].to_torch() for output in outputs]


def train(client: Any, data: list[tinker.Datum], steps: int, lr: float = 1e-2) -> None:
    for _ in range(steps):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(AdamParams(learning_rate=lr)).result()


@pytest.fixture
def data(random_data):
    return random_data(4, seed=1)


@pytest.fixture
def client(service, model_folder):
    return service.create_lora_training_client(model_folder("qwen3"), rank=4, seed=0).result()


# ---- requests -----------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_futures_come_at_once_and_run_in_order(client, data):
    """The loss of the first request blocks; everything behind it is accepted, then runs."""
    release, order = threading.Event(), []

    def slow(data, logprobs):
        assert release.wait(30)
        order.append("slow")
        return -sum(lp.sum() for lp in logprobs), {}

    def quick(data, logprobs):
        order.append("quick")
        return -sum(lp.sum() for lp in logprobs), {}

    start = time.monotonic()
    first = client.forward_backward_custom(data, slow)
    second = client.forward_backward_custom(data, quick)
    stepped = client.optim_step(AdamParams())
    assert time.monotonic() - start < 5
    assert order == []
    release.set()
    assert stepped.result().metrics["grad_norm"] > 0
    assert order == ["slow", "quick"]
    assert first.result().loss == second.result().loss


def test_await_and_async_names(client, data, service, model_folder):
    async def run() -> list[float]:
        first = await client.forward_async(data, "cross_entropy")
        backward = await client.forward_backward_async(data, "cross_entropy")
        stepped = await client.optim_step_async(AdamParams())
        sampler = await client.save_weights_and_get_sampling_client_async()
        prompt = ModelInput.from_ints([5, 6])
        sampled = await sampler.sample_async(prompt, 2, SamplingParams(max_tokens=3))
        assert len(sampled.sequences) == 2
        assert len(await sampler.compute_logprobs_async(prompt)) == 2
        other = await service.create_lora_training_client_async(model_folder("qwen3"), rank=2)
        assert other.get_info().lora_rank == 2
        await stepped
        return [(await first).loss, (await backward.result_async()).loss]

    a, b = asyncio.run(run())
    assert a == b


def test_results(client, data):
    """`loss`, `loss:sum`, `.loss`, the user's metrics; logprobs in the shape of the targets."""
    extra = [with_inputs(d, note=torch.tensor([1.0, 2.0, 3.0])) for d in data]
    seen = []

    def loss(data, logprobs):
        seen.append([d.loss_fn_inputs["note"].tolist() for d in data])
        assert all(given is mine for given, mine in zip(data, extra, strict=True))
        return -sum(lp.sum() for lp in logprobs), {"mine": torch.tensor(3.5), "whole": 2}

    result = client.forward_backward_custom(extra, loss).result()
    assert seen == [[[1.0, 2.0, 3.0]] * 4], "the loss runs exactly once, with the extra inputs"
    assert result.metrics["mine"] == 3.5
    assert result.metrics["whole"] == 2.0
    assert result.loss == result.metrics["loss"] == result.metrics["loss:sum"]
    assert result.metrics["passes"] == 1.0
    for output, datum in zip(result.loss_fn_outputs, data, strict=True):
        assert output["logprobs"].shape == datum.loss_fn_inputs["target_tokens"].shape
    total = sum(float(lp.sum()) for lp in logprobs_of(client, data))
    assert result.loss == pytest.approx(-total, rel=1e-6)


def test_accumulation_is_a_sum(client, random_data):
    """Pitfall 1: one call of 8 datums of unequal length == 8 calls of 1."""
    data = random_data(8, seed=3)
    client.forward_backward(data, "cross_entropy").result()
    whole = grads_of(client)
    client.optim_step(AdamParams(learning_rate=0.0)).result()
    for datum in data:
        client.forward_backward([datum], "cross_entropy").result()
    for a, b in zip(whole, grads_of(client), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_forward_and_sampling_leave_gradients_untouched(client, data):
    """Pitfall 29: evaluation accumulates gradient."""
    client.forward_backward(data, "cross_entropy").result()
    before, weights = grads_of(client), weights_of(client)
    client.forward(data, "cross_entropy").result()
    sampler = client.save_weights_and_get_sampling_client().result()
    sampler.sample(ModelInput.from_ints([5, 6]), 2, SamplingParams(max_tokens=4)).result()
    sampler.compute_logprobs(ModelInput.from_ints([5, 6, 7])).result()
    for a, b in zip(before, grads_of(client), strict=True):
        assert torch.equal(a, b)
    assert weights == weights_of(client)


# ---- the optimizer ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adam",
    [
        AdamParams(learning_rate=1e-2),
        AdamParams(learning_rate=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6),
        AdamParams(learning_rate=1e-2, grad_clip_norm=0.05),
    ],
)
def test_optim_step_is_adamw(make_service, model_folder, data, adam):
    """Against AdamW written out from its paper (1711.05101, algorithm 2), three steps, float64."""
    service = make_service(dtype="float64")
    client = service.create_lora_training_client(model_folder("qwen3"), rank=2, seed=0).result()
    adapter = client._backend._adapter
    params = [p.detach().clone() for p in adapter.params]
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    for t in (1, 2, 3):
        client.forward_backward(data, "cross_entropy").result()
        grads = grads_of(client)
        metrics = client.optim_step(adam).result().metrics
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-9)
        if adam.grad_clip_norm and norm > adam.grad_clip_norm:
            grads = [g * adam.grad_clip_norm / (norm + 1e-6) for g in grads]
        moved = 0.0
        for i, g in enumerate(grads):
            m[i] = adam.beta1 * m[i] + (1 - adam.beta1) * g
            v[i] = adam.beta2 * v[i] + (1 - adam.beta2) * g**2
            m_hat, v_hat = m[i] / (1 - adam.beta1**t), v[i] / (1 - adam.beta2**t)
            old = params[i].clone()
            params[i] = old * (1 - adam.learning_rate * adam.weight_decay)
            params[i] -= adam.learning_rate * m_hat / (v_hat.sqrt() + adam.eps)
            moved += float(((params[i] - old) ** 2).sum())
        for ours, reference in zip(adapter.params, params, strict=True):
            assert torch.allclose(ours, reference, rtol=1e-7, atol=1e-10)
        assert metrics["update_norm"] == pytest.approx(moved**0.5, rel=1e-6)
        assert metrics["lr"] == adam.learning_rate
    assert grads_of(client) is None


# ---- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(4, 2), (4, 4)])  # equal ranks share one slot in the model
def test_clients_of_one_base_do_not_touch_each_other(
    make_service, model_folder, random_data, ranks
):
    """Pitfall 28: two interleaved clients equal their isolated runs, byte for byte."""
    folder, batches = model_folder("qwen3"), [random_data(3, seed=s) for s in (1, 2)]

    def isolated(i: int) -> list[bytes]:
        client = make_service().create_lora_training_client(folder, ranks[i], seed=i).result()
        train(client, batches[i], 3)
        return weights_of(client)

    expected = [isolated(0), isolated(1)]
    service = make_service()
    making = [service.create_lora_training_client(folder, ranks[i], seed=i) for i in (0, 1)]
    clients = [future.result() for future in making]
    for _ in range(3):
        for client, batch in zip(clients, batches, strict=True):
            client.forward_backward(batch, "cross_entropy")
        for client in clients:
            client.save_weights_and_get_sampling_client().result()
            client.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert [weights_of(c) for c in clients] == expected


def test_seeds(make_service, model_folder):
    """Pitfall 35: the same seed gives the same adapter bytes, another seed others."""
    folder = model_folder("qwen3")
    made = [
        weights_of(make_service().create_lora_training_client(folder, rank=4, seed=seed).result())
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1]
    assert made[0] != made[2]


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_a_fresh_adapter_changes_nothing_and_can_learn(service, model_folder, random_data, arch):
    """Pitfall 24: A != 0, B = 0, logprobs those of the bare base model to the bit."""
    folder, data = model_folder(arch), random_data(3)
    client = service.create_lora_training_client(
        folder, rank=4, seed=0, train_unembed=False
    ).result()
    for key, p in client._backend._adapter.named().items():
        assert bool((p != 0).any()) == (".lora_A." in key)
    base = service.create_sampling_client(base_model=folder).result()
    datum = data[0]
    tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].data[-1])]
    expected = base.compute_logprobs(ModelInput.from_ints(tokens)).result()[1:]
    targets = datum.model_input.to_ints()[1:] + tokens[-1:]
    plain = tinker.Datum(datum.model_input, {"target_tokens": targets})
    assert logprobs_of(client, [plain])[0].tolist() == expected


def test_adapters_are_float32_over_a_bfloat16_base(make_service, model_folder, data):
    """Pitfalls 22 and 25: one step at 1e-5 changes bytes; logprobs come as float32."""
    service = make_service(dtype="bfloat16")
    client = service.create_lora_training_client(model_folder("qwen3"), rank=4, seed=0).result()
    assert {p.dtype for p in client._backend._adapter.params} == {torch.float32}
    before = weights_of(client)
    result = client.forward_backward(data, "cross_entropy").result()
    client.optim_step(AdamParams(learning_rate=1e-5)).result()
    assert weights_of(client) != before
    assert {o["logprobs"].dtype for o in result.loss_fn_outputs} == {"float32"}


def test_a_snapshot_stays_what_it_was(client, data):
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = ModelInput.from_ints([5, 6, 7, 8])
    before = sampler.compute_logprobs(prompt).result()
    train(client, data, 2)
    assert sampler.compute_logprobs(prompt).result() == before
    later = client.save_weights_and_get_sampling_client().result()
    assert later.compute_logprobs(prompt).result() != before


def test_compute_logprobs_is_the_training_forward(client, data):
    train(client, data, 1)
    sampler = client.save_weights_and_get_sampling_client().result()
    tokens = [5, 6, 7, 8, 9]
    datum = tinker.Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    scored = sampler.compute_logprobs(ModelInput.from_ints(tokens)).result()
    assert scored == [None, *logprobs_of(client, [datum])[0].tolist()]


def test_metadata_of_checkpoints(service, model_folder, tmp_path):
    """Bug: recipes read state.json, which only a local checkpoint has."""
    folder = model_folder("qwen3")
    made = service.create_lora_training_client(folder, rank=2, user_metadata={"run": "a"})
    client = made.result()
    path = client.save_weights_for_sampler("one", user_metadata={"verdict": " yes"}).result().path
    assert service.get_checkpoint_metadata(path) == {"run": "a", "verdict": " yes"}
    plain = client.save_state("two").result().path
    assert service.get_checkpoint_metadata(plain) == {"run": "a"}
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        service.get_checkpoint_metadata(str(tmp_path))
    for text in ("{", "[]", "{}", '{"user_metadata": 3}'):
        (Path(plain) / "state.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"state\.json: cannot be read"):
            service.get_checkpoint_metadata(plain)
    (Path(plain) / "state.json").unlink()
    assert service.get_checkpoint_metadata(plain) == {}  # as of a folder that peft wrote


# ---- references ---------------------------------------------------------------------------------


def preference_data() -> list[tinker.Datum]:
    pairs = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([11, 12], [13, 14, 15]), ([11, 12], [16])]
    return [datum_from_prompt_completion(p, c) for p, c in pairs]


def test_reference_is_the_policy_at_step_0(client, service, data):
    """Pitfalls 20 and 21: the reference of a run that starts from a trained adapter is that
    adapter; margin exactly 0, loss exactly ln 2, ratio exactly 1; it stays fixed in training."""
    train(client, data, 3)  # an adapter with B != 0 is where the run starts
    path = client.save_state("reference").result().path
    reference = service.create_training_client_from_state(path).result()
    pairs = preference_data()
    fixed = logprobs_of(reference, pairs)
    with_ref = [with_inputs(d, ref_logprobs=lp) for d, lp in zip(pairs, fixed, strict=True)]
    result = client.forward_backward_custom(
        with_ref, lambda d, lp: dpo_loss(d, lp, beta=0.1)
    ).result()
    assert result.metrics["reward_margin"] == 0.0
    assert result.metrics["accuracy"] == 0.5
    assert result.loss == pytest.approx(0.6931471805599453, abs=1e-7)
    ratio = [torch.exp(a - b) for a, b in zip(logprobs_of(client, pairs), fixed, strict=True)]
    assert all(torch.equal(r, torch.ones_like(r)) for r in ratio)
    base = service.create_lora_training_client(
        client.get_info().model_data.model_name, rank=1
    ).result()
    assert not torch.equal(logprobs_of(base, pairs)[0], fixed[0]), "not the bare base model"
    train(client, data, 2)
    assert all(torch.equal(a, b) for a, b in zip(logprobs_of(reference, pairs), fixed, strict=True))


def test_dropout_never_runs(service, model_folder, data, tmp_path):
    """Pitfall 19: an adapter saved with lora_dropout 0.5 scores the same twice, in training too."""
    base = AutoModelForCausalLM.from_pretrained(model_folder("qwen3"))
    config = peft.LoraConfig(
        r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "dropout")
    path, name = str(tmp_path / "dropout"), model_folder("qwen3")
    client = service.create_training_client_from_state(path, base_model=name).result()
    first, second = logprobs_of(client, data), logprobs_of(client, data)
    result = client.forward_backward(data, "cross_entropy").result()
    third = [output["logprobs"].to_torch() for output in result.loss_fn_outputs]
    for a, b, c, datum in zip(first, second, third, data, strict=True):
        assert torch.equal(a, b)
        weighted = datum.loss_fn_inputs["weights"].to_torch() != 0
        assert torch.equal(a[weighted], c[weighted])
        assert not c[~weighted].any()  # not computed
