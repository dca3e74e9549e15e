"""Packed rows with shared prefixes: the layout by hand, and exactness on every architecture."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

from cookbook_core import with_inputs
from cookbook_core.backend.local.scoring import attention, by_segment, packing, pieces
from cookbook_core.backend.local.scoring.packing import Layout, Piece, lay_out, micro_batches
from cookbook_core.errors import DatumError
from cookbook_core.tinker import Datum, ModelInput, ServiceClient, TrainingClient
from tests.conftest import VOCAB
from tests.oracles.logprobs import (
    adapter_of,
    assert_close,
    engine_of,
    plain_model,
    randomize,
    slow_gradient,
    slow_logprobs,
    take_gradient,
)
from tests.test_gradient_parity import squared, tolerance, variance

import numpy as np
import pytest
import torch

SECONDS = 60
ARCHS = ["qwen3", "llama", "mistral", "gemma2", "granite", "gpt2", "bert"]


# ---- the layout ---------------------------------------------------------------------------------


def test_a_shared_prompt_stands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MIN_SHARED", 2)
    layout = lay_out([[5, 6, 7, 1], [9, 9], [5, 6, 7, 2, 3], [5, 6, 7]])
    # [9 9], then 5 6 7 of which one sequence is all, then what two go on with
    assert layout.tokens.tolist() == [9, 9, 5, 6, 7, 1, 2, 3]
    assert layout.positions.tolist() == [0, 1, 0, 1, 2, 3, 3, 4]
    assert [rows.tolist() for rows in layout.rows] == [
        [2, 3, 4, 5],
        [0, 1],
        [2, 3, 4, 6, 7],
        [2, 3, 4],
    ]
    assert layout.pieces == [
        Piece(0, 2, 0, 2, causal=True),
        Piece(2, 5, 2, 5, causal=True),
        Piece(5, 6, 5, 6, causal=True),
        Piece(6, 8, 6, 8, causal=True),
        Piece(5, 8, 2, 5, causal=False),
    ]


def test_equal_lengths_side_by_side_are_one_piece() -> None:
    layout = lay_out([[1, 2, 3], [4, 5, 6], [7, 8], [9, 9, 9]])
    assert [(p.q_start, p.q_stop, p.count) for p in layout.pieces] == [(0, 2, 1), (2, 11, 3)]


def test_sharing_can_be_turned_off() -> None:
    assert len(lay_out([[1] * 40, [1] * 40]).tokens) == 40
    assert len(lay_out([[1] * 40, [1] * 40], share=False).tokens) == 80


def random_family(rng: np.random.Generator) -> list[list[int]]:
    """Sequences that share prefixes at several depths; some are equal, some begin another."""
    made = [rng.integers(0, 9, rng.integers(1, 12)).tolist()]
    for _ in range(int(rng.integers(1, 14))):
        parent = made[int(rng.integers(len(made)))]
        stem = parent[: int(rng.integers(0, len(parent) + 1))]
        made.append(stem + rng.integers(0, 9, rng.integers(0 if stem else 1, 8)).tolist())
    return made


def visible(layout: Layout) -> torch.Tensor:
    """`(T, T)` bool: which keys the pieces let each query see; no key may come twice."""
    seen = torch.zeros(len(layout.tokens), len(layout.tokens), dtype=torch.int64)
    for p in layout.pieces:
        length = (p.q_stop - p.q_start) // p.count
        for n in range(p.count if p.causal else 0):
            at = slice(p.q_start + n * length, p.q_start + (n + 1) * length)
            seen[at, at] += torch.ones(length, length, dtype=torch.int64).tril()
        if not p.causal:
            assert seen[p.q_start : p.q_stop].diagonal(p.q_start).all(), "met before its own piece"
            seen[p.q_start : p.q_stop, p.k_start : p.k_stop] += 1
    assert seen.max() <= 1
    return seen.bool()


@pytest.mark.parametrize("seed", range(40))
def test_every_token_sees_its_own_sequence_and_nothing_else(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(packing, "MIN_SHARED", int(rng.integers(1, 4)))
    family = random_family(rng)
    layout = lay_out(family)
    seen = visible(layout)
    for sequence, rows in zip(family, layout.rows, strict=True):
        assert layout.tokens[rows].tolist() == sequence
        assert layout.positions[rows].tolist() == list(range(len(sequence)))
        for t in range(len(sequence)):
            assert seen[rows[t]].nonzero()[:, 0].tolist() == sorted(rows[: t + 1].tolist())


@pytest.mark.parametrize("seed", range(10))
def test_micro_batches_keep_families_together(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each index once; about within the budget unless alone; fewer tokens than without sharing."""
    monkeypatch.setattr(packing, "MIN_SHARED", 2)
    rng = np.random.default_rng(seed)
    family = [s for _ in range(6) for s in random_family(rng)]
    batches = list(micro_batches(family, 30))
    assert sorted(i for batch in batches for i in batch) == list(range(len(family)))
    sizes = [len(lay_out([family[i] for i in batch]).tokens) for batch in batches]
    # at most MIN_SHARED - 1 tokens of each were shared too briefly for a segment of their own
    assert all(s <= 30 + len(b) or len(b) == 1 for s, b in zip(sizes, batches, strict=True))
    assert sum(sizes) < sum(map(len, family))


