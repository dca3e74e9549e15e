"""The doctor: healthy losses pass, and each planted defect is caught by the check it belongs to."""

from __future__ import annotations

import functools
import itertools
import math
import os
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cookbook_core import (
    align_weights,
    chat,
    check_alignment,
    clients,
    datum_from_prompt_completion,
    tinker,
    weighted_mean,
    weighted_sum,
    weighted_sums,
    with_inputs,
)
from cookbook_core.builtin_losses import BUILTIN_LOSSES, with_entropy_bonus
from cookbook_core.commands import cli
from cookbook_core.commands import doctor as doctor_command
from cookbook_core.data import load_rows
from cookbook_core.doctor import Report, examine
from cookbook_core.doctor.advantages import examine_advantages
from cookbook_core.doctor.examples import example_data
from cookbook_core.errors import ConfigError
from recipes import bradley_terry, dpo, grpo, kto, sft, token_set_kl, tool_rl

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
Loss = Callable[[Any, Any], Any]

RECIPES: dict[str, Loss] = {
    "sft": sft.sft_loss,
    **{name: partial(loss, beta=0.1) for name, loss in dpo.LOSSES.items()},
    **dpo.REFERENCE_FREE,
    "kto": partial(kto.kto_loss, beta=0.1, z0=0.2),
    "grpo": partial(grpo.grpo_loss, config=grpo.Config()),
    "bradley_terry": bradley_terry.bradley_terry_loss,
    "token_set_kl": partial(token_set_kl.token_set_kl_loss, mass_coef=0.1),
    "tool_rl": partial(tool_rl.tool_rl_loss, kl_coef=0.02),
}


def weights_of(datum: Any) -> torch.Tensor:
    return datum.loss_fn_inputs["weights"].to_torch()


def mask_of(datum: Any) -> torch.Tensor:
    return weights_of(datum) != 0


def given(datum: Any, key: str) -> torch.Tensor:
    return datum.loss_fn_inputs[key].to_torch()


# ---- healthy losses ------------------------------------------------------------------------------


def sharpen(data: Any, vocab_logprobs: Any) -> Any:
    """The README's loss over the whole vocabulary, for a batch."""
    rows = torch.cat([lp[mask_of(d)] for d, lp in zip(data, vocab_logprobs, strict=True)])
    return -(rows.exp() * rows).sum(-1).mean(), {}


def square(data: Any, logprobs: Any) -> Any:
    """The README's loss in ten lines."""
    loss = weighted_sums(data, [lp**2 for lp in logprobs]).mean()
    return loss, {"worst": min(lp.min().item() for lp in logprobs)}


def reinforce_with_baseline(data: Any, logprobs: Any) -> Any:
    """The batch's mean reward as a detached baseline; one reward per datum."""
    reward = torch.cat([given(d, "reward") for d in data])
    sums = weighted_sums(data, logprobs)
    with torch.no_grad():
        baseline = (reward * sums.softmax(0)).sum()
    return -((reward - baseline - 0.3) * sums).mean(), {"reward": reward.mean()}


def groups_of_4(data: Any, logprobs: Any) -> Any:
    """Log-softmax of the sequence logprobs within each group of four (a listwise ranking)."""
    scores = weighted_sums(data, logprobs).reshape(-1, 4)
    order = torch.tensor([0.4, 0.3, 0.2, 0.1]).to(scores)
    return -(order * scores.log_softmax(1)).sum(1).mean(), {}


