"""What `test_fuzz` draws its cases from: good values, nasty values, and good values gone wrong."""

from __future__ import annotations

import decimal
import fractions
import json
import math
from typing import Any

from cookbook_core import tinker

import numpy as np
import torch
from hypothesis import strategies as st

VOCAB, CONTEXT = 100, 256

# ---- values ----------------------------------------------------------------------------------

nasty_text = st.one_of(
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Zl", "Zp", "So"]), max_size=5),
    st.sampled_from(
        ["", " ", "\0", "a\0b", "\ud800", "\udcff", "nan", "inf", "-1", "~", "/", ".", "</s>"]
    ),
    st.sampled_from(["../..", "~nobody_here/x", "<|im_end|>", "{{ x }}", "\u2028"]),
    st.builds(lambda: "a" * 10_000),
    st.builds(lambda: "é" * 300),
)
numbers = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([VOCAB, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30, -(10**30), 10**400]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 5e-324, 1e-300, 1e-9, 1e39, 1e300, -1e300]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.floats(),
)
numpy_scalars = st.one_of(
    st.sampled_from([np.float16(1.5), np.float32("nan"), np.float64(2.0), np.longdouble(1)]),
    st.sampled_from([np.int64(3), np.int8(-1), np.uint64(2**63), np.bool_(True), np.complex64(1j)]),
    st.sampled_from([np.str_("a"), np.datetime64("2020-01-01")]),
)


class Opaque:
    """An object nothing can be done with."""

    def __repr__(self) -> str:
        return "Opaque()"


def odd_arrays() -> st.SearchStrategy[Any]:
    """Arrays and tensors of every dtype and odd shapes, made anew each time."""
    made: list[Any] = [
        lambda: np.zeros(0),
        lambda: np.ones(()),
        lambda: np.arange(3, dtype=np.uint64) + np.uint64(2**63),
        lambda: np.array([1.0, math.nan, 2.0], dtype=np.float16),
        lambda: np.array([1e39, 1.0, 2.0]),
        lambda: np.array(["a", "b", "c"]),
        lambda: np.array([None, 1, "x"], dtype=object),
        lambda: np.array([1j, 2, 3]),
        lambda: np.ones((3, 2, 2)),
        lambda: np.ones((3, 0)),
        lambda: np.ma.masked_array([1.0, 2.0, 3.0], mask=[0, 1, 0]),
        lambda: np.array([True, False, True]),
        lambda: torch.ones(3),
        lambda: torch.ones(3, requires_grad=True),
        lambda: torch.ones(3, dtype=torch.bfloat16),
        lambda: torch.ones(3, dtype=torch.complex64),
        lambda: torch.ones(3, dtype=torch.bool),
        lambda: torch.ones(3, dtype=torch.uint8),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.tensor(5),
        lambda: torch.full((3,), math.nan),
    ]
    return st.sampled_from(made).map(lambda make: make())


def odd_objects() -> st.SearchStrategy[Any]:
    made: list[Any] = [
        Opaque,
        lambda: Opaque,
        lambda: (x for x in [1, 2, 3]),
        lambda: {1, 2},
        lambda: range(3),
        lambda: memoryview(b"abc"),
        lambda: decimal.Decimal("NaN"),
        lambda: fractions.Fraction(1, 3),
        lambda: print,
        lambda: tinker.ModelInput.empty(),
        lambda: tinker.AdamParams(),
        lambda: tinker.TensorData([1.0, 2.0, 3.0], "float32"),
    ]
    return st.sampled_from(made).map(lambda make: make())


scalars = st.one_of(
    st.none(), st.booleans(), numbers, nasty_text, st.binary(max_size=5), numpy_scalars
)
nested = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(nasty_text, st.integers(0, 3)), inner, max_size=3),
    ),
    max_leaves=6,
)
junk = st.one_of(nested, odd_arrays(), odd_objects())


def rare(odds: int) -> st.SearchStrategy[bool]:
    """True one time in `odds` + 1. (Not at 0, nor at the end: hypothesis is fond of those.)"""
    return st.integers(0, odds).map(lambda i: i == (2 * odds) // 3)


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any] = junk, odds: int = 3) -> Any:
    """`good`, and one time in `odds` + 1 `bad`."""
    return rare(odds).flatmap(lambda wrong: bad if wrong else good)


# ---- datums ----------------------------------------------------------------------------------

tokens = mostly(st.integers(0, VOCAB - 1), st.sampled_from([-1, VOCAB]), 200)
token_lists = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
floats = st.floats(-3, 3, width=32)
lengths = st.integers(0, 12)


