"""loss_type_input="vocab_logprobs": the whole vocabulary, by rows, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cookbook_core.backend.local.scoring.loss_operands import OperandsFollow
from cookbook_core.backend.local.scoring.vocab_logprobs import VocabLogprobs
from cookbook_core.errors import ConfigError, DatumError, LossError, RequestError
from cookbook_core.tinker import AdamParams, Datum, ServiceClient, TrainingClient
from tests.oracles.logprobs import (
    adapter_of,
    assert_close,
    engine_of,
    plain_model,
    randomize,
    take_gradient,
)

import numpy as np
import pytest
import torch

IDS = [5, 40, 7, 90]
SECONDS = 60


@pytest.fixture
def lazy() -> tuple[VocabLogprobs, torch.Tensor, list[int]]:
    """A VocabLogprobs of 6 rows and 9 columns, the same as a plain tensor, rows computed so far."""
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    cost: list[int] = []

    def to_logprobs(h: torch.Tensor) -> torch.Tensor:
        cost.append(len(h))
        return (h @ weight.T).log_softmax(-1)

    return VocabLogprobs(hidden, to_logprobs, 9), (hidden @ weight.T).log_softmax(-1), cost


# ---- indexing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "rows"),
    [
        (lambda x: x[2], 1),
        (lambda x: x[-1], 1),
        (lambda x: x[torch.tensor(3)], 1),
        (lambda x: x[np.int64(3)], 1),
        (lambda x: x[2][[1, 5]], 1),
        (lambda x: x[2, torch.tensor([1, 5])], 1),
        (lambda x: x[2, 1:4], 1),
        (lambda x: x[1:3], 2),
        (lambda x: x[1:3, 4], 2),
        (lambda x: x[::2, [1, 5]], 3),
        (lambda x: x[[4, 1]], 2),
        (lambda x: x[[4, 1, 4]], 2),
        (lambda x: x[torch.tensor([4, 1]), torch.tensor([0, 8])], 2),
        (lambda x: x[torch.tensor([[4], [1]]), torch.tensor([[0, 8]])], 2),
        (lambda x: x[torch.tensor([True, False, True, False, False, False])], 2),
        (lambda x: x[np.array([0, 5])], 2),
        (lambda x: x[...], 6),
        (lambda x: x[None], 6),
    ],
)
def test_an_index_gives_what_a_tensor_gives_and_costs_its_rows(lazy, read, rows):
    lp, plain, cost = lazy
    assert torch.allclose(read(lp), read(plain), atol=1e-6)
    assert sum(cost) == rows


def test_one_row_indexed_again_and_again_costs_one(lazy):
    lp, plain, cost = lazy
    picked = torch.stack([lp[3][k] for k in (5, 0, 8)] + [lp[-3][2]])
    assert torch.allclose(picked, plain[3, [5, 0, 8, 2]])
    assert cost == [1]


def test_out_of_range_and_iteration_are_those_of_a_tensor(lazy):
    lp, plain, _ = lazy
    with pytest.raises(IndexError, match="6"):
        lp[6]
    assert torch.allclose(torch.stack(list(lp)), plain)
    assert (len(lp), lp.shape, lp.dim(), lp.dtype) == (6, (6, 9), 2, torch.float32)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.exp().sum(-1),
        lambda x: torch.exp(x),
        lambda x: -x * 2 + x / 3,
        lambda x: 1 - x,
        lambda x: torch.stack([x, x]),
        lambda x: x.gather(1, torch.tensor([[0], [1], [2], [3], [4], [5]])),
        lambda x: torch.nn.functional.kl_div(x, x + 1, log_target=True, reduction="sum"),
        lambda x: x > -2,
    ],
)
def test_everything_else_acts_on_all_rows(lazy, use):
    lp, plain, _ = lazy
    assert torch.equal(use(lp), use(plain))


# ---- the gradient -------------------------------------------------------------------------------


def candidates(random_data: Callable[..., list[Datum]]) -> list[Datum]:
    """Datums without target_tokens that carry a position, ids and a distribution over them."""
    rng = np.random.default_rng(3)
    made = []
    for datum in random_data(5, seed=2):
        inputs = {
            "score_position": rng.integers(0, datum.model_input.length),
            "target_token_ids": IDS,
            "target_probs": rng.dirichlet(np.ones(len(IDS))),
        }
        made.append(Datum(datum.model_input, inputs))
    return made


def indexed_loss(data: list[Datum], logprobs: list[Any]) -> Any:
    """As code written for whole-vocabulary logprobs has it."""
    losses = []
    for datum, lp in zip(data, logprobs, strict=True):
        pos = int(datum.loss_fn_inputs["score_position"].to_torch())
        ids = datum.loss_fn_inputs["target_token_ids"].to_torch()
        probs = datum.loss_fn_inputs["target_probs"].to_torch()
        chosen = lp[pos][ids]
        losses.append((probs * (probs.log() - torch.log_softmax(chosen, dim=-1))).sum())
    loss = torch.stack(losses).mean()
    return loss, {"kl": loss}


def multi_target_loss(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    """The same through `[N, K]` targets."""
    return indexed_loss(
        [
            Datum(d.model_input, {**d.loss_fn_inputs, "target_token_ids": [0, 1, 2, 3]})
            for d in data
        ],
        logprobs,
    )


def connect(make_service: Any, folder: str, train_unembed: bool, dtype: str) -> TrainingClient:
    service: ServiceClient = make_service(dtype=dtype)
    client = service.create_lora_training_client(folder, 4, 0, train_unembed=train_unembed)
    made = client.result(SECONDS)
    randomize(made)
    return made


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("arch", "train_unembed"),
    [("qwen3", False), ("qwen3", True), ("llama", True), ("gemma2", False), ("bert", False)],
)
def test_indexed_rows_give_the_gradient_of_the_multi_target_form(
    make_service, model_folder, random_data, arch, train_unembed, passes
):
    client = connect(make_service, model_folder(arch), train_unembed, "float32")
    data = candidates(random_data)
    wide = [
        Datum(
            d.model_input,
            {**d.loss_fn_inputs, "target_tokens": [IDS] * d.model_input.length},
        )
        for d in data
    ]
    expected = client.forward_backward_custom(wide, multi_target_loss).result(SECONDS)
    wanted = take_gradient(client)
    engine_of(client).limits.graph_tokens = 10**9 if passes == 1 else 0
    found = client.forward_backward_custom(
        data, indexed_loss, loss_type_input="vocab_logprobs"
    ).result(SECONDS)
    assert found.metrics["passes"] == passes
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_close(take_gradient(client), wanted, 1e-5)


@pytest.mark.parametrize("train_unembed", [False, True])
def test_an_entropy_bonus_against_plain_autograd(
    make_service, model_folder, random_data, train_unembed
):
    """Exact entropy of every row, in float64, against backward() through everything."""
    client = connect(make_service, model_folder("qwen3"), train_unembed, "float64")
    data = [Datum(d.model_input) for d in random_data(4, seed=6)]

    def entropy(data: list[Datum], logprobs: list[Any]) -> Any:
        del data
        rows = [lp[1:] for lp in logprobs]
        return -sum((row.exp() * row).sum() for row in rows), {}

    found = client.forward_backward_custom(data, entropy, loss_type_input="vocab_logprobs")
    assert found.result(SECONDS).loss_fn_outputs == []
    model = plain_model(model_folder("qwen3"), adapter_of(client))
    ids = [torch.tensor([d.model_input.to_ints()]) for d in data]
    rows = [model(input_ids=x, use_cache=False).logits[0].log_softmax(-1) for x in ids]
    loss, _ = entropy(data, rows)
    loss.backward()
    expected = {
        name.replace(".default.", "."): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert found.result().loss == pytest.approx(loss.item(), rel=1e-12)
    assert_close(take_gradient(client), expected, 1e-9)


# ---- without a gradient -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "train_unembed"), [("qwen3", True), ("gpt2", False), ("bert", False)]
)
def test_forward_gives_the_training_loss_and_rows_and_accumulates_nothing(
    make_service, model_folder, random_data, arch, train_unembed
):
    """The rows that a loss keeps are constants, equal to those of the target_tokens' scoring."""
    client = connect(make_service, model_folder(arch), train_unembed, "float64")
    data, kept = candidates(random_data), []

    def keeping(data: list[Datum], logprobs: list[Any]) -> Any:
        kept.extend(lp[:] for lp in logprobs)
        return indexed_loss(data, logprobs)

    form = "vocab_logprobs"
    output = client.forward(data, keeping, loss_type_input=form).result(SECONDS)
    assert output.loss_fn_outputs == []
    assert not any(rows.requires_grad for rows in kept)
    with pytest.raises(RequestError, match="no gradient"):
        client.optim_step(AdamParams(1e-3)).result(SECONDS)
    wide = [Datum(d.model_input, {"target_tokens": [IDS] * d.model_input.length}) for d in data]
    scored = client.forward(wide, zero).result(SECONDS)
    for rows, out in zip(kept, scored.loss_fn_outputs, strict=True):
        torch.testing.assert_close(rows[:, IDS], out["logprobs"].to_torch(), rtol=0, atol=1e-12)
    trained = client.forward_backward_custom(data, indexed_loss, loss_type_input=form)
    assert output.loss == pytest.approx(trained.result(SECONDS).loss, rel=1e-12)
    assert output.metrics["kl"] == output.loss


