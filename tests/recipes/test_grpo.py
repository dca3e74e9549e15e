"""The GRPO recipe: KL gradients by enumeration, weights by hand, errors, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

from cookbook_core import datum_from_prompt_completion, with_inputs
from cookbook_core.clients import add_ref_logprobs, frozen_copy, rollout, score
from cookbook_core.custom_loss import differentiate
from cookbook_core.errors import ConfigError, DatumError, RewardError
from cookbook_core.regularise import kl_term
from cookbook_core.rewards import Completion
from cookbook_core.runs import RunFlags
from cookbook_core.tinker import SampledSequence
from recipes.grpo import (
    Config,
    advantages,
    build_data,
    exact_match,
    grpo_loss,
    measure,
    overlong,
    reward_functions,
    token_weight,
    train,
)

import numpy as np
import pytest
import torch

CONFIG = Config(kl_coef=0.0)
RIGHT = ("k2", "k3_ratio", "k1_reward")
SIX = torch.Generator().manual_seed(0)


def datum(weights=1.0, advantages=1.0, sampling=-1.0, ref=-1.0, completion=(2, 3)):
    """A one-token prompt and a completion; values are per completion token or one for all."""
    made = datum_from_prompt_completion(
        [1], completion, advantages=advantages, sampling_logprobs=sampling, ref_logprobs=ref
    )
    return with_inputs(made, weights=made.loss_fn_inputs["weights"].to_torch() * weights)


def sequence(tokens, logprobs=None):
    return SampledSequence(
        "stop", "s", np.array(tokens), np.array(logprobs or [-0.5] * len(tokens))
    )


# ---- KL by enumeration --------------------------------------------------------------------------


def expected_gradient(estimator, policy, sampled):
    """E[d term / d policy logits] over all 6 outcomes drawn from `sampled`, float64, exactly."""
    logits = policy.clone().requires_grad_(True)
    ref = torch.randn(6, generator=SIX.manual_seed(2), dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    ratio = (logprobs - sampled.log_softmax(-1)).exp()
    terms = kl_term(estimator, logprobs, ref, ratio)
    total = (sampled.softmax(-1) * terms).sum()
    return torch.autograd.grad(total, logits)[0], ref


def exact_gradient(policy, ref, direction):
    logits = policy.clone().requires_grad_(True)
    logp = logits.log_softmax(-1)
    kl = (
        (logp.exp() * (logp - ref)).sum()
        if direction == "p to ref"
        else (ref.exp() * (ref - logp)).sum()
    )
    return torch.autograd.grad(kl, logits)[0]


@pytest.fixture
def policy():
    return torch.randn(6, generator=SIX.manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("estimator", RIGHT)
def test_right_estimators_have_the_gradient_of_kl_to_the_reference(policy, estimator):
    """Pitfall 14: wrong KL gradient."""
    found, ref = expected_gradient(estimator, policy, policy)
    exact = exact_gradient(policy, ref, "p to ref")
    assert exact.norm() > 0.1
    assert torch.allclose(found, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("estimator", RIGHT)
def test_they_keep_it_off_policy(policy, estimator):
    """Sampled from another distribution, the ratio puts it right."""
    sampled = torch.randn(6, generator=SIX.manual_seed(3), dtype=torch.float64)
    found, ref = expected_gradient(estimator, policy, sampled)
    assert torch.allclose(found, exact_gradient(policy, ref, "p to ref"), rtol=0, atol=1e-13)


def test_k3_goes_the_other_way_and_k1_nowhere(policy):
    """Pitfall 14: what the published form of k1 does, and the direction of plain k3."""
    found, ref = expected_gradient("k3", policy, policy)
    assert torch.allclose(found, exact_gradient(policy, ref, "ref to p"), rtol=0, atol=1e-14)
    assert (found - exact_gradient(policy, ref, "p to ref")).norm() > 0.1
    assert expected_gradient("k1_no_regularisation", policy, policy)[0].norm() < 1e-15


# ---- the loss -----------------------------------------------------------------------------------


def test_value_and_gradient_by_hand():
    """Ratios e^0.1 and e^-0.1 with A = 2, weights 0.5: L = -0.5 * 2 * (1.10517 + 0.90484), its
    gradient -weight * A * ratio, and 0 on the prompt."""
    data = [
        datum_from_prompt_completion(
            [1, 7], [2, 3], advantages=2.0, sampling_logprobs=[-1.1, -0.9], ref_logprobs=-1.0
        )
    ]
    data = [with_inputs(data[0], weights=[0.0, 0.5, 0.5])]
    result = differentiate(
        partial(grpo_loss, config=CONFIG), data, [torch.tensor([-9.0, -1.0, -1.0])]
    )
    up, down = np.exp(0.1), np.exp(-0.1)
    assert result.loss == pytest.approx(-(up + down), rel=1e-6)
    assert result.grads[0].tolist() == pytest.approx([0.0, -up, -down], rel=1e-6)
    assert result.metrics["ratio_max"] == pytest.approx(up, rel=1e-6)
    assert result.metrics["clip_fraction"] == 0.0
    assert result.metrics["logprob_gap"] == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "stops"),
    [(1.0, 0.3, True), (1.0, -0.3, False), (-1.0, 0.3, False), (-1.0, -0.3, True)],
)
def test_clipping_stops_only_what_goes_too_far(advantage, log_ratio, stops):
    data = [datum(advantages=advantage, sampling=-1.0 - log_ratio)]
    result = differentiate(partial(grpo_loss, config=CONFIG), data, [torch.tensor([-1.0, -1.0])])
    assert result.metrics["clip_fraction"] == float(stops)
    assert (result.grads[0] == 0).all() == stops


def test_kl_coef_changes_the_gradient():
    """Pitfall 15: KL dropped on a fast path; here also for a datum without advantage."""
    data = [datum(advantages=0.0, ref=-2.0)]
    logprobs = [torch.tensor([-1.0, -1.0])]
    for estimator in RIGHT:
        loss_fn = partial(grpo_loss, config=replace(CONFIG, kl_coef=0.5), kl_estimator=estimator)
        grads = differentiate(loss_fn, data, logprobs).grads
        assert grads[0].tolist() == pytest.approx([0.5, 0.5])  # kl_coef * d, d = 1


def three_data():
    """Completions of 2 and 3 tokens; log-ratios 0.1, 0.3 and -0.1, -0.2, -0.6; A = 2 and -1."""
    return [
        datum(advantages=2.0, sampling=[-1.1, -1.3], weights=0.25),
        datum(advantages=-1.0, sampling=[-0.9, -0.8, -0.4], weights=1 / 6, completion=(2, 3, 4)),
    ], [torch.full((2,), -1.0), torch.full((3,), -1.0)]


def test_sequence_ratio_is_gspo_by_hand():
    """Ratios s = e^0.2 (above 1.2: clipped, A > 0) and e^-0.3 (below 0.8: clipped, A < 0) with
    weights 1 / (2 |y|): L = -(1/2)(1.2 * 2) - (1/2)(0.8 * -1), and no gradient. Within the clip,
    the gradient of a token is -A s / (2 |y|): that of the mean over sequences of -s A."""
    data, logprobs = three_data()
    config = replace(CONFIG, ratio="sequence")
    result = differentiate(partial(grpo_loss, config=config), data, logprobs)
    assert result.loss == pytest.approx(-1.2 + 0.4, rel=1e-6)
    assert all((g == 0).all() for g in result.grads)
    assert result.metrics["clip_fraction"] == 1.0
    assert result.metrics["ratio_max"] == pytest.approx(np.exp(0.2), rel=1e-6)

    wide = replace(config, clip=(0.1, 9.0))
    result = differentiate(partial(grpo_loss, config=wide), data, logprobs)
    leaves = [lp.clone().double().requires_grad_() for lp in logprobs]
    sampled = [d.loss_fn_inputs["sampling_logprobs"].to_torch().double() for d in data]
    s = [(lp - old).mean().exp() for lp, old in zip(leaves, sampled, strict=True)]
    gspo = (s[0] * -2.0 + s[1] * 1.0) / 2
    assert result.loss == pytest.approx(gspo.item(), rel=1e-6)
    for g, e in zip(result.grads, torch.autograd.grad(gspo, leaves), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-6, atol=1e-7)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    """The gradient of -clip(ratio) A log p is -weight clip(ratio) A, clipped or not."""
    data, logprobs = three_data()
    config = replace(CONFIG, ratio="cispo")
    result = differentiate(partial(grpo_loss, config=config), data, logprobs)
    first = [-0.25 * 2.0 * r for r in (np.exp(0.1), 1.2)]
    second = [r / 6 for r in (np.exp(-0.1), np.exp(-0.2), 0.8)]
    assert result.grads[0].tolist() == pytest.approx(first, rel=1e-6)
    assert result.grads[1].tolist() == pytest.approx(second, rel=1e-6)
    assert result.metrics["clip_fraction"] == pytest.approx(2 / 5)


def test_the_forms_agree_while_every_ratio_is_1():
    """Before an update the three have the same gradient."""
    data, logprobs = three_data()
    data = [with_inputs(d, sampling_logprobs=lp) for d, lp in zip(data, logprobs, strict=True)]
    found = [
        differentiate(partial(grpo_loss, config=replace(CONFIG, ratio=form)), data, logprobs).grads
        for form in ("token", "sequence", "cispo")
    ]
    for grads in found[1:]:
        assert all(map(torch.equal, grads, found[0]))


def test_a_log_ratio_of_100_is_finite():
    """Pitfall 34: exploding importance weight."""
    for advantage in (1.0, -1.0):
        data = [datum(advantages=advantage, sampling=-101.0, ref=-1.0)]
        config = replace(CONFIG, kl_coef=0.1)
        result = differentiate(partial(grpo_loss, config=config), data, [torch.full((2,), -1.0)])
        assert np.isfinite(result.loss)
        assert torch.isfinite(result.grads[0]).all()


def test_errors_say_where():
    bare = datum_from_prompt_completion([1], [2, 3])
    with pytest.raises(DatumError, match=r'data\[1\].*"advantages"'):
        grpo_loss([datum(), bare], [torch.zeros(2)] * 2, CONFIG)
    wrongs = ({"group_size": 1}, {"kl_coef": -1.0}, {"max_tokens": 0}, {"clip": (0.2, 0.2)})
    for wrong in (*wrongs, {"temperature": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config(**wrong)


# ---- from rollouts to datums --------------------------------------------------------------------


def test_reductions_by_hand():
    """Pitfall 16: length bias. Completions of 2 and 8 tokens, max_tokens 10."""
    expected = {
        "token_mean": (1 / 10, 1 / 10),
        "sequence_mean": (1 / 4, 1 / 16),
        "constant": (1 / 20, 1 / 20),
    }
    for reduction, weights in expected.items():
        assert tuple(token_weight(reduction, n, [2, 8], 10) for n in (2, 8)) == weights
    rows, groups = [{"prompt_tokens": [1]}], [[sequence([5, 6]), sequence([4] * 8)]]
    config = replace(CONFIG, reduction="sequence_mean", max_tokens=10)
    data = build_data(rows, groups, [[1.0, 0.0]], config)
    assert [d.loss_fn_inputs["weights"].tolist() for d in data] == [[0.25] * 2, [1 / 16] * 8]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_other_completions_do_not_change_a_completions_share(reduction):
    """Pitfall 32: with as many tokens elsewhere, their layout does not matter."""
    lengths = ([2, 3, 5], [2, 4, 4])
    assert len({token_weight(reduction, 2, other, 10) for other in lengths}) == 1


def test_advantages_are_centred_within_their_group():
    rows = [{"prompt_tokens": [1, 2]}, {"prompt_tokens": [3]}]
    groups = [[sequence([5, 6]), sequence([7])], [sequence([8]), sequence([9])]]
    data = build_data(rows, groups, [[1.0, 0.0], [1.0, 1.0]], CONFIG)
    advantages = [d.loss_fn_inputs["advantages"].tolist() for d in data]
    assert advantages == [[0, 0.5, 0.5], [0, -0.5], [0], [0]]
    assert data[0].loss_fn_inputs["weights"].tolist() == pytest.approx([0, 0.2, 0.2])


def test_adam_cannot_tell_leave_one_out_from_the_group_mean():
    """Leave-one-out, reward - mean of the others, is the group mean's times G / (G - 1): Adam
    divides by the gradient's size, so only the weight of the KL term beside it differs."""
    rewards = [1.0, 0.0, 0.0, 0.5]
    others = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert others == pytest.approx([a * 4 / 3 for a in advantages(rewards)])
    steps = []
    for scale in (1.0, 4 / 3):
        p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        adam = torch.optim.AdamW([p], lr=0.1, eps=1e-12, weight_decay=0.0)
        for target in (1.0, 2.0, -0.5):
            p.grad = scale * (p.detach() - torch.tensor([target, 1.0, -target]))
            adam.step()
        steps.append(p.detach().clone())
    torch.testing.assert_close(*steps, rtol=1e-9, atol=0)


