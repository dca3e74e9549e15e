"""An engine that shares its work out among the processes of a run.

Process 0 has all state: adapters, gradients, optimizers, random numbers, and the user's loss, which
runs once over the whole batch. The others hold the base model and copies of the adapters that were
used last; for each request they are told what to score, and with what. So nothing can go apart, a
request that fails anywhere leaves nothing behind anywhere, and a checkpoint is process 0's.

    logprobs of each share --> process 0: the loss --> their gradient, to each share
    --> each pushes its own through the graph it kept --> adapter gradients summed on process 0

The base model is whole in every process. Sharding it would ask one thing more of this module: that
all shares have as many micro-batches, since each forward would then be one of all processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cookbook_core.backend.local.engine import Engine
from cookbook_core.backend.local.model.adapters import Adapter, plain_config
from cookbook_core.backend.local.model.loading import BaseModel, load_base_model, resolve_model
from cookbook_core.backend.local.model.memory import keep_freed_memory
from cookbook_core.backend.local.multiprocess.group import Group, Packet, Request, Stopped
from cookbook_core.backend.local.multiprocess.shares import share_out, spread
from cookbook_core.backend.local.scoring.backward import LossOf, Pass, Scored, Tensors
from cookbook_core.backend.sampling_requests import SampleRequest
from cookbook_core.custom_loss import LossResult, LossTypeInput
from cookbook_core.datums import SCORE_MASK
from cookbook_core.errors import CookbookError, ModelError, ProcessError
from cookbook_core.types import Datum, ModelInput, SampledSequence, SampleResponse, SamplingParams

COPIES = 4
"""Adapters whose copies are kept: a policy, its reference, a snapshot and one more. Those used
longest ago are sent again when they are needed."""
_KEYS = ("target_tokens", SCORE_MASK)
"""Of a datum, what scoring reads; the rest is for the loss and stays on process 0."""

log = logging.getLogger(__name__)


class SharedEngine(Engine):
    """Process 0's engine: computes a share of each request and asks the others for theirs.

    Args:
        base: the model.
        gradient_checkpointing: see `Room`.
        group: the processes of the run.
        number: names this engine among them.
    """

    def __init__(
        self, base: BaseModel, gradient_checkpointing: str, group: Group, number: int
    ) -> None:
        super().__init__(base, gradient_checkpointing)
        self._group, self._number = group, number
        self._sent: OrderedDict[int, torch.Tensor] = OrderedDict()
        """By its number, what the others have of an adapter."""

    @classmethod
    def load(
        cls, group: Group, name: str, device: str, dtype: str, gradient_checkpointing: str
    ) -> SharedEngine:
        """Load a base model in all processes.

        Raises:
            ModelError: not there in one of them, or not the same. ConfigError: a bad option.
        """
        path, number = resolve_model(name), next(_numbers)
        header = {
            "op": "load",
            "engine": number,
            "options": {
                "name": str(Path(path).absolute()) if Path(path).is_dir() else path,
                "device": device,
                "dtype": dtype,
            },
            "gradient_checkpointing": gradient_checkpointing,
        }
        with group.ask([Packet(header)] * group.size) as request:
            base = load_base_model(name, device, dtype)
            engine = cls(base, gradient_checkpointing, group, number)
            mine = base.identity()["fingerprint"]
            for rank, answer in zip(group.others, request.answers(), strict=True):
                if (theirs := answer.header["fingerprint"]) != mine:
                    where = f"base_model in {group.name(rank)}"
                    raise ModelError(where, "has other weights", expected=mine, got=theirs)
            request.finish()
        return engine

    def score(
        self, adapter: Adapter | None, data: Sequence[Datum], places: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """As in one process; each scores its share."""
        shares = self._shares(data)
        if not any(shares[1:]):
            return super().score(adapter, data, places)
        with self._ask("score", adapter, [_packet(data, share) for share in shares]) as request:
            mine = super().score(adapter, [data[i] for i in shares[0]], shares[0])
            scored = [mine, *(answer.tensors for answer in request.answers())]
            request.finish()
        return _in_order(shares, scored)

    def gradient(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_of: LossOf,
        form: LossTypeInput,
        places: Sequence[int] | None = None,
    ) -> tuple[Pass, float]:
        """As in one process; each scores its share and keeps its graph, the loss runs here."""
        shares = self._shares(data)
        if not any(shares[1:]):
            return super().gradient(adapter, data, loss_of, form, places)
        device = self.base.device if form == "vocab_logprobs" else torch.device("cpu")

        def over_all(scored: Tensors) -> Scored:
            theirs = [[t.to(device) for t in answer.tensors] for answer in request.answers()]
            logprobs, result = loss_of(_in_order(shares, [scored, *theirs]))
            grads = [[result.grads[i] for i in share] for share in shares]
            request.go(grads)
            return logprobs, dataclasses.replace(result, grads=grads[0])

        work = [_packet(data, share, form=form) for share in shares]
        with self._ask("gradient", adapter, work) as request:
            mine = [data[i] for i in shares[0]]
            done, passes = super().gradient(adapter, mine, over_all, form, shares[0])
            logprobs, result, grads = done
            flat = _flat(grads)
            passes = max(passes, *(answer.header["passes"] for answer in request.answers()))
            request.finish()
            total = _like(self._group.sum_on_first(flat), grads)
        return (logprobs, result, total), passes

    def sample(
        self, adapter: Adapter | None, requests: Sequence[SampleRequest]
    ) -> list[SampleResponse]:
        """As in one process; each takes whole requests. Seeds that are not given are drawn here."""
        requests = [_seeded(request) for request in requests]
        costs = [r.num_samples * (r.params.max_tokens or 1) for r in requests]
        shares = spread(costs, self._group.size)
        if not any(shares[1:]):
            return super().sample(adapter, requests)
        work = [
            Packet({"requests": [dataclasses.asdict(requests[i]) for i in share]})
            for share in shares
        ]
        with self._ask("sample", adapter, work) as request:
            mine = super().sample(adapter, [requests[i] for i in shares[0]])
            answers = [answer.header["responses"] for answer in request.answers()]
            request.finish()
        return _in_order(shares, [mine, *([_response(r) for r in each] for each in answers)])

    def _shares(self, data: Sequence[Datum]) -> list[list[int]]:
        lists = [datum.model_input.to_ints() for datum in data]
        return share_out(lists, self._group.size, share=self.scorer.packs)

    @contextmanager
    def _ask(self, op: str, adapter: Adapter | None, work: Sequence[Packet]) -> Iterator[Request]:
        """A request, in which the others have `adapter` as it is now."""
        header: dict[str, Any] = {"op": op, "engine": self._number, "adapter": None}
        flat = None if adapter is None else _flat(adapter.params)
        held = None if adapter is None else self._sent.get(adapter.number)
        fresh = flat is not None and (held is None or not torch.equal(held, flat))
        if adapter is not None and flat is not None:
            config = plain_config(adapter.slot.config)
            header["adapter"] = {"number": adapter.number, "config": config, "fresh": fresh}
        packets = [Packet({**header, **each.header}, each.tensors) for each in work]
        try:
            with self._group.ask(packets) as request:
                if adapter is not None and flat is not None:
                    if fresh:
                        self._group.broadcast(flat)
                    _keep(self._sent, adapter.number, flat)
                yield request
        except BaseException:
            self._sent.clear()  # who knows what the others have: send anew
            raise


class Follower:
    """Every other process: base models, copies of adapters, and a loop that serves process 0."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._engines: dict[int, Engine] = {}
        self._copies: dict[int, OrderedDict[int, Adapter]] = {}
        if not torch.cuda.is_available():
            keep_freed_memory()

    def serve(self) -> None:
        """Do what process 0 asks until it ends.

        Raises:
            ProcessError: process 0 is gone.
        """
        group = self._group
        while (request := group.hear()).header["op"] != "end":
            try:
                if request.header["op"] == "load":
                    self._load(request.header)
                else:
                    self._work(request)
            except Stopped:
                continue
            except ProcessError:
                raise
            except Exception as error:
                if not isinstance(error, CookbookError):
                    log.exception("in %s", group.name(group.rank))
                group.report(error)

    def _load(self, header: dict[str, Any]) -> None:
        options = header["options"]
        wanted = options["device"]
        if wanted.startswith("cuda") or (wanted == "auto" and torch.cuda.is_available()):
            options["device"] = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        base = load_base_model(**options)
        engine = Engine(base, header["gradient_checkpointing"])
        self._group.exchange({"fingerprint": base.identity()["fingerprint"]})
        self._engines[header["engine"]] = engine
        self._copies[header["engine"]] = OrderedDict()

    def _work(self, request: Packet) -> None:
        header = request.header
        engine = self._engines[header["engine"]]
        adapter = self._adapter(header)
        if header["op"] == "sample":
            asked = [_request(values) for values in header["requests"]]
            found = engine.sample(adapter, asked) if asked else []
            self._group.exchange({"responses": [dataclasses.asdict(r) for r in found]})
            return
        data, places = _datums(request), header["places"]
        if header["op"] == "score":
            self._group.exchange({}, engine.score(adapter, data, places))
            return
        assert adapter is not None, "a gradient is one of an adapter"

        def ask_first(scored: Tensors) -> Scored:
            return [], LossResult(0.0, {}, self._group.exchange({}, scored).tensors)

        done, passes = engine.gradient(adapter, data, ask_first, header["form"], places)
        flat = _flat(done[2])
        self._group.exchange({"passes": passes})
        self._group.sum_on_first(flat)

    def _adapter(self, header: dict[str, Any]) -> Adapter | None:
        """The copy of the adapter a request is about, as process 0 has it now."""
        if header["adapter"] is None:
            return None
        import peft

        bank, copies = self._engines[header["engine"]].bank, self._copies[header["engine"]]
        number, config = header["adapter"]["number"], header["adapter"]["config"]
        adapter = copies.get(number)
        if adapter is None:
            adapter = bank.empty(peft.LoraConfig(**config))
        if header["adapter"]["fresh"]:
            flat = self._group.broadcast(_flat(adapter.params))
            for p, values in zip(adapter.params, _like(flat, adapter.params), strict=True):
                p.data.copy_(values)
        _keep(copies, number, adapter)
        return adapter


