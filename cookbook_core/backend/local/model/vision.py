"""The vision tower: each image goes through it once, and its features into the model's batches.

The tower is frozen, so its features are a function of the image: they are kept, up to a bound in
bytes, and passed to the model as `mm_encoder_outputs`, with which transformers' models take an
encoder's outputs in place of pixels. Images go through the tower one by one, so that features that
were dropped come back equal to the bit.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from cookbook_core.errors import ModelError
from cookbook_core.images import ImageReader
from cookbook_core.types import ImageChunk, ModelInput

import torch

NEEDS = "5.18"
"""The first version of transformers whose models take mm_encoder_outputs."""


@dataclass(frozen=True)
class Features:
    """What the tower computes of one image.

    ids: token ids of its positions.
    rows: `(M, width)`, one for each position that has the image token's id.
    deep: more such rows, for early layers of the language model to add (Qwen3-VL's deepstack).
    grid: image_grid_thw `(1, 3)` of models that place tokens in time, height and width.
    dims: of the tensor that the tower gives; 0: it gives a list of them.
    """

    ids: tuple[int, ...]
    rows: torch.Tensor
    deep: tuple[torch.Tensor, ...]
    grid: torch.Tensor | None
    dims: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors on the device."""
        return sum(x.nbytes for x in (self.rows, *self.deep))


class VisionTower:
    """The images of one model.

    Args:
        model: the causal LM, with a vision tower.
        reader: reads the bytes of images.
        device: where the model is.
        bound: most bytes of features kept; those of one micro-batch may take more.
    Attributes:
        runs: images that went through the tower so far.
        image_token: the id at the positions that features are put in.
        in_space: whether tokens have positions in time, height and width (M-RoPE).
    """

    def __init__(self, model: Any, reader: ImageReader, device: torch.device, bound: int) -> None:
        self._model = getattr(model, model.base_model_prefix)
        self.reader, self._device, self.bound = reader, device, bound
        self.image_token: int = model.config.image_token_id
        self.runs = 0
        self._kept: OrderedDict[int, Features] = OrderedDict()
        self._holds = False
        self._two_way = "token_type_ids" in inspect.signature(self._model.forward).parameters
        self.in_space = in_space(model)

    def features(self, chunk: ImageChunk) -> Features:
        """The features of an image, computed unless they are kept."""
        if chunk.key not in self._kept:
            self._kept[chunk.key] = self._run(chunk)
            if not self._holds:
                self._drop()
        self._kept.move_to_end(chunk.key)
        return self._kept[chunk.key]

    def _drop(self) -> None:
        """Drop features, those used longest ago first, down to the bound or to the last."""
        total = self.nbytes
        while total > self.bound and len(self._kept) > 1:
            total -= self._kept.popitem(last=False)[1].nbytes

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Inside, nothing is dropped: a micro-batch reads the features of each image repeatedly."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False
            self._drop()

    @property
    def nbytes(self) -> int:
        """Bytes of the features that are kept."""
        return sum(features.nbytes for features in self._kept.values())

    def _run(self, chunk: ImageChunk) -> Features:
        pixels = self.reader.pixels(chunk)
        inputs = {name: x.to(self._device) for name, x in pixels.inputs.items()}
        with torch.no_grad():
            output = self._model.get_image_features(**inputs, return_dict=True)
        self.runs += 1
        pooled = output.pooler_output
        rows = _as_rows(pooled)
        wanted = pixels.ids.count(self.image_token)
        if len(rows) != wanted:
            raise ModelError(
                "base_model",
                "its vision tower and its processor disagree about an image",
                expected=f"{wanted} rows of features",
                got=len(rows),
                fix="Check that the processor's files belong to this model.",
            )
        deep = tuple(_as_rows(x) for x in getattr(output, "deepstack_features", None) or ())
        grid = pixels.inputs.get("image_grid_thw")
        return Features(pixels.ids, rows, deep, grid, getattr(pooled, "ndim", 0))

    def ids(self, value: ModelInput) -> list[int]:
        """The token ids that the model is given, `(N,)`."""
        ids: list[int] = []
        for chunk in value.chunks:
            ids += self.features(chunk).ids if isinstance(chunk, ImageChunk) else chunk.tokens
        return ids

    def places(self, value: ModelInput) -> torch.Tensor:
        """Each token's position in time, height and width, `(3, N)`, for models `in_space`."""
        ids = torch.tensor([self.ids(value)])
        grids = [grid for x in value.images if (grid := self.features(x).grid) is not None]
        found, _ = self._model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == self.image_token).int(),
            image_grid_thw=torch.cat(grids) if grids else None,
        )
        return found[:, 0]

    def packed(
        self, inputs: Sequence[ModelInput], rows: Sequence[torch.Tensor], positions: torch.Tensor
    ) -> dict[str, Any]:
        """The model's arguments for inputs in one row, in which they may share prefixes.

        Args:
            inputs: what the row holds.
            rows: of each input `(N,)`: the index of its positions in the row.
            positions: `(T,)`, each token's position in its input.
        """
        with self._holding():
            return self._packed(inputs, rows, positions)

    def _packed(
        self, inputs: Sequence[ModelInput], rows: Sequence[torch.Tensor], positions: torch.Tensor
    ) -> dict[str, Any]:
        ids = torch.empty_like(positions)
        first_at: dict[int, ImageChunk] = {}
        for value, own in zip(inputs, rows, strict=True):
            ids[own] = torch.tensor(self.ids(value))
            at = 0
            for chunk in value.chunks:
                if isinstance(chunk, ImageChunk):
                    first_at[int(own[at])] = chunk
                at += chunk.length
        position_ids = positions[None]
        if self.in_space:
            position_ids = positions.expand(3, 1, -1).clone()
            for value, own in zip(inputs, rows, strict=True):
                position_ids[:, 0, own] = self.places(value)
        return {
            "input_ids": ids[None].to(self._device),
            "position_ids": position_ids.to(self._device),
            **self._outputs(first_at[at] for at in sorted(first_at)),
        }

    def padded(self, inputs: Sequence[ModelInput]) -> dict[str, Any]:
        """The model's arguments for inputs in rows of a batch, padded on the right."""
        with self._holding():
            return self._padded(inputs)

    def _padded(self, inputs: Sequence[ModelInput]) -> dict[str, Any]:
        lists = [self.ids(value) for value in inputs]
        width = max(map(len, lists))
        # never an image's id, and a row's own where there is one: see `micro_batches.padded`
        pads = [next((i for i in reversed(x) if i != self.image_token), 0) for x in lists]
        ids = torch.tensor(
            [[*x, *[pad] * (width - len(x))] for x, pad in zip(lists, pads, strict=True)]
        )
        more = self._outputs(chunk for value in inputs for chunk in value.images)
        if self.in_space:
            own = [self.places(value) for value in inputs]
            wide = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in own]
            more["position_ids"] = torch.stack(wide, dim=1).to(self._device)
        if self._two_way:
            more["token_type_ids"] = (ids == self.image_token).long().to(self._device)
        return {"input_ids": ids.to(self._device), **more}

    def _outputs(self, chunks: Iterable[ImageChunk]) -> dict[str, Any]:
        """What the tower would give for these images in one call."""
        found = [self.features(chunk) for chunk in chunks]
        if not found:
            return {}
        rows = torch.cat([x.rows for x in found])
        deep = [[torch.cat(layer)] for layer in zip(*(x.deep for x in found), strict=True)]
        dims = found[0].dims
        pooled: Any = rows[None] if dims == 3 else rows if dims else [rows]
        output = SimpleNamespace(pooler_output=pooled, deepstack_features=deep)
        return {"mm_encoder_outputs": {"image": output}}


