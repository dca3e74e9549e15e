"""Adapters side by side, samples together, snapshots that nobody releases, kept graphs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import time
from pathlib import Path

from cookbook_core import tinker
from cookbook_core.backend.local.kept_graphs import digest
from cookbook_core.serve.samplers import gather_seconds
from cookbook_core.serve.state import Options
from tests.conftest import make_random_data
from tests.serve.running import NAME, Running, Wire, adam, scoring

import numpy as np
import pytest

PROMPT = {"chunks": [{"tokens": [5, 6, 7], "type": "encoded_text"}]}


def sampling(sampler: str, seq: int, count: int = 1, **params) -> dict:
    params = {"max_tokens": 4, "temperature": 1.0, "stop": [], **params}
    return {"sampling_session_id": sampler, "seq_id": seq, "prompt": PROMPT,
            "num_samples": count, "sampling_params": params}  # fmt: skip


def snapshot(client: Wire, model: str, seq: int) -> str:
    made = client.call(
        "save_weights_for_sampler",
        {"model_id": model, "seq_id": seq, "path": None, "sampling_session_seq_id": seq},
    )
    return made["sampling_session_id"]


def train(client: Wire, model: str, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        data = make_random_data(3, seed=step)
        reply = client.call("forward_backward", scoring(model, 2 * step + 1, data))
        losses.append(reply["metrics"]["loss:sum"])
        client.call("optim_step", adam(model, 2 * step + 2))
    return losses


def test_adapters_of_several_ranks_train_as_if_alone(running):
    """To the bit, and every client gets its turn."""
    ranks = (2, 4, 9)
    with Wire(running.url) as client:
        alone = [train(client, client.start(rank), 4) for rank in ranks]

    def one(rank: int) -> list[float]:
        with Wire(running.url) as other:
            return train(other, other.start(rank), 4)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, ranks)) == alone


def calls_of(monkeypatch, running) -> list[int]:
    """How many requests each call of the engine's sampler decodes."""
    engine, calls = running.backend.engine(), []
    sample = engine.sample

    def counted(adapter, requests):
        calls.append(len(requests))
        return sample(adapter, requests)

    monkeypatch.setattr(engine, "sample", counted)
    return calls


def test_samples_of_one_snapshot_are_decoded_together(running, monkeypatch):
    """Also if other clients' requests are between them in the queue."""
    calls = calls_of(monkeypatch, running)
    with Wire(running.url) as client:
        model, other = client.start(), client.start()
        sampler = snapshot(client, model, 1)
        blocked = concurrent.futures.Future()
        running.backend.worker.submit("block", blocked.result)
        promises = []
        for seq in range(12):
            promises.append(client.promise("asample", sampling(sampler, seq, seed=seq)))
            time.sleep(0.01)  # longer than requests are gathered
            body = scoring(other, seq + 1, make_random_data(1))
            client.promise("forward_backward", body)
        blocked.set_result(None)
        together = [client.result(promise) for promise in promises]
        assert calls == [12]
        alone = client.call("asample", sampling(sampler, 100, seed=3))
    assert alone["sequences"][0]["tokens"] == together[3]["sequences"][0]["tokens"]


def test_requests_that_arrive_together_are_one_unit(running, monkeypatch):
    calls = calls_of(monkeypatch, running)
    with Wire(running.url) as client:
        sampler = snapshot(client, client.start(), 1)
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            bodies = [sampling(sampler, seq) for seq in range(64)]
            replies = list(pool.map(lambda body: client.post("asample", body).json(), bodies))
        assert all(client.result(reply["request_id"])["sequences"] for reply in replies)
    assert sum(calls) == 64
    assert len(calls) < 12  # of 64 requests that arrived within a fraction of a second


def test_bursts_are_waited_for_by_their_pace():
    """Seconds since the first request, requests so far: at 8 ms each, 24 ms to the next."""
    assert gather_seconds(0.0, 1) == 0.004
    assert gather_seconds(0.010, 11) == 0.004
    assert gather_seconds(0.080, 11) == pytest.approx(0.024)
    assert gather_seconds(0.200, 2) == 0.03


def test_small_results_are_encoded_without_another_thread(running, monkeypatch):
    """Starting on it in another thread takes longer than encoding 32 tokens."""
    threads, to_thread = [], asyncio.to_thread

    async def counted(function, *args):
        threads.append(function)
        return await to_thread(function, *args)

    with Wire(running.url) as client:
        model = client.start()
        sampler = snapshot(client, model, 1)
        monkeypatch.setattr(asyncio, "to_thread", counted)
        assert client.call("asample", sampling(sampler, 1))["sequences"]
        assert threads == []
        client.call("forward_backward", scoring(model, 2, make_random_data(1)))
        assert len(threads) == 1