def test_leaving_out_a_group_of_equal_rewards_changes_no_policy_gradient():
    rows = [{"prompt_tokens": [1]}, {"prompt_tokens": [3]}]
    groups = [[sequence([5, 6]), sequence([7])], [sequence([8]), sequence([9])]]
    data = build_data(rows, groups, [[1.0, 0.0], [1.0, 1.0]], CONFIG)
    data = [with_inputs(d, ref_logprobs=d.loss_fn_inputs["sampling_logprobs"]) for d in data]
    logprobs = [torch.full((d.model_input.length,), -0.5) for d in data]
    loss_fn = partial(grpo_loss, config=CONFIG)
    all_four = differentiate(loss_fn, data, logprobs)
    two = differentiate(loss_fn, data[:2], logprobs[:2])
    assert all(torch.equal(g, h) for g, h in zip(all_four.grads[:2], two.grads, strict=True))
    assert all(bool((g == 0).all()) for g in all_four.grads[2:])


def test_measure_by_hand():
    """Log-ratios 0.5 and 1.5 of one completion: KL 1, entropy 1; mean reward of two groups."""
    data = [datum(sampling=[-0.5, -1.5], ref=[-1.0, -3.0])] * 4
    found = measure(data, [[1.0, 0.0], [1.0, 1.0]])
    assert found == pytest.approx({"reward": 0.75, "kl": 1.0, "entropy": 1.0})


