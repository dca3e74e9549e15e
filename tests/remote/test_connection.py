"""The remote backend before, and without, an SDK."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

from cookbook_core.backend.remote import connection, convert, session
from cookbook_core.errors import ConfigError, RequestError
from cookbook_core.runs.run_folder import newest_checkpoint, remove_unlisted_checkpoints
from cookbook_core.tinker import Datum, ModelInput, ServiceClient, TensorData

import numpy as np
import pytest


def installed(monkeypatch, version):
    """As if this version of the SDK were installed."""
    monkeypatch.setattr(connection.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(connection, "sdk_version", lambda: version)


def test_without_the_sdk_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(ConfigError, match=r"pip install \"cookbook-core\[remote\]\""):
        ServiceClient(base_url="http://localhost:1")


@pytest.mark.parametrize("version", ["0.24.0", "0.9.3"])
def test_an_sdk_that_is_too_old_is_refused(monkeypatch, version):
    installed(monkeypatch, version)
    with pytest.raises(ConfigError, match=f"too old.*{version}"):
        ServiceClient(base_url="http://localhost:1")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", 8000])
def test_an_invalid_url_is_an_error(monkeypatch, url):
    with pytest.raises(ConfigError, match=r"base_url: not a URL"):
        ServiceClient(base_url=url)


def test_no_url_is_this_machine(model_folder, make_service):
    service = make_service(base_url="")
    assert service.create_lora_training_client(model_folder("qwen3"), rank=2).result().model_id


OFFERED = [SimpleNamespace(model_name=name) for name in ("Qwen/Qwen3-8B", "org/mine", "/srv/tiny")]


def test_a_local_folder_stands_for_the_model_of_its_name(tmp_path, model_folder):
    (tmp_path / "mine").symlink_to(model_folder("qwen3"))
    model = session.describe_model(str(tmp_path / "mine"), OFFERED)
    assert (model.model_name, model.tokenizer_id) == ("org/mine", str(tmp_path / "mine"))
    assert (model.vocab_size, model.max_context_length) == (100, 256)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="Known: /srv/tiny, Qwen/Qwen3-8B, org/mine"):
        session.describe_model(str(tmp_path / "other"), OFFERED)
    by_name = session.describe_model("Qwen/Qwen3-8B", OFFERED)
    assert (by_name.model_name, by_name.tokenizer_id) == ("Qwen/Qwen3-8B",) * 2
    variant = session.describe_model("org/mine/v2:long", OFFERED)
    assert (variant.model_name, variant.tokenizer_id) == ("org/mine/v2:long", "org/mine")


def translated(monkeypatch, error):
    installed(monkeypatch, "0.38.0")
    return connection.Connection("http://localhost:1/").translate_error("forward", error)


def test_a_servers_traceback_is_cut_to_its_last_line(monkeypatch):
    text = "Request failed: Server error: \x1b[36mray::f()\x1b[39m\n  File \"a.py\", line 1\n" \
        "IndexError: out of range for self.request_id='r1' and expected type X"  # fmt: skip
    ours = translated(monkeypatch, ValueError(text))
    assert isinstance(ours, RequestError)
    assert str(ours) == "forward at http://localhost:1: IndexError: out of range. Got ValueError."


def failed_with(status):
    error = RuntimeError(f"Error code: {status}")
    error.status_code, error.body = status, {"detail": "what was wrong"}  # type: ignore
    return error


STATUS_FIXES = [(401, "TINKER_API_KEY"), (409, "last checkpoint"), (422, "")]


@pytest.mark.parametrize(("status", "fix"), STATUS_FIXES)
def test_a_status_brings_its_fix(monkeypatch, status, fix):
    wrapped = ValueError("Error retrieving result")
    wrapped.__cause__ = failed_with(status)
    text = str(translated(monkeypatch, wrapped))
    for part in ("forward at", "what was wrong", f"status {status}", fix):
        assert part in text
    assert "another version" not in text


def test_a_request_in_an_unknown_form_names_the_sdk(monkeypatch):
    assert "another version of tinker" in str(translated(monkeypatch, failed_with(422)))


def test_failing_heartbeats_are_logged_once():
    notices = connection._FirstOnly()
    logger = logging.Logger("test")
    passed = [
        notices.filter(logger.makeRecord("n", 30, "f", 1, f"{text} {n} s", (), None))
        for n in range(3)
        for text in ("Session heartbeat failed for", "try again because of try_again", "other")
    ]
    assert passed == [True, False, True, False, False, True, False, False, True]


def test_only_inputs_of_the_services_loss_are_sent():
    data = [
        Datum(
            ModelInput.from_ints([1, 2]),
            {"target_tokens": [[2, 3], [3, 4]], "weights": [1, -2], "ref_logprobs": [0.0, 0.0]},
        )
    ]
    loss = convert.BuiltinLoss("cross_entropy")
    (named,), (bare,) = convert.named_datums(data, loss), convert.bare_datums(data)
    assert named.loss_fn_inputs["weights"].tolist() == [[1, 1], [-2, -2]]
    assert bare.loss_fn_inputs["weights"].tolist() == [[0, 0], [0, 0]]
    for datum in (named, bare):
        assert set(datum.loss_fn_inputs) == {"target_tokens", "weights"}
    types = SimpleNamespace(
        Datum=lambda **k: k, TensorData=lambda **k: k,
        ModelInput=SimpleNamespace(from_ints=list),
    )  # fmt: skip
    (out,) = convert.datums_out(types, [named])
    assert out["loss_fn_inputs"]["target_tokens"]["shape"] == [2, 2]
    assert out["loss_fn_inputs"]["weights"]["dtype"] == "float32"


def test_masked_logprobs_read_zero_and_have_no_gradient():
    import torch

    inputs = {"target_tokens": [2, 3], "score_mask": [0.0, 1.0]}
    datum = Datum(ModelInput.from_ints([1, 2]), inputs)
    tensor = TensorData(np.array([-1.0, -2.0]), dtype="float32")
    response = SimpleNamespace(
        loss_fn_outputs=[{"logprobs": tensor}], metrics=None, loss_fn_output_type="x"
    )
    output = convert.output_in("here", response, [datum])
    assert output.loss_fn_outputs[0]["logprobs"].tolist() == [0.0, -2.0]
    assert convert.mask_grads([datum], [torch.ones(2)])[0].tolist() == [0.0, 1.0]


def test_run_folders_take_a_services_checkpoints_as_they_are(tmp_path):
    entries = [{"step": n, "path": f"tinker://m/weights/step-{n:06d}"} for n in (2, 4)]
    record = {"checkpoints": entries, "best": None, "values": {}, "finished": False}
    assert newest_checkpoint(record) == entries[1]
    (tmp_path / "checkpoints" / "model-0" / "weights" / "mine").mkdir(parents=True)
    remove_unlisted_checkpoints(tmp_path, record)
    assert (tmp_path / "checkpoints" / "model-0" / "weights" / "mine").is_dir()
