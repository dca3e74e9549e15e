"""The local backend: one base model, one queue, any number of adapters, on this machine's torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from cookbook_core.backend.local import checkpoints, memory_table
from cookbook_core.backend.local.engine import Engine
from cookbook_core.backend.local.kept_graphs import KeptGraphs
from cookbook_core.backend.local.model.adapters import Adapter
from cookbook_core.backend.local.model.loading import (
    choose_device,
    choose_dtype,
    load_base_model,
)
from cookbook_core.backend.local.model.memory import (
    is_out_of_memory,
    keep_freed_memory,
    release_cached,
)
from cookbook_core.backend.local.model_ids import ModelIds
from cookbook_core.backend.local.multiprocess.engine import SharedEngine
from cookbook_core.backend.local.multiprocess.group import joined
from cookbook_core.backend.local.sampling.prompt_scores import sample_and_score
from cookbook_core.backend.local.scoring.memory_limits import check_mode
from cookbook_core.backend.local.vllm_sampler import VllmSamples
from cookbook_core.backend.sampling_requests import (
    prompt_datum,
    prompt_scores,
    sampling_request,
)
from cookbook_core.backend.worker import Worker, refuse_after_failure
from cookbook_core.builtin_losses import builtin_loss
from cookbook_core.custom_loss import LossFn, LossTypeInput
from cookbook_core.errors import CheckpointError, ConfigError, CookbookError, check_text
from cookbook_core.storage.paths import usable_path
from cookbook_core.types import (
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

import torch


class LocalBackend:
    """A base model with its queue. Its methods return futures; one thread does the work.

    `gathers` is the worker's: see `Worker`. A vLLM server at `sampler_url` samples, unless empty.
    `shard` shards the layers over the processes of the run.
    """

    def __init__(
        self,
        base_model: str,
        checkpoint_dir: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        gradient_checkpointing: str = "auto",
        model_ids: ModelIds | None = None,
        gathers: bool = False,
        sampler_url: str = "",
        shard: bool = False,
    ) -> None:
        check_mode(gradient_checkpointing)
        if shard and joined() is None:
            what, fix = "needs several processes", "Start with torchrun --nproc_per_node=2 -m ..."
            rule, got = "a run under torchrun", "one process"
            raise ConfigError("shard", what, expected=rule, got=got, fix=fix)
        if not torch.cuda.is_available():
            keep_freed_memory()  # set malloc options before the worker thread starts
        self.worker = Worker(f"cookbook-{base_model}", gathers=gathers)
        self.kept = KeptGraphs()
        self._adapters: WeakValueDictionary[int, Adapter] = WeakValueDictionary()
        """Those of the clients that exist, by number."""
        self.checkpoint_dir = checkpoint_dir
        self.model_ids = model_ids or ModelIds(checkpoint_dir)
        self.vllm = VllmSamples(sampler_url, checkpoint_dir) if sampler_url else None
        self._loaded: Engine | None = None
        self._load = partial(load_engine, base_model, device, dtype, gradient_checkpointing, shard)

    def engine(self) -> Engine:
        """The engine, loaded by the first request that needs it (worker thread only)."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def create_training(
        self,
        lora: LoraConfig,
        user_metadata: dict[str, str] | None = None,
        model_id: str | None = None,
    ) -> Future[LocalTraining]:
        check_metadata(user_metadata)
        label = "create_lora_training_client"
        return self.worker.submit(label, self._create_training, lora, user_metadata, model_id)

    def _create_training(
        self, lora: LoraConfig, user_metadata: dict[str, str] | None, model_id: str | None
    ) -> LocalTraining:
        adapter = self._own(self.engine().bank.create(lora))
        return LocalTraining(self, adapter, model_id or self.model_ids.next(), user_metadata)

    def restore_training(
        self,
        path: str,
        *,
        with_optimizer: bool,
        user_metadata: dict[str, str] | None = None,
        model_id: str | None = None,
    ) -> Future[LocalTraining]:
        check_metadata(user_metadata)
        label = "create_training_client_from_state"
        args = path, with_optimizer, user_metadata, model_id
        return self.worker.submit(label, self._restore_training, *args)

    def _restore_training(
        self,
        path: str,
        with_optimizer: bool,
        user_metadata: dict[str, str] | None,
        model_id: str | None,
    ) -> LocalTraining:
        folder = usable_path("path", path, CheckpointError)
        checkpoint = checkpoints.read(folder, with_optimizer=with_optimizer)
        adapter = self._own(checkpoints.new_adapter(self.engine().bank, checkpoint))
        model_id = model_id or self.model_ids.next(folder if with_optimizer else None)
        return LocalTraining(self, adapter, model_id, user_metadata)

    def create_sampler(self, path: str | None) -> Future[LocalSampler]:
        return self.worker.submit("create_sampling_client", self._create_sampler, path)

    def _create_sampler(self, path: str | None) -> LocalSampler:
        if path is None:
            return LocalSampler(self, None)
        checkpoint = checkpoints.read(usable_path("path", path, CheckpointError))
        return LocalSampler(
            self, self._own(checkpoints.new_adapter(self.engine().bank, checkpoint))
        )

    def _own(self, adapter: Adapter) -> Adapter:
        """Register an adapter, and free the slots of those that are gone."""
        self._adapters[adapter.number] = adapter
        self.engine().bank.free_slots({own.slot.name for own in self._adapters.values()})
        return adapter

    def close(self) -> None:
        self.worker.close()
        if self.vllm is not None:
            self.vllm.close()


