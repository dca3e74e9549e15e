"""The tool_rl recipe: its loss by hand, episodes turn by turn, faults, and that it learns."""

from __future__ import annotations

import json
import math
from functools import partial
from types import SimpleNamespace

from cookbook_core import chat, datum_from_turns
from cookbook_core.clients import add_ref_logprobs, frozen_copy, score
from cookbook_core.custom_loss import differentiate
from cookbook_core.data import load_rows
from cookbook_core.errors import ConfigError, DataError, DatumError, LossError
from cookbook_core.storage.paths import asset_path
from cookbook_core.tinker import SampledSequence
from recipes import tool_rl
from recipes.tool_rl import (
    Calculator,
    Config,
    build_data,
    measure,
    play,
    tool_rl_loss,
    train,
    with_prompt_tokens,
)

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

LOSS = partial(tool_rl_loss, kl_coef=0.0)
TURNS = [([1, 7], [2]), ([8, 9], [3])]


def datum(advantages=2.0, sampling=(-1.1, -0.9), ref=-1.0):
    """A prompt of two tokens, an answer, two tokens of a reply, an answer; weights 0.5."""
    logprobs = [[value] for value in sampling]
    inputs = {"advantages": advantages, "sampling_logprobs": logprobs, "ref_logprobs": ref}
    return datum_from_turns(TURNS, weights=0.5, **inputs)


# ---- the loss ------------------------------------------------------------------------------------


