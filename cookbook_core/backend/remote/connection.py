"""The `tinker` SDK, opened on one URL: found, told to be quiet, its errors in our words.

The SDK retries for minutes what a self-hosted service will never answer, and polls for ever. So a
URL where nothing listens is refused at once, and whoever waits is told, and freed in the end.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from importlib import metadata
from typing import Any

from cookbook_core.errors import ConfigError, CookbookError, RequestError, nearest

OLDEST_SDK = (0, 25)
HOSTED = ("thinkingmachines.dev", "thinkingmachines.ai")
SAY_SECONDS = 60.0
"""How long a request waits before that is said; said again after each such time."""
WAIT_SECONDS = 3600.0
"""How long a request may wait in all; then it fails, and whatever waits for it goes on."""

log = logging.getLogger("cookbook_core")


class Connection:
    """One service: the SDK's client, made when first needed, and who waits for an answer."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.url = _checked_url(url)
        self.verdicts: dict[str | None, list[str]] = {}
        """What `core_problems` found, by base model."""
        self._key = api_key or os.environ.get("TINKER_API_KEY")
        self._options: dict[str, Any] = {"user_metadata": user_metadata, "project_id": project_id}
        self._headers = headers
        self._client: Any = None
        self._connecting, self._lock = threading.Lock(), threading.Lock()
        self._pending: list[_Pending] = []
        self.types = _import_sdk().types

    def client(self) -> Any:
        """The SDK's ServiceClient. Blocks when it is made (not for the caller's thread)."""
        with self._connecting:
            if self._client is None:
                _refuse_silent_address(self.url)
                host = urllib.parse.urlsplit(self.url).hostname or ""
                key = self._key
                if not host.endswith(HOSTED):
                    # its reports go to the service, which may have no place for them
                    os.environ.setdefault("TINKER_TELEMETRY", "0")
                    key = key or "tml-self-hosted"  # the SDK wants one of this form
                _quieten()
                sdk = _import_sdk()
                options = {"base_url": self.url, "api_key": key, **self._options}
                if self._headers:  # called otherwise in 0.25
                    named = inspect.signature(sdk.ServiceClient).parameters
                    new, old = "default_headers_overrides", "default_headers"
                    options[new if new in named else old] = self._headers
                self._client = sdk.ServiceClient(**options)
            return self._client

    def models(self) -> list[Any]:
        """The models the service says it has; empty where it does not say.

        Raises:
            RequestError: it lets nobody in with this key.
        """
        try:
            return list(self.client().get_server_capabilities().supported_models)
        except CookbookError:
            raise
        except Exception as error:
            if getattr(error, "status_code", None) in (401, 403):  # nothing else will work either
                raise self.in_our_words("get_server_capabilities", error) from error
            log.debug("%s names no models: %s", self.url, error)
            return []

    def close(self) -> None:
        """End the session; a service that knows no such request is left as it is."""
        client, self._client = self._client, None
        if client is not None and hasattr(client, "close"):
            with contextlib.suppress(Exception):
                client.close("success").result(timeout=5)

    # ---- answers ---------------------------------------------------------------------------------

    def answer(self, label: str, sdk_future: Any, convert: Callable[[Any], Any]) -> Future[Any]:
        """A future of `convert(result)` of one of the SDK's futures, errors in our words."""
        out: Future[Any] = Future()
        inner: Future[Any] = sdk_future.future() if hasattr(sdk_future, "future") else sdk_future

        def done(found: Future[Any]) -> None:
            try:
                settle(out, convert(found.result()))
            except BaseException as error:  # handed to whoever waits for the result
                settle(out, error=self.in_our_words(label, error))

        inner.add_done_callback(done)
        return out

    def watch(self, label: str, future: Future[Any]) -> Future[Any]:
        """The same future, which says so while it waits long, and fails after WAIT_SECONDS."""
        with self._lock:
            self._pending.append(_Pending(label, future))
            if len(self._pending) == 1:
                threading.Thread(target=self._say, name="cookbook-waiting", daemon=True).start()
        return future

    def _say(self) -> None:
        """Runs in a thread of its own while anything is pending."""
        while True:
            time.sleep(min(0.5, SAY_SECONDS / 4))
            with self._lock:
                self._pending = [p for p in self._pending if not p.future.done()]
                pending = list(self._pending)
                if not pending:
                    return
            for p in pending:
                waited = time.monotonic() - p.since
                if waited > WAIT_SECONDS:
                    what = f"no answer within {WAIT_SECONDS:g} s"
                    mend = "Look at the service's log; go on from the last checkpoint."
                    error = RequestError(
                        f"{p.label} at {self.url}", what, expected="an answer", got="none", fix=mend
                    )
                    settle(p.future, error=error)
                elif waited > SAY_SECONDS * (p.said + 1):
                    p.said += 1
                    log.warning(
                        "%s: still waiting for %s after %d s", p.label, self.url, round(waited)
                    )

    def in_our_words(self, label: str, error: BaseException) -> BaseException:
        """An error of the SDK, or of the service through it, as one of ours."""
        if isinstance(error, (CookbookError, KeyboardInterrupt, SystemExit)):
            return error
        said = error if hasattr(error, "status_code") else error.__cause__  # what polling got
        status, body = getattr(said, "status_code", None), getattr(said, "body", None)
        detail = body.get("detail") or body.get("message") if isinstance(body, dict) else None
        text = _last_line(str(detail or error) or type(error).__name__)
        if isinstance(error, CancelledError):
            text = "the request was cancelled"
        got = f"status {status}" if status else type(error).__name__
        mend = _MENDS.get(status or 0, "")
        if status == 422 and said is error:  # refused as it came; later it is an error like others
            mend = _UNKNOWN_FORM
        elif mend == "" and isinstance(error, (TypeError, AttributeError)):
            mend = f"The tinker SDK installed here is {sdk_version()}; another may know this."
        ours = RequestError(f"{label} at {self.url}", text, expected="success", got=got, fix=mend)
        ours.__cause__ = error
        return ours


