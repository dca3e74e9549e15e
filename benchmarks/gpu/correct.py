"""Section 1: logprobs, gradients, attention, sampling and checkpoints against slow references."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

from benchmarks.gpu import models as M
from benchmarks.gpu.card import Card
from benchmarks.gpu.decode import gap, sample, sampler_of
from benchmarks.gpu.report import Report
from cookbook_core import tinker, with_inputs
from cookbook_core.backend.local.scoring import attention, kernels, packing
from cookbook_core.storage.paths import asset_path
from cookbook_core.tinker import Datum
from tests.oracles.attention import dense
from tests.oracles.logprobs import adapter_of, engine_of, plain_model, slow_gradient

import torch

COMPLAINTS = (
    "without torch.compile",
    "recompile_limit",
    "is not compiled",
    "too many kinds of rows",
)
"""Of torch or the package, when flex attention runs without its kernel."""


def correct(report: Report, card: Card) -> None:
    small, windowed = (256, 512, 2, 16, 8, 128, 4096, True), (256, 512, 2, 4, 2, 64, 4096, False)
    for name, shape, window in (
        ("qwen3", small, None), ("tiny", None, None), ("mistral", windowed, card.pick(64, 8)),
    ):  # fmt: skip
        folder = saved(card, shape, window) if shape else str(asset_path("tiny_model"))
        what = f"{name} against float64"
        report.attempt(what, partial(against_float64, report, card, name, folder))
    for layers in card.pick((28, 36), (2,)):
        what = f"packing in bfloat16, {layers} layers"
        report.attempt(what, partial(deep, report, card, layers))
    for dtype in ("float32", "bfloat16"):
        report.attempt(f"sampling in {dtype}", partial(sampling, report, card, dtype))
    attention_by_definition(report, card)
    complaints = [text for text in report.heard if any(each in text for each in COMPLAINTS)]
    report.check("no complaint of torch.compile", not complaints, "; ".join(complaints)[:300])
    for kind, choice in kernels.choices().items():
        report.note(f"{kind}: {choice.name}; {'; '.join(choice.refused)}")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    report.number("graphs compiled by dynamo", graphs, "")


def saved(card: Card, shape: Any, window: int | None) -> str:
    """The folder of a model whose norms and biases differ from 1 and 0, so that all of it shows."""
    config = M.qwen3(card.pick(shape, M.TOY), window, initializer_range=0.1)
    model, folder = M.build(config, "cpu", torch.float32), tempfile.mkdtemp(dir=card.folder)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() == 1:
            p.data.add_(0.2 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def mixed(toy: bool) -> list[Datum]:
    """Shared prefixes, K = 3 targets, positions not scored, and in the end one token alone."""
    lists = M.families(3, 3, 20 if toy else 90, 6 if toy else 40)
    lists += M.sequences(1, 12 if toy else 200, seed=3)
    data = M.datums([*lists, lists[0], lists[0][:30], *M.sequences(1, 1, seed=4)])
    length = data[1].model_input.length
    targets = torch.randint(90, (length, 3), generator=torch.Generator().manual_seed(0))
    weights, half = (
        data[1].loss_fn_inputs["weights"].to_torch(),
        torch.arange(length) >= length // 2,
    )
    three = with_inputs(data[1], target_tokens=targets, weights=weights.repeat(3, 1).T)
    part = with_inputs(data[1], score_mask=half.long(), weights=weights * half)
    return [three, part, *data]


def squared(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> Any:
    """A loss whose gradient differs from token to token."""
    pairs = zip(data, logprobs, strict=True)
    return sum((lp.square() * d.loss_fn_inputs["weights"].to_torch()).sum() for d, lp in pairs), {}


def backward(client: Any, data: list[Datum]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logprobs, computed with a graph, and the gradient of `squared`."""
    output = client.forward_backward_custom(data, squared).result(M.SECONDS)
    return [o["logprobs"].to_torch().double() for o in output.loss_fn_outputs], M.gradient(client)