class RightSlope(torch.autograd.Function):
    """x**2 by hand; its forward runs under no_grad, which must not pass for a stopped gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return grad[0] * 2 * ctx.saved_tensors[0]


def own_function(data: Any, logprobs: Any) -> Any:
    """A custom autograd function that is right."""
    squares: list[Any] = [RightSlope.apply(lp) for lp in logprobs]
    return weighted_sums(data, squares).sum(), {}


def float32_only(data: Any, logprobs: Any) -> Any:
    """torch.dot requires equal dtypes, so float64 logprobs raise; in training they are float32."""
    dots = [torch.dot(weights_of(d), lp) for d, lp in zip(data, logprobs, strict=True)]
    return -torch.stack(dots).mean(), {}


def kto_of_the_batch(data: Any, logprobs: Any) -> Any:
    """KTO, Ethayarajh et al. 2024: single examples, a detached KL of the batch."""
    reward = weighted_sums(data, logprobs) - weighted_sums(data, "ref_logprobs")
    anchor = reward.detach().mean().clamp(min=0)
    good = torch.stack([given(d, "desirable").reshape(-1)[-1] for d in data]) > 0.5
    margin = torch.where(good, reward - anchor, anchor - reward)
    return (1 - torch.sigmoid(0.1 * margin)).mean(), {}


def gspo(data: Any, logprobs: Any) -> Any:
    """Sequence-level ratios, Zheng et al. 2025; one advantage per sequence."""
    terms = []
    for d, lp in zip(data, logprobs, strict=True):
        ratio = weighted_mean(lp - given(d, "old_logprobs"), weights_of(d)).clamp(-20, 20).exp()
        advantage = given(d, "advantages").squeeze()
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    return torch.stack(terms).mean(), {"ratio": ratio}


def distil(data: Any, logprobs: Any) -> Any:
    """Squared distance to a teacher; masked by a field of another name."""
    total = torch.zeros(())
    for d, lp in zip(data, logprobs, strict=True):
        check_alignment([d], [lp], "teacher_logprobs", "completion_mask")
        total = (
            total + ((lp - given(d, "teacher_logprobs")) ** 2 * given(d, "completion_mask")).sum()
        )
    return total / len(data), {}


def worst_two(data: Any, logprobs: Any) -> Any:
    """Only the two least likely tokens of each response learn: meant, so a note."""
    picked = [
        lp[mask_of(d)].topk(2, largest=False)[0] for d, lp in zip(data, logprobs, strict=True)
    ]
    return -torch.cat(picked).mean(), {}


HEALTHY: dict[str, Loss] = {
    **RECIPES,
    **BUILTIN_LOSSES,
    **{
        f"grpo {k}": partial(grpo.grpo_loss, config=grpo.Config(kl_coef=0.5), kl_estimator=k)
        for k in ("k2", "k3_ratio", "k1_reward", "k3")
    },
    **{
        f"token_set_kl {k}": partial(token_set_kl.token_set_kl_loss, divergence=k)
        for k in ("reverse", "js")
    },
    "entropy bonus": with_entropy_bonus(sft.sft_loss, 0.01),
    **{
        f.__name__: f
        for f in (
            sharpen,
            square,
            reinforce_with_baseline,
            groups_of_4,
            own_function,
            float32_only,
            kto_of_the_batch,
            gspo,
            distil,
            worst_two,
        )
    },
}


@functools.cache
def report_on(name: str) -> Report:
    return examine(HEALTHY[name])


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_loss_has_no_defect(name: str) -> None:
    """False alarms would teach people to ignore the doctor. All checks have run to the end."""
    report = report_on(name)
    assert report.ok, str(report)
    checks = {f.check for f in report.findings}
    assert {"returns", "gradient", "weights", "order", "reduction", "finite", "sign"} <= checks
    assert str(report).endswith(("no notes", "note", "notes"))


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tinker.ServiceClient().create_lora_training_client("tiny", 1).result().get_tokenizer()


def with_ref(data: list[tinker.Datum]) -> list[tinker.Datum]:
    """ref_logprobs as `add_ref_logprobs` gives them: 0.0 where "score_mask" is 0."""
    return [
        with_inputs(d, ref_logprobs=-1.5 * given(d, "score_mask"))
        if "score_mask" in d.loss_fn_inputs
        else with_inputs(d, ref_logprobs=[-1.5] * d.model_input.length)
        for d in data
    ]


def recipe_data(name: str, tokenizer: Any) -> list[tinker.Datum]:
    """Twelve datums as the recipe itself builds them, from the bundled data."""
    pairs = load_rows("tiny/dpo", ("prompt", "chosen", "rejected"))[:6]
    if name == "sft":
        rows = load_rows("tiny/sft", ("prompt", "completion"))[:12]
        return sft.build_data(rows, tokenizer, 512, "last")[0]
    if name in dpo.LOSSES or name in dpo.REFERENCE_FREE:
        return with_ref(dpo.build_pairs(pairs, tokenizer, 512)[0])
    if name == "kto":
        return with_ref(kto.build_data(chat.labelled(2 * pairs, 0), tokenizer, 512)[0])
    if name == "bradley_terry":
        config = bradley_terry.Config()
        judge = bradley_terry.Judge(tokenizer, config.question, config.verdicts)
        return bradley_terry.build_pairs(pairs, judge, 512)[0]
    if name == "token_set_kl":
        rows = load_rows("tiny/token_set_kl", ("text", "label_probs"))[:12]
        return token_set_kl.build_data(rows, tokenizer, token_set_kl.Config(), "train")[0]
    rows = load_rows("tiny/grpo", ("prompt", "answer"))[:3]
    rows = clients.with_prompt_tokens(rows, tokenizer, 512)
    draw = random.Random(0)
    groups = [
        [
            tinker.SampledSequence(
                "stop", "s", torch.randint(5, 99, (n,)).numpy(), -torch.rand(n).numpy() - 0.1
            )
            for n in (3, 5, 4, draw.randint(3, 6))
        ]
        for _ in rows
    ]
    return with_ref(grpo.build_data(rows, groups, [[1.0, 0.0, 0.0, 1.0]] * 3, grpo.Config()))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_pass_on_the_data_they_build(name: str, tokenizer: Any) -> None:
    """Real rows through the recipe's own builder; prompts are not scored (logprobs 0.0)."""
    data = recipe_data(name, tokenizer)
    report = examine(RECIPES[name], data)
    assert report.ok, str(report)
    assert len(data) == 12
    assert f"on {len(data)} datums" in report.subject


# ---- planted defects -----------------------------------------------------------------------------

PLANTED: dict[str, tuple[Loss, str, str]] = {}


def planted(check: str, words: str) -> Callable[[Loss], Loss]:
    """Register a defective loss with the check that must name it and words of its finding."""

    def register(loss: Loss) -> Loss:
        PLANTED[loss.__name__] = (loss, check, words)
        return loss

    return register


def nll(data: Any, logprobs: Any) -> torch.Tensor:
    """Mean over datums of -sum of weighted logprobs: the healthy part of the planted losses."""
    return -weighted_sums(data, logprobs).mean()


def margins(data: Any, logprobs: Any) -> torch.Tensor:
    """DPO's margins, as they should be."""
    logratio = weighted_sums(data, logprobs) - weighted_sums(data, "ref_logprobs")
    return logratio[0::2] - logratio[1::2]


@planted("returns", "loss is not a scalar")
def per_datum_vector(data: Any, logprobs: Any) -> Any:
    return -weighted_sums(data, logprobs), {}


@planted("returns", "loss is not a tensor")
def a_float(data: Any, logprobs: Any) -> Any:
    return nll(data, logprobs).item(), {}


@planted("returns", "wrong return structure")
def no_metrics(data: Any, logprobs: Any) -> Any:
    return nll(data, logprobs)


@planted("returns", 'metrics["stage"]')
def metric_is_text(data: Any, logprobs: Any) -> Any:
    return nll(data, logprobs), {"stage": "warm-up"}


@planted("returns", 'metrics["each"]')
def metric_is_a_vector(data: Any, logprobs: Any) -> Any:
    return nll(data, logprobs), {"each": weighted_sums(data, logprobs)}


@planted("returns", 'metrics["loss"]')
def another_number_called_loss(data: Any, logprobs: Any) -> Any:
    loss = nll(data, logprobs)
    return loss, {"loss": 2 * loss.item()}


@planted("returns", "raised KeyError")
def typo_in_a_name(data: Any, logprobs: Any) -> Any:
    return logprobs[0].sum() * {"beta": 1.0}["betta"], {}


@planted("gradient", "detached")
def all_under_no_grad(data: Any, logprobs: Any) -> Any:
    with torch.no_grad():
        loss = nll(data, logprobs)
    return loss, {}


@planted("gradient", "uses no datum")
def rebuilt_from_a_number(data: Any, logprobs: Any) -> Any:
    return torch.tensor(nll(data, logprobs).item(), requires_grad=True), {}


@planted("gradient", ".item() at test_doctor.py")
def item_on_the_path(data: Any, logprobs: Any) -> Any:
    """Confidence weighting whose weight is a Python number."""
    sums = weighted_sums(data, logprobs)
    return -torch.stack([s * math.exp(s.item() / 10) for s in sums]).mean(), {}


