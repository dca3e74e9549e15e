"""Section 1: logprobs, gradients, attention, sampling and checkpoints against slow references."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.card import Card, changed
from benchmarks.gpu.decode import gap, sample
from benchmarks.gpu.models import (
    SECONDS,
    TOY,
    Side,
    connect,
    datum,
    families,
    qwen3,
    sequences,
    squared,
)
from benchmarks.gpu.report import Report
from cookbook_core import tinker
from cookbook_core.backend.local.scoring import attention, packing
from cookbook_core.tinker import Datum, ModelInput

ROUGH = {"initializer_range": 0.1}


def correct(report: Report, card: Card) -> None:
    small, windowed = (256, 512, 2, 16, 8, 128, 4096, True), (256, 512, 2, 4, 2, 64, 4096, False)
    models = {
        "qwen3": qwen3(card.pick(small, TOY), **ROUGH),
        "tiny": "tiny",
        "mistral": qwen3(card.pick(windowed, TOY), card.pick(64, 8), **ROUGH),
    }
    with dynamo_complaints() as complaints:
        for name, config in models.items():
            with report.attempt(f"{name} against float64"):
                against_float64(report, card, name, config)
        for layers in card.pick((28, 36), (2,)):
            with report.attempt(f"packing in bfloat16, {layers} layers"):
                deep(report, card, layers)
        for dtype in ("float32", "bfloat16"):
            with report.attempt(f"sampling in {dtype}"):
                sampling(report, card, dtype)
        kernels(report, card)
    report.check("no complaint of torch.compile", not complaints, "; ".join(complaints)[:300])
    for name, how in chosen_kernels():
        report.note(f"{name}: {how}")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    report.number("graphs compiled by dynamo", graphs, "")


@contextlib.contextmanager
def dynamo_complaints() -> Iterator[list[str]]:
    """Collect warnings that flex attention runs uncompiled or that graphs ran out."""
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "recompile_limit" in record.getMessage():
                found.append(record.getMessage().splitlines()[0])

    listener = Listener(logging.WARNING)
    logging.getLogger("torch._dynamo").addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
        found += [t for w in caught if "without torch.compile" in (t := str(w.message))]
    finally:
        logging.getLogger("torch._dynamo").removeHandler(listener)


# ---- scoring -------------------------------------------------------------------------------------


def mixed(vocab: int, toy: bool) -> list[Datum]:
    """Shared prefixes, a datum of one token, K = 3 targets, positions that are not scored."""
    long = 12 if toy else 200
    lists = families(3, 3, 20 if toy else 90, 6 if toy else 40, vocab)
    lists += sequences(1, long, vocab, seed=3) + sequences(1, 1, vocab, seed=4)
    lists += [lists[0], lists[0][:30]]
    data = [datum(ids) for ids in lists]
    ids = lists[1]
    targets = torch.randint(vocab, (len(ids), 3), generator=torch.Generator().manual_seed(0))
    inputs = {"target_tokens": targets, "weights": torch.ones(len(ids), 3)}
    data.append(Datum(ModelInput.from_ints(ids), inputs))
    mask = (torch.arange(len(ids)) >= len(ids) // 2).long()
    data.append(Datum(ModelInput.from_ints(ids), {**datum(ids).loss_fn_inputs, "score_mask": mask}))
    return data


def backward(side: Side, data: list[Datum]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs, computed with a graph, and the gradient of `squared`."""
    output = side.client.forward_backward_custom(data, squared).result(SECONDS)
    logprobs = torch.cat([o["logprobs"].to_torch().flatten() for o in output.loss_fn_outputs])
    return logprobs.double(), side.gradient()


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error by norms."""
    return float((found - want).norm() / want.norm())


def against_float64(report: Report, card: Card, name: str, config: Any) -> None:
    how = {"made_on": "cpu", "rank": 8, "rough": True}
    with connect(card, config, "float64", device="cpu", **how) as side:
        data = mixed(side.engine.base.vocab_size, card.smoke)
        want, want_gradient = backward(side, data)
        alone = side.score(data[-3:-2])
    for dtype, bound, gradient_bound in (("float32", 1e-4, 1e-4), ("bfloat16", 0.05, 0.2)):
        with connect(card, config, dtype, **how) as side:
            report.check(f"{name} {dtype}: rows are packed", side.engine.scorer.packs)
            logprobs, gradient = backward(side, data)
            worst = float((logprobs - want).abs().max() / want.abs().max())
            report.at_most(f"{name} {dtype}: logprobs, largest error / largest", worst, bound)
            off = error(gradient, want_gradient)
            report.at_most(f"{name} {dtype}: gradient, relative error", off, gradient_bound)
            report.number(f"{name} {dtype}: logprobs, rms ratio", error(logprobs, want), "")
            off = error(side.score(data[-3:-2]), alone)
            report.at_most(f"{name} {dtype}: one datum alone", off, bound)
            one = next(d for d in data if d.model_input.length == 1)
            same = error(side.score([one]), want[_span(data, data.index(one))])
            report.at_most(f"{name} {dtype}: one token alone", same, bound)
            if dtype == "bfloat16":
                bitwise(report, name, side, data)
                checkpoint(report, name, side, data)


def _span(data: list[Datum], index: int) -> slice:
    sizes = [d.loss_fn_inputs["target_tokens"].to_torch().numel() for d in data]
    return slice(sum(sizes[:index]), sum(sizes[: index + 1]))


def bitwise(report: Report, name: str, side: Side, data: list[Datum]) -> None:
    """What the package promises to be equal to the bit."""
    logprobs, gradient = backward(side, data)
    scored = side.score(data)
    report.check(f"{name}: scores with and without graph, bitwise", torch.equal(scored, logprobs))
    path = side.client.save_state("reference", overwrite=True).result(SECONDS).path
    copy = side.service.create_training_client_from_state(path, side.folder).result(SECONDS)
    reference = Side(side.service, copy, side.config, side.folder)
    same = torch.equal(reference.score(data), scored)
    report.check(f"{name}: policy and reference at step 0, bitwise", same)
    report.check(f"{name}: gradient twice, bitwise", torch.equal(backward(side, data)[1], gradient))
    limits = side.engine.limits
    for what, setting in (
        ("two passes", {"graph_tokens": 0, "mode": "off"}),
        ("layers recomputed", {"graph_tokens": 10**9, "mode": "on"}),
    ):
        with contextlib.ExitStack() as stack, report.attempt(what):
            for key, value in setting.items():
                stack.enter_context(changed(limits, key, value))
            same = torch.equal(backward(side, data)[1], gradient)
            report.check(f"{name}: gradient with {what}, bitwise", same)


def checkpoint(report: Report, name: str, side: Side, data: list[Datum]) -> None:
    """Save, step; load, step: the same weights."""

    def step() -> torch.Tensor:
        side.client.forward_backward(data[:9], "cross_entropy").result(SECONDS)
        side.client.optim_step(tinker.AdamParams(1e-3)).result(SECONDS)
        return side.weights()

    step()
    path = side.client.save_state("resume", overwrite=True).result(SECONDS).path
    want = step()
    side.client.load_state_with_optimizer(path).result(SECONDS)
    report.check(f"{name}: save, load, step, bitwise", torch.equal(step(), want))


def deep(report: Report, card: Card, layers: int) -> None:
    """How far packed rows are from single ones in bfloat16: kernels differ, structure does not."""
    config = qwen3(card.pick((1024, 3072, layers, 16, 8, 128, 4096, True), TOY))
    lists = families(2, 2, card.pick(256, 20), card.pick(100, 6), 300)
    data = [datum(ids) for ids in lists]
    states = {}
    with connect(card, config, "bfloat16") as side:
        engine = side.engine
        report.check(f"{layers} layers: rows are packed", engine.scorer.packs)
        for packs in (True, False):
            packing_is = changed(engine.scorer, "packs", packs)
            with (
                packing_is,
                engine.score_with_graph(side.adapter, data, "vocab_logprobs") as scored,
            ):
                states[packs] = torch.cat([hidden.double().cpu() for hidden in scored.logprobs])
                del scored
    packed, alone = states[True], states[False]
    worst = float((packed - alone).abs().max() / alone.abs().max())
    report.number(f"{layers} layers, packed or not: largest difference / largest", worst, "")
    report.at_most(f"{layers} layers, packed or not: rms ratio", error(packed, alone), 0.05)


# ---- attention -----------------------------------------------------------------------------------


def dense(q: Any, k: Any, v: Any, scale: float, layout: Any, window: Any, cap: Any) -> Any:
    """Attention of one row by its definition: every score, masked, softmax. `(1, T, heads, d)`."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    ends, at = layout.ends.to(q.device), layout.positions.to(q.device)
    index = torch.arange(len(ends), device=q.device)
    seen = (index[:, None] >= index) & (index[:, None] < ends)
    if window is not None:
        seen &= at[:, None] - at < window
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def kernels(report: Report, card: Card) -> None:
    """The attention of packed rows, and its gradient, against its definition in float64."""
    cases = [  # heads, key-value heads, head_dim, tokens, window, cap
        *(
            (4, 2, 128, tokens, None, None)
            for tokens in card.pick((30, 127, 128, 129, 3000), (40,))
        ),
        (4, 2, 128, card.pick(1000, 40), card.pick(64, 8), None),
        (4, 2, 128, card.pick(1000, 40), None, 5.0),
        (4, 2, 64, card.pick(1000, 40), None, None),
        (14, 2, 64, card.pick(1000, 40), None, None),
        (16, 8, 128, card.pick(1000, 40), None, None),
        (4, 2, 256, card.pick(1000, 40), card.pick(64, 8), None),
    ]
    for heads, keys, width, tokens, window, cap in cases:
        name = f"attention {heads}/{keys} heads of {width}, {tokens} tokens"
        name += (f", window {window}" if window else "") + (f", cap {cap}" if cap else "")
        if not report.has_time(name, card.pick(8, 0)):
            continue
        with report.attempt(name):
            found = compare_kernel(card, heads, keys, width, tokens, window, cap)
            report.at_most(f"{name}: output and gradients", max(found), 0.03)


