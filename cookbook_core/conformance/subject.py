"""The subject of the checks: training clients of one service, and data for them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from cookbook_core.backend.gradient_probe import (
    LOSS,
    GradientReader,
    Reading,
    arrays,
    error_line,
    measure,
    weigh,
)
from cookbook_core.images import ImageReader
from cookbook_core.tinker import (
    AdamParams,
    Datum,
    ModelInput,
    SamplingClient,
    SamplingParams,
    TrainingClient,
)

import numpy as np

RATE = 2e-3
"""Learning rate of steps that must change logprobs visibly: large."""

IDLE = AdamParams(learning_rate=0.0, beta1=0.0, beta2=0.0)
"""A step that uses up the accumulated gradient and changes no weight."""


class NotOffered(Exception):
    """The service refuses this request altogether."""


class Subject:
    """Clients of one service, made when a check needs one.

    Args:
        make_client: returns a new training client with a fresh LoRA adapter.
        below: pass bad input to the backend past this package's client, so that the service must
            refuse it. False for the local backend, for which the client validates.
        timeout: seconds for one request.
    """

    def __init__(
        self, make_client: Callable[[], TrainingClient], *, below: bool, timeout: float
    ) -> None:
        self._make_client, self.below, self.timeout = make_client, below, timeout
        self._client: TrainingClient | None = None
        self._sampler: SamplingClient | None = None
        self._reader: GradientReader | None = None
        self._readings: dict[str, Reading] | None = None
        self.refused: list[Datum] | None = None
        """A batch that the service has refused."""

    def client(self) -> TrainingClient:
        """The client that checks share; each check leaves no gradient accumulated."""
        if self._client is None:
            self._client = self._make_client()
        return self._client

    def replace_client(self) -> None:
        """Give the next check a new client, since this one may be broken."""
        self._client = self._sampler = self._reader = None

    def readings(self) -> dict[str, Reading]:
        """The readings of the service's gradients, by name; taken on a new adapter, and cached."""
        if self._readings is None:
            backend = self._make_client()._backend
            self._readings = {r.name: r for r in measure(backend, self.timeout)}
        return self._readings

    def reader(self) -> GradientReader:
        """A reader of the gradients that the shared client accumulates."""
        if self._reader is None:
            self._reader = GradientReader(self.client()._backend, self.timeout)
        return self._reader

    def sampler(self) -> SamplingClient:
        """A sampler of the shared client's weights, trained until they differ from the base
        model's.

        Raises:
            NotOffered: the service cannot sample.
        """
        if self._sampler is None:
            client = self.client()
            ids = self.prompt().to_ints()
            data = [Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]})]
            data = [weigh(datum, 1.0) for datum in data]
            start = logprobs(client, data)[0]
            for _ in range(30):
                train(client, data, 1)
                if np.abs(logprobs(client, data)[0] - start).mean() > 1.5:
                    break
            try:
                self._sampler = client.save_weights_and_get_sampling_client().result()
                self._sampler.sample(self.prompt(), 1, greedy(1)).result()
            except Exception as error:
                raise NotOffered(error_line(error)) from error
        return self._sampler

    def images(self) -> ImageReader:
        """The reader of the model's images."""
        return self.client().get_tokenizer().images.reader()

    def send(self, data: list[Datum]) -> Any:
        """Submit a forward_backward that may be refused, which the future's result() raises."""
        client = self.client()
        if self.below:
            return client._backend.forward_backward(data, LOSS)
        return client.forward_backward(data, "cross_entropy")

    def refuser(self, error: BaseException) -> str:
        """Prefix for the error of bad input: "not sent: " if it did not reach the service."""
        causes = error.__cause__, getattr(error.__cause__, "__cause__", None)
        reached = any(type(cause).__module__.partition(".")[0] == "tinker" for cause in causes)
        return "" if reached or not self.below else "not sent: "

    def step_unchecked(self) -> Any:
        """Submit an optim_step without checking the requests before it."""
        client = self.client()
        adam = AdamParams(learning_rate=1e-4)
        return client._backend.optim_step(adam) if self.below else client.optim_step(adam)

    def ids(self, n: int, seed: int = 0) -> list[int]:
        """Random token ids below 256, which are in any vocabulary."""
        top = min(self.client().get_info().model_data.vocab_size or 256, 256)
        return np.random.default_rng(seed).integers(top // 16, top, n).tolist()

    def datum(self, n: int, seed: int = 0, **inputs: Any) -> Datum:
        """A datum of n random tokens with weights 1; `inputs` replace its own, None removes one."""
        ids = self.ids(n + 1, seed)
        merged = {"target_tokens": ids[1:], "weights": np.ones(n)} | inputs
        present = {key: value for key, value in merged.items() if value is not None}
        return Datum(ModelInput.from_ints(ids[:-1]), present)

    def data(self) -> list[Datum]:
        """A batch of unequal lengths."""
        return [self.datum(n, seed) for seed, n in enumerate((3, 17, 8))]

    def prompt(self) -> ModelInput:
        """Twelve tokens."""
        return ModelInput.from_ints(self.ids(12, seed=99))


def logprobs(client: TrainingClient, data: Sequence[Datum]) -> list[np.ndarray]:
    """Forward's logprobs: D float64 arrays in the shape of target_tokens, nats."""
    return arrays(client.forward(list(data), "cross_entropy").result())


def train(client: TrainingClient, data: Sequence[Datum], steps: int, rate: float = RATE) -> None:
    """Step on the cross-entropy of the data, waiting for each step."""
    for _ in range(steps):
        client.forward_backward(list(data), "cross_entropy").result()
        client.optim_step(AdamParams(learning_rate=rate)).result()


def greedy(max_tokens: int) -> SamplingParams:
    """Parameters that draw the likeliest token each time, without stopping early."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=[])


def fresh_name() -> str:
    """A checkpoint name that no other run uses."""
    return f"check-{uuid.uuid4().hex[:8]}"