@st.composite
def arrays(draw: Any, n: int, of: st.SearchStrategy[Any], k: int | None = None) -> Any:
    """n numbers, or [n, k] of them, as a list, array, tensor or TensorData; now and then not so."""
    n = max(0, n + (draw(st.sampled_from([-1, 1])) if draw(rare(15)) else 0))
    k = draw(st.sampled_from([None, 1, 2])) if draw(rare(15)) else k
    row = of if k is None else st.lists(of, min_size=k, max_size=k)
    values = draw(st.lists(row, min_size=n, max_size=n))
    if n and draw(rare(19)):
        values[draw(st.integers(0, n - 1))] = draw(nested)
    form = draw(st.sampled_from(["list", "list", "numpy", "torch", "TensorData"]))
    try:
        if form == "numpy":
            return np.array(values)
        if form == "torch":
            return torch.tensor(values)
        if form == "TensorData":
            dtype = draw(st.sampled_from(["float32", "int64", "float64"]))
            return tinker.TensorData(values, dtype)
    except Exception:  # values that this form cannot hold
        return values
    return values


@st.composite
def loss_inputs(draw: Any, n: int) -> Any:
    """loss_fn_inputs for n positions, as they should be or nearly."""
    k = draw(st.sampled_from([None, None, None, 1, 3]))
    inputs: dict[Any, Any] = {"target_tokens": draw(arrays(n, tokens, k))}
    for key in ("weights", "logprobs", "advantages", "score_mask", "mine", "ref_logprobs"):
        if draw(rare(2)):
            mask = key == "score_mask"
            of = st.sampled_from([0, 1]) if mask else st.one_of(floats, st.just(0.0))
            inputs[key] = draw(arrays(n, of, None if mask else k))
    if draw(rare(19)):
        inputs.pop("target_tokens")
    if draw(rare(9)):
        inputs[draw(st.one_of(nasty_text, st.sampled_from(["weights", 3, None])))] = draw(junk)
    return inputs


@st.composite
def model_inputs(draw: Any, n: int) -> Any:
    """Arguments of a ModelInput, as a function that makes it."""
    ids = draw(st.lists(tokens, min_size=n, max_size=n))
    if ids and draw(rare(19)):
        ids[draw(st.integers(0, n - 1))] = draw(scalars)
    form = draw(st.sampled_from(["chunks", "other chunks", "bare"])) if draw(rare(9)) else "whole"
    if form == "chunks":
        rest = draw(mostly(st.just(ids[1:]), junk, 2))
        return lambda: tinker.ModelInput([*map(tinker.EncodedTextChunk, (ids[:1], rest))])
    if form == "other chunks":
        chunks = draw(junk)
        return lambda: tinker.ModelInput(chunks)
    if form == "bare":
        return lambda: ids  # not a ModelInput at all
    return lambda: tinker.ModelInput.from_ints(ids)


@st.composite
def datums(draw: Any) -> Any:
    """A function that makes a datum, or fails to."""
    n = draw(st.one_of(st.integers(1, 12), lengths))
    make_input, inputs = draw(model_inputs(n)), draw(loss_inputs(n))
    if draw(rare(19)):
        inputs = draw(junk)
    return lambda: tinker.Datum(make_input(), inputs)


@st.composite
def good_datums(draw: Any, k: bool = True) -> tinker.Datum:
    """A datum that can be trained on; weights may be all zero."""
    n = draw(st.integers(1, 12))
    ids = st.integers(0, VOCAB - 1)
    shape: tuple[int, ...] = (n,)
    if k and (width := draw(st.sampled_from([None, None, 1, 3]))):
        shape = (n, width)
    flat = st.lists(ids, min_size=math.prod(shape), max_size=math.prod(shape))
    inputs: dict[str, Any] = {"target_tokens": np.array(draw(flat)).reshape(shape)}
    for key in ("weights", "logprobs", "advantages"):
        if key != "weights" or draw(st.booleans()):
            values = draw(st.lists(floats, min_size=n, max_size=n))
            column = np.array(values, dtype=np.float32).reshape((n,) + (1,) * (len(shape) - 1))
            inputs[key] = np.broadcast_to(column, shape)
    if draw(rare(3)):
        inputs["score_mask"] = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    return tinker.Datum(
        tinker.ModelInput.from_ints(draw(st.lists(ids, min_size=n, max_size=n))), inputs
    )


# ---- losses ----------------------------------------------------------------------------------