def chosen_kernels() -> list[tuple[str, str]]:
    """Which attention kernel was chosen for what, and why no better one."""
    try:
        from cookbook_core.backend.local.scoring.kernels import choices
    except ImportError:
        return []
    made = choices().items()
    return [(str(kind), f"{c.name}; {'; '.join(c.refused)}") for kind, c in made]


def compare_kernel(
    card: Card, heads: int, keys: int, width: int, tokens: int, window: Any, cap: Any
) -> list[float]:
    """Relative errors of the output and of the gradients of q, k, v, in bfloat16."""
    stem, tail = tokens // 2, tokens // 4
    first, second, third = sequences(3, tokens, 1000)
    rest = tokens - stem - tail
    layout = packing.lay_out([first[:stem] + second[:tail], first[:stem] + third[:rest]])
    scale, results = width**-0.5, []
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, n, tokens, width, generator=generator) for n in (heads, keys, keys)]
    inputs = [x.to(card.device, torch.bfloat16) for x in drawn]
    for exact in (True, False):
        own = [(x.double() if exact else x).detach().requires_grad_() for x in inputs]
        if exact:
            out = dense(*own, scale, layout, window, cap)
        else:
            extra = {"scaling": scale, "sliding_window": window, "softcap": cap}
            out = attention.packed_attention(None, *own, None, layout=layout, **extra)[0]
        pull = torch.linspace(-1, 1, tokens, device=card.device, dtype=out.dtype)
        grads = torch.autograd.grad((out * pull[None, :, None, None]).sum(), own)
        results.append([x.detach().double() for x in (out, *grads)])
    return [error(found, want) for want, found in zip(*results, strict=True)]


# ---- sampling ------------------------------------------------------------------------------------


def sampling(report: Report, card: Card, dtype: str) -> None:
    """Equal seeds give equal tokens; samples score as they were sampled (bundled model)."""
    prompts = sequences(card.pick(64, 4), 12, 90, seed=5)
    with connect(card, "tiny", dtype) as side:
        sampler = side.sampler()
        once, again = (sample(sampler, prompts, card.pick(24, 8)) for _ in range(2))
        same = all(a.tokens == b.tokens for a, b in zip(once, again, strict=True))
        report.check(f"{dtype}: equal seeds, equal tokens", same)
        same = all(a.logprobs == b.logprobs for a, b in zip(once, again, strict=True))
        report.check(f"{dtype}: equal seeds, equal logprobs, bitwise", same)
        goal = ("<=", 5e-3) if dtype == "bfloat16" else None
        mean = gap(report, side, prompts, once, f"{dtype}: ", goal)
        report.at_most(f"{dtype}: sampled and scored, mean gap", mean, 0.05 if goal else 1e-4)
