"""The wire protocol by hand: results, order, retries, and what is refused."""

from __future__ import annotations

import concurrent.futures
import time

from cookbook_core import tinker, with_inputs
from cookbook_core.serve import turns, wire
from tests.conftest import make_random_data
from tests.oracles.logprobs import assert_close, take_gradient
from tests.serve.running import NAME, Wire, adam, proto_scoring, scoring

import numpy as np
import pytest

ADAM = tinker.AdamParams(learning_rate=1e-2)


def trained(client: Wire, model_id: str, seq: int = 1) -> int:
    """One step, so that A has a gradient; returns the next number."""
    client.call("forward_backward", scoring(model_id, seq, make_random_data(2, seed=9)))
    assert "error" not in client.call("optim_step", adam(model_id, seq + 1))
    return seq + 2


def trained_here(one) -> None:
    one.forward_backward(make_random_data(2, seed=9), "cross_entropy").result()
    one.optim_step(ADAM).result()


@pytest.mark.parametrize("k", [None, 3])
def test_losses_and_gradients_equal_the_local_client(running, client, local, k):
    model, here = client.start(), local()
    trained_here(here)
    seq, data = trained(client, model), make_random_data(4, k=k)
    reply = client.call("forward_backward", scoring(model, seq, data))
    expected = here.forward_backward(data, "cross_entropy").result()
    assert reply["metrics"]["loss:sum"] == pytest.approx(expected.loss, rel=1e-5)
    assert reply["metrics"]["passes:max"] == 1.0
    scores = here.forward(data, "cross_entropy").result()
    for out, own in zip(reply["loss_fn_outputs"], scores.loss_fn_outputs, strict=True):
        mine = own["logprobs"]
        assert out["logprobs"]["shape"] == mine.shape
        assert np.allclose(out["logprobs"]["data"], mine.data, atol=1e-5)
        assert np.all(np.asarray(out["logprobs"]["data"]) < 0)  # those of weight 0 too
    assert_close(running.gradient(model), take_gradient(here), 1e-5)


def test_protobuf_is_the_same(running, client):
    data = make_random_data(3)
    with Wire(running.url, proto=True) as binary:
        one, other = client.start(), binary.start()
        json = client.call("forward_backward", scoring(one, 1, data))
        raw = binary.call("forward_backward", proto_scoring(other, 1, data))
    out = wire.parse("Output", raw)
    assert dict(out.metrics) == json["metrics"]
    field = out.loss_fn_outputs[0].fields["logprobs"]
    ends = np.frombuffer(field.offsets, np.int64)
    assert len(ends) == len(data) + 1
    values = np.frombuffer(field.data, np.float32)
    expected = [v for o in json["loss_fn_outputs"] for v in o["logprobs"]["data"]]
    assert values.tolist() == expected


def test_sparse_tensors_are_dense_with_zeros():
    tensor = wire.MESSAGES["Tensor"](dtype=2, shape=[3, 4])
    csr = tensor.sparse_csr
    csr.values = np.asarray([7, 8, 9]).tobytes()
    csr.crow_indices, csr.col_indices = (np.asarray(x).tobytes() for x in ([0, 2, 2, 3], [0, 3, 1]))
    found = wire.tensor_in("x", tensor)
    assert found.tolist() == [[7, 0, 0, 8], [0, 0, 0, 0], [0, 9, 0, 0]]
    csr.col_indices = np.asarray([0, 4, 1]).tobytes()
    with pytest.raises(ValueError, match="indices do not fit"):
        wire.tensor_in("x", tensor)
    tensor.shape[:] = [1 << 20, 1 << 20]
    with pytest.raises(ValueError, match="not usable"):
        wire.tensor_in("x", tensor)


# ---- order ---------------------------------------------------------------------------------------


def test_requests_run_by_number_in_whatever_order_they_arrive(running, client):
    """A step sent before its gradient uses it; the next forward sees the step."""
    model, data = client.start(), make_random_data(2)
    before = client.call("forward", scoring(model, 1, data, forward=True))["metrics"]["loss:sum"]
    last = client.promise("forward", scoring(model, 4, data, forward=True))
    step = client.promise("optim_step", adam(model, 3, 1e-1))
    gradient = client.promise("forward_backward", scoring(model, 2, data))
    assert client.result(gradient)["metrics"]["loss:sum"] == before
    assert client.result(step)["metrics"]["update_norm:mean"] > 0
    assert client.result(last)["metrics"]["loss:sum"] != before


def test_a_repetition_counts_once_and_other_bytes_are_refused(running, client):
    model, data = client.start(), make_random_data(2)
    body = scoring(model, 1, data)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: client.post("forward_backward", body), range(20)))
    assert {reply.status_code for reply in replies} == {202}
    assert len({reply.json()["request_id"] for reply in replies}) == 1
    first = client.result(replies[0].json()["request_id"])
    assert client.result(replies[0].json()["request_id"]) == first  # polled twice
    once = running.gradient(model)
    assert client.call("forward_backward", scoring(model, 2, data)) == first
    assert_same(running.gradient(model), once)
    other = client.post("forward_backward", scoring(model, 1, data[:1]))
    assert other.status_code == 422
    assert "another request had this number" in other.json()["detail"]
    assert client.post("optim_step", adam(model, 1)).status_code == 422