def load_engine(
    name: str, device: str, dtype: str, gradient_checkpointing: str, shard: bool = False
) -> Engine:
    """The engine of a base model; under torchrun, one that shares its work among the processes.

    Args:
        name: of the base model.
        device: see `choose_device`.
        dtype: see `choose_dtype`.
        gradient_checkpointing: see `MemoryLimits`.
        shard: shard the layers over the processes.

    Raises:
        ModelError: it does not fit into the device's memory, or cannot be loaded.
    """
    group = joined()
    try:
        if group is not None:
            options = name, device, dtype, gradient_checkpointing
            return SharedEngine.load(group, *options, shard=shard)
        return Engine(load_base_model(name, device, dtype), gradient_checkpointing)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    chosen = choose_device(device)
    release_cached(chosen)
    raise memory_table.too_large(name, chosen, choose_dtype(dtype, chosen))


def check_metadata(user_metadata: Any) -> None:
    """Raise CheckpointError unless user_metadata is None or a dict of str to str."""
    if user_metadata is None:
        return
    if not isinstance(user_metadata, dict):
        got = f"{type(user_metadata).__name__} {user_metadata!r:.80}"
        raise CheckpointError(
            "user_metadata",
            "wrong type",
            expected="a dict of str, or None",
            got=got,
            fix="Pass a dict; convert its values with str().",
        )
    for key, value in user_metadata.items():
        check_text(CheckpointError, "user_metadata", key)
        check_text(CheckpointError, f"user_metadata[{key!r}]", value)


class LocalTraining:
    """One adapter in training."""

    def __init__(
        self,
        backend: LocalBackend,
        adapter: Adapter,
        model_id: str,
        user_metadata: dict[str, str] | None = None,
    ) -> None:
        self._backend, self._adapter, self._metadata = backend, adapter, user_metadata
        self._engine = backend.engine()
        data = self._engine.base.data()
        self.info = GetInfoResponse(
            model_data=data,
            model_id=model_id,
            is_lora=True,
            lora_rank=adapter.slot.config.r,
            model_name=data.model_name,
        )
        self.machine = self._engine.machine(adapter)
        self.machine["sampler"] = "local" if backend.vllm is None else "vllm"

    def tokenizer(self) -> Any:
        return self._engine.base.tokenizer()

    @property
    def steps(self) -> int:
        """Optimizer steps that the adapter has taken, those before it was saved included."""
        return self._adapter.step

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
        keep_graph: bool = False,
    ) -> Future[ForwardBackwardOutput]:
        return self._submit("forward", self._forward, data, loss_fn, loss_type_input, keep_graph)

    def _forward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput,
        keep_graph: bool,
    ) -> ForwardBackwardOutput:
        alone = type(self._engine) is Engine  # others are told of a backward in the same request
        if keep_graph and alone and loss_type_input == "logprobs":
            return self._backend.kept.forward(self._engine, self._adapter, data, loss_fn)
        return self._engine.forward(self._adapter, data, loss_fn, loss_type_input)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
    ) -> Future[ForwardBackwardOutput]:
        args = data, loss_fn, loss_type_input
        return self._submit("forward_backward", self._forward_backward, *args)

    def _forward_backward(
        self, data: Sequence[Datum], loss_fn: LossFn, loss_type_input: LossTypeInput
    ) -> ForwardBackwardOutput:
        kept, scored, forwards = self._backend.kept, None, 0
        if loss_type_input == "logprobs":
            forwards, scored = kept.take(self._adapter, data)
        args = self._adapter, data, loss_fn, loss_type_input
        if scored is not None:
            try:
                return self._engine.forward_backward(*args, scored)
            except CookbookError:
                raise
            except RuntimeError:  # a tensor that the graph had saved was overwritten since
                del scored
        kept.make_room(self._engine, data)
        output = self._engine.forward_backward(*args)
        output.metrics["passes"] += forwards
        return output

    def optim_step(
        self, params: AdamParams, after: Sequence[Future[Any]] = ()
    ) -> Future[OptimStepResponse]:
        return self._submit("optim_step", self._step, params, after)

    def _step(self, params: AdamParams, after: Sequence[Future[Any]]) -> OptimStepResponse:
        refuse_after_failure(after)
        self._backend.kept.weights_change(self._adapter)
        return OptimStepResponse(self._adapter.optim_step(params))

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
        write = partial(
            checkpoints.write,
            folder / checkpoints.check_name(name),
            self._adapter,
            base=self._engine.base,
            with_optimizer=not for_sampler,
            overwrite=overwrite,
            user_metadata={**(self._metadata or {}), **(user_metadata or {})},
        )
        label = "save_weights_for_sampler" if for_sampler else "save_state"
        return self._submit(label, self._save, write)

    def _save(self, write: partial[Path]) -> str:
        return str(write())

    def load(self, path: str, *, with_optimizer: bool) -> Future[None]:
        return self._submit("load_state", self._load, path, with_optimizer)

    def _load(self, path: str, with_optimizer: bool) -> None:
        folder = usable_path("path", path, CheckpointError)
        checkpoint = checkpoints.read(folder, with_optimizer=with_optimizer)
        checkpoints.check_base(checkpoint, self._engine.base)
        self._backend.kept.weights_change(self._adapter)
        checkpoints.restore(self._adapter, checkpoint)

    def release(self) -> Future[None]:
        """Forget what is kept of the adapter beside itself, after the requests that are queued."""
        return self._submit("unload_model", self._backend.kept.forget, self._adapter)

    def open_sampler(self, path: str) -> Future[LocalSampler]:
        return self._backend.create_sampler(path)

    def snapshot(self) -> Future[LocalSampler]:
        return self._submit("save_weights_and_get_sampling_client", self._snapshot)

    def _snapshot(self) -> LocalSampler:
        return LocalSampler(self._backend, self._backend._own(self._adapter.copy()))

    def _submit(self, label: str, function: Any, *args: Any) -> Future[Any]:
        return self._backend.worker.submit(label, function, *args)


