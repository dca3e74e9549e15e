"""TensorData: the arrays that cross the client, and the conversion of array-likes to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cookbook_core.errors import DatumError

import numpy as np

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["float32", "int64", "float64"]


@dataclass(frozen=True, eq=False, init=False)
class TensorData:
    """An array that can be sent to a service: numbers, dtype, shape.

    Args:
        data: numbers, nested lists or a numpy array; None for an empty array.
        dtype: "float32" or "int64"; "float64" has to be named, no conversion chooses it.
        shape: the new shape of `data`; None keeps its own.
    Raises:
        DatumError: an unknown dtype, data that is not rectangular and numeric, values that the
            dtype cannot hold, or a shape that does not fit.
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
        if str(dtype) not in ("float32", "int64", "float64"):
            raise DatumError(
                "TensorData.dtype",
                "unknown dtype",
                expected='"float32" or "int64"',
                got=repr(dtype),
                fix="TensorData.from_numpy() and from_torch() choose it.",
            )
        array = to_array("TensorData.data", [] if data is None else data, np.dtype(dtype))
        if shape is not None:
            array = _reshaped(array, shape)
        object.__setattr__(self, "dtype", str(dtype))
        object.__setattr__(self, "shape", list(array.shape))
        object.__setattr__(self, "_numpy", array)

    @property
    def data(self) -> list[Any]:
        """The values as one flat list."""
        return self._numpy.flatten().tolist()

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        """Convert an array: floats become float32, integers int64."""
        array = to_array("TensorData.from_numpy", array, None)
        return cls(array, dtype="float32" if array.dtype.kind == "f" else "int64")

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Convert a tensor of any dtype and device: floats become float32, integers int64."""
        return cls.from_numpy(to_array("TensorData.from_torch", tensor, None))

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: int = 0) -> TensorData:
        """Same as `from_torch`: the SDK's sparse encoding only saves bytes on the network."""
        del pad_value
        return cls.from_torch(tensor)

    def to_numpy(self) -> np.ndarray:
        """The array itself (not a copy)."""
        return self._numpy

    def to_torch(self) -> torch.Tensor:
        """Return a new CPU tensor with these values, shape and dtype."""
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


def to_array(where: str, value: Any, dtype: np.dtype[Any] | None) -> np.ndarray:
    """Convert numbers, nested lists, arrays or tensors to a new array.

    Args:
        where: the name of the value in errors.
        value: the numbers.
        dtype: None takes float32 for floats and int64 for integers and bools.
    Raises:
        DatumError: not a rectangular array of numbers, or numbers that `dtype` cannot hold.
    """
    rule = "a rectangular numeric array"
    try:
        array = np.asarray(_as_numpy(value))
    except (ValueError, TypeError, RuntimeError) as error:
        raise DatumError(
            where,
            "not a rectangular array",
            expected=rule,
            got=error,
            fix="Give every row the same number of entries.",
        ) from None
    if array.dtype.kind not in "fiub" and array.size:
        raise DatumError(
            where,
            "not numeric",
            expected=rule,
            got=type(value).__name__,
            fix="Pass numbers, nested lists, numpy arrays or tensors.",
        )
    if dtype is None:
        dtype = np.dtype("float32" if array.dtype.kind == "f" else "int64")
    whole = array.dtype.kind != "f" or (np.isfinite(array) & (array == np.floor(array))).all()
    if dtype.kind == "i" and not whole:
        raise DatumError(
            where,
            "not whole numbers",
            expected="integers",
            got=array.dtype,
            fix="Round them first: .round().",
        )
    # always a copy: the caller may change its array in place later
    with np.errstate(all="ignore"):
        converted = np.array(array, dtype=dtype)
    lost = converted != array if dtype.kind == "i" else np.isinf(converted) & ~np.isinf(array)
    if array.size and lost.any():
        raise DatumError(
            where, "out of range", expected=f"what {dtype} can hold", got=array[lost][0]
        )
    return converted


def _as_numpy(value: Any) -> Any:
    """Convert tensors and TensorData, ours or the SDK's; return other values as is."""
    if callable(to_numpy := getattr(value, "to_numpy", None)):
        return to_numpy()
    detach = getattr(value, "detach", None)
    if detach is None:
        return value
    tensor = detach().cpu()
    return (tensor.double() if tensor.dtype.is_floating_point else tensor).numpy()


def _reshaped(array: np.ndarray, shape: Any) -> np.ndarray:
    """Reshape without -1.

    Raises:
        DatumError: not a list of sizes, or one of another number of values.
    """
    listed = isinstance(shape, Sequence)
    whole = listed and all(isinstance(n, (int, np.integer)) and n >= 0 for n in shape)
    if not whole or math.prod(shape) != array.size:
        raise DatumError(
            "TensorData.shape",
            "shape does not fit the data",
            expected=f"{array.size} values in all",
            got=f"shape {shape!r}",
            fix="Leave it out to keep the shape of the data.",
        )
    return array.reshape(shape)
