"""The DPO recipe: its loss in closed form, its identities, its errors, and that it learns."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from cookbook_core import datum_from_prompt_completion, tinker, with_inputs
from cookbook_core.custom_loss import differentiate
from cookbook_core.errors import DatumError
from recipes.dpo import Config, build_pairs, dpo_loss, train


def pair(ref_chosen=(-1.0, -1.0), ref_rejected=(-1.0, -1.0)):
    """One pair with a one-token prompt and completions of two tokens."""
    return [
        with_inputs(datum_from_prompt_completion([1], tokens), ref_logprobs=torch.tensor(reference))
        for tokens, reference in (([2, 3], ref_chosen), ([2, 4], ref_rejected))
    ]


def test_value_by_hand():
    """beta = 0.5. Policy sums: chosen -1 - 2 = -3, rejected -4 - 1 = -5; reference -2 each.
    logratios -1 and -3, margin 2, loss = -log sigmoid(1) = log(1 + e^-1) = 0.313262."""
    logprobs = [torch.tensor([-1.0, -2.0]), torch.tensor([-4.0, -1.0])]
    loss, metrics = dpo_loss(pair(), logprobs, beta=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), abs=1e-6)
    assert metrics["accuracy"] == 1.0
    assert metrics["chosen_logprob"] == -3.0
    assert metrics["rejected_logprob"] == -5.0


def test_reward_margin_is_beta_times_logratio_margin_once():
    """Pitfall 30: beta applied twice in a metric."""
    logprobs = [torch.tensor([-1.0, -2.0]), torch.tensor([-4.0, -1.0])]
    _, metrics = dpo_loss(pair(), logprobs, beta=0.25)
    assert metrics["reward_margin"] == pytest.approx(0.25 * 2.0)


def test_a_margin_of_minus_2000_is_finite():
    """Pitfall 30: DPO numerics. -log sigmoid(-200) = 200 with a gradient of beta per token."""
    data = pair((-0.0, -0.0), (-1000.0, -1000.0))
    logprobs = [torch.tensor([-1000.0, -1000.0]), torch.tensor([-1000.0, -1000.0])]
    result = differentiate(partial(dpo_loss, beta=0.1), data, logprobs)
    assert result.loss == pytest.approx(200.0, rel=1e-5)
    assert torch.allclose(result.grads[0], torch.full((2,), -0.1))


def test_gradient_lifts_chosen_lowers_rejected_and_spares_the_prompt():
    """Pitfalls 3 and 11: the first response token has gradient, prompt tokens have none."""
    data = [
        with_inputs(datum_from_prompt_completion([1, 7, 8], tokens), ref_logprobs=[-1.0] * 3)
        for tokens in ([2], [3])  # differ only in the first (and only) response token
    ]
    logprobs = [torch.full((3,), -1.0), torch.full((3,), -1.0)]
    chosen, rejected = differentiate(partial(dpo_loss, beta=0.1), data, logprobs).grads
    assert chosen.tolist() == pytest.approx([0.0, 0.0, -0.05])
    assert rejected.tolist() == pytest.approx([0.0, 0.0, 0.05])


def test_errors_say_where():
    data = pair()
    logprobs = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match=r"data\[2\]"):
        dpo_loss([*data, data[0]], [*logprobs, torch.zeros(2)], beta=0.1)
    bare = datum_from_prompt_completion([1], [2, 3])
    with pytest.raises(DatumError, match=r'data\[1\].*"ref_logprobs"'):
        dpo_loss([data[0], bare], logprobs, beta=0.1)
    with pytest.raises(DatumError, match=r'data\[0\].*"weights"'):
        dpo_loss(data, [torch.zeros(3), torch.zeros(2)], beta=0.1)


def test_long_pairs_are_dropped_whole_and_counted():
    """Pitfalls 12 and 33."""
    client = tinker.ServiceClient().create_lora_training_client("tiny", rank=1).result()
    rows = [
        {"prompt": "What?", "chosen": " yes", "rejected": " no" * 50},
        {"prompt": "What?", "chosen": " yes", "rejected": " no"},
    ]
    data, kept = build_pairs(rows, client.get_tokenizer(), max_length=20)
    assert len(data) == 2
    assert kept == rows[1:]


def test_learns_and_starts_at_the_identities(tmp_path):
    """Pitfalls 20 and 35: before the first step margin 0 and loss ln 2 exactly; the same seed
    gives the same losses, and the preference is learnt past its null on held-out pairs."""
    histories = []
    for name, steps in (("long", 24), ("short", 5)):
        config = Config(num_steps=steps, eval_every=100, test_rows=60, log_path=tmp_path / name)
        after = train(config)
        if name == "long":
            assert after["test_accuracy"] > 0.75
            assert after["test_reward_margin"] > 0
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        histories.append([json.loads(line) for line in lines])
        assert (tmp_path / name / "plot.png").stat().st_size > 10_000
        assert (tmp_path / name / "samples.md").exists()
    untrained = histories[0][0]
    assert untrained["test_reward_margin"] == 0.0
    assert untrained["test_accuracy"] == 0.5
    assert untrained["test_loss"] == pytest.approx(math.log(2), abs=1e-6)
    first = histories[0][1]
    assert (first["reward_margin"], first["loss"]) == (0.0, pytest.approx(math.log(2), abs=1e-6))
    # the learning rate falls linearly to the run's end, so only step 0 is common to both
    assert histories[0][1]["grad_norm"] == histories[1][1]["grad_norm"]
