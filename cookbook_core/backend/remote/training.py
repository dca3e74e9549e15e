"""One adapter in training at a service: losses by name in one pass, one's own in two."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from cookbook_core.backend.interface import SamplingBackend
from cookbook_core.backend.remote import convert
from cookbook_core.backend.remote.connection import WAIT_SECONDS
from cookbook_core.backend.remote.sampler import RemoteSampler
from cookbook_core.backend.worker import refuse_after_failure
from cookbook_core.builtin_losses import BuiltinLoss
from cookbook_core.custom_loss import (
    LossFn,
    LossTypeInput,
    differentiate,
    evaluate,
    logprobs_from_output,
    merge_metrics,
    surrogate_datums,
)
from cookbook_core.errors import AnswerError, ConfigError, LossError, RequestError
from cookbook_core.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    OptimStepResponse,
)

if TYPE_CHECKING:
    from cookbook_core.backend.remote.backend import RemoteBackend

log = logging.getLogger("cookbook_core")
CUSTOM = "forward_backward_custom"


class RemoteTraining:
    """One adapter in training at a service."""

    def __init__(self, backend: RemoteBackend, client: Any, rank: int | None) -> None:
        self._backend, self._client, self._types = backend, client, backend.connection.types
        info = client.get_info()
        data = backend.learn(info)
        self.info = GetInfoResponse(
            model_data=data,
            model_id=str(client.model_id),
            is_lora=True,
            lora_rank=info.lora_rank or rank,
            model_name=data.model_name,
        )
        self._gradients: list[Future[Any]] = []
        """forward_backward requests since the last optim_step that was done."""
        self._lock = threading.Lock()
        self._said_disagreement = backend.trusted

    def tokenizer(self) -> Any:
        return self._backend.tokenizer()

    # ---- forward and backward --------------------------------------------------------------------

    def forward(self, data: Sequence[Datum], loss_fn: LossFn) -> Future[ForwardBackwardOutput]:
        def answer(output: ForwardBackwardOutput) -> ForwardBackwardOutput:
            result = evaluate(loss_fn, data, logprobs_from_output(output, data))
            metrics = merge_metrics(result, convert.without_service_loss(output.metrics))
            return ForwardBackwardOutput("ArrayRecord", output.loss_fn_outputs, metrics)

        return self._backend.submit("forward", lambda: self._forward("forward", data, answer))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
    ) -> Future[ForwardBackwardOutput]:
        if loss_type_input != "logprobs":
            raise ConfigError(
                "loss_type_input",
                "a service gives logprobs of target tokens only",
                expected='"logprobs"',
                got=repr(loss_type_input),
                fix="Name the tokens the loss needs as target_tokens (N, K), or train locally.",
            )
        named = convert.named_loss(loss_fn, data)
        if named is not None:
            future = self._backend.submit("forward_backward", lambda: self._one_pass(data, named))
        else:
            future = self._backend.submit(CUSTOM, lambda: self._two_passes(data, loss_fn))
        with self._lock:
            self._gradients.append(future)
        return future

    def _one_pass(self, data: Sequence[Datum], loss: BuiltinLoss) -> Future[Any]:
        def answer(found: Any) -> ForwardBackwardOutput:
            output = convert.output_in(where, found, data)
            try:
                result = evaluate(loss, data, logprobs_from_output(output, data))
            except LossError as error:
                what = f"the service accepted what has no loss: {error.where} {error.what}"
                raise AnswerError(where, what, expected=error.expected, got=error.got) from error
            theirs = output.metrics.get("loss:sum")
            if convert.disagrees(theirs, result.loss) and not self._said_disagreement:
                self._said_disagreement = True
                log.warning(
                    "%s: the service reports loss:sum %.6g, its logprobs give %.6g: it may divide "
                    "gradients by something, too. `cookbook check` tells.",
                    where,
                    theirs,
                    result.loss,
                )
            return self._output(output, result, data, passes=1.0)

        where = f"forward_backward at {self._backend.connection.url}"
        datums = convert.datums_out(self._types, convert.named_datums(data, loss))
        config = dict(loss.config) or None
        sent = self._client.forward_backward(datums, loss.name, config)
        return self._backend.connection.answer("forward_backward", sent, answer)

    def _two_passes(self, data: Sequence[Datum], loss_fn: LossFn) -> Future[Any]:
        self._backend.require_core()
        scored = self._forward(CUSTOM, data, lambda output: output).result(WAIT_SECONDS)
        result = differentiate(loss_fn, data, logprobs_from_output(scored, data))
        merge_metrics(result, {})  # what is refused is refused before anything accumulates
        surrogates = surrogate_datums(data, convert.mask_grads(data, result.grads))

        def answer(found: Any) -> ForwardBackwardOutput:
            backward = convert.output_in(where, found, surrogates)
            kept = ForwardBackwardOutput("", scored.loss_fn_outputs, backward.metrics)
            return self._output(kept, result, data, passes=2.0)

        where = f"{CUSTOM} at {self._backend.connection.url}"
        datums = convert.datums_out(self._types, surrogates)
        sent = self._client.forward_backward(datums, "cross_entropy")
        return self._backend.connection.answer(CUSTOM, sent, answer)

    def _forward(self, label: str, data: Sequence[Datum], then: Callable[..., Any]) -> Future[Any]:
        """Logprobs there; `then` of our checked output."""
        where = f"{label} at {self._backend.connection.url}"
        datums = convert.datums_out(self._types, convert.bare_datums(data))
        sent = self._client.forward(datums, "cross_entropy")
        return self._backend.connection.answer(
            label, sent, lambda found: then(convert.output_in(where, found, data))
        )

    def _output(
        self, output: ForwardBackwardOutput, result: Any, data: Sequence[Datum], passes: float
    ) -> ForwardBackwardOutput:
        tokens = float(sum(datum.model_input.length for datum in data))
        service = convert.without_service_loss(output.metrics)
        metrics = merge_metrics(result, {**service, "passes": passes, "tokens": tokens})
        return ForwardBackwardOutput("ArrayRecord", output.loss_fn_outputs, metrics)

    def optim_step(
        self, params: AdamParams, after: Sequence[Future[Any]] = ()
    ) -> Future[OptimStepResponse]:
        with self._lock:
            before = list(self._gradients)

        def step() -> Future[OptimStepResponse]:
            refuse_after_failure(after)  # waits: a service steps whatever became of them
            for future in before:
                if not future.cancelled():
                    future.exception()
            with self._lock:
                good = [f for f in before if f in self._gradients and _succeeded(f)]
            if not good:
                what = "no gradient has been accumulated"
                mend = "Call forward_backward first; every step uses its gradient up."
                raise RequestError("optim_step", what, expected="a gradient", got="none", fix=mend)
            sent = self._client.optim_step(convert.adam_out(self._types, params))
            with self._lock:
                self._gradients = [f for f in self._gradients if f not in before]
            return self._backend.connection.answer(
                "optim_step", sent, lambda found: convert.optim_in(found, params)
            )

        return self._backend.submit("optim_step", step)

    # ---- saving, loading, sampling ---------------------------------------------------------------

    def save(
        self,
        name: str,
        *,
        for_sampler: bool,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[str]:
        label = "save_weights_for_sampler" if for_sampler else "save_state"
        options: dict[str, Any] = {"overwrite": True} if overwrite and not for_sampler else {}
        if user_metadata:
            options["user_metadata"] = user_metadata

        def save() -> Future[str]:
            sent = getattr(self._client, label)(name, **options)
            return self._backend.connection.answer(label, sent, lambda found: str(found.path))

        return self._backend.submit(label, save)

    def load(self, path: str, *, with_optimizer: bool) -> Future[None]:
        label = "load_state_with_optimizer" if with_optimizer else "load_state"
        convert.check_path(path)

        def load() -> Future[None]:
            sent = getattr(self._client, label)(path)
            with self._lock:
                self._gradients.clear()
            return self._backend.connection.answer(label, sent, lambda found: None)

        return self._backend.submit(label, load)

    def open_sampler(self, path: str) -> Future[SamplingBackend]:
        return self._backend.create_sampler(path)

    def snapshot(self) -> Future[SamplingBackend]:
        label = "save_weights_and_get_sampling_client"

        def snapshot() -> Future[SamplingBackend]:
            made = self._client.save_weights_and_get_sampling_client()
            return self._backend.made(label, made, lambda c: RemoteSampler(self._backend, c))

        return self._backend.submit(label, snapshot)


def _succeeded(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