@planted("gradient", ".tolist() at test_doctor.py")
def list_on_the_path(data: Any, logprobs: Any) -> Any:
    """Sequences weighted by their share of the batch, by way of a list."""
    sums = weighted_sums(data, logprobs)
    share = torch.tensor((sums / 10).softmax(0).tolist())
    return -(share * sums).sum(), {}


class WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return grad[0] * ctx.saved_tensors[0].sigmoid() * 2  # the 2 is wrong


@planted("gradient", "backward of custom autograd functions")
def wrong_backward(data: Any, logprobs: Any) -> Any:
    loss: Any = WrongSlope.apply(-weighted_sums(data, logprobs))
    return loss.mean(), {}


@planted("every_datum", "not used by the loss")
def forgets_the_rejected(data: Any, logprobs: Any) -> Any:
    chosen = weighted_sums(data, logprobs) - weighted_sums(data, "ref_logprobs")
    return -F.logsigmoid(0.1 * chosen[0::2]).mean(), {}


@planted("every_datum", "no gradient gets there")
def detaches_the_rejected(data: Any, logprobs: Any) -> Any:
    sums = weighted_sums(data, logprobs)
    reference = weighted_sums(data, "ref_logprobs")
    chosen, rejected = sums[0::2] - reference[0::2], sums[1::2].detach() - reference[1::2]
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean(), {}


@planted("every_datum", "not used by the loss")
def only_the_first(data: Any, logprobs: Any) -> Any:
    return -weighted_sum(logprobs[0], weights_of(data[0])), {}


@planted("off_by_one", "too late")
def rolled_mask(data: Any, logprobs: Any) -> Any:
    """Weights of tokens used as if they were those of positions."""
    pairs = zip(data, logprobs, strict=True)
    return -sum((torch.roll(weights_of(d), 1) * lp).sum() for d, lp in pairs), {}


@planted("off_by_one", "too early")
def shifted_logprobs(data: Any, logprobs: Any) -> Any:
    """The shift of logits against labels, done a second time."""
    pairs = zip(data, logprobs, strict=True)
    return -sum((weights_of(d)[1:] * lp[:-1]).sum() for d, lp in pairs), {}


@planted("off_by_one", "the first token of the response")
def slice_from_the_prompts_length(data: Any, logprobs: Any) -> Any:
    """lp[len(prompt):] where the response begins at len(prompt) - 1."""
    total = torch.zeros(())
    for d, lp in zip(data, logprobs, strict=True):
        start = int(mask_of(d).nonzero()[0]) + 1
        total = total - (weights_of(d)[start:] * lp[start:]).sum()
    return total, {}


@planted("off_by_one", "the last token of the response")
def drops_the_end_token(data: Any, logprobs: Any) -> Any:
    total = torch.zeros(())
    for d, lp in zip(data, logprobs, strict=True):
        total = total - lp[mask_of(d)][:-1].sum()
    return total, {}


@planted("weights", "gradient on prompt tokens")
def ignores_weights(data: Any, logprobs: Any) -> Any:
    return -torch.cat(list(logprobs)).mean(), {}


@planted("padding", "tokens of weight 0 before each datum change loss")
def mean_over_padding(data: Any, logprobs: Any) -> Any:
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return -(pad(list(logprobs)) * pad([weights_of(d) for d in data])).mean(), {}


@planted("padding", "sum of the weights")
def mean_over_positions(data: Any, logprobs: Any) -> Any:
    pairs = zip(data, logprobs, strict=True)
    return -torch.stack([(weights_of(d) * lp).mean() for d, lp in pairs]).mean(), {}


@planted("mutates", "logprobs[0]")
def clamps_in_place(data: Any, logprobs: Any) -> Any:
    for lp in logprobs:
        lp.clamp_(min=-1.0)
    return nll(data, logprobs), {}


@planted("mutates", 'data[0].loss_fn_inputs["weights"]')
def normalises_weights_in_place(data: Any, logprobs: Any) -> Any:
    for d in data:
        weights = d.loss_fn_inputs["weights"].to_numpy()
        weights /= weights.sum() + 1
    return nll(data, logprobs), {}


@planted("mutates", "the list data")
def pops_the_batch(data: Any, logprobs: Any) -> Any:
    loss = torch.zeros(())
    while data:
        loss = loss - weighted_sum(logprobs[len(data) - 1], weights_of(data.pop()))
    return loss, {}


@planted("deterministic", "another loss each time")
def dropout_inside(data: Any, logprobs: Any) -> Any:
    return nll(data, [F.dropout(lp, 0.1) for lp in logprobs]), {}


CALLS = itertools.count(1)


@planted("deterministic", "state kept between calls")
def warm_up_inside(data: Any, logprobs: Any) -> Any:
    return nll(data, logprobs) * min(1.0, next(CALLS) / 1000), {}


REFERENCE_SUMS = -(torch.arange(64.0) ** 1.3) % 7


@planted("order", "Side data goes on its own datum")
def closes_over_a_parallel_list(data: Any, logprobs: Any) -> Any:
    sums = weighted_sums(data, logprobs) - REFERENCE_SUMS[: len(data)]
    return -F.logsigmoid(0.1 * (sums[0::2] - sums[1::2])).mean(), {}


@planted("order", "order of the datums")
def weights_by_place(data: Any, logprobs: Any) -> Any:
    sums = weighted_sums(data, logprobs)
    return -(sums * torch.linspace(1, 2, len(sums))).mean(), {}


def lengths_of(data: Any) -> torch.Tensor:
    return torch.stack([mask_of(d).sum() for d in data])


@planted("order", "however they are grouped")
def divides_by_the_neighbours_length(data: Any, logprobs: Any) -> Any:
    """DPO per token, by the length of the datum before: a rotation of two halves hides it."""
    gaps = weighted_sums(data, logprobs) - weighted_sums(data, "ref_logprobs")
    gaps = gaps / lengths_of(data).roll(1)
    return -F.logsigmoid(0.1 * (gaps[0::2] - gaps[1::2])).mean(), {}


