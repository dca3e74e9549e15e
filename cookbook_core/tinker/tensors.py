"""TensorData: the arrays that cross the client, and how anything array-like becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from cookbook_core.errors import DatumError, message

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["float32", "int64", "float64"]


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
        array = to_array("TensorData.data", [] if data is None else data, np.dtype(dtype))
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


def to_array(where: str, value: Any, dtype: np.dtype[Any] | None) -> np.ndarray:
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
    whole = array.dtype.kind != "f" or (np.isfinite(array) & (array == np.floor(array))).all()
    if dtype.kind == "i" and not whole:
        raise DatumError(message(where, "not whole numbers", "integers", array.dtype))
    # Always a copy: a caller's later in-place change must not reach data already handed over.
    return np.array(array, dtype=dtype)


def as_numbers(value: Any) -> Any:
    """Tensors of any device as numpy; everything else as it is."""
    detach = getattr(value, "detach", None)
    if detach is None:
        return value
    tensor = detach().cpu()
    return (tensor.double() if tensor.dtype.is_floating_point else tensor).numpy()
