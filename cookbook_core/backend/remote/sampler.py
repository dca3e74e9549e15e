"""Generation and logprobs from weights that a service holds."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from cookbook_core.backend.remote import convert
from cookbook_core.backend.sampling_requests import prompt_datum, sampling_request
from cookbook_core.types import ModelInput, SampleResponse, SamplingParams

if TYPE_CHECKING:
    from cookbook_core.backend.remote.backend import RemoteBackend


class RemoteSampler:
    """One fixed set of weights at a service. Requests go at once, side by side."""

    def __init__(self, backend: RemoteBackend, client: Any) -> None:
        self._backend, self._client = backend, client
        self.model_data = backend.model()

    def tokenizer(self) -> Any:
        return self._backend.tokenizer()

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> Future[SampleResponse]:
        told = include_prompt_logprobs, topk_prompt_logprobs
        # what cannot work is refused on this side
        sampling_request(self.model_data, prompt, num_samples, params, *told)
        connection = self._backend.connection
        sent = self._client.sample(
            convert.prompt_out(connection.types, prompt),
            num_samples,
            convert.sampling_params_out(connection.types, params),
            *told,
        )
        where = f"sample at {connection.url}"
        answer = connection.answer(
            "sample", sent, lambda found: convert.sampled_in(where, found, num_samples)
        )
        return connection.watch("sample", answer)

    def sample_batch(
        self, prompts: Sequence[ModelInput], num_samples: int, params: Sequence[SamplingParams]
    ) -> list[Future[SampleResponse]]:
        pairs = zip(prompts, params, strict=True)
        return [self.sample(prompt, num_samples, p) for prompt, p in pairs]

    def compute_logprobs(self, prompt: ModelInput) -> Future[list[float | None]]:
        prompt_datum(self.model_data, prompt)  # refused on this side
        connection = self._backend.connection
        sent = self._client.compute_logprobs(convert.prompt_out(connection.types, prompt))
        return connection.watch(
            "compute_logprobs", connection.answer("compute_logprobs", sent, list)
        )