@planted("order", "however they are grouped")
def divides_by_a_length_far_away(data: Any, logprobs: Any) -> Any:
    """The same by the datum half a batch away, which two halves that change places keep."""
    sums = weighted_sums(data, logprobs) / lengths_of(data).roll(len(data) // 2)
    return -sums.mean(), {}


@planted("order", "however they are grouped")
def weighted_by_both_neighbours(data: Any, logprobs: Any) -> Any:
    """Neighbours round a ring: neither a rotation nor the reverse order changes who they are."""
    n = lengths_of(data).double()
    return -(weighted_sums(data, logprobs) * (n.roll(1) + n.roll(-1))).mean(), {}


@planted("reduction", "two copies of a batch get different gradients")
def at_most_sixteen(data: Any, logprobs: Any) -> Any:
    """A micro-batch size somebody wrote into the loss."""
    return nll(data[:16], logprobs[:16]), {}


@planted("reduction", "fails on a batch of another size")
def eight_pairs_only(data: Any, logprobs: Any) -> Any:
    scale = torch.ones(8) / 8
    return -(F.logsigmoid(0.1 * margins(data, logprobs)) * scale).sum(), {}


@planted("reduction", "docstring says mean")
def sum_called_mean(data: Any, logprobs: Any) -> Any:
    """DPO.

    Returns:
        loss: 0-d, nats; sum over tokens, mean over pairs.
        metrics: none.
    """
    return -F.logsigmoid(0.1 * margins(data, logprobs)).sum(), {}


@planted("reduction", "docstring says sum")
def mean_called_sum(data: Any, logprobs: Any) -> Any:
    """The sum over sequences of -log p."""
    return nll(data, logprobs), {}


@planted("alignment", 'loss_fn_inputs["ref_logprobs"]')
def zip_cuts_the_reference(data: Any, logprobs: Any) -> Any:
    total = []
    for d, lp in zip(data, logprobs, strict=True):
        terms = [
            w * (a - b)
            for w, a, b in zip(weights_of(d), lp, given(d, "ref_logprobs"))  # noqa: B905
        ]
        total.append(torch.stack(terms).sum())
    sums = torch.stack(total)
    return -F.logsigmoid(0.1 * (sums[0::2] - sums[1::2])).mean(), {}


@planted("alignment", 'loss_fn_inputs["advantages"]')
def min_length_cuts_advantages(data: Any, logprobs: Any) -> Any:
    """The guides' cut to the shorter of two."""
    total = torch.zeros(())
    for d, lp in zip(data, logprobs, strict=True):
        lp, advantages = align_weights(
            lp, given(d, "advantages"), "min_length", allow_dropped_weights=True
        )
        total = total - (lp * advantages).sum()
    return total, {}


@planted("finite", "where tokens are very unlikely")
def log_of_sigmoid(data: Any, logprobs: Any) -> Any:
    return -torch.log(torch.sigmoid(0.1 * margins(data, logprobs))).mean(), {}


@planted("finite", "certain (logprob 0)")
def unlikelihood_at_one(data: Any, logprobs: Any) -> Any:
    return -weighted_sums(data, [torch.log(1 - lp.exp()) for lp in logprobs]).mean(), {}


@planted("finite", "where ref_logprobs equal the policy's")
def root_at_the_reference(data: Any, logprobs: Any) -> Any:
    """A distance: its slope at 0 is infinite, and every run starts at 0."""
    gaps = [(lp - given(d, "ref_logprobs")) ** 2 for d, lp in zip(data, logprobs, strict=True)]
    return nll(data, logprobs) + weighted_sums(data, gaps).sqrt().mean(), {}


@planted("finite", "Clamp the log-ratio")
def ratio_without_a_clamp(data: Any, logprobs: Any) -> Any:
    total = torch.zeros(())
    for d, lp in zip(data, logprobs, strict=True):
        ratio = (lp - given(d, "sampling_logprobs")).exp()
        total = total - (ratio * given(d, "advantages") * weights_of(d)).sum()
    return total, {}


@planted("finite", "standard deviation")
def advantages_over_their_deviation(data: Any, logprobs: Any) -> Any:
    """A group whose rewards are all equal divides 0 by 0."""
    total = torch.zeros(())
    per_token = [given(d, "advantages") for d in data]
    advantages = weighted_sums(data, per_token) / torch.stack([mask_of(d).sum() for d in data])
    advantages = (advantages - advantages.mean()) / advantages.std()
    for a, s in zip(advantages, weighted_sums(data, logprobs), strict=True):
        total = total - a * s
    return total, {}


@planted("finite", "very unlikely")
def half_precision(data: Any, logprobs: Any) -> Any:
    """exp in float16 is inf from 11.1 on."""
    perplexities = [(-weighted_mean(lp, weights_of(d))) for d, lp in zip(data, logprobs)]  # noqa: B905
    return torch.stack(perplexities).half().exp().mean().to(logprobs[0].dtype), {}


@planted("sign", "the rejected likelier")
def pair_turned_round(data: Any, logprobs: Any) -> Any:
    return -F.logsigmoid(-0.1 * margins(data, logprobs)).mean(), {}


@planted("sign", "good answers less likely or bad ones likelier")
def thumbs_turned_round(data: Any, logprobs: Any) -> Any:
    return -kto.kto_loss(data, logprobs, beta=0.1)[0], {}


@planted("sign", "good answers less likely or bad ones likelier")
def every_thumb_up(data: Any, logprobs: Any) -> Any:
    reward = weighted_sums(data, logprobs) - weighted_sums(data, "ref_logprobs")
    weighted_sums(data, "desirable")
    return (1 - torch.sigmoid(0.1 * reward)).mean(), {}


@planted("sign", "A minus sign is missing")
def lost_minus(data: Any, logprobs: Any) -> Any:
    return weighted_sums(data, logprobs).mean(), {}


@planted("sign", "positive advantage less likely")
def rewards_descended(data: Any, logprobs: Any) -> Any:
    total = torch.zeros(())
    for d, lp in zip(data, logprobs, strict=True):
        ratio = (lp - given(d, "sampling_logprobs")).clamp(-20, 20).exp()
        total = total + (ratio * given(d, "advantages") * weights_of(d)).sum()
    return total, {}


@planted("step_0", "swapping the pairs changes the loss")
def rpo_with_the_reference_added(data: Any, logprobs: Any) -> Any:
    """A further term on the chosen does not excuse the reference's sign."""
    policy = weighted_sums(data, logprobs)
    added = policy + weighted_sums(data, "ref_logprobs")
    loss = -F.logsigmoid(0.1 * (added[0::2] - added[1::2])).mean()
    return loss - 0.1 * policy[0::2].mean(), {}


@planted("step_0", "swapping the pairs changes the loss")
def reference_with_the_wrong_sign(data: Any, logprobs: Any) -> Any:
    sums = weighted_sums(data, logprobs) + weighted_sums(data, "ref_logprobs")
    return -F.logsigmoid(0.1 * (sums[0::2] - sums[1::2])).mean(), {}


@planted("step_0", 'metrics["reward_margin"]')
def margin_without_reference(data: Any, logprobs: Any) -> Any:
    """The loss is right; the metric people steer by is not."""
    sums = weighted_sums(data, logprobs)
    loss = -F.logsigmoid(0.1 * margins(data, logprobs)).mean()
    return loss, {"reward_margin": 0.1 * (sums[0::2] - sums[1::2]).mean().item()}


@planted("step_0", 'metrics["ratio"]')
def ratio_to_the_reference_over_prompts(data: Any, logprobs: Any) -> Any:
    """exp(sum / N) of a sum that lacks the sampler's side."""
    loss, _ = grpo.grpo_loss(data, logprobs, grpo.Config(kl_coef=0.0))
    return loss, {"ratio": torch.cat(list(logprobs)).mean().exp()}


def grpo_with_kl(term: Callable[[Any, Any], Any]) -> Loss:
    """The recipe's policy term plus 0.1 * sum of weighted term(logprobs, ref_logprobs)."""

    def loss(data: Any, logprobs: Any) -> Any:
        policy, _ = grpo.grpo_loss(data, logprobs, grpo.Config(kl_coef=0.0))
        pairs = zip(data, logprobs, strict=True)
        terms = [term(lp, given(d, "ref_logprobs")) for d, lp in pairs]
        return policy + 0.1 * weighted_sums(data, terms).sum(), {}

    return loss


PLANTED["k1_in_the_loss"] = (grpo_with_kl(lambda lp, ref: lp - ref), "kl", "regularises nothing")
PLANTED["kl_with_a_minus"] = (
    grpo_with_kl(lambda lp, ref: -((lp - ref) ** 2) / 2),
    "kl",
    "away from the reference",
)
PLANTED["kl_detached"] = (
    grpo_with_kl(lambda lp, ref: (lp.detach() - ref) ** 2 / 2),
    "kl",
    "never its gradient",
)
PLANTED["k1_reward_without_its_ratio"] = (
    grpo_with_kl(lambda lp, ref: (lp - ref).detach()),
    "kl",
    "never its gradient",
)


# Mistakes that are rightly seen from a second side.
BESIDES = {"half_precision": {"gradient"}}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_defect_is_named_and_no_other(name: str) -> None:
    """The right check finds it and says where, what is expected, and what it got or how to fix it
    (an exception of the loss has only a place); no other check finds a defect."""
    loss, check, words = PLANTED[name]
    report = examine(loss)
    named = [f for f in report.defects if f.check == check]
    assert any(words in " ".join(str(f).split()) for f in named), str(report)
    assert all(f.where and ((f.expected and (f.got or f.fix)) or "raised" in f.what) for f in named)
    others = {f.check for f in report.defects} - {check}
    assert others == BESIDES.get(name, set()), str(report)


def test_two_mistakes_are_two_findings() -> None:
    """An overflow does not hide a KL term that holds nothing."""

    def both(data: Any, logprobs: Any) -> Any:
        loss, _ = ratio_without_a_clamp(data, logprobs)
        gaps = [lp - given(d, "ref_logprobs") for d, lp in zip(data, logprobs, strict=True)]
        return loss + 0.1 * weighted_sums(data, gaps).sum(), {}

    assert {f.check for f in examine(both).defects} == {"finite", "kl"}


def test_an_input_of_unknown_kind_is_reported_as_missing() -> None:
    def odd(data: Any, logprobs: Any) -> Any:
        return nll(data, logprobs) * data[0].loss_fn_inputs["annotator_shares"].shares, {}

    report = examine(odd)
    assert [f.check for f in report.defects] == ["returns"]
    assert "examine(loss_fn, data) takes yours" in words_of(report, "data")


@pytest.mark.parametrize(
    ("loss", "check", "words"),
    [
        (divides_by_the_neighbours_length, "sign", "neither pairs nor advantages"),
        (no_metrics, "returns", "the other checks need a loss that passes this one"),
        (only_the_first, "order", "not checked: fix every_datum first"),
        (only_the_first, "reduction", "not checked: fix every_datum first"),
        (mean_over_positions, "reduction", "times the loss"),
        (RECIPES["token_set_kl"], "sign", "not checked: several candidates"),
    ],
)
def test_a_check_that_cannot_be_made_says_so(loss: Loss, check: str, words: str) -> None:
    notes = [f.what for f in examine(loss).findings if f.check == check and f.status != "defect"]
    assert any(words in what for what in notes), notes


def test_at_least_fifteen_kinds_are_planted() -> None:
    assert len(PLANTED) >= 45
    assert len({check for _, check, _ in PLANTED.values()}) == 15


# ---- findings on healthy losses ------------------------------------------------------------------


def words_of(report: Report, check: str) -> str:
    return " | ".join(f.what for f in report.findings if f.check == check)


@pytest.mark.parametrize(
    ("name", "check", "words"),
    [
        ("dpo", "order", "order of whole pairs"),
        ("sft", "order", "order of datums"),
        ("groups_of_4", "order", "whole groups of 4"),
        ("dpo", "reduction", "a mean over the batch"),
        ("dpo", "reduction", "a sum over tokens"),
        ("sft", "reduction", "count alike whatever their length"),
        ("cross_entropy", "reduction", "a sum over the batch: given twice, 2 times the loss"),
        ("entropy bonus", "reduction", "neither a sum nor a mean over the batch"),
        ("dpo", "step_0", "the loss is ln 2, reward_margin 0, margin 0"),
        ("ipo", "step_0", "the loss is 25, reward_margin 0, margin 0"),
        ("rpo", "step_0", "apart from a term of the policy alone margin 0"),
        ("grpo", "step_0", "ratio_max 1"),
        ("dpo", "sign", "lifts chosen over rejected"),
        ("grpo", "sign", "positive advantage"),
        ("dpo", "weights", "75 of 75 weighted tokens, 0 of 30 prompt tokens, 0 of 6 other"),
        ("cispo", "gradient", ".detach() or no_grad"),
        ("reinforce_with_baseline", "gradient", ".detach() or no_grad"),
        ("float32_only", "gradient", "float32 logprobs alone"),
        ("worst_two", "weights", "gradient on 32 of 75 weighted tokens, 0 of 30 prompt tokens"),
        ("kto", "sign", "lifts good answers and lowers bad ones"),
        ("kto", "step_0", "the loss is 0.5"),
        ("grpo k2", "kl", "behaves like k2: its expected gradient is that of KL(policy || ref)"),
        ("grpo k3_ratio", "kl", "behaves like ratio-weighted k3"),
        ("grpo k1_reward", "kl", "behaves like k1 as a reward penalty"),
        ("grpo k3", "kl", "behaves like k3: its expected gradient is that of KL(ref || policy)"),
    ],
)
def test_findings_on_a_healthy_loss(name: str, check: str, words: str) -> None:
    assert words in words_of(report_on(name), check)


def test_a_metric_that_is_not_finite_is_noted() -> None:
    report = examine(lambda data, logprobs: (nll(data, logprobs), {"spread": math.nan}))
    assert report.ok
    assert "not finite: metric spread" in words_of(report, "returns")


def test_a_right_custom_function_is_not_taken_for_a_stopped_gradient() -> None:
    """Its forward runs with gradients off; only the user's own no_grad counts."""
    report = report_on("own_function")
    assert [f.status for f in report.findings if f.check == "gradient"] == ["ok"]


def test_kl_estimators_are_told_apart_at_any_scale_and_reduction() -> None:
    """The KL part is found under a policy term and whatever its coefficient."""
    for coef in (1e-3, 10.0):
        for estimator, words in (("k2", "like k2"), ("k1_no_regularisation", "like k1")):
            config = grpo.Config(kl_coef=coef)
            report = examine(partial(grpo.grpo_loss, config=config, kl_estimator=estimator))
            assert words in words_of(report, "kl")
            assert report.ok == (estimator == "k2")
    off = examine(partial(grpo.grpo_loss, config=grpo.Config(kl_coef=0.0)))
    assert "does not enter the loss" in words_of(off, "kl")


# ---- advantages ----------------------------------------------------------------------------------


def centred(rewards: list[float]) -> list[float]:
    return [r - sum(rewards) / len(rewards) for r in rewards]


def standardised(rewards: list[float]) -> list[float]:
    std = (sum(c * c for c in centred(rewards)) / len(rewards)) ** 0.5
    return [c / std if std else 0.0 for c in centred(rewards)]


def nan_where_equal(rewards: list[float]) -> list[float]:
    x = torch.tensor(rewards)
    return ((x - x.mean()) / x.std()).tolist()


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (lambda rewards: [-c for c in centred(rewards)], "a higher advantage for a higher reward"),
        (nan_where_equal, r"\[1.0, 1.0, 1.0, 1.0\].*got \[nan, nan, nan, nan\].*deviation is 0"),
        (lambda rewards: centred(rewards)[1:], "4 finite numbers"),
        (lambda rewards: sorted(centred(rewards)), "a higher advantage for a higher reward"),
        (lambda rewards: [r + i / 99 for i, r in enumerate(rewards)], "the order of the"),
        (lambda rewards: 1 / 0, "raised for rewards.*ZeroDivisionError"),
    ],
)
def test_a_wrong_advantage_estimator_is_a_defect(estimator: Any, words: str) -> None:
    (found,) = examine_advantages(estimator)
    assert found.status == "defect"
    assert re.search(words, " ".join(str(found).split()))


