"""The distill recipe: divergences in closed form, identities, errors, and that it learns."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from cookbook_core import clients, datum_from_prompt_completion, runs, tinker, with_inputs
from cookbook_core.custom_loss import differentiate
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.runs import RunFlags, read_metrics
from recipes.distill import (
    Config,
    divergence_of,
    exact_loss,
    example_data,
    in_context,
    sampled_loss,
    top_k_loss,
    train,
)

import pytest
import torch
from transformers import AutoTokenizer

KINDS = ("forward", "reverse", "jensen_shannon")
TINY = Path(__file__).parents[2] / "cookbook_core" / "assets" / "tiny_model"
REVERSE = "reverse: {prompt}"
FEW = "tiny/lists@train[:40]/train[40:60]"


def oracle(log_p: torch.Tensor, log_q: torch.Tensor, kind: str) -> torch.Tensor:
    """The textbook sums."""
    p, q = log_p.exp(), log_q.exp()

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    mean = (p + q) / 2
    return {
        "forward": lambda: kl(q, p),
        "reverse": lambda: kl(p, q),
        "jensen_shannon": lambda: (kl(p, mean) + kl(q, mean)) / 2,
    }[kind]()


def random_rows(count: int, vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, vocab, generator=random, dtype=torch.float64)
    return logits.log_softmax(-1)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """They take seconds."""
    monkeypatch.setattr(runs.run, "draw_panels", lambda *_: "plot.png")


# ---- divergences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [("forward", 0.192745), ("reverse", 0.223144), ("jensen_shannon", 0.050671)],
)
def test_value_by_hand(kind, value):
    """p = (0.5, 0.5), q = (0.8, 0.2). forward 0.8 ln 1.6 + 0.2 ln 0.4; reverse 0.5 ln 0.625 +
    0.5 ln 2.5; for Jensen-Shannon the mean is (0.65, 0.35): half of 0.5 ln(0.5/0.65) +
    0.5 ln(0.5/0.35) = 0.047157, and half of 0.8 ln(0.8/0.65) + 0.2 ln(0.2/0.35) = 0.054186."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    assert divergence_of(p, q, kind).tolist() == pytest.approx([value], abs=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_against_float64(kind):
    """Also of rows in which one has nothing where the other has all: 100 nats apart."""
    log_p, log_q = random_rows(50, 30, seed=1), random_rows(50, 30, seed=2)
    certain = torch.tensor([[0.0, -50.0, -50.0], [-50.0, 0.0, -50.0]], dtype=torch.float64)
    for p, q in ((log_p, log_q), (certain.log_softmax(-1), certain.flip(0).log_softmax(-1))):
        logits = [p.clone().requires_grad_() for _ in range(2)]
        found = divergence_of(logits[0].log_softmax(-1), q, kind)
        wanted = oracle(logits[1].log_softmax(-1), q, kind)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        grads = [
            torch.autograd.grad(x.sum(), lp)[0]
            for x, lp in zip((found, wanted), logits, strict=True)
        ]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_value_and_gradient_exactly_0(kind):
    """In float32, so that a student that is its own teacher stays what it is, to the bit."""
    logits = random_rows(20, 500, seed=3).float().requires_grad_()
    log_p = logits.log_softmax(-1)
    value = divergence_of(log_p, log_p.detach(), kind)
    assert value.abs().max() == 0.0
    assert torch.autograd.grad(value.sum(), logits)[0].abs().max() == 0.0


# ---- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_pulls_to_the_teacher_and_spares_the_prompt(kind):
    """Two answers of 2 and 1 tokens: mean over three rows; the teacher prefers token 0."""
    datums = [datum_from_prompt_completion([1, 2], [3, 1]), datum_from_prompt_completion([1], [2])]
    teacher = [torch.tensor([[0.9, 0.05, 0.03, 0.02]]).log().expand(n, 4) for n in (2, 1)]
    logprobs = [torch.full((n, 4), 0.25).log() for n in (3, 1)]
    loss_fn = partial(exact_loss, divergence=kind, teacher_rows=teacher)
    views = [lambda lp: lp.log_softmax(-1)] * 2
    result = differentiate(loss_fn, datums, [lp.clone() for lp in logprobs], views=views)
    expected = divergence_of(logprobs[1], teacher[1], kind).item()
    assert result.loss == result.metrics["divergence"] == pytest.approx(expected)
    first, second = result.grads
    assert first[0].tolist() == [0.0] * 4
    for row in (first[1], first[2], second[0]):
        assert row[0] < 0 < min(row[1:])
        torch.testing.assert_close(row, second[0])


