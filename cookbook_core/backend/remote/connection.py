"""Connect to a service through the `tinker` SDK: check its version, filter its logs, translate its
errors.

The SDK retries an unreachable URL for minutes and polls for a result without end. Here unreachable
URLs fail at once, and requests time out after an hour.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from importlib import metadata
from typing import Any

from cookbook_core.errors import ConfigError, CookbookError, RequestError, nearest

OLDEST_SDK = (0, 25)
HOSTED = ("thinkingmachines.dev", "thinkingmachines.ai")
LOG_SECONDS = 60.0
"""Seconds between warnings about a request that has no result yet."""
WAIT_SECONDS = 3600.0
"""Seconds after which a request without a result fails."""

log = logging.getLogger("cookbook_core")


class Connection:
    """One service: the SDK's client, made when first needed, and the requests still unanswered.

    Args:
        url: of the service.
        api_key: None takes TINKER_API_KEY or, unless the service is the hosted one, a placeholder.
        user_metadata, project_id, headers: passed to the service.

    Raises:
        ConfigError: not a URL; or the SDK is not installed, or too old.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.url = checked_url("base_url", url)
        self.verdicts: dict[str | None, list[str]] = {}
        """The problems that `core_problems` listed, by base model."""
        self._key = api_key or os.environ.get("TINKER_API_KEY")
        self._options: dict[str, Any] = {"user_metadata": user_metadata, "project_id": project_id}
        self._headers = headers
        self._client: Any = None
        self._connecting, self._lock = threading.Lock(), threading.Lock()
        self._pending: list[_Pending] = []
        _check_sdk()

    @property
    def types(self) -> Any:
        """The SDK's module of types; importing the SDK takes seconds, and may import torch."""
        return _import_sdk().types

    def client(self) -> Any:
        """The SDK's ServiceClient. The first call blocks while it connects."""
        with self._connecting:
            if self._client is None:
                _refuse_silent_address(self.url)
                host = urllib.parse.urlsplit(self.url).hostname or ""
                key = self._key
                if not host.endswith(HOSTED):
                    # telemetry is sent to the service, which may not accept it
                    os.environ.setdefault("TINKER_TELEMETRY", "0")
                    key = key or "tml-self-hosted"  # the SDK requires this prefix
                _filter_logs()
                sdk = _import_sdk()
                options = {"base_url": self.url, "api_key": key, **self._options}
                if self._headers:  # has another name in SDK 0.25
                    named = inspect.signature(sdk.ServiceClient).parameters
                    new, old = "default_headers_overrides", "default_headers"
                    options[new if new in named else old] = self._headers
                self._client = sdk.ServiceClient(**options)
            return self._client

    def models(self) -> list[Any]:
        """The models the service lists; empty if it cannot list them.

        Raises:
            RequestError: the service refuses the API key.
        """
        try:
            return list(self.client().get_server_capabilities().supported_models)
        except CookbookError:
            raise
        except Exception as error:
            if getattr(error, "status_code", None) in (401, 403):  # so will all other requests
                raise self.translate_error("get_server_capabilities", error) from error
            log.debug("%s lists no models: %s", self.url, error)
            return []

    def close(self) -> None:
        """End the session; errors of services without such a request are ignored."""
        client, self._client = self._client, None
        if client is not None and hasattr(client, "close"):
            with contextlib.suppress(Exception):
                client.close("success").result(timeout=5)

    # ---- results ---------------------------------------------------------------------------------

    def answer(self, label: str, sdk_future: Any, convert: Callable[[Any], Any]) -> Future[Any]:
        """A future of `convert(result)` of one of the SDK's futures, with its errors translated."""
        out: Future[Any] = Future()
        inner: Future[Any] = sdk_future.future() if hasattr(sdk_future, "future") else sdk_future

        def done(finished: Future[Any]) -> None:
            try:
                settle(out, convert(finished.result()))
            except BaseException as error:  # raised by out.result()
                settle(out, error=self.translate_error(label, error))

        inner.add_done_callback(done)
        return out

    def watch(self, label: str, future: Future[Any]) -> Future[Any]:
        """The same future, with a warning each LOG_SECONDS, and a failure after WAIT_SECONDS."""
        with self._lock:
            self._pending.append(_Pending(label, future))
            if len(self._pending) == 1:
                threading.Thread(target=self._watch, name="cookbook-waiting", daemon=True).start()
        return future

    def _watch(self) -> None:
        """Run in a thread of its own while anything is pending."""
        while True:
            time.sleep(min(0.5, LOG_SECONDS / 4))
            with self._lock:
                self._pending = [p for p in self._pending if not p.future.done()]
                pending = list(self._pending)
                if not pending:
                    return
            for p in pending:
                waited = time.monotonic() - p.since
                if waited > WAIT_SECONDS:
                    error = RequestError(
                        f"{p.label} at {self.url}",
                        f"no answer within {WAIT_SECONDS:g} s",
                        fix="Read the service's log, then resume from the last checkpoint.",
                    )
                    settle(p.future, error=error)
                elif waited > LOG_SECONDS * (p.warnings + 1):
                    p.warnings += 1
                    log.warning(
                        "%s: still waiting for %s after %d s", p.label, self.url, round(waited)
                    )

    def translate_error(self, label: str, error: BaseException) -> BaseException:
        """An error of the SDK, or of the service through it, as a RequestError with a fix."""
        if isinstance(error, (CookbookError, KeyboardInterrupt, SystemExit)):
            return error
        # the SDK's error of a request, or of polling for its result, whose cause has the status
        source = error if hasattr(error, "status_code") else error.__cause__
        status, body = getattr(source, "status_code", None), getattr(source, "body", None)
        detail = body.get("detail") or body.get("message") if isinstance(body, dict) else None
        text = _one_line(str(detail or error) or type(error).__name__)
        if isinstance(error, CancelledError):
            text = "the request was cancelled"
        got = f"status {status}" if status else type(error).__name__
        fix = _FIXES.get(status or 0, "")
        if status == 422 and source is error:  # the request itself; while polling, its execution
            fix = _UNKNOWN_FORM
        elif fix == "" and isinstance(error, (TypeError, AttributeError)):
            fix = (
                f"tinker {sdk_version()} is installed here; a newer one may support this: "
                "pip install -U tinker."
            )
        translated = RequestError(f"{label} at {self.url}", text, got=got, fix=fix)
        translated.__cause__ = error
        return translated


