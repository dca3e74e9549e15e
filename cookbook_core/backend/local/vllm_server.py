"""A vLLM server by HTTP: load and unload adapters, and sample with token ids in and out."""

from __future__ import annotations

import http.client
import json
import math
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cookbook_core.backend.sampling_requests import SampleRequest
from cookbook_core.errors import AnswerError, ConfigError, CookbookError, ProcessError, RequestError
from cookbook_core.types import SampledSequence, SampleResponse

import numpy as np

TIMEOUT = 3600.0
"""Seconds without a byte after which a request fails."""
UNLOAD_TIMEOUT = 30.0
"""The same when an adapter is unloaded, which a run does last."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes as --max-lora-rank."""
LEAST_LOGPROB = -9999.0
"""What vLLM returns for logprobs below it, infinity included."""


class Refused(Exception):
    """The server answered with an HTTP error: its status and its own words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"{status}: {words}")
        self.status, self.words = status, words


@dataclass(frozen=True)
class Stop:
    """Token ids and texts that end a completion."""

    ids: Sequence[int] = ()
    texts: Sequence[str] = ()


class VllmServer:
    """One server. No method but `connect` may be called before it.

    Args:
        url: such as http://127.0.0.1:8000. The key in VLLM_API_KEY is sent, if there is one.
        folder: of the base model, for the command in messages.
        vocab_size: of the base model.
    Attributes:
        base_name: the server's name of the base model.
        ready: whether the checks at connection have passed. A server that fails afterwards is
            lost, and every later request raises a ProcessError; before, its URL or its command line
            is mistaken.
    """

    def __init__(self, url: str, folder: str, vocab_size: int) -> None:
        self.url, self.base_name, self.ready = url, "", False
        self._folder, self._vocab_size = folder, vocab_size
        self._lost: ProcessError | None = None

    def connect(self) -> None:
        """Ask which base model is served.

        Raises:
            ConfigError: nothing answers there, or something other than vLLM.
        """
        try:
            models = json.loads(self._request("/v1/models"))["data"]
            bases = [m for m in models if m["owned_by"] == "vllm" and not m.get("parent")]
            self.base_name = str(bases[0]["id"])
        except (Refused, ValueError, LookupError, TypeError) as error:
            what, got = "no vLLM server at this URL", f"{type(error).__name__} {error}"
            raise self.problem(what, got=got, fix=f"Start one: {self.command()}") from error

    def command(self, rank: int = 32) -> str:
        """The command that starts a server of the base model for adapters of this rank."""
        most = next((r for r in RANKS if r >= rank), rank)
        return (
            f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {self._folder} --enable-lora "
            f"--max-lora-rank {most} --logprobs-mode processed_logprobs"
        )

    def load(self, folder: Path, rank: int) -> str:
        """Load an adapter from a folder that the server can read too.

        Returns:
            Its name there, never used before: vLLM's prefix cache outlives an adapter's weights.
        Raises:
            ConfigError, ProcessError: the server does not load it.
        """
        name = f"cookbook-{uuid.uuid4().hex}"
        try:
            self._request("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except Refused as refused:
            what, fix = "the server cannot load the adapter", f"Start it so: {self.command(rank)}"
            if refused.status == 404 and "adapter" not in refused.words:
                what = "the server does not load adapters while it runs"
            elif refused.status == 404 or "No adapter found" in refused.words:
                fix = "Start the run where the server can read its folder under the same path."
            elif rank > RANKS[-1]:
                fix = f"Give a rank of at most {RANKS[-1]}, the largest that vLLM takes."
            raise self.problem(what, got=refused, fix=fix) from None
        return name

    def unload(self, name: str) -> None:
        """Unload an adapter; one that the server no longer has is no error.

        Raises:
            ProcessError: the server no longer answers.
        """
        try:
            self._request("/v1/unload_lora_adapter", {"lora_name": name}, UNLOAD_TIMEOUT)
        except Refused:
            return

    def complete(self, name: str, request: SampleRequest, stop: Stop) -> SampleResponse:
        """Sample completions of one prompt.

        Args:
            name: of an adapter or of the base model.
            request: checked; top_k, top_p and logprobs of the prompt are not read.
            stop: where completions end, besides max_tokens.
        Raises:
            RequestError: the server refuses the request. AnswerError: its answer is not one.
            ProcessError: it no longer answers, or no longer has the adapter.
        """
        if self._lost is not None:
            raise self._lost.replace()
        try:
            answer = self._request("/v1/completions", _body(name, request, stop))
        except Refused as refused:
            if refused.status == 404 or refused.status >= 500:
                raise self.problem("the server failed", got=refused) from None
            where, what = f"sample at {self.url}", "the server refuses the request"
            raise RequestError(where, what, got=refused) from None
        return self._response(answer, request.num_samples)

    def problem(self, what: str, **slots: Any) -> CookbookError:
        """The error to raise about the server: of its URL at first, of a process that failed later.

        A run adds to a ProcessError which step to resume from.
        """
        if self.ready:
            self._lost = ProcessError(f"sampler_url {self.url}", what, **slots)
            return self._lost
        return ConfigError(f"sampler_url {self.url}", what, **slots)

    def _request(
        self, path: str, body: dict[str, Any] | None = None, timeout: float = TIMEOUT
    ) -> bytes:
        """Get or post; raises Refused for an HTTP error, ConfigError or ProcessError for none."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, _words(error)) from None
        except (OSError, http.client.HTTPException) as error:
            what = "the server no longer answers" if self.ready else "no server answers at this URL"
            got = getattr(error, "reason", error)
            raise self.problem(what, got=got, fix="Start it, or correct the URL.") from error

    def _response(self, answer: bytes, num_samples: int) -> SampleResponse:
        """The completions in the server's answer, checked.

        Raises:
            AnswerError: not num_samples completions with an id and a finite logprob per token.
        """
        where = f"sample at {self.url}"
        try:
            choices = sorted(json.loads(answer)["choices"], key=lambda choice: choice["index"])
            if any(choice.get("token_ids") is None for choice in choices):
                fix = "Update vLLM to 0.10.2 or newer."
                raise AnswerError(where, "no token_ids in the server's answer", fix=fix)
            sequences = [
                SampledSequence(
                    "length" if choice["finish_reason"] == "length" else "stop",
                    uuid.uuid4().hex,
                    np.array(choice["token_ids"], dtype=np.int64),
                    np.array(choice["logprobs"]["token_logprobs"], dtype=np.float64),
                )
                for choice in choices
            ]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            got = f"{type(error).__name__} {error}"
            raise AnswerError(where, "the server's answer cannot be read", got=got) from error
        if len(sequences) != num_samples:
            what = "wrong number of completions"
            raise AnswerError(where, what, expected=num_samples, got=len(sequences))
        for sequence in sequences:
            self._check(where, sequence.tokens_np, sequence.logprobs_np)
        return SampleResponse(sequences)

    def _check(self, where: str, ids: Any, logprobs: Any) -> None:
        """Raise AnswerError unless every token has an id of the model and a finite logprob."""
        if len(ids) != len(logprobs) or not len(ids):
            rule, got = "one logprob per token", f"{len(ids)} tokens, {len(logprobs)} logprobs"
            raise AnswerError(where, "tokens and logprobs do not match", expected=rule, got=got)
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            rule, got = f"ids of {self._folder}, below {self._vocab_size}", int(ids.max())
            raise AnswerError(where, "token id of another model", expected=rule, got=got)
        if not all(math.isfinite(lp) and lp > LEAST_LOGPROB for lp in logprobs):
            what, fix = "logprob is not finite", "Lower learning_rate if training diverged."
            raise AnswerError(where, what, got=float(logprobs.min()), fix=fix)


def _body(name: str, request: SampleRequest, stop: Stop) -> dict[str, Any]:
    """The JSON of a request; everything that a model's generation_config could set is given."""
    params = request.params
    body: dict[str, Any] = {
        "model": name,
        "prompt": request.prompt,
        "n": request.num_samples,
        "max_tokens": params.max_tokens,
        "temperature": float(params.temperature),
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "return_token_ids": True,
        "ignore_eos": True,
        "stop": list(stop.texts),
        "stop_token_ids": list(stop.ids),
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "add_special_tokens": False,
    }
    if params.seed is not None:
        # vLLM gives sample j the seed + j: neighbouring seeds must not share samples
        digest = blake2b(str(int(params.seed)).encode(), digest_size=8).digest()
        body["seed"] = int.from_bytes(digest, "little") >> 2
    return body


def _words(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, in one line."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        body = json.loads(text)
        said = body.get("error", body)
        text = str(said.get("message") or said.get("detail") or text)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:400] or str(error.reason)
