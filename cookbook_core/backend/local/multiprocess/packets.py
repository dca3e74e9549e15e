"""Datums and sampling requests as packets, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from cookbook_core.backend.local.multiprocess.group import Packet
from cookbook_core.backend.sampling_requests import SampleRequest
from cookbook_core.datums import SCORE_MASK, TEMPERATURE
from cookbook_core.types import (
    Datum,
    EncodedTextChunk,
    ImageChunk,
    ModelInput,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TopkLogprobs,
)

import numpy as np
import torch

_KEYS = ("target_tokens", SCORE_MASK, TEMPERATURE)
"""Inputs of a datum that scoring reads; the others are for the loss and stay on rank 0."""


def datum_packet(data: Sequence[Datum], share: Sequence[int], **header: Any) -> Packet:
    """The datums of a share, reduced to what scoring reads."""
    own = [data[i] for i in share]
    keys = [[key for key in _KEYS if key in datum.loss_fn_inputs] for datum in own]
    inputs, tensors = _inputs_out([datum.model_input for datum in own])
    for datum, names in zip(own, keys, strict=True):
        tensors += [datum.loss_fn_inputs[name].to_torch() for name in names]
    more = {"keys": keys, "inputs": inputs, "datum_indices": list(share)}
    return Packet({**header, **more}, tensors)


def datums_in(packet: Packet) -> list[Datum]:
    """The datums of a packet."""
    tensors = iter(packet.tensors)
    inputs = _inputs_in(packet.header["inputs"], tensors)
    return [
        Datum(value, {key: next(tensors) for key in keys})
        for value, keys in zip(inputs, packet.header["keys"], strict=True)
    ]


def sample_packet(requests: Sequence[SampleRequest]) -> Packet:
    """Requests; the other process tells nobody the tokens as they are drawn."""
    plain = [dataclasses.replace(r, on_token=None, model_input=None) for r in requests]
    pictured = [i for i, request in enumerate(requests) if request.model_input is not None]
    inputs, tensors = _inputs_out([requests[i].model_input for i in pictured])
    header = {"requests": list(map(dataclasses.asdict, plain)), "pictured": pictured}
    return Packet({**header, "inputs": inputs}, tensors)


def sample_requests(packet: Packet) -> list[SampleRequest]:
    """The requests of a packet."""
    header = packet.header
    inputs = _inputs_in(header["inputs"], iter(packet.tensors))
    own = dict(zip(header["pictured"], inputs, strict=True))
    return [
        SampleRequest(
            **{**values, "params": SamplingParams(**values["params"]), "model_input": own.get(i)}
        )
        for i, values in enumerate(header["requests"])
    ]


def _inputs_out(inputs: Sequence[Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Each image's file once, and the token ids of all text; what `_inputs_in` needs beside."""
    files: dict[int, tuple[int, ImageChunk]] = {}
    texts, chunks = [], []
    for value in inputs:
        chunks.append([])
        for chunk in value.chunks:
            if isinstance(chunk, ImageChunk):
                chunks[-1].append(files.setdefault(chunk.key, (len(files), chunk))[0])
            else:
                texts.append(torch.tensor(chunk.tokens, dtype=torch.int64))
                chunks[-1].append(None)
    images = [image for _, image in files.values()]
    bytes_ = [torch.frombuffer(bytearray(image.data), dtype=torch.uint8) for image in images]
    header = {"chunks": chunks, "files": [(image.format, image.length) for image in images]}
    return header, [*bytes_, *texts]


def _inputs_in(header: dict[str, Any], tensors: Iterator[torch.Tensor]) -> list[ModelInput]:
    """Inputs from the next of a packet's tensors."""
    images = [ImageChunk(next(tensors).numpy().tobytes(), *file) for file in header["files"]]
    return [
        ModelInput(
            [EncodedTextChunk(next(tensors).tolist()) if n is None else images[n] for n in numbers]
        )
        for numbers in header["chunks"]
    ]


def _topk(values: dict[str, Any]) -> TopkLogprobs:
    ids, logprobs = values["token_ids"], values["logprobs"]
    return TopkLogprobs(np.array(ids, np.int32), np.array(logprobs, np.float32))


def response_in(values: dict[str, Any]) -> SampleResponse:
    """A response from its JSON."""
    sequences = [
        SampledSequence(
            each["stop_reason"],
            each["sequence_id"],
            np.array(each["tokens_np"], dtype=np.int64),
            np.array(each["logprobs_np"]),
            each["topk_logprobs_np"] and _topk(each["topk_logprobs_np"]),
        )
        for each in values["sequences"]
    ]
    top = values["topk_prompt_logprobs"]
    if top is not None:
        top = [each and [(i, lp) for i, lp in each] for each in top]
    return SampleResponse(sequences, values["prompt_logprobs"], top)
