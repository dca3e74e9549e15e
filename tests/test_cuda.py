"""The same numbers on an accelerator as on the CPU, and the same bits each time.

Runs on CUDA where there is one. `tests/simulated` runs every function of this file on the simulated
device, without a GPU. Heads are 16 wide: flex attention takes none that are smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cookbook_core import clients, tinker, with_inputs
from cookbook_core.tinker import Datum, ModelInput, TrainingClient
from tests.conftest import make_random_data
from tests.oracles.logprobs import adapter_of, assert_close, engine_of, randomize, take_gradient
from tests.test_gradient_parity import squared
from tests.test_packing import family_data

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("error:.*without torch.compile")

SECONDS = 120
ARCHS = ["qwen3", "llama", "mistral", "gemma2", "gpt2"]
HEADS_OF_16 = {"gpt2": {"n_embd": 64}}
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 128": {"head_dim": 128},
    "7 queries a key": {"num_attention_heads": 14, "head_dim": 16},
}
LOGPROBS = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest error, as a share of the largest |logprob| of the CPU in float32."""
GRADIENTS = {"float32": 1e-4, "bfloat16": 0.2}
"""Norm of the error, as a share of the gradient's norm."""

Connect = Callable[..., Callable[..., TrainingClient]]


@pytest.fixture
def connect_to(model_folder: Callable[..., str], tmp_path: Path) -> Connect:
    """`connect_to(device, arch="qwen3", dtype="float32", **config)`: what makes its clients.

    `connect_to(...)(seed=0, train_unembed=False)` makes a training client, whose adapter is random
    and the same on every device. Clients of one call are on one service.
    """
    torch.backends.cuda.matmul.allow_tf32 = False

    def connect(
        device: str, arch: str = "qwen3", dtype: str = "float32", **config: Any
    ) -> Callable[..., TrainingClient]:
        config = config or HEADS_OF_16.get(arch, {"head_dim": 16})
        folder = "tiny" if arch == "tiny" else model_folder(arch, **config)
        service = tinker.ServiceClient(device=device, dtype=dtype, checkpoint_dir=tmp_path / device)

        def make(seed: int = 0, train_unembed: bool = False) -> TrainingClient:
            client = service.create_lora_training_client(
                folder, rank=4, seed=seed, train_unembed=train_unembed
            ).result(SECONDS)
            randomize(client, seed)
            return client

        return make

    return connect


# ---- what a client computes, on the CPU ----------------------------------------------------------


def gradient_of(
    client: TrainingClient, data: list[Datum], loss: Any = squared, form: Any = "logprobs"
) -> dict[str, torch.Tensor]:
    """The gradient of a loss by peft's keys; the client is left with none."""
    client.forward_backward_custom(data, loss, loss_type_input=form).result(SECONDS)
    return {key: g.cpu() for key, g in take_gradient(client).items()}


def weights_of(client: TrainingClient) -> dict[str, torch.Tensor]:
    """The adapter's tensors by peft's keys."""
    return {key: p.cpu().clone() for key, p in adapter_of(client).named().items()}


def moments_of(client: TrainingClient) -> list[torch.Tensor]:
    """Adam's moments."""
    states = adapter_of(client).optimizer.state.values()
    return [s[name].cpu().clone() for s in states for name in ("exp_avg", "exp_avg_sq")]


def train_steps(client: TrainingClient, data: list[Datum], steps: int) -> None:
    for _ in range(steps):
        client.forward_backward_custom(data, squared).result(SECONDS)
        client.optim_step(tinker.AdamParams(1e-3)).result(SECONDS)


def sampler_of(client: TrainingClient) -> tinker.SamplingClient:
    return client.save_weights_and_get_sampling_client().result(SECONDS)