def test_right_ones_pass_and_uncentred_ones_get_notes() -> None:
    for estimator in (centred, standardised, grpo.advantages):
        assert [f.status for f in examine_advantages(estimator)] == ["ok"]
    assert [f.status for f in examine_advantages(list)] == ["ok", "note", "note"]


# ---- data ----------------------------------------------------------------------------------------


def pairs_with_ref() -> list[tinker.Datum]:
    return [
        datum_from_prompt_completion([1, 2], tokens, ref_logprobs=[-1.0] * len(tokens))
        for tokens in ([3, 4, 5], [6, 4, 5], [3, 4, 5, 6], [7, 8, 9])
    ]


def test_misaligned_data_is_found_before_the_loss_runs() -> None:
    """Datum index, field and both lengths; all bad datums, not the first alone."""
    data = pairs_with_ref()
    data[1] = with_inputs(data[1], ref_logprobs=[-1.0] * 3)
    data[3] = with_inputs(data[3], ref_logprobs=[-1.0] * 5)
    report = examine(RECIPES["dpo"], data)
    defects = [(f.check, f.where, f.expected, f.got) for f in report.defects]
    assert defects == [
        ("alignment", 'data[1].loss_fn_inputs["ref_logprobs"]', "4", "3"),
        ("alignment", 'data[3].loss_fn_inputs["ref_logprobs"]', "4", "5"),
    ]