def test_datums_hold_the_sampled_ids_and_not_the_texts():
    """Pitfall 10: these ids decode to "ab", which would be encoded otherwise."""
    data = build_data(
        [{"prompt_tokens": [1, 2]}], [[sequence([70, 71]), sequence([72])]], [[1, 0]], CONFIG
    )
    first = data[0]
    assert first.model_input.to_ints() == [1, 2, 70]
    assert first.loss_fn_inputs["target_tokens"].tolist() == [2, 70, 71]
    # Pitfall 11: nothing before the first sampled token has a weight
    assert [w > 0 for w in first.loss_fn_inputs["weights"].tolist()] == [False, True, True]
    assert first.loss_fn_inputs["sampling_logprobs"].tolist() == [0.0, -0.5, -0.5]


def test_reward_reads_the_answer_and_nothing_else():
    row = {"answer": "65"}
    assert exact_match(row, ["65", " 65\n", "650", "6 5", ""]) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_the_overlong_penalty_by_hand():
    """max_tokens 20, the last fifth: 0 up to 16 tokens, -1/4 for each one more."""
    texts = [Completion.of("", sequence([1] * n)) for n in (3, 16, 17, 18, 20)]
    assert overlong({}, texts, max_tokens=20) == [0.0, 0.0, -0.25, -0.5, -1.0]
    short = [Completion.of("", sequence([1] * n)) for n in (1, 2, 3)]
    assert overlong({}, short, max_tokens=3) == [0.0, 0.0, -1.0]


