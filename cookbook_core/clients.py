"""What every recipe does with clients: start one, freeze a copy of it, score datums under it.

Only names of the `tinker` SDK are used, so a client of a hosted service will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cookbook_core.custom_loss import logprobs_from_output
from cookbook_core.datums import with_inputs
from cookbook_core.tinker import Datum, ServiceClient, TrainingClient

if TYPE_CHECKING:
    import torch


def start_client(service: ServiceClient, config: Any) -> TrainingClient:
    """The client a run trains: a fresh LoRA adapter, or the one in config.init_from.

    Args:
        service: where to make it.
        config: a recipe's, with fields model, init_from, lora_rank and seed. The unembedding is
            left alone.
    """
    if config.init_from:
        created = service.create_training_client_from_state(config.init_from, config.model)
    else:
        created = service.create_lora_training_client(
            config.model, config.lora_rank, config.seed, train_unembed=False
        )
    return created.result()


def frozen_copy(
    service: ServiceClient, client: TrainingClient, model: str, name: str = "reference"
) -> TrainingClient:
    """A second client with the first one's weights as they are now, saved under `name`.

    Nobody trains it, so it stays what it is: the reference of DPO and of KL terms. Scoring goes
    through the same path, so at the start both give the same bits.
    """
    saved = client.save_state(name).result()
    return service.create_training_client_from_state(saved.path, model).result()


def score(client: TrainingClient, data: Sequence[Datum]) -> list[torch.Tensor]:
    """Logprobs of the datums' target_tokens under a client's present weights, no gradient.

    Returns:
        D tensors, nats, each of the shape of its target_tokens.
    """
    return logprobs_from_output(client.forward(list(data), "cross_entropy").result(), data)


def add_ref_logprobs(reference: TrainingClient, data: Sequence[Datum]) -> list[Datum]:
    """The same datums, each carrying the reference's logprobs of its own tokens."""
    ref_logprobs = score(reference, data)
    return [with_inputs(d, ref_logprobs=lp) for d, lp in zip(data, ref_logprobs, strict=True)]