def test_one_pair_is_enough_to_see_a_pair() -> None:
    report = examine(RECIPES["dpo"], pairs_with_ref()[:2])
    assert report.ok, str(report)
    assert "whole pairs" in words_of(report, "order")


def test_datums_without_advantage_are_not_called_unused() -> None:
    """A group of equal rewards has no gradient, and that is right."""
    data = example_data(BUILTIN_LOSSES["ppo"])[0]
    zero = torch.zeros(data[0].model_input.length)
    data[0] = with_inputs(data[0], advantages=zero)
    report = examine(BUILTIN_LOSSES["ppo"], data)
    assert report.ok, str(report)
    assert "1 without weight or advantage apart" in words_of(report, "every_datum")


def test_given_logprobs_are_used_and_left_alone() -> None:
    data = pairs_with_ref()
    logprobs = [torch.full((d.model_input.length,), -1.0) for d in data]
    report = examine(RECIPES["dpo"], data, logprobs)
    assert "a 0-d loss (0.6931)" in words_of(report, "returns")
    assert all(bool((lp == -1).all()) for lp in logprobs)


def test_data_that_a_client_would_refuse_is_a_finding() -> None:
    """Every bad datum, in the words of the client."""
    data = pairs_with_ref()
    data[0] = with_inputs(data[0], weights=[1.0] * 3)
    data[2] = with_inputs(data[2], weights=[float("nan")] * 5)
    defects = [(f.check, f.where, f.got) for f in examine(RECIPES["dpo"], data).defects]
    assert defects == [
        ("data", 'data[0].loss_fn_inputs["weights"]', "(3,)"),
        ("data", 'data[2].loss_fn_inputs["weights"][0]', "nan"),
    ]
    assert [f.where for f in examine(RECIPES["dpo"], []).defects] == ["data"]
    short = [torch.full((3,), -1.0)] * 4
    wrong = [f.where for f in examine(RECIPES["dpo"], pairs_with_ref(), short).defects]
    assert wrong == ["logprobs[0]", "logprobs[1]", "logprobs[2]", "logprobs[3]"]


