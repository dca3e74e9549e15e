"""Tokens and weights to datums: the shift, truncation, reduction, and every error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cookbook_core import (
    datum_from_prompt_completion,
    datum_from_tokens_weights,
    datum_from_turns,
    shift_tokens,
    weighted_sums,
    with_inputs,
)
from cookbook_core.datum_checks import check_data
from cookbook_core.datums import shift_values
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.tinker import Datum, ModelInput, ServiceClient, TensorData
from tests.oracles.logprobs import adapter_of, plain_model, randomize, slow_logprobs

import numpy as np
import pytest
import torch

SECONDS = 60


def inputs_of(datum: Datum) -> dict[str, Any]:
    return {key: value.tolist() for key, value in datum.loss_fn_inputs.items()}


# ---- the shift ----------------------------------------------------------------------------------


def test_position_t_predicts_token_t_plus_1_with_that_tokens_weight() -> None:
    """Pitfall 3: tokens 10..14, weights 0 0 1 2 3: inputs 10..13, targets 11..14, 0 1 2 3."""
    datum = datum_from_tokens_weights([10, 11, 12, 13, 14], [0, 0, 1, 2, 3])
    assert datum.model_input.to_ints() == [10, 11, 12, 13]
    assert inputs_of(datum) == {"target_tokens": [11, 12, 13, 14], "weights": [0, 1, 2, 3]}
    dtypes = {key: value.dtype for key, value in datum.loss_fn_inputs.items()}
    assert dtypes == {"target_tokens": "int64", "weights": "float32"}


def test_shift_helpers() -> None:
    assert shift_tokens([5, 6, 7, 8]) == ([5, 6, 7], [6, 7, 8])
    assert shift_values([9.0, 1.0, 2.0]).tolist() == [1.0, 2.0]
    assert shift_values(torch.tensor([9.0, 1.0])).dtype == np.float32


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_lists_arrays_and_tensors_give_the_same(make: Callable[..., Any]) -> None:
    datum = datum_from_tokens_weights(make([5, 6, 7]), make([0.0, 0.5, 1.0]))
    assert datum.model_input.to_ints() == [5, 6]
    assert inputs_of(datum) == {"target_tokens": [6, 7], "weights": [0.5, 1.0]}


def test_the_callers_arrays_are_copied() -> None:
    """Changing them afterwards must not change a datum that is already built."""
    weights = np.array([0.0, 1.0, 1.0], dtype=np.float32)
    advantages = torch.tensor([1.0, 2.0])
    datum = with_inputs(datum_from_tokens_weights([5, 6, 7], weights), advantages=advantages)
    weights[:] = 9
    advantages[:] = 9
    assert inputs_of(datum)["weights"] == [1.0, 1.0]
    assert inputs_of(datum)["advantages"] == [1.0, 2.0]


def test_the_logprob_at_t_is_that_of_the_next_token(
    service: ServiceClient, model_folder: Callable[..., str]
) -> None:
    """Pitfall 3: against a loop over log_softmax(logits[t])[tokens[t + 1]]."""
    tokens = [17, 42, 42, 9, 63, 5]
    client = service.create_lora_training_client(model_folder(), rank=4, seed=0).result(SECONDS)
    randomize(client)
    datum = datum_from_tokens_weights(tokens, [1.0] * 6)
    output = client.forward([datum], "cross_entropy").result(SECONDS)
    model = plain_model(model_folder(), adapter_of(client))
    rows = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0], -1)
    expected = [float(rows[t, tokens[t + 1]]) for t in range(5)]
    assert output.loss_fn_outputs[0]["logprobs"].data == pytest.approx(expected, abs=1e-4)
    assert slow_logprobs(model, datum).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_pair_that_differs_in_its_first_response_token_has_a_gradient(
    service: ServiceClient, model_folder: Callable[..., str]
) -> None:
    """Pitfall 3: a shift by one too many drops that token, and with it the whole preference."""
    client = service.create_lora_training_client(model_folder(), rank=4, seed=0).result(SECONDS)
    randomize(client)
    prompt = [20, 21, 22]
    pair = [datum_from_prompt_completion(prompt, [token]) for token in (30, 31)]

    def margin_loss(data: list[Datum], logprobs: list[torch.Tensor]) -> Any:
        chosen, rejected = weighted_sums(data, logprobs)
        return -torch.nn.functional.logsigmoid(chosen - rejected), {"margin": chosen - rejected}

    output = client.forward_backward_custom(pair, margin_loss).result(SECONDS)
    row = torch.log_softmax(
        plain_model(model_folder(), adapter_of(client))(input_ids=torch.tensor([prompt])).logits[
            0, -1
        ],
        -1,
    )
    assert output.metrics["margin"] == pytest.approx(float(row[30] - row[31]), abs=1e-4)
    assert sum(float(g.norm()) for g in adapter_of(client).grads) > 1e-3


# ---- truncation and reduction --------------------------------------------------------------------


@pytest.mark.parametrize(("max_length", "length"), [(None, 6), (9, 6), (6, 6), (5, 5), (3, 3)])
def test_max_length_counts_tokens_and_keeps_the_first(max_length: int | None, length: int) -> None:
    """T = 6 tokens cut to `length`: N = length - 1 positions, the same ones."""
    tokens, weights = [10, 11, 12, 13, 14, 15], [0, 0, 1, 2, 3, 4]
    datum = datum_from_tokens_weights(tokens, weights, max_length)
    assert datum.model_input.to_ints() == tokens[: length - 1]
    assert inputs_of(datum) == {"target_tokens": tokens[1:length], "weights": weights[1:length]}


def test_mean_reduction_makes_weights_sum_to_one() -> None:
    """[1, 3] / 4 after the shift and the cut; the first and the cut weights do not count."""
    datum = datum_from_tokens_weights([1, 2, 3, 4], [8, 1, 3, 8], 3, reduction="mean")
    assert inputs_of(datum)["weights"] == [0.25, 0.75]


def test_none_reduction_leaves_weights_alone() -> None:
    datum = datum_from_tokens_weights([1, 2, 3], [0, -2.5, 4])
    assert inputs_of(datum)["weights"] == [-2.5, 4.0]


# ---- refusals ------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "one weight too few": (([1, 2, 3], [1, 1]), {}, r"weights:.*\(3,\), got \(2,\)"),
    "one weight too many": (([1, 2], [1, 1, 1]), {}, r"weights:.*\(2,\), got \(3,\)"),
    "weights in rows": (([1, 2], [[1, 1]]), {}, r"weights:.*got \(1, 2\)"),
    "one token": (([1], [1]), {}, "tokens:.*at least 2 tokens, got 1"),
    "no token": (([], []), {}, "tokens:.*got 0"),
    "nan": (([1, 2, 3], [0, 1, math.nan]), {}, r"weights\[2\]:.*got nan"),
    "inf": (([1, 2, 3], [0, math.inf, 1]), {}, r"weights\[1\]:.*got inf"),
    "all zero": (([1, 2, 3], [0, 0, 0]), {}, "weights: all zero.*at all 2 targets.*allow_zero"),
    "only the first": (([1, 2, 3], [1, 0, 0]), {}, "weights: all zero"),
    "cut off": (([1, 2, 3, 4], [0, 0, 0, 1]), {"max_length": 3}, "max_length=3 cut off every"),
    "sums to zero": (([1, 2, 3], [0, 1, -1]), {"reduction": "mean"}, "weights: cannot be norm"),
    "tokens in rows": (([[1, 2], [3, 4]], [1, 1]), {}, r"tokens.*got shape \[2, 2\]"),
    "half a token": (([1.5, 2.0], [1, 1]), {}, "tokens: not whole numbers"),
    "infinite token": (([1, math.inf], [1, 1]), {}, "tokens: not whole numbers"),
    "text": ((["a", "b"], [1, 1]), {}, "tokens: not numeric"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_datum(case: str) -> None:
    """Pitfall 12: all-zero masks included; each error names the field and the value."""
    args, more, match = REFUSED[case]
    with pytest.raises(DatumError, match=match):
        datum_from_tokens_weights(*args, **more)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"max_length": 1}, "max_length:.*>= 2, got 1"),
        ({"max_length": -5}, "max_length:.*got -5"),
        ({"reduction": "sum"}, "reduction:.*got 'sum'"),
    ],
)
def test_options_that_cannot_work(more: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        datum_from_tokens_weights([1, 2, 3], [0, 1, 1], **more)


def test_zero_weights_are_accepted_on_request() -> None:
    datum = datum_from_tokens_weights([1, 2, 3], [1, 0, 0], allow_zero_weights=True)
    assert inputs_of(datum)["weights"] == [0.0, 0.0]


def test_a_weight_that_is_cut_off_need_not_be_finite() -> None:
    """The first weight is dropped, so its value does not matter."""
    datum = datum_from_tokens_weights([1, 2, 3], [math.nan, 1, 1])
    assert inputs_of(datum)["weights"] == [1.0, 1.0]


def test_shift_tokens_refuses_what_predicts_nothing() -> None:
    with pytest.raises(DatumError, match=r"tokens:.*at least 2 tokens, got 1"):
        shift_tokens([5])


# ---- prompt and completion -----------------------------------------------------------------------


def test_loss_starts_at_the_first_completion_token() -> None:
    """Pitfall 11: prompt 1 2 3, completion 4 5: weights 0 0 1 1, and side data sits with it."""
    datum = datum_from_prompt_completion([1, 2, 3], [4, 5], logprobs=[-0.5, -0.25], advantages=2)
    assert datum.model_input.to_ints() == [1, 2, 3, 4]
    assert inputs_of(datum) == {
        "target_tokens": [2, 3, 4, 5],
        "weights": [0, 0, 1, 1],
        "logprobs": [0, 0, -0.5, -0.25],
        "advantages": [0, 0, 2, 2],
    }


def test_truncation_cuts_the_side_data_too() -> None:
    """5 + 3 tokens cut to 6: one completion token is left."""
    datum = datum_from_prompt_completion([1, 2, 3, 4, 5], [6, 7, 8], 6, advantages=[1, 2, 3])
    assert inputs_of(datum) == {
        "target_tokens": [2, 3, 4, 5, 6],
        "weights": [0, 0, 0, 0, 1],
        "advantages": [0, 0, 0, 0, 1],
    }


@pytest.mark.parametrize(
    ("args", "more", "match"),
    [
        (([], [1]), {}, "prompt_tokens: empty.*got 0"),
        (([1], []), {}, "completion_tokens: empty.*got 0"),
        (([1, 2], [3, 4]), {"advantages": [1.0]}, r"advantages:.*\(2,\), got \(1,\)"),
        (([1, 2], [3, 4]), {"reward": [1.0] * 4}, r"reward:.*\(2,\), got \(4,\)"),
        (([1, 2, 3], [4, 5], 3), {}, "max_length=3 cut off every"),
    ],
)
def test_prompt_completion_refusals(args: Any, more: dict[str, Any], match: str) -> None:
    with pytest.raises(DatumError, match=match):
        datum_from_prompt_completion(*args, **more)


# ---- several answers -----------------------------------------------------------------------------

TURNS = [([1, 2], [3, 4]), ([5], [6, 7, 8]), ([9], [])]


def test_each_answer_has_its_own_values_and_the_rest_zeros() -> None:
    """Tokens 1 2 [3 4] 5 [6 7 8] 9: what was given has weight 0 and no value."""
    datum = datum_from_turns(
        TURNS,
        score_prompt=False,
        advantages=[2.0, -1.0, 0.0],
        logprobs=[[-1, -2], np.array([-3, -4, -5]), []],
        beta=torch.tensor(0.5),
    )
    assert datum.model_input.to_ints() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert inputs_of(datum) == {
        "target_tokens": [2, 3, 4, 5, 6, 7, 8, 9],
        "weights": [0, 1, 1, 0, 1, 1, 1, 0],
        "score_mask": [0, 1, 1, 0, 1, 1, 1, 0],
        "advantages": [0, 2, 2, 0, -1, -1, -1, 0],
        "logprobs": [0, -1, -2, 0, -3, -4, -5, 0],
        "beta": [0, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 0],
    }


def test_one_turn_is_a_prompt_and_its_completion() -> None:
    more = {"score_prompt": False, "advantages": [1.0, 2.0]}
    whole = datum_from_prompt_completion([1, 2], [3, 4], 3, **more)
    turns = datum_from_turns([([1, 2], [3, 4])], 3, **more | {"advantages": [[1.0, 2.0]]})
    assert inputs_of(turns) == inputs_of(whole)
    assert turns.model_input.to_ints() == whole.model_input.to_ints()


def test_turns_are_cut_with_their_side_data() -> None:
    """Six of nine tokens: 1 2 [3 4] 5 [6]."""
    datum = datum_from_turns(TURNS, 6, logprobs=[[-1, -2], [-3, -4, -5], []])
    assert inputs_of(datum) == {
        "target_tokens": [2, 3, 4, 5, 6],
        "weights": [0, 1, 1, 0, 1],
        "logprobs": [0, -1, -2, 0, -3],
    }


@pytest.mark.parametrize(
    ("turns", "more", "match"),
    [
        ([], {}, "turns: no prompt"),
        ([([], [1])], {}, "turns: no prompt.*got 0"),
        ([([1], [2]), ([3],)], {}, r"turns\[1\]: not a turn.*got 1 parts"),
        ([([1], []), ([2], [])], {}, "weights: all zero"),
        (TURNS, {"advantages": [1.0, 2.0]}, "advantages: .*3 entries, one per turn, got 2"),
        (TURNS, {"logprobs": [[1], [1, 2, 3], []]}, r"logprobs\[0\]: .*\(2,\), got \(1,\)"),
        (TURNS, {"logprobs": [[1, 2], ["a"] * 3, []]}, r"logprobs\[1\]: not numeric"),
        (TURNS, {"max_length": 2}, "max_length=2 cut off every"),
    ],
)
def test_turns_refusals(turns: Any, more: dict[str, Any], match: str) -> None:
    with pytest.raises(DatumError, match=match):
        datum_from_turns(turns, **more)


def test_with_inputs_adds_and_replaces_on_a_copy() -> None:
    """The first datum keeps what it had; the model reads the same tokens."""
    one = datum_from_tokens_weights([5, 6, 7], [0, 1, 1])
    two = with_inputs(one, weights=[3, 4], reward=np.float64(2.5), ids=[[1, 2], [3, 4]])
    assert set(one.loss_fn_inputs) == {"target_tokens", "weights"}
    assert two.model_input is one.model_input
    assert inputs_of(two) == {
        "target_tokens": [6, 7],
        "weights": [3, 4],
        "reward": 2.5,
        "ids": [[1, 2], [3, 4]],
    }
    assert two.loss_fn_inputs["weights"].dtype == "float32"
    assert two.loss_fn_inputs["ids"].dtype == "int64"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([[1, 2], [3]], 'loss_fn_inputs\\["extra"\\].*rectangular'),
        (["a"], 'loss_fn_inputs\\["extra"\\].*not numeric'),
        (object(), 'loss_fn_inputs\\["extra"\\].*not numeric'),
    ],
)
def test_side_data_must_be_numbers(value: Any, match: str) -> None:
    with pytest.raises(DatumError, match=match):
        with_inputs(datum_from_tokens_weights([5, 6], [0, 1]), extra=value)


# ---- check_data ----------------------------------------------------------------------------------


def bad_datum(n: int = 3, **inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints([1] * n), {"target_tokens": [2] * n, **inputs})


GOOD = bad_datum()
BAD: dict[str, tuple[Any, str]] = {
    "not a datum": ({"target_tokens": [1]}, r"data\[1\]: wrong type.*got dict"),
    "empty": (Datum(ModelInput.empty(), {}), r"data\[1\].model_input: empty.*got 0"),
    "too long": (bad_datum(9), r"data\[1\].model_input: longer.*<= 8 tokens, got 9"),
    "input id": (
        Datum(ModelInput.from_ints([1, 100]), {"target_tokens": [1, 1]}),
        r"data\[1\].model_input\[1\]:.*< 100, got 100",
    ),
    "negative id": (
        Datum(ModelInput.from_ints([-1, 1]), {"target_tokens": [1, 1]}),
        r"data\[1\].model_input\[0\]:.*got -1",
    ),
    "no targets": (
        Datum(ModelInput.from_ints([1]), {"weights": [1.0]}),
        r'data\[1\].loss_fn_inputs\["target_tokens"\]: missing.*got weights',
    ),
    "target id": (
        bad_datum(2, target_tokens=[[1, 2], [3, -100]]),
        r'data\[1\].loss_fn_inputs\["target_tokens"\]\[1, 1\]:.*got -100',
    ),
    "targets short": (
        bad_datum(3, target_tokens=[1, 2]),
        r'data\[1\].*"target_tokens".*\(3,\) or \(3, K\), got \(2,\)',
    ),
    "targets deep": (bad_datum(1, target_tokens=[[[1]]]), r"data\[1\].*got \(1, 1, 1\)"),
    "targets scalar": (bad_datum(1, target_tokens=1), r'data\[1\].*"target_tokens".*got \(\)'),
    "no candidates": (
        bad_datum(2, target_tokens=np.zeros((2, 0), int)),
        r'data\[1\].*"target_tokens".*got \(2, 0\)',
    ),
    "weights short": (
        bad_datum(3, weights=[1, 1]),
        r'data\[1\].loss_fn_inputs\["weights"\].*\(3,\).*got \(2,\)',
    ),
    "weights wide": (bad_datum(2, weights=[[1, 1], [1, 1]]), r'data\[1\].*"weights".*got \(2, 2\)'),
    "weights nan": (
        bad_datum(3, weights=[1, math.nan, 1]),
        r'data\[1\].loss_fn_inputs\["weights"\]\[1\]: not finite.*got nan',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_datum_is_named(case: str) -> None:
    """Index, field, position; the good datum before it is not mentioned."""
    bad, match = BAD[case]
    with pytest.raises(DatumError, match=match) as caught:
        check_data([GOOD, bad], vocab_size=100, max_context_length=8)
    assert "data[0]" not in str(caught.value)


def test_all_bad_datums_are_listed_up_to_five() -> None:
    """Seven faults: five in full, the rest counted."""
    with pytest.raises(DatumError) as caught:
        check_data([bad_datum(2, weights=[1.0])] * 7, vocab_size=100)
    lines = str(caught.value).splitlines()
    assert [line[:7] for line in lines[:5]] == [f"data[{i}]" for i in range(5)]
    assert lines[5:] == ["(and 2 more like these)"]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "data: empty.*got 0"),
        (GOOD, "data: not a batch.*got Datum"),
        ((d for d in [GOOD]), "data: not a batch.*got generator"),
        (None, "data: not a batch.*got NoneType"),
    ],
)
def test_what_is_not_a_batch(data: Any, match: str) -> None:
    with pytest.raises(DatumError, match=match):
        check_data(data, vocab_size=100)


def test_good_batches_pass() -> None:
    """(N,), (N, K), weights of either width, ids at both ends of the vocabulary, full context."""
    wide = bad_datum(2, target_tokens=[[0, 99], [1, 2]])
    batch = [GOOD, bad_datum(8), wide, with_inputs(wide, weights=[1, 0])]
    batch.append(with_inputs(wide, weights=[[1, 0], [0.5, 0.5]]))
    check_data(batch, vocab_size=100, max_context_length=8)
    with pytest.raises(DatumError, match=r'"advantages".*missing.*got target_tokens'):
        check_data([GOOD], vocab_size=100, needs=("target_tokens", "advantages"))


# ---- tensors and inputs --------------------------------------------------------------------------


def test_tensor_data_keeps_values_shape_and_dtype() -> None:
    """float64 in becomes float32 unless named; bfloat16 tensors arrive whole."""
    data = TensorData([[1, 2], [3, 4]], dtype="float32")
    assert (data.data, data.shape, len(data)) == ([1.0, 2.0, 3.0, 4.0], [2, 2], 2)
    assert data.to_torch().dtype == torch.float32
    assert TensorData([1, 2, 3, 4], dtype="int64", shape=[2, 2]).tolist() == [[1, 2], [3, 4]]
    assert TensorData([0.1], dtype="float64").data == [0.1]
    assert TensorData.from_torch(torch.tensor([1.5], dtype=torch.bfloat16)).data == [1.5]
    assert TensorData.from_numpy(np.array([1, 2], dtype=np.int32)).dtype == "int64"
    fresh = data.to_torch()
    fresh.zero_()
    assert data.data == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (([1.0], "float16"), "TensorData.dtype.*got 'float16'"),
        (([1.0], None), "TensorData.dtype.*got None"),
        (([1.5], "int64"), "TensorData.data: not whole numbers"),
        (([2**63], "int64"), "TensorData.data: out of range.*int64.*got 9223372036854775808"),
        (([1e39], "float32"), r"TensorData.data: out of range.*float32.*got 1e\+39"),
        (([1.0], "float32", [-1, -1]), r"TensorData.shape.*got shape \[-1, -1\]"),
        (([1.0, 2.0], "float32", [3]), r"TensorData.shape.*2 values in all, got shape \[3\]"),
        (([[1.0], [1.0, 2.0]], "float32"), "TensorData.data: not a rectangular array"),
    ],
)
def test_tensor_data_refusals(args: Any, match: str) -> None:
    with pytest.raises(DatumError, match=match):
        TensorData(*args)


def test_model_input_is_its_chunks_in_order() -> None:
    joined = ModelInput.from_ints([1, 2]).append_int(3).append_int(4)
    assert (joined.to_ints(), joined.length, len(joined.chunks)) == ([1, 2, 3, 4], 4, 3)
    assert ModelInput.empty().to_ints() == []
