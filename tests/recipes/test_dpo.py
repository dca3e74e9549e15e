"""The DPO recipe: its loss in closed form, its identities, its errors, and that it learns."""

from __future__ import annotations

import json
import math
from functools import partial

from cookbook_core import clients, datum_from_prompt_completion, tinker, with_inputs
from cookbook_core.custom_loss import differentiate
from cookbook_core.errors import DatumError
from recipes.dpo import LOSSES, REFERENCE_FREE, Config, build_pairs, dpo_loss, train

import pytest
import torch

ALL = {**LOSSES, **REFERENCE_FREE}
LN2, LOG1P_E, LOG1P_1_E = math.log(2), math.log1p(math.e), math.log1p(math.exp(-1))


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


AT_STEP_0 = {
    "dpo": LN2,  # -log sigmoid(0)
    "ipo": 1.0,  # (0 - 1 / (2 * 0.5))^2
    "cdpo": LN2,  # 0.9 ln 2 + 0.1 ln 2
    "simpo": LOG1P_E,  # -log sigmoid(2 * (-1 + 1) - 1) = log(1 + e)
    "orpo": 1 + 0.1 * LN2,  # log p per token is -1, the log odds ratio 0
    "rpo": LN2 + 0.1,  # ln 2 + 0.1 * 1
}
ODDS = [q / (1 - q) for q in (math.exp(-1.5), math.exp(-2.5))]
LATER = {
    "dpo": LOG1P_1_E,
    "ipo": (2 - 1) ** 2,
    "cdpo": 0.9 * LOG1P_1_E + 0.1 * LOG1P_E,
    "simpo": LOG1P_1_E,  # -log sigmoid(2 * (-1.5 + 2.5) - 1)
    "orpo": 1.5 + 0.1 * math.log1p(ODDS[1] / ODDS[0]),
    "rpo": LOG1P_1_E + 0.1 * 1.5,
}


@pytest.mark.parametrize("name", ALL)
def test_each_loss_by_hand(name):
    """beta = 0.5. At step 0 the policy is the reference: -1 nat for each of two tokens of chosen
    and rejected. Later chosen -1 - 2 = -3 and rejected -4 - 1 = -5: margin 2, per token 1."""
    loss_fn = partial(LOSSES[name], beta=0.5) if name in LOSSES else REFERENCE_FREE[name]
    start, metrics = loss_fn(pair(), [torch.tensor([-1.0, -1.0])] * 2)
    assert start.item() == pytest.approx(AT_STEP_0[name], abs=1e-6)
    assert (metrics["accuracy"], metrics["reward_margin"]) == (0.5, 0.0)
    later, metrics = loss_fn(pair(), [torch.tensor([-1.0, -2.0]), torch.tensor([-4.0, -1.0])])
    assert later.item() == pytest.approx(LATER[name], abs=1e-6)
    assert metrics["accuracy"] == 1.0


SLOPES = {  # d loss / d log p of the one response token of chosen and of rejected, at step 0
    "dpo": (-0.05, 0.05),  # beta / 2
    "ipo": (-10.0, 10.0),  # 2 * 1 / (2 beta)
    "cdpo": (-0.04, 0.04),  # (0.9 - 0.1) * beta / 2
    "simpo": (-2 / (1 + math.exp(-1)), 2 / (1 + math.exp(-1))),  # scale * sigmoid(gamma)
    "orpo": (-1 - 0.05 / (1 - math.exp(-1)), 0.05 / (1 - math.exp(-1))),
    "rpo": (-0.15, 0.05),
}


@pytest.mark.parametrize("name", ALL)
def test_each_gradient_lifts_chosen_and_lowers_rejected(name):
    data = [
        with_inputs(datum_from_prompt_completion([1, 7, 8], tokens), ref_logprobs=[-1.0] * 3)
        for tokens in ([2], [3])
    ]
    loss_fn = partial(LOSSES[name], beta=0.1) if name in LOSSES else REFERENCE_FREE[name]
    grads = differentiate(loss_fn, data, [torch.full((3,), -1.0)] * 2).grads
    assert [g.tolist() for g in grads] == [pytest.approx([0, 0, slope]) for slope in SLOPES[name]]


@pytest.mark.parametrize(("name", "margin"), [("ipo", 1.0), ("cdpo", math.log(9) / 0.5)])
def test_ipo_and_cdpo_stop_at_a_finite_margin(name, margin):
    """IPO at 1 / (2 beta); cDPO where sigmoid(beta * margin) is 0.9, the share of right labels."""
    logprobs = [torch.tensor([-1.0 + margin, -1.0]), torch.tensor([-1.0, -1.0])]
    grads = differentiate(partial(LOSSES[name], beta=0.5), pair(), logprobs).grads
    assert torch.cat(grads).abs().max() < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_every_loss_refuses_what_it_cannot_pair_or_align(name):
    loss_fn = partial(LOSSES[name], beta=0.1) if name in LOSSES else REFERENCE_FREE[name]
    with pytest.raises(ValueError, match=r"data\[2\].*got 3 datums"):
        loss_fn([*pair(), pair()[0]], [torch.full((2,), -1.0)] * 3)
    with pytest.raises(DatumError, match=r'data\[0\].*"weights"'):
        loss_fn(pair(), [torch.full((3,), -1.0), torch.full((2,), -1.0)])
    bare = [datum_from_prompt_completion([1], [2, 3])] * 2
    if name in LOSSES:
        with pytest.raises(DatumError, match=r'data\[0\].*"ref_logprobs"'):
            loss_fn(bare, [torch.full((2,), -1.0)] * 2)
    else:
        loss_fn(bare, [torch.full((2,), -1.0)] * 2)


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
        sizes = {"num_steps": steps, "eval_every": 100, "test_rows": 60}
        sizes["dataset"] = "tiny/dpo@train[:384]/test"
        after = train(Config(**sizes, log_path=tmp_path / name))
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


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_losses_without_reference_neither_save_nor_score_one(name, tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "add_ref_logprobs", None)
    monkeypatch.setattr(clients, "frozen_copy", None)
    sizes = {"num_steps": 2, "batch_size": 4, "test_rows": 4, "eval_every": 2}
    sizes["dataset"] = "tiny/dpo@train[:20]/test"
    after = train(Config(loss=name, **sizes, log_path=tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("reference"))
    assert after["test_loss"] > 0
