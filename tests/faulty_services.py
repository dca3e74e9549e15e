"""Services that misbehave in one way each: planted faults for tests/test_conformance.py.

Each wraps the local training backend and answers every request before it returns.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from cookbook_core.builtin_losses import builtin_loss, cross_entropy
from cookbook_core.custom_loss import forward_backward_two_pass
from cookbook_core.datum_checks import check_data
from cookbook_core.datums import with_inputs
from cookbook_core.errors import DatumError
from cookbook_core.tinker import (
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    OptimStepResponse,
    TensorData,
    TrainingClient,
)

import numpy as np

PLAIN = builtin_loss("cross_entropy")


def done(run: Callable[[], Any]) -> Future[Any]:
    """A finished future."""
    future: Future[Any] = Future()
    try:
        future.set_result(run())
    except Exception as error:
        future.set_exception(error)
    return future


def reweighted(datum: Datum, change: Callable[[np.ndarray], Any]) -> Datum:
    targets = datum.loss_fn_inputs["target_tokens"]
    weights = datum.loss_fn_inputs.get("weights", np.ones(targets.shape))
    weights = weights.to_numpy() if isinstance(weights, TensorData) else weights
    return with_inputs(datum, weights=change(weights))


def with_logprobs(output: ForwardBackwardOutput, change: Callable[[np.ndarray], Any]) -> Any:
    outputs = [
        {"logprobs": TensorData.from_numpy(change(o["logprobs"].to_numpy()))}
        for o in output.loss_fn_outputs
    ]
    return replace(output, loss_fn_outputs=outputs)


class Service:
    """A well-behaved service: refuses bad data itself, knows cross_entropy alone."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.info = inner, inner.info

    def check(self, data: Sequence[Datum]) -> None:
        check_data(data, vocab_size=self.info.model_data.vocab_size or 0)

    def weights(self, data: list[Datum]) -> list[Datum]:
        """The weights that the service uses in the backward pass."""
        return data

    def outputs(self, data: list[Datum], output: ForwardBackwardOutput) -> ForwardBackwardOutput:
        """The output that the service returns."""
        return output

    def score(self, data: list[Datum], loss_fn: Any) -> ForwardBackwardOutput:
        self.check(data)
        return self.outputs(data, self.inner.forward(data, loss_fn).result())

    def backward(self, data: list[Datum], loss_fn: Any) -> ForwardBackwardOutput:
        self.check(data)
        output = self.inner.forward_backward(self.weights(data), loss_fn).result()
        return self.outputs(data, output)

    def forward(self, data: Sequence[Datum], loss_fn: Any) -> Future[Any]:
        return done(lambda: self.score(list(data), loss_fn))

    def forward_backward(self, data: Sequence[Datum], loss_fn: Any, form: Any = None) -> Any:
        if getattr(loss_fn, "func", None) is cross_entropy:
            return done(lambda: self.backward(list(data), loss_fn))
        return done(lambda: forward_backward_two_pass(TrainingClient(self), list(data), loss_fn))

    def __getattr__(self, name: str) -> Any:  # optim_step, save, load, snapshot, open_sampler
        return getattr(self.inner, name)


# ---- gradients ------------------------------------------------------------------------------


class MeanOverWeights(Service):
    def weights(self, data):
        return [reweighted(d, lambda w: w / max(w.sum(), 1e-9)) for d in data]


class MeanOverBatch(Service):
    def weights(self, data):
        return [reweighted(d, lambda w: w / len(data)) for d in data]


class MeanOverBoth(Service):
    """As measured on SkyRL."""

    def weights(self, data):
        return [reweighted(d, lambda w: w / max(w.sum(), 1e-9) / len(data)) for d in data]


class MeanOverTokens(Service):
    def weights(self, data):
        return [reweighted(d, lambda w: w / len(w)) for d in data]


class SignFlipped(Service):
    def weights(self, data):
        return [reweighted(d, np.negative) for d in data]


class Absolute(Service):
    def weights(self, data):
        return [reweighted(d, np.abs) for d in data]


class BinaryWeights(Service):
    def weights(self, data):
        return [reweighted(d, np.sign) for d in data]


