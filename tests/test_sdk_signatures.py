"""Our client against the `tinker` SDK's recorded signatures: same names, parameters, defaults.

Recorded by scripts/record_sdk_signatures.py from SDK 0.38. Every deliberate difference is listed
below with its reason; the test fails on one that is not listed, and on a listed one that is gone.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from cookbook_core import tinker
from scripts.record_sdk_signatures import describe

import pytest

RECORDED = json.loads(
    (Path(__file__).parent / "data" / "tinker_0_38.json").read_text(encoding="utf-8")
)
OURS = describe("cookbook_core.tinker")

SERVICE_ONLY = "needs the hosted service: its console, telemetry, REST interface or storage"
DIFFERENT_METHODS = {
    ("SamplingClient", "forward"): "scores a batch without a training client",
    ("SamplingClient", "create"): "how the SDK builds itself; clients come from ServiceClient",
    ("SamplingClient", "from_sampler_handle"): SERVICE_ONLY,
    ("SamplingClient", "get_sampler_handle"): SERVICE_ONLY,
    ("SamplingClient", "get_telemetry"): SERVICE_ONLY,
    ("SamplingClient", "on_queue_state_change"): SERVICE_ONLY,
    ("SamplingClient", "sample_batch"): "decodes several prompts as one reproducible unit",
    ("ServiceClient", "__init__"): "adds device, dtype, checkpoint_dir; unknown names are errors",
    ("ServiceClient", "close"): "status has a default: there is no session to account for",
    ("ServiceClient", "copy_weights"): SERVICE_ONLY,
    ("ServiceClient", "create_custom_loss"): "uploads a loss; here any loss runs in one pass",
    ("ServiceClient", "get_checkpoint_metadata"): "in the SDK, through its REST client's lists",
    ("ServiceClient", "get_console_url"): SERVICE_ONLY,
    ("ServiceClient", "get_telemetry"): SERVICE_ONLY,
    ("ServiceClient", "holder"): "internal to the SDK",
    ("TrainingClient", "forward"): "takes your own loss too, and the loss_type_input of it",
    ("TrainingClient", "forward_async"): "takes your own loss too, and the loss_type_input of it",
    ("TrainingClient", "get_console_url"): SERVICE_ONLY,
    ("TrainingClient", "get_telemetry"): SERVICE_ONLY,
    ("TrainingClient", "machine"): "recorded with a run: what its results depend on",
    ("TrainingClient", "save_weights_external"): "checkpoints are peft folders already",
    ("TrainingClient", "save_weights_external_async"): "checkpoints are peft folders already",
}
# Parameters of the SDK's types that ours lack, and ours that the SDK's lack.
TYPE_TAG = "a tag of the wire format"
MISSING_FIELDS = {
    ("Datum", "model_input_spans"): "provenance is for the hosted service's bookkeeping",
    ("Datum", "loss_fn_input_spans"): "provenance is for the hosted service's bookkeeping",
    ("GetInfoResponse", "type"): TYPE_TAG,
    ("GetInfoResponse", "optimizer_config"): "AdamW is the only optimizer",
    ("LoadWeightsResponse", "model_id"): "the client knows its own",
    ("LoadWeightsResponse", "type"): TYPE_TAG,
    ("SampleResponse", "prompt_logprobs_np"): "given as the list prompt_logprobs",
    ("SampleResponse", "topk_prompt_logprobs_np"): "given as the list topk_prompt_logprobs",
    ("SaveWeightsForSamplerResponse", "type"): TYPE_TAG,
    ("SaveWeightsResponse", "type"): TYPE_TAG,
    ("TensorData", "sparse_col_indices"): "sparse saves bytes on a wire; stored dense here",
    ("TensorData", "sparse_crow_indices"): "sparse saves bytes on a wire; stored dense here",
}
EXTRA_FIELDS = {
    ("ModelData", "max_context_length"): "bad data is refused before it is queued",
    ("ModelData", "vocab_size"): "bad data is refused before it is queued",
    ("SampleResponse", "prompt_logprobs"): "a property in the SDK",
    ("SampleResponse", "topk_prompt_logprobs"): "a property in the SDK",
    ("SampledSequence", "temperature"): "to score at it later",
}


@pytest.mark.parametrize("client", RECORDED["clients"])
def test_methods_are_the_sdks(client):
    theirs, ours = RECORDED["clients"][client], OURS["clients"][client]
    differ = {
        name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
    } - {"model_id"}  # an attribute in the SDK, a property here
    assert differ == {name for cls, name in DIFFERENT_METHODS if cls == client}


@pytest.mark.parametrize("name", RECORDED["types"])
def test_fields_are_the_sdks(name):
    """The SDK's models take keywords only; ours take them by position too, in the same order."""
    theirs = [p.removeprefix("keyword-only ") for p in RECORDED["types"][name]]
    theirs = [p for p in theirs if not p.startswith("_")]
    ours = OURS["types"][name]
    missing = {p.split(" ")[0] for p in theirs if p not in ours}
    extra = {p.split(" ")[0] for p in ours if p not in theirs}
    assert missing == {f for cls, f in MISSING_FIELDS if cls == name}
    assert extra == {f for cls, f in EXTRA_FIELDS if cls == name}
    assert [p for p in theirs if p in ours] == [p for p in ours if p in theirs]


def test_what_is_named_as_missing_is_missing():
    """Four that exist differ in their parameters; three are this package's own."""
    present = {name for cls, name in DIFFERENT_METHODS if name in OURS["clients"][cls]}
    other = {"__init__", "close", "forward", "forward_async"}
    assert present == other | {"get_checkpoint_metadata", "machine", "sample_batch"}


@pytest.mark.parametrize("name", ["ServiceClient", "TrainingClient", "SamplingClient"])
def test_async_names_are_documented_coroutines(name):
    """Each has its sibling's signature and text, and awaits."""
    cls = getattr(tinker, name)
    names = [n for n in dir(cls) if n.endswith("_async")]
    assert len(names) >= 3
    for n in names:
        method, sibling = getattr(cls, n), getattr(cls, n.removesuffix("_async"))
        assert inspect.iscoroutinefunction(method)
        assert (method.__name__, method.__module__) == (n, sibling.__module__)
        assert inspect.signature(method).parameters == inspect.signature(sibling).parameters
        assert inspect.getdoc(method).endswith(inspect.getdoc(sibling))
