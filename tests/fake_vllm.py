"""A server with vLLM's HTTP that samples with this package's own sampler from the folders it loads.

`faults` makes it misbehave as real servers do: see FAULTS.
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cookbook_core.tinker import ModelInput, SamplingParams, ServiceClient

FAULTS = {
    "static": "loads no adapters at run time: VLLM_ALLOW_RUNTIME_LORA_UPDATING is not set",
    "rank": "max_lora_rank is 2",
    "bare": "samples from the base model, whatever the adapter",
    "stale": "samples from the adapter before the last",
    "raw": "logprobs at temperature 1",
    "no_ids": "an old version, without token_ids",
    "gone": "closes the connection without an answer",
    "forgets": "has no adapters: it was restarted",
    "dead": "its engine died",
}


class FakeVllm:
    """Started by `with`; `url` is its address, `posts` what it was sent, `held` its adapters."""

    def __init__(self, model: str, **options: Any) -> None:
        self.faults: set[str] = set()
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.held: dict[str, Any] = {}
        self._model = model
        self._service = ServiceClient(device="cpu", **{"dtype": "float32", **options})
        self._base = self._service.create_sampling_client(base_model=model).result()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                card = {"id": model, "owned_by": "vllm", "root": model, "parent": None}
                self._send(200, {"object": "list", "data": [card]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if "gone" in fake.faults:
                    return  # without an answer
                fake.posts.append((self.path, body))
                self._send(*fake.answer(self.path, body))

            def _send(self, status: int, answer: Any) -> None:
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                with suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256  # the requests of a rollout come together

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeVllm:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._service.close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body of a post."""
        name = str(body.get("lora_name", body.get("model")))
        if path == "/v1/completions":
            if "dead" in self.faults:
                return _error(500, "EngineCore encountered an issue.")
            if name not in {*self.held, self._model} or "forgets" in self.faults:
                return _error(404, f"The model `{name}` does not exist.")
            return 200, {"choices": self._choices(name, body)}
        if "static" in self.faults:
            return 404, {"detail": "Not Found"}
        if path == "/v1/unload_lora_adapter":
            del self.held[name]
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        rank = json.loads((Path(body["lora_path"]) / "adapter_config.json").read_text("utf-8"))["r"]
        if "rank" in self.faults and rank > 2:
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank 2.")
        if name in self.held:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        made = self._service.create_sampling_client(body["lora_path"], self._model).result()
        if "stale" in self.faults:
            made = list(self.held.values())[-1]
        self.held[name] = made
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _choices(self, name: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        sampler = self._base if "bare" in self.faults else self.held.get(name, self._base)
        prompt, stop = body["prompt"], body["stop_token_ids"] or body["stop"]
        params = SamplingParams(
            body["max_tokens"], body.get("seed"), stop, temperature=body["temperature"]
        )
        response = sampler.sample(ModelInput.from_ints(prompt), body["n"], params).result()
        choices = []
        for index, s in enumerate(response.sequences):
            logprobs = s.logprobs
            if "raw" in self.faults:
                whole = ModelInput.from_ints(prompt + s.tokens)
                logprobs = sampler.compute_logprobs(whole).result()[len(prompt) :]
            ids = None if "no_ids" in self.faults else s.tokens
            choice = {"index": index, "token_ids": ids, "finish_reason": s.stop_reason}
            choices.append({**choice, "logprobs": {"token_logprobs": logprobs}})
        return choices[::-1]  # order is by index, not by place


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "Error", "code": status}}
