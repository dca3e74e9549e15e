"""The values that cross the client: data in, results out. All are frozen dataclasses.

Names and fields follow the `tinker` SDK 0.38. What differs is named in
`tests/test_sdk_signatures.py`; the two that matter when reading code are: any key is allowed in
`loss_fn_inputs` (the SDK refuses plain lists under keys it does not know), and `TensorData` may
hold "float64" when asked to by name, which the exactness tests need.
"""

from cookbook_core.types.datum import (
    Datum,
    LossFnInputs,
)
from cookbook_core.types.model_input import (
    EncodedTextChunk,
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
    SampledSequence,
    SampleResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    StopReason,
    SupportedModel,
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
]
