"""Decoding in graphs, without a GPU: a recorder stands in for CUDA's capture and replay.

The recorder replays operations on the tensors of the capture, as a CUDA graph does on addresses: a
step that read anything else, from Python or from a new tensor, would repeat its first answer.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from cookbook_core.backend.local.sampling import graph, sampler
from cookbook_core.backend.local.sampling.cache_budget import CacheBudget
from cookbook_core.backend.local.sampling.decoder import Decoder
from cookbook_core.backend.local.sampling.kv_cache import RowCache
from cookbook_core.backend.local.sampling.sampler import sample_batch
from cookbook_core.backend.sampling_requests import SampleRequest
from cookbook_core.errors import ModelError
from cookbook_core.types import SamplingParams
from tests.oracles.logprobs import adapter_of, engine_of, randomize
from tests.test_sampler import ids, load, request, tokens_of

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Recorder(TorchDispatchMode):
    """Stands in for a torch.cuda.CUDAGraph.

    As a mode it records operations and undoes what they wrote, since a capture computes nothing;
    an operation that CUDA would wait for fails, as it does in a capture.
    """

    replays = 0

    def __enter__(self) -> Any:
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__.split(".")[0] in SYNCS:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            x = given.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(x, torch.Tensor):
                self.before.setdefault(x.untyped_storage().data_ptr(), _whole_copy(x))
        out = func(*args, **kwargs)
        outs = [x for x in _flat(out) if isinstance(x, torch.Tensor)]
        inputs = {x.untyped_storage().data_ptr() for x in _flat([args, kwargs.values()]) if _is(x)}
        new = [x for x in outs if x.untyped_storage().data_ptr() not in inputs]
        if new or any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments):
            self.calls.append((func, args, kwargs, new))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for whole, copy in self.before.values():
            whole.copy_(copy)

    def replay(self) -> None:
        Recorder.replays += 1
        for func, args, kwargs, new in self.calls:
            outs = [x for x in _flat(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, x in zip(new, outs, strict=False):
                old.copy_(x)


def _is(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _flat(x: Any) -> list[Any]:
    if isinstance(x, torch.Tensor) or not hasattr(x, "__iter__") or isinstance(x, str):
        return [x]
    return [leaf for entry in x for leaf in _flat(entry)]


def _whole_copy(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return whole, whole.clone()


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for on the CPU."""


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """Decode in graphs on the CPU, the capture being a Recorder's; sizes small enough to change."""
    monkeypatch.setattr(sampler, "can_capture", lambda decoder, rows: decoder.pads)
    monkeypatch.setattr(graph, "COLUMNS", 16)
    monkeypatch.setattr(Recorder, "replays", 0)

    @contextlib.contextmanager
    def capture(recorder: Recorder, **_: Any) -> Iterator[None]:
        with recorder:
            yield

    for name, value in {
        "Stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": Stream,
        "graph_pool_handle": lambda: None,
        "CUDAGraph": Recorder,
        "graph": capture,
        "synchronize": lambda _: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Recorder


def assert_same(found: list[Any], expected: list[Any], bound: float) -> None:
    assert tokens_of(found) == tokens_of(expected)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a.sequences, b.sequences, strict=True):
            assert x.stop_reason == y.stop_reason
            assert abs(x.logprobs_np - y.logprobs_np).max() < bound


# ---- same samples as the loop that steps one by one ---------------------------------------------


def requests_of(kind: str) -> list[SampleRequest]:
    if kind == "ragged":
        shapes = [(1, 2, 9), (5, 3, 34), (17, 2, 12), (20, 1, 4)]
        return [request(ids(n), k, max_tokens=x, temperature=0.6, seed=n) for n, k, x in shapes]
    if kind == "33 rows that stop":
        return [request(ids(12), 33, max_tokens=40, seed=3, stop=list(range(20, 26)))]
    if kind == "filters":
        return [
            request(ids(7), 3, max_tokens=20, seed=1, top_k=5),
            request(ids(9, 1), 3, max_tokens=25, seed=2, top_p=0.7, temperature=1.3),
            request(ids(7, 2), 2, max_tokens=9, temperature=0),
            SampleRequest(ids(11), 2, SamplingParams(max_tokens=17, seed=4, stop=[]), True, 3),
        ]
    if kind == "strings and no limit":
        return [
            request(ids(6), 4, max_tokens=80, seed=5, stop=["a", "ZQ", "x"]),
            request(ids(3), 1, max_tokens=None, seed=6, stop=[7]),
        ]
    return [request([5], 1, max_tokens=70, seed=1)]


