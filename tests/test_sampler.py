"""Sampling: exact logprobs, the right distribution, seeds, stop rules, bad input, no trace left."""

from __future__ import annotations

import gc
import json
import shutil
import types
import weakref
from typing import Any

from cookbook_core.backend.local.sampling.cache_budget import CacheBudget
from cookbook_core.backend.local.sampling.decoder import Decoder
from cookbook_core.backend.local.sampling.draw import (
    SamplingTensors,
    draw_device,
    draw_tokens,
    eos_ids,
    score,
    truncate,
)
from cookbook_core.backend.local.sampling.sampler import sample_batch
from cookbook_core.backend.local.scoring.target_logprobs import find_head
from cookbook_core.backend.sampling_requests import SampleRequest, check_request
from cookbook_core.errors import ConfigError, DatumError, ModelError, RequestError
from cookbook_core.types import ModelInput, SamplingParams
from tests.oracles.logprobs import adapter_of, engine_of, randomize

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM

VOCAB = 100
ARCHES = ["qwen3", "llama", "mistral", "gemma2", "gpt2"]


def load(folder: str, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(4, VOCAB, length).tolist()


def request(prompt: list[int], num_samples: int = 1, **params: Any) -> SampleRequest:
    return SampleRequest(prompt, num_samples, SamplingParams(**{"stop": [], **params}))


@torch.no_grad()
def full_forward(model: Any, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """`(N, V)` logprobs of a plain pass without a cache."""
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return torch.log_softmax(logits / temperature, dim=-1)


def rescored(model: Any, prompt: list[int], tokens: list[int], temperature: float) -> np.ndarray:
    rows = full_forward(model, prompt + tokens, temperature)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


def tokens_of(responses: list[Any]) -> list[list[list[int]]]:
    return [[sequence.tokens for sequence in response.sequences] for response in responses]


# ---- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("arch", ARCHES)
def test_logprobs_equal_a_full_forward_pass(model_folder, arch, dtype, bound):
    """Pitfalls 4, 5, 17: ragged prompts, rows that stop early, rescored at the temperature used."""
    if arch == "gemma2":  # transformers computes its soft-capped attention in float32
        bound = max(bound, 1e-6)
    model = load(model_folder(arch), dtype)
    shapes = [(1, 2, 9), (5, 3, 14), (17, 2, 12), (20, 1, 4)]  # prompt, samples, max_tokens
    requests = [
        request(ids(n), k, max_tokens=longest, temperature=0.6, seed=n) for n, k, longest in shapes
    ]
    at_one = 0.0
    for asked, response in zip(requests, sample_batch(model, None, requests), strict=True):
        for sequence in response.sequences:
            assert len(sequence.tokens) == asked.params.max_tokens
            assert sequence.stop_reason == "length"
            expected = rescored(model, asked.prompt, sequence.tokens, 0.6)
            assert np.abs(sequence.logprobs_np - expected).max() < bound
            other = rescored(model, asked.prompt, sequence.tokens, 1.0)
            at_one = max(at_one, np.abs(sequence.logprobs_np - other).max())
    assert at_one > 1e-2


def test_layers_that_are_not_attention_take_the_other_path():
    """A convolution hybrid: prompts of one length at a time, rows still dropped as they stop."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
    )
    model = Lfm2ForCausalLM(config).double().eval()
    requests = [
        request(ids(n, s), 2, max_tokens=m) for n, s, m in [(6, 0, 3), (6, 1, 9), (3, 0, 5)]
    ]
    for asked, response in zip(requests, sample_batch(model, None, requests), strict=True):
        for sequence in response.sequences:
            expected = rescored(model, asked.prompt, sequence.tokens, 1.0)
            assert np.abs(sequence.logprobs_np - expected).max() < 1e-9


def test_greedy_takes_the_argmax_and_reports_temperature_one(model_folder):
    model, prompt = load(model_folder()), ids(6)
    (sequence,) = sample_batch(model, None, [request(prompt, temperature=0, max_tokens=6)])[
        0
    ].sequences
    rows = full_forward(model, prompt + sequence.tokens)[len(prompt) - 1 : -1]
    assert rows.argmax(dim=1).tolist() == sequence.tokens
    assert np.abs(rows.amax(dim=1).numpy() - sequence.logprobs_np).max() < 1e-9


@pytest.mark.parametrize("arch", ["llama", "gemma2", "granite"])
def test_logits_of_16_bits_are_not_rounded_before_the_softmax(model_folder, monkeypatch, arch):
    """With a device's product of bfloat16 into float32, as CUDA has: prompts and tokens."""
    module = "cookbook_core.backend.local.scoring.target_logprobs"
    monkeypatch.setattr(f"{module}._multiplies_into_float32", lambda *_: True)
    monkeypatch.setattr(f"{module}._mm_into_float32", lambda a, b: a.float() @ b.float())
    model = load(model_folder(arch), torch.bfloat16).requires_grad_(False)
    seen: list[torch.Tensor] = []
    for place in ("decoder.score", "sampler.draw_tokens"):
        name = f"cookbook_core.backend.local.sampling.{place}"
        inner = score if place.endswith("score") else draw_tokens
        monkeypatch.setattr(
            name, lambda logits, *rest, inner=inner: (seen.append(logits), inner(logits, *rest))[1]
        )
    params = SamplingParams(max_tokens=2, temperature=0, stop=[])
    asked = [SampleRequest(ids(7), 1, params, True)]
    sample_batch(model, None, asked)
    sample_batch(model, None, asked, head=find_head(model))
    for rounded, exact in zip(seen[:3], seen[3:], strict=True):
        assert rounded.dtype == torch.bfloat16
        assert exact.dtype == torch.float32
        assert exact.shape == rounded.shape
        assert (exact != exact.bfloat16()).float().mean() > 0.9
        assert (exact - rounded).abs().max() < 0.02 * rounded.abs().max()


def test_prompt_logprobs(model_folder):
    model, prompt = load(model_folder()), ids(7)
    asked = SampleRequest(prompt, 1, SamplingParams(max_tokens=1, stop=[]), True, 3)
    response = sample_batch(model, None, [asked, request(ids(4), max_tokens=2)])[0]
    rows = full_forward(model, prompt)
    assert response.prompt_logprobs[0] is None
    assert response.topk_prompt_logprobs[0] is None
    for i in range(1, len(prompt)):
        assert response.prompt_logprobs[i] == pytest.approx(float(rows[i - 1, prompt[i]]), abs=1e-9)
        values, best = rows[i - 1].topk(3)
        found = response.topk_prompt_logprobs[i]
        assert [token for token, _ in found] == best.tolist()
        assert [value for _, value in found] == pytest.approx(values.tolist(), abs=1e-9)


# ---- the distribution ---------------------------------------------------------------------------


def test_generation_config_is_ignored(service, model_folder, tmp_path):
    """Pitfall 18: chi-square of 3000 first tokens, sampled through a client of a folder whose
    generation_config would change them, against the full softmax."""
    folder, prompt, draws = tmp_path / "model", ids(5), 3000
    shutil.copytree(model_folder(), folder)
    config = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    sampler = service.create_sampling_client(base_model=str(folder)).result()
    params = SamplingParams(max_tokens=1, seed=0, stop=[])
    response = sampler.sample(ModelInput.from_ints(prompt), draws, params).result()
    counts = np.bincount([s.tokens[0] for s in response.sequences], minlength=VOCAB)
    model = load(str(folder))
    assert model.generation_config.top_k == 1
    expected = full_forward(model, prompt)[-1].exp().numpy() * draws
    usual = expected >= 5
    counts = np.append(counts[usual], counts[~usual].sum())
    expected = np.append(expected[usual], expected[~usual].sum())
    freedom = len(counts) - 1
    assert freedom >= 5
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_truncate_by_hand():
    """top_k 2 leaves (4, 3); of their 7, top_p 0.5 needs only the 4 (4/7 = 0.57)."""
    mass = torch.tensor([[3.0, 4.0, 1.0, 2.0]] * 3, dtype=torch.float64)
    kept = truncate(mass, torch.tensor([2, 0, 2]), torch.tensor([1.0, 0.7, 0.5]))
    assert kept.tolist() == [[3, 4, 0, 0], [3, 4, 0, 0], [0, 4, 0, 0]]


def test_truncation_moves_tokens_but_not_logprobs():
    """Logprobs are those before top_k: of the whole softmax."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]], dtype=torch.float64)
    tensors = SamplingTensors.of([SamplingParams(top_k=1)], logits.device)
    token, logprob = draw_tokens(logits, torch.tensor([0.999], dtype=torch.float64), tensors)
    assert token.tolist() == [1]
    assert logprob.item() == pytest.approx(torch.log_softmax(logits, 1)[0, 1].item(), abs=1e-12)


# ---- devices without float64 --------------------------------------------------------------------


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tensor.dtype)
        return out


def test_the_decoder_needs_no_float64(model_folder, monkeypatch):
    """What runs on the model's device, prompt logprobs included; `draw_tokens` needs it."""
    mode = Dtypes()

    def watch(inner: Any) -> Any:
        def watched(self: Decoder, *args: Any) -> Any:
            with mode:
                return inner(self, *args)

        return watched

    for name in ("prefill", "step", "keep"):
        monkeypatch.setattr(Decoder, name, watch(getattr(Decoder, name)))
    asked = [
        SampleRequest(ids(6), 2, SamplingParams(max_tokens=4, seed=1, stop=[]), True, 2),
        request(ids(4), 2, max_tokens=2, seed=2, top_k=5, top_p=0.9, temperature=0.5),
    ]
    sample_batch(load(model_folder(), torch.float32), None, asked)
    assert torch.float32 in mode.seen
    assert torch.int64 in mode.seen
    assert torch.float64 not in mode.seen


def test_tokens_are_drawn_on_the_cpu_where_the_device_has_no_float64(monkeypatch):
    device, make = torch.device("mps"), draw_device.__wrapped__
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    assert make(device) == device

    def zeros(*_: Any, **__: Any) -> Any:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert make(device).type == "cpu"


# ---- seeds --------------------------------------------------------------------------------------


def test_a_seed_fixes_the_tokens_whatever_else_is_in_the_batch(model_folder):
    """Pitfall 35, float64 so that batch shapes cannot move a draw."""
    model = load(model_folder())
    seeded = request(ids(6), 4, max_tokens=10, seed=7)
    others = [request(ids(n), 2, max_tokens=n) for n in (3, 15)]
    alone = tokens_of(sample_batch(model, None, [seeded]))[0]
    assert tokens_of(sample_batch(model, None, [seeded, *others]))[0] == alone
    assert tokens_of(sample_batch(model, None, [*others, seeded]))[-1] == alone
    assert (
        tokens_of(sample_batch(model, None, [seeded, *others], budget=CacheBudget(1)))[0] == alone
    )
    assert len({tuple(tokens) for tokens in alone}) == 4
    other_seed = request(ids(6), 4, max_tokens=10, seed=8)
    assert tokens_of(sample_batch(model, None, [other_seed]))[0] != alone


# ---- memory -------------------------------------------------------------------------------------


def limit_memory(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Make decoding fail above `most` rows x columns; return the rows of each prefill."""
    prefill, step, rows = Decoder.prefill, Decoder.step, []

    def counted(self: Decoder, prompts: list[Any], limits: Any) -> Any:
        rows.append(len(prompts))
        return prefill(self, prompts, limits)

    def limited(self: Decoder, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) * self.width > most:
            raise error
        return step(self, tokens)

    monkeypatch.setattr(Decoder, "prefill", counted)
    monkeypatch.setattr(Decoder, "step", limited)
    return rows


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton: out of memory")]
)
def test_running_out_of_memory_halves_the_cache_and_changes_no_sample(
    model_folder, monkeypatch, caplog, error
):
    """The wave fails in the middle of its completions, prompts already scored."""
    model, prompt = load(model_folder()), ids(6)
    params = SamplingParams(max_tokens=10, seed=7, stop=[])
    asked = [SampleRequest(prompt, 12, params, True, 2), request(ids(3), 2, max_tokens=5, seed=1)]
    expected = sample_batch(model, None, asked)
    rows = limit_memory(monkeypatch, 14 * 10 - 1, error)
    budget = CacheBudget(1000)
    found = sample_batch(model, None, asked, budget=budget)
    assert tokens_of(found) == tokens_of(expected)
    assert found[0].prompt_logprobs == pytest.approx(expected[0].prompt_logprobs, abs=1e-9)
    assert found[0].topk_prompt_logprobs[1:] == [
        [(token, pytest.approx(logprob, abs=1e-9)) for token, logprob in top]
        for top in expected[0].topk_prompt_logprobs[1:]
    ]
    assert rows == [14, 7, 7]
    assert (budget.tokens, budget.lowered) == (1000, 14 * 16 // 2)
    assert "at most 112 tokens (rows x columns) instead of 1000" in caplog.text
    rows.clear()
    sample_batch(model, None, asked, budget=budget)  # the lower budget stays
    assert rows == [7, 7]


def test_a_sample_that_does_not_fit_by_itself_says_what_would(model_folder, monkeypatch):
    limit_memory(monkeypatch, 8, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RequestError, match=r"about .* tokens or fewer.* 16 tokens"):
        sample_batch(load(model_folder()), None, [request(ids(6), 5, max_tokens=10, seed=7)])


def test_other_errors_of_a_wave_are_raised_unchanged(model_folder, monkeypatch):
    limit_memory(monkeypatch, 8, RuntimeError("a kernel failed"))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        sample_batch(load(model_folder()), None, [request(ids(6), 5, max_tokens=10)])


def test_the_budget_follows_total_memory_and_the_model(service, model_folder, monkeypatch):
    """2 layers x 2 heads x 8 x 4 bytes, keys and values: 256 bytes a token."""
    client = service.create_lora_training_client(model_folder(), 4, 0).result()
    engine = engine_of(client)
    assert engine.machine(adapter_of(client))["sampling_tokens"] == 65_536
    base, module = engine.base, "cookbook_core.backend.local.sampling.cache_budget"
    model = sum(p.nbytes for name, p in base.model.named_parameters() if ".lora_" not in name)
    plain = types.SimpleNamespace(**{**vars(base), "model": load(model_folder(), torch.float32)})
    monkeypatch.setattr(f"{module}.total_bytes", lambda _: model + 10 * 2**20)
    assert CacheBudget.of(plain).tokens == 6 * 2**20 // 256
    monkeypatch.setattr(f"{module}.total_bytes", lambda _: model + 2**40)
    assert CacheBudget.of(plain).tokens == 65_536
    plain.device = torch.device("cuda")
    assert CacheBudget.of(plain).tokens == int(0.6 * 2**40) // 256


def test_without_a_seed_the_generator_decides(model_folder):
    model, asked = load(model_folder()), [request(ids(6), 2, max_tokens=8)]

    def draw(seed: int) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(seed)
        return tokens_of(sample_batch(model, None, asked, generator=generator))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


# ---- stopping -----------------------------------------------------------------------------------


def test_stop_ids_and_end_of_sequence(model_folder):
    model = load(model_folder())
    full = sample_batch(model, None, [request(ids(6), max_tokens=12, seed=3)])[0].sequences[0]
    end = full.tokens[5]
    expected = full.tokens[: full.tokens.index(end) + 1]
    tokenizer = types.SimpleNamespace(eos_token_id=end)
    for stop in ([end], None):
        asked = request(ids(6), max_tokens=12, seed=3, stop=stop)
        (found,) = sample_batch(model, tokenizer, [asked])[0].sequences
        assert found.tokens == expected
        assert found.stop_reason == "stop"
        assert found.logprobs == pytest.approx(full.logprobs[: len(expected)], abs=1e-9)


def test_stop_string_that_spans_tokens(model_folder, small_tokenizer):
    """One token is one character here, so every longer string spans tokens."""
    model = load(model_folder())
    asked = request(ids(6), max_tokens=150, seed=3)
    tokens = sample_batch(model, small_tokenizer, [asked])[0].sequences[0].tokens

    def text(n: int) -> str:
        return small_tokenizer.decode(tokens[:n], skip_special_tokens=False)

    stop = text(120)[-3:]
    length = next(n for n in range(len(tokens)) if stop in text(n))
    stopped = request(ids(6), max_tokens=150, seed=3, stop=["never this", stop])
    (found,) = sample_batch(model, small_tokenizer, [stopped])[0].sequences
    assert found.tokens == tokens[:length]
    assert found.stop_reason == "stop"


def test_open_ended_requests_run_to_the_context_limit(model_folder):
    asked = request(ids(4), 3, max_tokens=None)
    sequences = sample_batch(load(model_folder()), None, [asked], max_context_length=10)[
        0
    ].sequences
    assert [len(s.tokens) for s in sequences] == [6, 6, 6]
    assert len({s.sequence_id for s in sequences}) == 3


def test_the_cache_grows_when_an_open_ended_row_outgrows_it(model_folder, monkeypatch):
    """Rows of 5 and 2 tokens are cached for 8 more; the longest row gets 90."""
    model = load(model_folder())
    asked = [request(ids(5), 2, max_tokens=None, seed=1), request(ids(2), max_tokens=40, seed=2)]
    expected = sample_batch(model, None, asked, max_context_length=95)
    monkeypatch.setattr("cookbook_core.backend.local.sampling.decoder.OPEN_ENDED", 8)
    found = sample_batch(model, None, asked, max_context_length=95)
    assert tokens_of(found) == tokens_of(expected)
    assert len(found[0].sequences[0].tokens) == 90


def test_several_end_ids_count_only_if_the_tokenizer_agrees():
    def ends(eos: int | None, listed: Any) -> frozenset[int]:
        pair = (types.SimpleNamespace(eos_token_id=x) for x in (eos, listed))
        return eos_ids(*pair)

    assert ends(5, [5, 7]) == {5, 7}
    assert ends(5, [2, 7]) == {5}
    assert ends(5, 2) == {5}
    assert ends(None, 2) == frozenset()


# ---- errors and traces --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "field", "change"),
    [
        (DatumError, "prompt", {"prompt": []}),
        (DatumError, r"prompt\[1\].*got 100", {"prompt": [5, VOCAB]}),
        (ConfigError, "num_samples", {"num_samples": 0}),
        (ConfigError, "max_tokens", {"max_tokens": 0}),
        (ConfigError, r"at most 16 .*3 \(prompt\) \+ 14", {"max_tokens": 14}),
        (ConfigError, "temperature", {"temperature": -0.1}),
        (ConfigError, "temperature", {"temperature": float("nan")}),
        (ConfigError, "top_p", {"top_p": 0.0}),
        (ConfigError, "top_p", {"top_p": 1.1}),
        (ConfigError, "top_k", {"top_k": 0}),
        (ConfigError, "top_k", {"top_k": -2}),
        (ConfigError, "stop", {"stop": ""}),
        (ConfigError, "stop", {"stop": ["a", 5]}),
        (ConfigError, "stop", {"stop": [-1]}),
    ],
)
def test_bad_input_names_the_field(error, field, change):
    values = {"prompt": [5, 6, 7], "num_samples": 1, "max_tokens": 4, **change}
    with pytest.raises(error, match=field):
        check_request(request(**values), vocab_size=VOCAB, max_context_length=16)
    check_request(request([5, 6, 7], max_tokens=13), vocab_size=VOCAB, max_context_length=16)


def test_output_that_is_not_finite_is_refused(model_folder):
    model = load(model_folder())
    next(iter(model.parameters())).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        sample_batch(model, None, [request(ids(4), max_tokens=2)])


def test_sampling_leaves_no_trace(model_folder):
    """Pitfall 29; a module left in evaluation mode on purpose stays so."""
    model = load(model_folder()).train()
    frozen = model.get_input_embeddings().eval()
    before = [p.detach().clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    sample_batch(model, None, [request(ids(5), 3, max_tokens=4, seed=1)])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not frozen.training
    assert torch.is_grad_enabled()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None


# ---- with the adapter merged --------------------------------------------------------------------


def base_bytes(client: Any) -> dict[str, bytes]:
    model = engine_of(client).base.model
    return {
        name: p.detach().numpy().tobytes()
        for name, p in model.named_parameters()
        if ".lora_" not in name
    }


@pytest.mark.parametrize("train_unembed", [False, True])
@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_merged_sampling_agrees_with_the_scorer_and_leaves_the_base_alone(
    make_service, model_folder, arch, train_unembed
):
    """Pitfall 23: merged and unmerged adapters differ. The unembedding of both models is tied."""
    client = (
        make_service()
        .create_lora_training_client(model_folder(arch), 4, 0, train_unembed=train_unembed)
        .result()
    )
    randomize(client, scale=0.3)
    before = base_bytes(client)
    engine, sums = engine_of(client), []
    merge = engine.bank._mergeable
    engine.bank._mergeable = lambda adapter: sums.append(merge(adapter)) or sums[-1]
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = ModelInput.from_ints(ids(9))
    for max_tokens, merged in ((20, True), (4, False)):
        params = SamplingParams(max_tokens=max_tokens, seed=1, stop=[])
        sums.clear()
        tokens = sampler.sample(prompt, 3, params).result().sequences
        assert any(sums) == merged
        for s in tokens:
            full = ModelInput.from_ints(prompt.to_ints() + s.tokens)
            scored = sampler.compute_logprobs(full).result()[prompt.length :]
            # logits reach 43, and float32 sums of merged weights round differently
            assert np.abs(s.logprobs_np - np.array(scored)).max() < 2e-4
    assert base_bytes(client) == before


def test_a_base_below_float32_is_not_merged_and_an_error_inside_undoes_it(
    make_service, model_folder, monkeypatch
):
    client = make_service().create_lora_training_client(model_folder("llama"), 4, 0).result()
    randomize(client, scale=0.3)
    before = base_bytes(client)
    sampler = client.save_weights_and_get_sampling_client().result()
    params = SamplingParams(max_tokens=20, seed=1, stop=[])
    prompt = ModelInput.from_ints(ids(9))
    expected = sampler.sample(prompt, 1, params).result().sequences[0].tokens

    def broken(*_: Any, **__: Any) -> Any:
        assert base_bytes(client) != before, "nothing is merged here"
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr("cookbook_core.backend.local.engine.sample_batch", broken)
        with pytest.raises(RuntimeError, match="no"):
            sampler.sample(prompt, 1, params).result()
    assert base_bytes(client) == before
    assert sampler.sample(prompt, 1, params).result().sequences[0].tokens == expected

    low = make_service(dtype="bfloat16").create_lora_training_client(model_folder("llama"), 4, 0)
    engine = engine_of(low.result())
    assert engine.bank._mergeable(adapter_of(low.result())) == []


def test_a_snapshot_is_a_copy_of_the_adapter_and_is_released(service, model_folder):
    """At rest it holds tensors of the adapter's size and nothing of the model."""
    client = service.create_lora_training_client(model_folder(), 4, 0).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    held = sampler._backend._adapter
    mine = adapter_of(client)
    assert [p.shape for p in held.params] == [p.shape for p in mine.params]
    assert not {p.data_ptr() for p in held.params} & {p.data_ptr() for p in mine.params}
    assert held.grads is None
    params = SamplingParams(max_tokens=20, stop=[])
    sampler.sample(ModelInput.from_ints(ids(4)), 2, params).result()
    released = weakref.ref(held)
    del sampler, held
    client.save_weights_and_get_sampling_client().result()  # the queue has moved on
    gc.collect()
    assert released() is None