class LastCallOnly(Service):
    """Gradients are overwritten rather than added."""

    def forward_backward(self, data, loss_fn, form=None):
        self.inner._adapter.grads = None
        return super().forward_backward(data, loss_fn, form)


class OtherLogprobs(Service):
    """forward and forward_backward do not agree: dropout, another dtype."""

    def score(self, data, loss_fn):
        return with_logprobs(super().score(data, loss_fn), lambda lp: lp - 0.3)


class NoLogprobs(Service):
    def outputs(self, data, output):
        return with_logprobs(output, lambda lp: np.full_like(lp, np.nan))


class CustomIsPlain(Service):
    """Every custom loss is trained as cross-entropy."""

    def forward_backward(self, data, loss_fn, form=None):
        return super().forward_backward(data, PLAIN)


class PaddingLeaks(Service):
    """The shorter sequences of a batch get lower logprobs than alone."""

    def outputs(self, data, output):
        longest = max(datum.model_input.length for datum in data)
        return with_logprobs(output, lambda lp: lp - 0.02 * (longest - len(lp)))


class Flattened(Service):
    def outputs(self, data, output):
        return with_logprobs(output, np.ravel)


class Refuses2d(Service):
    def check(self, data):
        super().check(data)
        if any(len(d.loss_fn_inputs["target_tokens"].shape) == 2 for d in data):
            raise ValueError("targets must be one-dimensional")


class FirstColumnOnly(Service):
    def weights(self, data):
        return [
            reweighted(d, lambda w: w * (np.arange(3) == 0) if w.ndim == 2 else w) for d in data
        ]


class AbsentIsZero(Service):
    def weights(self, data):
        return [
            d if "weights" in d.loss_fn_inputs else reweighted(d, lambda w: 0 * w) for d in data
        ]


class NoNorm(Service):
    """Reports no gradient norm, as TuFT and SkyRL; gradients are then read by step."""

    def optim_step(self, params, after=()):
        return done(lambda: (self.inner.optim_step(params).result(), OptimStepResponse())[1])


class EpsIgnored(NoNorm):
    def optim_step(self, params, after=()):
        return super().optim_step(replace(params, eps=1e-8))


class BetasIgnored(NoNorm):
    def optim_step(self, params, after=()):
        return super().optim_step(replace(params, beta1=0.9, beta2=0.95))


# ---- requests -------------------------------------------------------------------------------


class Lenient(Service):
    """Accepts bad data of one kind."""

    words = ""

    def check(self, data):
        try:
            super().check(data)
        except DatumError as error:
            if self.words not in str(error):
                raise
            raise Accepted from error

    def backward(self, data, loss_fn):
        try:
            return super().backward(data, loss_fn)
        except Accepted:
            nan = [{"logprobs": TensorData(np.full(5, np.nan), "float32")} for _ in data]
            return ForwardBackwardOutput("", nan, {})


class Accepted(Exception):
    pass


def lenient(words: str) -> type[Service]:
    """A service that accepts data which the usual validation refuses with these words."""
    return type("Lenient", (Lenient,), {"words": words})


class Hangs(Service):
    def forward_backward(self, data, loss_fn, form=None):
        if any("target_tokens" not in d.loss_fn_inputs for d in data):
            return Future()
        return super().forward_backward(data, loss_fn, form)


class Silent(Service):
    def forward(self, data, loss_fn):
        return Future()

    forward_backward = forward


class BrokenByRefusal(Service):
    broken = False

    def check(self, data):
        if self.broken:
            raise RuntimeError("409 conflict")
        try:
            super().check(data)
        except DatumError:
            self.broken = True
            raise


class KeepsPartialGradient(Service):
    """Good datums before the bad one are accumulated before the request fails."""

    def backward(self, data, loss_fn):
        try:
            self.check(data)
        except DatumError:
            if len(data) > 1:
                self.inner.forward_backward(data[:1], loss_fn).result()
            raise
        return super().backward(data, loss_fn)


class StepsUnchecked(Service):
    def optim_step(self, params, after=()):
        future = self.inner.optim_step(params)
        return future if future.exception() is None else done(OptimStepResponse)


