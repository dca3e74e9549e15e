"""Who may send what, and bad input: the server lives, and nothing changes."""

from __future__ import annotations

import concurrent.futures
import gc
import gzip
import json
import random
import socket
import time
import urllib.parse
from pathlib import Path

from cookbook_core.errors import ConfigError
from cookbook_core.serve import replies, turns, wire
from cookbook_core.serve.guard import check_exposure
from cookbook_core.serve.state import Options
from tests.conftest import make_random_data
from tests.serve.running import NAME, Running, Wire, adam, proto_scoring, scoring

import numpy as np
import pytest
import zstandard

KEY = "a-long-secret"


@pytest.fixture(scope="module")
def locked(model_folder, tmp_path_factory):
    """A server with a key and a small limit on bodies."""
    root = tmp_path_factory.mktemp("locked")
    options = Options(max_adapters=2, max_waiting=0)
    with Running(
        model_folder("qwen3"), root, key=KEY, most_bytes=1 << 20, options=options
    ) as server:
        yield server


@pytest.fixture
def client(locked):
    with Wire(locked.url) as made:
        made.http.headers["x-api-key"] = KEY
        yield made


def test_the_key(locked, client):
    assert client.get("get_server_capabilities").status_code == 200
    for headers in ({"x-api-key": "wrong-secret"}, {"x-api-key": ""}, {"x-api-key": b"\xe9"}):
        with Wire(locked.url) as other:
            reply = other.http.get("/api/v1/get_server_capabilities", headers=headers)
            assert reply.status_code == 401
            assert KEY not in reply.text
    bearer = {"authorization": f"Bearer {KEY}"}
    with Wire(locked.url) as other:
        assert other.http.get("/v1/models", headers=bearer).status_code == 200
        page = other.http.get("/")
        assert page.status_code == 401
        assert page.headers["www-authenticate"].startswith("Basic")
        assert other.http.get("/", auth=("", KEY)).status_code == 200
        assert other.get("healthz").status_code == 200  # says nothing


def test_an_address_that_others_reach_needs_a_key():
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(ConfigError, match="needs a key"):
            check_exposure(host, None)
        check_exposure(host, KEY)
    for host in ("127.0.0.1", "localhost", "::1"):
        check_exposure(host, None)
    with pytest.raises(ConfigError, match="too short"):
        check_exposure("127.0.0.1", "short")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "10.0.0.7"}, 403),
        ({"origin": "http://127.0.0.1"}, 403),
        ({"origin": "null"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": ""}, 415),
        ({"content-encoding": "br"}, 415),
        ({"content-encoding": "gzip"}, 422),
        ({"content-encoding": "zstd"}, 422),
    ],
)
def test_what_a_web_page_could_send_is_refused(client, headers, status):
    """Before any endpoint: create_session would make a session of this body."""
    body = b'{"tags": [], "user_metadata": null, "sdk_version": "0"}'
    headers = {"content-type": "application/json", **headers}
    reply = client.http.post("/api/v1/create_session", content=body, headers=headers)
    assert reply.status_code == status
    assert reply.json()["detail"]


def test_bodies_are_bounded_as_they_unpack(locked, client):
    """A few kilobytes that would unpack to a gigabyte."""
    zeros = b" " * (1 << 20)
    packer = zstandard.ZstdCompressor().compressobj()
    bomb = b"".join(packer.compress(zeros) for _ in range(1000)) + packer.flush()
    assert len(bomb) < 1 << 17
    as_type = {"content-type": "application/json"}
    for encoding, body in (("zstd", bomb), ("gzip", gzip.compress(zeros * 64))):
        headers = {**as_type, "content-encoding": encoding}
        began = time.monotonic()
        reply = client.http.post("/api/v1/telemetry", content=body, headers=headers)
        assert reply.status_code == 413
        assert "--max_request_mb" in reply.json()["detail"]
        assert time.monotonic() - began < 5
    plain = client.http.post("/api/v1/telemetry", content=zeros + b"{}", headers=as_type)
    assert plain.status_code == 413
    for encoding, pack in (("gzip", gzip.compress), ("zstd", zstandard.compress)):
        headers = {**as_type, "content-encoding": encoding}
        body = pack(b'{"tags": [], "sdk_version": "0"}')
        reply = client.http.post("/api/v1/create_session", content=body, headers=headers)
        assert reply.status_code == 200
        cut = client.http.post("/api/v1/create_session", content=body[:-9], headers=headers)
        assert cut.status_code == 422


