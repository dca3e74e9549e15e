"""--sampler_url: samples of a vLLM server (tests/fake_vllm.py), and what is refused."""

from __future__ import annotations

import gc
import json
import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cookbook_core.backend.local.vllm_sampler import close_all
from cookbook_core.backend.local.vllm_server import VllmServer
from cookbook_core.errors import AnswerError, ConfigError, ProcessError, RequestError
from cookbook_core.runs import RunFlags
from cookbook_core.tinker import ModelInput, SamplingParams, ServiceClient, TrainingClient
from recipes import grpo
from tests.fake_vllm import FakeVllm
from tests.oracles.logprobs import adapter_of, randomize

import pytest
import torch

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def fake(model_folder: Callable[..., str], tmp_path: Path) -> Iterator[FakeVllm]:
    with FakeVllm(model_folder("qwen3"), checkpoint_dir=tmp_path / "fake") as server:
        yield server


@pytest.fixture
def client(make_service: Any, fake: FakeVllm, model_folder: Any) -> TrainingClient:
    return new_client(make_service(sampler_url=fake.url), model_folder())


def new_client(service: ServiceClient, folder: str, **options: Any) -> TrainingClient:
    options = {"rank": 4, "seed": 0, "train_unembed": False, **options}
    made = service.create_lora_training_client(folder, **options).result()
    randomize(made)
    return made


def move(client: TrainingClient) -> None:
    """Change the adapter about as much as an optimizer step does."""
    with torch.no_grad():
        adapter_of(client).flat.add_(0.02)


def posts(fake: FakeVllm, path: str) -> list[dict[str, Any]]:
    return [body for sent, body in fake.posts if sent == f"/v1/{path}"]


# ---- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_the_model_in_training(client, temperature):
    sampler = client.save_weights_and_get_sampling_client().result()
    params = SamplingParams(6, seed=3, temperature=temperature, stop=[])
    response = sampler.sample(ModelInput.from_ints(PROMPT), 3, params).result()
    assert [len(s.tokens) for s in response.sequences] == [6, 6, 6]
    assert (len({tuple(s.tokens) for s in response.sequences}) == 1) == (temperature == 0)
    if temperature == 0.7:
        assert response.sequences[0].temperature == 0.7
        return
    for s in response.sequences:
        own = sampler.compute_logprobs(ModelInput.from_ints(PROMPT + s.tokens)).result()
        assert s.logprobs == pytest.approx(own[len(PROMPT) :], abs=1e-5)


def test_samples_depend_on_seeds_alone(client):
    """Whatever the order of requests; a neighbouring seed shares no sample."""
    sampler = client.save_weights_and_get_sampling_client().result()
    prompts = [ModelInput.from_ints([5 + i, 6]) for i in range(6)]
    params = [SamplingParams(8, seed=i, stop=[]) for i in range(6)]

    def tokens(order: list[int]) -> dict[int, list[list[int]]]:
        sent = sampler.sample_batch([prompts[i] for i in order], 2, [params[i] for i in order])
        return {
            i: [s.tokens for s in f.result().sequences] for i, f in zip(order, sent, strict=True)
        }

    first = tokens([0, 1, 2, 3, 4, 5])
    assert tokens([5, 3, 1, 0, 2, 4]) == first
    same_prompt = sampler.sample_batch([prompts[0]] * 2, 2, params[:2])
    drawn = [s.tokens for f in same_prompt for s in f.result().sequences]
    assert len({tuple(t) for t in drawn}) == 4