_numbers = itertools.count()


def _keep(held: OrderedDict[int, Any], number: int, value: Any) -> None:
    """Put the latest last, and let go of those used longest ago."""
    held[number] = value
    held.move_to_end(number)
    while len(held) > COPIES:
        held.popitem(last=False)


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _like(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = flat.split([t.numel() for t in tensors])
    return [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]


def _in_order(shares: Sequence[Sequence[int]], found: Sequence[Sequence[Any]]) -> list[Any]:
    """What was found for each share -> in the order of the whole."""
    pairs = [
        pair
        for share, each in zip(shares, found, strict=True)
        for pair in zip(share, each, strict=True)
    ]
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


# ---- what is sent --------------------------------------------------------------------------------


def _packet(data: Sequence[Datum], share: Sequence[int], **header: Any) -> Packet:
    """What scoring reads of the datums of a share."""
    keys, tensors = [], []
    for datum in (data[i] for i in share):
        keys.append([key for key in _KEYS if key in datum.loss_fn_inputs])
        tensors.append(torch.tensor(datum.model_input.to_ints()))
        tensors += [datum.loss_fn_inputs[key].to_torch() for key in keys[-1]]
    return Packet({**header, "keys": keys, "places": list(share)}, tensors)


def _datums(packet: Packet) -> list[Datum]:
    tensors = iter(packet.tensors)
    data = []
    for keys in packet.header["keys"]:
        tokens = ModelInput.from_ints(next(tensors).tolist())
        data.append(Datum(tokens, {key: next(tensors) for key in keys}))
    return data


def _seeded(request: SampleRequest) -> SampleRequest:
    """With the seed that `sample_batch` would draw."""
    if request.params.seed is not None:
        return request
    seed = int(torch.randint(2**62, ()))
    return dataclasses.replace(request, params=dataclasses.replace(request.params, seed=seed))


def _request(values: dict[str, Any]) -> SampleRequest:
    return SampleRequest(**{**values, "params": SamplingParams(**values["params"])})


def _response(values: dict[str, Any]) -> SampleResponse:
    """JSON -> what `sample_batch` gives."""
    sequences = [
        SampledSequence(
            each["stop_reason"],
            each["sequence_id"],
            np.array(each["tokens_np"], dtype=np.int64),
            np.array(each["logprobs_np"]),
        )
        for each in values["sequences"]
    ]
    top = values["topk_prompt_logprobs"]
    if top is not None:
        top = [each and [(i, lp) for i, lp in each] for each in top]
    return SampleResponse(sequences, values["prompt_logprobs"], top)
