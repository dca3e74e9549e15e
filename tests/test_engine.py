"""The engine from outside in: few frames to the loss, units of sampling, a queue that finishes."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cookbook_core import clients
from cookbook_core.backend.local import engine
from cookbook_core.backend.worker import Worker
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.tinker import ModelInput, SamplingParams, TrainingClient
from tests.oracles.logprobs import adapter_of, engine_of

import pytest
import torch

CORE = str(Path(engine.__file__).parents[2])


@pytest.mark.parametrize("form", ["logprobs", "vocab_logprobs"])
def test_few_named_frames_lead_to_the_loss(
    connect: Callable[..., TrainingClient], random_data: Any, form: Any
) -> None:
    """At most 8 of our own between the queue and the user's function, none anonymous."""
    names: list[str] = []

    def loss(data: Any, scores: Any) -> Any:
        frame = sys._getframe().f_back
        while frame is not None:
            if frame.f_code.co_filename.startswith(CORE):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        return scores[0][0].sum(), {}

    connect().forward_backward_custom(random_data(2), loss, loss_type_input=form).result()
    assert names[-1] == "_serve"
    assert "forward_backward" in names
    assert len(names) <= 8
    assert not [name for name in names if name.startswith("<") or name == "run"]


def test_a_batch_of_prompts_is_decoded_as_one_unit(
    connect: Callable[..., TrainingClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout is one call of the sampler, whatever else waits in the queue, before or behind."""
    sizes: list[int] = []
    sample_batch = engine.sample_batch

    def counted(model: Any, tokenizer: Any, requests: Any, **options: Any) -> Any:
        sizes.append(len(requests))
        return sample_batch(model, tokenizer, requests, **options)

    monkeypatch.setattr(engine, "sample_batch", counted)
    client = connect()
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt, params = ModelInput.from_ints([5, 6, 7]), SamplingParams(max_tokens=2, stop=[], seed=1)
    release = threading.Event()
    blocked = client._backend._backend.worker.submit("block", release.wait, 30)
    singles = [sampler.sample(prompt, 1, params) for _ in range(3)]
    rolled = sampler.sample_batch([prompt] * 4, 2, [params] * 4)
    rolled += sampler.sample_batch([prompt] * 5, 1, [params] * 5)  # a unit of its own
    singles += [sampler.sample(prompt, 1, params) for _ in range(2)]
    release.set()
    assert blocked.result()
    for future in [*singles, *rolled]:
        future.result()
    assert sizes == [3, 4, 5, 2]
    groups = clients.rollout(sampler, [[5, 6], [7, 8]], 3, max_tokens=2)
    assert sizes == [3, 4, 5, 2, 2]
    assert [len(group) for group in groups] == [3, 3]


def test_coroutines_that_start_together_are_one_unit(
    connect: Callable[..., TrainingClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tinker-cookbook scores references and samples: gathered, however long each takes to ask.

    One that is refused fails alone.
    """
    sizes: list[int] = []
    score = engine.Engine.score

    def counted(self: Any, adapter: Any, data: Any, datum_indices: Any = None) -> Any:
        sizes.append(len(data))
        return score(self, adapter, data, datum_indices)

    monkeypatch.setattr(engine.Engine, "score", counted)
    sampler = connect().save_weights_and_get_sampling_client().result()
    make = sampler._backend.compute_logprobs

    def slowly(prompt: ModelInput) -> Any:
        time.sleep(0.02)
        return make(prompt)

    monkeypatch.setattr(sampler._backend, "compute_logprobs", slowly)

    async def gathered() -> list[Any]:
        prompts = [ModelInput.from_ints([5, 6, 7 + n]) for n in range(5)]
        prompts.insert(2, ModelInput.from_ints([5]))
        return await asyncio.gather(
            *(sampler.compute_logprobs_async(p) for p in prompts), return_exceptions=True
        )

    results = asyncio.run(gathered())
    assert sizes == [5]
    assert isinstance(results[2], DatumError)
    assert [len(r) for n, r in enumerate(results) if n != 2] == [3] * 5


def test_parameters_of_a_batch_of_prompts(connect: Callable[..., TrainingClient]) -> None:
    sampler = connect().save_weights_and_get_sampling_client().result()
    prompt = ModelInput.from_ints([5, 6, 7])
    with pytest.raises(ConfigError, match=r"sampling_params: not one per prompt.*2, got 1"):
        sampler.sample_batch([prompt] * 2, 1, [SamplingParams(max_tokens=2)])


def test_closing_serves_what_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: close() returned after five seconds, whatever was still to be served."""
    timeouts: list[Any] = []
    join = threading.Thread.join

    def noted(self: threading.Thread, timeout: float | None = None) -> None:
        timeouts.append(timeout)
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", noted)
    worker, release, done = Worker("test"), threading.Event(), []
    worker.submit("first", release.wait, 30)
    worker.submit("second", done.append, 2)
    threading.Timer(0.2, release.set).start()
    worker.close()
    assert done == [2]
    assert timeouts == [None]


def test_merging_follows_the_machine_not_its_load(
    connect: Callable[..., TrainingClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged and unmerged adapters differ in last bits: the choice must not change in a run."""
    client = connect("llama")
    one, adapter = engine_of(client), adapter_of(client)
    one_size = one.bank.merged_bytes(adapter)
    assert one_size > 0
    chosen: list[Any] = []
    monkeypatch.setattr(one.bank, "merged", lambda a: chosen.append(a) or torch.no_grad())
    for free in (0, 10**15):
        monkeypatch.setattr(
            "cookbook_core.backend.local.model.memory.free_bytes", lambda _, free=free: free
        )
        with one.merged(adapter):
            pass
    assert chosen == [adapter, adapter]
    monkeypatch.setattr(engine, "total_bytes", lambda _: one_size)
    with one.merged(adapter):
        pass
    assert chosen[-1] is None
    assert one.machine(adapter)["merged_for_sampling"] is False