def test_limits_on_adapters_and_samples(locked, client):
    made = [client.start() for _ in range(2)]
    body = {"session_id": client.session, "model_seq_id": 5, "base_model": NAME}
    refused = client.post("create_model", body)
    assert refused.status_code == 422
    assert "--max_adapters" in refused.json()["detail"]
    client.call("unload_model", {"model_id": made[0]})
    assert client.post("create_model", body).status_code == 202
    opened = {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": NAME}
    sampler = client.post("create_sampling_session", opened).json()["sampling_session_id"]
    prompt = {"chunks": [{"tokens": [5], "type": "encoded_text"}]}
    body = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "num_samples": 1}
    reply = client.post("asample", {**body, "sampling_params": {"max_tokens": 1}})
    assert reply.status_code == 429  # the one status that tells clients to send it again
    assert reply.headers["retry-after"]
    client.http.post(f"/api/v1/sessions/{client.session}/finish")
    assert not locked.service.models


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "a\\b", ".hidden", "", "x" * 200, "a\0b"])
def test_checkpoint_names_cannot_leave_the_folder(running, name):
    with Wire(running.url) as client:
        model = client.start()
        body = {"model_id": model, "seq_id": 1, "path": name}
        reply = client.call("save_weights", body)
        assert "not usable as a checkpoint name" in reply["error"]
        quoted = urllib.parse.quote(name or "..", safe="/")
        run = f"training_runs/{model}/checkpoints/weights/{quoted}"
        assert client.http.delete(f"/api/v1/{run}").status_code in (404, 405, 422)
        path = f"tinker://{model}/weights/{name}"
        for endpoint, more in (
            ("weights_info", {"tinker_path": path}),
            ("create_sampling_session", {"session_id": client.session, "model_path": path,
                                         "sampling_session_seq_id": 1}),
        ):  # fmt: skip
            assert client.post(endpoint, more).status_code in (404, 422)
    root = Path(running.service.saved.root)
    assert not (root.parent / "x").exists()


# ---- bad input -----------------------------------------------------------------------------------

ENDPOINTS = (
    "create_session", "session_heartbeat", "create_model", "get_info", "unload_model", "forward",
    "forward_backward", "optim_step", "save_weights", "save_weights_for_sampler", "load_weights",
    "weights_info", "create_sampling_session", "asample", "retrieve_future", "cancel_future",
    "create_custom_loss", "client/config", "telemetry",
)  # fmt: skip
VALUES = (
    None, True, -1, 2**70, 1e400, "", "\0", "x" * 5000, [], [[]], {}, {"a": {"b": []}}, [None] * 50,
    float("nan"), "\ud800", {"chunks": 3}, {"nodes": [{}]},
)  # fmt: skip


def good_bodies(model: str, session: str) -> dict[str, dict]:
    data = make_random_data(2)
    prompt = {"chunks": [{"tokens": [5], "type": "encoded_text"}]}
    return {
        "create_session": {"tags": [], "user_metadata": {}, "sdk_version": "0"},
        "create_model": {"session_id": session, "model_seq_id": 900, "base_model": NAME,
                         "lora_config": {"rank": 2}},
        "forward_backward": scoring(model, 1, data),
        "forward": scoring(model, 1, data, forward=True),
        "optim_step": adam(model, 1),
        "save_weights": {"model_id": model, "seq_id": 1, "path": "a"},
        "load_weights": {"model_id": model, "seq_id": 1, "path": "tinker://x", "optimizer": True},
        "asample": {"sampling_session_id": "x", "prompt": prompt, "num_samples": 1,
                    "sampling_params": {"max_tokens": 1}},
        "create_custom_loss": {"session_id": session, "name": "f", "inputs": [], "graph": {}},
        "create_sampling_session": {"session_id": session, "sampling_session_seq_id": 900,
                                    "base_model": NAME},
    }  # fmt: skip


