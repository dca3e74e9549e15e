"""Bad input: an error of ours naming where and what, raised before anything has changed."""

from __future__ import annotations

import shutil
from typing import Any

from cookbook_core import tinker
from cookbook_core.errors import (
    CheckpointError,
    ConfigError,
    CookbookError,
    DataError,
    DatumError,
    LossError,
    ModelError,
    RequestError,
)

import pytest
import torch

VOCAB, CONTEXT = 100, 256


def datum(tokens=(5, 6, 7), **inputs: Any) -> tinker.Datum:
    given = {"target_tokens": [6, 7, 8], "weights": [0.0, 1.0, 1.0], **inputs}
    given = {k: v for k, v in given.items() if v is not None}
    return tinker.Datum(tinker.ModelInput.from_ints(list(tokens)), given)


def state_of(client: Any) -> dict[str, Any]:
    """Copies of everything that must not change: weights, gradients, optimizer state."""
    adapter = client._backend._adapter
    optimizer = adapter.optimizer.state_dict()["state"] if adapter.optimizer else {}
    return {
        "weights": [p.detach().clone() for p in adapter.params],
        "grads": None if adapter.grads is None else [g.clone() for g in adapter.grads],
        "moments": [{k: v.clone() for k, v in optimizer[i].items()} for i in sorted(optimizer)],
        "step": adapter.step,
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture
def client(service, model_folder):
    """A client one step in, with a gradient accumulated."""
    client = service.create_lora_training_client(model_folder("qwen3"), rank=4, seed=0).result()
    for _ in range(2):
        client.forward_backward([datum()], "cross_entropy").result()
        client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    client.forward_backward([datum()], "cross_entropy").result()
    return client


def untouched(client: Any, act: Any, error: type[CookbookError], match: str) -> None:
    """`act` raises `error`; nothing changed; the client still trains."""
    before = state_of(client)
    with pytest.raises(error, match=match):
        act()
    assert_same(before, state_of(client))
    client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(tinker.AdamParams()).result()


BAD_DATA = {
    "truth values for ids": (
        lambda: [
            tinker.Datum(
                tinker.ModelInput([tinker.EncodedTextChunk([True, False])]),
                {"target_tokens": [6, 7]},
            )
        ],
        r"data\[0\].model_input\[0\]: not a token id.*got True",
    ),
    "fractional TensorData for targets": (
        lambda: [datum(target_tokens=tinker.TensorData([1.5, 2.0, 3.0], "float32"))],
        r'\["target_tokens"\]: not whole numbers',
    ),
    "a weight beyond float32": (
        lambda: [datum(weights=[0.0, 1e39, 1.0])],
        r'\["weights"\]: out of range. Expected what float32 can hold, got 1e\+39',
    ),
    "inputs that have no name": (
        lambda: [tinker.Datum(datum().model_input, {3: [1.0]})],
        r"Datum.loss_fn_inputs: wrong type.*str, got int 3",
    ),
    "tokens that are not ids": (
        lambda: [
            tinker.Datum(
                tinker.ModelInput([tinker.EncodedTextChunk([5, 6.5, 7])]),
                {"target_tokens": [6, 7, 8]},
            )
        ],
        r"data\[0\].model_input\[1\]: not a token id.*got 6.5",
    ),
    "empty batch": (lambda: [], r"data: empty"),
    "not a list": (lambda: datum(), r"data: not a batch.*list of Datum.*Datum"),
    "not a datum": (lambda: [datum(), 3], r"data\[1\]: wrong type.*Datum.*int"),
    "no tokens": (lambda: [datum(())], r"data\[0\].model_input: empty"),
    "no targets": (
        lambda: [datum(), datum(target_tokens=None)],
        r'data\[1\].loss_fn_inputs\["target_tokens"\]: missing.*got weights',
    ),
    "targets too short": (
        lambda: [datum(), datum(target_tokens=[6, 7], weights=[1.0, 1.0])],
        r'data\[1\].loss_fn_inputs\["target_tokens"\]: length.*\(3,\).*got \(2,\)',
    ),
    "weights too short": (
        lambda: [datum(weights=[1.0, 1.0])],
        r'data\[0\].loss_fn_inputs\["weights"\]: length.*\(3,\).*got \(2,\)',
    ),
    "weights of another K": (
        lambda: [datum(target_tokens=[[1, 2]] * 3, weights=[[1.0] * 3] * 3)],
        r'data\[0\].loss_fn_inputs\["weights"\]: length.*\(3, 2\).*got \(3, 3\)',
    ),
    "token past the vocabulary": (
        lambda: [datum(), datum((5, VOCAB, 7))],
        r"data\[1\].model_input\[1\]: token id outside.*< 100, got 100",
    ),
    "negative token": (lambda: [datum((5, -1, 7))], r"data\[0\].model_input\[1\].*got -1"),
    "target past the vocabulary": (
        lambda: [datum(target_tokens=[6, 7, VOCAB])],
        r'data\[0\].loss_fn_inputs\["target_tokens"\]\[2\].*got 100',
    ),
    "NaN weight": (
        lambda: [datum(weights=[0.0, float("nan"), 1.0])],
        r'data\[0\].loss_fn_inputs\["weights"\]\[1\]: not finite.*got nan',
    ),
    "infinite weight": (
        lambda: [datum(weights=[0.0, float("inf"), 1.0])],
        r'data\[0\].loss_fn_inputs\["weights"\]\[1\]: not finite.*got inf',
    ),
    "longer than the context": (
        lambda: [
            datum([1] * (CONTEXT + 1), target_tokens=[1] * (CONTEXT + 1), weights=None),
        ],
        r"data\[0\].model_input: longer than the model's context.*<= 256 tokens, got 257",
    ),
    "ragged lists": (
        lambda: [datum(target_tokens=[[1, 2], [3], [4, 5]])],
        r'loss_fn_inputs\["target_tokens"\]: not a rectangular array',
    ),
    "words": (lambda: [datum(weights=["a", "b", "c"])], r'\["weights"\]: not numeric'),
    "fractional tokens": (
        lambda: [datum(target_tokens=[1.5, 2.0, 3.0])],
        r'\["target_tokens"\]: not whole numbers',
    ),
}


@pytest.mark.parametrize("method", ["forward", "forward_backward", "forward_backward_custom"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(client, name, method):
    """Pitfall 2: a refused call accumulates nothing."""
    make, match = BAD_DATA[name]
    loss = sum_loss if method.endswith("custom") else "cross_entropy"
    untouched(client, lambda: getattr(client, method)(make(), loss), DatumError, match)


def test_five_faults_are_reported_at_once(client):
    with pytest.raises(DatumError, match=r"(?s)data\[0\].*data\[1\].*data\[4\].*and 3 more"):
        client.forward([datum((5, -1, 7)) for _ in range(8)], "cross_entropy")


def sum_loss(data, logprobs):
    return -sum(lp.sum() for lp in logprobs), {}


def called_backward(logprobs):
    loss = (logprobs[0] ** 2).sum()
    loss.backward()
    return loss, {}


BAD_LOSSES = {
    "not a scalar": (lambda d, lp: (lp[0], {}), r"not a scalar.*0-d.*\(3,\)"),
    "one-element vector": (lambda d, lp: (lp[0].sum()[None], {}), r"not a scalar.*\(1,\)"),
    "detached": (lambda d, lp: (lp[0].sum().detach(), {}), "detached"),
    "a float": (lambda d, lp: (lp[0].sum().item(), {}), "not a tensor.*float"),
    "NaN": (lambda d, lp: (lp[0].sum() * float("nan"), {}), "not finite.*nan"),
    "infinite": (lambda d, lp: (lp[0].sum() * float("inf"), {}), "not finite.*inf"),
    "NaN gradient": (
        lambda d, lp: ((lp[1] * 0).sqrt().sum() + lp[0].sum(), {}),
        r"gradient of data\[1\] at \[0\].*not finite",
    ),
    "text metric": (lambda d, lp: (lp[0].sum(), {"a": "b"}), r'metrics\["a"\].*not a number'),
    "vector metric": (lambda d, lp: (lp[0].sum(), {"a": lp[0]}), r'metrics\["a"\].*not a number'),
    "metrics not a dict": (lambda d, lp: (lp[0].sum(), [1]), "metrics is not a dict"),
    "no metrics": (lambda d, lp: lp[0].sum(), "wrong return structure.*tuple.*Tensor"),
    "three values": (lambda d, lp: (lp[0].sum(), {}, 1), "wrong return structure"),
    "calls backward": (lambda d, lp: called_backward(lp), r"backward"),
    "raises": (lambda d, lp: 1 / 0, "raised ZeroDivisionError"),
    "uses nothing": (
        lambda d, lp: (torch.ones((), requires_grad=True) * 2, {}),
        "uses no datum",
    ),
    "reserved metric": (lambda d, lp: (lp[0].sum(), {"loss": 1e6}), r'metrics\["loss"\]'),
    "calls the client": (None, "cannot be made from inside a loss"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_bad_losses(client, name):
    """Pitfall 2: a loss that fails leaves gradients byte-equal, and the client usable."""
    loss, match = BAD_LOSSES[name]
    if loss is None:

        def loss(data, logprobs):
            client.forward(data, "cross_entropy")

    error = RequestError if name == "calls the client" else LossError
    data = [datum(), datum()]
    untouched(client, lambda: client.forward_backward_custom(data, loss).result(), error, match)


def test_a_partly_used_loss_that_changes_its_input_changes_nothing(client):
    def loss(data, logprobs):
        data.clear()
        logprobs.append(None)
        return logprobs[0].sum(), {}

    result = client.forward_backward_custom([datum(), datum()], loss).result()
    assert len(result.loss_fn_outputs) == 2


BAD_CALLS = {
    "unknown loss": (
        lambda c: c.forward_backward([datum()], "cross_entrpy"),
        ConfigError,
        "loss_fn: unknown loss.*'cross_entrpy'.*Did you mean .cross_entropy.",
    ),
    "unknown option": (
        lambda c: c.forward_backward([datum()], "ppo", {"clip_low": 0.1}),
        ConfigError,
        r'loss_fn_config\["clip_low"\].*Did you mean "clip_low_threshold"',
    ),
    "RL loss without advantages": (
        lambda c: c.forward_backward([datum(logprobs=[-1.0] * 3)], "ppo"),
        DatumError,
        r'data\[0\].loss_fn_inputs\["advantages"\]: missing',
    ),
    "RL loss with short logprobs": (
        lambda c: c.forward_backward(
            [datum(logprobs=[-1.0] * 2, advantages=[1.0] * 3)], "importance_sampling"
        ),
        DatumError,
        r'data\[0\].loss_fn_inputs\["logprobs"\]: length.*got \(2,\)',
    ),
    "loss not callable": (
        lambda c: c.forward_backward_custom([datum()], "cross_entropy"),
        ConfigError,
        "loss_fn: not a function.*forward_backward",
    ),
    "loss_type_input": (
        lambda c: c.forward_backward_custom([datum()], sum_loss, loss_type_input="logits"),
        ConfigError,
        "loss_type_input",
    ),
    "negative learning rate": (
        lambda c: c.optim_step(tinker.AdamParams(learning_rate=-1.0)),
        ConfigError,
        "AdamParams.learning_rate: out of range.*got -1.0",
    ),
    "NaN learning rate": (
        lambda c: c.optim_step(tinker.AdamParams(learning_rate=float("nan"))),
        ConfigError,
        "AdamParams.learning_rate.*got nan",
    ),
    "beta of one": (
        lambda c: c.optim_step(tinker.AdamParams(beta2=1.0)),
        ConfigError,
        "AdamParams.beta2: out of range.*beta2 < 1, got 1.0",
    ),
    "no Adam": (lambda c: c.optim_step(), ConfigError, "optim_params: wrong type.*AdamParams"),
    "checkpoint name": (lambda c: c.save_state("../out"), CheckpointError, "name.*'../out'"),
    "no such checkpoint": (
        lambda c: c.load_state("nowhere/at/all").result(),
        CheckpointError,
        "nowhere/at/all: not a checkpoint",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(client, name):
    act, error, match = BAD_CALLS[name]
    untouched(client, lambda: act(client), error, match)


def test_optim_step_with_nothing_accumulated(client):
    """Pitfall 27: nothing trains, quietly."""
    client.optim_step(tinker.AdamParams()).result()
    untouched(
        client,
        lambda: client.optim_step(tinker.AdamParams()).result(),
        RequestError,
        "no gradient has been accumulated",
    )


def test_a_step_that_leaves_the_range_of_floats_changes_nothing(service, model_folder):
    """eps=0 divides 0 by 0 where lora_B is still 0; a learning rate of 1e300 overflows."""
    client = service.create_lora_training_client(model_folder("qwen3"), rank=4, seed=0).result()
    client.forward_backward([datum()], "cross_entropy").result()
    for wrong in ({"eps": 0.0}, {"learning_rate": 1e300}):
        before = state_of(client)
        with pytest.raises(RequestError, match="leaves the range of the weights"):
            client.optim_step(tinker.AdamParams(**wrong)).result()
        assert_same(before, state_of(client))
    client.optim_step(tinker.AdamParams()).result()


def test_gradients_whose_sum_overflows_are_not_added(client):
    norm = client.optim_step(tinker.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]
    huge = datum(weights=[0.0, *[1.2e19 / norm] * 2])  # squares of float32 end at 1.8e19
    client.forward_backward([huge], "cross_entropy").result()
    before = state_of(client)
    with pytest.raises(RequestError, match=r"gradient of the parameters is not finite.*norm inf"):
        client.forward_backward([huge], "cross_entropy").result()
    assert_same(before, state_of(client))


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("rank", 10**9, r"rank: out of range.*1 to 100.*got 1000000000"),
        ("rank", True, r"rank: out of range.*got True"),
        ("seed", 2**64, r"seed: out of range.*got 18446744073709551616"),
        ("train_mlp", None, r"train_mlp: wrong type.*got None"),
        ("user_metadata", [1], r"user_metadata: wrong type.*got list"),
    ],
)
def test_adapters_that_cannot_be_made(service, model_folder, name, wrong, says):
    with pytest.raises(CookbookError, match=says):
        service.create_lora_training_client(model_folder("qwen3"), **{name: wrong}).result()


def test_nothing_trainable_is_refused(service, model_folder):
    """Pitfall 27: no trainable parameter is an error."""
    folder = model_folder("qwen3")
    none = {"train_mlp": False, "train_attn": False, "train_unembed": False}
    with pytest.raises(ConfigError, match="no layer would be trained"):
        service.create_lora_training_client(folder, **none).result()
    with pytest.raises(ConfigError, match=r"rank: too small.*got 0"):
        service.create_lora_training_client(folder, rank=0).result()


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a/b/c"])
def test_a_model_path_that_does_not_exist(service, name):
    with pytest.raises(ModelError, match=f"base_model: no such folder.*{name}"):
        service.create_lora_training_client(name).result()


def test_a_folder_without_a_model_and_an_unreachable_name(service, tmp_path):
    with pytest.raises(ModelError, match=r"not a model folder.*config.json"):
        service.create_lora_training_client(str(tmp_path)).result()
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"cannot be loaded as a causal language model"):
        service.create_lora_training_client(str(tmp_path)).result()
    with pytest.raises(ModelError, match=r"cannot be loaded.*nobody/nothing"):
        service.create_lora_training_client("nobody/nothing").result()


def test_names_the_hub_cannot_be_asked_for_are_quick(tmp_path, monkeypatch, capsys):
    """Without HF_HUB_OFFLINE, to a hub that refuses connections: no retries, one line."""
    import time

    from cookbook_core.backend.local.model.loading import load_base_model
    from cookbook_core.data import load_rows

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"ultrafedback: cannot be loaded"):
        load_rows("ultrafedback", ["prompt"])
    with pytest.raises(ModelError, match=r"cannot be loaded.*nobody/nothing"):
        load_base_model("nobody/nothing", "cpu")
    assert time.monotonic() - start < 20, "five tries of each take 50 s"
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["ultrafedback", "nobody/nothing"]
    assert not constants.HF_HUB_OFFLINE


def test_a_folder_without_tokenizer(tmp_path):
    from cookbook_core.backend.local.model.loading import load_tokenizer

    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"has no tokenizer.*\. Copy tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_bad_device_dtype_and_url(make_service, model_folder):
    folder = model_folder("qwen3")
    with pytest.raises(ConfigError, match=r"dtype: unknown dtype.*'float23'.*float32"):
        make_service(dtype="float23").create_lora_training_client(folder).result()
    with pytest.raises(ConfigError, match=r"device: not usable here.*warp"):
        make_service(device="warp").create_lora_training_client(folder).result()
    with pytest.raises(ConfigError, match="base_url"):
        make_service(base_url="localhost:1")


def test_a_truncated_base_model(service, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("qwen3"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        service.create_lora_training_client(str(folder)).result()
