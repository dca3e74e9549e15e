"""The local backend: one base model, one queue, any number of adapters, on this machine's torch.

`forward_backward` is the whole idea in a few lines: score with the graph kept, run the loss on
detached logprobs, push its gradient back through the kept graph. One forward, one backward, for
any loss. Micro-batches whose graphs would not fit in memory are scored without a graph first and
then again, one by one, with the gradient known: same result, one more forward for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cookbook_core.backend.local import checkpoints, processes
from cookbook_core.backend.local.adapters import Adapter, AdapterBank
from cookbook_core.backend.local.memory import keep_freed_memory
from cookbook_core.backend.local.model import BaseModel, load_base_model
from cookbook_core.backend.local.model_ids import ModelIds
from cookbook_core.backend.local.passes import (
    LossOf,
    Pass,
    backward,
    on_targets,
    on_vocabulary,
    once,
)
from cookbook_core.backend.local.room import Room, check_mode
from cookbook_core.backend.local.sampler import sample_batch
from cookbook_core.backend.local.scoring import Scorer
from cookbook_core.backend.sampling_requests import SampleRequest, prompt_datum, sampling_request
from cookbook_core.backend.worker import Worker, refuse_after_failure
from cookbook_core.custom_loss import (
    LossFn,
    LossResult,
    LossTypeInput,
    evaluate,
    merge_metrics,
)
from cookbook_core.errors import CheckpointError, check_text, message
from cookbook_core.paths import usable_path
from cookbook_core.tinker.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoraConfig,
    ModelInput,
    OptimStepResponse,
    SampleResponse,
    SamplingParams,
    TensorData,
)

MERGE_FROM = 16
"""Completion tokens from which merging the adapter costs less than it saves (a pass or two)."""


class LocalBackend:
    """A base model with its queue. Its methods return futures; the work is done by one thread."""

    def __init__(
        self,
        base_model: str,
        checkpoint_dir: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        gradient_checkpointing: str = "auto",
        model_ids: ModelIds | None = None,
    ) -> None:
        check_mode(gradient_checkpointing)
        if not torch.cuda.is_available():
            keep_freed_memory()  # before there is a thread with an arena of its own
        self.worker = Worker(f"cookbook-{base_model}")
        self.checkpoint_dir = checkpoint_dir
        self.model_ids = model_ids or ModelIds(checkpoint_dir)
        self._loaded: Engine | None = None
        self._load = partial(load_engine, base_model, device, dtype, gradient_checkpointing)

    def engine(self) -> Engine:
        """The engine, loaded by the first request that needs it (worker thread only)."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def create_training(
        self, lora: LoraConfig, user_metadata: dict[str, str] | None = None
    ) -> Future[LocalTraining]:
        check_metadata(user_metadata)

        def create() -> LocalTraining:
            return LocalTraining(self, self.engine().bank.create(lora), user_metadata)

        return self.worker.submit("create_lora_training_client", create)

    def restore_training(self, path: str, *, with_optimizer: bool) -> Future[LocalTraining]:
        def create() -> LocalTraining:
            folder = usable_path("path", path, CheckpointError)
            checkpoint = checkpoints.read(folder, with_optimizer=with_optimizer)
            adapter = checkpoints.new_adapter(self.engine().bank, checkpoint)
            return LocalTraining(self, adapter, continued=folder if with_optimizer else None)

        return self.worker.submit("create_training_client_from_state", create)

    def create_sampler(self, path: str | None) -> Future[LocalSampler]:
        def create() -> LocalSampler:
            engine = self.engine()
            if path is None:
                return LocalSampler(self, None)
            checkpoint = checkpoints.read(usable_path("path", path, CheckpointError))
            return LocalSampler(self, checkpoints.new_adapter(engine.bank, checkpoint))

        return self.worker.submit("create_sampling_client", create)

    def close(self) -> None:
        self.worker.close()


