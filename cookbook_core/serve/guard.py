"""Who may send what: the key, Host and Origin, content types, sizes. Runs before any endpoint.

A web page in a browser on this machine can send requests to loopback. It cannot choose the header
Origin, nor Host, nor send JSON or protobuf without asking first (which is refused).
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import socket
import zlib
from collections.abc import Iterable
from typing import Any

from cookbook_core.errors import ConfigError, RequestError
from cookbook_core.serve.replies import Refused, refusal, refusal_body

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

PIECE = 1 << 16
"""Bytes decompressed at a time, so that a small body cannot become a large one unseen."""
PROTO = "application/x-protobuf"
TYPES = ("application/json", PROTO)


def is_proto(request: Request) -> bool:
    """Whether a body is protobuf and not JSON."""
    return request.headers.get("content-type", "").startswith(PROTO)


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
        if scope["type"] == "http":
            request = Request(scope, receive)
            try:
                self._check(request)
                scope["cookbook.body"] = await self._body(request)
            except RequestError as error:
                headers = {"connection": "close"}  # the rest of the body is not read
                status, shown = refusal(error)
                if scope["path"] == "/" and status == 401:
                    headers["www-authenticate"] = 'Basic realm="cookbook serve: the key"'
                await JSONResponse(refusal_body(shown), status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        host, _, port = request.headers.get("host", "").rpartition(":")
        name = (host if port.isdigit() else request.headers.get("host", "")).strip("[]")
        if name not in self._names and not self._is_address(name):
            what = "not a name of this server"
            fix = "Use http://127.0.0.1, or start the server with --allow_host NAME."
            raise Refused(403, "Host", what, got=name, fix=fix)
        if "origin" in request.headers:
            fix = "Web pages may not use this server; send requests without it."
            raise Refused(403, "Origin", "requests with this header are refused", fix=fix)
        if self._key is not None and request.url.path != "/api/v1/healthz":
            given = request.headers.get("x-api-key") or _from_authorization(request)
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                fix = "Set TINKER_API_KEY to the server's --api_key."
                raise Refused(401, "X-API-Key", "wrong or missing", fix=fix)

    def _is_address(self, name: str) -> bool:
        """Whether it is an IP address that may be this machine's: only names can be rebound."""
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._local

    async def _body(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._most:
            raise self._too_large(length)
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > self._most:
                    raise self._too_large(f"more than {len(body)}")
        except ClientDisconnect:
            raise RequestError("body", "the connection ended before it") from None
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind not in TYPES:
            fix = f"Send {' or '.join(TYPES)}."
            raise Refused(415, "Content-Type", "not accepted", got=kind, fix=fix)
        return self._unpacked(request.headers.get("content-encoding", "identity"), bytes(body))

    def _unpacked(self, encoding: str, body: bytes) -> bytes:
        """The body without its compression, as far as it is not too large.

        Raises:
            Refused: 413, too large; 415, another encoding.
            RequestError: damaged.
        """
        if encoding == "identity" or not body:
            return body
        fix = "Send it again."
        try:
            unpacked = _UNPACK[encoding](body, self._most + 1)
        except KeyError:
            rule = " or ".join(_UNPACK)
            raise Refused(415, "Content-Encoding", "not accepted", expected=rule) from None
        except ImportError:
            fix = "Install zstandard beside the server, or send bodies uncompressed."
            raise Refused(415, "Content-Encoding", "zstd is not installed", fix=fix) from None
        except (zlib.error, ValueError) as error:
            raise RequestError("body", "damaged compression", got=error, fix=fix) from None
        if len(unpacked) > self._most:
            raise self._too_large(f"{len(body)} bytes compressed")
        return unpacked

    def _too_large(self, got: object) -> Refused:
        rule = f"at most {self._most} bytes, decompressed"
        fix = "Send fewer datums at a time, or start the server with --max_request_mb."
        return Refused(413, "body", "too large", expected=rule, got=got, fix=fix)


def _gunzip(body: bytes, most: int) -> bytes:
    """At most `most` bytes of what a body holds; ValueError if it ends early."""
    gzip = zlib.decompressobj(wbits=31)
    out = gzip.decompress(body, most)
    if not gzip.eof and len(out) < most:
        raise ValueError("an early end")
    return out


def _unzstd(body: bytes, most: int) -> bytes:
    """The same; the stream is read in pieces."""
    import zstandard

    out = bytearray()
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body) as reader:
            while len(out) < most and (piece := reader.read(PIECE)):
                out += piece
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return bytes(out)


_UNPACK = {"gzip": _gunzip, "zstd": _unzstd}


def _from_authorization(request: Request) -> str:
    """The key in the header Authorization: a bearer token, or the password of a browser."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value
    try:
        return base64.b64decode(value).decode().partition(":")[2] if scheme == "Basic" else ""
    except ValueError:
        return ""