def test_requests_say_everything_that_a_generation_config_could_set(client, fake):
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = ModelInput.from_ints(PROMPT)
    for stop in (None, [9, 10], "a", []):
        sampler.sample(prompt, 1, SamplingParams(2, seed=1, stop=stop)).result()
    ended, ids, text, open_ended = posts(fake, "completions")[-4:]
    assert ended["prompt"] == PROMPT
    assert ended["stop_token_ids"] == [2]  # </s>
    assert (ids["stop_token_ids"], ids["stop"]) == ([9, 10], [])
    assert (text["stop_token_ids"], text["stop"]) == ([], ["a"])
    assert (open_ended["stop_token_ids"], open_ended["stop"]) == ([], [])
    for body in (ended, ids, text, open_ended):
        assert (body["top_p"], body["top_k"], body["min_p"]) == (1, 0, 0)
        assert (body["repetition_penalty"], body["ignore_eos"]) == (1, True)
        assert 0 <= body["seed"] < 2**62
    sampler.sample(prompt, 1, SamplingParams(temperature=1.0)).result()
    assert posts(fake, "completions")[-1]["max_tokens"] == 256 - len(PROMPT)  # the context's rest


def test_a_new_name_for_each_snapshot_and_the_unused_are_unloaded(client, fake, tmp_path):
    kept = client.save_weights_and_get_sampling_client().result()
    for _ in range(6):
        move(client)
        client.save_weights_and_get_sampling_client().result()
        assert len(fake.held) <= 4  # kept, the newest, two whose clients are gone
    names = [body["lora_name"] for body in posts(fake, "load_lora_adapter")]
    assert len(names) == len(set(names)) == 8  # a random one at connection, seven snapshots
    unloaded = [body["lora_name"] for body in posts(fake, "unload_lora_adapter")]
    assert unloaded[0] == names[0]
    assert set(unloaded).isdisjoint([names[1], names[7]])
    assert list(fake.held) == [name for name in names if name not in unloaded]
    assert len(list((tmp_path / "checkpoints").glob("vllm-*/*"))) == len(fake.held)
    first = kept.sample(ModelInput.from_ints(PROMPT), 1, SamplingParams(2, seed=0)).result()
    assert first.sequences[0].tokens


def test_closing_unloads_everything(make_service, fake, model_folder, tmp_path):
    service = make_service(sampler_url=fake.url)
    new_client(service, model_folder()).save_weights_and_get_sampling_client().result()
    assert len(fake.held) == 1
    service.close()
    assert not fake.held
    assert not list((tmp_path / "checkpoints").glob("vllm-*"))


def test_a_bare_base_model(make_service, fake, model_folder):
    service = make_service(sampler_url=fake.url)
    sampler = service.create_sampling_client(base_model=model_folder()).result()
    params = SamplingParams(3, seed=0, stop=[])
    assert len(sampler.sample(ModelInput.from_ints(PROMPT), 1, params).result().sequences) == 1
    assert not posts(fake, "load_lora_adapter")


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "wanted", "field"),
    [
        ({"top_k": 5}, {}, "params.top_k"),
        ({"top_p": 0.9}, {}, "params.top_p"),
        ({"temperature": 0.005}, {}, "params.temperature"),
        ({"temperature": 2.5}, {}, "params.temperature"),
        ({}, {"include_prompt_logprobs": True}, "include_prompt_logprobs"),
        ({}, {"topk_prompt_logprobs": 2}, "topk_prompt_logprobs"),
        ({}, {"topk_sample_logprobs": 2}, "topk_sample_logprobs"),
        ({}, {"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k"),
    ],
)
def test_what_differs_is_refused(client, fake, params, wanted, field):
    sampler = client.save_weights_and_get_sampling_client().result()
    sent = len(fake.posts)
    with pytest.raises(ConfigError, match=rf"sample\.{field}: not supported with sampler_url"):
        sampler.sample(ModelInput.from_ints(PROMPT), 1, SamplingParams(2, **params), **wanted)
    assert len(fake.posts) == sent
    sampler.sample(ModelInput.from_ints(PROMPT), 1, SamplingParams(2, top_k=10**6)).result()


