"""A LoRA adapter merged into its base model: one model of one's own, without peft."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from cookbook_core.backend.local.checkpoints import Checkpoint, check_base
from cookbook_core.backend.local.model.loading import load_base_model
from cookbook_core.errors import CheckpointError, ModelError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def merge(checkpoint: Checkpoint, base_model: str, dtype: str | None) -> tuple[Any, bool]:
    """Load the base model afresh and let peft merge the adapter into it, in float32.

    Where the adapter is on an embedding that is tied to the unembedding, or the other way round,
    the two get a matrix each first: peft adds to the one they share, so both would change.

    Args:
        checkpoint: as `checkpoints.read` gives it.
        base_model: a folder or hub name.
        dtype: of the result; None is that of the base model's config, float32 without one.
    Returns:
        The model, on the CPU; and whether the embeddings had to be untied.
    Raises:
        ModelError: the base cannot be loaded, is quantized, or does not fit into dtype.
        CheckpointError: the adapter was trained on another base, or does not fit this one.
    """
    import peft
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_model)
    if getattr(config, "quantization_config", None):
        what = "is quantized, and nothing exact can be merged into it"
        raise ModelError(base_model, what, expected="the model it was quantized from", got="this")
    own = config.dtype or torch.float32
    working = "float64" if own == torch.float64 else "float32"
    base = load_base_model(base_model, "cpu", working)
    check_base(checkpoint, base)
    model = base.model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of is dealt with here
            wrapped = peft.PeftModel.from_pretrained(model, str(checkpoint.path))
            found = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            odd = sorted(found.keys() ^ checkpoint.tensors.keys())
            if odd:
                raise ValueError(f"{len(odd)} tensors differ, such as {odd[0]}")
            untied = _untie(model)
            model = wrapped.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            str(checkpoint.path), "does not fit the base model", expected=base_model, got=error
        ) from error
    model.to(_DTYPES[dtype] if dtype else own)
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            mend = "Give --dtype bfloat16 or float32."
            got = f"infinity in {name}"
            raise ModelError("--dtype", "too narrow a range", expected="finite", got=got, fix=mend)
    return model, untied


def _untie(model: Any) -> bool:
    """Give embedding and unembedding a matrix each if they share one and LoRA is on either."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    plain = [getattr(end, "base_layer", end) for end in ends]
    if None in ends or plain[0].weight is not plain[1].weight or plain == list(ends):
        return False
    own = plain[1].weight.detach().clone()
    plain[1].weight = torch.nn.Parameter(own, requires_grad=False)
    model.config.tie_word_embeddings = False
    return True