class Engine:
    """The model and what computes with it. Every method runs in the worker thread."""

    def __init__(self, base: BaseModel, gradient_checkpointing: str = "auto") -> None:
        self.base = base
        self.scorer = Scorer(base.model, base.device)
        self.bank = AdapterBank(base)
        self.room = Room(base, self.scorer, gradient_checkpointing)

    def forward(
        self, adapter: Adapter, data: Sequence[Datum], loss_fn: LossFn
    ) -> ForwardBackwardOutput:
        logprobs = self.score(adapter, data)
        return _output(logprobs, evaluate(loss_fn, data, logprobs), {})

    def forward_backward(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
    ) -> ForwardBackwardOutput:
        """Accumulate the gradient of `loss_fn`; on any error nothing is accumulated."""
        tokens = sum(datum.model_input.length for datum in data)
        loss_of = partial(on_targets, loss_fn, data)
        if loss_type_input == "vocab_logprobs":
            params = list(adapter.slot.params.values())
            loss_of = partial(on_vocabulary, loss_fn, data, self.scorer, params)
        (logprobs, result, grads), passes = self.gradient(adapter, data, loss_of, loss_type_input)
        grads = [
            g if more is None else g + more
            for g, more in zip(grads, result.param_grads or [None] * len(grads), strict=True)
        ]
        output = _output(logprobs, result, {"passes": passes, "tokens": float(tokens)})
        adapter.accumulate(grads)
        return output

    def score(
        self, adapter: Adapter | None, data: Sequence[Datum], places: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Logprobs of every datum's target_tokens, without a graph, on the CPU."""
        with self.bank.active(adapter), torch.no_grad():
            scored = self.room.fitted(data, lambda: self.scorer.score(data), places)
            return [lp.cpu() for lp in scored]

    def gradient(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_of: LossOf,
        form: LossTypeInput,
        places: Sequence[int] | None = None,
    ) -> tuple[Pass, float]:
        """Score `data` in the form that `loss_of` takes, and push its gradient back.

        Returns:
            what `loss_of` gave, d loss / d params through the scores, and the number of passes.
        """
        score = self.scorer.score_batch if form == "logprobs" else self.scorer.hidden_batch
        loss_of = once(loss_of)
        # the attention stays switched until the backward, which may compute layers again
        packed = self.scorer.attention(packed=self.scorer.packs)
        with self.bank.active(adapter) as params, packed:

            def run() -> tuple[Pass, float]:
                kept, again = self.room.split(self.scorer.batches(data))
                done = backward(self.room.recomputing(score), loss_of, params, kept, again)
                return done, 2.0 if again else 1.0

            return self.room.fitted(data, run, places)

    def sample(
        self, adapter: Adapter | None, requests: Sequence[SampleRequest]
    ) -> list[SampleResponse]:
        tokenizer = None
        if any(r.params.stop is None or _has_text(r.params.stop) for r in requests):
            tokenizer = self.base.tokenizer()
        longest = max(r.params.max_tokens or MERGE_FROM for r in requests)
        merged = self.bank.merged(adapter if longest >= MERGE_FROM else None)
        with self.bank.active(adapter), torch.no_grad(), merged:
            return sample_batch(self.base.model, tokenizer, requests)


def load_engine(name: str, device: str, dtype: str, gradient_checkpointing: str) -> Engine:
    """The engine of a base model; where processes have joined, one that shares its work out."""
    group = processes.joined()
    if group is not None:
        from cookbook_core.backend.local.shared_engine import SharedEngine  # which imports this

        return SharedEngine.load(group, name, device, dtype, gradient_checkpointing)
    return Engine(load_base_model(name, device, dtype), gradient_checkpointing)


def check_metadata(user_metadata: Any) -> None:
    """Refuse, with a CheckpointError, what cannot be written beside a checkpoint."""
    if user_metadata is None:
        return
    if not isinstance(user_metadata, dict):
        got = f"{type(user_metadata).__name__} {user_metadata!r:.80}"
        raise CheckpointError(message("user_metadata", "wrong type", "a dict of str, or None", got))
    for key, value in user_metadata.items():
        check_text(CheckpointError, "user_metadata", key)
        check_text(CheckpointError, f"user_metadata[{key!r}]", value)


def _has_text(stop: Any) -> bool:
    return isinstance(stop, str) or any(isinstance(s, str) for s in stop)


def _output(
    logprobs: Sequence[torch.Tensor], result: LossResult, backend_metrics: dict[str, float]
) -> ForwardBackwardOutput:
    """The answer to the caller; loss_fn_outputs is empty where the loss saw no target logprobs."""

    def pack(lp: torch.Tensor) -> TensorData:
        return TensorData(lp.numpy(), "float64" if lp.dtype == torch.float64 else "float32")

    return ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[{"logprobs": pack(lp)} for lp in logprobs],
        metrics=merge_metrics(result, backend_metrics),
    )


