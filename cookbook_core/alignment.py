"""Check that weights and logprobs have equal length, then sum or average them.

Guides teach to cut weights and logprobs to the shorter of the two. That hides the shift bug it
was written for: a weight falls off one end and the objective changes silently. Here unequal
lengths are an error, and cutting is an option that refuses to drop a non-zero weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from cookbook_core.datums import missing_input
from cookbook_core.errors import ConfigError, DatumError, check_choice, raise_all
from cookbook_core.types import Datum, TensorData
from cookbook_core.types.tensors import to_array

import numpy as np

if TYPE_CHECKING:
    import torch

Alignment = Literal["strict", "min_length"]


def input_tensor(datum: Datum, key: str, like: torch.Tensor) -> torch.Tensor:
    """`datum.loss_fn_inputs[key]` as a tensor of its own shape, in the dtype and device of `like`.

    Raises:
        DatumError: the datum has no such input; names those it has.
    """
    value = datum.loss_fn_inputs.get(key)
    if value is None:
        raise missing_input("", datum, key)
    return _tensor(value, like, f'loss_fn_inputs["{key}"]')


def input_tensors(data: Sequence[Datum], key: str) -> list[torch.Tensor]:
    """`loss_fn_inputs[key]` of every datum as CPU tensors, shape and dtype unchanged.

    Raises:
        DatumError: a datum has no such input.
    """
    missing = [
        missing_input(f"data[{i}]", datum, key)
        for i, datum in enumerate(data)
        if key not in datum.loss_fn_inputs
    ]
    raise_all(missing)
    return [datum.loss_fn_inputs[key].to_torch() for datum in data]


def align_weights(
    logprobs: torch.Tensor,
    weights: Any,
    mode: Alignment = "strict",
    *,
    allow_dropped_weights: bool = False,
    where: str = "weights",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair logprobs `(N,)` or `(N, K)` with weights of the same length.

    Args:
        logprobs: nats; gradient flows through the returned tensor.
        weights: TensorData, tensor, array or list; `(N,)`, or `(N, K)` beside `(N, K)` logprobs.
        mode: "strict" requires equal lengths; "min_length" cuts the end of the longer one.
        allow_dropped_weights: let "min_length" cut off weights that are not zero.
        where: how to name the weights in an error.
    Returns:
        (logprobs, weights) of equal length, weights in the dtype and device of logprobs.
    Raises:
        DatumError: lengths differ (strict), or the cut would drop a non-zero weight.
        ConfigError: unknown mode.
    """
    check_choice(ConfigError, "mode", "unknown", mode, ("strict", "min_length"))
    w = _tensor(weights, logprobs, where)
    if w.dim() == 0:
        raise DatumError(
            where,
            "not one per logprob",
            expected=f"{len(logprobs)} values",
            got="a single number",
            fix="Pass one weight per token; multiply the loss by a number instead.",
        )
    n = min(len(w), len(logprobs))
    if len(w) != len(logprobs) and mode == "strict":
        raise DatumError(
            where,
            "length does not match logprobs",
            expected=f"{len(logprobs)} (len of logprobs)",
            got=len(w),
            fix="Build datums with datum_from_tokens_weights(), which shifts both together, or "
            'pass mode="min_length".',
        )
    if bool((w[n:] != 0).any()) and not allow_dropped_weights:
        at = n + int((w[n:] != 0).reshape(len(w) - n, -1).any(1).nonzero()[0])
        raise DatumError(
            f"{where}[{at}]",
            "cutting to the shorter length would drop a non-zero weight",
            expected=f"zeros after position {n - 1}",
            got=float(w[at].reshape(-1)[0]),
            fix="That token would silently leave the objective: fix the shift, or pass "
            "allow_dropped_weights=True.",
        )
    if w.dim() > 1 and w[:n].shape != logprobs[:n].shape:
        raise DatumError(
            where,
            "shape does not match logprobs",
            expected=tuple(logprobs.shape),
            got=tuple(w.shape),
            fix="Pass one weight per position, or one per candidate.",
        )
    return logprobs[:n], w[:n]


