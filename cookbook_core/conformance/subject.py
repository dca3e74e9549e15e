"""What the checks examine: training clients of one service, and data for them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cookbook_core.backend.gradient_probe import (
    LOSS,
    GradientReader,
    Reading,
    arrays,
    measure,
    said,
    weigh,
)
from cookbook_core.tinker import (
    AdamParams,
    Datum,
    ModelInput,
    SamplingClient,
    SamplingParams,
    TrainingClient,
)

RATE = 2e-3
"""Learning rate of steps that must be seen: large."""

IDLE = AdamParams(learning_rate=0.0, beta1=0.0, beta2=0.0)
"""Uses up what is accumulated and changes no weight."""


class NotOffered(Exception):
    """The service says that it does not do this."""


class Subject:
    """Clients of one service, made when a check needs one.

    Args:
        make_client: a new training client with a fresh LoRA adapter.
        below: whether bad input goes past this package's client straight to its backend, so that
            it is the service that has to refuse it. False for the local backend, whose first
            line of defence is the client.
        patience: seconds for one request.
    """

    def __init__(
        self, make_client: Callable[[], TrainingClient], *, below: bool, patience: float
    ) -> None:
        self._make_client, self.below, self.patience = make_client, below, patience
        self._client: TrainingClient | None = None
        self._sampler: SamplingClient | None = None
        self._reader: GradientReader | None = None
        self._readings: dict[str, Reading] | None = None
        self.refused: list[Datum] | None = None
        """A batch that the service has refused."""

    def client(self) -> TrainingClient:
        """The client that checks share; whoever uses it leaves no gradient accumulated."""
        if self._client is None:
            self._client = self._make_client()
        return self._client

    def forget(self) -> None:
        """Let the next check start with a client of its own: this one may be spoilt."""
        self._client = self._sampler = self._reader = None

    def readings(self) -> dict[str, Reading]:
        """The arithmetic of the service, by name; taken once, on an adapter that it uses up."""
        if self._readings is None:
            backend = self._make_client()._backend
            self._readings = {r.name: r for r in measure(backend, self.patience)}
        return self._readings

    def reader(self) -> GradientReader:
        """Reads gradients accumulated by the shared client."""
        if self._reader is None:
            self._reader = GradientReader(self.client()._backend, self.patience)
        return self._reader

    def sampler(self) -> SamplingClient:
        """The shared client's weights to sample from, after training that makes them unlike the
        base model's.

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
                raise NotOffered(said(error)) from error
        return self._sampler

    def send(self, data: list[Datum]) -> Any:
        """Submit a forward_backward that may be refused; the future's result() tells."""
        client = self.client()
        if self.below:
            return client._backend.forward_backward(data, LOSS)
        return client.forward_backward(data, "cross_entropy")

    def refuser(self, error: BaseException) -> str:
        """Put before an error of bad input that never reached the service; "" where it did."""
        causes = error.__cause__, getattr(error.__cause__, "__cause__", None)
        reached = any(hasattr(cause, "status_code") for cause in causes)
        return "" if reached or not self.below else "not sent: "

    def step_blindly(self) -> Any:
        """Submit an optim_step without a look at what came before."""
        client = self.client()
        adam = AdamParams(learning_rate=1e-4)
        return client._backend.optim_step(adam) if self.below else client.optim_step(adam)

    def ids(self, n: int, seed: int = 0) -> list[int]:
        """Random token ids below 256, which any vocabulary has."""
        top = min(self.client().get_info().model_data.vocab_size or 256, 256)
        return np.random.default_rng(seed).integers(top // 16, top, n).tolist()

    def datum(self, n: int, seed: int = 0, **inputs: Any) -> Datum:
        """N random tokens that predict the next ones, with weights 1 unless others are given."""
        ids = self.ids(n + 1, seed)
        given = {"target_tokens": ids[1:], "weights": np.ones(n)} | inputs
        kept = {key: value for key, value in given.items() if value is not None}
        return Datum(ModelInput.from_ints(ids[:-1]), kept)

    def data(self) -> list[Datum]:
        """A batch of unequal lengths."""
        return [self.datum(n, seed) for seed, n in enumerate((3, 17, 8))]

    def prompt(self) -> ModelInput:
        """Twelve tokens."""
        return ModelInput.from_ints(self.ids(12, seed=99))


def logprobs(client: TrainingClient, data: Sequence[Datum]) -> list[np.ndarray]:
    """What forward says of each datum's target_tokens, nats."""
    return arrays(client.forward(list(data), "cross_entropy").result())


def train(client: TrainingClient, data: Sequence[Datum], steps: int, rate: float = RATE) -> None:
    """Steps on the cross-entropy of the data, each waited for."""
    for _ in range(steps):
        client.forward_backward(list(data), "cross_entropy").result()
        client.optim_step(AdamParams(learning_rate=rate)).result()


def greedy(max_tokens: int) -> SamplingParams:
    """The likeliest token each time, never stopping early."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=[])


def fresh_name() -> str:
    """For a checkpoint that this run alone writes."""
    return f"check-{uuid.uuid4().hex[:8]}"
