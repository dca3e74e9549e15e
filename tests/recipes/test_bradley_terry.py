"""The Bradley-Terry recipe: its loss by hand, scores that stand alone, and that it learns."""

from __future__ import annotations

import json
import math

from cookbook_core import tinker
from cookbook_core.custom_loss import differentiate
from cookbook_core.errors import CheckpointError, ConfigError
from recipes.bradley_terry import (
    Config,
    Judge,
    bradley_terry_loss,
    build_pairs,
    load_scorer,
    score_texts,
    train,
)

import pytest
import torch

CONFIG = Config()


def turn(role, content):
    return [{"role": role, "content": content}]


@pytest.fixture
def judge():
    client = tinker.ServiceClient().create_lora_training_client("tiny", rank=1).result()
    return Judge(client.get_tokenizer(), CONFIG.question, CONFIG.verdicts)


def rewards_as_logprobs(*rewards):
    """Logprobs of three positions whose last has these rewards; the others must not matter."""
    return [torch.tensor([[-1.0, -9.0], [-9.0, -1.0], [-1.0, -1.0 - r]]) for r in rewards]


def test_value_and_gradient_by_hand():
    """Rewards 2 and 1: loss = log(1 + e^-1), gradient sigmoid(-1) at the last position alone."""
    datums = [None, None]
    result = differentiate(bradley_terry_loss, datums, rewards_as_logprobs(2.0, 1.0))
    assert result.loss == pytest.approx(math.log1p(math.exp(-1)))
    assert result.metrics == pytest.approx(
        {"accuracy": 1.0, "reward_margin": 1.0, "chosen_reward": 2.0, "rejected_reward": 1.0}
    )
    slope = 1 / (1 + math.e)
    chosen, rejected = (g.tolist() for g in result.grads)
    assert chosen == [[0, 0], [0, 0], pytest.approx([-slope, slope])]
    assert rejected == [[0, 0], [0, 0], pytest.approx([slope, -slope])]


def test_a_margin_of_minus_2000_is_finite_and_ties_count_half():
    result = differentiate(bradley_terry_loss, [None, None], rewards_as_logprobs(-1000.0, 1000.0))
    assert result.loss == pytest.approx(2000.0)
    _, metrics = bradley_terry_loss([None] * 4, rewards_as_logprobs(1.0, 1.0, 2.0, 1.0))
    assert metrics["accuracy"] == 0.75


def test_errors_say_where(judge):
    with pytest.raises(ValueError, match=r"data\[2\]"):
        bradley_terry_loss([None] * 3, rewards_as_logprobs(1.0, 2.0, 3.0))
    with pytest.raises(ConfigError, match=r"'not one token' is \["):
        Judge(judge.tokenizer, "Good?", (" yes", "not one token")).datum(
            {"prompt": "What?"}, "That."
        )


def test_the_verdict_is_read_after_the_question(judge):
    """Pitfall 31: the reward's position is the last, end tokens inside the prompt or not."""
    datum = judge.datum({"prompt": turn("user", "Where?")}, turn("assistant", "Here."))
    text = judge.tokenizer.decode(datum.model_input.to_ints())
    assert text.endswith(
        f"Here.<|im_end|>\n<|im_start|>user\n{CONFIG.question}<|im_end|>\n<|im_start|>assistant\n"
    )
    yes, no = (judge.tokenizer.encode(word) for word in CONFIG.verdicts)
    assert datum.loss_fn_inputs["target_tokens"].tolist()[-1] == yes + no
    assert datum.loss_fn_inputs["weights"].tolist() == [0] * (datum.model_input.length - 1) + [1]
    plain = judge.datum({"prompt": "Where?"}, " Here.")
    assert judge.tokenizer.decode(plain.model_input.to_ints()) == (
        f"Where? Here.\n\n{CONFIG.question}"
    )


