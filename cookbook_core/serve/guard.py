"""Who may send what: the key, Host and Origin, content types, sizes. Runs before any endpoint.

A web page in a browser on this machine can send requests to loopback. It cannot choose the header
Origin, nor Host, nor send JSON or protobuf without asking first (which is refused).
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
import socket
import zlib
from collections.abc import Iterable
from typing import Any

from cookbook_core.errors import ConfigError, CookbookError, RequestError
from cookbook_core.serve.replies import Refused, refusal_body

PIECE = 1 << 16
"""Bytes decompressed at a time, so that a small body cannot become a large one unseen."""
TYPES = ("application/json", "application/x-protobuf")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, key: str | None) -> None:
    """Raise ConfigError for an address that others reach, without a key that keeps them out."""
    if key is not None and len(key) < 8:
        what, fix = "too short", "python -c 'import secrets; print(secrets.token_urlsafe())'"
        raise ConfigError("--api_key", what, expected="8 characters or more", fix=fix)
    if not is_loopback(host) and key is None:
        fix = "Pass --api_key, or listen on 127.0.0.1 and use an SSH tunnel."
        raise ConfigError("--host", "an address that others reach needs a key", got=host, fix=fix)


class Guard:
    """ASGI middleware in front of the endpoints.

    Args:
        app: the endpoints. They read the body, decompressed, from scope["cookbook.body"].
        host: the address that the server listens on.
        key: clients must send it; None: anyone on this machine may.
        names: further names under which clients reach this machine.
        most_bytes: of a body, decompressed.
    """

    def __init__(
        self, app: Any, host: str, key: str | None, names: Iterable[str], most_bytes: int
    ) -> None:
        self._app, self._key, self._most = app, key, most_bytes
        self._local = is_loopback(host)
        self._names = {"localhost", host, *names}
        if not self._local:
            self._names |= {socket.gethostname(), socket.getfqdn()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer refusals at once, and pass the rest on with its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        try:
            self._check(scope, headers)
            scope["cookbook.body"] = await self._body(headers, receive)
        except Refused as refused:
            basic = scope["path"] == "/" and refused.status == 401
            await _answer(send, refused.status, refused.error, ask=basic)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Any, headers: dict[str, str]) -> None:
        name = headers.get("host", "")
        name = name.rpartition(":")[0] if name.rpartition(":")[2].isdigit() else name
        if name.strip("[]") not in self._names and not self._is_address(name.strip("[]")):
            fix = "Use http://127.0.0.1, or start the server with --allow_host NAME."
            raise _refused(403, "Host", "not a name of this server", name, fix)
        if "origin" in headers:
            fix = "Web pages may not use this server; send requests without it."
            raise _refused(403, "Origin", "requests with this header are refused", "", fix)
        if self._key is not None and scope["path"] != "/api/v1/healthz":
            given = headers.get("x-api-key") or _from_authorization(headers)
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                fix = "Set TINKER_API_KEY to the server's --api_key."
                raise _refused(401, "X-API-Key", "wrong or missing", "", fix)

    def _is_address(self, name: str) -> bool:
        """Whether it is an IP address that may be this machine's: only names can be rebound."""
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._local

    async def _body(self, headers: dict[str, str], receive: Any) -> bytes:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._most:
            raise self._too_large(length)
        pieces: list[bytes] = []
        total, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _refused(422, "body", "the connection ended before it", "", "Send it again.")
            pieces.append(message.get("body", b""))
            total += len(pieces[-1])
            if total > self._most:
                raise self._too_large(f"more than {total}")
            more = message.get("more_body", False)
        body = b"".join(pieces)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind not in TYPES:
            rule = " or ".join(TYPES)
            raise _refused(415, "Content-Type", "not accepted", kind, f"Send {rule}.")
        return self._unpacked(headers.get("content-encoding", "identity"), body)

    def _unpacked(self, encoding: str, body: bytes) -> bytes:
        """The body without its compression, as far as it is not too large.

        Raises:
            Refused: 413, too large; 415, another encoding; 422, damaged.
        """
        if encoding == "identity" or not body:
            return body
        try:
            if encoding == "gzip":
                gzip = zlib.decompressobj(wbits=31)
                out = gzip.decompress(body, self._most + 1)
                whole = gzip.eof or len(out) > self._most
            elif encoding == "zstd":
                import zstandard

                out, whole = _unzstd(zstandard, body, self._most), True
            else:
                raise _refused(415, "Content-Encoding", "not accepted", encoding, "Use gzip.")
        except ImportError:
            fix = "Install zstandard beside the server, or send bodies uncompressed."
            raise _refused(415, "Content-Encoding", "zstd is not installed", "", fix) from None
        except (zlib.error, EOFError, ValueError) as error:
            raise _refused(422, "body", "damaged compression", error, "Send it again.") from None
        if len(out) > self._most:
            raise self._too_large(f"{len(body)} bytes compressed")
        if not whole:
            raise _refused(422, "body", "damaged compression", "an early end", "Send it again.")
        return out

    def _too_large(self, got: object) -> Refused:
        error = RequestError(
            "body",
            "too large",
            expected=f"at most {self._most} bytes, decompressed",
            got=got,
            fix="Send fewer datums at a time, or start the server with --max_request_mb.",
        )
        return Refused(413, error)


def _unzstd(zstandard: Any, body: bytes, most: int) -> bytes:
    pieces, total = [], 0
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body) as reader:
            while total <= most and (piece := reader.read(PIECE)):
                pieces.append(piece)
                total += len(piece)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return b"".join(pieces)


def _from_authorization(headers: dict[str, str]) -> str:
    """The key in the header Authorization: a bearer token, or the password of a browser."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value
    try:
        return base64.b64decode(value).decode().partition(":")[2] if scheme == "Basic" else ""
    except ValueError:
        return ""


def _refused(status: int, where: str, what: str, got: object, fix: str) -> Refused:
    return Refused(status, RequestError(where, what, got=got, fix=fix))


async def _answer(send: Any, status: int, error: CookbookError, *, ask: bool) -> None:
    body = json.dumps(refusal_body(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(b"connection", b"close")]  # the rest of the body is not read
    if ask:
        headers.append((b"www-authenticate", b'Basic realm="cookbook serve: the key"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