def test_top_k_of_the_whole_vocabulary_is_the_forward_divergence():
    """And of fewer tokens the renormalised teacher's, whatever p has elsewhere."""
    log_p, log_q = random_rows(3, 6, seed=1), random_rows(3, 6, seed=2)
    datum = datum_from_prompt_completion([1], [2, 3, 4])
    for ids in (list(range(6)), [4, 1]):
        inputs = {"target_tokens": [ids] * 3, "teacher_logprobs": log_q[:, ids]}
        loss, metrics = top_k_loss([with_inputs(datum, **inputs)], [log_p[:, ids]])
        q = log_q[:, ids].log_softmax(-1)
        wanted = (q.exp() * (q - log_p[:, ids])).sum(-1).mean().item()
        assert loss.item() == metrics["divergence"] == pytest.approx(wanted, rel=1e-6)
    assert pytest.approx(wanted, rel=1e-6) != oracle(log_p, log_q, "forward").mean().item()


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_the_sampled_gradient_is_that_of_the_kl_in_expectation(kind):
    """By enumeration of the six tokens that the writer may write, in float64."""
    logits = random_rows(1, 6, seed=1)[0].requires_grad_()
    log_q = random_rows(1, 6, seed=2)[0]
    log_p = logits.log_softmax(-1)
    wanted = torch.autograd.grad(oracle(log_p, log_q, kind), logits)[0]
    writer = (log_p if kind == "reverse" else log_q).exp().detach()
    expected, value = torch.zeros(6, dtype=torch.float64), 0.0
    for token in range(6):
        teacher = torch.tensor([log_q[token].item()], dtype=torch.float64)
        datum = datum_from_prompt_completion([1], [token])
        datum = with_inputs(datum, teacher_logprobs=tinker.TensorData(teacher.numpy(), "float64"))
        log_p = logits.log_softmax(-1)
        loss, metrics = sampled_loss([datum], [log_p[token : token + 1]], divergence=kind)
        expected += writer[token] * torch.autograd.grad(loss, logits)[0]
        value += writer[token].item() * metrics["divergence"]
    torch.testing.assert_close(expected, wanted, rtol=1e-12, atol=1e-12)
    assert value == pytest.approx(oracle(log_p.detach(), log_q, kind).item(), rel=1e-12)


def test_errors_say_where():
    data = example_data("exact_loss")[:2]
    tables = [torch.randn(d.model_input.length, 11).log_softmax(-1) for d in data]
    bare = datum_from_prompt_completion([1], [2, 3])
    with pytest.raises(DatumError, match=r'data\[1\].*"teacher_logprobs"'):
        exact_loss([data[0], bare], [tables[0], tables[1][:2]], divergence="forward")
    with pytest.raises(DatumError, match=r'data\[0\].*"weights"'):
        exact_loss(data, [tables[0][:1], tables[1]], divergence="forward")
    with pytest.raises(DatumError, match=r"others\[0\]: misaligned"):
        exact_loss(data, tables, divergence="forward", teacher_rows=[t[:1] for t in tables])
    with pytest.raises(DatumError, match=r'data\[0\].*"teacher_logprobs"'):
        sampled_loss([bare], [torch.zeros(2)], divergence="reverse")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": "reverse this"}, r'Config.context: out of range.*text with "\{prompt\}"'),
        ({"context": "{prompt"}, r"Config.context"),
        ({"estimate": "top_k", "divergence": "reverse"}, r"Config.divergence.*Expected forward"),
        ({"estimate": "sampled"}, r"Config.divergence.*Expected reverse.*--divergence reverse"),
        (
            {"estimate": "sampled", "answers": "teacher", "divergence": "jensen_shannon"},
            r"Config.divergence.*Expected forward, got jensen_shannon",
        ),
        ({"divergence": "backward"}, r"Config.divergence: unknown choice"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Config(**fields)


def test_context_goes_around_the_last_message_and_may_have_braces():
    picture, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "a"}
    asked = in_context([{"role": "user", "content": [picture, text]}], "b {prompt}")
    assert asked[0]["content"] == [picture, {"type": "text", "text": "b a"}]
    assert in_context("a b", 'Answer as {"x": 1}: {prompt}') == 'Answer as {"x": 1}: a b'
    turns = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "a b"}]
    asked = in_context(turns, REVERSE)
    assert asked == [turns[0], {"role": "user", "content": "reverse: a b"}]
    assert turns[1]["content"] == "a b"


