"""JSON bodies: every field is read by its name and type, and what nobody read is refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cookbook_core.errors import ConfigError, DatumError, RequestError, check_choice, is_finite
from cookbook_core.serve import wire
from cookbook_core.types import (
    Datum,
    EncodedTextChunk,
    ModelInput,
    ModelInputChunk,
    TensorData,
)

from starlette.requests import Request

REQUIRED: Any = object()
SMALL_BODY = 1 << 14
"""Bytes that are decoded in the event loop's thread; larger bodies would delay heartbeats."""


def raw_body(request: Request) -> bytes:
    """The body, decompressed: see `guard`."""
    return request.scope["cookbook.body"]


def digest(request: Request) -> bytes:
    """Identifies the body."""
    return hashlib.sha256(raw_body(request)).digest()


async def fields_of(request: Request) -> Fields:
    """The fields of a JSON body."""
    raw = raw_body(request)
    if len(raw) > SMALL_BODY:
        return Fields(await asyncio.to_thread(parse_json, raw))
    return Fields(parse_json(raw))


def parse_json(raw: bytes) -> Any:
    """The value of a JSON body; None of an empty one.

    Raises:
        RequestError: not JSON, not UTF-8, or nested too deeply.
    """
    try:
        value = json.loads(raw, parse_constant=_refuse_constant) if raw else None
        if b"\\ud" in raw or b"\\uD" in raw:  # half of a character, which no reply could repeat
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError("body", "not JSON", got=error, fix="Send one JSON object.") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


class Fields:
    """The fields of one JSON object.

    Args:
        value: the object.
        where: its name in errors; "" for the body.

    Raises:
        RequestError: `value` is something else.
    """

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, dict):
            got = f"{type(value).__name__} {value!r:.80}"
            what, rule, fix = "not a JSON object", "an object", 'Send {"name": value}.'
            raise RequestError(where or "body", what, expected=rule, got=got, fix=fix)
        self._value, self._where = value, where
        self._read = set() if where else {"type"}  # a body's type says what its path says

    def name_of(self, name: str) -> str:
        """A field's name in errors."""
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str, rule: str, good: Any, default: Any = REQUIRED) -> Any:
        """Read a field; null counts as missing.

        Args:
            name: of the field.
            rule: what it must be, for errors.
            good: whether a value is that.
            default: None and others are returned as they are; without one the field is required.

        Raises:
            RequestError: missing, or not good.
        """
        self._read.add(name)
        value = self._value.get(name)
        if value is None and default is not REQUIRED:
            return default
        if not good(value):
            what = "missing" if value is None else "wrong type or value"
            got = f"{type(value).__name__} {value!r:.80}"
            fix = "It is required." if default is REQUIRED else "Leave it out for the default."
            raise RequestError(self.name_of(name), what, expected=rule, got=got, fix=fix)
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """A string."""
        return self.take(name, "a string", lambda value: isinstance(value, str), default)

    def integer(self, name: str, default: Any = REQUIRED, least: int = 0) -> Any:
        """A whole number below 2**63."""
        rule = f"an integer >= {least}"
        return self.take(name, rule, lambda v: type(v) is int and least <= v < 2**63, default)

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number."""
        return self.take(name, "a finite number", is_finite, default)

    def flag(self, name: str, default: Any = False) -> Any:
        """A boolean."""
        return self.take(name, "true or false", lambda value: isinstance(value, bool), default)

    def items(self, name: str, default: Any = REQUIRED) -> Any:
        """A list."""
        return self.take(name, "a list", lambda value: isinstance(value, list), default)

    def mapping(self, name: str, default: Any = REQUIRED) -> Any:
        """A JSON object, as it is."""
        return self.take(name, "an object", lambda value: isinstance(value, dict), default)

    def inner(self, name: str) -> Fields:
        """A JSON object, as fields."""
        return Fields(self.mapping(name), self.name_of(name))

    def metadata(self) -> dict[str, str] | None:
        """The field user_metadata; values become text."""
        given = self.mapping("user_metadata", None)
        return None if given is None else {key: str(value) for key, value in given.items()}

    def ignore(self, *names: str) -> None:
        """Accept fields that cannot change a result."""
        self._read.update(names)

    def unsupported(self, **neutral: Any) -> None:
        """Refuse fields unless they have the value that requests nothing.

        Raises:
            RequestError: one of them requests something.
        """
        for name, value in neutral.items():
            self._read.add(name)
            given = self._value.get(name)
            if given is not None and given != value:
                what, fix = "not supported by this server", f"Leave {name} out."
                rule, got = repr(value), f"{given!r:.80}"
                raise RequestError(self.name_of(name), what, expected=rule, got=got, fix=fix)

    def end(self) -> None:
        """Refuse fields that were not read, unless they are null.

        Raises:
            RequestError: names the first, and those that are known.
        """
        for name, value in self._value.items():
            if name not in self._read and value is not None:
                where = self.name_of(name)
                check_choice(RequestError, where, "unknown field", name, self._read)


# ---- datums --------------------------------------------------------------------------------------


def prompt_in(value: Any, where: str) -> ModelInput:
    """A ModelInput from JSON.

    Raises:
        RequestError, DatumError: other structure, audio, or a bad image.
    """
    body = Fields(value, where)
    chunks = [
        _chunk_in(item, f"{where}.chunks[{j}]") for j, item in enumerate(body.items("chunks"))
    ]
    body.end()
    return ModelInput(chunks)


def _chunk_in(value: Any, where: str) -> ModelInputChunk:
    chunk = Fields(value, where)
    kind = chunk.text("type", "encoded_text")
    if kind == "image":
        data, form = base64_in(chunk.text("data"), f"{where}.data"), chunk.text("format")
        image = wire.image_in(where, data, form, chunk.integer("expected_tokens", None))
        chunk.end()
        return image
    if kind != "encoded_text":
        raise wire.not_read(where, kind)
    tokens = chunk.items("tokens")
    bad = [t for t in tokens if type(t) is not int or not -(2**63) <= t < 2**63]
    if bad:
        rule, at = "token ids (integers)", f"{where}.tokens"
        fix = "Encode text with the model's tokenizer."
        raise DatumError(at, "not token ids", expected=rule, got=f"{bad[0]!r:.80}", fix=fix)
    chunk.end()
    return EncodedTextChunk(tokens)


def base64_in(text: str, where: str) -> bytes:
    """The bytes of base64 text.

    Raises:
        DatumError: other characters, or an early end.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        rule, fix = "the bytes of a PNG or JPEG file in base64", "Send it again."
        raise DatumError(where, "not base64", expected=rule, got=error, fix=fix) from None


