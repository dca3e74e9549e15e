"""Checks of sampling, saving and loading.

Those of sampling share one snapshot: the shared client must not be trained between them.
"""

from __future__ import annotations

from cookbook_core.backend.gradient_probe import SAME_PATH, CannotBeRead, difference, error_line
from cookbook_core.conformance.report import Outcome, passes
from cookbook_core.conformance.subject import (
    RATE,
    NotOffered,
    Subject,
    fresh_name,
    greedy,
    logprobs,
    train,
)
from cookbook_core.tinker import Datum, ModelInput, SamplingClient, SamplingParams

import numpy as np

MEAN_GAP = 0.05
"""Mean difference (nats) allowed between a sampler's logprobs and forward's: bfloat16's."""


def sampled_logprobs(s: Subject) -> Outcome:
    """At temperature 1, all tokens allowed."""
    return _sampled(s, s.sampler(), top_k=-1)


def truncated_logprobs(s: Subject) -> Outcome:
    """With top_k the logprobs are still those over the whole vocabulary."""
    return _sampled(s, s.sampler(), top_k=2)


def tempered_logprobs(s: Subject) -> Outcome:
    """At temperature 2, log q = log p / 2 + a constant: the slope of log q over log p is 1/2."""
    sampler, prompt = s.sampler(), s.prompt()
    params = SamplingParams(max_tokens=1, temperature=2.0, seed=3, stop=[])
    sequences = sampler.sample(prompt, 24, params).result().sequences
    drawn = {q.tokens[0]: q.logprobs[0] for q in sequences if q.logprobs}
    if len(drawn) < 3:
        raise CannotBeRead(f"{len(drawn)} different tokens with logprobs in 24 samples")
    data = [_scored([*prompt.to_ints(), token]) for token in drawn]
    p = np.array([lp[-1] for lp in logprobs(s.client(), data)])
    q = np.array(list(drawn.values()))
    slope = float(np.cov(p, q)[0, 1] / np.var(p, ddof=1))
    figure = f"slope of log q over log p {slope:.3g}, right is 0.5 (1 at temperature 1)"
    return passes(abs(slope - 0.5) < 0.15, figure)


def seeds(s: Subject) -> Outcome:
    """The same seed draws the same tokens, another seed other tokens."""
    sampler, prompt = s.sampler(), s.prompt()
    drawn = []
    for seed in (5, 5, 6):
        params = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, stop=[])
        sequences = sampler.sample(prompt, 2, params).result().sequences
        drawn.append([list(sequence.tokens) for sequence in sequences])
    same, other = drawn[0] == drawn[1], drawn[0] != drawn[2]
    figure = f"same seed {'same' if same else 'other'} tokens, other seed "
    return passes(same and other, figure + ("other tokens" if other else "same tokens"))


def prompt_logprobs(s: Subject) -> Outcome:
    """compute_logprobs returns None for the first token, then forward's logprobs."""
    sampler, prompt = s.sampler(), s.prompt()
    try:
        returned = sampler.compute_logprobs(prompt).result()
    except Exception as error:
        raise NotOffered(error_line(error)) from error
    if len(returned) != prompt.length or returned[0] is not None or None in returned[1:]:
        return Outcome("fail", f"{returned!r:.60}")
    scored = logprobs(s.client(), [_scored(prompt.to_ints())])[0]
    return _near(np.abs(np.array(returned[1:], np.float64) - scored))


def saved_for_sampler(s: Subject) -> Outcome:
    """A sampler of saved weights gives the snapshot's greedy tokens and forward's logprobs."""
    sampler, client = s.sampler(), s.client()
    path = client.save_weights_for_sampler(fresh_name(), ttl_seconds=3600).result().path
    saved = client.create_sampling_client(path).result()
    tokens = [
        list(which.sample(s.prompt(), 1, greedy(16)).result().sequences[0].tokens)
        for which in (sampler, saved)
    ]
    outcome = _sampled(s, saved, top_k=-1)
    same = tokens[0] == tokens[1]
    figure = f"greedy tokens {'equal' if same else 'differ'}, {outcome.figure}"
    return passes(same and outcome.result == "pass", figure)


def load_weights(s: Subject) -> Outcome:
    """load_state restores the weights of save_state."""
    client, data = s.client(), s.data()
    start = logprobs(client, data)
    path = client.save_state(fresh_name(), ttl_seconds=3600).result().path
    train(client, data, 2)
    moved = difference(start, logprobs(client, data))
    client.load_state(path).result()
    gap = difference(start, logprobs(client, data))
    return passes(gap <= 0.1 * moved, f"{gap:.2g} nats from what was saved, moved by {moved:.2g}")


def load_optimizer(s: Subject) -> Outcome:
    """A step after load_state_with_optimizer equals the step after save_state."""
    client, data, other = s.client(), s.data(), [s.datum(11, seed=8)]
    train(client, data, 4)
    start = logprobs(client, other)
    path = client.save_state(fresh_name(), ttl_seconds=3600).result().path
    train(client, other, 1, RATE)
    first = logprobs(client, other)
    client.load_state_with_optimizer(path).result()
    train(client, other, 1, RATE)
    gap, moved = difference(first, logprobs(client, other)), difference(first, start)
    return passes(gap <= 0.1 * moved, f"{gap:.2g} nats from that step, which moves {moved:.2g}")


def _sampled(s: Subject, sampler: SamplingClient, top_k: int) -> Outcome:
    """Compare the logprobs of sampled tokens with those that forward gives them."""
    params = SamplingParams(max_tokens=16, temperature=1.0, top_k=top_k, seed=1, stop=[])
    prompt = s.prompt()
    sequences = sampler.sample(prompt, 4, params).result().sequences
    if any(sequence.logprobs is None for sequence in sequences):
        return Outcome("fail", "no logprobs of sampled tokens")
    scored = logprobs(s.client(), [_scored([*prompt.to_ints(), *q.tokens]) for q in sequences])
    gaps = [
        np.abs(np.array(q.logprobs) - lp[-len(q.tokens) :])
        for q, lp in zip(sequences, scored, strict=True)
    ]
    return _near(np.concatenate(gaps))


def _near(gaps: np.ndarray) -> Outcome:
    mean, most = float(gaps.mean()), float(gaps.max())
    good = mean <= MEAN_GAP and most <= 5 * SAME_PATH
    return passes(good, f"logprobs differ by {mean:.2g} nats in the mean, {most:.2g} at most")


def _scored(ids: list[int]) -> Datum:
    return Datum(
        ModelInput.from_ints(ids[:-1]),
        {"target_tokens": ids[1:], "weights": np.ones(len(ids) - 1)},
    )
