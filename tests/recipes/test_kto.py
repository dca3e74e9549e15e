"""The KTO recipe: its loss in closed form, its identities, its errors, and that it learns."""

from __future__ import annotations

import json
import math
from functools import partial

from cookbook_core import chat, datum_from_prompt_completion, tinker
from cookbook_core.custom_loss import differentiate
from cookbook_core.data import load_rows
from cookbook_core.errors import ConfigError, DataError, DatumError
from cookbook_core.runs import RunFlags
from recipes.kto import Config, auc, build_data, kto_loss, mismatched, train

import pytest
import torch


def good_and_bad(ref=-1.0):
    """Two answers of two tokens to a one-token prompt, the first good, the second bad."""
    return [
        datum_from_prompt_completion([1], [2, 3], desirable=good, ref_logprobs=ref)
        for good in (1.0, 0.0)
    ]


def test_value_by_hand():
    """beta = 0.5, z0 = 1. r: good -1 - 0 + 2 = 1, bad -2 - 3 + 2 = -3. sigmoid(0.5 * (1 - 1)) = 0.5
    and sigmoid(0.5 * (1 + 3)) = 0.880797; weights 2 and 1: (2 * 0.5 + 0.119203) / 2 = 0.559601."""
    logprobs = [torch.tensor([-1.0, 0.0]), torch.tensor([-2.0, -3.0])]
    loss, metrics = kto_loss(good_and_bad(), logprobs, beta=0.5, z0=1.0, desirable_weight=2.0)
    assert loss.item() == pytest.approx((2 * 0.5 + 1 / (1 + math.exp(2))) / 2, abs=1e-6)
    assert metrics == {"auc": 1.0, "good_reward": 1.0, "bad_reward": -3.0, "z0": 1.0}


def test_at_step_0_the_loss_is_one_half_exactly():
    loss, metrics = kto_loss(good_and_bad(), [torch.full((2,), -1.0)] * 2, beta=0.1)
    assert loss.item() == 0.5
    assert (metrics["auc"], metrics["good_reward"], metrics["bad_reward"]) == (0.5, 0.0, 0.0)


def test_gradient_lifts_good_lowers_bad_and_spares_the_prompt():
    """At r = z0 = 0 each token of an answer has the slope -+ beta / 4, divided by two answers."""
    data = [
        datum_from_prompt_completion([1, 7], [2, 3], desirable=good, ref_logprobs=-1.0)
        for good in (1.0, 0.0)
    ]
    logprobs = [torch.tensor([-9.0, -1.0, -1.0])] * 2
    good, bad = differentiate(partial(kto_loss, beta=0.1), data, logprobs).grads
    assert good.tolist() == pytest.approx([0.0, -0.0125, -0.0125])
    assert bad.tolist() == pytest.approx([0.0, 0.0125, 0.0125])


def test_errors_say_where():
    data = good_and_bad()
    bare = datum_from_prompt_completion([1], [2, 3], ref_logprobs=-1.0)
    with pytest.raises(DatumError, match=r'data\[1\].*"desirable"'):
        kto_loss([data[0], bare], [torch.zeros(2)] * 2, beta=0.1)
    with pytest.raises(DatumError, match=r'data\[0\].*"weights"'):
        kto_loss(data, [torch.zeros(3), torch.zeros(2)], beta=0.1)
    with pytest.raises(ConfigError, match=r"Config.batch_size.*>= 2"):
        Config(batch_size=1)


def test_auc_counts_ties_one_half():
    """Couples (2, 2) tie, (2, 1) right, (0, 2) and (0, 1) wrong: (1 + 0.5) / 4."""
    assert auc(torch.tensor([2.0, 0.0]), torch.tensor([2.0, 1.0])) == 0.375
    assert auc(torch.tensor([]), torch.tensor([1.0])) == 0.5


def test_z0_is_of_the_next_answer_and_never_too_long():
    """The answers go round by one; a long one is cut, so that no row exceeds max_length."""
    parts = [([1, 2, 3], [4]), ([5], [6, 7, 8])]
    first, second = mismatched(parts, 4)
    assert first.model_input.to_ints() == [1, 2, 3]
    assert first.loss_fn_inputs["target_tokens"].tolist() == [2, 3, 6]
    assert second.model_input.to_ints() == [5]
    assert second.loss_fn_inputs["target_tokens"].tolist() == [4]


