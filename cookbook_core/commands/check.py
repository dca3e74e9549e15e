"""`cookbook check`: whether a service, or this machine, computes what a training run relies on."""

from __future__ import annotations

import tempfile

from cookbook_core import conformance, tinker
from cookbook_core.errors import ConfigError, ModelError


def check(
    base_url: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    core: bool = False,
) -> bool:
    """Run the checks of `conformance` and print one line for each as it ends.

    Args:
        base_url: URL of a Tinker-compatible service; None checks this machine.
        model: base model; None takes the first that the service offers.
        api_key: key of the service.
        core: run only the checks of the gradient's arithmetic.
    Returns:
        Whether every check passed or is of something that the service does not offer.
    Raises:
        ConfigError: no model to check, or one that cannot be loaded.
    """
    checks = conformance.CORE if core else conformance.CHECKS
    with tempfile.TemporaryDirectory() as folder:
        service = tinker.ServiceClient(base_url=base_url, api_key=api_key, checkpoint_dir=folder)
        offered = [m.model_name for m in service.get_server_capabilities().supported_models]
        name = model or next(filter(None, offered), None)
        if name is None:
            what = "missing: the service lists no models"
            raise ConfigError("--model", what, fix="Give --model NAME.")

        def make_client() -> tinker.TrainingClient:
            future = service.create_lora_training_client(name, rank=8, seed=0, train_unembed=False)
            return future.result()

        try:  # without a first client there is nothing to check
            first, rows = [make_client()], []
        except ModelError as error:
            raise ConfigError(**error.slots()) from error
        if not core and _reads_images(first[0]):
            checks = (*checks[:-1], *conformance.IMAGES, checks[-1])
        print(f"{base_url or 'this machine'}, {name}")
        width = max(len(check.name) for check in checks)
        for row in conformance.check_service(
            lambda: first.pop() if first else make_client(), checks, below=base_url is not None
        ):
            rows.append(row)
            print(conformance.row_text(row, width), flush=True)
        print(conformance.summary(rows))
        service.close()
    return all(row.outcome.result in ("pass", "not offered") for row in rows)


def _reads_images(client: tinker.TrainingClient) -> bool:
    """Whether the model's image processor is here, or on the Hub under the model's name."""
    try:
        client.get_tokenizer().images.reader()
    except Exception:  # whatever keeps it from being loaded: these checks are optional
        return False
    return True