def test_cancelled_samples_are_not_computed(running, monkeypatch):
    calls = calls_of(monkeypatch, running)
    with Wire(running.url) as client:
        sampler = snapshot(client, client.start(), 1)
        blocked = concurrent.futures.Future()
        running.backend.worker.submit("block", blocked.result)
        promises = [client.promise("asample", sampling(sampler, seq)) for seq in range(3)]
        time.sleep(0.1)
        reply = client.post("cancel_future", {"request_id": promises[1]})
        assert reply.json() == {"cancelled": True}
        blocked.set_result(None)
        assert "cancelled" in client.result(promises[1])["error"]
        assert client.result(promises[2])["sequences"]
    assert calls == [2]


def test_snapshots_that_nobody_releases_are_written_to_disk(model_folder, tmp_path):
    """A run makes one every step. Old ones give the same tokens; the oldest are gone."""
    options = Options(max_samplers=2, max_spilled=6)
    with (
        Running(model_folder("qwen3"), tmp_path, options=options) as server,
        Wire(server.url) as client,
    ):
        model, samplers, tokens = client.start(), [], []
        for step in range(12):
            body = scoring(model, 3 * step + 1, make_random_data(3, seed=step))
            client.call("forward_backward", body)
            client.call("optim_step", adam(model, 3 * step + 2, 5e-2))
            samplers.append(snapshot(client, model, 3 * step + 3))
            greedy = sampling(samplers[-1], 0, max_tokens=12, temperature=0.0)
            tokens.append(client.call("asample", greedy)["sequences"][0]["tokens"])
        deadline = time.monotonic() + 10
        folder = tmp_path / ".snapshots"
        while time.monotonic() < deadline and (loaded(server) > 2 or len(names(folder)) > 6):
            time.sleep(0.05)
        assert loaded(server) == 2
        assert len(names(folder)) <= 6
        old = sampling(samplers[6], 1, max_tokens=12, temperature=0.0)
        assert client.call("asample", old)["sequences"][0]["tokens"] == tokens[6]
        assert tokens[6] != tokens[11]
        gone = client.post("asample", sampling(samplers[0], 1))
        assert gone.status_code == 404
        assert "save_weights_for_sampler" in gone.json()["detail"]
        client.http.post(f"/api/v1/sessions/{client.session}/finish")
        deadline = time.monotonic() + 10
        while names(folder) and time.monotonic() < deadline:
            time.sleep(0.05)  # one is being written
        assert not names(folder)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def loaded(server: Running) -> int:
    samplers = server.service.samplers._all.values()
    return sum(sampler.made is not None for sampler in samplers)


def test_what_ended_clients_held_is_freed(running):
    """Adapters, their gradients and graphs, results that were read."""
    from cookbook_core.backend.local.model.adapters import Adapter

    def live() -> int:
        gc.collect()
        return sum(isinstance(thing, Adapter) for thing in gc.get_objects())

    before = live()
    with Wire(running.url) as client:
        for _ in range(3):
            model = client.start()
            train(client, model, 1)
            snapshot(client, model, 3)
        assert live() > before
        client.http.post(f"/api/v1/sessions/{client.session}/finish")
        time.sleep(0.2)
        assert client.post("get_info", {"model_id": model}).status_code == 404
    running.backend.worker.submit("wait", int).result(10)
    assert live() <= before + 1  # the worker's last job


def test_programs_that_ended_without_saying_so_make_room(model_folder, tmp_path, monkeypatch):
    """Older SDKs send no word at their end; what they trained is saved."""
    options = Options(max_adapters=2)
    with (
        Running(model_folder("qwen3"), tmp_path, options=options) as server,
        Wire(server.url) as gone,
        Wire(server.url) as client,
    ):
        models = [gone.start() for _ in range(2)]
        train(gone, models[0], 2)
        client.post("create_session", {"tags": [], "sdk_version": "0"})
        body = {"session_id": gone.session, "model_seq_id": 9, "base_model": NAME}
        assert client.post("create_model", body).status_code == 422  # it lives
        monkeypatch.setattr("cookbook_core.serve.state.SILENT_SECONDS", 0.2)
        time.sleep(0.5)
        model = client.start()
        assert client.call("forward_backward", scoring(model, 1, make_random_data(1)))["metrics"]
        reply = gone.post("optim_step", adam(models[0], 5))
        assert f"tinker://{models[0]}/weights/autosave-2" in reply.json()["detail"]


def test_clients_of_many_ranks_leave_no_layers_behind(running):
    """peft's layers of a rank go with its last adapter; those in use are unchanged."""
    model = running.backend.engine().base.model
    with Wire(running.url) as first:
        kept = first.start(3)
        losses = train(first, kept, 2)
        for rank in range(11, 20):
            with Wire(running.url) as client:
                train(client, client.start(rank), 1)
                client.http.post(f"/api/v1/sessions/{client.session}/finish")
        names = {part for path, _ in model.named_parameters() for part in path.split(".")}
        slots = {name for name in names if name.startswith("slot")}
        in_use = {a.slot.name for a in running.backend._adapters.values()}
        assert len(slots - in_use) <= 2  # the one used last, and that of the last client
        assert train(first, first.start(3), 2) == losses