# ---- rows ----------------------------------------------------------------------------------------


def rows_of(tmp_path, labels):
    path = tmp_path / "thumbs.jsonl"
    rows = [{"prompt": "What?", "completion": f" {i}", "label": x} for i, x in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(str(path), chat.LABELLED)


def test_labels_as_json_and_as_a_csv_has_them(tmp_path):
    rows = chat.labelled(rows_of(tmp_path, [True, False, 1, 0, "True", "false", "0"]), 0)
    assert [row["label"] for row in rows] == [True, False, True, False, True, False, False]
    (tmp_path / "thumbs.csv").write_text("prompt,completion,label\nq,a,True\nq,b,0\n", "utf-8")
    rows = load_rows(str(tmp_path / "thumbs.csv"), chat.LABELLED)
    assert [row["label"] for row in chat.labelled(rows, 0)] == [True, False]


@pytest.mark.parametrize("label", ["good", 2, -1, 0.5, [True]])
def test_an_unknown_label_names_its_row(label, tmp_path):
    with pytest.raises(DataError, match=r"^thumbs.jsonl:2, column label: unknown.*true or false"):
        chat.labelled(rows_of(tmp_path, [True, label, False]), 0)


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind_name_the_rows_and_move_no_run(label, tmp_path):
    """Nothing to contrast: refused before the run's folder is touched."""
    sizes = {"num_steps": 1, "batch_size": 2, "test_rows": 8, "log_path": str(tmp_path / "run")}
    train(Config(**sizes, dataset="tiny/dpo@train[:20]/test"))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    rows_of(tmp_path, [label] * 12)
    where = r"^thumbs.jsonl:\d+ to thumbs.jsonl:\d+, column label: the same in all rows"
    with pytest.raises(DataError, match=rf"{where}.*got 4 x {label}"):
        train(Config(**sizes, dataset=str(tmp_path / "thumbs.jsonl")), RunFlags(fresh=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_pairs_keep_one_answer_each_drawn_by_the_seed():
    pairs = load_rows("tiny/dpo", chat.LABELLED)[:200]
    rows = chat.labelled(pairs, 3)
    for pair, row in zip(pairs, rows, strict=True):
        assert row["completion"] == pair["chosen" if row["label"] else "rejected"]
        assert row.where == pair.where
    assert 70 < sum(row["label"] for row in rows) < 130
    assert rows == chat.labelled(pairs, 3)
    assert rows != chat.labelled(pairs, 4)


def test_rows_become_datums_and_long_ones_are_counted():
    """Pitfall 12; a malformed row is named."""
    tokenizer = tinker.ServiceClient().create_lora_training_client("tiny", 1).result()
    tokenizer = tokenizer.get_tokenizer()
    rows = [
        {"prompt": "What?", "completion": " yes", "label": True},
        {"prompt": "What?", "completion": " no" * 50, "label": False},
    ]
    data, parts, kept = build_data(rows, tokenizer, 20)
    assert kept == rows[:1]
    assert data[0].model_input.to_ints() == (parts[0][0] + parts[0][1])[:-1]
    assert data[0].loss_fn_inputs["desirable"].tolist()[-1] == 1.0


# ---- learning ------------------------------------------------------------------------------------


def test_learns_and_starts_at_the_identities(tmp_path):
    """Before the first step loss and AUC are 0.5 exactly; then good answers rise above bad ones,
    which shuffled labels do not teach: AUC knows no size, so the size of the gap decides."""
    sizes = {"num_steps": 24, "eval_every": 24, "test_rows": 60, "batch_size": 16}
    sizes["dataset"] = "tiny/dpo@train[:384]/test"
    after = train(Config(**sizes, log_path=tmp_path / "run"))
    assert after["test_auc"] > 0.8
    assert after["test_good_reward"] > 0 > after["test_bad_reward"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    untrained, first = map(json.loads, lines[:2])
    assert (untrained["test_loss"], untrained["test_auc"], untrained["test_z0"]) == (0.5, 0.5, 0.0)
    assert (first["loss"], first["auc"], first["z0"]) == (0.5, 0.5, 0.0)
    null = train(Config(**sizes, shuffle_labels=True, log_path=tmp_path / "null"))
    gaps = [each["test_good_reward"] - each["test_bad_reward"] for each in (null, after)]
    assert abs(gaps[0]) < gaps[1] / 3
