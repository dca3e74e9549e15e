"""Weights against logprobs: equal lengths or an error; sums and means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cookbook_core import (
    align_weights,
    check_alignment,
    datum_from_tokens_weights,
    weighted_mean,
    weighted_sum,
    weighted_sums,
    with_inputs,
)
from cookbook_core.alignment import columns, input_tensor, input_tensors
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.tinker import Datum, ModelInput, TensorData

import numpy as np
import pytest
import torch

LP = torch.tensor([-1.0, -2.0, -3.0])


def datum(n: int, **inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints([1] * n), {"target_tokens": [2] * n, **inputs})


# ---- align_weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [list, np.array, torch.tensor, lambda w: TensorData(w, dtype="float32")]
)
def test_equal_lengths_pass_through(make: Callable[..., Any]) -> None:
    """Any kind of array; the weights take the logprobs' dtype."""
    logprobs, weights = align_weights(LP.double(), make([0.0, 1.0, 2.0]))
    assert logprobs.tolist() == LP.tolist()
    assert weights.tolist() == [0.0, 1.0, 2.0]
    assert weights.dtype == torch.float64


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
def test_strict_refuses_unequal_lengths(weights: list[float]) -> None:
    """Even when only zeros would be lost: the lengths are wrong, so the shift may be."""
    match = rf"data\[4\]: length does not match.*Expected 3 .*got {len(weights)}\."
    with pytest.raises(DatumError, match=match):
        align_weights(LP, weights, where="data[4]")


def test_min_length_cuts_from_the_end() -> None:
    """The longer one loses its end, whichever it is; the other values stay in place."""
    logprobs, weights = align_weights(LP, [1.0, 2.0], "min_length")
    assert (logprobs.tolist(), weights.tolist()) == ([-1.0, -2.0], [1.0, 2.0])
    logprobs, weights = align_weights(LP, [1.0, 2.0, 3.0, 0.0, 0.0], "min_length")
    assert (logprobs.tolist(), weights.tolist()) == (LP.tolist(), [1.0, 2.0, 3.0])


def test_min_length_refuses_to_drop_a_weight() -> None:
    """[0, 1, 1, 0, 2] beside 3 logprobs: weights[4] = 2 would leave the objective."""
    weights = [0.0, 1.0, 1.0, 0.0, 2.0]
    with pytest.raises(DatumError, match=r"data\[7\]\[4\]:.*after position 2, got 2\.0"):
        align_weights(LP, weights, "min_length", where="data[7]")
    _, aligned = align_weights(LP, weights, "min_length", allow_dropped_weights=True)
    assert aligned.tolist() == [0.0, 1.0, 1.0]


def test_min_length_refuses_to_drop_a_row_with_a_weight() -> None:
    """(N, K): the row counts when any candidate has a weight."""
    weights = [[1.0, 1.0], [0.0, 0.0], [0.0, 0.5]]
    with pytest.raises(DatumError, match=r"weights\[2\]"):
        align_weights(torch.zeros(1, 2), weights, "min_length")


def test_other_faults_of_alignment() -> None:
    with pytest.raises(ConfigError, match=r"mode: unknown.*got 'shortest'"):
        align_weights(LP, [1.0], "shortest")  # type: ignore[arg-type]
    with pytest.raises(DatumError, match=r"weights: shape.*\(3,\), got \(3, 2\)"):
        align_weights(LP, torch.ones(3, 2))
    with pytest.raises(DatumError, match=r"weights: shape.*\(3, 4\), got \(3, 2\)"):
        align_weights(torch.zeros(3, 4), torch.ones(3, 2))
    with pytest.raises(DatumError, match="weights"):
        align_weights(LP, 1.0)


# ---- sums and means -----------------------------------------------------------------------------


def test_weighted_sum_by_hand() -> None:
    """0 * -1 + 1 * -2 + 2 * -3 = -8; the gradient is the weights."""
    logprobs = LP.clone().requires_grad_(True)
    value = weighted_sum(logprobs, [0.0, 1.0, 2.0])
    value.backward()
    assert value.item() == -8.0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, 1.0, 2.0]


