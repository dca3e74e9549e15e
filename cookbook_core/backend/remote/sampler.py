"""Generation and logprobs from weights at a service."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cookbook_core.backend.interface import SamplingBackend
from cookbook_core.backend.remote import convert
from cookbook_core.backend.remote.connection import joined
from cookbook_core.backend.remote.session import Session
from cookbook_core.backend.sampling_requests import (
    prompt_datum,
    prompt_scores,
    sampling_request,
)
from cookbook_core.builtin_losses import builtin_loss
from cookbook_core.custom_loss import evaluate, merge_metrics
from cookbook_core.errors import ConfigError
from cookbook_core.types import (
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    SampleResponse,
    SamplingParams,
    TensorData,
)

import numpy as np


class RemoteSampler:
    """One fixed set of weights at a service. Requests are sent at once and run side by side."""

    def __init__(self, session: Session, client: Any) -> None:
        self._session, self._client = session, client
        self.model_data = session.model_data()

    def tokenizer(self) -> Any:
        return self._session.tokenizer()

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
    ) -> Future[SampleResponse]:
        options = include_prompt_logprobs, topk_prompt_logprobs
        # validate before sending
        tops = *options, topk_sample_logprobs
        request = sampling_request(self.model_data, prompt, num_samples, params, *tops)
        vocab_size = self.model_data.vocab_size
        more = target_prompt_logprobs, prompt_alt_tokens_k, prompt_logprobs_last_n
        scores = prompt_scores(request, vocab_size, *more)
        connection = self._session.connection
        wanted: dict[str, Any] = {
            "topk_sample_logprobs": topk_sample_logprobs,
            "prompt_alt_tokens_k": prompt_alt_tokens_k,
            "prompt_logprobs_last_n": prompt_logprobs_last_n or 0,
        }
        wanted = {name: value for name, value in wanted.items() if value}
        if scores.targets is not None:
            targets = TensorData(scores.targets, "int64")
            wanted["target_prompt_logprobs"] = convert.tensor_out(connection.types, targets)
        self._check_sdk("sample", self._client.sample, wanted)
        sent = self._client.sample(
            convert.prompt_out(connection.types, prompt),
            num_samples,
            convert.sampling_params_out(connection.types, params),
            *options,
            **wanted,
        )
        where = f"sample at {connection.url}"
        answer = connection.answer(
            "sample",
            sent,
            lambda response: convert.sampled_in(where, response, num_samples, wanted),
        )
        return connection.watch("sample", answer)

    def _check_sdk(self, label: str, method: Any, wanted: Mapping[str, Any]) -> None:
        """Raise ConfigError for an argument that the installed SDK's method does not have."""
        known = inspect.signature(method).parameters
        for name in (name for name in wanted if name not in known):
            what, fix = f"the installed tinker SDK's {label} lacks it", 'Install "tinker>=0.38".'
            raise ConfigError(name, what, fix=fix)

    def unit(self) -> AbstractContextManager[None]:
        return nullcontext()

    def compute_logprobs(
        self, prompt: ModelInput, last_n: int | None = None
    ) -> Future[list[float | None]]:
        prompt_datum(self.model_data, prompt, last_n)  # validate before sending
        label, connection = "compute_logprobs", self._session.connection
        wanted = {} if last_n is None else {"prompt_logprobs_last_n": last_n}
        self._check_sdk(label, self._client.compute_logprobs, wanted)
        sent = self._client.compute_logprobs(convert.prompt_out(connection.types, prompt), **wanted)
        return connection.watch(label, connection.answer(label, sent, list))

    def forward(self, data: Sequence[Datum]) -> Future[ForwardBackwardOutput]:
        """A `compute_logprobs` of each datum whose targets are its next tokens; of another one a
        `sample` with target_prompt_logprobs, of which the sampled token is not used."""
        scored = [self._score(datum) for datum in data]
        return joined(scored, lambda outputs: _output(data, outputs))

    def _score(self, datum: Datum) -> Future[Any]:
        inputs, targets = datum.model_input, datum.loss_fn_inputs["target_tokens"]
        ids = targets.to_numpy()
        if ids.ndim == 1:
            prompt = inputs.append_int(int(ids[-1]))
            # compute_logprobs gives no number before an image
            if not inputs.images and prompt.to_ints()[1:] == ids.tolist():
                return self.compute_logprobs(prompt)
            targets = TensorData(ids[:, None], "int64")
        prompt = inputs.append_int(0)  # the last is not read
        greedy = SamplingParams(max_tokens=1, temperature=0)
        return self.sample(prompt, 1, greedy, target_prompt_logprobs=targets)


def _output(data: Sequence[Datum], scored: Sequence[Any]) -> ForwardBackwardOutput:
    """What a training client's forward returns, from the answers of `RemoteSampler._score`."""
    logprobs = []
    for datum, answer in zip(data, scored, strict=True):
        array = answer[1:] if isinstance(answer, list) else answer.target_prompt_logprobs.to_numpy()
        shape = datum.loss_fn_inputs["target_tokens"].shape
        logprobs.append(TensorData(np.asarray(array, np.float32).reshape(shape), "float32"))
    tensors = [lp.to_torch() for lp in logprobs]
    loss = evaluate(builtin_loss("cross_entropy", None), data, tensors)
    outputs = [{"logprobs": lp} for lp in logprobs]
    return ForwardBackwardOutput("ArrayRecord", outputs, merge_metrics(loss, {}))


def create_sampler(session: Session, path: str | None) -> Future[SamplingBackend]:
    """A sampler of weights saved at `path`, or of the bare base model."""
    if path is not None:
        convert.check_path(path)

    def create() -> Any:
        base = {"base_model": session.model_data().model_name} if path is None else {}
        return session.connection.client().create_sampling_client(model_path=path, **base)

    return session.submit_client(
        "create_sampling_client", create, lambda client: RemoteSampler(session, client)
    )
