"""One base model on a service: its request queue, tokenizer and gradient check.

Requests leave in the order they were made, from one thread;
a result is awaited only where the next request depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cookbook_core.backend.gradient_probe import core_problems, error_line
from cookbook_core.backend.interface import TrainingBackend
from cookbook_core.backend.remote.connection import Connection, settle, unknown_model
from cookbook_core.backend.worker import Worker
from cookbook_core.errors import RequestError
from cookbook_core.storage.bundled import BUNDLED, bundled_model
from cookbook_core.types import ModelData


class Session:
    """One base model of a service, and the queue of requests to it.

    Args:
        connection: the service.
        base_model: its name there, or a local folder of that name; None for the base model that a
            checkpoint names.
        trusted: train custom losses without checking the service's gradients first.
    """

    def __init__(
        self, connection: Connection, base_model: str | None, *, trusted: bool = False
    ) -> None:
        self.connection, self.base_model, self.trusted = connection, base_model, trusted
        self._worker = Worker(f"cookbook-{connection.url}")
        self._model_data: ModelData | None = None
        self._tokenizer: Any = None

    def model_data(self) -> ModelData:
        """The base model's name at the service, and its sizes where they are known."""
        if self._model_data is None:
            self._model_data = describe_model(self.base_model, self.connection.models())
        return self._model_data

    def adopt_model_of(self, info: Any) -> ModelData:
        """Return the model data; take the model's name from get_info if none was given."""
        if self.base_model is None and info.model_data.model_name:
            self.base_model, self._model_data = info.model_data.model_name, None
        return self.model_data()

    def tokenizer(self) -> Any:
        """The base model's tokenizer, from a local folder or by its name on the Hub."""
        if self._tokenizer is None:
            from cookbook_core.backend.local.model.loading import load_tokenizer

            model = self.model_data()
            self._tokenizer = load_tokenizer(model.tokenizer_id or model.model_name or "")
        return self._tokenizer

    def submit(self, label: str, send: Callable[[], Future[Any]]) -> Future[Any]:
        """Run `send` in its place in the queue; the result is that of the future it returns."""
        out: Future[Any] = Future()

        def job() -> None:
            if not out.set_running_or_notify_cancel():
                return
            try:
                send().add_done_callback(finish)
            except BaseException as error:  # raised by out.result()
                settle(out, error=self.connection.translate_error(label, error))

        def finish(sent: Future[Any]) -> None:
            error = sent.exception()
            settle(out, None if error else sent.result(), error)

        self._worker.submit(label, job)
        return self.connection.watch(label, out)

    def submit_client(
        self, label: str, create: Callable[[], Any], wrap: Callable[[Any], Any]
    ) -> Future[Any]:
        """`wrap(client)` of the SDK client that `create` returns, both run in the queue's thread.

        `create` returns the client itself (SDK 0.25) or a future of it (later SDKs).
        """

        def send() -> Future[Any]:
            client = create()
            wrapped: Future[Any] = Future()
            wrapped.set_result(wrap(client.result() if hasattr(client, "result") else client))
            return wrapped

        return self.submit(label, send)

    def require_correct_gradients(
        self, label: str, create_training: Callable[[Session], Future[TrainingBackend]]
    ) -> None:
        """Refuse to train a custom loss on a service that computes wrong gradients.

        Checked on an adapter of its own, before the first custom loss of each base model; the
        result is remembered. A check that failed for another reason, such as a timeout, is
        repeated by the next custom loss.

        Args:
            label: the request that needs the gradients, for the error.
            create_training: returns a new adapter of the session it is given.
        Raises:
            RequestError: the gradients are wrong, or could not be checked.
        """
        if self.trusted:
            return
        verdicts, where = self.connection.verdicts, f"{label} at {self.connection.url}"
        if self.base_model not in verdicts:
            try:  # in a thread of its own: this one serves a request, and must not wait for others
                with ThreadPoolExecutor(1) as pool:
                    checking = pool.submit(self._gradient_problems, create_training)
                    verdicts[self.base_model] = checking.result()
            except Exception as error:
                raise RequestError(
                    where,
                    "the service's gradients could not be checked",
                    got=error_line(error),
                    fix="Submit the loss again; trust_service=True trains without the check.",
                ) from error
        if problems := verdicts[self.base_model]:
            raise RequestError(
                where,
                "\n- ".join(["the service computes wrong gradients of custom losses:", *problems]),
                fix="Run `cookbook check --base_url URL` for the whole table; trust_service=True "
                "trains anyway.",
            )

    def _gradient_problems(
        self, create_training: Callable[[Session], Future[TrainingBackend]]
    ) -> list[str]:
        scratch = Session(self.connection, self.base_model, trusted=True)
        try:
            return core_problems(lambda: create_training(scratch).result())
        finally:
            scratch.close()

    def close(self) -> None:
        """Send what is queued, then end the thread."""
        self._worker.close()


def describe_model(base_model: str | None, offered: Sequence[Any]) -> ModelData:
    """A base model's name at the service, its sizes, and where its tokenizer is.

    A local folder stands for the service's model of the same name ("Qwen3-8B" or "Qwen/Qwen3-8B"),
    and has the tokenizer and sizes; otherwise these come from the Hub's cache on this machine.

    Args:
        base_model: a name or local folder; None where no name is known yet.
        offered: the models that the service lists.

    Raises:
        ConfigError: a local folder whose name the service does not offer.
    """
    if base_model is None:
        return ModelData()
    names = [m.model_name for m in offered if m.model_name]
    bundled = bundled_model(base_model) if base_model in BUNDLED else base_model
    folder = Path(bundled).expanduser().absolute()
    name, source = base_model, str(folder)
    if not folder.is_dir():
        source = "/".join(base_model.split(":")[0].split("/")[:2])  # "org/name[/variant][:length]"
    elif base_model not in names:
        same = [n for n in names if n == source or n.rstrip("/").split("/")[-1] == folder.name]
        if not same:
            raise unknown_model(base_model, names)
        name = same[0]
    listed = next((m for m in offered if m.model_name == name), None)
    vocab_size, context = _sizes(source)
    context = getattr(listed, "max_context_length", None) or context
    return ModelData(None, name, source, context, vocab_size)


def _sizes(source: str) -> tuple[int | None, int | None]:
    """Vocabulary and context of a model whose config.json is on this machine; else None."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True).get_text_config()
    except (OSError, ValueError, KeyError):
        return None, None
    return getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
