"""The values that cross the client: data in, results out. All are frozen dataclasses.

Names and fields follow the `tinker` SDK 0.38. What differs is named in
`tests/test_sdk_signatures.py`; the two that matter when reading code are: any key is allowed in
`loss_fn_inputs` (the SDK refuses plain lists under keys it does not know), and `TensorData` may
hold "float64" when asked to by name, which the exactness tests need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from cookbook_core.errors import DatumError, message

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["float32", "int64", "float64"]
StopReason: TypeAlias = Literal["length", "stop"]
LossFnType: TypeAlias = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
ModelID: TypeAlias = str
SamplingClientKind: TypeAlias = Literal["snapshot"]

_INTEGER_KEYS = frozenset({"target_tokens"})
_FLOAT_KEYS = frozenset({"weights", "advantages", "logprobs"})


# ---- tensors ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, init=False)
class TensorData:
    """An array that can cross a wire: numbers, dtype, shape.

    Args:
        data: numbers, nested lists or a numpy array; None for an empty array.
        dtype: "float32" or "int64" ("float64" is kept only when named here).
        shape: the shape to give `data`; None keeps the shape it has.
    """

    dtype: TensorDtype
    shape: list[int]
    _numpy: np.ndarray = field(repr=False)

    def __init__(
        self,
        data: Sequence[Any] | np.ndarray | None = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        if dtype not in ("float32", "int64", "float64"):
            raise DatumError(
                message("TensorData.dtype", "unknown dtype", '"float32" or "int64"', repr(dtype))
            )
        array = _to_array("TensorData.data", [] if data is None else data, np.dtype(dtype))
        if shape is not None:
            if int(np.prod(shape)) != array.size:
                raise DatumError(
                    message(
                        "TensorData.shape",
                        "shape does not fit the data",
                        f"{array.size} values in all",
                        f"shape {list(shape)}",
                    )
                )
            array = array.reshape(shape)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "shape", list(array.shape))
        object.__setattr__(self, "_numpy", array)

    @property
    def data(self) -> list[Any]:
        """The values as one flat list."""
        return self._numpy.flatten().tolist()

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        """Wrap an array: floats become float32, integers int64."""
        return cls(array, dtype="float32" if array.dtype.kind == "f" else "int64")

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Wrap a tensor of any dtype and device: floats become float32, integers int64."""
        tensor = tensor.detach().cpu()
        dtype = "float32" if tensor.dtype.is_floating_point else "int64"
        return cls((tensor.double() if dtype == "float32" else tensor).numpy(), dtype=dtype)

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: int = 0) -> TensorData:
        """The SDK's sparse encoding saves bytes on a wire; here there is none: stored dense."""
        del pad_value
        return cls.from_torch(tensor)

    def to_numpy(self) -> np.ndarray:
        """The array itself (not a copy)."""
        return self._numpy

    def to_torch(self) -> torch.Tensor:
        """A new CPU tensor with these values, shape and dtype."""
        import torch

        return torch.tensor(self._numpy)

    def tolist(self) -> list[Any]:
        """The values as nested lists."""
        return self._numpy.tolist()

    def __len__(self) -> int:
        return len(self._numpy)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.dtype == other.dtype and np.array_equal(self._numpy, other._numpy)


def _to_array(where: str, value: Any, dtype: np.dtype[Any] | None) -> np.ndarray:
    """Numbers of any nesting as an array of `dtype` (None: float32 or int64 by kind)."""
    mend = "Give every row the same number of entries."
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DatumError(
            message(where, "not a rectangular array", "a rectangular numeric array", error, mend)
        ) from None
    if array.dtype.kind not in "fiub" and array.size:
        raise DatumError(
            message(
                where, "not numeric", "a rectangular numeric array", f"{type(value).__name__}", mend
            )
        )
    if dtype is None:
        dtype = np.dtype("float32" if array.dtype.kind == "f" else "int64")
    if dtype.kind == "i" and array.dtype.kind == "f" and (array != np.floor(array)).any():
        raise DatumError(message(where, "not whole numbers", "integers", array.dtype))
    # Always a copy: a caller's later in-place change must not reach data already handed over.
    return np.array(array, dtype=dtype)


# ---- inputs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedTextChunk:
    """A run of token ids."""

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        return len(self.tokens)


ModelInputChunk: TypeAlias = EncodedTextChunk