def test_a_graph_whose_tensors_were_overwritten_is_computed_again(running, monkeypatch):
    engine, data = running.backend.engine(), make_random_data(3)
    whole = engine.forward_backward

    def broken(*args):
        if len(args) > 4:
            raise RuntimeError("modified by an inplace operation")
        return whole(*args)

    with Wire(running.url) as client:
        model, plain = client.start(), client.start()
        pair(client, model, 1, data)
        running.gradient(model)
        monkeypatch.setattr(engine, "forward_backward", broken)
        assert pair(client, model, 3, data) == 2.0
        client.call("forward_backward", scoring(plain, 1, surrogate(data)))
        one, two = running.gradient(model), running.gradient(plain)
    assert all((one[key] == two[key]).all() for key in two)


# ---- one pass for clients that compute their loss ------------------------------------------------


def surrogate(data, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [
        tinker.Datum(d.model_input, {"target_tokens": t, "weights": rng.normal(size=t.shape)})
        for d in data
        for t in [d.loss_fn_inputs["target_tokens"]]
    ]


@pytest.fixture
def forwards(running, monkeypatch) -> list[int]:
    """Tokens of each forward of the model."""
    scorer, made = running.backend.engine().scorer, []
    states = scorer._states

    def counted(batch, *arrays):
        made.append(batch.tokens)
        return states(batch, *arrays)

    monkeypatch.setattr(scorer, "_states", counted)
    return made


def pair(client: Wire, model: str, seq: int, data) -> float:
    client.call("forward", scoring(model, seq, data, forward=True))
    reply = client.call("forward_backward", scoring(model, seq + 1, surrogate(data)))
    return reply["metrics"]["passes:max"]


@pytest.mark.parametrize("k", [None, 3])
def test_the_second_pair_needs_one_forward(running, forwards, k):
    """And has the gradient of two."""
    data = make_random_data(4, k=k)
    with Wire(running.url) as client:
        model, plain = client.start(), client.start()
        assert pair(client, model, 1, data) == 2.0
        running.gradient(model)
        client.call("optim_step", adam(model, 3))  # nothing accumulated: refused, read
        del forwards[:]
        assert pair(client, model, 4, data) == 1.0
        assert len(forwards) == 1
        client.call("forward_backward", scoring(plain, 1, surrogate(data)))
        one, two = running.gradient(model), running.gradient(plain)
    assert all((one[key] == two[key]).all() for key in two)
    assert not len(running.backend.kept)


def test_a_kept_graph_is_not_used_for_other_weights_or_other_tokens(running, forwards):
    data, others = make_random_data(3), make_random_data(3, seed=5)
    assert digest(data) != digest(others)
    with Wire(running.url) as client:
        model = client.start()
        pair(client, model, 1, data)
        client.call("forward", scoring(model, 3, data, forward=True))
        assert len(running.backend.kept) == 1
        reply = client.call("forward_backward", scoring(model, 4, surrogate(others)))
        assert reply["metrics"]["passes:max"] == 1.0  # a plain request
        assert len(running.backend.kept) == 1
        client.call("optim_step", adam(model, 5))
        assert len(running.backend.kept) == 0
        reply = client.call("forward_backward", scoring(model, 6, surrogate(data)))
        assert reply["metrics"]["passes:max"] == 1.0


def test_a_forward_that_nobody_follows_gives_its_memory_back(running, monkeypatch):
    limits = running.backend.engine().limits
    with Wire(running.url) as client:
        model, other = client.start(), client.start()
        data = make_random_data(3)
        pair(client, model, 1, data)
        for seq in (3, 4):
            batch = make_random_data(3, seed=seq)
            client.call("forward", scoring(model, seq, batch, forward=True))
        assert len(running.backend.kept) == 2
        monkeypatch.setattr(limits, "graph_tokens", 1)  # no memory is free
        client.call("forward_backward", scoring(other, 1, data))
        assert len(running.backend.kept) == 0


def test_other_clients_between_the_two_requests_change_nothing(running):
    """The graph reads the parameters in its backward, into which another adapter was put."""
    data = make_random_data(3)
    with Wire(running.url) as client:
        model, plain, other = (client.start(seed=seed) for seed in (0, 0, 7))
        for one in (model, plain):
            train(client, one, 1)
        pair(client, model, 3, data)
        running.gradient(model)
        client.call("forward", scoring(model, 5, data, forward=True))
        train(client, other, 2)
        sampler = snapshot(client, other, 5)
        client.call("asample", sampling(sampler, 0, max_tokens=20))
        reply = client.call("forward_backward", scoring(model, 6, surrogate(data)))
        assert reply["metrics"]["passes:max"] == 1.0
        client.call("forward_backward", scoring(plain, 3, surrogate(data)))
        one, two = running.gradient(model), running.gradient(plain)
    assert all((one[key] == two[key]).all() for key in two)