def test_the_unembedding_and_a_service_are_refused(make_service, fake, model_folder):
    service = make_service(sampler_url=fake.url)
    trained = new_client(service, model_folder("llama"), train_unembed=True)
    with pytest.raises(ConfigError, match="train_unembed=False"):
        trained.save_weights_and_get_sampling_client().result()
    with pytest.raises(ConfigError, match="sampler_url: not supported with base_url"):
        make_service(base_url="http://127.0.0.1:9", sampler_url=fake.url)
    with pytest.raises(ConfigError, match="sampler_url: not a URL"):
        make_service(sampler_url="127.0.0.1:8000")


COMMAND = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve .* --enable-lora --max-lora-rank 8 "


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("static", rf"does not load adapters while it runs. Got 404: Not Found.*{COMMAND}"),
        ("rank", rf"LoRA rank 4 is greater than max_lora_rank 2\. Start it so: {COMMAND}"),
        (
            "bare",
            "it samples without the adapter. Expected .* nats of those computed here in float",
        ),
        ("raw", "ignore the temperature.*--logprobs-mode processed_logprobs"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_at_connection(client, fake, fault, match):
    fake.faults = {fault}
    with pytest.raises(ConfigError, match=match):
        client.save_weights_and_get_sampling_client().result()


def test_an_old_version_is_refused(client, fake):
    fake.faults = {"no_ids"}
    with pytest.raises(AnswerError, match=r"no token_ids.*Update vLLM to 0\.10\.2"):
        client.save_weights_and_get_sampling_client().result()


def test_another_base_model_is_refused(make_service, fake, model_folder):
    other = model_folder("qwen3", initializer_range=0.31)
    client = new_client(make_service(sampler_url=fake.url), other)
    # the fake itself refuses to open the adapter: let it sample from its own base model
    fake.answer = lambda path, body, answer=fake.answer: (
        (200, "Success") if "lora" in path else answer(path, {**body, "model": model_folder()})
    )
    with pytest.raises(ConfigError, match=r"not those of the model in training.*same base model"):
        client.save_weights_and_get_sampling_client().result()


def test_a_stale_adapter_is_caught_at_the_first_request(client, fake):
    client.save_weights_and_get_sampling_client().result()
    move(client)
    fake.faults = {"stale"}
    with pytest.raises(
        ProcessError, match=r"not those of the model in training.*within 0\.001 nats"
    ):
        client.save_weights_and_get_sampling_client().result()


def test_bfloat16_has_room_for_rounding(make_service, fake, model_folder):
    """The fake computes in float32: refused by a float32 trainer if it were bfloat16."""
    service = make_service(sampler_url=fake.url, dtype="bfloat16")
    new_client(service, model_folder()).save_weights_and_get_sampling_client().result()


@pytest.mark.parametrize("answer", [b"<html>", b'{"data": []}', b'{"data": [{"id": "x"}]}'])
def test_something_other_than_vllm_is_refused(monkeypatch, answer):
    server = VllmServer("http://127.0.0.1:1", "base", 100)
    monkeypatch.setattr(server, "_request", lambda *_: answer)
    with pytest.raises(ConfigError, match=r"no vLLM server at this URL.*vllm serve base"):
        server.connect()


def test_nothing_at_the_url(make_service, model_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = new_client(make_service(sampler_url=url), model_folder())
    with pytest.raises(ConfigError, match=r"no server answers at this URL.*refused"):
        client.save_weights_and_get_sampling_client().result()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"token_ids": [1]}, "1 tokens, 2 logprobs"),
        ({"token_ids": [1, 100]}, "token id of another model"),
        ({"logprobs": {"token_logprobs": [-1.0, -9999.0]}}, "not finite"),
        ({"logprobs": {"token_logprobs": [-1.0, math.nan]}}, "not finite"),
        ({"logprobs": None}, "cannot be read"),
        ({"index": None}, "cannot be read"),
        (None, "wrong number of completions"),
    ],
)
def test_answers_are_checked(monkeypatch, change, match):
    choice = {"index": 0, "finish_reason": "stop", "token_ids": [1, 2]}
    choice["logprobs"] = {"token_logprobs": [-1.0, -2.0]}
    other = {**choice, "index": 1}
    choices = [choice] if change is None else [choice, {**other, **change}]
    server = VllmServer("http://127.0.0.1:1", "base", 100)
    with pytest.raises(AnswerError, match=match):
        server._response(json.dumps({"choices": choices}).encode(), 2)
    assert (
        len(server._response(json.dumps({"choices": [choice, other]}).encode(), 2).sequences) == 2
    )


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("gone", "the server no longer answers"),
        ("forgets", "the server failed. Got 404: The model"),
        ("dead", "the server failed. Got 500: EngineCore"),
    ],
)
def test_a_server_that_fails_later_is_lost(client, fake, caplog, fault, match):
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt, params = ModelInput.from_ints(PROMPT), SamplingParams(2, seed=0)
    fake.faults = {fault}
    sent = sampler.sample_batch([prompt] * 3, 1, [params] * 3)
    with pytest.raises(ProcessError, match=match):
        sent[0].result()
    fake.faults = set()
    with pytest.raises(ProcessError, match=match):
        sampler.sample(prompt, 1, params).result()
    del sent
    gc.collect()
    assert not caplog.records  # of the two that nobody read


