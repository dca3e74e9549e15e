"""map_rows and VocabLogprobs.map: the gradient of the plain form, in little memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

from cookbook_core import clients
from cookbook_core.alignment import input_tensors, map_rows
from cookbook_core.backend.local.scoring import vocab_logprobs
from cookbook_core.backend.local.scoring.vocab_logprobs import VocabLogprobs
from cookbook_core.builtin_losses import with_entropy_bonus
from cookbook_core.errors import DatumError, RequestError
from cookbook_core.tinker import AdamParams, Datum
from recipes.distill import divergence_of
from tests.oracles.logprobs import assert_close, engine_of, randomize, take_gradient

import pytest
import torch

V, D = 9, 4
SECONDS = 60
VOCAB = "vocab_logprobs"


@pytest.fixture(autouse=True)
def three_rows_at_a_time(monkeypatch):
    """Of the tables of this file; a model's vocabulary is larger: one row."""
    monkeypatch.setattr(vocab_logprobs, "MAP_CELLS", 3 * V)


class Table:
    """A VocabLogprobs of float64, the same as a plain tensor, and the rows computed so far."""

    def __init__(self, rows: int, seed: int, *, grad: bool = True) -> None:
        random = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(rows, D, generator=random, dtype=torch.float64)
        self.hidden.requires_grad_(grad)
        self.weight = torch.randn(V, D, generator=random, dtype=torch.float64, requires_grad=grad)
        self.cost: list[int] = []
        self.lazy = VocabLogprobs(self.hidden, self.to_logprobs, V)

    def to_logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        self.cost.append(len(hidden))
        return (hidden @ self.weight.T).log_softmax(-1)

    @property
    def plain(self) -> torch.Tensor:
        return (self.hidden @ self.weight.T).log_softmax(-1)

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, [self.hidden, self.weight])


