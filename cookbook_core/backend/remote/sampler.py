"""Generation and logprobs from weights at a service."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cookbook_core.backend.interface import SamplingBackend
from cookbook_core.backend.remote import convert
from cookbook_core.backend.remote.session import Session
from cookbook_core.backend.sampling_requests import prompt_datum, sampling_request
from cookbook_core.types import ModelInput, SampleResponse, SamplingParams


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
    ) -> Future[SampleResponse]:
        options = include_prompt_logprobs, topk_prompt_logprobs
        # validate before sending
        sampling_request(self.model_data, prompt, num_samples, params, *options)
        connection = self._session.connection
        sent = self._client.sample(
            convert.prompt_out(connection.types, prompt),
            num_samples,
            convert.sampling_params_out(connection.types, params),
            *options,
        )
        where = f"sample at {connection.url}"
        answer = connection.answer(
            "sample", sent, lambda response: convert.sampled_in(where, response, num_samples)
        )
        return connection.watch("sample", answer)

    def unit(self) -> AbstractContextManager[None]:
        return nullcontext()

    def compute_logprobs(self, prompt: ModelInput) -> Future[list[float | None]]:
        prompt_datum(self.model_data, prompt)  # validate before sending
        label, connection = "compute_logprobs", self._session.connection
        sent = self._client.compute_logprobs(convert.prompt_out(connection.types, prompt))
        return connection.watch(label, connection.answer(label, sent, list))


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