def _as_rows(output: Any) -> torch.Tensor:
    """A tensor `(..., width)`, or a sequence of them -> `(M, width)`."""
    if isinstance(output, torch.Tensor):
        return output.flatten(0, -2)
    return torch.cat([_as_rows(each) for each in output])


def language_model(model: Any) -> Any:
    """The part of a model that reads text: all of it, where it has no encoder of anything else."""
    composite = model.config.get_text_config() is not model.config
    return model.get_decoder() if composite else model


def in_space(model: Any) -> bool:
    """Whether a model's tokens have positions in time, height and width (M-RoPE)."""
    return hasattr(getattr(model, model.base_model_prefix), "get_rope_index")


def missing_support(model: Any) -> str:
    """Why a model cannot be given images, whatever its processor does; "" if it can."""
    import transformers

    inner = getattr(model, model.base_model_prefix, None)
    if getattr(model.config, "vision_config", None) is None or inner is None:
        return "it reads text only"
    if not hasattr(model.config, "image_token_id"):
        return "its config names no token that stands for images"
    if "mm_encoder_outputs" in inspect.signature(inner.forward).parameters:
        return ""
    version = transformers.__version__
    if tuple(map(int, version.split(".")[:2])) < tuple(map(int, NEEDS.split("."))):
        return f"images need transformers {NEEDS} or newer, and {version} is installed"
    return f"transformers' {type(model).__name__} takes no features in place of pixels"