def kl_and_target(log_p: torch.Tensor, log_q: torch.Tensor, target: torch.Tensor) -> Any:
    return divergence_of(log_p, log_q, "reverse"), log_p.gather(1, target[:, None])[:, 0]


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("lazy_teacher", [True, False])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5, 6], [6, 0, 3, 3], [-1], []])
def test_the_gradient_is_that_of_the_plain_form(chosen, lazy_teacher):
    """A tuple of two results, over positions in any order, twice, from the end, or none at all."""
    rows = torch.tensor(chosen, dtype=torch.long)
    own, other = Table(7, seed=1), Table(len(rows), seed=2, grad=False)
    target = torch.arange(len(rows)) % V
    teacher = other.lazy if lazy_teacher else other.plain
    kl, picked = map_rows(kl_and_target, own.lazy, teacher, target, rows=rows)
    plain_kl, plain_picked = kl_and_target(own.plain[rows], other.plain, target)
    assert (kl.shape, picked.shape) == (plain_kl.shape, plain_picked.shape)
    found = own.gradients((kl * torch.arange(len(rows))).sum() - picked.sum())
    wanted = own.gradients((plain_kl * torch.arange(len(rows))).sum() - plain_picked.sum())
    for a, b in zip((kl, picked, *found), (plain_kl, plain_picked, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_answers_of_different_lengths_in_one_loss_and_a_mask():
    """Of three datums 5, 0 and 2 rows count; one result, not a tuple."""
    tables = [Table(n, seed=n) for n in (6, 3, 4)]
    masks = [torch.arange(len(t.hidden)) < n for t, n in zip(tables, (5, 0, 2), strict=True)]

    def entropy(log_p: torch.Tensor) -> torch.Tensor:
        return -(log_p.exp() * log_p).sum(-1)

    loss = torch.cat(
        [map_rows(entropy, t.lazy, rows=m) for t, m in zip(tables, masks, strict=True)]
    ).mean()
    plain = torch.cat([entropy(t.plain[m]) for t, m in zip(tables, masks, strict=True)]).mean()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for table in tables:
        torch.testing.assert_close(table.gradients(loss), table.gradients(plain))


def test_gradient_reaches_others_and_tensors_that_fn_closes_over():
    own, other = Table(5, seed=1), Table(5, seed=2)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def product(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return scale * (log_p * log_q).sum(-1)

    inputs = [own.hidden, other.hidden, scale]
    found = torch.autograd.grad(own.lazy.map(product, other.lazy).sum(), inputs)
    wanted = torch.autograd.grad(product(own.plain, other.plain).sum(), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_plain_tensor_is_mapped_too():
    table, rows = Table(5, seed=1), torch.tensor([4, 0])
    found = map_rows(lambda lp, w: lp.sum(-1) * w, table.plain, torch.tensor([2.0, 3.0]), rows=rows)
    wanted = table.plain[rows].sum(-1) * torch.tensor([2.0, 3.0])
    assert torch.equal(found, wanted)
    assert torch.equal(map_rows(lambda lp: lp[:, 0], table.plain), table.plain[:, 0])


# ---- cost ----------------------------------------------------------------------------------------


def test_rows_are_computed_in_pieces_and_again_in_the_backward():
    own, other = Table(7, seed=1), Table(7, seed=2, grad=False)
    loss = own.lazy.map(lambda p, q: (p * q).sum(-1), other.lazy).sum()
    assert own.cost == other.cost == [3, 3, 1]
    own.gradients(loss)
    assert sorted(own.cost) == sorted(other.cost) == [1, 1, 3, 3, 3, 3]
    with torch.no_grad():
        own.lazy.map(lambda p: p.sum(-1))
    assert own.cost[6:] == [3, 3, 1]


def saved_bytes(run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Bytes of the different tensors that autograd keeps for the backward, and the result."""
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    return sum(x.untyped_storage().nbytes() for x in kept.values()), result


def test_no_row_is_kept_for_the_backward():
    """Both keep 6 indices and 6 hidden states, float64; the plain form also its logprobs, their
    exp and the weights. Of the tables that fn was given none is alive."""
    own, rows, tables = Table(7, seed=1), torch.arange(6), []

    def entropy(log_p: torch.Tensor) -> torch.Tensor:
        tables.append(weakref.ref(log_p))
        return -(log_p.exp() * log_p).sum(-1)

    plain, _ = saved_bytes(lambda: entropy(own.to_logprobs(own.hidden[rows])).sum())
    assert plain == 8 * (6 + 6 * D + 2 * 6 * V + V * D)
    tables.clear()
    mapped, loss = saved_bytes(lambda: map_rows(entropy, own.lazy, rows=rows).sum())
    assert mapped == 8 * (6 + 6 * D)
    gc.collect()
    assert [table() for table in tables] == [None, None]
    own.gradients(loss)


# ---- through a model -----------------------------------------------------------------------------


def with_weights(random_data: Callable[..., list[Datum]], count: int) -> list[Datum]:
    """Datums of which every third position has no weight, and the last datum none at all."""
    made = []
    for i, datum in enumerate(random_data(count, seed=3)):
        weights = [float(at % 3 > 0 and i < count - 1) for at in range(datum.model_input.length)]
        made.append(Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": weights}))
    return made


@pytest.mark.parametrize("train_unembed", [False, True])
def test_a_model_gets_the_gradient_of_the_plain_form(
    make_service, model_folder, random_data, train_unembed
):
    """Forward KL to a teacher of the same model, in float64; also with a trained unembedding."""
    service = make_service(dtype="float64")
    folder = model_folder("qwen3")
    made = [
        service.create_lora_training_client(folder, 4, 0, train_unembed=trained).result(SECONDS)
        for trained in (train_unembed, False)
    ]
    for seed, client in enumerate(made):
        randomize(client, seed=seed)
    student, teacher = made
    data = with_weights(random_data, 4)
    tables = clients.vocab_logprobs(teacher, data)
    masks = [w != 0 for w in input_tensors(data, "weights")]

    def mapped(data: list[Datum], rows: list[Any]) -> Any:
        each = zip(rows, tables, masks, strict=True)
        values = [map_rows(lambda p, q: divergence_of(p, q, "forward"), *pair[:2], rows=pair[2])
                  for pair in each]  # fmt: skip
        return torch.cat(values).mean(), {}

    def plain(data: list[Datum], rows: list[Any]) -> Any:
        each = zip(rows, tables, masks, strict=True)
        values = [divergence_of(p[mask], q[:], "forward") for p, q, mask in each]
        return torch.cat(values).mean(), {}

    results = []
    for loss in (plain, mapped):
        found = student.forward_backward_custom(data, loss, loss_type_input=VOCAB).result(SECONDS)
        results.append((found.loss, take_gradient(student)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-12)
    assert_close(results[1][1], results[0][1], 1e-12)


def test_a_teachers_rows_stay_those_of_its_weights(make_service, model_folder, random_data):
    """Also while an adapter with a trained unembedding is active, and after a step of its own."""
    service = make_service(dtype="float64")
    folder = model_folder("qwen3")
    teacher, other = (
        service.create_lora_training_client(folder, 4, 0, train_unembed=trained).result(SECONDS)
        for trained in (False, True)
    )
    randomize(teacher)
    randomize(other)
    data = with_weights(random_data, 3)
    wanted = [table[:] for table in clients.vocab_logprobs(teacher, data)]
    tables = clients.vocab_logprobs(teacher, data)
    teacher.forward_backward(data[:1], "cross_entropy").result(SECONDS)
    teacher.optim_step(AdamParams(0.1)).result(SECONDS)
    seen: list[torch.Tensor] = []

    def look(data: list[Datum], rows: list[Any]) -> Any:
        seen.extend(table[:] for table in tables)
        return torch.zeros(()), {}

    other.forward(data, look, loss_type_input=VOCAB).result(SECONDS)
    for found, rows in zip(seen, wanted, strict=True):
        assert torch.equal(found, rows)
    assert [len(rows) for rows in wanted] == [
        int((w != 0).sum()) for w in input_tensors(data, "weights")
    ]
    with pytest.raises(RequestError, match=r"vocab_logprobs: rows were asked for after.*rows\[:\]"):
        clients.vocab_logprobs(other, data)[0][:]


def test_the_entropy_bonus_computes_the_weighted_rows_in_pieces(
    make_service, model_folder, random_data, monkeypatch
):
    """At most two rows at a time, each computed twice: in the loss and in its backward."""
    client = make_service(dtype="float32").create_lora_training_client(model_folder("qwen3"), 4)
    client = client.result(SECONDS)
    scorer, pieces = engine_of(client).scorer, []
    logprobs_of = scorer.vocab_logprobs
    size = client.get_info().model_data.vocab_size
    monkeypatch.setattr(vocab_logprobs, "MAP_CELLS", 2 * size)
    scorer.vocab_logprobs = lambda h, *rest: pieces.append(len(h)) or logprobs_of(h, *rest)
    data = with_weights(random_data, 3)
    loss = with_entropy_bonus(lambda data, lp: (sum(x.sum() for x in lp), {}), 0.1)
    client.forward_backward_custom(data, loss, loss_type_input=VOCAB).result(SECONDS)
    weighted = sum(int((w != 0).sum()) for w in input_tensors(data, "weights"))
    assert (max(pieces), sum(pieces)) == (2, 2 * weighted)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [True, False])
def test_what_does_not_fit_is_named(lazy):
    own = Table(5, seed=1)
    table = own.lazy if lazy else own.plain
    with pytest.raises(DatumError, match=r"others\[1\]: misaligned.*of 5 rows.*got shape \(4,\)"):
        map_rows(lambda *x: x[0].sum(-1), table, torch.zeros(5), torch.zeros(4))
    with pytest.raises(DatumError, match=r"others\[0\]: misaligned.*got list"):
        map_rows(lambda *x: x[0].sum(-1), table, [0.0] * 5)
    with pytest.raises(DatumError, match=r"result of fn\[0\]: misaligned.*got shape \(\)"):
        map_rows(lambda lp: lp.sum(), table)
    with pytest.raises(IndexError):
        map_rows(lambda lp: lp.sum(-1), table, rows=torch.tensor([5]))
