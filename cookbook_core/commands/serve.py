"""`cookbook serve`: Tinker's wire protocol over the local backend."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cookbook_core.errors import ConfigError
from cookbook_core.storage.paths import usable_path


@dataclass(frozen=True)
class Settings:
    """What the command's flags say; `cookbook serve --help` explains them."""

    model: Sequence[str] = ("tiny",)
    host: str = "127.0.0.1"
    port: int = 8000
    checkpoint_dir: str = "checkpoints"
    api_key: str | None = None
    allow_host: Sequence[str] = ()
    device: str = "auto"
    dtype: str = "auto"
    max_adapters: int = 32
    max_request_mb: int = 256


def serve(settings: Settings) -> None:
    """Load the models and serve them until the process is told to stop.

    SIGINT and SIGTERM end it: what is queued is finished, and adapters with steps that are not on
    disk are saved as autosave-STEP.

    Raises:
        ConfigError: a flag with an invalid value, or the extra is not installed.
        ModelError: a model cannot be loaded.
    """
    try:
        from cookbook_core.serve.app import make_app
        from cookbook_core.serve.guard import check_exposure
        from cookbook_core.serve.state import Options

        import uvicorn
    except ImportError as error:
        fix = 'pip install "cookbook-core[serve]"'
        raise ConfigError("cookbook serve", "is not installed", got=error, fix=fix) from error
    check_exposure(settings.host, settings.api_key)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("httpx", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    root = usable_path("--checkpoint_dir", settings.checkpoint_dir, ConfigError)
    listening = listen(settings.host, settings.port)
    bases = load_bases(settings.model, root, settings.device, settings.dtype)
    app = make_app(
        bases, root, host=settings.host, key=settings.api_key, names=settings.allow_host,
        most_bytes=settings.max_request_mb << 20,
        options=Options(max_adapters=settings.max_adapters),
    )  # fmt: skip
    port = listening.getsockname()[1]
    listening.listen()  # who reads the address may connect at once, and waits
    print(f"serving {', '.join(bases)} at http://{settings.host}:{port}", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)
    uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; before the models load, since another program may have the port.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # with the protocol named asyncio sets TCP_NODELAY; else a reply in two parts waits 40 ms
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        got, fix = f"{host}:{port}: {error}", "Choose another --port."
        raise ConfigError("--port", "cannot listen there", got=got, fix=fix) from error
    return listening


def load_bases(
    models: Sequence[str], root: Path, device: str = "auto", dtype: str = "auto"
) -> dict[str, Any]:
    """Load base models.

    Args:
        models: NAME, or NAME=FOLDER; clients call it NAME.
        root: where checkpoints are written.
        device: see `ServiceClient`.
        dtype: see `ServiceClient`.

    Returns:
        A `serve.models.Base` for each name.

    Raises:
        ConfigError: a name twice. ModelError: a model cannot be loaded.
    """
    from cookbook_core.backend.local.backend import LocalBackend
    from cookbook_core.serve.models import Base

    bases: dict[str, Base] = {}
    for given in models:
        name, _, folder = given.partition("=")
        if not name or name in bases:
            rule = "NAME or NAME=FOLDER, each name one time"
            raise ConfigError("--model", "not usable", expected=rule, got=given)
        backend = LocalBackend(folder or name, root, device=device, dtype=dtype, gathers=True)
        engine = backend.worker.submit("load", backend.engine).result()
        bases[name] = Base(name, engine.base.path, backend, engine.base.data())
    return bases