class LocalTraining:
    """One adapter in training."""

    def __init__(
        self,
        backend: LocalBackend,
        adapter: Adapter,
        user_metadata: dict[str, str] | None = None,
        continued: Path | None = None,
    ) -> None:
        base = backend.engine().base
        self._backend, self._adapter, self._metadata = backend, adapter, user_metadata
        data = base.data()
        self.info = GetInfoResponse(
            model_data=data,
            model_id=backend.model_ids.next(continued),
            is_lora=True,
            lora_rank=adapter.slot.config.r,
            model_name=data.model_name,
        )

    def tokenizer(self) -> Any:
        return self._backend.engine().base.tokenizer()

    def forward(self, data: Sequence[Datum], loss_fn: LossFn) -> Future[ForwardBackwardOutput]:
        return self._submit("forward", lambda e: e.forward(self._adapter, data, loss_fn))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
    ) -> Future[ForwardBackwardOutput]:
        return self._submit(
            "forward_backward",
            lambda e: e.forward_backward(self._adapter, data, loss_fn, loss_type_input),
        )

    def optim_step(
        self, params: AdamParams, after: Sequence[Future[Any]] = ()
    ) -> Future[OptimStepResponse]:
        def step(_: Engine) -> OptimStepResponse:
            refuse_after_failure(after)
            return OptimStepResponse(self._adapter.optim_step(params))

        return self._submit("optim_step", step)

    def save(
        self,
        name: str,
        *,
        for_sampler: bool,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[str]:
        check_metadata(user_metadata)
        kind = "sampler_weights" if for_sampler else "weights"
        folder = self._backend.checkpoint_dir / self.info.model_id / kind
        path = folder / checkpoints.check_name(name)

        def save(engine: Engine) -> str:
            written = checkpoints.write(
                path,
                self._adapter,
                base=engine.base,
                with_optimizer=not for_sampler,
                overwrite=overwrite,
                user_metadata={**(self._metadata or {}), **(user_metadata or {})},
            )
            return str(written)

        return self._submit("save_weights_for_sampler" if for_sampler else "save_state", save)

    def load(self, path: str, *, with_optimizer: bool) -> Future[None]:
        def load(engine: Engine) -> None:
            folder = usable_path("path", path, CheckpointError)
            checkpoint = checkpoints.read(folder, with_optimizer=with_optimizer)
            checkpoints.check_base(checkpoint, engine.base)
            checkpoints.restore(self._adapter, checkpoint)

        return self._submit("load_state", load)

    def open_sampler(self, path: str) -> Future[LocalSampler]:
        return self._backend.create_sampler(path)

    def snapshot(self) -> Future[LocalSampler]:
        return self._submit(
            "save_weights_and_get_sampling_client",
            lambda _: LocalSampler(self._backend, self._adapter.copy()),
        )

    def _submit(self, label: str, run: Any) -> Future[Any]:
        return self._backend.worker.submit(label, lambda: run(self._backend.engine()))


class LocalSampler:
    """A snapshot to generate from: a copy of an adapter, or the bare base model."""

    def __init__(self, backend: LocalBackend, adapter: Adapter | None) -> None:
        self._backend, self._adapter = backend, adapter
        self.model_data = backend.engine().base.data()

    def tokenizer(self) -> Any:
        return self._backend.engine().base.tokenizer()

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> Future[SampleResponse]:
        """Queued; requests made back to back on the same snapshot are decoded together."""
        told = include_prompt_logprobs, topk_prompt_logprobs
        request = sampling_request(self.model_data, prompt, num_samples, params, *told)
        return self._backend.worker.submit_grouped(
            "sample",
            ("sample", id(self)),
            request,
            lambda requests: self._backend.engine().sample(self._adapter, requests),
        )

    def compute_logprobs(self, prompt: ModelInput) -> Future[list[float | None]]:
        """log p of each prompt token given those before it, through the training's scoring path."""
        datum = prompt_datum(self.model_data, prompt)

        def run(data: list[Datum]) -> list[list[float | None]]:
            scored = self._backend.engine().score(self._adapter, data)
            return [[None, *lp.tolist()] for lp in scored]

        return self._backend.worker.submit_grouped(
            "compute_logprobs", ("compute_logprobs", id(self)), datum, run
        )
