"""The `tinker` SDK's own objects, given to our clients. Skipped where the SDK is not installed."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import fields, is_dataclass
from typing import Any

from cookbook_core import weighted_sums, with_inputs
from cookbook_core.builtin_losses import builtin_loss
from cookbook_core.clients import add_ref_logprobs, score
from cookbook_core.custom_loss import forward_backward_two_pass
from cookbook_core.errors import ConfigError, DatumError, LossError
from cookbook_core.tinker import sdk_objects, types
from cookbook_core.types.model_input import own_input

import numpy as np
import pytest
import torch

sdk = pytest.importorskip("tinker")


@pytest.fixture
def client(service, model_folder):
    return service.create_lora_training_client(model_folder(), rank=4, seed=0).result(60)


@pytest.fixture
def twin(service, model_folder):
    """A second client that starts with the same weights."""
    return service.create_lora_training_client(model_folder(), rank=4, seed=0).result(60)


def sdk_input(ids: list[int], *cuts: int) -> Any:
    """One text chunk for each part between the cuts."""
    at = [0, *cuts, len(ids)]
    parts = [ids[a:b] for a, b in itertools.pairwise(at)]
    return sdk.ModelInput(chunks=[sdk.EncodedTextChunk(tokens=part) for part in parts])


def sdk_datum(datum: types.Datum, *cuts: int) -> Any:
    inputs = {k: v.to_torch() for k, v in datum.loss_fn_inputs.items()}
    return sdk.Datum(
        model_input=sdk_input(datum.model_input.to_ints(), *cuts), loss_fn_inputs=inputs
    )


def arrays(output: Any) -> list[list[Any]]:
    return [out["logprobs"].tolist() for out in output.loss_fn_outputs]


# ---- the same numbers as from our own objects ---------------------------------------------------


@pytest.mark.parametrize("k", [None, 3])
def test_training_on_the_sdks_objects(client, twin, random_data, k):
    """Forward, two steps with every option of AdamW, and what they leave: equal to the bit."""
    data = random_data(k=k)
    theirs = [sdk_datum(datum, 1, 2) for datum in data]
    theirs[2] = data[2]  # mixed lists
    options = {"learning_rate": 1e-2, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6}
    options |= {"weight_decay": 0.1, "grad_clip_norm": 0.5}
    for _ in range(2):
        mine = client.forward_backward(data, "cross_entropy").result()
        other = twin.forward_backward(theirs, "cross_entropy").result()
        assert arrays(mine) == arrays(other)
        assert mine.metrics == other.metrics
        mine = client.optim_step(types.AdamParams(**options)).result()
        assert mine == twin.optim_step(sdk.AdamParams(**options)).result()
    left = client.forward(data, "cross_entropy").result()
    assert arrays(left) == arrays(twin.forward(theirs, "cross_entropy").result())


T = torch.arange(6.0).reshape(3, 2)
SPARSE = torch.zeros(3, 40).index_put((torch.tensor([0, 2]), torch.tensor([5, 39])), torch.ones(2))


@pytest.mark.parametrize(
    ("given", "dtype", "expected"),
    [
        (lambda: sdk.TensorData(data=[0.0, 1, 2, 3, 4, 5], dtype="float32", shape=[3, 2]), "f", T),
        (lambda: sdk.TensorData(data=[3, 4, 5], dtype="int64"), "i", torch.tensor([3, 4, 5])),
        (lambda: sdk.TensorData.from_torch(T.bfloat16()), "f", T),
        (lambda: sdk.TensorData.from_torch(T.long().T), "i", T.long().T),
        (lambda: sdk.TensorData.from_numpy(T.numpy().copy()), "f", T),
        (lambda: sdk.TensorData.from_torch_sparse(SPARSE), "f", SPARSE),
        (lambda: sdk.TensorData.from_torch_sparse(SPARSE.long()), "i", SPARSE.long()),
    ],
)
def test_arrays(given, dtype, expected):
    """Kind, shape and values; a copy, which later changes by the caller do not reach."""
    theirs = given()
    assert (theirs.sparse_crow_indices is not None) == (expected.shape[-1] == 40)
    datum = sdk.Datum(model_input=sdk_input([1, 2, 3]), loss_fn_inputs={"extra": theirs})
    [own] = sdk_objects.own_data([datum])
    extra = own.loss_fn_inputs["extra"]
    assert extra.dtype == {"f": "float32", "i": "int64"}[dtype]
    torch.testing.assert_close(extra.to_torch(), expected)
    theirs.to_numpy()[:] = 0
    assert extra.tolist() == expected.tolist()


def test_our_own_objects_are_not_touched(random_data):
    data = random_data()
    assert sdk_objects.own_data(data) is data
    for params in (types.AdamParams(), types.SamplingParams()):
        assert sdk_objects.own_params(type(params), params) is params
    prompt = data[0].model_input
    assert own_input(prompt) is prompt


# ---- custom losses ------------------------------------------------------------------------------


def test_a_custom_loss_is_given_the_callers_own_objects(client, twin, random_data):
    """In order, even where some of them are ours; the gradient is the one our datums give."""
    data = random_data(n=4)
    theirs: list[Any] = [sdk_datum(datum) for datum in data]
    theirs[1] = data[1]
    seen = []

    def loss(given, logprobs):
        seen.append([*given])
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in given]
        given.clear()  # the loss's own list
        terms = [(lp**2).dot(w) for lp, w in zip(logprobs, weights, strict=True)]
        return terms[0] - terms[1] * terms[2] + terms[3], {"pairs": 2}

    mine = client.forward_backward_custom(data, loss).result()
    other = twin.forward_backward_custom(theirs, loss).result()
    assert all(a is b for a, b in zip(seen[1], theirs, strict=True))
    assert mine.metrics == other.metrics
    step = types.AdamParams(learning_rate=1e-2)
    assert client.optim_step(step).result() == twin.optim_step(step).result()


def test_whole_vocabulary(client, random_data):
    [datum] = random_data(n=1)
    bare = sdk.Datum(model_input=sdk_input(datum.model_input.to_ints(), 1), loss_fn_inputs={})

    def loss(data, rows):
        return rows[0][-1].exp().max() + data[0].model_input.length, {}

    result = client.forward_backward_custom([bare], loss, loss_type_input="vocab_logprobs").result()
    assert result.loss - bare.model_input.length == pytest.approx(0.5, abs=0.5)


def test_our_helpers_take_the_sdks_datums(client, random_data):
    """Scoring, side data, weighted sums, two passes: what a loss written for ours calls."""
    data = random_data()
    theirs = [sdk_datum(datum) for datum in data]
    for mine, other in zip(score(client, data), score(client, theirs), strict=True):
        assert torch.equal(mine, other)
    with_ref = add_ref_logprobs(client, theirs)
    assert with_ref[0].loss_fn_inputs["ref_logprobs"].to_torch().equal(score(client, data)[0])
    assert with_inputs(theirs[0], beta=0.5).model_input == data[0].model_input

    def loss(given, logprobs):
        return weighted_sums(given, logprobs).square().mean(), {}

    one = client.forward_backward_custom(theirs, loss).result()
    two = forward_backward_two_pass(client, theirs, loss)
    assert one.loss == two.loss == client.forward_backward_custom(data, loss).result().loss
    builtin, logprobs = builtin_loss("cross_entropy", None), score(client, data)
    assert builtin(theirs, logprobs)[0] == builtin(data, logprobs)[0]


def test_an_array_without_a_shape(client):
    """The SDK leaves `shape` None where it was not given."""
    inputs = {
        "target_tokens": sdk.TensorData(data=[2, 3], dtype="int64"),
        "weights": sdk.TensorData(data=[1.0, 0.5], dtype="float32"),
    }
    datum = sdk.Datum(model_input=sdk_input([1, 2]), loss_fn_inputs=inputs)
    assert score(client, [datum])[0].shape == (2,)

    def loss(data, logprobs):
        return weighted_sums(data, logprobs).sum(), {}

    assert client.forward_backward_custom([datum], loss).result().loss < 0


def test_a_failing_loss_keeps_its_name(client, random_data):
    def broken_loss(data, logprobs):
        return data[0].nothing, {}

    future = client.forward_backward_custom([sdk_datum(d) for d in random_data()], broken_loss)
    with pytest.raises(LossError, match="broken_loss"):
        future.result()


# ---- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, [], "a", ["a", "bc"], [5, 7]])
def test_sampling(client, stop):
    """Prompts of several chunks and every kind of stop: the same tokens as with our own."""
    sampler = client.save_weights_and_get_sampling_client()
    options = {"max_tokens": 12, "seed": 3, "temperature": 0.8, "top_k": -1, "top_p": 0.9}
    ids = [10, 20, 30, 40]
    mine = sampler.sample(
        types.ModelInput.from_ints(ids), 3, types.SamplingParams(stop=stop, **options)
    )
    other = sampler.sample(sdk_input(ids, 2), 3, sdk.SamplingParams(stop=stop, **options)).result()
    assert [s.tokens for s in other.sequences] == [s.tokens for s in mine.result().sequences]
    assert other.prompt_cache_hit_tokens == 0


def test_compute_logprobs(client):
    sampler = client.save_weights_and_get_sampling_client().result()
    logprobs = sampler.compute_logprobs(sdk_input([10, 20, 30], 1).append_int(40)).result()
    prompt = types.ModelInput.from_ints([10, 20, 30, 40])
    assert logprobs == sampler.compute_logprobs(prompt).result()


# ---- refusals -----------------------------------------------------------------------------------

IMAGE = {
    "image": lambda: sdk.types.ImageChunk(data=b"png", format="png", expected_tokens=2),
    "pointer": lambda: sdk.types.ImageAssetPointerChunk(
        location="x", format="png", expected_tokens=2
    ),
}


@pytest.mark.parametrize("image", IMAGE)
def test_images_are_refused_by_name(client, random_data, image):
    """By a model that reads text alone; pointers by every model."""
    data: list[Any] = random_data(n=2)
    chunks = [sdk.EncodedTextChunk(tokens=[1]), IMAGE[image](), sdk.EncodedTextChunk(tokens=[2])]
    looked = sdk.ModelInput(chunks=chunks)
    inputs = {"target_tokens": [0, 0, 2, 3], "weights": [0.0, 0.0, 0.0, 1.0]}
    data.append(sdk.Datum(model_input=looked, loss_fn_inputs=inputs))
    says = {"image": "this model is given none", "pointer": "got ImageAssetPointerChunk"}[image]
    with pytest.raises(DatumError, match=rf"data\[2\].*chunks\[1\].*{says}"):
        client.forward(data, "cross_entropy").result()
    sampler = client.save_weights_and_get_sampling_client()
    with pytest.raises(DatumError, match=rf"chunks\[1\].*{says}"):
        sampler.sample(looked, 1, sdk.SamplingParams(max_tokens=2))
    with pytest.raises(DatumError, match=rf"chunks\[1\].*{says}"):
        sampler.compute_logprobs(looked)
    client.forward(data[:2], "cross_entropy").result()  # alive afterwards


def test_bad_datums_are_the_usual_errors(client, random_data):
    good = [sdk_datum(datum) for datum in random_data(n=2)]
    empty = sdk.Datum(model_input=sdk_input([1, 2]), loss_fn_inputs={})
    with pytest.raises(DatumError, match=r'data\[2\].loss_fn_inputs\["target_tokens"\]: missing'):
        client.forward_backward([*good, empty], "cross_entropy")
    outside = sdk.Datum(model_input=sdk_input([1, 999]), loss_fn_inputs={"target_tokens": [1, 2]})
    with pytest.raises(DatumError, match=r"data\[0\].model_input\[1\].*999"):
        client.forward_backward([outside, *good], "cross_entropy")
    for stranger in ({"model_input": 1}, sdk.AdamParams(), None, good[0].model_input):
        with pytest.raises(DatumError, match=r"data\[1\]: wrong type. Expected Datum"):
            client.forward_backward([good[0], stranger], "cross_entropy")
    with pytest.raises(DatumError, match="not a batch"):
        client.forward_backward(good[0], "cross_entropy")


class LaterAdamParams(sdk.AdamParams):
    """As a later SDK might extend it."""

    momentum_decay: float | None = None
    nesterov: bool = False


class LaterSamplingParams(sdk.SamplingParams):
    min_p: float = 0.0


def test_unknown_options_are_refused_unless_at_their_default(client, random_data):
    client.forward_backward(random_data(), "cross_entropy").result()
    for option in ({"momentum_decay": 0.0}, {"nesterov": True}):
        name = next(iter(option))
        with pytest.raises(ConfigError, match=rf"AdamParams\.{name}: not supported"):
            client.optim_step(LaterAdamParams(learning_rate=1e-3, **option))
    with pytest.raises(ConfigError, match=r"AdamParams\.learning_rate: out of range"):
        client.optim_step(sdk.AdamParams(learning_rate=-1.0))
    for stranger in (sdk.SamplingParams(), {"learning_rate": 1.0}, 1e-3):
        with pytest.raises(ConfigError, match="optim_params: wrong type"):
            client.optim_step(stranger)
    assert client.optim_step(LaterAdamParams(learning_rate=1e-3)).result().metrics["lr"] == 1e-3


def test_bad_sampling_options(client):
    sampler = client.save_weights_and_get_sampling_client().result()
    later = LaterSamplingParams(max_tokens=2, min_p=0.1)
    with pytest.raises(ConfigError, match=r"SamplingParams\.min_p: not supported"):
        sampler.sample(sdk_input([1]), 1, later)
    with pytest.raises(ConfigError, match=r"temperature.*invalid value"):
        sampler.sample(sdk_input([1]), 1, sdk.SamplingParams(max_tokens=2, temperature=-1.0))
    with pytest.raises(ConfigError, match=r"params: wrong type.*AdamParams"):
        sampler.sample(sdk_input([1]), 1, sdk.AdamParams())
    with pytest.raises(DatumError, match="prompt: wrong type"):
        sampler.sample([1, 2], 1, sdk.SamplingParams(max_tokens=2))


@pytest.mark.skipif(not hasattr(sdk, "DimuonParams"), reason="not in this SDK")
def test_other_optimizers_are_refused(client, service, model_folder, random_data, tmp_path):
    client.forward_backward(random_data(), "cross_entropy").result()
    with pytest.raises(ConfigError, match=r"optim_params: wrong type.*DimuonParams"):
        client.optim_step(sdk.DimuonParams(learning_rate=1e-3))
    dimuon, adam = sdk.DimuonOptimizerConfig(), sdk.AdamOptimizerConfig()
    with pytest.raises(ConfigError, match="optimizer: not supported"):
        service.create_lora_training_client(model_folder(), rank=4, optimizer=dimuon)
    with pytest.raises(ConfigError, match="optimizer: not supported"):
        service.create_training_client_from_state("x", model_folder(), optimizer=dimuon)
    made = service.create_lora_training_client(model_folder(), rank=4, optimizer=adam)
    assert made.result(60).get_info().lora_rank == 4


# ---- results ------------------------------------------------------------------------------------


def public_fields(cls: type) -> set[str]:
    """Attributes of an instance, without pydantic's own."""
    names = set(getattr(cls, "model_fields", ()))
    if is_dataclass(cls):
        names = {f.name for f in fields(cls)} | {
            n for n in vars(cls) if not n.startswith("_") and not callable(getattr(cls, n))
        }
    return {name for name in names if not name.startswith("_")}