def test_rewards_are_named_with_their_weights(service):
    config = Config(rewards=("exact", "overlong=0.5"))
    found = reward_functions(service, config)
    assert {name: weight for name, (weight, _) in found.items()} == {"exact": 1.0, "overlong": 0.5}
    with pytest.raises(ConfigError, match=r'Config.rewards: unknown.*Did you mean "exact"'):
        reward_functions(service, replace(config, rewards=("exakt",)))


# ---- on a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_at_the_start_ratio_is_1_and_kl_0(service, temperature):
    """Pitfall 20, at any temperature. The ratio is the sampler's numbers against the scorer's: 1
    to float32; between two passes of the scorer it is exactly 1, and the KL exactly 0."""
    client = service.create_lora_training_client("tiny", rank=4, seed=0).result()
    reference = frozen_copy(service, client, "tiny")
    sampler = client.save_weights_and_get_sampling_client().result()
    prompts = [sampler.get_tokenizer().encode(text) for text in ("copy: red", "What is 3 + 4?")]
    groups = rollout(sampler, prompts, 4, max_tokens=6, temperature=temperature, seed=1)
    rows = [{"prompt_tokens": p} for p in prompts]
    data = build_data(rows, groups, [[1, 0, 0, 1]] * 2, CONFIG)
    data = add_ref_logprobs(reference, data)
    _, metrics = grpo_loss(data, score(client, data), CONFIG)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["logprob_gap"] < 1e-4
    scored = score(client, data)
    for d, lp in zip(data, scored, strict=True):
        assert torch.equal(lp, d.loss_fn_inputs["ref_logprobs"].to_torch())
    data = [with_inputs(d, sampling_logprobs=lp) for d, lp in zip(data, scored, strict=True)]
    for form in ("token", "sequence", "cispo"):
        metrics = grpo_loss(data, scored, replace(CONFIG, ratio=form))[1]
        assert metrics == {"ratio_max": 1.0, "clip_fraction": 0.0, "logprob_gap": 0.0}