def samples(client: TrainingClient, prompts: list[list[int]], n: int, **params: Any) -> list[Any]:
    """Completions of all prompts, decoded together: (tokens, stop_reason, logprobs) of each."""
    each = [tinker.SamplingParams(**{"stop": [], "seed": i, **params}) for i in range(len(prompts))]
    inputs = [ModelInput.from_ints(prompt) for prompt in prompts]
    futures = sampler_of(client).sample_batch(inputs, n, each)
    sequences = [s for future in futures for s in future.result(SECONDS).sequences]
    return [(s.tokens, s.stop_reason, np.array(s.logprobs)) for s in sequences]


def same_samples(found: list[Any], wanted: list[Any], tolerance: float = 1e-4) -> None:
    """The same tokens, ended for the same reason; logprobs within `tolerance` nats."""
    for (tokens, reason, logprobs), (other, why, expected) in zip(found, wanted, strict=True):
        assert (tokens, reason) == (other, why)
        np.testing.assert_allclose(logprobs, expected, atol=tolerance)


def same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@contextmanager
def memory_for(accelerator: str, more: int) -> Iterator[None]:
    """Inside, the device has room for `more` bytes than it holds now."""
    if accelerator == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        from tests.simulated.device import limited_memory

        with limited_memory(more):
            yield


def peak_of(accelerator: str, run: Callable[[], Any]) -> int:
    """Bytes that a call takes at most, beside what is there before it."""
    module: Any = getattr(torch, accelerator)
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    run()
    return module.max_memory_allocated() - before


# ---- scoring and gradients -----------------------------------------------------------------------


def check_against_the_cpu(
    accelerator: str,
    connect_to: Connect,
    data: list[Datum],
    dtype: str,
    padded: bool = False,
    train_unembed: bool = False,
    **kind: Any,
) -> None:
    found = []
    for device, precision in (("cpu", "float32"), (accelerator, dtype)):
        client = connect_to(device, dtype=precision, **kind)(train_unembed=train_unembed)
        scorer = engine_of(client).scorer
        assert scorer.packs
        scorer.packs = not padded
        logprobs = torch.cat([lp.flatten() for lp in clients.score(client, data)]).double()
        gradient = torch.cat([g.flatten().double() for g in gradient_of(client, data).values()])
        found.append((logprobs, gradient))
    (want, gradient), (logprobs, other) = found
    assert float((logprobs - want).abs().max()) < LOGPROBS[dtype] * float(want.abs().max())
    assert float((other - gradient).norm()) < GRADIENTS[dtype] * float(gradient.norm())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_logprobs_and_gradients(
    arch: str, dtype: str, padded: bool, accelerator: str, connect_to: Connect
) -> None:
    check_against_the_cpu(accelerator, connect_to, family_data(), dtype, padded, arch=arch)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_of_attention(shape: str, dtype: str, accelerator: str, connect_to: Connect) -> None:
    data = family_data()
    check_against_the_cpu(accelerator, connect_to, data, dtype, **SHAPES[shape])


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
@pytest.mark.parametrize("train_unembed", [False, True])
def test_three_targets_masked_positions_and_single_tokens(
    arch: str, train_unembed: bool, accelerator: str, connect_to: Connect
) -> None:
    masked = [
        with_inputs(d, score_mask=np.arange(d.model_input.length) % 3 == 1)
        for d in make_random_data(5, lengths=(2, 9))
    ]
    data = [*make_random_data(4, k=3), *masked, *make_random_data(2, lengths=(1, 1))]
    kind = {"arch": arch, "train_unembed": train_unembed}
    check_against_the_cpu(accelerator, connect_to, data, "float32", **kind)