def assert_same(one, other):
    assert all((one[key] == other[key]).all() for key in other)


def test_making_twice_is_making_once(running, client):
    first = client.start()
    lora = {"rank": 4, "seed": 0, "train_unembed": False}
    body = {"session_id": client.session, "model_seq_id": 0, "base_model": NAME,
            "lora_config": lora, "type": "create_model"}  # fmt: skip
    assert client.call("create_model", body)["model_id"] == first
    assert client.post("create_model", {**body, "lora_config": {"rank": 8}}).status_code == 422
    sampler = {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": NAME}
    replies = [client.post("create_sampling_session", sampler).json() for _ in range(2)]
    assert replies[0] == replies[1]


def bad(data):
    """The batch with a token outside of the vocabulary in its last datum."""
    last = data[-1]
    ids = [*last.model_input.to_ints()[:-1], 10**6]
    return [*data[:-1], tinker.Datum(tinker.ModelInput.from_ints(ids), last.loss_fn_inputs)]


def test_a_refused_chunk_stops_the_step_unless_its_error_was_read(running, client):
    """Three requests in flight: half a batch must not be stepped on."""
    model, data = client.start(), make_random_data(2)
    good = client.promise("forward_backward", scoring(model, 1, data))
    failed = client.promise("forward_backward", scoring(model, 2, bad(data)))
    step = client.promise("optim_step", adam(model, 3))
    following = client.promise("optim_step", adam(model, 4))
    assert "metrics" in client.result(good)
    told = client.result(failed)
    assert told["category"] == "user"
    assert "outside the vocabulary" in told["error"]
    assert "data[1]" in told["slots"]["where"]
    assert "forward_backward before it failed" in client.result(step)["error"]
    assert "before it failed" in client.result(following)["error"]
    assert running.service.models[model].steps == 0
    client.call("forward_backward", scoring(model, 5, bad(data)))  # and its error is read
    assert client.call("optim_step", adam(model, 6))["metrics"]["update_norm:mean"] > 0


def test_a_number_that_never_comes_ends_the_waiting(running, client, monkeypatch):
    monkeypatch.setattr(turns, "GAP_SECONDS", 0.3)
    model, data = client.start(), make_random_data(1)
    waiting = client.promise("forward_backward", scoring(model, 3, data))
    step = client.promise("optim_step", adam(model, 4))
    assert "request 1 of this model did not arrive" in client.result(waiting)["error"]
    assert "did not arrive" in client.result(step)["error"]
    late = client.post("forward_backward", scoring(model, 1, data))
    assert late.status_code == 422
    assert "its turn has passed" in late.json()["detail"]
    client.call("forward_backward", scoring(model, 5, data))  # read: the client may continue
    assert "metrics" in client.call("optim_step", adam(model, 6))


def test_requests_queue_behind_a_model_that_is_being_made(running, client):
    client.start()
    body = {"session_id": client.session, "model_seq_id": 7, "base_model": NAME,
            "lora_config": {"rank": 5, "seed": 1}, "type": "create_model"}  # fmt: skip
    blocked = concurrent.futures.Future()
    running.backend.worker.submit("block", blocked.result)
    model = client.post("create_model", body).json()["model_id"]
    first = client.promise("forward_backward", scoring(model, 1, make_random_data(1)))
    blocked.set_result(None)
    info = client.post("get_info", {"model_id": model, "type": "get_info"}).json()
    assert (info["model_name"], info["lora_rank"]) == (NAME, 5)
    assert info["model_data"]["arch"] == "Qwen3ForCausalLM"
    assert "metrics" in client.result(first)


def test_a_poll_that_is_not_ready_says_so(running, client, monkeypatch):
    monkeypatch.setattr("cookbook_core.serve.replies.HOLD_SECONDS", 0.1)
    model = client.start()
    blocked = concurrent.futures.Future()
    running.backend.worker.submit("block", blocked.result)
    promise = client.promise("forward_backward", scoring(model, 1, make_random_data(1)))
    began = time.monotonic()
    reply = client.post("retrieve_future", {"request_id": promise})
    blocked.set_result(None)
    assert (reply.status_code, reply.json()["type"]) == (408, "try_again")
    assert time.monotonic() - began < 10
    assert "metrics" in client.result(promise)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"loss": "stable_reinforce"}, "formula is not public"),
        ({"loss": "cross_entropi"}, "Did you mean"),
        ({"loss": "custom", "config": {"loss_id": "x"}}, "no such loss"),
        ({"config": {"temperature": 1.0}}, "has no options"),
        ({"config": {"x": [1]}}, "a number or text"),
    ],
)
def test_losses_that_are_refused_by_name(client, change, text):
    model = client.start()
    reply = client.call("forward_backward", scoring(model, 1, make_random_data(1), **change))
    assert text in reply["error"]