KINDS = ["ragged", "33 rows that stop", "filters", "strings and no limit", "one row, one token"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["qwen3", "mistral", "gemma2", "gpt2"])
def test_replayed_steps_give_the_samples_of_the_plain_loop(
    model_folder, small_tokenizer, request, arch, kind
):
    """Windows of 8 columns in mistral and gemma2; gpt2 has no position after its last."""
    model = load(model_folder(arch))
    expected = sample_batch(model, small_tokenizer, requests_of(kind))
    recorder = request.getfixturevalue("captured")
    found = sample_batch(model, small_tokenizer, requests_of(kind))
    # transformers computes gemma2's soft-capped attention in float32
    assert_same(found, expected, 1e-5 if arch == "gemma2" else 1e-9)
    assert recorder.replays > 0
    for a, b in zip(found, expected, strict=True):
        assert (a.prompt_logprobs is None) == (b.prompt_logprobs is None)
        if a.prompt_logprobs is not None:
            assert a.prompt_logprobs[1:] == pytest.approx(b.prompt_logprobs[1:], abs=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31, 33])
def test_every_number_of_rows(model_folder, request, rows):
    model = load(model_folder())
    params = SamplingParams(max_tokens=18, seed=rows, stop=[30, 31, 32])
    asked = [SampleRequest(ids(5), rows, params)]
    expected = sample_batch(model, None, asked)
    request.getfixturevalue("captured")
    assert_same(sample_batch(model, None, asked), expected, 1e-9)


def test_the_cache_grows_and_is_captured_anew(model_folder, monkeypatch, request):
    """Allocated for 2 + 8 tokens, a row gets 90."""
    model = load(model_folder())
    asked = [SampleRequest(ids(2), 3, SamplingParams(max_tokens=None, seed=2, stop=[9]))]
    expected = sample_batch(model, None, asked, max_context_length=92)
    request.getfixturevalue("captured")
    for module in ("decoder", "rows"):
        monkeypatch.setattr(f"cookbook_core.backend.local.sampling.{module}.OPEN_ENDED", 8)
    grown, reserve = [], RowCache.reserve
    monkeypatch.setattr(RowCache, "reserve", lambda self, n: (grown.append(n), reserve(self, n))[1])
    found = sample_batch(model, None, asked, max_context_length=92)
    assert_same(found, expected, 1e-9)
    assert grown == [32, 64, 128]


def test_a_row_that_has_stopped_at_the_last_position_stays_there(model_folder, request):
    """gpt2 has 256 positions: rows of limits 6 and 16, read 8 steps at a time."""
    model = load(model_folder("gpt2"))
    params = SamplingParams(max_tokens=None, seed=1, stop=[])
    asked = [SampleRequest(ids(n), 1, params) for n in (250, 240)]
    expected = sample_batch(model, None, asked)
    request.getfixturevalue("captured")
    found = sample_batch(model, None, asked)
    assert_same(found, expected, 1e-9)
    assert [len(response.sequences[0].tokens) for response in found] == [6, 16]


def test_an_unmerged_adapter_is_replayed(make_service, model_folder, request):
    client = make_service(dtype="float64").create_lora_training_client(model_folder(), 4, 0)
    client = client.result()
    randomize(client, scale=0.3)
    engine, adapter = engine_of(client), adapter_of(client)
    engine._merges = lambda _: False
    asked = [SampleRequest(ids(6), 3, SamplingParams(max_tokens=20, seed=1, stop=[]))]
    expected = engine.sample(adapter, asked)
    assert tokens_of(engine.sample(None, asked)) != tokens_of(expected)
    recorder = request.getfixturevalue("captured")
    assert_same(engine.sample(adapter, asked), expected, 1e-9)
    assert recorder.replays > 0


# ---- what a step does, and how often -------------------------------------------------------------


def test_each_size_is_run_once_captured_once_and_replayed(model_folder, captured, monkeypatch):
    """40 tokens for 9 rows in 16 and 8, columns 16, 32 and 48 of 12 + 40."""
    events: list[str] = []
    run, capture, step = graph.Graphs.run, graph.Graphs._capture, graph.StaticLoop.step
    monkeypatch.setattr(
        graph.Graphs, "_capture", lambda *a: (events.append("capture"), capture(*a))[1]
    )
    monkeypatch.setattr(graph.StaticLoop, "step", lambda *a: (events.append("step"), step(*a))[1])
    monkeypatch.setattr(
        graph.Graphs,
        "run",
        lambda self, k, s, n: (events.append(f"{k} {n}"), run(self, k, s, n))[1],
    )
    asked = [request(ids(12), 8, max_tokens=32, seed=1), request(ids(12), 1, max_tokens=40, seed=2)]
    sample_batch(load(model_folder()), None, asked)
    new = ["step", "capture", "step"]
    assert events == [
        *["(16, 32) 8", *new, "(16, 32) 8"],
        *["(16, 48) 8", *new, "(16, 48) 8"],
        *["(8, 64) 8", *new],
    ]
    assert captured.replays == 40 - 3