def check_alignment(
    data: Sequence[Datum], logprobs_list: Sequence[torch.Tensor], *keys: str
) -> None:
    """Check that each named input of each datum has one entry per logprob.

    Args:
        data: D datums.
        logprobs_list: D tensors `(N_i,)` or `(N_i, K)`, nats.
        keys: names of inputs with N_i rows each.
    Raises:
        DatumError: no datum, another number of logprobs than datums, or the misaligned and missing
            inputs of all datums, with index, field and lengths. Five are listed.
    """
    problems = []
    if not data:
        fix = "Skip the step if no datum is left."
        raise DatumError("data", "empty", expected="at least one Datum", got=0, fix=fix)
    if len(data) != len(logprobs_list):
        raise DatumError(
            "logprobs_list",
            "not one per datum",
            expected=len(data),
            got=len(logprobs_list),
            fix="Pass both lists as the loss receives them.",
        )
    for i, (datum, logprobs) in enumerate(zip(data, logprobs_list, strict=True)):
        for key in keys:
            value = datum.loss_fn_inputs.get(key)
            fix = f"Pass {key}=values to datum_from_prompt_completion(), which shifts them."
            if value is None:
                problems.append(missing_input(f"data[{i}]", datum, key))
            elif (shape := value.to_numpy().shape)[:1] != (len(logprobs),):
                problems.append(
                    DatumError(
                        f'data[{i}].loss_fn_inputs["{key}"]',
                        "length does not match logprobs",
                        expected=f"{len(logprobs)} (len of logprobs)",
                        got=shape[0] if shape else "a single number",
                        fix=fix,
                    )
                )
    raise_all(problems)


def check_rows(where: str, tables: Sequence[Any], count: int) -> None:
    """Check that each tensor has `count` rows.

    Raises:
        DatumError: one has another number of rows, or is no tensor.
    """
    for i, table in enumerate(tables):
        shape = getattr(table, "shape", None)
        if shape is None or tuple(shape)[:1] != (count,):
            got = type(table).__name__ if shape is None else f"shape {tuple(shape)}"
            rule = f"a tensor of {count} rows, one for each row of logprobs"
            raise DatumError(f"map_rows(): {where}[{i}]", "misaligned", expected=rule, got=got)


def map_rows(
    fn: Callable[..., Any], logprobs: Any, *others: Any, rows: torch.Tensor | None = None
) -> Any:
    """Apply a function to some rows of a table of logprobs, in little memory.

    Of rows that a loss gets as "vocab_logprobs" on this machine only a few are in memory at a time,
    in the backward too: see `VocabLogprobs.map`. A plain tensor is mapped in one piece.

    Args:
        fn: `fn(logprobs, *others)` takes logprobs `(r, V)`, nats, and the same r rows of each of
            the others; it returns a tensor of r rows, such as `(r,)`, or a tuple of such tensors.
            Each row of a result depends on the same row of the arguments alone.
        logprobs: `(N, V)`, nats; gradient flows here.
        *others: tensors of R rows, such as targets `(R,)` or a teacher's logprobs `(R, V)`.
        rows: positions `(R,)`, or a mask `(N,)`; None: all N.
    Returns:
        The results of all R rows, in order.
    Raises:
        DatumError: one of the others, or a result, has another number of rows.

    >>> import torch
    >>> table = torch.log_softmax(torch.zeros(3, 4), -1)
    >>> map_rows(lambda lp: -(lp.exp() * lp).sum(-1), table, rows=torch.tensor([0, 2]))
    tensor([1.3863, 1.3863])
    """
    if hasattr(logprobs, "map"):
        return (logprobs if rows is None else logprobs.subset(rows)).map(fn, *others)
    own = logprobs if rows is None else logprobs[rows]
    check_rows("others", others, len(own))
    result = fn(own, *(other[:].to(own.device) for other in others))
    check_rows("result of fn", result if isinstance(result, tuple) else (result,), len(own))
    return result