def test_one_weight_per_position_holds_for_all_its_candidates() -> None:
    """(2, 3) logprobs, (2,) weights: 2 * (-1 - 2 - 3) + 0.5 * (-4 - 5 - 6) = -19.5."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    assert weighted_sum(logprobs, [2.0, 0.5]).item() == -19.5
    square = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])  # (2, 2): rows, not columns
    assert weighted_sum(square, [1.0, 0.0]).item() == -3.0


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_a_position_without_weight_gives_no_gradient_whatever_is_there(bad: float) -> None:
    """-inf * 0 is NaN: it has to be masked, not multiplied."""
    logprobs = torch.tensor([-1.0, bad, -3.0], requires_grad=True)
    value = weighted_sum(logprobs, [1.0, 0.0, 1.0])
    value.backward()
    assert value.item() == -4.0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [1.0, 0.0, 1.0]


def test_weighted_mean_by_hand() -> None:
    """(0 * -1 + 1 * -2 + 3 * -3) / 4 = -2.75."""
    assert weighted_mean(LP, [0.0, 1.0, 3.0]).item() == -2.75
    with pytest.raises(DatumError, match=r"weights: no mean exists.*got 0\.0"):
        weighted_mean(LP, [0.0, 0.0, 0.0])


def test_weighted_mean_over_what_is_kept() -> None:
    """Cut to 3: (1 * -1 + 1 * -3) / 2 = -2, whatever the weight that was dropped."""
    mean = weighted_mean(LP, [1.0, 0.0, 1.0, 98.0], mode="min_length", allow_dropped_weights=True)
    assert mean.item() == -2.0


def test_weighted_sums_keep_the_order_of_datums() -> None:
    """-2 * 1; -3 * 0.5 - 4 * 0; with gradient, and by the name of an input."""
    data = [datum(1, weights=[2.0], ref=[-1.0]), datum(2, weights=[0.5, 0.0], ref=[-3.0, -4.0])]
    logprobs = [torch.tensor([-1.0], requires_grad=True), torch.tensor([-3.0, -4.0])]
    sums = weighted_sums(data, logprobs)
    assert sums.tolist() == [-2.0, -1.5]
    assert sums.requires_grad
    assert weighted_sums(data, "ref").tolist() == [-2.0, -1.5]
    assert weighted_sums(data, logprobs, weights="ref").tolist() == [1.0, 25.0]


def test_other_datums_do_not_change_a_datums_sum() -> None:
    """Pitfall 32: no padding, no shared denominator."""
    first = datum(2, weights=[0.5, 1.5])
    values = torch.tensor([-1.0, -2.0])
    alone = weighted_sums([first], [values])[0]
    longer = [datum(9, weights=[1.0] * 9), first]
    assert weighted_sums(longer, [torch.full((9,), -50.0), values])[1] == alone


# ---- check_alignment, input_tensor --------------------------------------------------------------


def test_check_alignment_reports_every_fault_with_datum_field_and_lengths() -> None:
    data = [
        datum(3, ref_logprobs=[-1.0, -1.0, -1.0]),
        datum(3, ref_logprobs=[-1.0, -1.0]),
        datum(3),
    ]
    check_alignment(data[:1], [LP], "ref_logprobs")
    with pytest.raises(DatumError) as caught:
        check_alignment(data, [LP, LP, LP], "ref_logprobs", "target_tokens")
    assert str(caught.value).splitlines() == [
        'data[1].loss_fn_inputs["ref_logprobs"]: length does not match logprobs. '
        "Expected 3 (len of logprobs), got 2. "
        "Pass ref_logprobs=values to datum_from_prompt_completion(), which shifts them.",
        'data[2].loss_fn_inputs["ref_logprobs"]: missing. '
        "Expected an array under this name, got target_tokens. "
        "Pass ref_logprobs=values to datum_from_prompt_completion().",
    ]


def test_check_alignment_counts_datums() -> None:
    with pytest.raises(DatumError, match=r"logprobs_list:.*Expected 2, got 1"):
        check_alignment([datum(3), datum(3)], [LP])


def test_a_single_number_is_not_aligned_with_tokens() -> None:
    """A reward per datum is no array per token: a DatumError, not Python's len() complaint."""
    data = [with_inputs(datum(3), reward=1.0)]
    with pytest.raises(DatumError, match=r'data\[0\].loss_fn_inputs\["reward"\]'):
        check_alignment(data, [LP], "reward")


def test_input_tensors_take_what_is_there_or_say_what_is_missing() -> None:
    """input_tensor follows the logprobs' dtype, input_tensors the datum's own."""
    data = [datum(2, ref=[-1.0, -2.0]), datum(1), datum(1)]
    assert input_tensor(data[0], "ref", LP.double()).dtype == torch.float64
    assert [t.tolist() for t in input_tensors(data[:1], "ref")] == [[-1.0, -2.0]]
    with pytest.raises(DatumError, match=r'loss_fn_inputs\["ref"\]: missing.*got target_tokens'):
        input_tensor(data[1], "ref", LP)
    with pytest.raises(DatumError) as caught:
        input_tensors(data, "ref")
    assert [line[:7] for line in str(caught.value).splitlines()] == ["data[1]", "data[2]"]


def test_columns_lay_datums_end_to_end() -> None:
    data = [
        datum_from_tokens_weights([1, 2, 3], [0, 0, 1]),
        datum_from_tokens_weights([4, 5], [0, 2]),
    ]
    logprobs = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    flat, weights = columns(data, logprobs, "weights")
    assert (flat.tolist(), weights.tolist()) == ([-1, -2, -3], [0, 1, 2])
    assert [x.tolist() for x in columns(data, "weights", "weights")] == [[0, 1, 2]] * 2
    with pytest.raises(DatumError, match=r'data\[0\].*"advantages".*missing'):
        columns(data, logprobs, "advantages")
    with pytest.raises(DatumError, match=r'data\[1\].*"weights".*got 1'):
        columns(data, [logprobs[0], torch.zeros(2)], "weights")
