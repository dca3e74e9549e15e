"""Check images: that the model reads them as its own forward does, and that a batch's fit it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from cookbook_core.backend.local.model.memory import is_out_of_memory
from cookbook_core.backend.local.model.vision import VisionTower, in_space, language_model
from cookbook_core.backend.local.scoring.micro_batches import MicroBatch
from cookbook_core.backend.local.scoring.packing_check import BOUNDS, STRICT, rms_ratio
from cookbook_core.errors import DatumError, ModelError
from cookbook_core.images import ImageReader, cut_at
from cookbook_core.types import Datum, EncodedTextChunk, ImageChunk, ModelInput

import torch

SIZES = ((64, 64), (96, 64))
"""Width and height of the images that are tried, in pixels."""


def probe_images(tower: VisionTower) -> list[ImageChunk]:
    """Two images of different sizes, each brighter towards a corner of its own."""
    from PIL import Image

    chunks = []
    for turned, size in enumerate(SIZES):
        ramp = Image.linear_gradient("L").rotate(90 * turned)
        flat = Image.new("L", ramp.size, 80)
        file = io.BytesIO()
        Image.merge("RGB", (ramp, ramp.rotate(90), flat)).resize(size).save(file, "PNG")
        chunks.append(tower.reader.chunk(file.getvalue()))
    return chunks


def probe_inputs(tower: VisionTower, sequences: list[list[int]]) -> list[ModelInput]:
    """`packing_check.probe_sequences` with an image in each, after its first token.

    The same one in the two sequences that share a prefix, another in the third.
    """
    one, other = probe_images(tower)
    inputs = []
    for ids, chunk in zip(sequences, (one, one, other), strict=True):
        text = [i if i != tower.image_token else ids[0] for i in ids]
        parts = [EncodedTextChunk(text[:1]), chunk, EncodedTextChunk(text[1:])]
        inputs.append(ModelInput(parts))
    return inputs


def reading_problem(scorer: Any, tower: VisionTower) -> str:
    """What differs from the model's own forward on its own processor's output; "" if nothing does.

    Compares hidden states of a text with two images.
    """
    chunks = probe_images(tower)
    try:
        with torch.no_grad():
            own = tower.reader.own_inputs("1", chunks)
            written = [(chunk, tower.reader.pixels(chunk).ids) for chunk in chunks]
            value = cut_at(own["input_ids"][0].tolist(), written)
            if isinstance(value, int):
                return "an image has other tokens in a text than by itself"
            inputs = {name: x.to(scorer.device) for name, x in own.items()}
            with scorer.attention(packed=False):
                want = scorer.backbone(**inputs, use_cache=False).last_hidden_state[0]
                found = scorer.backbone(**tower.padded([value]), use_cache=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
    bound = BOUNDS.get(want.dtype, STRICT)[0]
    ratio = rms_ratio(found.last_hidden_state[0].cpu(), want.cpu())
    return "" if ratio <= bound else f"hidden states differ by {ratio:.1e} of their size"


def image_batch(batch: MicroBatch, tower: VisionTower) -> dict[str, Any]:
    """The model's arguments for a micro-batch with images."""
    inputs = [datum.model_input for datum in batch.data]
    if batch.layout is None:
        return tower.padded(inputs)
    return {**tower.packed(inputs, batch.rows, batch.layout.positions), "layout": batch.layout}


def check_images(
    scorer: Any, data: Sequence[Datum], lora: Mapping[str, torch.Tensor], name: str = "data"
) -> None:
    """Check the images of a batch before anything is computed; those not read before are read.

    Args:
        scorer: the model's `Scorer`.
        data: D checked datums.
        lora: the parameters of the adapter that the batch is for, by name.
        name: of the batch in errors.

    Raises:
        DatumError: an image that this model does not read or that is broken, another number of
            positions than expected, two images in a row that the model takes for one, or the id
            that stands for images among the text.
    """
    if not has_images(data):
        return
    where = next(
        f"{name}[{i}].model_input.chunks[{j}]"
        for i, datum in enumerate(data)
        for j, chunk in enumerate(datum.model_input.chunks)
        if isinstance(chunk, ImageChunk)
    )
    try:
        tower = scorer.tower()
    except ModelError as error:
        raise no_images(where, error.got) from error
    _check_adapter(scorer.model, lora, where)
    for i, datum in enumerate(data):
        check_chunks(f"{name}[{i}].model_input", datum.model_input, scorer.model, tower.reader)


def check_chunks(where: str, value: ModelInput, model: Any, reader: ImageReader) -> None:
    """Check an input for a model that reads images; those not read before are read.

    Raises:
        DatumError: as `check_images`.
    """
    apart = in_space(model)
    for j, chunk in enumerate(value.chunks):
        spot = f"{where}.chunks[{j}]"
        if not isinstance(chunk, ImageChunk):
            if model.config.image_token_id in chunk.tokens:
                raise DatumError(
                    spot,
                    "the token that stands for images, in text",
                    expected="an ImageChunk for each image",
                    got=f"token {model.config.image_token_id}",
                    fix="Put the chunk in place of the placeholders.",
                )
        elif apart and j and isinstance(value.chunks[j - 1], ImageChunk):
            raise DatumError(
                spot,
                "an image directly after another, which this model cannot tell apart",
                expected="text between them",
                fix="Put the model's tokens for the end and the start of an image there.",
            )
        else:
            reader.check(chunk, spot)


def no_images(where: str, reason: str) -> DatumError:
    """The error for an image given to a model that reads none."""
    return DatumError(
        where,
        "an image, and this model is given none",
        expected="text only",
        got=reason,
        fix="Take a model that reads images, or leave them out.",
    )


def _check_adapter(model: Any, lora: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse an adapter that changes the vision tower: features are computed without one."""
    language = {id(p) for p in language_model(model).parameters()}
    language |= {id(p) for p in model.get_output_embeddings().parameters()}
    outside = [name for name, p in lora.items() if id(p) not in language]
    if outside:
        raise DatumError(
            where,
            "the adapter has layers outside the language model, which images do not pass here",
            got=outside[0],
            fix="Train an adapter of the language model alone.",
        )


def has_images(data: Sequence[Datum]) -> bool:
    """Whether any datum has an image."""
    return any(isinstance(c, ImageChunk) for datum in data for c in datum.model_input.chunks)
