"""The SFT recipe: its loss in closed form, its errors, and that it learns."""

from __future__ import annotations

import json

from cookbook_core import datum_from_tokens_weights, tinker
from cookbook_core.custom_loss import differentiate
from cookbook_core.errors import ConfigError, DataError, DatumError
from cookbook_core.runs import RunFlags
from recipes.sft import Config, build_data, question_and_answer, sft_loss, train

import pytest
import torch


def test_value_by_hand():
    """Weights 0, 1 and 1, 1: loss = -(-2 - 1 - 3) / 3 = 2 nats per token."""
    data = [datum_from_tokens_weights([1, 2, 3], w) for w in ([0, 0, 1], [0, 1, 1])]
    logprobs = [torch.tensor([-9.0, -2.0]), torch.tensor([-1.0, -3.0])]
    loss, metrics = sft_loss(data, logprobs)
    assert loss.item() == pytest.approx(2.0)
    assert metrics["perplexity"] == pytest.approx(torch.tensor(2.0).exp().item())


def test_gradient_is_minus_one_over_the_tokens_and_zero_on_the_prompt():
    """Pitfalls 1 and 32: the mean is over the batch's weighted tokens, lengths apart."""
    data = [datum_from_tokens_weights([1, 2, 3], w) for w in ([0, 0, 1], [0, 1, 1])]
    logprobs = [torch.tensor([-9.0, -2.0]), torch.tensor([-1.0, -3.0])]
    grads = differentiate(sft_loss, data, logprobs).grads
    assert torch.cat(grads).tolist() == pytest.approx([0.0, -1 / 3, -1 / 3, -1 / 3])


def test_errors_say_where():
    data = [datum_from_tokens_weights([1, 2, 3], [0, 1, 1])]
    with pytest.raises(DatumError, match=r'data\[0\].*"weights".*got 2'):
        sft_loss(data, [torch.zeros(3)])


