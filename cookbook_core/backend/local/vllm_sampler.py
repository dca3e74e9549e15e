"""Snapshots that a vLLM server samples from: each adapter is written to a folder and loaded there.

Every adapter is tried before it is used: the server samples eight tokens, whose logprobs must be
those that this process computes. Requests run side by side in threads of their own.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

from cookbook_core.backend.local import checkpoints
from cookbook_core.backend.local.engine import Engine
from cookbook_core.backend.local.model.adapters import Adapter
from cookbook_core.backend.local.sampling.draw import StopRule, eos_ids
from cookbook_core.backend.local.vllm_server import Stop, VllmServer
from cookbook_core.backend.sampling_requests import PromptScores, SampleRequest
from cookbook_core.datums import TEMPERATURE, datum_from_prompt_completion, with_inputs
from cookbook_core.errors import ConfigError, CookbookError
from cookbook_core.types import Datum, SampleResponse, SamplingParams

import numpy as np
import torch

LARGEST_GAP = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest difference of a token's logprob there and here, nats; by dtype of the base model here."""
LARGEST_GAP_ROUNDED = 0.5
"""The same where the base model here is in bfloat16."""
TRIED_TOKENS = 8
TRIED_PROMPT = 32
"""Prompt tokens of a trial: two blocks of vLLM's prefix cache, so that a stale cache is noticed."""
TRIED_TEMPERATURE = 0.7
"""Not 1: logprobs of the raw model are then another distribution's."""
TEMPERATURES = (0.01, 2.0)
"""What vLLM samples at, besides 0: it raises what is lower and refuses what is higher."""
AT_ONCE = 256
"""Requests that are sent at a time."""
MOST_UNUSED = 2
"""Adapters that may be loaded beside those in use: a snapshot and its future refer to each other,
so that only the garbage collector frees them."""


class VllmSamples:
    """Samples of one base model's snapshots by a server. `serve` is called by the worker thread.

    Args:
        url: of the server.
        folder: where adapters are written, each in a folder of its own until it is unloaded.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._parent = url, folder
        self._server: VllmServer | None = None
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="cookbook-vllm")
        self._folder: Path | None = None
        self._numbers = itertools.count()
        self._loaded: dict[str, Path] = {}
        """Folders of the adapters that the server has, by its names of them."""
        self._in_use: WeakValueDictionary[str, Served] = WeakValueDictionary()
        _open.add(self)

    def serve(self, engine: Engine, adapter: Adapter | None) -> Served:
        """Load an adapter into the server and try it; unload those whose snapshots are gone.

        Args:
            engine: of the base model.
            adapter: unchanged from now on; None for the bare base model.
        Raises:
            ConfigError: the server cannot be used, or has another base model.
            ProcessError: it could be used, and no longer can.
        """
        server = self._server or VllmServer(self._url, engine.base.path, engine.base.vocab_size)
        if self._server is None:
            server.connect()
            self._server = server
        if adapter is None:
            _try(engine, server, None, server.base_name)
            return Served(server, self._pool, engine, server.base_name)
        _refuse_unembedding(engine, adapter)
        if not server.ready:
            random = _random_copy(adapter)
            _try(engine, server, random, self._load(engine, server, random))
            server.ready = True
        name = self._load(engine, server, adapter)
        if len(self._loaded) > MOST_UNUSED + 1:
            gc.collect()
        self._unload(server, lambda other: other != name and other not in self._in_use)
        _try(engine, server, adapter, name)
        self._in_use[name] = served = Served(server, self._pool, engine, name)
        return served

    def close(self) -> None:
        """Unload the adapters, if the server still answers, and remove their folders."""
        _open.discard(self)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._server is not None:
            try:
                self._unload(self._server, lambda _: True)
            except CookbookError:
                self._loaded.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _load(self, engine: Engine, server: VllmServer, adapter: Adapter) -> str:
        """Write the adapter and load it; the server's name of it."""
        if self._folder is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="vllm-", dir=self._parent)).resolve()
            self._folder.chmod(0o755)  # the server may run as another user
        folder = self._folder / str(next(self._numbers))
        checkpoints.write(folder, adapter, base=engine.base, with_optimizer=False, overwrite=False)
        name = server.load(folder, adapter.slot.config.r)
        self._loaded[name] = folder
        return name

    def _unload(self, server: VllmServer, which: Callable[[str], bool]) -> None:
        for name in [name for name in self._loaded if which(name)]:
            server.unload(name)
            shutil.rmtree(self._loaded.pop(name), ignore_errors=True)


_open: set[VllmSamples] = set()
"""Not weak: a run's clients may be gone before the program ends."""


@atexit.register
def close_all() -> None:
    """Unload what is still loaded at exit: the server outlives a run."""
    for samples in list(_open):
        samples.close()


class Served:
    """One adapter, or the base model, in the server."""

    def __init__(
        self, server: VllmServer, pool: ThreadPoolExecutor, engine: Engine, name: str
    ) -> None:
        self._server, self._pool, self._engine, self._name = server, pool, engine, name

    def sample(self, request: SampleRequest, scores: PromptScores) -> Future[SampleResponse]:
        """Send a checked request at once.

        Raises:
            ConfigError: at once; the server would answer another question.
        """
        check_supported(request, scores, self._engine.base.vocab_size)
        if request.params.max_tokens is None:
            most = (self._engine.base.max_context_length or 0) - len(request.prompt)
            request = replace(request, params=replace(request.params, max_tokens=most))
        return self._pool.submit(self._complete, request, self._stop(request.params))

    def _complete(self, request: SampleRequest, stop: Stop) -> SampleResponse:
        return self._server.complete(self._name, request, stop)  # holds self: not unloaded before

    def _stop(self, params: SamplingParams) -> Stop:
        base, eos = self._engine.base, frozenset[int]()
        if params.stop is None:
            eos = eos_ids(base.tokenizer(), base.model.config)
        rule = StopRule.of(params.stop, eos)
        return Stop(sorted(rule.ids), rule.strings)