class _Pending:
    def __init__(self, label: str, future: Future[Any]) -> None:
        self.label, self.future = label, future
        self.since, self.said = time.monotonic(), 0


_MENDS = {
    401: "Give an api_key, or set TINKER_API_KEY.",
    403: "Give an api_key that may do this, or set TINKER_API_KEY.",
    404: "The service does not offer this, or has no such model or checkpoint.",
    409: "Some services refuse everything after one failed request: make a new client from the "
    "last checkpoint.",
}
_UNKNOWN_FORM = (
    "The service does not know the request in the form of the SDK installed here: another version "
    "of tinker may fit it."
)


def settle(future: Future[Any], value: Any = None, error: BaseException | None = None) -> None:
    """Set a future's result or error, unless it has one or was cancelled."""
    with contextlib.suppress(InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)


def sdk_version() -> str:
    """Of the installed SDK; "none" where there is none."""
    try:
        return metadata.version("tinker")
    except metadata.PackageNotFoundError:
        return "none"


def unknown_model(base_model: str, names: list[str]) -> ConfigError:
    """The error for a base model the service does not have."""
    what = "the service has no such model"
    return ConfigError(
        "base_model",
        what,
        expected="one it names",
        got=repr(base_model),
        fix=nearest(base_model, names),
    )


def _import_sdk() -> Any:
    """The SDK.

    Raises:
        ConfigError: it is not installed, or older than it must be.
    """
    mend = 'Install it: pip install "cookbook-core[remote]" (Python 3.11 or newer).'
    try:
        import tinker
    except ImportError as error:
        what = "needs the tinker SDK"
        raise ConfigError(
            "base_url", what, expected="tinker >= 0.25", got=error, fix=mend
        ) from error
    found = tuple(int(n) for n in re.findall(r"\d+", sdk_version())[:2])
    if found < OLDEST_SDK:
        what = "the tinker SDK is too old"
        raise ConfigError("base_url", what, expected="tinker >= 0.25", got=sdk_version(), fix=mend)
    return tinker


def _checked_url(url: object) -> str:
    parts = urllib.parse.urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "base_url", "not a URL", expected="such as http://localhost:8000", got=url
        )
    return str(url).rstrip("/")


def _refuse_silent_address(url: str) -> None:
    """Fail at once where nothing listens: the SDK would try for five minutes."""
    parts = urllib.parse.urlsplit(url)
    host, proxies = parts.hostname or "", urllib.request.getproxies()
    if (parts.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(host):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        mend = "Start the service, or mend the URL."
        got = f"{url} ({error})"
        raise ConfigError(
            "base_url", "nothing answers there", expected="a running service", got=got, fix=mend
        ) from error


def _last_line(text: str) -> str:
    """What an error says, without the SDK's own tail and without a server's traceback."""
    text = re.sub(r" for self\.request_id=.*", "", text, flags=re.DOTALL)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).removeprefix("Request failed: ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and any(line.startswith(("Traceback", 'File "')) for line in lines):
        lines = lines[-1:]
    said = " ".join(lines).rstrip(".")
    return said if len(said) <= 400 else f"{said[:400]}..."


class _Once(logging.Filter):
    """Lets each kind of repeated notice of the SDK through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        # the first is said by `watch`, with the URL and the time; the second: see _quieten
        if "because of try_again" in text or "DEPRECATED" in text:
            return False
        if "heartbeat failed" not in text:
            return True
        kind = text.split(" for ")[0]
        first = kind not in self._seen
        self._seen.add(kind)
        return first


_once = _Once()


def _quieten() -> None:
    """The SDK's notices of every poll and every missed heartbeat, once each."""
    for name in ("internal_client_holder", "api_future_impl", "public_interfaces.training_client"):
        logging.getLogger(f"tinker.lib.{name}").addFilter(_once)
    # what later SDKs call otherwise has no other name in 0.25
    warnings.filterwarnings("ignore", r"DEPRECATED: \w+Client\.", FutureWarning)
