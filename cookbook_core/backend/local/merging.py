"""Merge a LoRA adapter into its base model: the result is one model that needs no peft."""

from __future__ import annotations

import warnings
from typing import Any

from cookbook_core.backend.local.checkpoints import Checkpoint, check_base
from cookbook_core.backend.local.model.loading import load_base_model
from cookbook_core.backend.local.model.quantization import NF4, dequantize
from cookbook_core.errors import CheckpointError, ModelError

import torch

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def merge(checkpoint: Checkpoint, base_model: str, dtype: str | None) -> tuple[Any, bool]:
    """Load the base model and let peft merge the adapter into it, in float32.

    If the adapter is on an embedding tied to the unembedding, or the reverse, each gets a matrix of
    its own first: peft would add to the shared one, and so change both. A quantized base model, or
    an adapter that was trained over one in NF4, is merged into the dequantized weights: those are
    the function that was trained.

    Args:
        checkpoint: as returned by `checkpoints.read`.
        base_model: a folder or hub name.
        dtype: of the result; None takes the dtype in the base model's config, else float32.
    Returns:
        The model, on the CPU; and whether its embeddings were untied.
    Raises:
        ModelError: the base model cannot be loaded, or overflows `dtype`.
        CheckpointError: the adapter was trained on another base model, or does not fit this one.
    """
    import peft
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_model)
    own = config.dtype or torch.float32
    working = "float64" if own == torch.float64 else "float32"
    if checkpoint.base.get("quantized") == NF4:
        working = NF4
    base = load_base_model(base_model, "cpu", working)
    check_base(checkpoint, base)
    model = base.model
    if base.quantized:
        dequantize(model)
    what, fix = "does not fit the base model", "Pass the model it was trained on as --base_model."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings, which are untied below
            wrapped = peft.PeftModel(model, checkpoint.config)
            peft.set_peft_model_state_dict(wrapped, checkpoint.tensors)
            expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            if odd := sorted(expected.keys() ^ checkpoint.tensors.keys()):
                raise ValueError(f"{len(odd)} tensors differ, such as {odd[0]}")
            what, fix = "peft cannot merge this adapter", "Export it with --to peft."
            untied = _untie(model)
            model = wrapped.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            str(checkpoint.path),
            what,
            expected=f"an adapter for {base_model}",
            got=error,
            fix=fix,
        ) from error
    model.to(_DTYPES[dtype] if dtype else own)
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            fix, got = "Pass --dtype bfloat16 or float32.", f"infinity in {name}"
            raise ModelError("--dtype", "the weights overflow it", got=got, fix=fix)
    return model, untied


def _untie(model: Any) -> bool:
    """Give embedding and unembedding a matrix each if they share one and either has LoRA.

    Returns:
        Whether they did.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    plain = [getattr(end, "base_layer", end) for end in ends]
    if None in ends or plain[0].weight is not plain[1].weight or plain == list(ends):
        return False
    own = plain[1].weight.detach().clone()
    plain[1].weight = torch.nn.Parameter(own, requires_grad=False)
    model.config.tie_word_embeddings = False
    return True