class _Pending:
    def __init__(self, label: str, future: Future[Any]) -> None:
        self.label, self.future = label, future
        self.since, self.warnings = time.monotonic(), 0


_FIXES = {
    401: "Pass api_key, or set TINKER_API_KEY.",
    403: "Pass an api_key that may do this, or set TINKER_API_KEY.",
    404: "The service does not offer this, or has no such model or checkpoint.",
    409: "Some services refuse every request after a failed one: make a new client from the last "
    "checkpoint.",
}
_INSTALL = 'Install it: pip install "cookbook-core[remote]" (Python 3.11 or newer).'
_UNKNOWN_FORM = (
    "The service does not understand the request as the installed SDK writes it: install another "
    "version of tinker."
)


def settle(future: Future[Any], value: Any = None, error: BaseException | None = None) -> None:
    """Set a future's result or error, unless it has one or was cancelled."""
    with contextlib.suppress(InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)


def joined(futures: Sequence[Future[Any]], combine: Callable[[list[Any]], Any]) -> Future[Any]:
    """A future of `combine(results)`, or of the first error in the order of the futures."""
    out: Future[Any] = Future()
    left, lock = [len(futures)], threading.Lock()

    def done(_: Future[Any]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        try:
            settle(out, combine([future.result() for future in futures]))
        except BaseException as error:  # raised by out.result()
            settle(out, error=error)

    for future in futures:
        future.add_done_callback(done)
    return out


def sdk_version() -> str:
    """Version of the installed SDK; "none" if it is not installed."""
    try:
        return metadata.version("tinker")
    except metadata.PackageNotFoundError:
        return "none"


def unknown_model(base_model: str, names: list[str]) -> ConfigError:
    """The error for a base model the service does not have."""
    fix = nearest(base_model, names)
    return ConfigError("base_model", "unknown to the service", got=repr(base_model), fix=fix)


def _check_sdk() -> None:
    """Find the SDK without importing it, which takes seconds.

    Raises:
        ConfigError: it is not installed, or too old.
    """
    rule, version = "tinker >= 0.25", sdk_version()
    if importlib.util.find_spec("tinker") is None:
        raise ConfigError("base_url", "needs the tinker SDK", expected=rule, fix=_INSTALL)
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_SDK:
        what = "the tinker SDK is too old"
        raise ConfigError("base_url", what, expected=rule, got=version, fix=_INSTALL)


def _import_sdk() -> Any:
    try:
        import tinker
    except ImportError as error:
        what = "the tinker SDK cannot be imported"
        raise ConfigError("base_url", what, got=error, fix=_INSTALL) from error
    return tinker


def checked_url(where: str, url: object) -> str:
    """The URL without a slash at its end; ConfigError about `where` unless it is one of http."""
    parts = urllib.parse.urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            where,
            "not a URL",
            expected="one such as http://localhost:8000",
            got=url,
            fix=f"Pass {where} with http:// or https://.",
        )
    return str(url).rstrip("/")


def _refuse_silent_address(url: str) -> None:
    """Fail at once if nothing listens at the URL: the SDK would retry for five minutes."""
    parts = urllib.parse.urlsplit(url)
    host, proxies = parts.hostname or "", urllib.request.getproxies()
    if (parts.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(host):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            "base_url",
            "no service answers at this URL",
            got=f"{url} ({error})",
            fix="Start the service, or correct the URL.",
        ) from error


def _one_line(text: str) -> str:
    """An error's text, without the suffix the SDK adds and without a server's traceback."""
    text = re.sub(r" for self\.request_id=.*", "", text, flags=re.DOTALL)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).removeprefix("Request failed: ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and any(line.startswith(("Traceback", 'File "')) for line in lines):
        lines = lines[-1:]
    line = " ".join(lines).rstrip(".")
    return line if len(line) <= 400 else f"{line[:400]}..."


class _FirstOnly(logging.Filter):
    """Pass the first of the SDK's repeated heartbeat warnings; drop those that `watch` replaces."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        # `watch` logs the first, with URL and time; for the second see _filter_logs
        if "because of try_again" in text or "DEPRECATED" in text:
            return False
        if "heartbeat failed" not in text:
            return True
        kind = text.split(" for ")[0]
        first = kind not in self._seen
        self._seen.add(kind)
        return first


_first_only = _FirstOnly()


def _filter_logs() -> None:
    """Thin out the SDK's log lines about each poll and each missed heartbeat."""
    for name in ("internal_client_holder", "api_future_impl", "public_interfaces.training_client"):
        logging.getLogger(f"tinker.lib.{name}").addFilter(_first_only)
    # SDK 0.25 has only the names that later SDKs deprecate
    warnings.filterwarnings("ignore", r"DEPRECATED: \w+Client\.", FutureWarning)
