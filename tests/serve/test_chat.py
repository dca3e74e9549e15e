"""The OpenAI-compatible endpoints, through the `openai` package's client."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace

from cookbook_core import tinker
from cookbook_core.errors import RequestError
from cookbook_core.serve.completions import Growing
from cookbook_core.storage.paths import asset_path
from tests.conftest import make_random_data
from tests.serve.running import NAME, Running, Wire, adam, scoring

import numpy as np
import openai
import pytest


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The bundled model: it has a chat template."""
    folder = str(asset_path("tiny_model"))
    with Running(folder, tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def chat(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        yield client


QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]


def test_chat_says_what_the_sampler_says(running, chat, make_service):
    here = make_service().create_sampling_client(base_model="tiny").result()
    tokenizer = here.get_tokenizer()
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    params = tinker.SamplingParams(max_tokens=20, temperature=0.0)
    expected = here.sample(tinker.ModelInput.from_ints(ids), 1, params).result().sequences[0]
    answer = chat.chat.completions.create(
        model=NAME, messages=QUESTION, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    ended = expected.stop_reason == "stop"
    tokens = expected.tokens[:-1] if ended else expected.tokens
    assert choice.message.content == tokenizer.decode(tokens)
    assert choice.finish_reason == ("stop" if ended else "length")
    assert answer.usage.prompt_tokens == len(ids)
    found = [token.logprob for token in choice.logprobs.content]
    scores = here.compute_logprobs(tinker.ModelInput.from_ints([*ids, *tokens])).result()
    assert np.allclose(found, scores[len(ids) :], atol=1e-4)
    first = choice.logprobs.content[0]
    assert first.top_logprobs[0].token == first.token  # greedy
    assert first.top_logprobs[0].logprob >= first.top_logprobs[1].logprob


def test_streams_seeds_and_several_answers(chat):
    options = {"model": NAME, "messages": QUESTION, "max_tokens": 12, "seed": 3}
    one = chat.chat.completions.create(**options, n=3)
    assert len({choice.message.content for choice in one.choices}) > 1
    chunks = list(
        chat.chat.completions.create(
            **options, n=3, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in one.choices]
    assert chunks[-1].usage.completion_tokens == one.usage.completion_tokens
    other = chat.chat.completions.create(**{**options, "seed": 4}, n=3)
    assert [c.message.content for c in other.choices] != texts


def test_a_stream_sends_text_before_the_completion_ends(running, chat, monkeypatch):
    """Decoding waits until the client has read the first part: only a live stream gets on."""
    engine, read = running.backend.engine(), threading.Event()
    sample = engine.sample

    monkeypatch.setattr(engine, "sample", lambda a, rs: sample(a, [paused(r, read) for r in rs]))
    options = {"model": NAME, "prompt": "The capital of", "max_tokens": 24, "seed": 2}
    parts = []
    for chunk in chat.completions.create(**options, stream=True):
        parts.append(chunk.choices[0].text)
        read.set()
    assert len(parts) > 2
    monkeypatch.undo()
    assert "".join(parts) == chat.completions.create(**options).choices[0].text


def paused(request, read):
    """The request, whose decoding stops after three tokens until `read` is set."""

    def on_token(sample, n, token):
        request.on_token(sample, n, token)
        assert n < 3 or read.wait(20), "nothing was sent"

    return dataclasses.replace(request, on_token=on_token) if request.on_token else request


def test_streams_of_several_prompts_equal_whole_answers(chat):
    options = {"model": NAME, "prompt": ["The capital", "One two"], "max_tokens": 16, "seed": 1,
               "n": 2}  # fmt: skip
    whole = chat.completions.create(**options, stop=["e "])
    for more in ({}, {"logprobs": 1}, {"echo": True}):  # the last two are sent when complete
        expected = chat.completions.create(**options, **more, stop=["e "])
        texts, ends = [""] * 4, [None] * 4
        for chunk in chat.completions.create(**options, **more, stop=["e "], stream=True):
            choice = chunk.choices[0]
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
        assert texts == [choice.text for choice in expected.choices]
        assert ends == [choice.finish_reason for choice in expected.choices]
    assert len({choice.text for choice in whole.choices}) > 1
    with pytest.raises(openai.UnprocessableEntityError, match="max_tokens"):  # before the stream
        chat.completions.create(model=NAME, prompt="a", max_tokens=10**6, stream=True)


def test_growing_text_keeps_back_what_a_stop_may_take():
    """Half a character, the beginning of a stop, and tokens that are drawn a second time."""
    words = {1: "a", 2: "<e", 3: "nd>", 4: "b", 5: "<\ufffd"}
    decode = SimpleNamespace(decode=lambda ids, **_: "".join(words[i] for i in ids))
    wanted = SimpleNamespace(stop=("<end>",), tokenizer=decode)
    growing = Growing(wanted)
    assert [growing.add(n, token) for n, token in enumerate((1, 2, 4), start=1)] == ["a", "", "<eb"]
    assert growing.add(2, 2) == ""
    assert growing.add(4, 5) == ""
    assert (growing.rest("a<eb<x"), growing.sent) == ("<x", "a<eb<x")
    with pytest.raises(RequestError, match="does not begin with what was sent"):
        growing.rest("other")
    stopped = Growing(wanted)
    assert [stopped.add(n, token) for n, token in enumerate((4, 2, 3), start=1)] == ["b", "", ""]
    assert stopped.rest("b") == ""


def test_completions_stop_and_echo(running, chat, make_service):
    """Echo with logprobs is how evaluation harnesses score answers."""
    options = {"model": NAME, "prompt": "The capital of", "max_tokens": 24, "temperature": 0}
    whole = chat.completions.create(**options).choices[0].text
    assert len(whole) > 4
    cut = whole[2:4]
    stopped = chat.completions.create(**options, stop=[cut]).choices[0]
    assert stopped.text == whole[: whole.index(cut)]
    assert stopped.finish_reason == "stop"
    here = make_service().create_sampling_client(base_model="tiny").result()
    ids = here.get_tokenizer().encode("Paris is the capital")
    scored = chat.completions.create(
        model=NAME, prompt=[ids], max_tokens=0, echo=True, logprobs=1, temperature=0
    ).choices[0]
    expected = here.compute_logprobs(tinker.ModelInput.from_ints(ids)).result()
    assert scored.text == "Paris is the capital"
    assert scored.logprobs.token_logprobs[0] is None
    assert np.allclose(scored.logprobs.token_logprobs[1:], expected[1:], atol=1e-4)
    assert "".join(scored.logprobs.tokens) == scored.text
    best = [max(top.values()) for top in scored.logprobs.top_logprobs[1:]]
    pairs = zip(best, expected[1:], strict=True)
    assert all(top >= own - 1e-4 for top, own in pairs)
    several = chat.completions.create(**{**options, "prompt": ["a", "b"]})
    assert len(several.choices) == 2


def test_echo_keeps_the_logprob_of_an_end_token(chat, make_service):
    """lm-evaluation-harness draws one token and drops its logprob: without one, every answer would
    score 0 wherever the model ends its turn."""
    here = make_service().create_sampling_client(base_model="tiny").result()
    answered = [*QUESTION, {"role": "assistant", "content": "5"}]
    ids = here.get_tokenizer().apply_chat_template(answered, return_dict=False)[:-1]
    scored = chat.completions.create(
        model=NAME, prompt=[ids], max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234
    ).choices[0]
    assert (scored.finish_reason, scored.text[-1]) == ("stop", "5")
    expected = here.compute_logprobs(tinker.ModelInput.from_ints(ids)).result()
    assert len(scored.logprobs.token_logprobs) == len(ids) + 1
    assert np.allclose(scored.logprobs.token_logprobs[1:-1], expected[1:], atol=1e-4)


def test_saved_adapters_are_models_too(running, chat):
    with Wire(running.url) as client:
        model = client.start(rank=8)
        for seq in (1, 3, 5):
            client.call("forward_backward", scoring(model, seq, make_random_data(4, vocab=1000)))
            client.call("optim_step", adam(model, seq + 1, 3e-2))
        path = client.call(
            "save_weights_for_sampler", {"model_id": model, "seq_id": 7, "path": "end"}
        )["path"]
    assert {NAME, path} <= {m.id for m in chat.models.list()}
    options = {"prompt": "the answer is", "max_tokens": 10, "temperature": 0}
    texts = [chat.completions.create(model=m, **options).choices[0].text for m in (NAME, path)]
    assert texts[0] != texts[1]


def test_what_is_not_supported_is_refused_by_name(chat):
    cases = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "presence_penalty": 0.5,
        "response_format": {"type": "json_object"},
        "max_tokens": -1,
        "top_logprobs": 2,
    }
    for name, value in cases.items():
        with pytest.raises(openai.UnprocessableEntityError, match=name):
            chat.chat.completions.create(model=NAME, messages=QUESTION, **{name: value})
    with pytest.raises(openai.NotFoundError, match="This server has"):
        chat.chat.completions.create(model="gpt", messages=QUESTION)
    with pytest.raises(openai.UnprocessableEntityError, match="messages"):
        chat.chat.completions.create(model=NAME, messages=[{"role": "user", "content": 3}])
