"""The values that cross the client, data in and results out, as frozen dataclasses.

Names and fields follow the `tinker` SDK 0.38; `tests/test_sdk_signatures.py` lists every
difference. Two matter when reading code: `loss_fn_inputs` takes any key (the SDK raises for plain
lists under keys it does not know), and `TensorData` can have the dtype "float64", which the
exactness tests need.
"""

from cookbook_core.types.datum import (
    Datum,
    LossFnInputs,
)
from cookbook_core.types.model_input import (
    EncodedTextChunk,
    ImageChunk,
    ModelInput,
    ModelInputChunk,
)
from cookbook_core.types.parameters import (
    AdamOptimizerConfig,
    AdamParams,
    LoraConfig,
    LossFnType,
    SamplingClientKind,
    SamplingParams,
)
from cookbook_core.types.results import (
    ForwardBackwardOutput,
    GetInfoResponse,
    GetServerCapabilitiesResponse,
    LoadWeightsResponse,
    LossFnOutput,
    ModelData,
    ModelID,
    OptimStepResponse,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    StopReason,
    SupportedModel,
    TopkLogprobs,
)
from cookbook_core.types.tensors import (
    TensorData,
    TensorDtype,
)

__all__ = [
    "AdamOptimizerConfig",
    "AdamParams",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "GetServerCapabilitiesResponse",
    "ImageChunk",
    "LoadWeightsResponse",
    "LoraConfig",
    "LossFnInputs",
    "LossFnOutput",
    "LossFnType",
    "ModelData",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "OptimStepResponse",
    "PromptAltTokens",
    "SampleResponse",
    "SampledSequence",
    "SamplingClientKind",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "StopReason",
    "SupportedModel",
    "TensorData",
    "TensorDtype",
    "TopkLogprobs",
]
