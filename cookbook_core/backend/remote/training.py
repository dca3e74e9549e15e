"""One adapter in training at a service: built-in losses in one pass, custom losses in two."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from cookbook_core.backend.interface import SamplingBackend, TrainingBackend
from cookbook_core.backend.remote import convert
from cookbook_core.backend.remote.connection import WAIT_SECONDS
from cookbook_core.backend.remote.sampler import RemoteSampler, create_sampler
from cookbook_core.backend.remote.session import Session
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
    LoraConfig,
    OptimStepResponse,
)

log = logging.getLogger("cookbook_core")
CUSTOM = "forward_backward_custom"
SCRATCH = LoraConfig(rank=8, seed=0, train_unembed=False)
"""The adapter on which a service's gradients are checked."""


class RemoteTraining:
    """One adapter in training at a service.

    Args:
        session: of its base model.
        client: the SDK's TrainingClient.
        rank: of the adapter, for services whose get_info does not state it.
    """

    def __init__(self, session: Session, client: Any, rank: int | None) -> None:
        self._session, self._client = session, client
        self._connection, self._types = session.connection, session.connection.types
        info = client.get_info()
        data = session.adopt_model_of(info)
        self.info = GetInfoResponse(
            model_data=data,
            model_id=str(client.model_id),
            is_lora=True,
            lora_rank=info.lora_rank or rank,
            model_name=data.model_name,
        )
        self.machine = {"service": session.connection.url}
        self._gradients: list[Future[Any]] = []
        """forward_backward requests since the last optim_step that succeeded."""
        self._lock = threading.Lock()
        self._warned_of_loss = session.trusted

    def tokenizer(self) -> Any:
        return self._session.tokenizer()

    # ---- forward and backward --------------------------------------------------------------------

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
        keep_graph: bool = False,
    ) -> Future[ForwardBackwardOutput]:
        del keep_graph  # the service decides
        refuse_vocabulary(loss_type_input)
        convert.refuse_temperatures(data)

        def answer(output: ForwardBackwardOutput) -> ForwardBackwardOutput:
            result = evaluate(loss_fn, data, logprobs_from_output(output, data))
            metrics = merge_metrics(result, convert.without_service_loss(output.metrics))
            return ForwardBackwardOutput("ArrayRecord", output.loss_fn_outputs, metrics)

        return self._session.submit("forward", lambda: self._forward("forward", data, answer))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn,
        loss_type_input: LossTypeInput = "logprobs",
    ) -> Future[ForwardBackwardOutput]:
        refuse_vocabulary(loss_type_input)
        convert.refuse_temperatures(data)
        named = convert.named_loss(loss_fn, data)
        if named is not None:
            future = self._session.submit("forward_backward", lambda: self._one_pass(data, named))
        else:
            future = self._session.submit(CUSTOM, lambda: self._two_passes(data, loss_fn))
        with self._lock:
            self._gradients.append(future)
        return future

    def _one_pass(self, data: Sequence[Datum], loss: BuiltinLoss) -> Future[Any]:
        def answer(response: Any) -> ForwardBackwardOutput:
            output = convert.output_in(where, response, data)
            try:
                result = evaluate(loss, data, logprobs_from_output(output, data))
            except LossError as error:
                what = (
                    f"the service accepted data on which the loss fails: {error.where} {error.what}"
                )
                slots = {"expected": error.expected, "got": error.got, "fix": error.fix}
                raise AnswerError(where, what, **slots) from error
            theirs = output.metrics.get("loss:sum")
            if convert.disagrees(theirs, result.loss) and not self._warned_of_loss:
                self._warned_of_loss = True
                log.warning(
                    "%s: the service reports loss:sum %.6g, but its logprobs give %.6g; it may "
                    "divide gradients as well. Run `cookbook check --base_url URL`.",
                    where,
                    theirs,
                    result.loss,
                )
            return self._output(output, result, data, passes=1.0)

        where = f"forward_backward at {self._connection.url}"
        datums = convert.datums_out(self._types, convert.named_datums(data, loss))
        config = dict(loss.config) or None
        sent = self._client.forward_backward(datums, loss.name, config)
        return self._connection.answer("forward_backward", sent, answer)

    def _two_passes(self, data: Sequence[Datum], loss_fn: LossFn) -> Future[Any]:
        self._session.require_correct_gradients(CUSTOM, lambda s: create_training(s, SCRATCH))
        scored = self._forward(CUSTOM, data, lambda output: output).result(WAIT_SECONDS)
        result = differentiate(loss_fn, data, logprobs_from_output(scored, data))
        merge_metrics(result, {})  # refuse bad metrics before a gradient accumulates
        surrogates = surrogate_datums(data, convert.mask_grads(data, result.grads))

        def answer(response: Any) -> ForwardBackwardOutput:
            backward = convert.output_in(where, response, surrogates)
            output = ForwardBackwardOutput("", scored.loss_fn_outputs, backward.metrics)
            passes = backward.metrics.get("passes:max", 2.0)  # 1: it kept the forward's graph
            return self._output(output, result, data, passes)

        where = f"{CUSTOM} at {self._connection.url}"
        datums = convert.datums_out(self._types, surrogates)
        sent = self._client.forward_backward(datums, "cross_entropy")
        return self._connection.answer(CUSTOM, sent, answer)

    def _forward(self, label: str, data: Sequence[Datum], then: Callable[..., Any]) -> Future[Any]:
        """A future of `then(output)`: the service's logprobs of the data, checked."""
        where = f"{label} at {self._connection.url}"
        datums = convert.datums_out(self._types, convert.bare_datums(data))
        sent = self._client.forward(datums, "cross_entropy")
        return self._connection.answer(
            label, sent, lambda response: then(convert.output_in(where, response, data))
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
            refuse_after_failure(after)  # waits, since a service would step in spite of a failure
            for future in before:
                if not future.cancelled():
                    future.exception()
            with self._lock:
                good = [f for f in before if f in self._gradients and _succeeded(f)]
            if not good:
                what = "no gradient has been accumulated"
                fix = "Call forward_backward first; every step uses its gradient up."
                raise RequestError("optim_step", what, fix=fix)
            sent = self._client.optim_step(convert.adam_out(self._types, params))
            with self._lock:
                self._gradients = [f for f in self._gradients if f not in before]
            return self._connection.answer(
                "optim_step", sent, lambda response: convert.optim_in(response, params)
            )

        return self._session.submit("optim_step", step)

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
            return self._connection.answer(label, sent, lambda response: str(response.path))

        return self._session.submit(label, save)

    def load(self, path: str, *, with_optimizer: bool) -> Future[None]:
        label = "load_state_with_optimizer" if with_optimizer else "load_state"
        convert.check_path(path)

        def load() -> Future[None]:
            sent = getattr(self._client, label)(path)
            with self._lock:
                self._gradients.clear()
            return self._connection.answer(label, sent, lambda _: None)

        return self._session.submit(label, load)

    def open_sampler(self, path: str) -> Future[SamplingBackend]:
        return create_sampler(self._session, path)

    def snapshot(self) -> Future[SamplingBackend]:
        return self._session.submit_client(
            "save_weights_and_get_sampling_client",
            self._client.save_weights_and_get_sampling_client,
            lambda client: RemoteSampler(self._session, client),
        )


def create_training(
    session: Session, lora: LoraConfig, user_metadata: dict[str, str] | None = None
) -> Future[TrainingBackend]:
    """A fresh adapter at the service."""

    def create() -> Any:
        return session.connection.client().create_lora_training_client(
            session.model_data().model_name,
            rank=lora.rank,
            seed=lora.seed,
            train_mlp=lora.train_mlp,
            train_attn=lora.train_attn,
            train_unembed=lora.train_unembed,
            user_metadata=user_metadata,
        )

    return session.submit_client(
        "create_lora_training_client",
        create,
        lambda client: RemoteTraining(session, client, lora.rank),
    )


def restore_training(
    session: Session, path: str, *, with_optimizer: bool
) -> Future[TrainingBackend]:
    """An adapter as saved at `path`; its rank is the checkpoint's."""
    label = "create_training_client_from_state" + "_with_optimizer" * with_optimizer
    convert.check_path(path)
    return session.submit_client(
        label,
        lambda: getattr(session.connection.client(), label)(path),
        lambda client: RemoteTraining(session, client, None),
    )


def refuse_vocabulary(loss_type_input: LossTypeInput) -> None:
    """Raise ConfigError for a loss over the whole vocabulary, which no service returns."""
    if loss_type_input != "logprobs":
        raise ConfigError(
            "loss_type_input",
            "services return logprobs of target tokens only",
            expected='"logprobs"',
            got=repr(loss_type_input),
            fix="Name the tokens the loss needs as target_tokens (N, K), or train locally.",
        )


def _succeeded(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