def test_what_cannot_be_examined_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss_fn: not a function"):
        examine("dpo", pairs_with_ref())  # pyright: ignore[reportArgumentType]
    huge = [datum_from_prompt_completion([1], [10**8])]
    with pytest.raises(ConfigError, match=r"data: too large.*fewer or shorter"):
        examine(sharpen, huge, loss_type_input="vocab_logprobs")


def test_example_data_has_the_inputs_that_the_loss_reads() -> None:
    """Unequal lengths; the first pair differs in one token, the first of the response; a weight 0
    within or behind some completions; (N,) for tokens, (N, K) for a token set."""
    data, form = example_data(RECIPES["dpo"])
    assert form == "logprobs"
    assert set(data[0].loss_fn_inputs) == {"target_tokens", "weights", "ref_logprobs"}
    first, second = (given(d, "target_tokens") for d in data[:2])
    assert (first != second).nonzero()[:, 0].tolist() == [int(mask_of(data[0]).nonzero()[0])]
    assert len({d.model_input.length for d in data}) > 3
    assert any(0.0 in weights_of(d)[mask_of(d).nonzero()[0] :].tolist() for d in data)
    sets = example_data(RECIPES["token_set_kl"])[0]
    assert given(sets[0], "target_tokens").shape[1:] == given(sets[0], "target_probs").shape
    assert example_data(sharpen)[1] == "vocab_logprobs"


def test_importing_the_core_does_not_import_the_doctor() -> None:
    code = "import sys, cookbook_core; print('cookbook_core.doctor' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# ---- command line --------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    return cli.main(["doctor", *words])