NOT_SUPPORTED = {
    "type",  # a tag of the wire format
    "optimizer_config",
    "model_id",
    "prompt_logprobs_np",
    "topk_prompt_logprobs_np",
}


def test_results_have_what_readers_of_the_sdks_read(client, random_data, tmp_path):
    output = client.forward_backward([sdk_datum(d) for d in random_data()], "cross_entropy")
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = sdk_input([10, 20, 30])
    results = {
        "ForwardBackwardOutput": output.result(),
        "OptimStepResponse": client.optim_step(sdk.AdamParams()).result(),
        "SampleResponse": (
            sampled := sampler.sample(prompt, 2, sdk.SamplingParams(max_tokens=3), True).result()
        ),
        "SampledSequence": sampled.sequences[0],
        "SaveWeightsResponse": client.save_state("one", ttl_seconds=60).result(),
        "SaveWeightsForSamplerResponse": client.save_weights_for_sampler("two").result(),
    }
    for name, result in results.items():
        missing = public_fields(getattr(sdk.types, name)) - set(dir(result))
        assert missing <= NOT_SUPPORTED, (name, missing)
        again = pickle.loads(pickle.dumps(result))
        assert type(again) is type(result)
    logprobs = pickle.loads(pickle.dumps(results["ForwardBackwardOutput"])).loss_fn_outputs[0]
    assert logprobs["logprobs"] == results["ForwardBackwardOutput"].loss_fn_outputs[0]["logprobs"]