def test_forward_computes_only_the_rows_that_are_indexed(make_service, model_folder, random_data):
    client = connect(make_service, model_folder("qwen3"), False, "float32")
    scorer, rows = engine_of(client).scorer, []
    vocab_logprobs = scorer.vocab_logprobs
    scorer.vocab_logprobs = lambda hidden, *rest: (
        rows.append(len(hidden)) or vocab_logprobs(hidden, *rest)
    )
    data = candidates(random_data)
    client.forward(data, indexed_loss, loss_type_input="vocab_logprobs").result(SECONDS)
    assert sum(rows) == len(data)


def zero(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
    return torch.zeros(()), {}


def test_forward_with_a_loss_of_ones_own(make_service, model_folder, random_data):
    client = connect(make_service, model_folder("qwen3"), False, "float64")
    data = random_data(3)

    def squared(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        return sum((lp**2).sum() for lp in logprobs), {"count": len(data)}

    output = client.forward(data, squared).result(SECONDS)
    scored = client.forward(data, "cross_entropy").result(SECONDS)
    for own, builtin in zip(output.loss_fn_outputs, scored.loss_fn_outputs, strict=True):
        assert own["logprobs"].tolist() == builtin["logprobs"].tolist()
    backward = client.forward_backward_custom(data, squared).result(SECONDS)
    assert (output.loss, output.metrics["count"]) == (pytest.approx(backward.loss), 3.0)


def test_forward_refuses_what_does_not_go_together(make_service, model_folder, random_data):
    client = connect(make_service, model_folder("qwen3"), False, "float32")
    data = random_data(2)
    with pytest.raises(ConfigError, match=r"loss_type_input: only for your own loss"):
        client.forward(data, "cross_entropy", loss_type_input="vocab_logprobs")
    with pytest.raises(ConfigError, match=r"loss_fn_config: only for built-in losses.*partial"):
        client.forward(data, zero, {"clip_low_threshold": 0.8})
    with pytest.raises(ConfigError, match=r"loss_type_input: unknown.*hidden"):
        client.forward(data, zero, loss_type_input="hidden")  # pyright: ignore[reportArgumentType]

    def broken(data: list[Datum], logprobs: list[Any]) -> Any:
        raise KeyError("label")

    with pytest.raises(LossError, match=r"broken\(\).*label"):
        client.forward(data, broken, loss_type_input="vocab_logprobs").result(SECONDS)
    client.forward(data, zero).result(SECONDS)  # usable afterwards


# ---- operands on two devices --------------------------------------------------------------------

META = torch.device("meta")


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", requires_grad=True)


@pytest.mark.parametrize(
    ("use", "shape"),
    [
        (lambda x: torch.ones(6, 9) * x, (6, 9)),
        (lambda x: x.gather(1, torch.zeros(6, 2, dtype=torch.long)), (6, 2)),
        (lambda x: torch.nn.functional.cross_entropy(x, torch.zeros(6, dtype=torch.long)), ()),
        (lambda x: torch.where(torch.ones(6, 9) > 0, x, torch.zeros(6, 9)), (6, 9)),
        (lambda x: torch.stack([x[0], torch.ones(9)]), (2, 9)),
        (lambda x: torch.cat((torch.ones(1, 9), x)), (7, 9)),
        (lambda x: torch.nn.functional.kl_div(input=x, target=torch.ones(6, 9)), ()),
        (lambda x: x * 0.5 + torch.tensor(3.0), (6, 9)),
    ],
)
def test_operands_of_the_cpu_follow_the_logprobs_to_the_device(use: Any, shape: Any) -> None:
    """A stand-in without values, as there is no accelerator; the whole path, lazy rows included."""
    lazy = VocabLogprobs(on_meta(6, 4), lambda h: h @ torch.empty(4, 9, device="meta"), 9)
    plain = on_meta(6, 9)
    with OperandsFollow(META):
        for x in (lazy, plain):
            out = use(x)
            assert (tuple(out.shape), out.device, out.requires_grad) == (shape, META, True)


def test_without_it_torch_refuses() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(6, 9) * on_meta(6, 9)


def test_an_operation_in_place_stays_where_its_tensor_is() -> None:
    index = torch.zeros(6, dtype=torch.long)
    with OperandsFollow(META):
        total = torch.empty(6, device="meta")
        assert total.add_(torch.ones(6)) is total
        total += torch.ones(6)
        total[index > 0] = torch.ones(6)
        assert total.device == META


def test_errors_of_another_kind_are_as_torch_raises_them() -> None:
    with OperandsFollow(META):
        with pytest.raises(RuntimeError, match="must match the size"):
            torch.ones(3) + torch.ones(4)
        with pytest.raises(IndexError, match="out of bounds"):
            torch.ones(3)[5]
        with pytest.raises(TypeError, match="argument"):
            torch.softmax()
        assert torch.ones(2).numpy().tolist() == [1.0, 1.0]


def test_a_loss_that_runs_out_of_memory_says_so(
    make_service, model_folder, random_data, caplog
) -> None:
    """Not as a fault of the loss; nothing is accumulated, and fewer graphs are kept later."""
    client = connect(make_service, model_folder("qwen3"), False, "float32")
    data, engine = candidates(random_data), engine_of(client)
    calls: list[int] = []

    def hungry(data: list[Datum], logprobs: list[Any]) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee docs.")
        return indexed_loss(data, logprobs)

    form = "vocab_logprobs"
    engine.limits.graph_tokens = 10**9
    with pytest.raises(RequestError) as error:
        client.forward_backward_custom(data, hungry, loss_type_input=form).result(SECONDS)
    assert str(error.value).startswith("hungry(): ran out of memory. Expected a loss whose tensors")
    assert "got CUDA out of memory. Tried to allocate 9 GiB. Nothing was" in str(error.value)
    assert len(calls) == 1
    assert adapter_of(client).grads is None
    longest = max(d.model_input.length for d in data)
    assert engine.limits.limits(longest).graph_tokens < sum(d.model_input.length for d in data)
    client.forward_backward_custom(data, hungry, loss_type_input=form).result(SECONDS)
    assert len(take_gradient(client)) > 0


# ---- errors -------------------------------------------------------------------------------------


def test_what_cannot_work_says_so_and_changes_nothing(service, model_folder, random_data):
    client = service.create_lora_training_client(model_folder(), 4).result(SECONDS)
    data = candidates(random_data)
    with pytest.raises(ConfigError, match=r'"vocab_logprobs"'):
        client.forward_backward_custom(data, indexed_loss, loss_type_input="vocab_logprob")
    with pytest.raises(DatumError, match="target_tokens"):
        client.forward_backward_custom(data, indexed_loss)

    def divide(data: list[Datum], logprobs: list[Any]) -> Any:
        del data
        return logprobs[0][0].sum() + logprobs[2][1][3].sub(logprobs[2][1][3]).sqrt(), {}

    future = client.forward_backward_custom(data, divide, loss_type_input="vocab_logprobs")
    with pytest.raises(LossError, match=r"gradient of data\[2\] at position 1: not finite"):
        future.result(SECONDS)
    unused = client.forward_backward_custom(
        data,
        lambda d, lp: (torch.ones((), requires_grad=True), {}),
        loss_type_input="vocab_logprobs",
    )
    with pytest.raises(LossError, match="uses no datum"):
        unused.result(SECONDS)
    assert adapter_of(client).grads is None