@pytest.mark.parametrize("arch", ["qwen3", "gemma2"])
def test_losses_over_the_vocabulary(arch: str, accelerator: str, connect_to: Connect) -> None:
    def loss(data: Any, scores: Any) -> Any:
        del data
        picked = [score[t][[t, t + 1]] for score in scores for t in (0, 3)]
        spans = [(score[2:5].exp() * score[2:5]).sum() for score in scores]
        return sum((p**2).sum() for p in picked) + sum(spans), {}

    data = family_data()
    want, found = (
        gradient_of(connect_to(device, arch)(), data, loss, "vocab_logprobs")
        for device in ("cpu", accelerator)
    )
    assert_close(found, want, 1e-4)


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_measure_against_memory_changes_a_bit(
    dtype: str, accelerator: str, connect_to: Connect
) -> None:
    """Logprobs with and without a graph; two passes; recomputed layers; the same work again."""
    client, data = connect_to(accelerator, dtype=dtype)(), family_data()
    engine = engine_of(client)
    scored: list[torch.Tensor] = []

    def noting(data: Any, logprobs: Any) -> Any:
        scored[:] = [lp.detach() for lp in logprobs]
        return squared(data, logprobs)

    reference = clients.score(client, data)
    engine.limits.graph_tokens, engine.limits.mode = 10**9, "off"
    want = gradient_of(client, data, noting)
    assert all(torch.equal(a, b) for a, b in zip(scored, reference, strict=True))
    for tokens, mode in ((10**9, "off"), (0, "off"), (10**9, "on"), (20, "auto")):
        engine.limits.graph_tokens, engine.limits.mode = tokens, mode
        same_bits(gradient_of(client, data, noting), want)
        assert all(torch.equal(a, b) for a, b in zip(scored, reference, strict=True))