class LocalSampler:
    """A snapshot to generate from: a copy of an adapter, or the bare base model.

    Made by the worker thread.
    """

    def __init__(self, backend: LocalBackend, adapter: Adapter | None) -> None:
        self._worker, self._engine, self._adapter = backend.worker, backend.engine(), adapter
        self.model_data = self._engine.base.data()
        self._served = backend.vllm and backend.vllm.serve(self._engine, adapter)

    def tokenizer(self) -> Any:
        return self._engine.base.tokenizer()

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
        on_token: Callable[[int, int, int], None] | None = None,
    ) -> Future[SampleResponse]:
        """Queued; decoded together with requests of this snapshot that are waiting by then.

        on_token: see `SampleRequest`; not called where a vLLM server samples, which gets the
            request at once.
        """
        wanted = include_prompt_logprobs, topk_prompt_logprobs, topk_sample_logprobs
        request = sampling_request(self.model_data, prompt, num_samples, params, *wanted)
        request = replace(request, on_token=on_token)
        more = target_prompt_logprobs, prompt_alt_tokens_k, prompt_logprobs_last_n
        scores = prompt_scores(request, self.model_data.vocab_size, *more)
        if self._served is not None:
            return self._served.sample(request, scores)
        self._engine.check_prompt(prompt, "sample")
        sample = partial(sample_and_score, self._engine, self._adapter)
        item, group = (request, scores), ("sample", id(self))
        return self._worker.submit_grouped("sample", sample, item, group)

    def write(self, folder: Path) -> Future[Path]:
        """Save the snapshot's weights as a new folder, which `create_sampler` opens."""
        assert self._adapter is not None, "the bare base model has nothing to save"
        write = partial(checkpoints.write, folder, self._adapter, base=self._engine.base)
        return self._worker.submit("sample", partial(write, with_optimizer=False, overwrite=True))

    def unit(self) -> AbstractContextManager[None]:
        return self._worker.unit()

    def compute_logprobs(
        self, prompt: ModelInput, last_n: int | None = None
    ) -> Future[list[float | None]]:
        """log p of each prompt token given those before it, through the training's scoring path.

        Outside of a unit each is scored alone, so that results do not depend on what else waits.
        """
        datum = prompt_datum(self.model_data, prompt, last_n)
        self._engine.check_prompt(prompt, "compute_logprobs")
        score = partial(self._engine.compute_logprobs, self._adapter)
        label = "compute_logprobs"
        return self._worker.submit_grouped(label, score, datum, (label, id(self)), alone=True)

    def forward(self, data: Sequence[Datum]) -> Future[ForwardBackwardOutput]:
        """Logprobs of a batch in one pass, through the training's scoring path."""
        loss = builtin_loss("cross_entropy", None)
        return self._worker.submit("forward", self._engine.forward, self._adapter, data, loss)
