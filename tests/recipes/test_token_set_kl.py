"""The token-set recipe: divergences by hand, rows it refuses, and that it learns."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

from cookbook_core import datum_from_token_set, tinker
from cookbook_core.custom_loss import differentiate
from cookbook_core.errors import ConfigError, DataError, DatumError
from cookbook_core.token_set import label_words
from recipes.token_set_kl import Config, build_data, token_set_kl_loss, train

import pytest
import torch

CONFIG = Config(labels=(" yes", " no"))
QUIZ = (" A", " B", " C", " D")


def target(*probs):
    return datum_from_token_set([1, 2], list(range(len(probs))), target_probs=list(probs))


def model(*probs, mass=1.0):
    """Logprobs of two positions, the last with these shares of `mass`."""
    last = torch.tensor(probs, dtype=torch.float64).log() + math.log(mass)
    return torch.stack([torch.full_like(last, -3.0), last])


@pytest.fixture
def tokenizer():
    return tinker.ServiceClient().create_lora_training_client("tiny", 1).result().get_tokenizer()


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("forward", 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)),
        ("reverse", 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)),
        (
            "js",
            0.25 * (math.log(0.5 / 0.35) + math.log(0.5 / 0.65))
            + 0.5 * (0.2 * math.log(0.2 / 0.35) + 0.8 * math.log(0.8 / 0.65)),
        ),
    ],
)
def test_values_by_hand_whatever_the_mass_of_the_set(divergence, expected):
    for mass in (1.0, 0.01):
        loss, metrics = token_set_kl_loss(
            [target(0.5, 0.5)], [model(0.2, 0.8, mass=mass)], divergence=divergence
        )
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert metrics["set_mass"] == pytest.approx(mass)
        assert metrics["accuracy"] == 0.5  # the target's two best share


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_a_perfect_match_is_0_and_has_no_gradient(divergence):
    loss_fn = partial(token_set_kl_loss, divergence=divergence)
    result = differentiate(loss_fn, [target(0.3, 0.7)], [model(0.3, 0.7)])
    assert result.loss == pytest.approx(0.0, abs=1e-7)
    assert result.grads[0].abs().max() < 1e-7


def test_forward_gradient_is_model_minus_target_at_the_last_position():
    loss_fn = partial(token_set_kl_loss, divergence="forward")
    result = differentiate(loss_fn, [target(1.0, 0.0)] * 2, [model(0.2, 0.8)] * 2)
    assert result.grads[0].tolist() == [[0, 0], pytest.approx([-0.4, 0.4])]  # mean over two
    assert result.loss == pytest.approx(-math.log(0.2))


def test_mass_coef_1_is_kl_over_the_whole_vocabulary():
    p = (0.2, 0.05)  # the rest, 0.75, lies outside the set
    logprobs = [torch.tensor([p], dtype=torch.float64).log()]
    loss, metrics = token_set_kl_loss([target(0.5, 0.5)], logprobs, mass_coef=1.0)
    whole = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.05)
    assert loss.item() == pytest.approx(whole, rel=1e-6)
    assert metrics["divergence"] == pytest.approx(whole + math.log(0.25), rel=1e-6)
    assert metrics["set_mass"] == pytest.approx(0.25)


def test_js_takes_zeros_on_both_sides():
    loss_fn = partial(token_set_kl_loss, divergence="js")
    result = differentiate(loss_fn, [target(1.0, 0.0)], [torch.tensor([[0.0, 0.0], [-200.0, 0.0]])])
    assert result.loss == pytest.approx(math.log(2))
    assert torch.isfinite(result.grads[0]).all()


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"text": "a", "label_probs": [1.1, -0.1]}, r"row 1\.label_probs.*got \[1\.1, -0\.1\]"),
        ({"text": "a", "label_probs": [0.5, 0.4]}, r"row 1\.label_probs.*sum to 1"),
        ({"text": "a", "label_probs": [0.2, 0.3, 0.5]}, r"row 1\.label_probs.*2 numbers"),
        ({"text": "a", "label_probs": [float("nan"), 1.0]}, r"row 1\.label_probs"),
        ({"text": "a", "label_probs": "half"}, r"row 1\.label_probs"),
        ({"question": "a", "answer": "maybe"}, r"row 1\.answer.*\['yes', 'no'\].*'maybe'"),
    ],
)
def test_a_bad_row_is_named(tokenizer, row, match):
    good = {"text": "a", "label_probs": [0.5, 0.5]}
    with pytest.raises(DataError, match=match):
        build_data([good, row], tokenizer, CONFIG, "train")


def test_reverse_wants_every_share_above_0(tokenizer):
    rows = [{"text": "a", "label_probs": [1.0, 0.0]}]
    config = replace(CONFIG, divergence="reverse")
    with pytest.raises(DataError, match=r"row 0.*infinite.*--smoothing"):
        build_data(rows, tokenizer, config, "train")
    data, _ = build_data(rows, tokenizer, replace(config, smoothing=0.1), "train")
    assert data[0].loss_fn_inputs["target_probs"].tolist() == pytest.approx([0.95, 0.05])


def test_labels_that_are_not_one_token_are_listed(tokenizer):
    config = replace(CONFIG, labels=(" yes", "certainly not", " extraordinary"))
    with pytest.raises(ConfigError, match=r"'certainly not' is \[.*' extraordinary' is \["):
        build_data([], tokenizer, config, "train")
    with pytest.raises(ConfigError, match=r"same token.*\[' yes'\]"):
        build_data([], tokenizer, replace(CONFIG, labels=(" yes", " yes")), "train")
    with pytest.raises(ConfigError, match="at least 2"):
        build_data([], tokenizer, replace(CONFIG, labels=(" yes",)), "train")


def test_answers_become_one_hot_with_or_without_their_space(tokenizer):
    config = replace(CONFIG, labels=QUIZ)
    rows = [{"question": "Which?", "answer": "C"}, {"question": "Which?", "answer": " A"}]
    data, kept = build_data(rows, tokenizer, config, "train")
    probs = [d.loss_fn_inputs["target_probs"].tolist() for d in data]
    assert (probs, kept) == ([[0, 0, 1, 0], [1, 0, 0, 0]], rows)


def test_long_rows_are_dropped_and_counted(tokenizer, tmp_path, capsys):
    """Pitfall 12."""
    rows = [{"text": "good " * n, "label_probs": [0.5, 0.5]} for n in (1, 90, 1, 1)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = replace(CONFIG, dataset=str(file), max_length=40, test_rows=1, num_steps=1)
    train(replace(config, batch_size=2, log_path=str(tmp_path / "run")))
    assert "dropped as longer than 40 tokens: 1" in capsys.readouterr().out


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_learns(tmp_path, divergence):
    config = Config(
        num_steps=60, eval_every=30, test_rows=60, divergence=divergence, smoothing=0.01
    )
    after = train(replace(config, log_path=str(tmp_path / "run")))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert after["test_divergence"] < 0.75 * json.loads(lines[0])["test_divergence"]
    assert after["test_set_mass"] > 0.9
    assert (tmp_path / "run" / "plot.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "samples.md").exists()


def test_learns_digits_from_pictures(tmp_path):
    sizes = {"num_steps": 30, "eval_every": 30, "learning_rate": 6e-3, "test_rows": 60}
    after = train(Config("tiny-vl", "tiny/digits", log_path=str(tmp_path / "run"), **sizes))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["test_accuracy"] < 0.2  # chance is 0.1
    assert after["test_accuracy"] > 0.25
    assert (tmp_path / "run" / "samples.md").exists()


def test_labels_of_the_rows_must_be_the_same():
    rows = [{"labels": [" yes", " no"]}, {"labels": [" no", " yes"]}]
    assert label_words(rows[:1], (), (" a",)) == (" yes", " no")
    assert label_words(rows, (" b", " c"), (" a",)) == (" b", " c")
    assert label_words([{"text": "x"}], (), (" a",)) == (" a",)
    for given in (rows, [{"text": "x"}, rows[0]]):
        with pytest.raises(DataError, match=r"rows\[1\]: other labels than the first row's"):
            label_words(given, (), (" a",))


def test_a_missing_target_is_named():
    datum = tinker.Datum(tinker.ModelInput.from_ints([1]), {"target_tokens": [[1, 2]]})
    with pytest.raises(DatumError, match=r'data\[0\].loss_fn_inputs\["target_probs"\]: missing'):
        token_set_kl_loss([datum], [torch.zeros(1, 2)])