class _Silent(torch.autograd.Function):
    """A backward that fails without a word."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError


def _raise(error: BaseException) -> Any:
    raise error


def _called_backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss


def _in_place(lp: Any) -> Any:
    lp[0].mul_(2)
    return lp[0].sum()


def _behind_its_back(lp: Any) -> Any:
    lp[0].data.mul_(0)
    return lp[0].sum()


def _emptied(data: Any, lp: Any) -> Any:
    total = sum(x.sum() for x in lp)
    lp.clear()
    data.clear()
    return total


SUMS: dict[str, Any] = {  # (data, logprobs) -> what stands in the place of the loss
    "sum": lambda d, lp: sum(x.sum() for x in lp),
    "mean": lambda d, lp: torch.cat([x.reshape(-1) for x in lp]).mean(),
    "first only": lambda d, lp: lp[0].sum(),
    "last only": lambda d, lp: (lp[-1] ** 2).sum(),
    "double": lambda d, lp: lp[0].double().sum(),
    "half": lambda d, lp: lp[0].half().sum(),
    "int": lambda d, lp: lp[0].sum().long(),
    "complex": lambda d, lp: lp[0].sum() * 1j,
    "bool": lambda d, lp: lp[0].sum() > 0,
    "meta": lambda d, lp: torch.ones((), device="meta"),
    "vector": lambda d, lp: lp[0],
    "one element": lambda d, lp: lp[0].sum()[None],
    "empty": lambda d, lp: lp[0].reshape(-1)[:0],
    "detached": lambda d, lp: lp[0].sum().detach(),
    "float": lambda d, lp: lp[0].sum().item(),
    "numpy": lambda d, lp: lp[0].detach().numpy().sum(),
    "NaN": lambda d, lp: lp[0].sum() * math.nan,
    "inf": lambda d, lp: lp[0].sum() * math.inf,
    "log of 0": lambda d, lp: (lp[-1] * 0).log().sum(),
    "sqrt of 0": lambda d, lp: (lp[-1] * 0).sqrt().sum() + lp[0].sum(),
    "huge": lambda d, lp: lp[0].sum() * 1e37,
    "huger": lambda d, lp: (lp[0] * 1e30).square().sum(),
    "tiny": lambda d, lp: lp[0].sum() * 1e-45,
    "constant": lambda d, lp: torch.ones((), requires_grad=True) * 2,
    "zero times": lambda d, lp: lp[0].sum() * 0,
    "raises": lambda d, lp: _raise(KeyError("mine")),
    "raises nothing": lambda d, lp: _raise(ValueError()),
    "raises an index": lambda d, lp: lp[len(lp)],
    "raises recursion": lambda d, lp: _raise(RecursionError()),
    "stops": lambda d, lp: _raise(StopIteration(3)),
    "asserts": lambda d, lp: _raise(AssertionError("a\nb\n\nc")),
    "missing input": lambda d, lp: d[0].loss_fn_inputs["nothing"],
    "silent backward": lambda d, lp: _Silent.apply(lp[0].sum()),
    "backward": lambda d, lp: _called_backward((lp[0] ** 2).sum()),
    "grad inside": lambda d, lp: torch.autograd.grad((lp[0] ** 2).sum(), lp[0])[0].sum(),
    "second order": lambda d, lp: torch.autograd.grad((lp[0] ** 2).sum(), lp[0], create_graph=True)[
        0
    ].sum(),
    "in place": lambda d, lp: _in_place(lp),
    "behind its back": lambda d, lp: _behind_its_back(lp),
    "empties its arguments": _emptied,
    "no grad": lambda d, lp: torch.no_grad()(lambda: lp[0].sum())(),
    "inference": lambda d, lp: torch.inference_mode()(lambda: lp[0].sum())(),
    "sparse": lambda d, lp: lp[0].reshape(-1).to_sparse().sum(),
    "a metric's place": lambda d, lp: {},
    "logprobs": lambda d, lp: lp,
    "None": lambda d, lp: None,
}

metric_values = st.one_of(
    scalars,
    odd_arrays(),
    st.sampled_from([[], [1], {}, Opaque(), decimal.Decimal("NaN"), fractions.Fraction(1, 3)]),
)
metrics = st.one_of(
    st.just({}),
    st.dictionaries(st.sampled_from(["a", "b", "loss", "loss:sum", "passes"]), metric_values),
    st.dictionaries(st.one_of(nasty_text, st.integers(), st.none()), numbers, max_size=2),
    nested,
)


@st.composite
def losses(draw: Any) -> Any:
    """A loss function, good or bad, or something that is none."""
    if draw(rare(19)):
        return draw(junk)
    name = draw(st.sampled_from(sorted(SUMS)))
    if draw(st.booleans()):
        name = draw(st.sampled_from(["sum", "mean", "first only", "second order", "double"]))
    own, shape = (
        draw(mostly(st.just({"mine": 1.5}), metrics, 1)),
        draw(st.sampled_from([None] * 9 + ["bare", "list", "three"])),
    )

    def loss_fn(data: Any, logprobs: Any) -> Any:
        loss = SUMS[name](data, logprobs)
        if shape == "bare":
            return loss
        if shape == "list":
            return [loss, own]
        if shape == "three":
            return loss, own, 1
        return loss, own

    loss_fn.__name__ = f"loss of {name}"
    return (lambda: None) if draw(rare(30)) else loss_fn


# ---- rows of datasets ------------------------------------------------------------------------

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 12),
        st.sampled_from([10**30, 10**400, 1e300, math.nan, math.inf, 0.5]),
        nasty_text,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(nasty_text, inner, max_size=3)
    ),
    max_leaves=5,
)
words = mostly(st.sampled_from(["2 + 3 =", " 5", "good", "a b"]), nasty_text, 15)


@st.composite
def messages(draw: Any, last: str) -> Any:
    """A conversation that ends with a message of role `last`, or nearly."""
    roles = draw(st.sampled_from([[], ["system"], ["user", "assistant"]]))
    roles = [*roles, "user", "assistant"] if last == "both" else [*roles, last]
    found: list[Any] = [{"role": role, "content": draw(words)} for role in roles]
    if draw(rare(9)):
        entry = draw(st.sampled_from(found))
        keys = st.sampled_from(["role", "content", "weight", "tool_calls", "x"])
        entry[draw(keys)] = draw(st.one_of(json_values, st.sampled_from(["tool", "user", 1, 0])))
    elif draw(rare(19)):
        found.insert(draw(st.integers(0, len(found))), draw(json_values))
    return found


def text_or(last: str, chats: bool) -> st.SearchStrategy[Any]:
    good = messages(last) if chats else words
    return mostly(good, json_values, 15)


@st.composite
def rows(draw: Any, recipe: str, chats: bool = True) -> dict[str, Any]:
    """A row as the recipe wants it, or nearly so."""
    user, answer = text_or("user", chats), text_or("assistant", chats)
    if recipe == "sft" and chats and draw(st.booleans()):
        row = {"messages": draw(text_or("both", True))}
    elif recipe == "sft":
        row = {"prompt": draw(user), "completion": draw(answer)}
    elif recipe in ("dpo", "bradley_terry"):
        row = {"prompt": draw(user), "chosen": draw(answer), "rejected": draw(answer)}
    elif recipe == "grpo":
        row = {"prompt": draw(user), "answer": draw(mostly(words, json_values))}
    elif chats:
        labels = st.sampled_from([" good", "good", " fair"])
        row = {"question": draw(words), "answer": draw(mostly(labels, json_values))}
    else:
        shares = st.sampled_from([[0, 0, 1, 0, 0], [0.2] * 5, [0.5, 0.25, 0.25, 0, 0]])
        wrong = st.one_of(json_values, st.sampled_from([[1e308] * 5, "01000", [10**400] * 5]))
        row = {"text": draw(words), "label_probs": draw(mostly(shares, wrong, 7))}
    if draw(rare(19)):
        row.pop(draw(st.sampled_from(sorted(row))))
    if draw(rare(19)):
        row[draw(nasty_text)] = draw(json_values)
    return row


@st.composite
def files(draw: Any, recipe: str) -> tuple[str, bytes]:
    """(suffix, bytes) of a dataset file: whole, or damaged."""
    chats = draw(st.booleans())
    held = draw(st.lists(rows(recipe, chats), min_size=2, max_size=5))
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".parquet"]))
    if suffix == ".csv":
        columns = list(held[0]) or ["prompt"]
        lines = [columns, *([str(row.get(c, "")) for c in columns] for row in held)]
        text = "\n".join(",".join('"' + x.replace('"', '""') + '"' for x in line) for line in lines)
    elif suffix == ".json":
        text = json.dumps(held)
    else:
        lines = [json.dumps(row) for row in held]
        if draw(rare(9)):
            odd = ["[", "9", "NaN", '"a"', "{", "{}", "[]", "null", '{"a":1}}']
            times = draw(st.sampled_from([1, 5_000, 100_000]))
            lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(odd)) * times)
        text = "\n".join(lines)
    body = text.encode("utf-8", "surrogatepass")
    if draw(rare(9)):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=3)) + body[at + draw(st.integers(0, 4)) :]
    return suffix, body
