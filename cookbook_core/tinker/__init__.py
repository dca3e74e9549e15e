"""The client, under the names of the `tinker` SDK: `from cookbook_core import tinker`.

Code written for `import tinker` runs on this machine with that one line changed.
"""

from cookbook_core.tinker import types
from cookbook_core.tinker.futures import APIFuture
from cookbook_core.tinker.sampling import SamplingClient
from cookbook_core.tinker.service import ServiceClient
from cookbook_core.tinker.training import TrainingClient
from cookbook_core.types import (
    AdamOptimizerConfig,
    AdamParams,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageChunk,
    LoraConfig,
    ModelID,
    ModelInput,
    ModelInputChunk,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    StopReason,
    TensorData,
    TensorDtype,
)

__all__ = [
    "APIFuture",
    "AdamOptimizerConfig",
    "AdamParams",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "ImageChunk",
    "LoraConfig",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "OptimStepResponse",
    "SampleResponse",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TrainingClient",
    "types",
]
