"""Uploaded losses: a torch.fx graph as data, run from a list of allowed operations.

The SDK's `create_custom_loss` traces a loss of one datum, f(logprobs, *inputs) -> (loss, metrics),
and sends the graph's nodes. Here the graph is walked with torch's own functions: nothing is
evaluated, imported or looked up by name outside the lists below. Losses of datums are summed;
metrics are summed, or averaged where their name ends in ":mean", as the SDK does itself.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from cookbook_core.errors import DatumError, LossError, RequestError, check_choice
from cookbook_core.serve.fields import Fields
from cookbook_core.types import Datum

if TYPE_CHECKING:
    import torch

MOST_NODES = 2000
MOST_ELEMENTS = 1 << 24
"""Numbers of one intermediate tensor."""
MOST_SECONDS = 20.0
"""For the whole batch: the loss occupies the queue of every client."""
MOST_INPUTS = 16
DEEPEST = 16
"""Nesting of an argument."""

_TORCH = """abs acos add all any asin atan atan2 bmm cat ceil clamp clamp_max clamp_min clip concat
 cos cosh cummax cummin cumprod cumsum detach diff div dot eq erf erfc exp exp2 expm1 flatten flip
 floor frac ge gather gt index_select isfinite isinf isnan le lerp log log10 log1p log2 logaddexp
 logcumsumexp logical_and logical_not logical_or logical_xor logsumexp log_softmax lt masked_fill
 matmul max maximum mean median min minimum mm movedim mul nan_to_num narrow ne neg norm ones_like
 outer permute pow prod reciprocal relu remainder reshape roll round rsqrt select sigmoid sign sin
 sinh softmax sort split sqrt square squeeze stack std sub sum swapaxes take_along_dim tan tanh topk
 transpose tril triu trunc unbind unsqueeze var where xlogy zeros_like full_like""".split()
_FUNCTIONAL = """gelu hardtanh huber_loss l1_loss leaky_relu log_softmax logsigmoid mse_loss relu
 sigmoid silu smooth_l1_loss softmax softplus tanh elu""".split()
_OPERATORS = """abs add and_ eq floordiv ge getitem gt invert le lt matmul mod mul ne neg not_ or_
 pos pow sub truediv xor""".split()
_MATH = "exp log log1p log2 pow sqrt tanh floor ceil fabs".split()
_METHODS = [*_TORCH, *"""bool cpu contiguous dim double expand expand_as float int long numel size t
 to type_as view view_as clone eq ne mT""".split()]  # fmt: skip
_DTYPES = ("float32", "float64", "int64", "bool")


@cache
def _functions() -> Mapping[str, Callable[..., Any]]:
    import torch
    import torch.nn.functional as functional

    found = {f"torch.{name}": getattr(torch, name) for name in _TORCH if hasattr(torch, name)}
    for name in _FUNCTIONAL:
        found[f"torch.nn.functional.{name}"] = getattr(functional, name)
    found["torch._C._nn.softplus"] = functional.softplus
    found["torch._C._nn.log_sigmoid"] = functional.logsigmoid
    found["torch._C._nn.gelu"] = functional.gelu
    found |= {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    return found | {f"math.{name}": getattr(math, name) for name in _MATH}


Argument = Callable[[Mapping[str, Any]], Any]
"""Makes an argument from the results of the nodes before it, by name."""


@dataclass(frozen=True)
class _Node:
    op: str
    name: str
    target: str
    args: Argument
    kwargs: Argument


class GraphLoss:
    """A custom loss made from the JSON of `create_custom_loss`; call it as any loss.

    Args:
        body: the fields "name", "inputs" and "graph".

    Raises:
        RequestError: not such a graph, or an operation that is not allowed; names the node.
    """

    def __init__(self, body: Fields) -> None:
        self.__name__ = body.text("name")
        names = [Fields(item, f"inputs[{i}]") for i, item in enumerate(body.items("inputs"))]
        self._inputs = [item.text("name") for item in names]
        self._ranks = [item.integer("rank") for item in names]
        for item in names:
            item.end()
        graph = body.inner("graph")
        graph.take("format", "1", lambda value: value == 1)
        given = graph.items("nodes")
        graph.end()
        if not 1 <= len(self._inputs) <= MOST_INPUTS or self._inputs[0] != "logprobs":
            rule = f'"logprobs" and up to {MOST_INPUTS - 1} names of loss_fn_inputs'
            fix = "Make logprobs the first parameter of the loss."
            got = self._inputs[:20]
            raise RequestError("inputs", "not usable", expected=rule, got=got, fix=fix)
        if not 1 <= len(given) <= MOST_NODES:
            rule = f"1 to {MOST_NODES} nodes"
            what, fix = "too many or none", "Pass the function to forward_backward_custom()."
            raise RequestError("graph.nodes", what, expected=rule, got=len(given), fix=fix)
        self._nodes: list[_Node] = []
        for i, item in enumerate(given):
            self._nodes.append(self._node(item, f"graph.nodes[{i}]"))
        placeholders = [node.target for node in self._nodes if node.op == "placeholder"]
        if placeholders != self._inputs:
            what, fix = "placeholders are not the inputs", "Send the graph as it was traced."
            rule, got = self._inputs, placeholders[:20]
            raise RequestError("graph.nodes", what, expected=rule, got=got, fix=fix)
        if [node.op for node in self._nodes].index("output") != len(self._nodes) - 1:
            raise RequestError("graph.nodes", "output is not the last node")

    @property
    def needs(self) -> list[str]:
        """Names of the loss_fn_inputs that every datum must have."""
        return ["target_tokens", *self._inputs[1:]]

    def _node(self, item: Any, where: str) -> _Node:
        """A node that uses earlier ones only, and an operation of the lists."""
        body, known = Fields(item, where), {node.name for node in self._nodes}
        op, name, target = body.text("op"), body.text("name"), body.text("target")
        args = _argument(body.items("args", []), known, where)
        kwargs = _argument({"dict": body.mapping("kwargs", {})}, known, where)
        body.end()
        ops = ("placeholder", "call_function", "call_method", "output")
        check_choice(RequestError, f"{where}.op", "not allowed in a loss", op, ops)
        allowed = {"call_function": _functions(), "call_method": _METHODS}
        if op in allowed and target not in allowed[op]:
            what = "this operation is not among those that a loss may use here"
            got = f"{op} in node {name!r}"
            fix = "Compute it another way, or pass the function to forward_backward_custom()."
            raise RequestError(f"{self.__name__}: {target}", what, got=got, fix=fix)
        return _Node(op, name, target, args, kwargs)

    def __call__(
        self, data: Sequence[Datum], logprobs: Sequence[torch.Tensor]
    ) -> tuple[Any, dict[str, float]]:
        """Sum the loss over the datums; see the module for metrics.

        Raises:
            DatumError: an input is missing or has another rank than the loss declared.
            LossError: wrong return structure, or beyond the limits of time or size.
        """
        deadline = time.monotonic() + MOST_SECONDS
        total: Any = None
        sums: dict[str, float] = {}
        for i, (datum, own) in enumerate(zip(data, logprobs, strict=True)):
            values = [own, *(self._input(datum, i, name) for name in self._inputs[1:])]
            for name, rank, value in zip(self._inputs, self._ranks, values, strict=True):
                if value.dim() != rank:
                    at, got = f"data[{i}]: {name}", f"shape {tuple(value.shape)}"
                    fix = "Declare the rank that the data have in create_custom_loss()."
                    raise DatumError(at, "wrong rank", expected=rank, got=got, fix=fix)
            loss, metrics = self._run(values, deadline)
            total = loss if total is None else total + loss
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        means = {k: v / len(data) if k.endswith(":mean") else v for k, v in sums.items()}
        return total, means

    def _input(self, datum: Datum, i: int, name: str) -> torch.Tensor:
        value = datum.loss_fn_inputs.get(name)
        if value is None:
            where = f'data[{i}].loss_fn_inputs["{name}"]'
            raise DatumError(where, "missing", fix=f"The loss {self.__name__} takes it.")
        return value.to_torch()

    def _run(self, values: list[torch.Tensor], deadline: float) -> tuple[Any, dict[str, Any]]:
        results: dict[str, Any] = {}
        given = iter(values)
        for node in self._nodes:
            if time.monotonic() > deadline:
                got = f"more than {MOST_SECONDS:.0f} s for the batch"
                raise LossError(self.__name__, "the loss takes too long", got=got)
            if node.op == "placeholder":
                results[node.name] = next(given)
                continue
            args = node.args(results)
            if node.op == "output":
                return self._returned(args[0])
            kwargs = node.kwargs(results)
            self._check_size(node, [*args, *kwargs.values()])
            if node.op == "call_function":
                result = _functions()[node.target](*args, **kwargs)
            else:
                result = self._method(node, args, kwargs)
            results[node.name] = result
        raise AssertionError("the last node is the output")

    def _method(self, node: _Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        import torch

        if not args or not isinstance(args[0], torch.Tensor):
            raise LossError(self.__name__, f"{node.target} is called on something else")
        return getattr(args[0], node.target)(*args[1:], **kwargs)

    def _returned(self, value: Any) -> tuple[Any, dict[str, Any]]:
        import torch

        pair = isinstance(value, (tuple, list)) and len(value) == 2
        loss, metrics = value if pair else (None, None)
        if not isinstance(loss, torch.Tensor) or loss.dim() or not isinstance(metrics, dict):
            rule, got = "(0-d tensor, dict of 0-d tensors)", f"{type(value).__name__}"
            what, fix = "wrong return structure", "End the loss with `return loss, metrics`."
            raise LossError(self.__name__, what, expected=rule, got=got, fix=fix)
        out = {}
        for key, metric in metrics.items():
            metric = metric.detach() if isinstance(metric, torch.Tensor) else metric
            if getattr(metric, "numel", lambda: 1)() != 1 or key.count(":") != 1:
                rule = 'a number under a name such as "custom/x:mean"'
                raise LossError(f'{self.__name__} metrics["{key}"]', "not usable", expected=rule)
            out[key] = metric
        return loss, out

    def _check_size(self, node: _Node, args: list[Any]) -> None:
        """Raise LossError if the operation could make more than MOST_ELEMENTS numbers."""
        most = _most_elements(node.target.rpartition(".")[2], args)
        if most > MOST_ELEMENTS:
            where = f"{self.__name__}: {node.name}"
            rule = f"at most {MOST_ELEMENTS} numbers"
            what, fix = "the result would be too large", "Reduce earlier, or send shorter datums."
            raise LossError(where, what, expected=rule, got=most, fix=fix)


def _most_elements(operation: str, args: list[Any]) -> int:
    """A bound on the numbers, or views, that an operation makes, from its arguments' sizes."""
    import torch

    tensors = list(_flat(args, torch.Tensor))
    sizes = [tensor.numel() for tensor in tensors]
    if not tensors:
        return _most_digits(operation, args)
    if operation == "expand":
        return math.prod(abs(size) or 1 for size in _flat(args[1:], int)) * max(sizes)
    if operation == "outer":
        return math.prod(sizes)
    if operation in ("matmul", "mm", "bmm") and len(tensors) == 2 and all(sizes):
        one, other = tensors
        columns = other.shape[-1] if other.dim() > 1 else 1
        batch = math.prod(other.shape[:-2])
        return one.numel() // (one.shape[-1] if one.dim() else 1) * columns * batch
    if operation in ("split", "unbind"):
        return 256 * max(tensors[0].shape, default=1)  # a view costs about as much as that
    if operation == "getitem":
        first, indices = tensors[0], [t for t in tensors[1:] if t.dtype != torch.bool]
        rows = max([t.numel() for t in indices], default=0) ** min(len(indices), 2)
        return max(first.numel(), rows * (first.numel() // max(1, (*first.shape, 1)[0])))
    if operation in ("index_select", "take_along_dim", "gather"):
        return math.prod(size or 1 for size in sizes) if operation == "index_select" else max(sizes)
    try:
        return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    except RuntimeError:  # not elementwise: nothing else here makes more than it takes
        return sum(sizes)


def _most_digits(operation: str, args: list[Any]) -> int:
    """The same for operations on Python's numbers, whose integers have no limit, and lists."""
    integers = [arg for arg in args if type(arg) is int]
    if operation == "pow" and len(integers) == 2:
        return integers[0].bit_length() * abs(integers[1])
    if operation in ("mul", "add", "mod") and any(isinstance(a, (str, list, tuple)) for a in args):
        return MOST_ELEMENTS + 1  # repeats or joins a list
    return sum(integer.bit_length() for integer in integers) * (MOST_ELEMENTS // 1024)


def _flat(value: Any, kind: type) -> Any:
    """All values of a type in nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item, kind)
    elif isinstance(value, kind) and not isinstance(value, bool):
        yield value


# ---- arguments -----------------------------------------------------------------------------------


def _argument(value: Any, known: AbstractSet[str], where: str, depth: int = 0) -> Argument:
    """An argument from its JSON: a constant, a list of arguments, or an object of one key.

    Args:
        value: the JSON.
        known: names of the nodes that it may use.
        where: the node, in errors.
        depth: of its nesting.

    Raises:
        RequestError: a form that no argument has, an unknown node, or nested too deeply.
    """
    if depth > DEEPEST:
        raise RequestError(where, "arguments nested too deeply", expected=f"{DEEPEST} levels")

    def inner(part: Any) -> Argument:
        return _argument(part, known, where, depth + 1)

    if isinstance(value, list):
        items = [inner(item) for item in value]
        return lambda results: [item(results) for item in items]
    if not isinstance(value, dict):
        return lambda _: value
    match list(value.items()):
        case [("ref", name)]:
            if not isinstance(name, str) or name not in known:
                raise RequestError(where, "uses a node that is not before it", got=name)
            return lambda results: results[name]
        case [("tuple", list() as given)]:
            listed = inner(given)
            return lambda results: tuple(listed(results))
        case [("dict", dict() as given)]:
            parts = {key: inner(part) for key, part in given.items()}
            return lambda results: {key: part(results) for key, part in parts.items()}
        case [("slice", [start, stop, step])]:
            ends = inner([start, stop, step])
            return lambda results: slice(*ends(results))
        case [("ellipsis", _)]:
            return lambda _: ...
        case [("float", "inf" | "-inf" | "nan" as text)]:
            return lambda _: float(text)
        case [("dtype", name)]:
            check_choice(RequestError, f"{where}: dtype", "not allowed in a loss", name, _DTYPES)
            return lambda _: _torch_dtype(name)
        case [("device", _)]:
            return lambda _: "cpu"
    rule = "ref, tuple, dict, slice, ellipsis, float, dtype or device"
    got, fix = f"{value!r:.80}", "Send arguments as the SDK encodes them."
    raise RequestError(where, "unknown argument", expected=rule, got=got, fix=fix)


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