def test_results_go_into_the_sdks_own_objects(client, random_data):
    """Logprobs as an input of the next request: as a tensor, an array or a list."""
    data = [sdk_datum(datum) for datum in random_data(n=3)]
    logprobs = [
        out["logprobs"] for out in client.forward(data, "cross_entropy").result().loss_fn_outputs
    ]
    forms = (logprobs[0].to_torch(), logprobs[1].to_numpy(), logprobs[2].tolist())
    advantages = [np.ones(lp.shape, np.float32) for lp in logprobs]
    rows = [
        sdk.Datum(
            model_input=d.model_input,
            loss_fn_inputs={
                "target_tokens": d.loss_fn_inputs["target_tokens"],
                "logprobs": form,
                "advantages": adv,
            },
        )
        for d, form, adv in zip(data, forms, advantages, strict=True)
    ]
    result = client.forward_backward(rows, "importance_sampling").result()
    assert result.loss == pytest.approx(-sum(len(a) for a in advantages))  # every ratio is 1


def test_the_service_is_a_context_manager(make_service, model_folder):
    with make_service() as service:
        client = service.create_lora_training_client(model_folder(), rank=4).result(60)
        assert client.get_info().lora_rank == 4
    assert service.close("success", detail="again").result() is None
    with pytest.raises(ValueError, match=r"create_rest_client\(\): not supported locally"):
        service.create_rest_client()
