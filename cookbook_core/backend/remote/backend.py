"""backend/interface.py over the `tinker` SDK.

A loss of one's own goes in two passes: forward there, the loss and its gradient here, then the
linear surrogate's forward and backward there. Requests leave in the order they were made, from one
thread; answers are awaited only where something depends on them, so they overlap as far as the
service allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cookbook_core.backend.interface import SamplingBackend, TrainingBackend
from cookbook_core.backend.remote import convert
from cookbook_core.backend.remote.connection import Connection, settle, unknown_model
from cookbook_core.backend.remote.sampler import RemoteSampler
from cookbook_core.backend.remote.training import CUSTOM, RemoteTraining
from cookbook_core.backend.worker import Worker
from cookbook_core.errors import RequestError
from cookbook_core.types import LoraConfig, ModelData


class RemoteBackend:
    """One base model of a service, and the queue of the requests to it.

    Args:
        connection: the service.
        base_model: its name there, or a local folder of that name; None for what a checkpoint
            names.
        trusted: whether its arithmetic is taken for right, not looked at.
    """

    def __init__(
        self, connection: Connection, base_model: str | None, *, trusted: bool = False
    ) -> None:
        self.connection, self.base_model, self.trusted = connection, base_model, trusted
        self.worker = Worker(f"cookbook-{connection.url}")
        self._known: ModelData | None = None
        self._tokenizer: Any = None

    def create_training(
        self, lora: LoraConfig, user_metadata: dict[str, str] | None = None
    ) -> Future[TrainingBackend]:
        def create() -> Future[TrainingBackend]:
            made = self.connection.client().create_lora_training_client(
                self.model().model_name,
                rank=lora.rank,
                seed=lora.seed,
                train_mlp=lora.train_mlp,
                train_attn=lora.train_attn,
                train_unembed=lora.train_unembed,
                user_metadata=user_metadata,
            )
            return self.made(label, made, lambda client: RemoteTraining(self, client, lora.rank))

        label = "create_lora_training_client"
        return self.submit(label, create)

    def restore_training(self, path: str, *, with_optimizer: bool) -> Future[TrainingBackend]:
        label = "create_training_client_from_state" + "_with_optimizer" * with_optimizer
        convert.check_path(path)

        def create() -> Future[TrainingBackend]:
            client = self.connection.client()
            made = getattr(client, label)(path)
            return self.made(label, made, lambda client: RemoteTraining(self, client, None))

        return self.submit(label, create)

    def create_sampler(self, path: str | None) -> Future[SamplingBackend]:
        label = "create_sampling_client"
        if path is not None:
            convert.check_path(path)

        def create() -> Future[SamplingBackend]:
            named = {"base_model": self.model().model_name} if path is None else {}
            made = self.connection.client().create_sampling_client(model_path=path, **named)
            return self.made(label, made, lambda client: RemoteSampler(self, client))

        return self.submit(label, create)

    def close(self) -> None:
        self.worker.close()

    def model(self) -> ModelData:
        """What is known of the base model: its name there; its sizes, where they can be had."""
        if self._known is None:
            self._known = describe_model(self.base_model, self.connection.models())
        return self._known

    def tokenizer(self) -> Any:
        """The base model's tokenizer, from a local folder or by its name on the hub."""
        if self._tokenizer is None:
            from cookbook_core.backend.local.model.loading import load_tokenizer

            data = self.model()
            self._tokenizer = load_tokenizer(data.tokenizer_id or data.model_name or "")
        return self._tokenizer

    def learn(self, info: Any) -> ModelData:
        """Take over what a client was told, where the base model had no name yet."""
        if self.base_model is None and info.model_data.model_name:
            self.base_model, self._known = info.model_data.model_name, None
        return self.model()

    def require_core(self) -> None:
        """Refuse to train a custom loss on a service whose arithmetic is wrong; asked once.

        Raises:
            RequestError: it is wrong, or could not be looked at.
        """
        if self.trusted:
            return
        verdicts, name = self.connection.verdicts, self.base_model
        where = f"{CUSTOM} at {self.connection.url}"
        mend = "`cookbook check` shows more; trust_service=True trains all the same."
        if name not in verdicts:
            try:  # in a thread of its own: this one is inside a request
                with ThreadPoolExecutor(1) as pool:
                    verdicts[name] = pool.submit(self._scratch_problems).result()
            except Exception as error:
                what = "the service's arithmetic could not be checked"
                raise RequestError(
                    where, what, expected="an answer", got=error, fix=mend
                ) from error
        if verdicts[name]:
            found = "\n- ".join(["", *verdicts[name]])
            raise RequestError(where, f"the service would train it wrongly.{found}\n", fix=mend)

    def _scratch_problems(self) -> list[str]:
        scratch = RemoteBackend(self.connection, self.base_model, trusted=True)
        lora = LoraConfig(rank=8, seed=0, train_unembed=False)
        try:
            return list(_core_problems(lambda: scratch.create_training(lora).result()))
        finally:
            scratch.close()

    def submit(self, label: str, send: Callable[[], Future[Any]]) -> Future[Any]:
        """Run `send` in its place in the queue; the result is that of the future it gives."""
        out: Future[Any] = Future()

        def job() -> None:
            if not out.set_running_or_notify_cancel():
                return
            try:
                send().add_done_callback(finish)
            except BaseException as error:  # handed to whoever waits for the result
                settle(out, error=self.connection.in_our_words(label, error))

        def finish(found: Future[Any]) -> None:
            error = found.exception()
            settle(out, None if error else found.result(), error)

        self.worker.submit(label, job)
        return self.connection.watch(label, out)

    def made(self, label: str, made: Any, wrap: Callable[[Any], Any]) -> Future[Any]:
        """A client the SDK made: itself (0.25), or a future of it (later). Wrapped in this thread,
        as wrapping may ask the service for more."""
        client = made.result() if hasattr(made, "result") else made
        done: Future[Any] = Future()
        done.set_result(wrap(client))
        return done


