"""`cookbook serve`, in a thread of the test, that misbehaves as real services did.

Requests reach the server unchanged, and its replies the client, but for what `Fake.mood` says.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from cookbook_core.serve import wire
from cookbook_core.serve.state import Options
from tests.serve.running import Running

import numpy as np

TRACEBACK = (
    "Server error: \x1b[36mray::Model.forward()\x1b[39m (pid=1)\n"
    'Traceback (most recent call last):\n  File "/srv/model.py", line 1, in forward\n'
    "IndexError: index out of range in self"
)
CONFLICT = "Sequence conflict: expected 1, got 2."


class Fake(Running):
    """The service.

    Moods: "mean" (each datum's weights divided by their sum and by the batch), "nan" (logprobs),
    "short" (an output too few), "flat" ((N, K) flattened), "fail" (a traceback), "poisoned" (422
    to everything after "fail"), "hang" (no answer), "500" (to what is polled for), "no extras"
    (neither heartbeats nor capabilities nor get_info's optional fields), "locked" (403).
    """

    def __init__(self, folder: str, root: Any) -> None:
        super().__init__(folder, root, options=Options(max_adapters=1000))
        self._served, self.app = self.app, self
        (base,) = self.bases.values()
        self.name, self.context, self.mood = base.name, base.data.max_context_length or 0, ""
        self.requests: list[tuple[str, Any]] = []
        """(endpoint, JSON body or decoded protobuf) in order, without polls."""
        self._failed: set[str] = set()
        """Ids of requests of which the client is told TRACEBACK, and of their models."""
        self._samples: set[str] = set()

    @property
    def service(self) -> Any:
        return self._served._app.state.service

    def sent(self, endpoint: str) -> list[Any]:
        """The bodies that came to an endpoint, in order."""
        return [body for name, body in self.requests if name == endpoint]

    def client(self, model_id: str) -> Any:
        """The server's adapter in the place of a client, for tests/oracles."""
        return SimpleNamespace(_backend=self.service.models[model_id].training)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._served(scope, receive, send)
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        endpoint = scope["path"].removeprefix("/api/v1/")
        proto = endpoint == "forward_backward"
        body: Any = wire.parse("Request", raw) if proto else json.loads(raw or b"null")
        if endpoint != "retrieve_future":
            self.requests.append((endpoint, body))
        status, reply = self._refusal(endpoint, body) or (0, None)
        if not status:
            if proto and self.mood == "mean" and not body.forward_only:
                raw = _mean(body)
            status, reply = await self._pass_on(scope, receive, raw)
            reply = self._changed(endpoint, body, reply)
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        kind = b"application/x-protobuf" if isinstance(reply, bytes) else b"application/json"
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(data))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    async def _pass_on(self, scope: Any, receive: Any, raw: bytes) -> tuple[int, Any]:
        """The server's status and reply."""
        given, sent = [{"type": "http.request", "body": raw}], []

        async def once() -> Any:
            return given.pop() if given else await receive()

        async def collect(message: Any) -> None:
            sent.append(message)

        headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
        await self._served({**scope, "headers": headers}, once, collect)
        data = b"".join(message.get("body", b"") for message in sent)
        binary = (b"content-type", b"application/x-protobuf") in sent[0]["headers"]
        return sent[0]["status"], data if binary else json.loads(data or b"null")

    def _refusal(self, endpoint: str, body: Any) -> tuple[int, Any] | None:
        """A refusal that the server would not send."""
        lacking = ("session_heartbeat", "get_server_capabilities")
        if self.mood == "locked":
            return 403, {"detail": "Invalid API key"}
        if self.mood == "no extras" and endpoint in lacking:
            return 404, {"detail": "Not Found"}
        if self.mood == "poisoned" and getattr(body, "model_id", None) in self._failed:
            return 422, {"detail": CONFLICT}
        if endpoint == "retrieve_future" and self.mood == "hang":
            return 200, {"type": "try_again", "request_id": body["request_id"], "queue_state": ""}
        if endpoint == "retrieve_future" and self.mood == "500":
            return 500, {"detail": "Internal Server Error"}
        return None

    def _changed(self, endpoint: str, body: Any, reply: Any) -> Any:
        """A reply as the mood has it."""
        if endpoint == "forward_backward" and self.mood in ("fail", "poisoned"):
            if not body.forward_only:
                self._failed |= {reply["request_id"], body.model_id}
        elif endpoint == "get_info" and self.mood == "no extras":
            del reply["is_lora"], reply["lora_rank"]
        elif endpoint == "retrieve_future" and body["request_id"] in self._failed:
            return {"error": TRACEBACK, "category": "server"}
        elif endpoint == "asample":
            self._samples.add(reply["request_id"])
        elif isinstance(reply, bytes) and body["request_id"] in self._samples:
            return _nan_sample(reply) if self.mood == "nan" else reply
        elif isinstance(reply, bytes):
            return self._output(reply)
        return reply

    def _output(self, raw: bytes) -> bytes:
        """The result of a forward_backward as the mood has it, with a metric of its own."""
        message, logprobs = wire.parse("Output", raw), []
        for record in message.loss_fn_outputs:
            field = record.fields["logprobs"]
            ends = np.frombuffer(field.offsets, np.int64) // 4
            values = np.frombuffer(field.data, np.float32)
            shape = -1, *(() if self.mood == "flat" else field.trailing_shape)
            logprobs += [x.reshape(shape).copy() for x in np.split(values, ends[1:-1])]
        if self.mood == "nan":
            logprobs[-1][0] = np.nan
        if self.mood == "short":
            del logprobs[-1]
        metrics = {**message.metrics, "load:mean": 0.5}
        metrics["loss:sum"] *= 0.1 if self.mood == "mean" else 1.0
        return wire.output_out(logprobs, metrics)


def _nan_sample(raw: bytes) -> bytes:
    message = wire.parse("Samples", raw)
    for sequence in message.sequences:
        sequence.logprobs = np.float32(np.nan).tobytes() + sequence.logprobs[4:]
    return message.SerializeToString()


def _mean(message: Any) -> bytes:
    """One service's training loop: a mean over tokens, then over the batch."""
    for datum in message.data:
        tensor = datum.loss_fn_inputs["weights"]
        weights = np.frombuffer(tensor.dense, np.float32)
        weights = weights / max(weights.sum(), np.float32(1e-9)) / len(message.data)
        tensor.dense = weights.astype(np.float32).tobytes()
    return message.SerializeToString()