def test_a_group_larger_than_the_budget_is_cut_between_its_members() -> None:
    prompt = list(range(40))
    group = [[*prompt, n, n] for n in range(9)]
    assert [len(b) for b in micro_batches(group, 46)] == [3, 3, 3]


# ---- exactness ----------------------------------------------------------------------------------


def family_data(k: int | None = None) -> list[Datum]:
    """A common stem, prompts in it, completions of them; one datum alone, two the same."""
    rng = np.random.default_rng(5)

    def draw(n: int) -> list[int]:
        return rng.integers(3, VOCAB, n).tolist()

    stem = draw(17)
    lists = [draw(9)]
    for _ in range(2):
        prompt = stem + draw(18)
        lists += [prompt + draw(n) for n in (6, 11, 6, 1)]
    lists += [lists[1], stem]
    data = []
    for ids in lists:
        shape = len(ids) if k is None else (len(ids), k)
        inputs = {"target_tokens": rng.integers(0, VOCAB, shape)}
        data.append(Datum(ModelInput.from_ints(ids), inputs))
    return data


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS norms in the model's own dtype. transformers computes them in float32 even in a float64
    model, so a difference in the last bit before one can come out as 1e-7 after it."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + getattr(self, names[self]))
        return normed * (1 + self.weight if "Gemma" in type(self).__name__ else self.weight)

    class Names:
        def __getitem__(self, norm: Any) -> str:
            return "eps" if "Gemma" in type(norm).__name__ else "variance_epsilon"

    names = Names()
    for arch in ("qwen3", "llama", "mistral", "granite", "gemma2"):
        module = importlib.import_module(f"transformers.models.{arch}.modeling_{arch}")
        monkeypatch.setattr(getattr(module, f"{arch.capitalize()}RMSNorm"), "forward", forward)


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("dtype", "k", "train_unembed", "loss_fn"),
    [
        ("float64", None, False, squared),
        ("float64", 3, False, variance),
        ("float64", None, True, variance),
        ("float32", None, False, squared),
    ],
)
@pytest.mark.parametrize("limit", [None, 0, 100])
def test_shared_prefixes_give_the_gradient_of_separate_sequences(
    arch: str,
    dtype: str,
    k: int | None,
    train_unembed: bool,
    loss_fn: Any,
    limit: int | None,
    connect: Callable[..., TrainingClient],
    model_folder: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all graphs kept, with none, and with those of the first micro-batches."""
    client = connect(arch, dtype, train_unembed)
    engine = engine_of(client)
    assert engine.scorer.packs, f"{arch} fell back to padded batches"
    data = family_data(k)
    if limit is not None:
        monkeypatch.setattr(engine.limits, "graph_tokens", limit)
        monkeypatch.setattr(engine.scorer, "micro_batch_tokens", 60)
        batches = engine.scorer.batches(data)
        monkeypatch.setattr(engine.limits, "mode", "off")
        plan = engine.limits.plan(batches, engine.limits.limits(longest=100))
        assert None in plan
        assert ("whole" in plan) == (limit > 0)
    output = client.forward_backward_custom(data, loss_fn).result(SECONDS)
    grads = {key: g.double() for key, g in take_gradient(client).items()}

    rel = tolerance(arch, dtype)
    model = plain_model(model_folder(arch), adapter_of(client))
    loss, expected = slow_gradient(model, data, loss_fn)
    assert output.metrics["passes"] == (1 if limit is None else 2)
    assert output.metrics["loss"] == pytest.approx(loss, rel=rel)
    assert_close(grads, expected, rel)
    for found, datum in zip(output.loss_fn_outputs, data, strict=True):
        want = slow_logprobs(model, datum).detach()
        torch.testing.assert_close(found["logprobs"].to_torch().double(), want, rtol=rel, atol=rel)


def test_fewer_tokens_go_through_the_model(connect: Callable[..., TrainingClient]) -> None:
    """And the metric "tokens" still counts those of the data."""
    client, data = connect(), family_data()
    (batch,) = engine_of(client).scorer.batches(data)
    apart = sum(d.model_input.length for d in data)
    # the stem once, each prompt once, its completions, and 6 tokens of a twin: too few to share
    assert batch.tokens == 9 + 17 + 2 * (18 + 24) + 6
    assert apart == 9 + 2 * (4 * 35 + 24) + 41 + 17
    output = client.forward_backward_custom(data, squared).result(SECONDS)
    take_gradient(client)
    assert output.metrics["tokens"] == apart


@pytest.mark.parametrize("window", [None, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pieces_against_one_segment_at_a_time(window: int | None, dtype: torch.dtype) -> None:
    """The fused pieces and the plain torch twin that other devices use; grouped heads."""
    layout = lay_out([d.model_input.to_ints() for d in family_data()])
    torch.manual_seed(0)
    heads = [torch.randn(n, len(layout.tokens), 8, dtype=torch.float64) for n in (4, 2, 2)]
    cotangent = torch.randn(len(layout.tokens), 4, 8, dtype=torch.float64)
    results = []
    for run, precision in ((pieces.attend, dtype), (by_segment.attend, torch.float64)):
        inputs = [x.to(precision).requires_grad_() for x in heads]
        out = run(*inputs, 0.3, layout, window)
        grads = torch.autograd.grad(out, inputs, cotangent.to(precision))
        results.append([out, *grads])
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for found, want in zip(*results, strict=True):
        assert found.shape == want.shape
        assert float((found.double() - want).abs().max()) <= bound * float(want.abs().max())


def test_an_architecture_that_cannot_be_packed_says_so_once(
    model_folder: Callable[..., str],
    make_service: Callable[..., ServiceClient],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A model whose attention is not a function of what the layout says: found out by asking it."""

    def leaky(*args: Any, layout: Layout, **kwargs: Any) -> Any:
        whole = lay_out([layout.tokens.tolist()], share=False)
        return attention.packed_attention(*args, layout=whole, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, leaky)
    with caplog.at_level(logging.WARNING):
        service = make_service(dtype="float64")
        client = service.create_lora_training_client(model_folder("qwen3"), rank=4).result(SECONDS)
        randomize(client)
        data = family_data()
        client.forward_backward_custom(data, squared).result(SECONDS)
        client.forward_backward_custom(data, squared).result(SECONDS)
    assert not engine_of(client).scorer.packs
    said = [r.getMessage() for r in caplog.records if "padded batches" in r.getMessage()]
    assert len(said) == 1
    assert "Qwen3ForCausalLM" in said[0]
    grads = {key: g / 2 for key, g in take_gradient(client).items()}
    _, expected = slow_gradient(
        plain_model(model_folder("qwen3"), adapter_of(client)), data, squared
    )
    assert_close(grads, expected, 1e-9)


# ---- rows nobody asks for -----------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("arch", ["qwen3", "bert"])
def test_score_mask_skips_rows_and_changes_nothing_else(
    arch: str, k: int | None, connect: Callable[..., TrainingClient]
) -> None:
    client, data = connect(arch), family_data(k)
    masks = [np.arange(d.model_input.length) % 3 == 1 for d in data]
    masked = [with_inputs(d, score_mask=m) for d, m in zip(data, masks, strict=True)]
    masked[0] = data[0]  # one without a mask

    def loss(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        del data
        terms = [lp[0] ** 2 if i == 0 else lp[m] ** 2 for i, (lp, m) in enumerate(pairs(logprobs))]
        return sum(t.sum() for t in terms), {}

    def pairs(logprobs: list[torch.Tensor]) -> list[Any]:
        return list(zip(logprobs, [torch.from_numpy(m) for m in masks], strict=True))

    whole = client.forward_backward_custom(data, loss).result(SECONDS)
    expected = take_gradient(client)
    part = client.forward_backward_custom(masked, loss).result(SECONDS)
    assert part.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-12)
    assert_close(take_gradient(client), expected, 1e-10)
    outputs = zip(part.loss_fn_outputs, whole.loss_fn_outputs, masks, strict=True)
    for i, (found, full, mask) in enumerate(outputs):
        found, full = (o["logprobs"].to_numpy() for o in (found, full))
        if i:
            assert np.array_equal(found[~mask], np.zeros_like(found[~mask]))
            np.testing.assert_allclose(found[mask], full[mask], rtol=1e-12)
        else:
            np.testing.assert_allclose(found, full, rtol=1e-12)


def test_a_mask_of_nothing_and_one_of_the_wrong_length(
    connect: Callable[..., TrainingClient],
) -> None:
    client, data = connect(), family_data()[:2]
    data[0] = with_inputs(data[0], score_mask=np.zeros(data[0].model_input.length))
    output = client.forward_backward_custom(data, squared).result(SECONDS)
    take_gradient(client)
    assert not output.loss_fn_outputs[0]["logprobs"].to_numpy().any()
    data[1] = with_inputs(data[1], score_mask=[1, 0])
    with pytest.raises(DatumError, match=r'data\[1\]\.loss_fn_inputs\["score_mask"\].*\(41,\)'):
        client.forward_backward_custom(data, squared)