def test_messages_and_plain_rows_become_datums_and_long_ones_are_counted():
    """Pitfalls 7 and 12: one end token, trained; nothing dropped in silence."""
    client = tinker.ServiceClient().create_lora_training_client("tiny", rank=1).result()
    tokenizer = client.get_tokenizer()
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "red cat"}]
    rows = [{"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}]
    data, kept = build_data(rows, tokenizer, 64, "last")
    assert kept == rows
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        trained = targets[datum.loss_fn_inputs["weights"].to_numpy() > 0].tolist()
        assert tokenizer.decode(trained) == "red cat" + tokenizer.eos_token
    assert build_data(rows, tokenizer, 4, "last") == ([], [])
    assert question_and_answer(rows[0]) == (turns[:1], "red cat")


SLICED = "tiny/sft@train[:480]/test"


def test_learns(tmp_path):
    """Pitfall 39: the saved adapter is not the one the run began with."""
    sizes = {"num_steps": 30, "eval_every": 30, "test_rows": 60, "batch_size": 16}
    after = train(Config(**sizes, dataset=SLICED, log_path=tmp_path / "run"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    before = json.loads(lines[0])
    assert after["test_loss"] < 0.4 * before["test_loss"]
    folder = tmp_path / "run" / "checkpoints" / "model-0" / "sampler_weights" / "final"
    fresh = tinker.ServiceClient(checkpoint_dir=tmp_path / "fresh")
    start = fresh.create_lora_training_client("tiny", 32, 0, train_unembed=False).result()
    saved = start.save_weights_for_sampler("start").result().path
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() != (tmp_path / saved / weights).read_bytes()


SMALL = {  # reading all rows would take longer than the steps
    "dataset": "tiny/sft@train[:40]/test",
    "batch_size": 4,
    "keep_batch": 4,
    "test_rows": 6,
    "eval_every": 3,
    "max_tokens": 8,
}
FEW_TO_KEEP = "tiny/keep@train[:60]/train[60:80]"


def test_keep_replays_the_answers_of_the_start_and_leaves_the_loss_as_it_was(tmp_path):
    """keep_weight 0 trains as plain sft does: the loss never gets the kept answers."""
    rows = {}
    for name, keep in (("plain", {}), ("measured", {"keep": FEW_TO_KEEP, "keep_weight": 0.0})):
        config = Config(num_steps=3, **SMALL, **keep, log_path=str(tmp_path / name))
        train(config)
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [json.loads(line) for line in lines]
    steps = {name: [r for r in found if "loss" in r] for name, found in rows.items()}
    losses = {name: [r["loss"] for r in found] for name, found in steps.items()}
    assert losses["measured"] == pytest.approx(losses["plain"], rel=1e-4)
    first = steps["measured"][0]
    assert first["replay"] > 0
    assert (first["replay_share"], first["replay_grad"]) == (0.0, 0.0)
    assert rows["measured"][0]["test_kept"] == 1.0
    answers = json.loads((tmp_path / "measured" / "progress.json").read_text(encoding="utf-8"))
    assert len(answers["values"]["kept"]) == 60


def test_keep_is_not_forgotten_while_the_new_is_learnt(tmp_path):
    sizes = {"num_steps": 30, "eval_every": 30, "test_rows": 30, "max_tokens": 20}
    sizes |= {"batch_size": 16, "dataset": SLICED}
    keep = "tiny/keep@train[:160]/train[160:200]"
    kept = {
        weight: train(
            Config(**sizes, keep=keep, keep_weight=weight, log_path=tmp_path / str(weight))
        )
        for weight in (0.0, 1.0)
    }
    assert kept[1.0]["test_kept"] > kept[0.0]["test_kept"] + 0.15
    assert kept[1.0]["test_loss"] < 2.0  # 6.5 untrained


def test_an_interrupted_run_that_keeps_resumes_as_uninterrupted(tmp_path, monkeypatch):
    """The answers are sampled one time, before the first step, and read back."""
    config = {"num_steps": 4, **SMALL, "keep": FEW_TO_KEEP}
    whole = train(Config(**config, log_path=str(tmp_path / "whole")))
    step, calls = tinker.TrainingClient.optim_step, []

    def killed(self, params):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, params)

    monkeypatch.setattr(tinker.TrainingClient, "optim_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(Config(**config, log_path=str(tmp_path / "cut")), RunFlags(save_every=2))
    monkeypatch.setattr(tinker.TrainingClient, "optim_step", step)
    assert train(Config(**config, log_path=str(tmp_path / "cut"))) == whole


def test_prompts_to_keep_are_named_when_they_are_wrong(tmp_path):
    path = tmp_path / "old.jsonl"
    rows = [{"prompt": "What?"}] * 8 + [{"prompt": [{"role": "assistant", "content": " "}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"^old.jsonl:9, column prompt\[0\]: an assistant message"):
        train(Config(num_steps=1, **SMALL, keep=str(path), log_path=str(tmp_path / "run")))
    path.write_text('{"text": "What?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"columns are missing.*prompt or messages"):
        train(Config(num_steps=1, **SMALL, keep=str(path), log_path=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match=r"Config.keep_weight.*>= 0"):
        Config(keep_weight=-1.0)


def test_rows_that_are_all_too_long_name_the_flag_and_move_no_run(tmp_path):
    """--fresh had moved the good run aside before the failure."""
    sizes = {"num_steps": 1, "batch_size": 2, "test_rows": 2, "log_path": str(tmp_path / "run")}
    sizes["dataset"] = SMALL["dataset"]
    train(Config(**sizes))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"no sequences to train on: .*2 tokens.*--max_length"):
        train(Config(**sizes, max_length=2), RunFlags(fresh=True))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("learning_rate", "says"),
    [(1e6, "gradient was exactly 0 at 5 of 6"), (1e-12, "no held-out metric moved")],
)
def test_an_absurd_learning_rate_is_reported(learning_rate, says, tmp_path, capsys):
    sizes = {"num_steps": 6, "batch_size": 2, "test_rows": 2, "eval_every": 2}
    sizes["dataset"] = SMALL["dataset"]
    train(Config(**sizes, learning_rate=learning_rate, log_path=str(tmp_path / "run")))
    assert says in (tmp_path / "run" / "summary.md").read_text(encoding="utf-8")
    during, _ = capsys.readouterr().out.split("Held-out, before and after")
    assert "warning: step" in during