def columns(
    data: Sequence[Datum], values: Sequence[torch.Tensor] | str, *keys: str
) -> list[torch.Tensor]:
    """Concatenate the values of all datums, then each named input in the same way.

    Args:
        data: D datums.
        values: D tensors `(N_i,)`, such as the logprobs of a loss, or the name of an input.
        keys: names of inputs, each `(N_i,)`.
    Returns:
        1 + len(keys) tensors `(sum of N_i,)` in the dtype of the values; gradient flows through
        the first.
    Raises:
        DatumError: an input is missing, or has another length than the values.

    >>> from cookbook_core import datum_from_tokens_weights
    >>> import torch
    >>> data = [datum_from_tokens_weights([1, 2, 3], w) for w in ([0, 1, 1], [0, 0, 2])]
    >>> columns(data, [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0])], "weights")
    [tensor([-1., -2., -3., -4.]), tensor([1., 1., 0., 2.])]
    """
    import torch

    if isinstance(values, str):
        values = input_tensors(data, values)
    check_alignment(data, values, *keys)
    flat = torch.cat(list(values))
    return [flat, *(torch.cat([input_tensor(d, key, flat) for d in data]) for key in keys)]


def weighted_sum(logprobs: torch.Tensor, weights: Any, **align: Any) -> torch.Tensor:
    """Sum logprobs under their weights.

        sum_t weights[t] * logprobs[t]

    Args:
        logprobs: `(N,)` or `(N, K)`, nats; gradient flows here. A position of weight 0 gets exactly
            none, even where its logprob is -inf.
        weights: see `align_weights`; `(N,)` beside `(N, K)` weighs all candidates alike.
        **align: keywords of `align_weights`.
    Returns:
        0-d, nats.
    Raises:
        DatumError, ConfigError: as `align_weights` does.
    """
    logprobs, w = align_weights(logprobs, weights, **align)
    w = w.reshape(w.shape + (1,) * (logprobs.dim() - w.dim())).expand_as(logprobs)
    return (logprobs.masked_fill(w == 0, 0.0) * w).sum()


def weighted_sums(
    data: Sequence[Datum], values: Sequence[torch.Tensor] | str, weights: str = "weights"
) -> torch.Tensor:
    """Sum the values of each datum under its weights.

        result[i] = sum_t weights[i][t] * values[i][t]

    Args:
        data: D datums that have an input named `weights`.
        values: D tensors `(N_i,)` or `(N_i, K)`, such as the logprobs of a loss; or the name of an
            input of the datums, such as "ref_logprobs".
        weights: the name of the input to weigh by.
    Returns:
        `(D,)`, in the unit of the values (nats for logprobs); sum over tokens.
    Raises:
        DatumError: an input is missing, or has another length than the values.

    >>> from cookbook_core import datum_from_tokens_weights
    >>> import torch
    >>> pair = [datum_from_tokens_weights([1, 2, 3], w) for w in ([0, 1, 1], [0, 0, 2])]
    >>> weighted_sums(pair, [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0])])
    tensor([-3., -8.])
    """
    import torch

    if isinstance(values, str):
        values = input_tensors(data, values)
    check_alignment(data, values, weights)
    pairs = zip(data, values, strict=True)
    return torch.stack([weighted_sum(v, datum.loss_fn_inputs[weights]) for datum, v in pairs])


def weighted_mean(logprobs: torch.Tensor, weights: Any, **align: Any) -> torch.Tensor:
    """Average logprobs under their weights: `weighted_sum` divided by the sum of weights.

    Args:
        logprobs: `(N,)` or `(N, K)`, nats; gradient flows here.
        weights: see `align_weights`.
        **align: keywords of `align_weights`.
    Returns:
        0-d, nats per token.
    Raises:
        DatumError: the weights sum to zero, or as `align_weights` does.
    """
    logprobs, w = align_weights(logprobs, weights, **align)
    total = w.sum()
    if float(total) == 0:
        raise DatumError(
            "weights",
            "no mean exists",
            expected="a non-zero sum of weights",
            got=0.0,
            fix="Leave out datums without weights, or use weighted_sum().",
        )
    return weighted_sum(logprobs, w) / total


def _tensor(values: Any, like: torch.Tensor, where: str) -> torch.Tensor:
    """`values` as a tensor of its own shape, in the dtype and on the device of `like`."""
    import torch

    if isinstance(values, TensorData):
        values = values.to_torch()
    elif not isinstance(values, torch.Tensor):
        values = to_array(where, values, np.dtype("float64"))
    elif values.is_meta or values.is_complex() or values.layout != torch.strided:
        got = f"{values.dtype}, {values.layout}, on {values.device}"
        rule, fix = "a dense tensor of real numbers", "Pass weights as a list or a float tensor."
        raise DatumError(where, "not numeric", expected=rule, got=got, fix=fix)
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)
