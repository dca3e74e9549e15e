"""A server in a thread of the test, and a client that speaks the wire protocol by hand."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cookbook_core.commands.serve import listen, load_bases
from cookbook_core.serve import wire
from cookbook_core.serve.app import make_app
from cookbook_core.serve.service import Service
from cookbook_core.types import ImageChunk
from tests.oracles.logprobs import take_gradient

import httpx
import uvicorn

NAME = "org/tiny-random"


class Running:
    """The server; `url` is where it listens, `service` its state."""

    def __init__(self, folder: str, root: Path, name: str = NAME, **options: Any) -> None:
        self.bases = load_bases([f"{name}={folder}"], root, "cpu", "float32")
        self.app = make_app(self.bases, root, **options)

    def __enter__(self) -> Running:
        listening = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_level="warning", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        run = self._server.run
        self._thread = threading.Thread(target=run, args=([listening],), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def service(self) -> Service:
        return self.app._app.state.service

    @property
    def backend(self) -> Any:
        return next(iter(self.bases.values())).backend

    def in_loop(self, function: Any, *args: Any) -> Any:
        """Call a function in the server's thread."""

        async def call() -> Any:
            return function(*args)

        loop = self._server.servers[0].get_loop()
        return asyncio.run_coroutine_threadsafe(call(), loop).result(10)

    def adapter(self, model_id: str) -> Any:
        """The adapter of a client."""
        return self.service.models[model_id].training._adapter

    def gradient(self, model_id: str) -> dict[str, Any]:
        """A client's accumulated gradient by peft's keys, which is cleared."""
        training = self.service.models[model_id].training
        return take_gradient(SimpleNamespace(_backend=training))  # pyright: ignore


class Wire:
    """A client that sends what a program writes, right or wrong.

    Args:
        url: of the server.
        proto: ask for protobuf where there is such a form.
        agent: User-Agent.
    """

    def __init__(self, url: str, *, proto: bool = False, agent: str = "Test/Python", **more: Any):
        self.http = httpx.Client(base_url=url, timeout=60, headers={"user-agent": agent}, **more)
        self.proto = proto
        self.session = ""
        self._models = 0

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def post(self, name: str, body: Any, **headers: str) -> httpx.Response:
        """Send JSON, or bytes as protobuf."""
        path = f"/api/v1/{name}"
        if isinstance(body, bytes):
            headers = {"content-type": "application/x-protobuf", **headers}
            return self.http.post(path, content=body, headers=headers)
        return self.http.post(path, json=body, headers=headers)

    def get(self, name: str) -> httpx.Response:
        return self.http.get(f"/api/v1/{name}")

    def promise(self, name: str, body: Any) -> str:
        """Send a request; returns its request_id."""
        reply = self.post(name, body)
        assert reply.status_code == 202, reply.text
        return reply.json()["request_id"]

    def result(self, request_id: str) -> Any:
        """Poll for a result: JSON, or a protobuf message."""
        accept = {"accept": "application/x-protobuf"} if self.proto else {}
        while True:
            reply = self.post("retrieve_future", {"request_id": request_id}, **accept)
            if reply.status_code != 408:
                break
        assert reply.status_code == 200, reply.text
        if reply.headers["content-type"] == "application/x-protobuf":
            return reply.content
        return reply.json()

    def call(self, name: str, body: Any) -> Any:
        """Send a request and wait for its result."""
        return self.result(self.promise(name, body))

    def start(self, rank: int = 4, seed: int = 0, **lora: Any) -> str:
        """A model with a fresh adapter; returns its id."""
        if not self.session:
            body = {"tags": [], "user_metadata": None, "sdk_version": "0", "type": "create_session"}
            self.session = self.post("create_session", body).json()["session_id"]
        made = self.call("create_model", {
            "session_id": self.session, "model_seq_id": self._models, "base_model": NAME,
            "lora_config": {"rank": rank, "seed": seed, "train_unembed": False, **lora},
            "type": "create_model",
        })  # fmt: skip
        self._models += 1
        return made["model_id"]


def json_prompt(prompt: Any) -> dict[str, Any]:
    """A ModelInput as JSON."""
    chunks = []
    for chunk in prompt.chunks:
        if isinstance(chunk, ImageChunk):
            fields = {"data": base64.b64encode(chunk.data).decode(), "format": chunk.format}
            fields["expected_tokens"] = chunk.expected_tokens
        else:
            fields = {"tokens": list(chunk.tokens)}
        chunks.append({**fields, "type": chunk.type})
    return {"chunks": chunks}


def json_datums(data: Any) -> list[dict[str, Any]]:
    """Datums as JSON."""
    return [
        {
            "model_input": json_prompt(d.model_input),
            "loss_fn_inputs": {
                key: {"data": t.data, "dtype": t.dtype, "shape": t.shape}
                for key, t in d.loss_fn_inputs.items()
            },
        }
        for d in data
    ]  # fmt: skip


def scoring(
    model_id: str, seq: int, data: Any, loss: str = "cross_entropy", config: Any = None,
    forward: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The JSON body of a forward_backward or forward."""
    inner = {"data": json_datums(data), "loss_fn": loss, "loss_fn_config": config}
    name = "forward_input" if forward else "forward_backward_input"
    return {"model_id": model_id, "seq_id": seq, name: inner}


def proto_scoring(model_id: str, seq: int, data: Any, forward: bool = False) -> bytes:
    """The protobuf body of a cross_entropy request."""
    message = wire.MESSAGES["Request"](
        model_id=model_id, seq_id=seq, loss_fn="cross_entropy", forward_only=forward
    )
    import numpy as np

    for d in data:
        datum = message.data.add()
        for chunk in d.model_input.chunks:
            sent = datum.model_input.add()
            if isinstance(chunk, ImageChunk):
                sent.image.data, sent.image.format = chunk.data, chunk.format
                sent.image.expected_tokens = chunk.expected_tokens
            else:
                sent.encoded_text.tokens = np.asarray(chunk.tokens, np.int32).tobytes()
        for key, t in d.loss_fn_inputs.items():
            tensor = datum.loss_fn_inputs[key]
            tensor.dense, tensor.dtype = t.to_numpy().tobytes(), 1 if t.dtype == "float32" else 2
            tensor.shape.extend(t.shape)
    return message.SerializeToString()


def adam(model_id: str, seq: int, rate: float = 1e-2) -> dict[str, Any]:
    """The body of an optim_step."""
    return {"model_id": model_id, "seq_id": seq, "adam_params": {"learning_rate": rate}}