def test_value_and_gradient_by_hand():
    """Ratios e^0.1 and e^-0.1 with A = 2, weights 0.5: L = -0.5 * 2 * (1.10517 + 0.90484), its
    gradient -weight * A * ratio on the two sampled tokens, and exactly 0 on prompt and reply."""
    result = differentiate(LOSS, [datum()], [torch.tensor([-9.0, -1.0, -7.0, -8.0, -1.0])])
    up, down = math.exp(0.1), math.exp(-0.1)
    assert result.loss == pytest.approx(-(up + down), rel=1e-6)
    assert result.grads[0].tolist() == pytest.approx([0.0, -up, 0.0, 0.0, -down], rel=1e-6)
    assert result.grads[0][[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert result.metrics["ratio_max"] == pytest.approx(up, rel=1e-6)
    assert result.metrics["logprob_gap"] == pytest.approx(0.1, rel=1e-5)


def test_what_the_environment_wrote_does_not_matter():
    """However unlikely the reply: same loss, same gradient."""
    likely, not_so = (torch.tensor([x, -1.0, x, x, -1.0]) for x in (-0.1, -500.0))
    results = [
        differentiate(partial(tool_rl_loss, kl_coef=0.5), [datum()], [lp])
        for lp in (likely, not_so)
    ]
    assert results[0].loss == results[1].loss
    assert torch.equal(results[0].grads[0], results[1].grads[0])


def test_kl_pulls_to_the_reference_without_an_advantage():
    """weight * kl_coef * d on sampled tokens: 0.5 * 0.5 * 1."""
    data = [datum(advantages=0.0, sampling=(-1.0, -1.0), ref=-2.0)]
    loss_fn = partial(tool_rl_loss, kl_coef=0.5)
    grads = differentiate(loss_fn, data, [torch.full((5,), -1.0)]).grads
    assert grads[0].tolist() == pytest.approx([0.0, 0.25, 0.0, 0.0, 0.25])


def test_a_log_ratio_of_100_is_finite():
    """Pitfall 34: exploding importance weight."""
    for advantages in (1.0, -1.0):
        data = [datum(advantages, sampling=(-101.0, -101.0))]
        result = differentiate(LOSS, data, [torch.full((5,), -1.0)])
        assert np.isfinite(result.loss)
        assert torch.isfinite(result.grads[0]).all()


def test_errors_say_where():
    bare = datum_from_turns(TURNS)
    with pytest.raises(DatumError, match=r'data\[1\].*"advantages"'):
        tool_rl_loss([datum(), bare], [torch.zeros(5)] * 2, kl_coef=0.0)
    for wrong in ({"group_size": 1}, {"kl_coef": -1.0}, {"max_turns": 0}, {"reply_role": "robot"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config(**wrong)


def test_the_calculator():
    def step(answer):
        return Calculator({"answer": " 592"}).step(answer)

    assert step("compute 318 + 274") == ("592", 0.0, False)
    assert step(" compute 318 - 400\n") == ("-82", 0.0, False)
    assert step("592") == step("592\n") == ("", 1.0, True)
    for wrong in ("compute 318 * 274", "compute 318 + 274 please", "591", "5 92", ""):
        assert step(wrong) == ("", 0.0, True)


# ---- episodes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(asset_path("tiny_model"))


class Scripted:
    """A sampler that gives the next of its answers to each prompt; counts calls and prompts."""

    def __init__(self, tokenizer, *turns):
        self.tokenizer, self.turns, self.prompts = tokenizer, list(turns), []

    def get_tokenizer(self):
        return self.tokenizer

    def sample_batch(self, inputs, num_samples, params):
        assert num_samples == 1
        self.prompts.append([each.to_ints() for each in inputs])
        futures = []
        for answer in self.turns[len(self.prompts) - 1]:
            ids = self.tokenizer.encode(answer) if isinstance(answer, str) else answer
            logprobs = [-(1 + t) / 8 for t in range(len(ids))]
            sequence = SampledSequence("stop", "s", np.array(ids), np.array(logprobs))
            futures.append(
                SimpleNamespace(result=lambda s=sequence: SimpleNamespace(sequences=[s]))
            )
        assert len(futures) == len(inputs)
        return futures


def rows_of(tokenizer, *questions):
    prompt = [[{"role": "user", "content": f"What is {q}?"}] for q in questions]
    rows = [{"prompt": p, "answer": str(eval(q))} for p, q in zip(prompt, questions, strict=True)]
    return with_prompt_tokens(rows, tokenizer, 99)


END = "<|im_end|>"


def test_episodes_advance_together_and_read_like_the_whole_conversation(tokenizer):
    """One sampling call a turn for all that are live; the tokens are those of the template."""
    rows = rows_of(tokenizer, "200 + 300", "1 + 2", "400 + 7")
    turns = (
        [f"compute 200 + 300{END}", f"3{END}", f"compute 400 + 7{END}"],
        [f"500{END}", f"compute 400 + 8{END}"],
        [f"408{END}"],
    )
    sampler = Scripted(tokenizer, *turns)
    episodes = play(sampler, rows, Config(), 200, "0")
    assert [len(prompts) for prompts in sampler.prompts] == [3, 2, 1]
    assert [e.reward for e in episodes] == [1.0, 1.0, 0.0]
    assert [e.done for e in episodes] == [True, True, True]
    contents = [m["content"] for m in episodes[2].messages]
    expected = ["What is 400 + 7?", "compute 400 + 7", "407", "compute 400 + 8", "408", "408"]
    assert contents == expected
    assert [m["role"] for m in episodes[2].messages[1:]] == ["assistant", "tool"] * 2 + [
        "assistant"
    ]
    for episode in episodes:
        whole, weights = chat.render_messages(tokenizer, episode.messages, "all")
        assert episode.tokens() == whole
        on = [
            t for given, answer in episode.turns for t in [0.0] * len(given) + [1.0] * len(answer)
        ]
        assert on == weights


def test_datums_hold_the_sampled_ids_and_not_the_texts(tokenizer):
    """Pitfall 10, and environment tokens without weight: "500" and " + 300" in single characters
    decode to the call, and their text would be encoded otherwise."""
    (row,) = rows_of(tokenizer, "200 + 300")
    letters = [token for c in "compute 200 + 300" for token in tokenizer.encode(c)]
    assert letters != tokenizer.encode("compute 200 + 300")
    end = tokenizer.eos_token_id
    sampler = Scripted(tokenizer, [[*letters, end]] * 2, [f"500{END}", f"501{END}"])
    episodes = play(sampler, [row, row], Config(), 200, "0")
    data = build_data(episodes, 2)
    inputs = {key: value.tolist() for key, value in data[0].loss_fn_inputs.items()}
    on = [i for i, weight in enumerate(inputs["weights"]) if weight]
    last = [*tokenizer.encode("500"), end]
    assert [inputs["target_tokens"][i] for i in on] == [*letters, end, *last]
    lengths = len(letters) + 1, len(last)
    sampled = [-(1 + t) / 8 for length in lengths for t in range(length)]
    assert [inputs["sampling_logprobs"][i] for i in on] == sampled
    assert {inputs["weights"][i] for i in on} == {np.float32(1 / (2 * sum(lengths)))}
    assert {inputs["advantages"][i] for i in on} == {0.5}
    others = set(range(len(inputs["weights"]))) - set(on)
    for key in ("weights", "advantages", "sampling_logprobs", "score_mask"):
        assert {inputs[key][i] for i in others} == {0.0}, key
    reply = tokenizer.encode("\n<|im_start|>tool\n500<|im_end|>\n<|im_start|>assistant\n")
    assert [inputs["target_tokens"][i] for i in sorted(others)][-len(reply) :] == reply
    assert set(data[1].loss_fn_inputs["advantages"].tolist()) == {0.0, -0.5}


def test_a_truncated_answer_is_ended_by_a_token_without_weight(tokenizer):
    (row,) = rows_of(tokenizer, "2 + 3")
    sampler = Scripted(tokenizer, ["compute 2 + 3"], [f"5{END}"])
    (episode,) = play(sampler, [row], Config(), 200, "0")
    assert episode.turns[1][0][0] == tokenizer.eos_token_id
    assert episode.tokens() == chat.render_messages(tokenizer, episode.messages)[0]
    weights = datum_from_turns(episode.turns).loss_fn_inputs["weights"].tolist()
    assert weights.count(1.0) == len(tokenizer.encode("compute 2 + 3")) + 2


class Endless(Calculator):
    """Never over, and generous."""

    def step(self, answer):
        return "again", 1.0, False


def test_episodes_that_never_end_are_cut_without_reward(tokenizer, monkeypatch):
    """At max_turns, or where the next answer would not fit; what was earned before is lost."""
    monkeypatch.setattr(tool_rl, "Calculator", Endless)
    (row,) = rows_of(tokenizer, "2 + 3")
    sampler = Scripted(tokenizer, *[[f"5{END}"]] * 3)
    (episode,) = play(sampler, [row], Config(max_turns=2), 200, "0")
    assert (len(sampler.prompts), episode.reward, episode.done) == (2, 0.0, False)
    sampler.prompts.clear()
    (episode,) = play(sampler, [row], Config(), len(row["prompt_tokens"]), "0")
    assert (len(sampler.prompts), episode.reward, episode.done) == (1, 0.0, False)


def test_measure_by_hand(tokenizer):
    """Three of four call, one of them is right; the fourth is right by itself."""
    rows = rows_of(tokenizer, *["2 + 3"] * 4)
    calls = [f"compute 2 + 3{END}"] * 3
    sampler = Scripted(tokenizer, [*calls, f"5{END}"], [f"5{END}", f"6{END}", f"7{END}"])
    episodes = play(sampler, rows, Config(), 200, "0")
    inputs = {"weights": 1.0, "sampling_logprobs": -0.5, "ref_logprobs": -0.75}
    data = [datum_from_turns(e.turns, **inputs) for e in episodes]
    expected = {"reward": 0.5, "calls": 0.75, "unaided": 0.25, "cut": 0.0, "kl": 0.25}
    assert measure(episodes, data) == pytest.approx(expected)


def test_a_prompt_of_plain_text_is_a_users_message(tokenizer):
    rows = with_prompt_tokens([{"prompt": "What?"}, {"prompt": "What?" * 50}], tokenizer, 20)
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "What?"}]]
    assert rows[0]["prompt_tokens"] == chat.render_prompt(tokenizer, rows[0]["prompt"])


def test_a_template_that_refuses_the_reply_names_the_row(tokenizer, monkeypatch):
    strict = "{% for m in messages if m['role'] == 'tool' %}{{ raise_exception('No tools') }}"
    template = f"{strict}{{% endfor %}}{tokenizer.chat_template}"
    (row, *_) = with_prompt_tokens(load_rows("tiny/grpo", ("prompt", "answer")), tokenizer, 99)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    sampler = Scripted(tokenizer, [f"compute 2 + 3{END}"])
    with pytest.raises(DataError, match=r"^grpo_train.jsonl:1, messages\[2\]: .*\(No tools\)"):
        play(sampler, [row], Config(), 200, "0")
    sampler.prompts.clear()
    sampler.turns.append([f"5{END}"])
    play(sampler, [row], Config(reply_role="user"), 200, "0")


# ---- on a model ----------------------------------------------------------------------------------


class SecondChance:
    """Reward 1 for the right answer, 0.5 for it when asked again."""

    def __init__(self, row):
        self.question, self.answer = chat.last_text(row["prompt"]), row["answer"]
        self.reward = 1.0

    def step(self, answer):
        right, reward = answer.strip() == self.answer, self.reward
        self.reward -= 0.5
        return self.question, reward * right, right or reward < 1


SMALL = {
    "dataset": "tiny/grpo@train[:80]/test",
    "max_tokens": 8,
    "max_turns": 2,
    "reply_role": "user",
}


def history(path):
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_at_the_start_ratio_is_1_and_kl_0_over_several_answers(service, monkeypatch):
    """Pitfall 20. The sampler's numbers against the scorer's, in the second answer too."""
    monkeypatch.setattr(tool_rl, "Calculator", SecondChance)
    client = service.create_lora_training_client("tiny", rank=4, seed=0).result()
    reference = frozen_copy(service, client, "tiny")
    sampler = client.save_weights_and_get_sampling_client().result()
    rows = load_rows("tiny/grpo", ("prompt", "answer"))[:4]
    rows = [r for r in with_prompt_tokens(rows, client.get_tokenizer(), 99) for _ in range(4)]
    episodes = play(sampler, rows, Config(**SMALL), 200, "1")
    assert max(len(e.turns) for e in episodes) == 2
    data = add_ref_logprobs(reference, build_data(episodes, 4))
    logprobs = score(client, data)
    _, metrics = tool_rl_loss(data, logprobs, kl_coef=1.0)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["logprob_gap"] < 1e-4
    for d, lp in zip(data, logprobs, strict=True):
        assert torch.equal(lp, d.loss_fn_inputs["ref_logprobs"].to_torch())


def test_learns_and_repeats(tmp_path, monkeypatch):
    """Pitfall 35: the reward rises; the same seed gives the same run."""
    monkeypatch.setattr(tool_rl, "Calculator", SecondChance)
    sizes = {"num_steps": 10, "batch_size": 8, "test_rows": 20, "learning_rate": 2e-3}
    config = Config(**SMALL, **sizes, eval_every=99, log_path=str(tmp_path / "run"))
    after = train(config)
    rows = history(tmp_path / "run")
    assert after["test_reward"] > rows[0]["test_reward"] + 0.1
    assert abs(rows[0]["test_kl"]) < 1e-4
    assert rows[1]["calls"] > 0.1
    assert max(row["logprob_gap"] for row in rows if "logprob_gap" in row) < 1e-3
    assert (tmp_path / "run" / "plot.png").stat().st_size > 10_000
    train(Config(**SMALL, **sizes | {"num_steps": 1}, log_path=str(tmp_path / "again")))
    assert history(tmp_path / "again")[0] == rows[0]


FAULTS = {
    "raises": (lambda answer: 1 / 0, r"raised ZeroDivisionError"),
    "nothing": (lambda answer: None, r"wrong return value.*\(reply, reward, done\).*got None"),
    "no text": (lambda answer: (5, 0.0, False), r"reply: not text.*got 5"),
    "half a character": (lambda answer: ("\ud800", 0.0, False), r"reply: not text"),
    "nan": (lambda answer: ("", math.nan, True), r"wrong return value.*nan"),
    "no bool": (lambda answer: ("", 1.0, None), r"wrong return value.*None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_environment_names_its_row(fault, tokenizer, monkeypatch):
    step, match = FAULTS[fault]
    monkeypatch.setattr(tool_rl, "Calculator", lambda row: SimpleNamespace(step=step))
    rows = with_prompt_tokens(load_rows("tiny/grpo", ("prompt", "answer"))[2:3], tokenizer, 99)
    where = r"^grpo_train.jsonl:3, environment for the prompt 'What is .*\?', step 1"
    with pytest.raises(LossError, match=rf"{where}.*{match}"):
        play(Scripted(tokenizer, [f"5{END}"]), rows, Config(), 200, "0")


def test_an_environment_that_cannot_be_made_names_its_row(tokenizer, monkeypatch):
    rows = with_prompt_tokens(load_rows("tiny/grpo", ("prompt",))[2:3], tokenizer, 99)
    match = r"^grpo_train.jsonl:3, environment for the prompt .*\?': raised KeyError: 'answer'"
    with pytest.raises(LossError, match=match):
        play(Scripted(tokenizer, []), rows, Config(), 200, "0")


def test_an_environment_that_raises_leaves_the_runs_files(tmp_path, monkeypatch):
    calls = []

    class Failing(SecondChance):
        def step(self, answer):
            calls.append(answer)
            if len(calls) > 60:
                raise RuntimeError("the tool is down")
            return super().step(answer)

    monkeypatch.setattr(tool_rl, "Calculator", Failing)
    sizes = {"num_steps": 9, "batch_size": 2, "group_size": 4, "test_rows": 3}
    with pytest.raises(LossError, match=r"environment for the prompt 'What is .*tool is down"):
        train(Config(**SMALL, **sizes, log_path=str(tmp_path / "run")))
    steps = [row["step"] for row in history(tmp_path / "run")]
    assert steps[:3] == [0, 0, 1]
    assert steps[-1] < 8
    assert (tmp_path / "run" / "checkpoints" / "model-0" / "weights" / "reference").is_dir()


def test_a_run_whose_episodes_never_end_names_a_row_and_finishes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool_rl, "Calculator", Endless)
    sizes = {"num_steps": 1, "batch_size": 2, "group_size": 2, "test_rows": 2}
    after = train(Config(**SMALL, **sizes, log_path=str(tmp_path / "run")))
    assert (after["test_cut"], after["test_reward"]) == (1.0, 0.0)
    assert "grpo_test.jsonl:1: neither this episode nor another" in capsys.readouterr().out


def test_a_run_without_any_reward_says_so(tmp_path, capsys):
    """Without the warm start the calculator is never called, and nothing can be reinforced."""
    sizes = {"num_steps": 5, "batch_size": 2, "group_size": 2, "test_rows": 2, "eval_every": 9}
    after = train(Config(**sizes, log_path=str(tmp_path / "run")))
    assert (after["test_reward"], after["test_kl"]) == (0.0, pytest.approx(0.0, abs=1e-6))
    out = capsys.readouterr().out
    assert "no held-out episode has a reward: first run the first command" in out
    assert "every completion of a prompt had the same reward" in out