def mutated(rng: random.Random, value):
    """A copy with one value replaced, dropped or duplicated, somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        return [*value[:i], mutated(rng, value[i]), *value[i + (rng.random() < 0.8) :]]
    return rng.choice(VALUES)


def held(running) -> dict[str, int]:
    """How many of each thing the server holds, once its queue is empty."""
    running.backend.worker.submit("wait", int).result(60)

    def count() -> dict[str, int]:
        service, backend = running.service, running.backend
        service.promises.forget_old()
        gc.collect()
        return {
            "promises": len(service.promises),
            "models": len(service.models),
            "waiting": sum(len(model.turns) for model in service.models.values()),
            "sessions": len(service.sessions),
            "losses": sum(len(session.graphs) for session in service.sessions.values()),
            "samplers": len(service.samplers),
            "samples waiting": service.samplers._waiting,
            "adapters": len(backend._adapters),
            "kept graphs": len(backend.kept),
            "jobs": len(backend.worker._jobs),
        }

    return running.in_loop(count)


def finish(client: Wire, running, before: set[str]) -> None:
    """End the sessions that came since."""
    for session in set(running.service.sessions) - before:
        client.http.post(f"/api/v1/sessions/{session}/finish")


def fuzzed(rng: random.Random, good: dict, whole: bytes) -> tuple[str, bytes, bool]:
    """An endpoint, a body, and whether that claims to be protobuf."""
    name, kind = rng.choice(ENDPOINTS), rng.random()
    if kind < 0.2:
        return name, rng.randbytes(rng.randrange(60)), rng.random() < 0.5
    if kind < 0.4:
        at = rng.randrange(len(whole))
        cut = whole[:at] + rng.randbytes(rng.randrange(3)) + whole[at + 1 :]
        return name, cut[: rng.randrange(len(whole))], True
    return (
        name,
        as_json(mutated(rng, good.get(name, {"model_id": good["optim_step"]["model_id"]}))),
        False,
    )


def test_fuzzed_bodies_change_nothing(running, monkeypatch):
    """Random bytes, wrong types, truncated protobuf: no 5xx, nothing kept, no other's numbers.

    The engine is blocked: every answer comes without it, and none costs it more than one request.
    """
    monkeypatch.setattr(replies, "KEEP_SECONDS", -1.0)
    monkeypatch.setattr(replies, "HOLD_SECONDS", 0.0)
    monkeypatch.setattr(turns, "GAP_SECONDS", 0.02)
    rng, worker = random.Random(0), running.backend.worker
    sessions, before = set(running.service.sessions), held(running)
    with Wire(running.url) as client:
        model, twin, victim = client.start(), client.start(), client.start()
        for one in (model, twin):
            client.call("forward_backward", scoring(one, 1, make_random_data(2)))
        weights = {key: p.clone() for key, p in running.adapter(model).named().items()}
        whole = proto_scoring(victim, 1, make_random_data(2, k=2))
        good, promises = good_bodies(victim, client.session), []
        blocked = concurrent.futures.Future()
        worker.submit("block", blocked.result)
        for _ in range(400):
            name, content, proto = fuzzed(rng, good, whole)
            headers = {"content-type": f"application/{'x-protobuf' if proto else 'json'}"}
            jobs = len(worker._jobs)
            reply = client.http.post(f"/api/v1/{name}", content=content, headers=headers)
            assert reply.status_code < 500, (name, content[:300], reply.text)
            assert "internal error" not in reply.text, (name, content[:300], reply.text)
            assert len(worker._jobs) <= jobs + 1
            if reply.status_code == 202:
                promises.append((reply.json()["request_id"], content))
        blocked.set_result(None)
        for request_id, content in promises:
            shown = client.result(request_id)
            assert "internal error" not in str(shown), (content[:400], shown)
        after = running.adapter(model).named()
        assert all((after[key] == weights[key]).all() for key in weights)
        grads, expected = running.gradient(model), running.gradient(twin)
        assert all((grads[key] == expected[key]).all() for key in expected)
        client.call("forward_backward", scoring(model, 2, make_random_data(2)))
        fine = client.call("optim_step", adam(model, 3))
        assert fine["metrics"]["update_norm:mean"] > 0
        finish(client, running, sessions)
        assert held(running) == before


def test_fuzzed_lists_and_completions_leave_nothing(running, monkeypatch):
    """The endpoints that answer at once, with any path, query or method."""
    monkeypatch.setattr(replies, "KEEP_SECONDS", -1.0)
    rng, odd = (
        random.Random(1),
        ("x", "..", "%00", "%2e%2e%2f", "a:train:0", "\u00e9", "weights", "9" * 40),
    )
    bodies = {
        "completions": {"model": NAME, "prompt": "a b", "max_tokens": 2, "echo": True,
                        "stream": True, "stop": ["x"], "logprobs": 1, "n": 2},
        "chat/completions": {"model": NAME, "messages": [{"role": "user", "content": "a"}],
                             "max_tokens": 2, "stream": True, "top_logprobs": 1, "logprobs": True},
    }  # fmt: skip
    rooms = ("api/v1/checkpoints", "api/v1/training_runs", "api/v1/sessions", "api/v1/samplers",
             "api/v1/training_runs/a:train:0/checkpoints/weights", "v1", "v1/models")  # fmt: skip
    with Wire(running.url) as client:
        for name, body in bodies.items():  # opens the sampler of the base model, which stays
            client.http.post(f"/v1/{name}", json=body)
        sessions, before = set(running.service.sessions), held(running)
        for _ in range(150):
            path = "/".join([rng.choice(rooms), *rng.choices(odd, k=rng.randrange(3))])
            query = {rng.choice(("limit", "offset", "x")): rng.choice(odd)}
            method = rng.choice(("GET", "GET", "PUT", "DELETE", "POST"))
            reply = client.http.request(method, f"/{path}", params=query)
            assert reply.status_code < 500, (method, path, reply.text)
            assert "internal error" not in reply.text, (method, path, reply.text)
        for _ in range(100):
            name = rng.choice(sorted(bodies))
            content = as_json(mutated(rng, bodies[name]))
            headers = {"content-type": "application/json"}
            reply = client.http.post(f"/v1/{name}", content=content, headers=headers)
            assert reply.status_code < 500, (name, content, reply.text)
            assert "internal error" not in reply.text, (name, content, reply.text)
        finish(client, running, sessions)
        assert held(running) == before


def as_json(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def test_absurd_shapes_are_refused(running):
    with Wire(running.url) as client:
        model = client.start()
        message = wire.MESSAGES["Request"](model_id=model, seq_id=1, loss_fn="cross_entropy")
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.asarray([5, 6], np.int32).tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dtype, target.dense = 2, np.asarray([1, 2]).tobytes()
        for seq, shape in enumerate([[1 << 40], [-1, 2], [2, 0], [2, 1 << 62]], start=1):
            target.shape[:] = shape
            message.seq_id = seq
            reply = client.call("forward_backward", message.SerializeToString())
            assert 'data[0].loss_fn_inputs["target_tokens"]' in reply["error"]
        deep = b"[" * 100_000 + b"]" * 100_000
        for name in ("forward_backward", "create_session"):
            reply = client.http.post(f"/api/v1/{name}", content=deep,
                                     headers={"content-type": "application/json"})  # fmt: skip
            assert reply.status_code == 422


def test_clients_that_vanish_leave_nothing(running):
    """A half-sent body, and polls that are never read."""
    blocked = concurrent.futures.Future()
    with Wire(running.url) as client:
        model = client.start()
        running.backend.worker.submit("block", blocked.result)
        promise = client.promise("forward_backward", scoring(model, 1, make_random_data(1)))
        host, port = running.url.removeprefix("http://").split(":")
        for content in (b'{"request_id": "', f'{{"request_id": "{promise}"}}'.encode()):
            for length in (len(content), len(content) + 50):
                with socket.create_connection((host, int(port))) as line:
                    head = f"POST /api/v1/retrieve_future HTTP/1.1\r\nhost: {host}\r\n"
                    head += f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
                    line.sendall(head.encode() + content)
        blocked.set_result(None)
        assert "metrics" in client.result(promise)