def test_a_policy_equals_its_frozen_copy_to_the_bit(accelerator: str, connect_to: Connect) -> None:
    """Pitfall 20, in bfloat16: importance ratios are exactly 1 at the first step."""
    make, data = connect_to(accelerator, dtype="bfloat16"), family_data()
    client, other = make(), make(seed=1)
    state = client.save_state("start").result(SECONDS).path
    other.load_state(state).result(SECONDS)
    pairs = zip(clients.score(client, data), clients.score(other, data), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_four_steps_are_two_saved_loaded_and_two_more(
    accelerator: str, connect_to: Connect
) -> None:
    data = family_data()
    make, make_on_cpu = connect_to(accelerator), connect_to("cpu")
    whole, cpu, broken, moved = make(), make_on_cpu(), make(), make_on_cpu()
    for client in (whole, cpu):
        train_steps(client, data, 4)
    train_steps(broken, data, 2)
    path = broken.save_state("middle").result(SECONDS).path
    randomize(broken, seed=9)
    for client in (broken, moved):
        client.load_state_with_optimizer(path).result(SECONDS)
        train_steps(client, data, 2)
    same_bits(weights_of(broken), weights_of(whole))
    assert all(map(torch.equal, moments_of(broken), moments_of(whole)))
    for client in (cpu, moved):  # and a checkpoint of one device continues on another
        assert_close(weights_of(client), weights_of(whole), 1e-3)


def test_two_adapters_side_by_side(accelerator: str, connect_to: Connect) -> None:
    """Pitfall 28: interleaved, each is trained as if it were alone."""
    data = family_data()
    alone = connect_to(accelerator)()
    train_steps(alone, data, 2)
    make = connect_to(accelerator)
    one, other = make(), make(seed=1)
    for _ in range(2):
        train_steps(one, data, 1)
        train_steps(other, data[:4], 1)
        samples(other, [[5, 9]], 2, max_tokens=3)
    same_bits(weights_of(one), weights_of(alone))


# ---- sampling ------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 33], [5, 9, 33, 40, 41, 42], [7], [5, 9, 33]]


@pytest.mark.parametrize("arch", ARCHS)
def test_samples(arch: str, accelerator: str, connect_to: Connect) -> None:
    """Prompts of several lengths, rows that end early, top-k and top-p: the CPU's tokens."""
    cpu, client = connect_to("cpu", arch)(), connect_to(accelerator, arch)()
    for params in (
        {"max_tokens": 6},  # too short to merge the adapter for
        {"max_tokens": 20},
        {"max_tokens": 12, "stop": list(range(10, 60))},
        {"max_tokens": 6, "top_k": 9, "top_p": 0.8, "temperature": 0.7},
        {"max_tokens": 6, "temperature": 0.0},
    ):
        want, found = (samples(c, PROMPTS, 3, **params) for c in (cpu, client))
        same_samples(found, want)
    again = samples(client, PROMPTS, 3, max_tokens=20)
    same_samples(again, samples(client, PROMPTS, 3, max_tokens=20), tolerance=0.0)


def test_logprobs_of_prompts(accelerator: str, connect_to: Connect) -> None:
    prompt, params = ModelInput.from_ints(PROMPTS[1]), tinker.SamplingParams(max_tokens=1, seed=0)
    found = []
    for device in ("cpu", accelerator):
        sampler = sampler_of(connect_to(device)())
        response = sampler.sample(prompt, 1, params, True, 2).result(SECONDS)
        scored = sampler.compute_logprobs(prompt).result(SECONDS)
        np.testing.assert_allclose(scored[1:], response.prompt_logprobs[1:], atol=1e-4)
        found.append(response)
    want, other = found
    np.testing.assert_allclose(other.prompt_logprobs[1:], want.prompt_logprobs[1:], atol=1e-4)
    for each, expected in zip(
        other.topk_prompt_logprobs[1:], want.topk_prompt_logprobs[1:], strict=True
    ):
        assert [token for token, _ in each] == [token for token, _ in expected]


@pytest.mark.parametrize(
    ("dtype", "mean", "largest"), [("float32", 1e-5, 1e-3), ("bfloat16", 0.03, 0.5)]
)
def test_samples_score_as_sampled(
    dtype: str, mean: float, largest: float, accelerator: str, connect_to: Connect
) -> None:
    """The bundled model: the decoder's logprobs against the scorer's, nats."""
    client = connect_to(accelerator, "tiny", dtype)()
    prompts = [[5, 9, 33, i] for i in range(40, 48)]
    drawn = samples(client, prompts, 4, max_tokens=24)
    wholes = [prompts[i // 4] + tokens for i, (tokens, _, _) in enumerate(drawn)]
    sampler = sampler_of(client)
    futures = [sampler.compute_logprobs(ModelInput.from_ints(whole)) for whole in wholes]
    scored = np.array([future.result(SECONDS)[4:] for future in futures])
    gap = np.abs(scored - np.array([logprobs for _, _, logprobs in drawn]))
    assert gap.mean() < mean
    assert gap.max() < largest


def test_training_in_bfloat16(accelerator: str, connect_to: Connect) -> None:
    """The bundled model: the loss falls, and the adapter stays float32."""
    client = connect_to(accelerator, "tiny", "bfloat16")()
    losses = []
    for _ in range(10):
        backward = client.forward_backward(family_data(), "cross_entropy")
        client.optim_step(tinker.AdamParams(5e-3)).result(SECONDS)
        losses.append(backward.result(SECONDS).loss)
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in adapter_of(client).params} == {torch.float32}


# ---- out of memory -------------------------------------------------------------------------------


def test_a_batch_larger_than_the_card_goes_in_smaller_pieces(
    accelerator: str, connect_to: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """No limit follows free memory here, so that running out is what lowers them."""
    data = make_random_data(200, lengths=(30, 60))
    client, other = connect_to(accelerator)(), connect_to(accelerator)()
    for each in (client, other):
        engine_of(each).limits.graph_tokens = 10**9
        engine_of(each).limits.mode = "off"
    want: dict[str, torch.Tensor] = {}
    taken = peak_of(accelerator, lambda: want.update(gradient_of(client, data)))
    with memory_for(accelerator, taken // 4):
        found = gradient_of(other, data)
    assert "out of memory" in caplog.text
    assert_close(found, want, 1e-3)


def test_sampling_that_runs_out_of_memory_gives_the_same_tokens(
    accelerator: str, connect_to: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect_to(accelerator)()
    want: list[Any] = []

    def run() -> list[Any]:
        return samples(client, [[5, 9, i] for i in range(40)], 4, max_tokens=40)

    taken = peak_of(accelerator, lambda: want.extend(run()))
    with memory_for(accelerator, taken // 3):
        found = run()
    assert "out of memory" in caplog.text
    same_samples(found, want)