class Overtakes(Service):
    """optim_step does not wait for an unfinished forward_backward."""

    pool = ThreadPoolExecutor(1)

    def forward_backward(self, data, loss_fn, form=None):
        future = super().forward_backward
        if getattr(loss_fn, "func", None) is not cross_entropy:  # two requests, each of them late
            return future(data, loss_fn, form)
        return self.pool.submit(lambda: (time.sleep(0.02), future(data, loss_fn).result())[1])

    def optim_step(self, params, after=()):
        return done(lambda: self.inner.optim_step(params).result())


class ScoresWithOldWeights(Service):
    """A forward submitted before an optim_step's result is read uses the old weights."""

    old: str | None = None
    names = itertools.count()

    def save_now(self) -> str:
        return self.inner.save(f"s{next(self.names)}", for_sampler=False).result()

    def optim_step(self, params, after=()):
        service, old = self, self.save_now()

        class Watched(Future):
            def result(self, timeout=None):
                service.old = None
                return super().result(timeout)

        future = Watched()
        future.set_result(self.inner.optim_step(params).result())
        self.old = old
        return future

    def score(self, data, loss_fn):
        if self.old is None:
            return super().score(data, loss_fn)
        new = self.save_now()
        self.inner.load(self.old, with_optimizer=True).result()
        output = super().score(data, loss_fn)
        self.inner.load(new, with_optimizer=True).result()
        return output


# ---- sampling and saving --------------------------------------------------------------------


class Sampler:
    """A well-behaved sampler, which subclasses change."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.model_data = inner, inner.model_data

    def params(self, params: Any) -> Any:
        return params

    def logprobs(self, prompt: ModelInput, params: Any, sequence: Any) -> Any:
        return sequence.logprobs_np

    def unit(self):
        return self.inner.unit()

    def sample(self, prompt, num_samples, params, *more):
        def run() -> Any:
            response = self.inner.sample(prompt, num_samples, self.params(params), *more).result()
            sequences = [
                replace(s, logprobs_np=np.array(self.logprobs(prompt, params, s)))
                for s in response.sequences
            ]
            return replace(response, sequences=sequences)

        return done(run)

    def compute_logprobs(self, prompt):
        return self.inner.compute_logprobs(prompt)


class OtherEngine(Sampler):
    """Logprobs of another dtype, except with top_k or a temperature."""

    def logprobs(self, prompt, params, sequence):
        plain = params.top_k == -1 and params.temperature == 1
        return sequence.logprobs_np - (0.3 if plain else 0)


class AfterTopK(Sampler):
    def logprobs(self, prompt, params, sequence):
        return sequence.logprobs_np * (0.5 if params.top_k > 0 else 1)


class AtTemperatureOne(Sampler):
    def logprobs(self, prompt, params, sequence):
        whole = [*prompt.to_ints(), *sequence.tokens]
        scored = self.inner.compute_logprobs(ModelInput.from_ints(whole)).result()
        return scored[prompt.length :]


class SeedIgnored(Sampler):
    seeds = itertools.count()

    def params(self, params):
        return replace(params, seed=next(self.seeds))


class PromptShifted(Sampler):
    def compute_logprobs(self, prompt):
        logprobs = self.inner.compute_logprobs(prompt).result()
        return done(lambda: [None, *logprobs[2:], logprobs[1]])


class NoSampler(Service):
    def snapshot(self):
        return done(lambda: 1 / 0)


def sampling(kind: type[Sampler]) -> type[Service]:
    """A service with samplers of this kind."""

    class WithSampler(Service):
        def snapshot(self):
            return done(lambda: kind(self.inner.snapshot().result()))

        def open_sampler(self, path):
            return done(lambda: kind(self.inner.open_sampler(path).result()))

    return WithSampler


class SavesNothing(Service):
    """A sampler of saved weights has the base model's."""

    def open_sampler(self, path):
        return self.inner._backend.create_sampler(None)


class LoadsNothing(Service):
    def load(self, path, *, with_optimizer):
        return self.inner.load(path, with_optimizer=True) if with_optimizer else done(lambda: None)


class LoadsNoMoments(Service):
    def load(self, path, *, with_optimizer):
        return self.inner.load(path, with_optimizer=False)