def test_long_pairs_are_dropped_whole(judge):
    """Pitfalls 12 and 33."""
    rows = [
        {"prompt": "What?", "chosen": " yes", "rejected": " no" * 50},
        {"prompt": "What?", "chosen": " yes", "rejected": " no"},
    ]
    data, kept = build_pairs(rows, judge, max_length=30)
    assert (len(data), kept) == (2, rows[1:])


def test_learns_and_the_saved_scorer_is_the_scorer(tmp_path):
    """Pitfall 31: score(batch) == score(single); a reloaded scorer gives the same bits."""
    sizes = {"num_steps": 24, "test_rows": 60, "dataset": "tiny/dpo@train[:384]/test"}
    after = train(Config(**sizes, log_path=str(tmp_path / "run")))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    before = json.loads(lines[0])
    assert before["test_loss"] == pytest.approx(math.log(2), abs=0.05)
    assert after["test_accuracy"] > max(0.75, before["test_accuracy"] + 0.1)
    assert (tmp_path / "run" / "plot.png").stat().st_size > 10_000

    saved = tmp_path / "run" / "checkpoints" / "model-0" / "sampler_weights" / "final"
    prompt = turn("user", "The red cup is on the table. Where is the red cup?")
    answers = ("Sure. On the table.", "Again? On the table.", "no", "Ugh. " * 30)
    row, texts = {"prompt": prompt}, [turn("assistant", answer) for answer in answers]
    scores = []
    for _ in range(2):
        scorer, judge = load_scorer(tinker.ServiceClient(), str(saved), "tiny")
        assert (judge.question, judge.verdicts) == (CONFIG.question, CONFIG.verdicts)
        scores.append(score_texts(scorer, judge, row, texts))
    assert scores[0] == scores[1]
    assert scores[0][0] > scores[0][1]
    alone = [score_texts(scorer, judge, row, [text])[0] for text in texts]
    assert alone == pytest.approx(scores[0], abs=1e-4)
    assert score_texts(scorer, judge, row, texts[::-1]) == pytest.approx(scores[0][::-1], abs=1e-4)


def test_a_scorer_is_read_through_the_client(tmp_path, monkeypatch):
    """A service has no state.json to read: question and verdicts come from the client."""
    asked = {"question": "Well?", "verdict_good": " yes", "verdict_bad": " no"}
    monkeypatch.setattr(
        tinker.ServiceClient, "get_checkpoint_metadata", lambda self, path: {"more": "1", **asked}
    )
    service = tinker.ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = service.create_lora_training_client("tiny", rank=2, train_unembed=False).result()
    path = client.save_weights_for_sampler("bare").result().path
    _, judge = load_scorer(service, path, "tiny")
    assert (judge.question, judge.verdicts) == ("Well?", (" yes", " no"))


def test_metadata_of_a_checkpoint(tmp_path):
    service = tinker.ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = service.create_lora_training_client("tiny", rank=2).result()
    path = client.save_weights_for_sampler("noted", user_metadata={"a": "é"}).result().path
    assert service.get_checkpoint_metadata(path) == {"a": "é"}
    (tmp_path / "peft").mkdir()
    config = '{"base_model_name_or_path": "tiny"}'
    (tmp_path / "peft" / "adapter_config.json").write_text(config, encoding="utf-8")
    assert service.get_checkpoint_metadata(str(tmp_path / "peft")) == {}
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        service.get_checkpoint_metadata(str(tmp_path))


def test_another_checkpoint_is_refused_as_a_scorer(tmp_path):
    service = tinker.ServiceClient(device="cpu", checkpoint_dir=tmp_path)
    client = service.create_lora_training_client("tiny", rank=2, train_unembed=False).result()
    path = client.save_weights_for_sampler("other").result().path
    with pytest.raises(
        CheckpointError, match=r"other: not a scorer .*got no question, verdict_bad"
    ):
        load_scorer(service, path, "tiny")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_scorer(service, str(tmp_path / "nowhere"), "tiny")