@dataclass(frozen=True)
class ModelInput:
    """What the model reads: chunks of token ids, in order."""

    chunks: Sequence[ModelInputChunk]

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """One chunk of these token ids (a list, numpy array or tensor)."""
        ids = _to_array("ModelInput.tokens", _as_numbers(tokens), np.dtype("int64"))
        if ids.ndim != 1:
            raise DatumError(
                message(
                    "ModelInput.tokens",
                    "not one sequence",
                    "a flat list of token ids",
                    f"shape {list(ids.shape)}",
                )
            )
        return cls(chunks=[EncodedTextChunk(tokens=ids.tolist())])

    def to_ints(self) -> list[int]:
        """All token ids, in order."""
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks)

    @classmethod
    def empty(cls) -> ModelInput:
        return cls(chunks=[])

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """A new input with `chunk` at the end."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """A new input with one more token at the end."""
        return self.append(EncodedTextChunk(tokens=[token]))


LossFnInputs: TypeAlias = dict[str, TensorData]


@dataclass(frozen=True)
class Datum:
    """One sequence and everything its loss needs.

    Args:
        model_input: the tokens the model reads, N of them.
        loss_fn_inputs: arrays by name (TensorData, torch, numpy or nested lists; all are stored
            as TensorData). "target_tokens" `(N,)` or `(N, K)`: the token(s) to predict at each
            position. "weights" like target_tokens. Any other key is handed to the loss as it is
            and never reaches the model.

    Raises:
        DatumError: a value that is not a rectangular numeric array.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = {k: _to_tensor_data(k, v) for k, v in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", inputs)


def _as_numbers(value: Any) -> Any:
    """Tensors of any device as numpy; everything else as it is."""
    detach = getattr(value, "detach", None)
    if detach is None:
        return value
    tensor = detach().cpu()
    return (tensor.double() if tensor.dtype.is_floating_point else tensor).numpy()


def _to_tensor_data(key: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if isinstance(value, ModelInput):  # the SDK's own examples pass targets this way
        value = value.to_ints()
    dtype = "int64" if key in _INTEGER_KEYS else "float32" if key in _FLOAT_KEYS else None
    array = _to_array(
        f'Datum.loss_fn_inputs["{key}"]', _as_numbers(value), np.dtype(dtype) if dtype else None
    )
    return TensorData(array, dtype="float32" if array.dtype.kind == "f" else "int64")


# ---- parameters ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamParams:
    """One optimizer step: torch.optim.AdamW with these values (defaults are the SDK's)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.95
    """Decay of the running mean of the squared gradient."""
    eps: float = 1e-12
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip_norm: float = 0.0
    """Largest global gradient norm; 0 means no clipping."""


@dataclass(frozen=True)
class AdamOptimizerConfig:
    """Chooses AdamW, the one optimizer there is here."""

    type: Literal["adamw"] = "adamw"


@dataclass(frozen=True)
class LoraConfig:
    """What a LoRA adapter covers; alpha is 32 whatever the rank."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True)
class SamplingParams:
    """How to generate.

    stop: None stops at the tokenizer's end-of-sequence token; strings or token ids stop at those
    instead; [] never stops before max_tokens.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1
    top_k: int = -1
    """Keep the k most likely tokens; -1 for all."""
    top_p: float = 1
    """Keep the smallest set of tokens with at least this much probability."""


# ---- results ------------------------------------------------------------------------------------

LossFnOutput: TypeAlias = dict[str, TensorData]


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """What `forward`, `forward_backward` and `forward_backward_custom` give back.

    loss_fn_outputs: one dict per datum, in order; "logprobs" has the shape of its target_tokens,
        in nats.
    metrics: "loss:sum" always; for a custom loss "loss" and the loss's own metrics too.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The value of the loss that was run."""
        return self.metrics["loss:sum"]


@dataclass(frozen=True)
class OptimStepResponse:
    """metrics: "grad_norm" (before clipping), "update_norm" (of the change made), "lr"."""

    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class SampledSequence:
    """One completion: its token ids, their logprobs in nats, and why it ended."""

    stop_reason: StopReason
    sequence_id: str
    tokens_np: np.ndarray | None = field(default=None, repr=False)
    logprobs_np: np.ndarray | None = field(default=None, repr=False)

    @cached_property
    def tokens(self) -> list[int]:
        """The sampled ids, the stop token included: train on these, never on re-encoded text."""
        return [] if self.tokens_np is None else self.tokens_np.tolist()

    @cached_property
    def logprobs(self) -> list[float] | None:
        """log p of each token under the distribution at the request's temperature, before
        top_k and top_p."""
        return None if self.logprobs_np is None else self.logprobs_np.tolist()


@dataclass(frozen=True)
class SampleResponse:
    """The completions of one request, and what was asked about its prompt.

    prompt_logprobs: `(len(prompt),)`, None at position 0, which nothing predicts.
    topk_prompt_logprobs: per position the k most likely `(token_id, logprob)`, None at position 0.
    """

    sequences: Sequence[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None


@dataclass(frozen=True)
class SaveWeightsResponse:
    path: str


@dataclass(frozen=True)
class SaveWeightsForSamplerResponse:
    path: str


@dataclass(frozen=True)
class LoadWeightsResponse:
    path: str | None = None


@dataclass(frozen=True)
class ModelData:
    """arch: the model's class name. model_name: the base model's name or path."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None
    max_context_length: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class GetInfoResponse:
    model_data: ModelData
    model_id: ModelID
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None


@dataclass(frozen=True)
class SupportedModel:
    model_name: str | None = None


@dataclass(frozen=True)
class GetServerCapabilitiesResponse:
    supported_models: list[SupportedModel]
