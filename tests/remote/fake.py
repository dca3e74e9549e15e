"""A Tinker service for tests: the SDK's wire protocol on loopback, numbers from our LocalBackend.

Requests and replies have the form of exchanges recorded with a real self-hosted service
(recorded.json). `Fake.mood` makes it misbehave as real services did.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import zstandard
from tinker.proto import tinker_public_pb2 as pb

from cookbook_core.errors import CookbookError
from cookbook_core.tinker import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient

POLL_SECONDS = 5.0
DTYPES = {pb.DTYPE_INT64: "int64", pb.DTYPE_FLOAT32: "float32"}
TRACEBACK = (
    "Server error: \x1b[36mray::Model.forward()\x1b[39m (pid=1)\n"
    'Traceback (most recent call last):\n  File "/srv/model.py", line 1, in forward\n'
    "IndexError: index out of range in self"
)


class Refused(Exception):
    """A request the service answers with an HTTP error."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Fake:
    """The service. Use it in a `with` statement; `url` is where it listens.

    Moods: "mean" (each datum's weights divided by their sum and by the batch), "nan" (logprobs),
    "short" (an output too few), "flat" ((N, K) flattened), "fail" (a traceback), "poisoned" (409
    to everything after "fail"), "hang" (no answer), "500" (to what is polled for), "no extras"
    (neither heartbeats nor capabilities nor get_info's optional fields), "locked" (403).
    """

    def __init__(
        self, model: str, checkpoints: Any, name: str = "org/tiny-random", context: int = 64
    ) -> None:
        self.name, self.context, self.mood = name, context, ""
        self.requests: list[tuple[str, Any]] = []
        """(endpoint, JSON body or decoded protobuf) in order."""
        self.models: dict[str, Any] = {}
        self.made: dict[str, dict[str, Any]] = {}
        self._folder = model
        self._local = ServiceClient(device="cpu", dtype="float32", checkpoint_dir=checkpoints)
        self._saved: dict[str, tuple[str, str]] = {}
        self._metadata: dict[str, Any] = {}
        self._samplers: dict[str, Any] = {}
        self._results: dict[str, Any] = {}
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._broken: set[str] = set()

    def __enter__(self) -> Fake:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.headers.get("content-encoding") == "zstd":
                    body = zstandard.ZstdDecompressor().decompress(body)
                self._answer(body)

            do_GET = do_POST

            def _answer(self, body: bytes) -> None:
                try:
                    status, reply = fake.answer(self.path.split("?")[0], body)
                except Refused as refused:
                    status, reply = refused.status, {"detail": str(refused)}
                except CookbookError as error:
                    status, reply = 422, {"detail": str(error)}
                raw = isinstance(reply, bytes)
                data = reply if raw else json.dumps(reply).encode()
                kind = "application/x-protobuf" if raw else "application/json"
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._local.close()

    def sent(self, endpoint: str) -> list[Any]:
        """The bodies that came to an endpoint, in order."""
        return [body for name, body in self.requests if name == endpoint]

    # ---- endpoints -------------------------------------------------------------------------------

    def answer(self, path: str, raw: bytes) -> tuple[int, Any]:
        """(status, reply) of one request."""
        endpoint = path.removeprefix("/api/v1/")
        if endpoint == "forward_backward":
            body: Any = pb.ForwardBackwardRequest()
            body.ParseFromString(raw)
        else:
            body = json.loads(raw or b"null")
        if endpoint != "retrieve_future":
            with self._lock:
                self.requests.append((endpoint, body))
        if self.mood == "locked":
            raise Refused(403, "Invalid API key")
        if endpoint.startswith("samplers/"):
            return 200, {"sampler_id": endpoint.split("/")[1], "base_model": self.name}
        if endpoint.startswith("sessions/"):
            return 200, {}
        if endpoint.startswith("training_runs/"):
            return self._list_checkpoints(endpoint.split("/")[1])
        handler = getattr(self, "_" + endpoint.replace("/", "_"), None)
        lacking = ("session_heartbeat", "get_server_capabilities")
        if handler is None or (self.mood == "no extras" and endpoint in lacking):
            raise Refused(404, "Not Found")
        return handler(body)

    def _client_config(self, body: Any) -> tuple[int, Any]:
        return 200, {"pjwt_auth_enabled": False, "parallel_fwdbwd_chunks": False}

    def _create_session(self, body: Any) -> tuple[int, Any]:
        nothing = dict.fromkeys(("info_message", "warning_message", "error_message"))
        return 201, {"type": "create_session", "session_id": f"s{next(self._ids)}", **nothing}

    def _session_heartbeat(self, body: Any) -> tuple[int, Any]:
        return 200, {"type": "session_heartbeat"}

    def _get_server_capabilities(self, body: Any) -> tuple[int, Any]:
        about = {"model_name": self.name, "max_context_length": self.context}
        return 200, {"supported_models": [{**about, "capabilities": ["training"]}]}

    def _create_model(self, body: Any) -> tuple[int, Any]:
        if body["base_model"] != self.name:
            raise Refused(404, f"Failed to create model: Unknown model: {body['base_model']}")
        model_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        lora = body["lora_config"]
        self.made[model_id] = lora
        given = {k: v for k, v in lora.items() if k in ("rank", "seed", "train_unembed")}
        client = self._local.create_lora_training_client(self._folder, **given).result()
        self.models[model_id] = client
        return self._later(model_id, {"model_id": model_id, "type": "create_model"})

    def _get_info(self, body: Any) -> tuple[int, Any]:
        about = {"arch": "toy", "model_name": self.name, "tokenizer_id": self.name}
        rank = self.made[body["model_id"]]["rank"]
        optional = {} if self.mood == "no extras" else {"is_lora": True, "lora_rank": rank}
        reply = {"type": None, "model_data": about, "model_id": body["model_id"]}
        return 200, {**reply, "model_name": self.name, **optional}

    def _forward_backward(self, body: Any) -> tuple[int, Any]:
        self._refuse_broken(body.model_id)
        client, data = self.models[body.model_id], [_datum(d) for d in body.data]
        if self.mood in ("fail", "poisoned") and not body.forward_only:
            self._broken.add(body.model_id)
            return self._later(body.model_id, RuntimeError(TRACEBACK))
        if self.mood == "mean" and not body.forward_only:
            data = [_mean(datum, len(data)) for datum in data]
        config = dict(body.loss_fn_config) or None
        run = client.forward if body.forward_only else client.forward_backward
        # compute every logprob, those of weight 0 too
        bare = [
            Datum(d.model_input, {**d.loss_fn_inputs, "score_mask": np.ones(d.model_input.length)})
            for d in data
        ]
        future = run(bare, body.loss_fn, config).future()
        return self._later(body.model_id, future, lambda out: self._encode(out, body.loss_fn))

    def _optim_step(self, body: Any) -> tuple[int, Any]:
        self._refuse_broken(body["model_id"])
        future = self.models[body["model_id"]].optim_step(AdamParams(**body["adam_params"]))
        return self._later(body["model_id"], future.future(), lambda out: {"metrics": None})

    def _save_weights(self, body: Any) -> tuple[int, Any]:
        return self._save(body, "weights")

    def _save_weights_for_sampler(self, body: Any) -> tuple[int, Any]:
        if body.get("path"):
            return self._save(body, "sampler_weights")
        session = f"sampler{next(self._ids)}"
        client = self.models[body["model_id"]]
        self._samplers[session] = client.save_weights_and_get_sampling_client().result()
        reply = {"path": None, "sampling_session_id": session, "type": None}
        return self._later(body["model_id"], reply)

    def _save(self, body: Any, kind: str) -> tuple[int, Any]:
        model_id = body["model_id"]
        client = self.models[model_id]
        save = client.save_state if kind == "weights" else client.save_weights_for_sampler
        more = {"overwrite": True} if kind == "weights" else {}
        path = f"tinker://{model_id}/{kind}/{body['path']}"
        self._saved[path] = (model_id, save(body["path"], **more).result().path)
        self._metadata[path] = body.get("user_metadata")
        sampler = {} if kind == "weights" else {"sampling_session_id": None}
        return self._later(model_id, {"path": path, "type": None, **sampler})

    def _list_checkpoints(self, model_id: str) -> tuple[int, Any]:
        if model_id not in self.models:
            raise Refused(404, f"no training run {model_id}")
        kinds = {"weights": "training", "sampler_weights": "sampler"}
        listed = []
        for path in (p for p, (of, _) in self._saved.items() if of == model_id):
            _, kind, name = path.removeprefix("tinker://").split("/")
            about = {"checkpoint_id": f"{kind}/{name}", "checkpoint_type": kinds[kind]}
            about |= {"tinker_path": path, "time": "2026-11-24T00:00:00Z"}
            listed.append({**about, "user_metadata": self._metadata[path]})
        return 200, {"checkpoints": listed}

    def _load_weights(self, body: Any) -> tuple[int, Any]:
        if body["path"] not in self._saved:
            return self._later("", Refused(404, "Failed to read metadata for the checkpoint."))
        of, folder = self._saved[body["path"]]
        model_id = body.get("model_id") or f"{body['session_id']}:train:{body['model_seq_id']}"
        if "session_id" in body:  # a new model, made from the checkpoint (newer SDKs)
            self.made[model_id] = self.made[of]
            self.models[model_id] = self._local.create_training_client_from_state(folder).result()
        client = self.models[model_id]
        load = client.load_state_with_optimizer if body["optimizer"] else client.load_state
        reply = {"path": body["path"], "model_id": None, "type": None}
        return self._later(model_id, load(folder).future(), lambda out: reply)

    def _weights_info(self, body: Any) -> tuple[int, Any]:
        if body["tinker_path"] not in self._saved:
            raise Refused(404, "no such checkpoint")
        lora = self.made[self._saved[body["tinker_path"]][0]]
        parts = {k: lora.get(k) for k in ("train_unembed", "train_mlp", "train_attn")}
        about = {"base_model": self.name, "is_lora": True, "lora_rank": lora["rank"]}
        return 200, {**about, **parts}

    def _create_sampling_session(self, body: Any) -> tuple[int, Any]:
        session, path = f"sampler{next(self._ids)}", body.get("model_path")
        if path and path not in self._saved:
            raise Refused(404, f"no checkpoint {path}")
        folder = self._saved[path][1] if path else None
        made = self._local.create_sampling_client(folder, None if folder else self._folder)
        self._samplers[session] = made.result()
        return 200, {"sampling_session_id": session}

    def _asample(self, body: Any) -> tuple[int, Any]:
        tokens = [t for chunk in body["prompt"]["chunks"] for t in chunk["tokens"]]
        params = SamplingParams(**body["sampling_params"])
        sampler = self._samplers[body["sampling_session_id"]]
        prompt_logprobs = bool(body.get("prompt_logprobs"))
        prompt, count = ModelInput.from_ints(tokens), body["num_samples"]
        future = sampler.sample(prompt, count, params, prompt_logprobs)
        status, reply = self._later("", future.future(), self._encode_sample)
        names = [f"sequence{next(self._ids)}" for _ in range(body["num_samples"])]
        return status, {**reply, "sample_sequence_ids": names}

    # ---- results that are polled for -------------------------------------------------------------

    def _later(self, model_id: str, result: Any, encode: Any = None) -> tuple[int, Any]:
        request_id = f"r{next(self._ids)}"
        self._results[request_id] = (result, encode)
        return 202, {"request_id": request_id, "model_id": model_id or None}

    def _retrieve_future(self, body: Any) -> tuple[int, Any]:
        result, encode = self._results[body["request_id"]]
        if self.mood in ("hang", "500"):
            time.sleep(0.05)
            if self.mood == "500":
                raise Refused(500, "Internal Server Error")
            return 200, {"type": "try_again", "request_id": body["request_id"], "queue_state": ""}
        if isinstance(result, Refused):
            raise result
        if isinstance(result, Exception):
            return 200, {"error": str(result), "category": "server"}
        if isinstance(result, Future):
            try:
                result = result.result(POLL_SECONDS)
            except Exception as error:
                raise Refused(422, f"Future failed: {error}") from error
        return 200, encode(result) if encode else result

    def _refuse_broken(self, model_id: str) -> None:
        if self.mood == "poisoned" and model_id in self._broken:
            raise Refused(422, "Sequence conflict: expected 1, got 2.")

    def _encode(self, output: Any, loss: str) -> bytes:
        logprobs = [o["logprobs"].to_numpy() for o in output.loss_fn_outputs]
        if self.mood == "nan":
            logprobs[-1] = logprobs[-1].copy()
            logprobs[-1][0] = np.nan
        if self.mood == "short":
            logprobs = logprobs[:-1]
        reply = pb.ForwardBackwardOutput(loss_fn_output_type=loss)
        scale = 0.1 if self.mood == "mean" else 1.0
        reply.metrics["loss:sum"] = output.loss * scale
        reply.metrics["load:mean"] = 0.5
        record = reply.loss_fn_outputs.add(type_tag=loss, num_datums=len(logprobs))
        field = record.fields["logprobs"]
        field.dtype = pb.DTYPE_FLOAT32
        field.data = b"".join(lp.astype(np.float32).tobytes() for lp in logprobs)
        field.offsets = np.cumsum([0, *(4 * lp.size for lp in logprobs)], dtype=np.int64).tobytes()
        if self.mood != "flat":
            field.trailing_shape.extend(logprobs[0].shape[1:])
        return reply.SerializeToString()

    def _encode_sample(self, response: Any) -> bytes:
        reply = pb.SampleResponse()
        for s in response.sequences:
            stop = pb.STOP_REASON_STOP if s.stop_reason == "stop" else pb.STOP_REASON_LENGTH
            tokens = np.asarray(s.tokens, np.int32).tobytes()
            logprobs = np.asarray(s.logprobs, np.float32)
            if self.mood == "nan":
                logprobs[0] = np.nan
            reply.sequences.add(stop_reason=stop, tokens=tokens, logprobs=logprobs.tobytes())
        if response.prompt_logprobs is not None:
            values = [np.nan if lp is None else lp for lp in response.prompt_logprobs]
            reply.prompt_logprobs = np.asarray(values, np.float32).tobytes()
        return reply.SerializeToString()


def _datum(message: Any) -> Datum:
    tokens = [
        int(t)
        for chunk in message.model_input
        for t in np.frombuffer(chunk.encoded_text.tokens, np.int32)
    ]
    inputs = {
        name: np.frombuffer(t.dense, DTYPES[t.dtype]).reshape(list(t.shape))
        for name, t in message.loss_fn_inputs.items()
    }
    return Datum(ModelInput.from_ints(tokens), inputs)


def _mean(datum: Datum, count: int) -> Datum:
    """One service's training loop: a mean over tokens, then over the batch."""
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    inputs = {**datum.loss_fn_inputs, "weights": weights / max(weights.sum(), 1e-9) / count}
    return Datum(datum.model_input, inputs)