def datums_in(values: Sequence[Any]) -> list[Datum]:
    """Datums from JSON.

    Raises:
        RequestError, DatumError: other structure; the message has the index of the datum.
    """
    data = []
    for i, value in enumerate(values):
        body = Fields(value, f"data[{i}]")
        body.ignore("model_input_spans", "loss_fn_input_spans")
        prompt = prompt_in(body.mapping("model_input"), f"data[{i}].model_input")
        inputs = {
            key: _tensor_in(tensor, f'data[{i}].loss_fn_inputs["{key}"]')
            for key, tensor in body.mapping("loss_fn_inputs").items()
        }
        body.end()
        data.append(Datum(prompt, inputs))
    return data


def targets_in(body: Fields, name: str) -> TensorData | None:
    """A dense tensor; None if the field is missing. Unlisted cells of a sparse one would be -1 in
    the request and have no place in the reply."""
    given = body.mapping(name, None)
    if given is None:
        return None
    inner = Fields(given, body.name_of(name))
    inner.unsupported(sparse_crow_indices=None, sparse_col_indices=None)
    return _tensor_in(given, body.name_of(name))


def _tensor_in(value: Any, where: str) -> TensorData:
    body = Fields(value, where)
    kinds = ("float32", "int64")
    dtype = body.take("dtype", " or ".join(kinds), lambda value: value in kinds)
    values, shape = body.items("data"), body.items("shape", None)
    crow, col = body.items("sparse_crow_indices", None), body.items("sparse_col_indices", None)
    body.end()
    if crow is None and col is None:
        return wire.dense(where, values, dtype, shape)
    return wire.sparse(where, values, crow or [], col or [], dtype, shape)


def loss_config(value: Mapping[str, Any] | None) -> dict[str, float | str]:
    """The options of a loss.

    Raises:
        ConfigError: a value that is neither a number nor text.
    """
    for key, option in (value or {}).items():
        if not isinstance(option, str) and not is_finite(option):
            where, got = f'loss_fn_config["{key}"]', f"{option!r:.80}"
            rule, fix = "a number or text", "Leave it out for the default."
            raise ConfigError(where, "not usable", expected=rule, got=got, fix=fix)
    return dict(value or {})