def test_inputs_and_fields_that_nothing_reads_are_refused_by_name(client):
    model, data = client.start(), make_random_data(1)
    extra = with_inputs(data[0], advantages=np.ones(data[0].model_input.length))
    reply = client.call("forward_backward", scoring(model, 1, [extra]))
    assert 'loss_fn_inputs["advantages"]: not an input of this loss' in reply["error"]
    masked = with_inputs(data[0], score_mask=np.zeros(data[0].model_input.length))
    assert "score_mask" in client.call("forward_backward", scoring(model, 2, [masked]))["error"]
    body = scoring(model, 3, data)
    body["forward_backward_input"]["micro_batch"] = 3
    assert "micro_batch" in client.call("forward_backward", body)["error"]
    audio = scoring(model, 4, data)
    audio["forward_backward_input"]["data"][0]["model_input"]["chunks"].append({"type": "dmel"})
    assert "not supported" in client.call("forward_backward", audio)["error"]
    step = adam(model, 5)
    step["adam_params"]["momentum"] = 0.9
    assert "momentum" in client.call("optim_step", step)["error"]
    clipped = client.call("optim_step", {**adam(model, 6), "scheduler": "cosine"})
    assert "scheduler" in clipped["error"]
    message = wire.MESSAGES["Request"].FromString(proto_scoring(model, 7, data))
    unknown = message.SerializeToString() + b"\xa2\x06\x01x"  # field 100
    reply = client.post("forward_backward", unknown)
    assert reply.status_code == 422
    assert "100" in reply.json()["detail"]


def test_sampling_options_that_are_not_supported_are_refused(client):
    client.start()
    opened = client.post("create_sampling_session", {
        "session_id": client.session, "sampling_session_seq_id": 5, "base_model": NAME,
    }).json()  # fmt: skip
    good = {
        "sampling_session_id": opened["sampling_session_id"], "num_samples": 1,
        "prompt": {"chunks": [{"tokens": [5, 6], "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 2, "temperature": 0.0},
    }  # fmt: skip
    for seq, (name, value) in enumerate({
        "topk_sample_logprobs": -1, "prompt_logprobs_last_n": "3", "record_stability_info": True,
        "target_prompt_logprobs": [[5]], "beam": 4,
    }.items()):  # fmt: skip
        reply = client.post("asample", {**good, "seq_id": seq, name: value})
        assert reply.status_code == 422
        assert name in reply.json()["detail"]
    params = {**good["sampling_params"], "min_p": 0.1}
    assert "min_p" in client.post("asample", {**good, "sampling_params": params}).text
    reply = client.call("asample", {**good, "seq_id": 90, "topk_sample_logprobs": 0})
    assert len(reply["sequences"][0]["tokens"]) == 2


def test_optimizers_other_than_adamw_are_refused(client):
    client.start()
    body = {"session_id": client.session, "model_seq_id": 30, "base_model": NAME,
            "optimizer_config": {"type": "dimuon"}}  # fmt: skip
    assert "optimizer_config.type" in client.post("create_model", body).json()["detail"]


def test_permanent_refusals_have_statuses_that_clients_do_not_retry(running, client):
    model = client.start()
    missing = {"model_id": "dead:train:0", "type": "get_info"}
    retried = {408, 409, 429} | set(range(500, 600))
    cases = [
        client.post("get_info", missing),
        client.post("optim_step", adam("dead:train:0", 1)),
        client.post("create_model", {"session_id": "x", "model_seq_id": 0, "base_model": "no"}),
        client.post("create_sampling_session", {"session_id": client.session,
                    "sampling_session_seq_id": 77, "model_path": "tinker://a:train:0/weights/b"}),
        client.post("save_weights_external", {"model_id": model}),
        client.post("forward_backward", b"\xff\xff"),
        client.post("nonsense", {}),
        client.get("optim_step"),
        client.post("retrieve_future", {"request_id": "gone"}),
        client.post("weights_info", {"tinker_path": "tinker://../../etc/passwd"}),
    ]  # fmt: skip
    assert not retried & {reply.status_code for reply in cases}
    assert all(reply.status_code >= 400 and reply.json()["detail"] for reply in cases)
    over = client.post("session_heartbeat", {"session_id": "x"})
    assert over.status_code == 410


def test_errors_have_the_form_of_the_clients_language(running):
    with Wire(running.url, agent="AsyncTinkex/Elixir 0.15.0") as elixir:
        model = elixir.start()
        reply = elixir.call("forward_backward", scoring(model, 1, bad(make_random_data(1))))
    assert reply["status"] == "failed"
    assert reply["error"]["category"] == "user"
    assert "outside the vocabulary" in reply["error"]["message"]