def check_supported(request: SampleRequest, scores: PromptScores, vocab_size: int) -> None:
    """Refuse what vLLM does in another way than the sampler of this package.

    Raises:
        ConfigError: images, logprobs of the prompt or of tokens that were not drawn, a top_k or
            top_p that leaves tokens out (logprobs would be those of the truncated distribution), or
            a temperature out of range.
    """
    params = request.params
    low, high = TEMPERATURES
    of_prompt = {
        "include_prompt_logprobs": request.include_prompt_logprobs,
        "topk_prompt_logprobs": request.topk_prompt_logprobs,
        "target_prompt_logprobs": scores.targets is not None,
        "prompt_alt_tokens_k": scores.alternatives,
    }
    for name, good, rule, got in (
        ("prompt", request.model_input is None, "text alone", "an image"),
        *(
            (name, not asked, "no logprobs of the prompt (compute_logprobs() has them)", asked)
            for name, asked in of_prompt.items()
        ),
        (
            "topk_sample_logprobs",
            not request.topk_sample_logprobs,
            "0, the logprobs of drawn tokens alone",
            request.topk_sample_logprobs,
        ),
        (
            "params.top_k",
            params.top_k == -1 or params.top_k >= vocab_size,
            "-1, all tokens",
            params.top_k,
        ),
        ("params.top_p", params.top_p == 1, "1, all tokens", params.top_p),
        (
            "params.temperature",
            params.temperature == 0 or low <= params.temperature <= high,
            f"0, or {low} to {high:g}",
            params.temperature,
        ),
    ):
        if not good:
            fix = "Change it, or sample without sampler_url."
            what = "not supported with sampler_url"
            raise ConfigError(f"sample.{name}", what, expected=rule, got=got, fix=fix)


def _refuse_unembedding(engine: Engine, adapter: Adapter) -> None:
    """Raise ConfigError for LoRA on the embedding or unembedding, which vLLM does not apply."""
    model = engine.base.model
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        for layers in ("lora_A", "lora_embedding_A"):
            if adapter.slot.name in getattr(module, layers, ()):
                what = "not supported for LoRA on the embedding or unembedding"
                fix = "Train with train_unembed=False."
                raise ConfigError("sampler_url", what, fix=fix)


def _random_copy(adapter: Adapter) -> Adapter:
    """An adapter of the same shape whose products B A x have about a quarter of the size of x."""
    copy, config = adapter.copy(), adapter.slot.config
    generator = torch.Generator().manual_seed(0)
    for key, values in copy.named().items():
        size = 1.0 if ".lora_A." in key else 0.25 * config.r / config.lora_alpha
        noise = torch.randn(values.shape, generator=generator) * size / math.sqrt(values.shape[1])
        values.copy_(noise)
    return copy


def _try(engine: Engine, server: VllmServer, adapter: Adapter | None, name: str) -> None:
    """Sample eight tokens there and compare their logprobs with those computed here.

    Raises:
        ConfigError, ProcessError: they differ by more than rounding.
    """
    base, count = engine.base, TRIED_TOKENS
    length = min(TRIED_PROMPT, (base.max_context_length or 10**9) - count)
    low, high = min(5, base.vocab_size - 1), min(1000, base.vocab_size)  # no special tokens
    ids = np.random.default_rng(0).integers(low, high, length)
    params = SamplingParams(count, seed=0, stop=[], temperature=TRIED_TEMPERATURE)
    request = SampleRequest(ids.tolist(), 1, params)
    sequence = server.complete(name, request, Stop()).sequences[0]
    datum = datum_from_prompt_completion(request.prompt, sequence.tokens)
    there = torch.from_numpy(sequence.logprobs_np)
    gap = _gap(engine, adapter, datum, TRIED_TEMPERATURE, there)
    most = LARGEST_GAP.get(base.model.dtype, LARGEST_GAP_ROUNDED)
    if gap <= most:
        return
    dtype = str(base.model.dtype).removeprefix("torch.")
    what = "its samples are not those of the model in training"
    fix = f"Serve the same base model: {server.command(adapter.slot.config.r if adapter else 32)}"
    if _gap(engine, adapter, datum, 1.0, there) <= most:
        what, fix = "its logprobs ignore the temperature", f"Start it so: {server.command()}"
    elif adapter is not None and _gap(engine, None, datum, TRIED_TEMPERATURE, there) <= most:
        what, fix = "it samples without the adapter", "Restart the server."
    elif gap <= LARGEST_GAP_ROUNDED:
        fix = f"Serve it in the same dtype: {server.command()} --dtype {dtype}"
    raise server.problem(
        what,
        expected=f"logprobs within {most:g} nats of those computed here in {dtype}",
        got=f"{gap:.2g} nats in {count} tokens",
        fix=fix,
    )


def _gap(
    engine: Engine, adapter: Adapter | None, datum: Datum, temperature: float, there: torch.Tensor
) -> float:
    """Largest |log p here - log p there| over the last tokens of the datum, nats."""
    scored = engine.score(adapter, [with_inputs(datum, **{TEMPERATURE: temperature})])[0]
    return float((scored[-len(there) :].double() - there).abs().max())