def test_a_step_makes_no_tensor_from_host_data(model_folder, captured, monkeypatch):
    """In a graph it would be copied from host memory that has changed since the capture."""
    recorders: list[Recorder] = []
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: recorders.append(Recorder()) or recorders[-1]
    )
    asked = [request(ids(6), 3, max_tokens=20, seed=1, top_k=5, top_p=0.9, temperature=0.7)]
    sample_batch(load(model_folder(), torch.float32), None, asked)
    names = {call[0].__name__ for recorder in recorders for call in recorder.calls}
    assert "index_copy_.default" in names
    assert not [n for n in names if "lift_fresh" in n or n.startswith("_to_copy.device")]


# ---- what cannot be captured ---------------------------------------------------------------------


def test_a_model_that_waits_for_the_device_is_decoded_step_by_step(
    model_folder, request, monkeypatch, caplog
):
    """Found while nothing is captured; said once; same samples."""
    model, asked = load(model_folder()), requests_of("ragged")
    expected = sample_batch(model, None, asked)
    recorder = request.getfixturevalue("captured")
    monkeypatch.setattr(
        sampler, "can_capture", lambda decoder, rows: decoder.core not in graph._refused
    )
    inner = graph.StaticLoop.step

    def waits(self: Any, *size: int) -> None:
        warnings.warn("called a synchronizing CUDA operation (item)", stacklevel=1)
        inner(self, *size)

    monkeypatch.setattr(graph.StaticLoop, "step", waits)
    for _ in range(2):
        assert_same(sample_batch(model, None, asked), expected, 1e-9)
    assert recorder.replays == 0
    assert caplog.text.count("without CUDA graphs") == 1
    assert "waits for the device" in caplog.text


def test_a_capture_that_fails_says_why(model_folder, request, monkeypatch, caplog):
    model, asked = load(model_folder()), requests_of("ragged")
    expected = sample_batch(model, None, asked)
    request.getfixturevalue("captured")
    inner = graph.StaticLoop.step

    def reads(self: Any, *size: int) -> None:
        inner(self, *size)
        self.count.item()

    monkeypatch.setattr(graph.StaticLoop, "step", reads)
    assert_same(sample_batch(model, None, asked), expected, 1e-9)
    assert "the capture failed: operation not permitted when stream is capturing" in caplog.text


def test_a_model_with_an_attention_of_its_own_is_not_captured(
    model_folder, request, monkeypatch, caplog
):
    """It sees the columns not filled yet: other logits than those of a plain step."""
    model, asked = load(model_folder()), requests_of("ragged")
    expected = sample_batch(model, None, asked)
    recorder = request.getfixturevalue("captured")
    inner = Decoder.forward

    def sees_all(self: Decoder, cache: Any, ids: Any, first: Any, mask: Any, whole: bool) -> Any:
        if cache.layers[0].column is not None:
            mask = torch.ones(len(ids), 1, 1, mask.shape[1], dtype=torch.bool)
        return inner(self, cache, ids, first, mask, whole)

    monkeypatch.setattr(Decoder, "forward", sees_all)
    assert_same(sample_batch(model, None, asked), expected, 1e-9)
    assert recorder.replays == 0
    assert "its logits over static tensors differ by" in caplog.text


def test_out_of_memory_while_capturing_halves_the_cache(model_folder, request, monkeypatch):
    model, asked = load(model_folder()), requests_of("33 rows that stop")
    expected = sample_batch(model, None, asked)
    request.getfixturevalue("captured")
    inner = graph.StaticLoop.step

    def limited(self: Any, rows: int, columns: int) -> None:
        if rows > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        inner(self, rows, columns)

    monkeypatch.setattr(graph.StaticLoop, "step", limited)
    budget = CacheBudget(10_000)
    assert_same(sample_batch(model, None, asked, budget=budget), expected, 1e-9)
    assert budget.lowered == 33 * 52 // 2


def test_output_that_is_not_finite_is_refused(model_folder, captured, monkeypatch):
    """In the middle of a chunk, after a capture."""
    inner = graph.StaticLoop.logits
    monkeypatch.setattr(
        graph.StaticLoop,
        "logits",
        lambda self, *size: torch.where(self.count < 11, inner(self, *size), torch.nan),
    )
    with pytest.raises(ModelError, match="completion token 11"):
        sample_batch(load(model_folder()), None, [request(ids(4), max_tokens=20, seed=0)])