COMMANDS = {
    "recipes/sft.py:sft_loss": 0,
    "recipes/dpo.py:dpo_loss": 0,
    "recipes.dpo:dpo_loss": 0,
    "recipes.dpo": 0,
    "recipes/dpo.py --beta 0.5": 0,
    "recipes/dpo.py --loss rpo": 0,
    "recipes/kto.py --undesirable_weight 1.3": 0,
    "recipes/distill.py:exact_loss --divergence jensen_shannon": 0,
    "recipes/distill.py:top_k_loss": 0,
    "recipes/distill.py:sampled_loss --divergence reverse": 0,
    "recipes/grpo.py:grpo_loss": 0,
    "recipes/grpo.py --ratio sequence": 0,
    "recipes/grpo.py --ratio cispo": 0,
    "recipes/grpo.py --kl_estimator k1_no_regularisation": 1,
    "recipes/grpo.py --group_size=6 --clip=(0.9,1.3)": 0,
    "recipes/bradley_terry.py:bradley_terry_loss": 0,
    "recipes/token_set_kl.py:token_set_kl_loss": 0,
    "recipes/token_set_kl.py --divergence js": 0,
}
MISTAKES = {
    "recipes/dpo.py:dpo_los": 'Did you mean "dpo_loss"',
    "recipes/dpo.py --bta 0.1": '--bta: dpo_loss has no such argument. Did you mean "beta"',
    "recipes/dpo.py --beta": "--beta: missing value. Give --beta VALUE.",
    "recipes/dpo.py --beta --seed 1": "--beta: missing value",
    "recipes/dpo.py --beta 1 false": "false: not a flag",
    "recipes/dpo.py --beta -1": "Config.beta: out of range",
    "recipes/none.py:x": "recipes/none.py: cannot be imported",
    "recipes.none:x": "recipes.none: cannot be imported",
    "cookbook_core.runs": "cookbook_core.runs: not one function called NAME_loss",
}


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize("command", COMMANDS)
def test_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == COMMANDS[command]
    assert ("no defects" in capsys.readouterr().out) == (COMMANDS[command] == 0)


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistaken_command_exits_with_2_and_says_why(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert MISTAKES[command] in capsys.readouterr().err


@pytest.mark.usefixtures("at_root")
def test_the_readme_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """recipes/README.md quotes a command and the end of its output."""
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(
        r"    cookbook doctor (.*)\n((?:    \S.*\n|     +.*\n)*)",
        text,
    )
    shown = {command: textwrap.dedent(output) for command, output in quoted}
    assert "my_dpo.py:dpo_loss" in shown
    command = "recipes/grpo.py:grpo_loss --kl_estimator k1_no_regularisation"
    assert main(command.split()) == 1
    assert capsys.readouterr().out.endswith(shown[command])
    assert len(shown[command].splitlines()) == 5


def test_a_copied_and_broken_recipe_from_another_folder(tmp_path: Path) -> None:
    """The way people work: cp recipes/dpo.py my_dpo.py, change the loss, ask the doctor."""
    text = (ROOT / "recipes" / "dpo.py").read_text(encoding="utf-8")
    (tmp_path / "helper.py").write_text("HALF = 0.5\n", encoding="utf-8")
    broken = text.replace("return values[0::2] - ", "return HALF * 2 * values[0::2] - 0 * ")
    broken = broken.replace("import torch\n", "import torch\nfrom helper import HALF\n", 1)
    assert broken != text
    (tmp_path / "my_dpo.py").write_text(broken, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "cookbook_core.commands.cli", "doctor", "my_dpo.py:dpo_loss"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "defect  every_datum" in done.stdout
    assert "data[1], data[3], data[5]" in done.stdout


@pytest.mark.usefixtures("at_root")
def test_an_argument_without_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without a Config; the flag supplies what is missing."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from cookbook_core import weighted_sums\n\n\n"
        "def my_loss(data, logprobs, scale):\n"
        "    return -scale * weighted_sums(data, logprobs).mean(), {}\n",
        encoding="utf-8",
    )
    assert main([f"{file}:my_loss"]) == 2
    assert "my_loss(scale): missing value" in capsys.readouterr().err
    assert main([str(file), "--scale", "2"]) == 0


@pytest.mark.usefixtures("at_root")
def test_a_config_by_annotation_and_a_whole_vocabulary(tmp_path: Path) -> None:
    """Arguments come from the file's Config, by its type or field by field; a second parameter
    called *vocab* is given the whole vocabulary's logprobs."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    coef: float = 0.5\n\n\n"
        "def my_loss(data, vocab_logprobs, settings: Config, coef):\n"
        "    assert settings.coef == coef and vocab_logprobs[0].shape[1] > 9\n"
        "    loss = 0.0\n"
        "    for d, lp in zip(data, vocab_logprobs, strict=True):\n"
        "        rows = lp[d.loss_fn_inputs['weights'].to_torch() != 0]\n"
        "        loss = loss - coef * (rows.exp() * rows).sum()\n"
        "    return loss, {'coef': coef}\n",
        encoding="utf-8",
    )
    assert main([str(file)]) == 0
    assert main([f"{file}:my_loss", "--coef", "2.0"]) == 0
    assert main([f"{file}:my_loss", "--loss_type_input", "logprobs"]) == 1


def test_help_explains_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 no defect, 1 a defect, 2 the command is mistaken" in shown


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("", False),
        ("--plain", True),
        ("--plain --scale 2", True),
        ("--plain true", True),
        ("--plain True --scale 2", True),
        ("--plain=true", True),
        ("--plain false", False),
        ("--plain --no_plain", False),
        ("--no-plain", False),
        ("--bare", "bare"),
        ("--no_keep", "dropped"),
        ("--fast true", "fast"),
    ],
)
def test_boolean_flags(
    flags: str, value: bool | str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a recipe takes them: --flag, --no_flag, and --flag with true or false, in any case; for
    an argument with a boolean default or annotation and for a field of Config."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from cookbook_core import weighted_sums\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    plain: bool = False\n\n\n"
        "def my_loss(data, logprobs, plain, bare=False, keep=True, fast: bool = False, scale=1):\n"
        "    names = ['bare'] * bare + ['dropped'] * (not keep) + ['fast'] * fast\n"
        "    assert all(type(flag) is bool for flag in (plain, bare, keep, fast))\n"
        "    loss = -scale * weighted_sums(data, logprobs).mean()\n"
        "    return loss, {name: 1.0 for name in names or [f'plain_is_{plain}']}\n",
        encoding="utf-8",
    )
    name = value if isinstance(value, str) else f"plain_is_{value}"
    module_loss, module = doctor_command.load(str(file))
    words = flags.split()
    parsed = doctor_command.parse_flags(words, doctor_command.booleans(module_loss, module))
    loss_fn, _ = doctor_command.bind(module_loss, module, parsed)
    data = example_data(loss_fn)[0]
    logprobs = [torch.full((d.model_input.length,), -1.0) for d in data]
    assert set(loss_fn(data, logprobs)[1]) == {name}
    assert main([str(file), *words]) == 0
    assert "no defects" in capsys.readouterr().out


def simpo_with_the_reference_read(data: Any, logprobs: Any) -> Any:
    """SimPO as it comes out of DPO, with the reference's line left in."""
    weighted_sums(data, "ref_logprobs")
    return dpo.simpo_loss(data, logprobs)


def test_a_reference_without_effect_is_a_note() -> None:
    report = examine(simpo_with_the_reference_read)
    assert report.ok, str(report)
    notes = [f.what for f in report.findings if f.check == "step_0"]
    assert notes == ["ref_logprobs is read but without effect (a loss without reference?)"]
    assert "step_0" in {f.check for f in examine(RECIPES["dpo"]).findings if f.status == "ok"}


OWN_DATA = """
from cookbook_core import datum_from_prompt_completion, weighted_sums, with_inputs
def table_loss(data, logprobs):
    table = [d.loss_fn_inputs["table"].to_torch()[2] for d in data]  # (3,), not one per token
    return -sum(t * s for t, s in zip(table, weighted_sums(data, logprobs))) / len(data), {}
def example_data():
    return [
        with_inputs(datum_from_prompt_completion([1], [2, 3 + i]), table=[1.0, 2.0, 3.0 + i])
        for i in range(4)
    ]
"""


def test_a_file_can_bring_its_own_example_data(tmp_path: Path, capsys: Any) -> None:
    """An input whose shape no name tells: examined on the file's datums, not on made ones."""
    file = tmp_path / "mine.py"
    file.write_text(OWN_DATA, encoding="utf-8")
    assert main([str(file)]) == 0
    assert "table_loss on 4 datums; it reads table" in capsys.readouterr().out
    named = OWN_DATA.replace("example_data():", "example_data(loss):")
    file.write_text(named.replace("range(4)", "range(len(loss))"), encoding="utf-8")
    assert main([str(file)]) == 0
    assert "table_loss on 10 datums; it reads table" in capsys.readouterr().out
    file.write_text(OWN_DATA.replace("range(4)", "rang(4)"), encoding="utf-8")
    assert main([str(file)]) == 2
    error = capsys.readouterr().err
    assert "example_data(): failed" in error
    assert "name 'rang' is not defined" in error


def test_a_flag_that_config_lacks_is_a_note_after_a_pass(tmp_path: Path, capsys: Any) -> None:
    text = (Path(dpo.__file__)).read_text(encoding="utf-8")
    text = text.replace("*, beta: float)", "*, beta: float, gamma: float = 0.0)")
    copy = tmp_path / "my_dpo.py"
    copy.write_text(text, encoding="utf-8")
    assert main([f"{copy}:dpo_loss", "--gamma", "0.5"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "note config gamma: no field of Config yet. Add it there" in shown
    assert main([f"{copy}:dpo_loss", "--beta", "0.2"]) == 0
    assert "no field of Config" not in capsys.readouterr().out
