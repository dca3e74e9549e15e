"""What SDK 0.38 lets a `sample` ask for, against a softmax in float64; scoring without training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from cookbook_core import clients
from cookbook_core.backend.local import engine
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.tinker import ModelInput, SamplingClient, SamplingParams, TensorData
from cookbook_core.tinker import TrainingClient as Client
from tests.conftest import make_random_data
from tests.test_sampler import full_forward, ids, load

import numpy as np
import pytest
import torch

PROMPT = ids(7)
INPUT = ModelInput.from_ints(PROMPT)
ONE = SamplingParams(max_tokens=1, seed=3, stop=[])


@pytest.fixture(scope="module")
def sampler(connect: Callable[..., Client]) -> SamplingClient:
    """Of weights with a LoRA on every layer, the unembedding too."""
    return connect(train_unembed=True).save_weights_and_get_sampling_client().result(60)


@pytest.fixture(scope="module")
def exact(sampler: SamplingClient) -> torch.Tensor:
    """log p of every token at each position of PROMPT, `(7, V)`, from the plain model."""
    own = sampler._backend._engine  # type: ignore[attr-defined]
    with own.bank.active(sampler._backend._adapter), torch.no_grad():  # type: ignore[attr-defined]
        return torch.log_softmax(own.base.model(torch.tensor([PROMPT])).logits[0].double(), -1)


# ---- top-k of sampled positions -----------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_likeliest_tokens_are_those_of_the_distribution_of_the_logprobs(
    model_folder: Callable[..., str], service: Any, temperature: float
) -> None:
    """At the request's temperature, 1 where greedy, before top_k; rows that ask for other numbers,
    or for none, share the loop."""
    made = service.create_sampling_client(base_model=model_folder()).result(60)
    params = SamplingParams(max_tokens=4, seed=5, stop=[], temperature=temperature, top_k=2)
    with made._backend.unit():
        futures = [made.sample(INPUT, 2, params, topk_sample_logprobs=k) for k in (3, 0, 5)]
    three, none, five = (future.result(60).sequences for future in futures)
    assert all(s.topk_logprobs is None and s.topk_logprobs_np is None for s in none)
    model = load(model_folder())
    for sequences, k in ((three, 3), (five, 5)):
        for s in sequences:
            rows = full_forward(model, PROMPT + s.tokens)[len(PROMPT) - 1 : -1]
            rows = torch.log_softmax(rows / (temperature or 1.0), dim=-1)
            values, best = rows.topk(k)
            assert [[t for t, _ in row] for row in s.topk_logprobs] == best.tolist()
            found = np.array([[lp for _, lp in row] for row in s.topk_logprobs])
            np.testing.assert_allclose(found, values.numpy(), atol=2e-5)
            assert s.topk_logprobs_np.token_ids.shape == (4, k)
            for token, logprob, row in zip(s.tokens, s.logprobs, s.topk_logprobs, strict=True):
                assert dict(row)[token] == pytest.approx(logprob, abs=1e-6)  # top_k=2 is in the top
    assert [s.tokens for s in three] == [s.tokens for s in none]  # asking changes no draw


# ---- the prompt ---------------------------------------------------------------------------------


def test_targets_are_scored_where_they_are_requested(
    sampler: SamplingClient, exact: torch.Tensor
) -> None:
    targets = np.random.default_rng(0).integers(-1, 100, (6, 3))
    targets[2] = -1
    given = TensorData(targets, "int64")
    warm = SamplingParams(max_tokens=1, seed=3, stop=[], temperature=2.0)  # of the completion alone
    found = sampler.sample(INPUT, 1, warm, target_prompt_logprobs=given).result(60)
    scored = found.target_prompt_logprobs
    assert (scored.dtype, scored.shape) == ("float32", [6, 3])
    wanted = exact[:-1].gather(1, torch.tensor(targets.clip(0))).numpy()
    np.testing.assert_allclose(scored.to_numpy(), np.where(targets < 0, 0, wanted), atol=1e-6)
    assert found.prompt_logprobs is None
    nothing = TensorData(np.full((6, 2), -1), "int64")
    found = sampler.sample(INPUT, 1, ONE, target_prompt_logprobs=nothing).result(60)
    assert not found.target_prompt_logprobs.to_numpy().any()


def test_the_sdks_own_tensors_are_taken_sparse_ones_too(
    sampler: SamplingClient, exact: torch.Tensor
) -> None:
    sdk = pytest.importorskip("tinker")
    if not hasattr(sdk.types, "PromptAltTokens"):
        pytest.skip("target_prompt_logprobs came with a later SDK")
    dense = sdk.TensorData(data=PROMPT[1:], dtype="int64", shape=[6, 1])
    sparse = sdk.TensorData(
        data=[PROMPT[2], 9], dtype="int64", shape=[6, 2],
        sparse_crow_indices=[0, 0, 2, 2, 2, 2, 2], sparse_col_indices=[0, 1],
    )  # fmt: skip
    found = sampler.sample(INPUT, 1, ONE, True, target_prompt_logprobs=dense).result(60)
    own = found.target_prompt_logprobs.to_numpy()[:, 0]
    np.testing.assert_allclose(own, found.prompt_logprobs[1:], atol=1e-6)
    found = sampler.sample(INPUT, 1, ONE, target_prompt_logprobs=sparse).result(60)
    scored = found.target_prompt_logprobs.to_numpy()
    assert scored[1].tolist() == pytest.approx(exact[1, [PROMPT[2], 9]].tolist(), abs=1e-6)
    assert not np.delete(scored, 1, axis=0).any()


def test_alternatives_are_draws_of_the_models_distribution(
    sampler: SamplingClient, exact: torch.Tensor
) -> None:
    k = 3000
    found = sampler.sample(INPUT, 1, ONE, prompt_alt_tokens_k=k).result(60).prompt_alt_tokens
    tokens, logprobs = found.tokens.to_numpy(), found.logprobs.to_numpy()
    assert (found.tokens.dtype, tokens.shape, found.logprobs.dtype) == ("int64", (6, k), "float32")
    wanted = exact[:-1].gather(1, torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(logprobs, wanted, atol=1e-6)
    for row, drawn in zip(exact[:-1].exp().numpy(), tokens, strict=True):
        counts = np.bincount(drawn, minlength=100)
        assert (np.abs(counts - k * row) < 6 * np.sqrt(k * row + 1)).all()
    again = sampler.sample(INPUT, 1, ONE, prompt_alt_tokens_k=2).result(60).prompt_alt_tokens
    other = SamplingParams(max_tokens=1, seed=4, stop=[])
    other = sampler.sample(INPUT, 1, other, prompt_alt_tokens_k=2).result(60).prompt_alt_tokens
    assert again.tokens != other.tokens
    repeated = sampler.sample(INPUT, 1, ONE, prompt_alt_tokens_k=2).result(60).prompt_alt_tokens
    assert again == repeated


def test_a_prompt_of_one_token_has_nothing_before_it(sampler: SamplingClient) -> None:
    empty = TensorData(np.zeros((0, 2)), "int64")
    one = ModelInput.from_ints([5])
    options = {"target_prompt_logprobs": empty, "prompt_alt_tokens_k": 3}
    found = sampler.sample(one, 1, ONE, **options).result(60)
    assert found.target_prompt_logprobs.shape == [0, 2]
    assert found.prompt_alt_tokens.tokens.shape == [0, 3]
    with pytest.raises(ConfigError, match=r"prompt_logprobs_last_n: out of range.*1 to 0"):
        sampler.sample(one, 1, ONE, True, prompt_logprobs_last_n=1)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_logprobs_of_the_last_tokens_alone(sampler: SamplingClient, n: int) -> None:
    whole = sampler.sample(INPUT, 1, ONE, True, 2).result(60)
    last = sampler.sample(INPUT, 1, ONE, True, 2, prompt_logprobs_last_n=n).result(60)
    before = [None] * (len(PROMPT) - n)
    assert last.prompt_logprobs == before + whole.prompt_logprobs[-n:]
    assert last.topk_prompt_logprobs == before + whole.topk_prompt_logprobs[-n:]
    found = sampler.compute_logprobs(INPUT, n).result(60)
    assert found[:-n] == before
    assert found[-n:] == pytest.approx(whole.prompt_logprobs[-n:], abs=1e-9)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"topk_sample_logprobs": 101}, r"topk_sample_logprobs: invalid value.*0 to 100, got 101"),
        ({"topk_sample_logprobs": True}, r"topk_sample_logprobs: invalid value.*True"),
        ({"target_prompt_logprobs": [[1]] * 6}, r"not an int64 tensor of token ids.*TensorData"),
        (
            {"target_prompt_logprobs": TensorData([[1.0]] * 6, "float32")},
            r"target_prompt_logprobs: not an int64",
        ),
        (
            {"target_prompt_logprobs": TensorData([[1]] * 7, "int64")},
            r"shape does not fit.*\(6, K\).*\(7, 1\)",
        ),
        (
            {"target_prompt_logprobs": TensorData([1] * 6, "int64")},
            r"shape does not fit.*\(6, K\).*got \(6,\)",
        ),
        (
            {"target_prompt_logprobs": TensorData([[100]] * 6, "int64")},
            r"outside the vocabulary.*below 100, or -1, got 100 to 100",
        ),
        ({"prompt_alt_tokens_k": -1}, r"prompt_alt_tokens_k: out of range.*got -1"),
        ({"prompt_logprobs_last_n": 0, "include_prompt_logprobs": True}, r"1 to 6.*got 0"),
        ({"prompt_logprobs_last_n": 7, "include_prompt_logprobs": True}, r"1 to 6.*got 7"),
        ({"prompt_logprobs_last_n": 2}, r"prompt_logprobs_last_n: without include_prompt_logprobs"),
    ],
)
def test_what_the_sdk_does_not_allow_is_refused_by_name(
    sampler: SamplingClient, options: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern):
        sampler.sample(INPUT, 1, ONE, **options)


@pytest.mark.parametrize("changed", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}])
def test_draws_that_the_sdk_does_not_define_are_refused(
    sampler: SamplingClient, changed: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=1, stop=[], **changed)
    with pytest.raises(ConfigError, match=r"prompt_alt_tokens_k: not defined by the SDK"):
        sampler.sample(INPUT, 1, params, prompt_alt_tokens_k=2)


# ---- scoring without a training client ----------------------------------------------------------


@pytest.mark.parametrize("k", [None, 3])
def test_a_sampling_client_scores_as_the_training_client_does(
    connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch, k: int | None
) -> None:
    """The same bits, for a snapshot and for a bare model, and one pass over the whole batch."""
    client, data = connect(), make_random_data(6, k=k)
    snapshot = client.save_weights_and_get_sampling_client().result(60)
    passes = []
    score = engine.Engine.score

    def counted(self: Any, adapter: Any, data: Any, datum_indices: Any = None) -> Any:
        passes.append(len(data))
        return score(self, adapter, data, datum_indices)

    monkeypatch.setattr(engine.Engine, "score", counted)
    mine, theirs = clients.score(client, data), clients.score(snapshot, data)
    assert passes == [6, 6]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    forward = client.forward(data, "cross_entropy").result(60)
    assert snapshot.forward(data).result(60).metrics == forward.metrics


def test_a_bare_model_is_scored_without_a_training_client(
    service: Any, model_folder: Callable[..., str]
) -> None:
    data = make_random_data(5)
    bare = service.create_sampling_client(base_model=model_folder()).result(60)
    fresh = service.create_lora_training_client(model_folder(), 1, 0, train_unembed=False)
    scored, wanted = clients.score(bare, data), clients.score(fresh.result(60), data)
    for a, b in zip(scored, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    with pytest.raises(ConfigError, match=r'loss_fn: unknown. Expected "cross_entropy"'):
        bare.forward(data, "ppo")
    with pytest.raises(DatumError, match=r"data\[0\]"):
        clients.score(bare, make_random_data(1, vocab=2000))


def test_one_call_of_compute_logprobs_depends_on_its_prompt_alone(
    connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever waits beside it in the queue: float32 bits would move with the batch."""
    client = connect(dtype="float32")
    sampler = client.save_weights_and_get_sampling_client().result(60)
    prompts = [ModelInput.from_ints(ids(n)) for n in (7, 3, 30, 7)]
    sizes = []
    score = engine.Engine.score

    def counted(self: Any, adapter: Any, data: Any, datum_indices: Any = None) -> Any:
        sizes.append(len(data))
        return score(self, adapter, data, datum_indices)

    monkeypatch.setattr(engine.Engine, "score", counted)
    alone = [sampler.compute_logprobs(prompt).result(60) for prompt in prompts]
    release = threading.Event()
    blocked = client._backend._backend.worker.submit("block", release.wait, 30)  # type: ignore[attr-defined]
    futures = [sampler.compute_logprobs(prompt) for prompt in prompts]
    release.set()
    assert blocked.result()
    assert [future.result(60) for future in futures] == alone
    assert sizes == [1] * 8
