"""The binary form of requests and results: protobuf messages declared by field number.

The numbers are those of the `tinker` SDK 0.25 to 0.38 (newer versions add fields). Nothing of the
SDK is imported, so that server and client can have different versions. Fields beyond SCHEMA are
refused, not ignored, since they could mean that other numbers are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cookbook_core.errors import DatumError, RequestError
from cookbook_core.types import (
    Datum,
    EncodedTextChunk,
    ImageChunk,
    ModelInput,
    ModelInputChunk,
    SampleResponse,
    TensorData,
    TopkLogprobs,
)

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

FIELD = descriptor_pb2.FieldDescriptorProto
SCHEMA: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "Csr": {"values": (1, "bytes"), "crow_indices": (2, "bytes"), "col_indices": (3, "bytes")},
    "Tensor": {
        "dense": (1, "bytes"), "sparse_csr": (2, "Csr"), "dtype": (3, "int32"),
        "shape": (4, "int64 repeated"),
    },
    "Tokens": {"tokens": (1, "bytes")},
    "Image": {
        "data": (1, "bytes"), "format": (2, "string"), "expected_tokens": (3, "int32 optional"),
    },
    "Chunk": {"encoded_text": (1, "Tokens"), "image": (2, "Image"), "dmel": (3, "bytes")},
    "Datum": {
        "model_input": (1, "Chunk repeated"), "loss_fn_inputs": (2, "Tensor map"),
        "model_input_spans": (3, "bytes repeated"), "loss_fn_input_spans": (4, "bytes repeated"),
    },
    "Option": {"number": (1, "double optional"), "text": (2, "string optional")},
    "Request": {
        "model_id": (1, "string"), "seq_id": (2, "int32"), "data": (3, "Datum repeated"),
        "loss_fn": (4, "string"), "loss_fn_config": (5, "double map"), "forward_only": (6, "bool"),
        "loss_fn_config_v2": (7, "Option map"),
    },
    "Batched": {
        "data": (1, "bytes"), "offsets": (2, "bytes"), "dtype": (3, "int32"),
        "trailing_shape": (4, "int64 repeated"),
    },
    "Record": {
        "type_tag": (1, "string"), "fields": (2, "Batched map"), "num_datums": (3, "int64"),
    },
    "Output": {
        "loss_fn_output_type": (1, "string"), "loss_fn_outputs": (2, "Record repeated"),
        "metrics": (3, "double map"),
    },
    "TopK": {
        "token_ids": (1, "bytes"), "logprobs": (2, "bytes"), "k": (3, "uint32"),
        "length": (4, "uint32"),
    },
    "Sequence": {
        "stop_reason": (1, "int32"), "tokens": (2, "bytes"), "logprobs": (3, "bytes optional"),
        "topk_sampled_logprobs": (4, "TopK"),
    },
    "Alternatives": {"tokens": (1, "Tensor"), "logprobs": (2, "Tensor")},
    "Samples": {
        "sequences": (1, "Sequence repeated"), "prompt_logprobs": (2, "bytes optional"),
        "topk_prompt_logprobs": (3, "TopK"), "prompt_cache_hit_tokens": (4, "int32"),
        "target_prompt_logprobs": (5, "Tensor"), "prompt_alt_tokens": (6, "Alternatives"),
    },
}  # fmt: skip
"""By message and field: its number, and its type with "repeated", "optional" or "map" (of str)."""
DTYPES: Mapping[int, Any] = {1: np.float32, 2: np.int64, 3: np.int32}
FLOAT32 = 1
MOST_ELEMENTS = 1 << 26
"""Numbers of one tensor: a sparse one states its size in a few bytes."""


def _messages() -> dict[str, Any]:
    """The message classes of SCHEMA, in a pool of their own."""
    file = descriptor_pb2.FileDescriptorProto(
        name="cookbook_wire.proto", package="cookbook", syntax="proto3"
    )
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            kind, _, label = kind.partition(" ")
            if label == "map":
                entry = message.nested_type.add(name=field.title().replace("_", "") + "Entry")
                entry.options.map_entry = True
                _add_field(entry, "key", 1, "string")
                _add_field(entry, "value", 2, kind)
                kind, label = f"{name}.{entry.name}", "repeated"
            _add_field(message, field, number, kind, label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    find = pool.FindMessageTypeByName
    return {name: message_factory.GetMessageClass(find(f"cookbook.{name}")) for name in SCHEMA}


def _add_field(message: Any, name: str, number: int, kind: str, label: str = "") -> None:
    repeated = label == "repeated"
    field = message.field.add(name=name, number=number)
    field.label = FIELD.LABEL_REPEATED if repeated else FIELD.LABEL_OPTIONAL
    scalar = getattr(FIELD, f"TYPE_{kind.upper()}", None)
    if scalar is None:
        field.type, field.type_name = FIELD.TYPE_MESSAGE, f".cookbook.{kind}"
    else:
        field.type = scalar
    if label == "optional":
        field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{name}")


MESSAGES = _messages()


# ---- in ------------------------------------------------------------------------------------------


def parse(name: str, raw: bytes) -> Any:
    """A message from its bytes.

    Raises:
        RequestError: not such a message, or one with fields that this server does not know.
    """
    message = MESSAGES[name]()
    try:
        message.ParseFromString(raw)
    except (DecodeError, ValueError, RecursionError) as error:
        what = "not a protobuf message of this kind, or a truncated one"
        got, fix = f"{len(raw)} bytes: {error}", "Send it again, or as JSON."
        raise RequestError("body", what, expected=name, got=got, fix=fix) from None
    _refuse_unknown("body", message)
    return message


def _refuse_unknown(where: str, message: Any) -> None:
    unknown: Any = UnknownFieldSet(message)
    if numbers := sorted({field.field_number for field in unknown}):
        known = ", ".join(str(number) for number, _ in SCHEMA[type(message).__name__].values())
        raise RequestError(
            where,
            "has fields that this server does not know",
            expected=f"field numbers {known}",
            got=numbers,
            fix="Leave the option out, or use an SDK that this server was tested with.",
        )


def datums_in(messages: Sequence[Any]) -> list[Datum]:
    """Datums from their messages.

    Raises:
        DatumError: audio, a bad image, or a tensor that is inconsistent; with its index.
        RequestError: an unknown field.
    """
    data = []
    for i, message in enumerate(messages):
        _refuse_unknown(f"data[{i}]", message)
        chunks = [
            _chunk_in(f"data[{i}].model_input.chunks[{j}]", chunk)
            for j, chunk in enumerate(message.model_input)
        ]
        inputs = {
            key: tensor_in(f'data[{i}].loss_fn_inputs["{key}"]', tensor)
            for key, tensor in message.loss_fn_inputs.items()
        }
        data.append(Datum(ModelInput(chunks), inputs))
    return data


def _chunk_in(where: str, chunk: Any) -> ModelInputChunk:
    if chunk.HasField("image"):
        image = chunk.image
        _refuse_unknown(where, image)
        count = image.expected_tokens if image.HasField("expected_tokens") else None
        return image_in(where, image.data, image.format, count)
    if not chunk.HasField("encoded_text"):
        raise not_read(where, "audio")
    return EncodedTextChunk(_numbers(where, chunk.encoded_text.tokens, np.int32).tolist())


def image_in(where: str, data: bytes, form: str, expected_tokens: int | None) -> ImageChunk:
    """An image, with `where` in its errors."""
    try:
        return ImageChunk(data, form, expected_tokens)  # pyright: ignore[reportArgumentType]
    except DatumError as error:
        raise error.replace(where=error.where.replace("ImageChunk", where)) from None


def not_read(where: str, got: str) -> DatumError:
    """The error of a chunk that is neither token ids nor an image."""
    rule, fix = "text, or an image's bytes", "Pass an EncodedTextChunk or an ImageChunk."
    return DatumError(where, "not supported by this server", expected=rule, got=got, fix=fix)


def tensor_in(where: str, tensor: Any) -> TensorData:
    """A tensor from its message; unlisted entries of a sparse one are 0."""
    _refuse_unknown(where, tensor)
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        expected = "1 (float32), 2 (int64) or 3 (int32)"
        got, fix = tensor.dtype, "Convert it to float32 or int64."
        raise DatumError(f"{where}.dtype", "unknown", expected=expected, got=got, fix=fix)
    kind = "float32" if dtype is np.float32 else "int64"
    shape = list(tensor.shape)
    if not tensor.HasField("sparse_csr"):
        return dense(where, _numbers(where, tensor.dense, dtype), kind, shape or None)
    csr = tensor.sparse_csr
    crow, col = (_numbers(where, raw, np.int64) for raw in (csr.crow_indices, csr.col_indices))
    return sparse(where, _numbers(where, csr.values, dtype), crow, col, kind, shape)


def _numbers(where: str, raw: bytes, dtype: Any) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if len(raw) % size:
        rule = f"a multiple of {size} bytes ({np.dtype(dtype)})"
        got, fix = f"{len(raw)} bytes", "Check the dtype that its bytes were made with."
        raise DatumError(where, "truncated", expected=rule, got=got, fix=fix)
    return np.frombuffer(raw, dtype)


def dense(where: str, values: Any, dtype: str, shape: Sequence[int] | None) -> TensorData:
    """A tensor of `values` in a shape, with `where` in its errors."""
    try:
        return TensorData(values, dtype, shape)  # pyright: ignore[reportArgumentType]
    except DatumError as error:
        raise error.replace(where=where) from None


def sparse(
    where: str, values: Any, crow: Any, col: Any, dtype: str, shape: Sequence[int] | None
) -> TensorData:
    """A dense tensor from compressed sparse rows.

    Args:
        where: the tensor's name in errors.
        values: `(nnz,)`.
        crow: `(rows + 1,)`: values[crow[i]:crow[i + 1]] are row i's.
        col: `(nnz,)`, the column of each value.
        dtype: "float32" or "int64".
        shape: rows and columns.

    Raises:
        DatumError: indices that do not fit each other or the shape.
    """
    values = dense(where, values, dtype, None).to_numpy()
    crow, col = (dense(where, index, "int64", None).to_numpy() for index in (crow, col))
    sizes = shape if isinstance(shape, Sequence) else []
    fits = len(sizes) == 2 and all(isinstance(n, int) and n >= 0 for n in sizes)
    if not fits or math.prod(sizes) > MOST_ELEMENTS:
        rule = f"[rows, columns] of at most {MOST_ELEMENTS} numbers"
        fix = "Send fewer candidates, or fewer datums in one request."
        raise DatumError(f"{where}.shape", "not usable", expected=rule, got=shape, fix=fix)
    rows, columns = sizes
    good = (
        values.ndim == crow.ndim == col.ndim == 1
        and len(crow) == rows + 1
        and crow[0] == 0
        and crow[-1] == len(col) == len(values)
        and bool((np.diff(crow) >= 0).all())
        and bool(((col >= 0) & (col < columns)).all())
    )
    if not good:
        got = f"{len(values)} values, {len(crow)} row pointers, {len(col)} columns"
        rule = f"compressed sparse rows of shape {[rows, columns]}"
        fix = "Build it with TensorData.from_torch_sparse()."
        raise DatumError(where, "indices do not fit", expected=rule, got=got, fix=fix)
    whole = np.zeros((rows, columns), values.dtype)
    whole[np.repeat(np.arange(rows), np.diff(crow)), col] = values
    return dense(where, whole, dtype, None)


# ---- out -----------------------------------------------------------------------------------------


def output_out(logprobs: Sequence[np.ndarray], metrics: Mapping[str, float]) -> bytes:
    """A forward's or forward_backward's result: a record for each run of equal trailing shapes."""
    kind = "ArrayRecord"
    out = MESSAGES["Output"](loss_fn_output_type=kind, metrics=metrics)
    runs: list[list[np.ndarray]] = []
    for array in logprobs:
        array = np.asarray(array, np.float32)
        if not runs or runs[-1][0].shape[1:] != array.shape[1:]:
            runs.append([])
        runs[-1].append(array)
    for run in runs:
        record = out.loss_fn_outputs.add(type_tag=kind, num_datums=len(run))
        field = record.fields["logprobs"]
        field.dtype, field.data = FLOAT32, b"".join(array.tobytes() for array in run)
        ends = np.cumsum([0, *(array.nbytes for array in run)], dtype=np.int64)
        field.offsets = ends.tobytes()
        field.trailing_shape.extend(run[0].shape[1:])
    return out.SerializeToString()


def samples_out(response: SampleResponse) -> bytes:
    """A sample's result."""
    out = MESSAGES["Samples"]()
    for sequence in response.sequences:
        logprobs = np.asarray(sequence.logprobs, np.float32).tobytes()
        tokens = np.asarray(sequence.tokens, np.int32).tobytes()
        stopped = 0 if sequence.stop_reason == "stop" else 1
        added = out.sequences.add(stop_reason=stopped, tokens=tokens, logprobs=logprobs)
        if sequence.topk_logprobs_np is not None:
            _set_top(added.topk_sampled_logprobs, sequence.topk_logprobs_np)
    if response.prompt_logprobs is not None:
        known = [math.nan if lp is None else lp for lp in response.prompt_logprobs]
        out.prompt_logprobs = np.asarray(known, np.float32).tobytes()
    if response.topk_prompt_logprobs is not None:
        rows = response.topk_prompt_logprobs
        k = max(len(row or ()) for row in rows)
        _set_top(out.topk_prompt_logprobs, TopkLogprobs.from_lists(rows, k))
    if response.target_prompt_logprobs is not None:
        _set_tensor(out.target_prompt_logprobs, response.target_prompt_logprobs)
    if response.prompt_alt_tokens is not None:
        _set_tensor(out.prompt_alt_tokens.tokens, response.prompt_alt_tokens.tokens)
        _set_tensor(out.prompt_alt_tokens.logprobs, response.prompt_alt_tokens.logprobs)
    return out.SerializeToString()


def _set_top(message: Any, top: TopkLogprobs) -> None:
    message.token_ids, message.logprobs = top.token_ids.tobytes(), top.logprobs.tobytes()
    message.length, message.k = top.token_ids.shape


def _set_tensor(message: Any, tensor: TensorData) -> None:
    array = tensor.to_numpy()
    dtype = 2 if tensor.dtype == "int64" else FLOAT32
    message.dense, message.dtype = array.astype(DTYPES[dtype]).tobytes(), dtype
    message.shape.extend(array.shape)