# ---- teachers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory):
    """The bundled model with two tokens of its vocabulary exchanged."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(TINY, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    first, second = [t for t, i in sorted(vocab.items(), key=lambda item: item[1])][40:42]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(folder).get_vocab()[first] == vocab[first]
    return folder


def test_another_vocabulary_is_one_error_and_moves_no_run(tmp_path, other_vocabulary):
    sizes = {"num_steps": 1, "batch_size": 2, "test_rows": 2, "log_path": str(tmp_path / "run")}
    sizes["dataset"] = FEW
    train(Config(**sizes))
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("[!.]*.*")}
    with pytest.raises(
        ConfigError, match=r"Config.teacher: .*other and the student have diff.* 2 "
    ):
        train(Config(**sizes, teacher=str(other_vocabulary)), RunFlags(fresh=True))
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_exact_is_refused_for_a_service_before_anything_is_written(tmp_path):
    config = Config(log_path=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"Config.estimate: .*this machine.*top_k or sampled"):
        train(config, RunFlags(base_url="http://127.0.0.1:9"))
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_may_be_a_run_a_lora_folder_or_a_model(tmp_path):
    """Each gives the logprobs of its own weights; a model those of the untrained base."""
    sizes = {"num_steps": 2, "batch_size": 4, "test_rows": 2, "context": REVERSE, "dataset": FEW}
    run = tmp_path / "run"
    train(Config(**sizes, log_path=str(run)))
    service = tinker.ServiceClient(checkpoint_dir=tmp_path / "checkpoints")
    student = service.create_lora_training_client("tiny", 4, 0, train_unembed=False).result()
    final = next(run.glob("checkpoints/*/sampler_weights/final"))
    trained = service.create_training_client_from_state(str(final)).result()
    data = [datum_from_prompt_completion([5, 6], [7, 8, 9])]
    for teacher, wanted in ((run, trained), (final, trained), (TINY, student), ("tiny", student)):
        opened = clients.open_teacher(service, str(teacher), student, same_size=True)
        assert torch.equal(clients.score(opened, data)[0], clients.score(wanted, data)[0])
    assert not torch.equal(clients.score(trained, data)[0], clients.score(student, data)[0])


def test_a_teachers_logprobs_are_those_of_the_answer_after_its_own_prompt(tmp_path):
    """Sampled, top_k and whole rows agree with each other, though its prompt is longer."""
    service = tinker.ServiceClient(checkpoint_dir=tmp_path)
    teacher = service.create_lora_training_client("tiny", 1, 0, train_unembed=False).result()
    sampler = teacher.save_weights_and_get_sampling_client().result()
    answers = [[7, 8, 9], [10]]
    own = [datum_from_prompt_completion([5], answer) for answer in answers]
    asked = [datum_from_prompt_completion([5, 6, 11], answer) for answer in answers]
    sampled = clients.add_teacher_logprobs(teacher, own, asked)
    top = clients.add_top_logprobs(sampler, own, asked, 3)
    tables = clients.vocab_logprobs(teacher, asked)
    for answer, one, few, rows in zip(answers, sampled, top, tables, strict=True):
        each = rows[:]
        on = one.loss_fn_inputs["weights"].to_torch() != 0
        lp = one.loss_fn_inputs["teacher_logprobs"].to_torch()
        torch.testing.assert_close(lp[on], each[range(len(answer)), answer])
        best = each.topk(3)
        assert torch.equal(few.loss_fn_inputs["target_tokens"].to_torch()[on], best.indices)
        lp = few.loss_fn_inputs["teacher_logprobs"].to_torch()
        torch.testing.assert_close(lp[on], best.values, atol=1e-5, rtol=0)


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "estimate"), [("forward", "exact"), ("reverse", "sampled")])
def test_a_student_that_is_its_own_teacher_stays_at_0_to_the_bit(divergence, estimate, tmp_path):
    sizes = {"num_steps": 2, "batch_size": 2, "test_rows": 4, "log_path": str(tmp_path)}
    sizes["dataset"] = FEW
    train(Config(**sizes, divergence=divergence, estimate=estimate))
    rows = read_metrics(tmp_path)
    assert {row["test_kl"] for row in rows if "test_kl" in row} == {0.0}
    assert {row["test_agreement"] for row in rows if "test_kl" in row} == {1.0}
    steps = [row for row in rows if "loss" in row]
    assert {row["divergence"] for row in steps} == {row["update_norm"] for row in steps} == {0.0}


def test_learns_what_the_context_says_and_sampled_reverse_does_not(tmp_path):
    """Reverse KL of sampled tokens has no support here, and agrees with the teacher on no prompt,
    like the untrained model."""
    sizes = {"eval_every": 24, "test_rows": 30, "context": REVERSE}
    sizes["dataset"] = "tiny/lists@train[:384]/train[400:440]"
    after = train(Config(**sizes, num_steps=24, log_path=str(tmp_path / "run")))
    before = read_metrics(tmp_path / "run")[0]
    assert before["test_agreement"] == 0.0
    assert after["test_agreement"] > 0.2
    assert after["test_kl"] < before["test_kl"] - 0.5
    sampled = {"divergence": "reverse", "estimate": "sampled", "num_steps": 12}
    null = train(Config(**sizes, **sampled, log_path=str(tmp_path / "null")))
    assert null["test_agreement"] == 0.0