def describe_model(base_model: str | None, offered: Sequence[Any]) -> ModelData:
    """What is known of a base model: the service's name for it, sizes, and where its tokenizer is.

    A local folder stands for the model of the same name there ("Qwen3-8B" or "Qwen/Qwen3-8B"), and
    gives tokenizer and sizes; otherwise these come from the hub's files on this machine, if any.

    Raises:
        ConfigError: a local folder whose name the service does not offer.
    """
    if base_model is None:
        return ModelData()
    from cookbook_core.backend.local.model.loading import TINY_MODEL, resolve_model

    names = [m.model_name for m in offered if m.model_name]
    tiny = base_model == TINY_MODEL
    folder = Path(resolve_model(TINY_MODEL) if tiny else base_model).expanduser().absolute()
    name, source = base_model, str(folder)
    if not folder.is_dir():
        source = "/".join(base_model.split(":")[0].split("/")[:2])  # "org/name[/variant][:length]"
    elif base_model not in names:
        same = [n for n in names if n == source or n.rstrip("/").split("/")[-1] == folder.name]
        if not same:
            raise unknown_model(base_model, names)
        name = same[0]
    said = next((m for m in offered if m.model_name == name), None)
    vocab_size, context = _sizes(source)
    context = getattr(said, "max_context_length", None) or context
    return ModelData(None, name, source, context, vocab_size)


def _sizes(source: str) -> tuple[int | None, int | None]:
    """Vocabulary and context of a model whose config.json is on this machine; else None."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True).get_text_config()
    except (OSError, ValueError, KeyError):
        return None, None
    return getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)


def _core_problems(make_training: Callable[[], TrainingBackend]) -> list[str]:
    from cookbook_core.backend.gradient_probe import core_problems

    return core_problems(make_training)
