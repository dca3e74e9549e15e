"""SamplingClient: generation and logprobs from one fixed set of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cookbook_core.backend.interface import SamplingBackend
from cookbook_core.datum_checks import check_data
from cookbook_core.errors import ConfigError
from cookbook_core.tinker.futures import APIFuture, JointCalls, async_result, async_version, mapped
from cookbook_core.tinker.sdk_objects import own_data, own_params
from cookbook_core.types import (
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    SampleResponse,
    SamplingParams,
    TensorData,
)
from cookbook_core.types.model_input import own_input


class SamplingClient:
    """Generation and logprobs from a snapshot of weights, which later training does not change.

    Single requests to sample are decoded together with those that are already waiting, so submit
    all before waiting for one. Which ones share a loop depends on timing, and the shapes of its
    matrix products move last bits. `sample_batch` decodes its prompts as one unit: the same seeds
    give the same bits. So do `sample_async` and `compute_logprobs_async` of coroutines that are
    started together, as `asyncio.gather` does. A single `compute_logprobs` is computed alone;
    `forward` scores a batch.
    """

    def __init__(self, backend: SamplingBackend) -> None:
        self._backend = backend
        self._joint_calls = JointCalls(backend.unit)

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[SampleResponse]:
        """Generate `num_samples` completions of `prompt`.

        Each has its token ids (train on these, never on re-encoded text) and their logprobs in
        nats, under the distribution sampled from: at the request's temperature, before top_k and
        top_p. The model folder's generation_config is ignored.

        Args:
            prompt: token ids, at least one.
            num_samples: completions to draw.
            sampling_params: max_tokens, temperature, top_k, top_p, stop and seed.
            include_prompt_logprobs: also log p of each prompt token (None at position 0).
            topk_prompt_logprobs: also the k likeliest tokens at each prompt position.
            topk_sample_logprobs: also the k likeliest tokens at each position of a completion,
                under the distribution that its logprobs are of.
            target_prompt_logprobs: also log p of these tokens: int64 `(len(prompt) - 1, K)`, row i
                at the position of prompt token i + 1; -1 asks for nothing.
            prompt_alt_tokens_k: also k draws, with replacement, of each prompt token but the first;
                at temperature 1, without top_k and top_p.
            prompt_logprobs_last_n: leave out logprobs of prompt tokens before the last n.

        Logprobs of the prompt are those at temperature 1, whatever the request's.

        Returns:
            A future of a SampleResponse: `.result().sequences[i].tokens` and `.logprobs`.

        Raises:
            ConfigError, DatumError: at once, before anything is queued.
        """
        more: dict[str, Any] = {
            "topk_sample_logprobs": topk_sample_logprobs,
            "target_prompt_logprobs": target_prompt_logprobs,
            "prompt_alt_tokens_k": prompt_alt_tokens_k,
            "prompt_logprobs_last_n": prompt_logprobs_last_n,
        }
        more = {name: value for name, value in more.items() if not _left_out(name, value)}
        prompt, params = own_input(prompt), own_params(SamplingParams, sampling_params)
        wanted = include_prompt_logprobs, topk_prompt_logprobs
        sent = self._backend.sample(prompt, num_samples, params, *wanted, **more)
        if params.temperature in (0, 1):  # greedy logprobs are those at temperature 1
            return APIFuture(sent, "sample")

        def marked(response: SampleResponse) -> SampleResponse:
            own = [replace(s, temperature=params.temperature) for s in response.sequences]
            return replace(response, sequences=own)

        return APIFuture(mapped(sent, marked), "sample")

    def sample_batch(
        self,
        prompts: Sequence[ModelInput],
        num_samples: int,
        sampling_params: Sequence[SamplingParams],
        *,
        topk_prompt_logprobs: int = 0,
    ) -> list[APIFuture[SampleResponse]]:
        """Generate completions of several prompts, decoded together as one unit. Not in the SDK.

        Results depend on the weights, the prompts and the parameters alone, to the bit; see the
        class for what single requests depend on. A service gets single requests.

        Args:
            prompts: P prompts.
            num_samples: completions of each.
            sampling_params: P of them, one for each prompt.
            topk_prompt_logprobs: of every prompt, as for `sample`.
        Returns:
            P futures, as `sample` returns them.
        Raises:
            ConfigError, DatumError: at once, before anything is queued.
        """
        if len(prompts) != len(sampling_params):
            raise ConfigError(
                "sampling_params", "not one per prompt", expected=len(prompts),
                got=len(sampling_params), fix="Pass one SamplingParams per prompt.",
            )  # fmt: skip
        with self._backend.unit():
            return [
                self.sample(prompt, num_samples, params, topk_prompt_logprobs=topk_prompt_logprobs)
                for prompt, params in zip(prompts, sampling_params, strict=True)
            ]

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """log p (nats) of each prompt token given those before it; None at position 0.

        Locally computed by the scoring code of the training client: bit for bit the logprobs of a
        `forward` over this prompt alone, or over those that are awaited together.

        Args:
            prompt: token ids, at least two.
            prompt_logprobs_last_n: of the last n tokens only; None before them.

        Raises:
            ConfigError, DatumError: at once, before anything is queued.
        """
        last_n = () if prompt_logprobs_last_n is None else (prompt_logprobs_last_n,)
        sent = self._backend.compute_logprobs(own_input(prompt), *last_n)
        return APIFuture(sent, "compute_logprobs")

    def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy"
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute logprobs of target_tokens, as `TrainingClient.forward` does. Not in the SDK.

        Locally in one pass over the batch, bit for bit what a training client of the same weights
        returns. A service scores each datum by itself.

        Args:
            data: datums with target_tokens `(N,)` or `(N, K)`.
            loss_fn: "cross_entropy" alone, which is a sum.

        Returns:
            loss_fn_outputs[i]["logprobs"]: shape of data[i]'s target_tokens, nats.

        Raises:
            DatumError, ConfigError: at once, before anything is queued.
        """
        if loss_fn != "cross_entropy":
            fix = "Create a training client of these weights for other losses."
            raise ConfigError(
                "loss_fn", "unknown", expected='"cross_entropy"', got=f"{loss_fn!r:.80}", fix=fix
            )
        own, model = own_data(data), self._backend.model_data
        check_data(own, vocab_size=model.vocab_size, max_context_length=model.max_context_length)
        return APIFuture(self._backend.forward(list(own)), "forward")

    def get_tokenizer(self) -> Any:
        """The base model's Hugging Face tokenizer."""
        return self._backend.tokenizer()

    def get_base_model(self) -> str:
        """Name or path of the base model."""
        return self._backend.model_data.model_name or ""

    sample_async = async_result(sample, joined=True)
    compute_logprobs_async = async_result(compute_logprobs, joined=True)
    get_base_model_async = async_version(get_base_model)


def _left_out(name: str, value: Any) -> bool:
    """Whether an option of `sample` has its default; a value of another type may have no `==`."""
    return value is None or (name != "prompt_logprobs_last_n" and type(value) is int and not value)