def reference(folder: str, client: Any, data: list[Datum]) -> tuple[list[torch.Tensor], Any]:
    """The same two by plain autograd through plain peft, in float64 on the CPU."""
    kept: list[torch.Tensor] = []

    def loss(data: Any, logprobs: Any) -> Any:
        for d, lp in zip(data, logprobs, strict=True):  # 0 where it is not scored
            kept.append(lp.detach() * (d.loss_fn_inputs["weights"].to_torch() > 0))
        return squared(data, logprobs)

    _, grads = slow_gradient(plain_model(folder, adapter_of(client)), data, loss)
    return kept, torch.cat([grads[name].flatten() for name in adapter_of(client).slot.params])


def against_float64(report: Report, card: Card, name: str, folder: str) -> None:
    want, want_gradient = list[torch.Tensor](), torch.empty(0)
    for dtype, bound, gradient_bound in (("float32", 1e-4, 1e-4), ("bfloat16", 0.05, 0.2)):
        with M.connect(card, folder, dtype, rank=8) as client:
            engine, what = engine_of(client), f"{name} {dtype}"
            data = mixed(card.smoke)
            if not want:
                want, want_gradient = reference(folder, client, data)
            report.check(f"{what}: rows are packed", engine.scorer.packs)
            found, found_gradient = backward(client, data)
            logprobs, wanted = (torch.cat([lp.flatten() for lp in each]) for each in (found, want))
            worst = float((logprobs - wanted).abs().max() / wanted.abs().max())
            report.at_most(f"{what}: logprobs, largest error / largest", worst, bound)
            off = M.error(found_gradient, want_gradient)
            report.at_most(f"{what}: gradient, relative error", off, gradient_bound)
            report.number(f"{what}: logprobs, rms ratio", M.error(logprobs, wanted), "")
            for index, which in ((-2, "one datum"), (-1, "one token")):
                off = M.error(M.score(client, [data[index]]), want[index])
                report.at_most(f"{what}: {which} alone", off, bound)
            if dtype == "bfloat16":
                bitwise(report, name, client, data)
                checkpoint(report, name, client, data)


def bitwise(report: Report, name: str, client: Any, data: list[Datum]) -> None:
    """What the package promises to be equal to the bit."""
    engine, adapter, (found, want) = engine_of(client), adapter_of(client), backward(client, data)
    logprobs, scored = torch.cat([lp.flatten() for lp in found]), M.score(client, data)
    report.check(f"{name}: scores with and without graph, bitwise", torch.equal(scored, logprobs))
    other = torch.cat([lp.flatten().double() for lp in engine.score(adapter.copy(), data)])
    same = torch.equal(other, scored)
    report.check(f"{name}: policy and reference at step 0, bitwise", same)
    report.check(f"{name}: gradient twice, bitwise", torch.equal(backward(client, data)[1], want))
    for what, graph_tokens, mode in (
        ("two passes", 0, "off"), ("layers recomputed", 10**9, "on")
    ):  # fmt: skip
        with mock.patch.multiple(engine.limits, graph_tokens=graph_tokens, mode=mode):
            same = torch.equal(backward(client, data)[1], want)
        report.check(f"{name}: gradient with {what}, bitwise", same)


def checkpoint(report: Report, name: str, client: Any, data: list[Datum]) -> None:
    """Save, step; load, step: the same weights."""

    def step() -> torch.Tensor:
        client.forward_backward(data[-9:], "cross_entropy").result(M.SECONDS)
        client.optim_step(tinker.AdamParams(1e-3)).result(M.SECONDS)
        return torch.cat([p.detach().flatten().cpu() for p in adapter_of(client).params])

    step()
    path = client.save_state("resume", overwrite=True).result(M.SECONDS).path
    want = step()
    client.load_state_with_optimizer(path).result(M.SECONDS)
    report.check(f"{name}: save, load, step, bitwise", torch.equal(step(), want))