def test_learns_holds_and_repeats(tmp_path):
    """Pitfalls 15 and 35: reward rises; a large kl_coef holds the policy at the reference; the
    same seed gives the same run."""
    histories = {}
    for name, more in {
        "free": {},
        "held": {"kl_coef": 100.0},
        "again": {"num_steps": 12, "kl_coef": 0.0},
        "twice": {"num_steps": 2, "updates_per_rollout": 2, "learning_rate": 5e-3},
    }.items():
        config = Config(
            **{"num_steps": 12, "kl_coef": 0.0, "batch_size": 8, "test_rows": 40, "eval_every": 99}
            | {"dataset": "tiny/grpo@train[:96]/test", "log_path": str(tmp_path / name)}
            | more
        )
        after = train(config)
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        histories[name] = [json.loads(line) for line in lines], after
        assert (tmp_path / name / "plot.png").stat().st_size > 10_000
    rows, after = histories["free"]
    assert after["test_reward"] > rows[0]["test_reward"] + 0.1
    assert abs(rows[0]["test_kl"]) < 1e-4
    assert max(row["logprob_gap"] for row in rows if "logprob_gap" in row) < 1e-3
    held = histories["held"][1]
    assert abs(held["test_kl"]) < 0.1 * after["test_kl"]
    timeless = [
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in history]
        for history in (rows, histories["again"][0])
    ]
    assert timeless[0] == timeless[1]
    twice = histories["twice"][0][1]
    assert twice["ratio_max"] > 1.01
    assert twice["logprob_gap"] < 1e-3  # of the first update


def test_a_reward_that_raises_leaves_the_runs_files(tmp_path, monkeypatch):
    calls = []

    def failing(row, completions):
        calls.append(row)
        if len(calls) > 30:
            raise RuntimeError("judge is down")
        return [float(i) for i in range(len(completions))]

    monkeypatch.setattr("recipes.grpo.exact_match", failing)
    sizes = {"num_steps": 9, "batch_size": 4, "test_rows": 10}
    sizes["dataset"] = "tiny/grpo@train[:40]/test"
    config = Config(**sizes, log_path=str(tmp_path / "run"))
    place = r'reward "exact" for grpo_train.jsonl:\d+, the prompt .What is .*judge is down'
    with pytest.raises(RewardError, match=place):
        train(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 1, 2, 3, 4]
    weights = tmp_path / "run" / "checkpoints" / "model-0" / "weights"
    assert {path.name for path in weights.iterdir()} == {"reference", "step-000005"}

    monkeypatch.undo()  # the reward works again: the run resumes where it stopped
    train(config, RunFlags(resume=str(tmp_path / "run")))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, *range(10)]


def test_a_constant_reward_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "recipes.grpo.exact_match", lambda row, completions: [1.0] * len(completions)
    )
    sizes = {"num_steps": 5, "batch_size": 2, "group_size": 2, "test_rows": 2, "eval_every": 9}
    sizes["dataset"] = "tiny/grpo@train[:20]/test"
    train(Config(**sizes, log_path=str(tmp_path / "run")))
    summary = (tmp_path / "run" / "summary.md").read_text(encoding="utf-8")
    assert "every completion of a prompt had the same reward at each of the 5 steps" in summary
    assert "warning: step 4: every completion of a prompt had the same reward" in (
        capsys.readouterr().out
    )
