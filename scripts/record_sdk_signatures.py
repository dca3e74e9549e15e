"""Record the public signatures of the `tinker` SDK, for tests/test_sdk_signatures.py.

Run it in an environment with the SDK (nothing else here needs it):

    python scripts/record_sdk_signatures.py tests/data/tinker_0_38.json
"""

from __future__ import annotations

import inspect
import json
import sys
from importlib import import_module, metadata
from pathlib import Path

CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "APIFuture")
TYPES = (
    "AdamParams",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "LoadWeightsResponse",
    "LoraConfig",
    "ModelData",
    "ModelInput",
    "OptimStepResponse",
    "SampleResponse",
    "SampledSequence",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "TensorData",
)


def parameters(function: object) -> list[str]:
    """Name, kind and default of each parameter but self, without annotations."""
    texts = []
    for p in inspect.signature(function).parameters.values():
        if p.name in ("self", "cls"):
            continue
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        only = "keyword-only " if p.kind is p.KEYWORD_ONLY else ""
        default = "" if p.default is p.empty else f" = {plain(p.default)}"
        texts.append(f"{only}{star}{p.name}{default}")
    return texts


def plain(default: object) -> str:
    """A default as text that does not depend on the library behind it."""
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return f"{default:g}"
    text = repr(default)
    return "a factory" if "factory" in text.lower() else text


def public_methods(cls: type) -> dict[str, list[str]]:
    """Parameters of every public method; properties map to ["property"]."""
    methods = {}
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        if name.startswith("_") or name.startswith("model_"):
            continue
        if isinstance(value, property) or type(value).__name__ == "cached_property":
            methods[name] = ["property"]
        elif callable(getattr(cls, name, None)) and not isinstance(value, type):
            methods[name] = parameters(getattr(cls, name))
    return methods


def describe(package: str) -> dict[str, dict]:
    """The signatures of a package laid out like `tinker`."""
    tinker = import_module(package)
    signatures: dict[str, dict] = {"clients": {}, "types": {}}
    for name in CLIENTS:
        cls = getattr(tinker, name)
        methods = public_methods(cls)
        if name == "ServiceClient":
            methods["__init__"] = parameters(cls.__init__)
        signatures["clients"][name] = methods
    for name in TYPES:
        signatures["types"][name] = parameters(getattr(tinker.types, name))
    return signatures


if __name__ == "__main__":
    recorded = {"version": metadata.version("tinker"), **describe("tinker")}
    text = json.dumps(recorded, indent=1, sort_keys=True) + "\n"
    Path(sys.argv[1]).write_text(text, encoding="utf-8")