def deep(report: Report, card: Card, layers: int) -> None:
    """How far packed rows are from single ones in bfloat16: kernels differ, structure does not."""
    config = M.qwen3(card.pick((1024, 3072, layers, 16, 8, 128, 4096, True), M.TOY))
    data = M.datums(M.families(2, 2, card.pick(256, 20), card.pick(100, 6)))
    states: list[torch.Tensor] = []
    with M.connect(card, config, "bfloat16") as client:
        engine, adapter = engine_of(client), adapter_of(client)
        report.check(f"{layers} layers: rows are packed", engine.scorer.packs)
        for packs in (True, False):
            with (
                mock.patch.object(engine.scorer, "packs", packs),
                engine.score_with_graph(adapter, data, "vocab_logprobs") as scored,
            ):
                states.append(torch.cat([hidden.double().cpu() for hidden in scored.logprobs]))
                del scored
    packed, alone = states
    worst = float((packed - alone).abs().max() / alone.abs().max())
    report.number(f"{layers} layers, packed or not: largest difference / largest", worst, "")
    report.at_most(f"{layers} layers, packed or not: rms ratio", M.error(packed, alone), 0.05)


def attention_by_definition(report: Report, card: Card) -> None:
    """The attention of packed rows, and its gradient, against its definition in float64."""
    long, window = card.pick(1000, 40), card.pick(64, 8)
    cases = [  # heads, key-value heads, head_dim, tokens, window, cap
        *((4, 2, 128, n, None, None) for n in card.pick((30, 127, 128, 129, 3000), (40,))),
        (4, 2, 128, long, window, None),
        (4, 2, 128, long, None, 5.0),
        (4, 2, 64, long, None, None),
        (14, 2, 64, long, None, None),
        (16, 8, 128, long, None, None),
        (4, 2, 256, long, window, None),
    ]
    for heads, keys, width, tokens, window, cap in cases:
        name = f"attention {heads}/{keys} heads of {width}, {tokens} tokens"
        name += (f", window {window}" if window else "") + (f", cap {cap}" if cap else "")
        case = (card, heads, keys, width, tokens, window, cap)
        off = report.attempt(name, partial(attention_error, *case), 8)
        if off is not None:
            report.at_most(f"{name}: output and gradients", off, 0.03)


def attention_error(
    card: Card, heads: int, keys: int, width: int, tokens: int, window: Any, cap: Any
) -> float:
    """Largest relative error of the output and of the gradients of q, k, v, in bfloat16."""
    stem, tail = tokens // 2, tokens // 4
    first, second, third = M.sequences(3, tokens)
    rest = tokens - stem - tail
    layout = packing.lay_out([first[:stem] + second[:tail], first[:stem] + third[:rest]])
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(n, tokens, width, generator=generator) for n in (heads, keys, keys)]
    exact = [x.bfloat16().double().requires_grad_() for x in drawn]
    own = [x.to(card.device, torch.bfloat16).requires_grad_() for x in drawn]
    extra = {"scaling": width**-0.5, "sliding_window": window, "softcap": cap}
    q, k, v = (x[None] for x in own)
    found = attention.packed_attention(None, q, k, v, None, layout=layout, **extra)[0][0]
    want, results = dense(*exact, width**-0.5, layout, window, cap), []
    for out, inputs in ((found, own), (want, exact)):
        pull = torch.linspace(-1, 1, tokens, device=out.device, dtype=out.dtype)
        grads = torch.autograd.grad((out * pull[:, None, None]).sum(), inputs)
        results.append([x.detach().double().cpu() for x in (out, *grads)])
    return max(M.error(x, y) for x, y in zip(*results, strict=True))


def sampling(report: Report, card: Card, dtype: str) -> None:
    """Equal seeds give equal tokens; samples score as they were sampled (bundled model)."""
    prompts = M.sequences(card.pick(64, 4), 12, seed=5)
    with M.connect(card, "tiny", dtype) as client:
        sampler = sampler_of(client)
        once, again = (sample(sampler, prompts, card.pick(24, 8)) for _ in range(2))
        same = [s.tokens for s in once] == [s.tokens for s in again]
        report.check(f"{dtype}: equal seeds, equal tokens", same)
        same = [s.logprobs for s in once] == [s.logprobs for s in again]
        report.check(f"{dtype}: equal seeds, equal logprobs, bitwise", same)
        goal = ("<=", 5e-3) if dtype == "bfloat16" else None
        mean = gap(report, client, prompts, once, f"{dtype}: ", goal)
        report.at_most(f"{dtype}: sampled and scored, mean gap", mean, 0.05 if goal else 1e-4)