def test_a_request_that_the_server_refuses(client, fake):
    sampler = client.save_weights_and_get_sampling_client().result()
    fake.answer = lambda *_: (400, {"error": {"message": "too long"}})
    with pytest.raises(RequestError, match=r"refuses the request\. Got 400: too long"):
        sampler.sample(ModelInput.from_ints(PROMPT), 1, SamplingParams(2, seed=0)).result()


CONFIG = {"num_steps": 12, "kl_coef": 0.0, "batch_size": 8, "test_rows": 40, "eval_every": 99}
CONFIG["dataset"] = "tiny/grpo@train[:96]/test"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeVllm]:
    with FakeVllm("tiny", checkpoint_dir=tmp_path_factory.mktemp("fake")) as server:
        yield server


def test_grpo_reaches_its_reward(tiny, tmp_path):
    """As with this package's sampler: tests/recipes/test_grpo.py."""
    folder = tmp_path / "run"
    config = grpo.Config(**CONFIG, log_path=str(folder))
    after = grpo.train(config, RunFlags(sampler_url=tiny.url))
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert after["test_reward"] - rows[0]["test_reward"] > 0.1
    assert max(row["logprob_gap"] for row in rows if "logprob_gap" in row) < 1e-4
    machine = json.loads((folder / "config.json").read_text("utf-8"))["machine"]
    assert machine["sampler"] == "vllm"
    assert len(tiny.held) <= 3
    close_all()  # as at exit: recipes close no service
    assert not tiny.held
    assert not list(tmp_path.glob("*/checkpoints/vllm-*"))


def test_a_run_names_the_step_to_resume_from(tiny, tmp_path, monkeypatch):
    config = grpo.Config(**{**CONFIG, "num_steps": 4}, log_path=str(tmp_path / "run"))
    flags = RunFlags(sampler_url=tiny.url, save_every=1)
    loads, answer = [0], tiny.answer

    def fails_at_the_fourth(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        loads[0] += path == "/v1/load_lora_adapter"
        if loads[0] == 4:  # random, evaluation, step 0, step 1
            tiny.faults = {"gone"}
        return answer(path, body)

    monkeypatch.setattr(tiny, "answer", fails_at_the_fourth)
    with pytest.raises(ProcessError) as error:
        grpo.train(config, flags)
    tiny.faults = set()
    assert "\n" not in str(error.value)
    assert "the server no longer answers" in str(error.value)
    assert "is that of step 1: give the same command to resume" in str(error.value)
    after = grpo.train(config, flags)
    assert math.isfinite(after["test_reward"])
