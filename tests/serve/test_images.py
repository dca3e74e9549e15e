"""Images over the wire: the in-process client's numbers, and what is refused."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cookbook_core import datum_from_prompt_completion, tinker
from cookbook_core.backend.local.model.vision import VisionTower
from cookbook_core.backend.local.scoring.image_check import probe_images
from cookbook_core.chat.rendering import render_prompt
from cookbook_core.conformance import IMAGES, check_service
from cookbook_core.serve import wire
from cookbook_core.types import Datum, EncodedTextChunk, ImageChunk, ModelInput
from tests.conftest import make_random_data
from tests.serve.images_program import ours
from tests.serve.running import NAME, Running, Wire, json_prompt, proto_scoring, scoring
from tests.serve.test_sdk_sampling import assert_same
from tests.tiny_vision import picture, write

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)


TEMPLATE = """\
{%- for m in messages %}{{ m.role }}:
{%- if m.content is string %}{{ m.content }}{% else %}
{%- for p in m.content %}
{%- if p.type == "image" %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}</s>{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_tokenizer) -> str:
    path = tmp_path_factory.mktemp("qwen3_vl")
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return write("qwen3_vl", path, small_tokenizer)


@pytest.fixture(scope="module")
def running(folder, tmp_path_factory):
    with Running(folder, tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def client(running):
    with Wire(running.url) as made:
        yield made


def text(*tokens: int) -> EncodedTextChunk:
    return EncodedTextChunk(list(tokens))


IMAGE = ImageChunk(picture(0), "png", 4)
OTHER = ImageChunk(picture(1, (64, 32), "JPEG"), "jpeg", 8)
PROMPT = ModelInput([text(40, 41), OTHER, text(42), IMAGE, text(43, 44)])
DATA = [
    datum_from_prompt_completion(ModelInput([text(5, 6), IMAGE, text(7)]), [50, 51]),
    datum_from_prompt_completion(ModelInput([text(5, 6), IMAGE, text(7)]), [52]),
    datum_from_prompt_completion(PROMPT, [53]),
    datum_from_prompt_completion([5, 6, 7], [54]),
]


def with_count(count: int | None) -> list[Datum]:
    """A datum whose image states this number of positions."""
    targets = {"target_tokens": [0] * (4 + (count or 4)), "weights": [0.0] * (4 + (count or 4))}
    image = ImageChunk(IMAGE.data, "png", count)
    return [Datum(ModelInput([text(5, 6), image, text(7, 8)]), targets)]


def as_lists(value: ModelInput) -> list[Any]:
    return [
        [base64.b64encode(c.data).decode(), c.format, c.expected_tokens]
        if isinstance(c, ImageChunk) else list(c.tokens)
        for c in value.chunks
    ]  # fmt: skip


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the SDK needs Python 3.11")
def test_the_sdk_and_our_client_get_what_is_computed_here(running, folder, tmp_path, make_service):
    sdk = Path(sys.prefix) / "sdk" / "0.38.0"
    if not sdk.is_dir():
        pytest.skip(f"no {sdk}; make test installs it")
    given = {"prompt": as_lists(PROMPT)}
    for name, data in (("data", DATA), ("bad", with_count(5))):
        given[name] = [
            {
                "chunks": as_lists(d.model_input),
                "targets": d.loss_fn_inputs["target_tokens"].tolist(),
                "weights": d.loss_fn_inputs["weights"].tolist(),
            }
            for d in data
        ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    env = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{sdk}", "NO_PROXY": "127.0.0.1",
        "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0",
    }  # fmt: skip
    program = ["-W", "ignore", "-m", "tests.serve.images_program", running.url, NAME, str(file)]
    done = subprocess.run(
        [sys.executable, *program],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    out = json.loads(done.stdout.splitlines()[-1])
    here = ours(make_service(), folder, given)
    assert all(lp is None for lp in here["alone"][2:10])
    says = "data[0].model_input.chunks[1].expected_tokens: not the number of positions that this "
    says += "model makes of the image. Expected 4, got 5."
    assert all(says in each.pop("bad") for each in (here, *out.values()))
    assert_same(out["ours"], here)
    del here["frozen"]
    assert_same(out["sdk"], here)


def test_protobuf_and_json_are_the_same_and_the_tower_runs_once(running, client):
    tower = running.backend.engine().scorer.tower()
    new = ImageChunk(picture(5), "png", 4)
    value = ModelInput([text(5, 6), new, text(7)])
    data = [datum_from_prompt_completion(value, [50 + n]) for n in range(3)]
    before = tower.runs
    with Wire(running.url, proto=True) as binary:
        one, other = client.start(), binary.start()
        plain = client.call("forward", scoring(one, 1, data, forward=True))
        raw = binary.call("forward_backward", proto_scoring(other, 1, data))
    assert tower.runs == before + 1
    found = wire.parse("Output", raw).loss_fn_outputs[0].fields["logprobs"].data
    expected = [v for o in plain["loss_fn_outputs"] for v in o["logprobs"]["data"]]
    assert np.frombuffer(found, np.float32).tolist() == expected


def sampling(client: Wire, prompt: Any, **more: Any) -> dict[str, Any]:
    if not client.session:
        client.start()
    opened = client.post("create_sampling_session", {
        "session_id": client.session, "sampling_session_seq_id": 1, "base_model": NAME,
    }).json()  # fmt: skip
    params = {"max_tokens": 2, "temperature": 0.0}
    sampler = {"sampling_session_id": opened["sampling_session_id"], "sampling_params": params}
    return {**sampler, "prompt": prompt, **more}


BAD_CHUNKS = [
    ({"data": "%%"}, r"chunks[1].data: not base64"),
    ({"data": ""}, r"chunks[1].data: wrong type"),
    ({"data": base64.b64encode(IMAGE.data[:-50]).decode()}, "the image cannot be read"),
    ({"format": "jpeg"}, "another format than the chunk names"),
    ({"format": "gif"}, "chunks[1].format: wrong type"),
    ({"expected_tokens": 7}, "Expected 4, got 7"),
    ({"expected_tokens": None}, "Expected 4, got None"),
    ({"expected_tokens": -1}, "expected_tokens: wrong type or value"),
    ({"location": "file:///etc/passwd"}, "location"),
    ({"type": "image_asset_pointer"}, "not supported by this server"),
]


@pytest.mark.parametrize(("change", "says"), BAD_CHUNKS)
def test_bad_images_of_a_prompt_are_named(client, change, says):
    prompt = json_prompt(ModelInput([text(5), IMAGE, text(6)]))
    fresh = picture(70 + len(says), (40, 40))  # of an image read before, no bytes are looked at
    prompt["chunks"][1] |= {"data": base64.b64encode(fresh).decode(), **change}
    reply = client.post("asample", sampling(client, prompt))
    assert reply.status_code == 422
    assert says in reply.json()["detail"]


def test_bad_images_of_a_batch_fail_in_their_turn(running, client):
    model = client.start()
    body = scoring(model, 1, with_count(None))
    assert "expected_tokens: missing" in client.call("forward_backward", body)["error"]
    message = proto_scoring(model, 2, with_count(5))
    assert "Expected 4, got 5" in client.call("forward_backward", message)["error"]
    resized = wire.MESSAGES["Request"].FromString(proto_scoring(model, 3, with_count(4)))
    # the SDK's override_dimensions: width 2
    resized.data[0].model_input[1].image.MergeFromString(b"\x22\x02\x08\x02")
    failed = client.call("forward_backward", resized.SerializeToString())["error"]
    assert "data[0].model_input.chunks[1]: has fields that this server does not know" in failed
    assert running.adapter(model).grads is None


def test_a_text_only_model_refuses_by_name(model_folder, tmp_path):
    with Running(model_folder("qwen3"), tmp_path) as server, Wire(server.url) as client:
        reply = client.post("asample", sampling(client, json_prompt(PROMPT)))
        assert "sample.prompt.chunks[1]: an image, and this model is given none" in reply.text
        model = client.start()
        failed = client.call("forward_backward", scoring(model, 1, DATA[2:]))["error"]
        assert "data[0].model_input.chunks[1]: an image" in failed
        assert "error" not in client.call(
            "forward_backward", scoring(model, 2, make_random_data(1))
        )


# ---- chat ----------------------------------------------------------------------------------------


def question(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
             {"type": "text", "text": "Which?"}]  # fmt: skip
    return [{"role": "system", "content": "Look."}, {"role": "user", "content": parts}]


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_chat_reads_images_of_the_request(client, folder, make_service):
    here = make_service().create_sampling_client(base_model=folder).result()
    messages = question(data_url(IMAGE.data))
    own = [messages[0], {"role": "user", "content": [{"type": "image", "image": IMAGE.data},
                                                     messages[1]["content"][1]]}]  # fmt: skip
    prompt = render_prompt(here.get_tokenizer(), own)
    assert [image.data for image in prompt.images] == [IMAGE.data]
    params = tinker.SamplingParams(max_tokens=4, temperature=0.0)
    expected = here.sample(prompt, 1, params).result().sequences[0]
    asked = {"model": NAME, "messages": messages, "max_tokens": 4, "temperature": 0}
    reply = client.http.post("/v1/chat/completions", json={**asked, "logprobs": True}).json()
    (choice,) = reply["choices"]
    found = [token["logprob"] for token in choice["logprobs"]["content"]]
    assert found == pytest.approx(expected.logprobs[: len(found)], abs=1e-5)
    assert choice["message"]["content"] == here.get_tokenizer().decode(
        expected.tokens[: len(found)]
    )
    assert reply["usage"]["prompt_tokens"] == prompt.length
    streamed = client.http.post("/v1/chat/completions", json={**asked, "stream": True}).text
    pieces = [json.loads(x[6:]) for x in streamed.splitlines() if x.startswith("data: {")]
    texts = [choice["delta"].get("content") or "" for x in pieces for choice in x["choices"]]
    assert "".join(texts) == choice["message"]["content"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:9/a.png", "this server fetches nothing"),
        ("file:///etc/passwd", "this server fetches nothing"),
        ("data:text/html;base64,QUJD", "this server fetches nothing"),
        ("data:image/png;base64,%%", "messages[1].content[0].image_url.url: not base64"),
        (data_url(IMAGE.data[:-40]), "image_url.url: the image cannot be read"),
    ],
)
def test_chat_refuses_other_images(client, url, says):
    asked = {"model": NAME, "messages": question(url), "max_tokens": 4}
    reply = client.http.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 422
    assert says in reply.json()["error"]["message"]


# ---- cookbook check ------------------------------------------------------------------------------


def test_the_checks_of_images_pass_and_find_a_model_that_sees_none(folder, service, monkeypatch):
    def make_client():
        return service.create_lora_training_client(folder, rank=4, seed=0).result()

    def rows():
        return {row.name: row.outcome for row in check_service(make_client, IMAGES, below=False)}

    assert {name: found.result for name, found in rows().items()} == {
        "images": "pass", "refuses an image of another length": "pass",
    }  # fmt: skip
    tower = make_client()._backend._engine.scorer.tower()
    blind = tower.features(probe_images(tower)[0])
    monkeypatch.setattr(VisionTower, "features", lambda self, chunk: blind)
    seen = rows()["images"]
    assert (seen.result, seen.figure[:42]) == ("fail", "another image moves logprobs by 0 nats, th")
