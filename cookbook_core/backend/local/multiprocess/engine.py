"""An engine that divides its work among the processes of a run.

Rank 0 has all state: adapters, gradients, optimizers, random numbers, and the user's loss, which
runs once over the whole batch. The other ranks hold the base model and copies of the adapters used
last; each request carries the data to score and says with which adapter. So the ranks cannot
diverge, a request that fails anywhere leaves no trace anywhere, and checkpoints are rank 0's.

    logprobs of each share --> rank 0: the loss --> their gradient, to each rank
    --> each pulls its own back through the graph it kept --> adapter gradients summed on rank 0

The base model is whole in every process, or its layers are sharded (`model/sharding.py`). Then all
ranks take part in each request, in as many forwards and backwards as the rank with the most
micro-batches needs: the others compute idle ones. Adapters are whole, so nothing else differs, but
that a rank which fails inside a forward ends the run.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cookbook_core.backend.local.engine import Engine
from cookbook_core.backend.local.model.adapters import plain_config
from cookbook_core.backend.local.model.flat_adapter import Adapter
from cookbook_core.backend.local.model.loading import BaseModel, load_base_model, resolve_model
from cookbook_core.backend.local.model.memory import keep_freed_memory
from cookbook_core.backend.local.model.sharding import folder_digest
from cookbook_core.backend.local.multiprocess.group import Group, Packet, Request, Stopped
from cookbook_core.backend.local.multiprocess.packets import (
    datum_packet,
    datums_in,
    response_in,
    sample_packet,
    sample_requests,
)
from cookbook_core.backend.local.multiprocess.shares import share_out, spread
from cookbook_core.backend.local.scoring.backward import BatchScores, View, views_of
from cookbook_core.backend.sampling_requests import SampleRequest
from cookbook_core.backend.threads import LoadWatch
from cookbook_core.custom_loss import LossTypeInput
from cookbook_core.errors import CookbookError, ModelError, ProcessError
from cookbook_core.types import Datum, SampleResponse

import torch

COPIES = 4
"""Adapters of which each rank keeps copies: a policy, its reference, a snapshot and one more. The
least recently used are sent again when needed."""

log = logging.getLogger(__name__)


class SharedEngine(Engine):
    """Rank 0's engine: computes a share of each request, and has the other ranks compute theirs.

    Args:
        base: the model.
        gradient_checkpointing: see `MemoryLimits`.
        group: the processes of the run.
        number: identifies this engine in all of them.
    """

    def __init__(
        self, base: BaseModel, gradient_checkpointing: str, group: Group, number: int
    ) -> None:
        with _in_step(group, base):
            super().__init__(base, gradient_checkpointing, _agreement(group, base))
        self._group, self._number = group, number
        self._sent: OrderedDict[int, torch.Tensor] = OrderedDict()
        """By adapter number, the values that the other ranks have."""

    @classmethod
    def load(
        cls,
        group: Group,
        name: str,
        device: str,
        dtype: str,
        gradient_checkpointing: str,
        *,
        shard: bool = False,
    ) -> SharedEngine:
        """Load a base model in all processes, whole or sharded.

        Raises:
            ModelError: missing in one of them, with other weights, or not sharded by transformers.
            ConfigError: a bad option. VersionError: a package is too old to shard.
        """
        path, number = resolve_model(name), next(_numbers)
        header = {
            "op": "load",
            "engine": number,
            "options": {
                "name": str(Path(path).absolute()) if Path(path).is_dir() else path,
                "device": device,
                "dtype": dtype,
                "shards": group.size if shard else 1,
            },
            "gradient_checkpointing": gradient_checkpointing,
        }
        with group.request([Packet(header)] * group.size) as request:
            base = load_base_model(name, device, dtype, header["options"]["shards"])
            # it is loaded everywhere: what follows is computed together
            files = folder_digest(header["options"]["name"])
            for rank, answer in zip(group.others, request.answers(), strict=True):
                if answer.header["files"] != files:
                    raise _other_weights(group.name(rank), files, answer.header["files"])
            request.next_round([[]] * group.size)
            with _in_step(group, base):
                mine = base.identity()["fingerprint"]
            engine = cls(base, gradient_checkpointing, group, number)
            for rank, answer in zip(group.others, request.answers(), strict=True):
                if (theirs := answer.header["fingerprint"]) != mine:
                    raise _other_weights(group.name(rank), mine, theirs)
            request.finish()
        return engine

    def score(
        self,
        adapter: Adapter | None,
        data: Sequence[Datum],
        datum_indices: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """As `Engine.score`; each rank scores its share.

        Returns:
            D tensors `(N,)` or `(N, K)`, nats, float32 or better, on the CPU.
        """
        return self._divided("score", super().score, adapter, data, datum_indices)

    def hidden(
        self,
        adapter: Adapter | None,
        data: Sequence[Datum],
        datum_indices: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """As `Engine.hidden`; each rank computes its share."""
        hidden = self._divided("hidden", super().hidden, adapter, data, datum_indices)
        return [each.to(self.base.device) for each in hidden]

    def _divided(
        self,
        op: str,
        compute: Callable[..., list[torch.Tensor]],
        adapter: Adapter | None,
        data: Sequence[Datum],
        datum_indices: Sequence[int] | None,
    ) -> list[torch.Tensor]:
        """What `compute` gives for each datum, each rank of its share; those of others on the CPU.

        Args:
            op: what the other ranks call it.
            compute: a method of `Engine` that takes the arguments that follow.
            adapter: the adapter to compute with; None for the base model.
            data: D checked datums.
            datum_indices: as in `Engine.score_with_graph`.
        """
        shares = self._shares(data)
        if self._alone(shares):
            return compute(adapter, data, datum_indices)
        work = [datum_packet(data, share) for share in shares]
        with self._request(op, adapter, work) as request:
            with _in_step(self._group, self.base):
                mine = compute(adapter, [data[i] for i in shares[0]], shares[0])
            results = [mine, *(answer.tensors for answer in request.answers())]
            request.finish()
        return _in_order(shares, results)

    @contextmanager
    def score_with_graph(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_type_input: LossTypeInput = "logprobs",
        datum_indices: Sequence[int] | None = None,
    ) -> Iterator[BatchScores]:
        """As `Engine.score_with_graph`; each rank scores its share and keeps its graph."""
        shares = self._shares(data)
        if self._alone(shares):
            with super().score_with_graph(adapter, data, loss_type_input, datum_indices) as scored:
                yield scored
            return
        work = [datum_packet(data, share, loss_type_input=loss_type_input) for share in shares]
        mine = [data[i] for i in shares[0]]
        with (
            self._request("gradient", adapter, work) as request,
            ExitStack() as stack,
        ):
            with _in_step(self._group, self.base):
                scoring = super().score_with_graph(adapter, mine, loss_type_input, shares[0])
                own = stack.enter_context(scoring)
            views = views_of(self.scorer, data) if own.views else None
            yield SharedScores(own, views, shares, request, self._group, self.base)

    def sample(
        self, adapter: Adapter | None, requests: Sequence[SampleRequest]
    ) -> list[SampleResponse]:
        """As `Engine.sample`; each rank takes whole requests. Missing seeds are drawn on rank 0.

        Over a sharded model each rank takes all of them: a decoding step is one of all ranks.
        """
        requests = [_seeded(request) for request in requests]
        if self.base.shards > 1:
            return self._sample_together(adapter, requests)
        costs = [r.num_samples * (r.params.max_tokens or 1) for r in requests]
        shares = spread(costs, self._group.size)
        if not any(shares[1:]):
            return super().sample(adapter, requests)
        work = [sample_packet([requests[i] for i in share]) for share in shares]
        with self._request("sample", adapter, work) as request:
            mine = super().sample(adapter, [requests[i] for i in shares[0]])
            answers = [answer.header["responses"] for answer in request.answers()]
            request.finish()
        return _in_order(shares, [mine, *([response_in(r) for r in each] for each in answers)])

    def _sample_together(
        self, adapter: Adapter | None, requests: Sequence[SampleRequest]
    ) -> list[SampleResponse]:
        """Sample on every rank over a sharded model.

        Raises:
            ProcessError: ranks on unlike machines drew different tokens.
        """
        self.tokenizer_for(requests)  # whatever is wrong with it fails this request alone
        work = [sample_packet(requests)] * self._group.size
        with self._request("sample", adapter, work) as request:
            with _in_step(self._group, self.base):
                mine = super().sample(adapter, requests)
            drawn = [[s.tokens for s in response.sequences] for response in mine]
            for rank, answer in zip(self._group.others, request.answers(), strict=True):
                theirs = [response_in(values) for values in answer.header["responses"]]
                if [[s.tokens for s in response.sequences] for response in theirs] != drawn:
                    what = "drew other tokens than rank 0 in the same request"
                    fix = "Run --shard on machines of one kind."
                    raise ProcessError(self._group.name(rank), what, fix=fix)
            request.finish()
        return mine

    def _alone(self, shares: Sequence[Sequence[int]]) -> bool:
        """Whether the other ranks have no part in a request."""
        return not any(shares[1:]) and self.base.shards == 1

    def _shares(self, data: Sequence[Datum]) -> list[list[int]]:
        lists = [datum.model_input.keys() for datum in data]
        return share_out(lists, self._group.size, reuse_prefixes=self.scorer.packs_all(data))

    @contextmanager
    def _request(
        self, op: str, adapter: Adapter | None, work: Sequence[Packet]
    ) -> Iterator[Request]:
        """A request in which the other ranks have `adapter` as it is now."""
        header: dict[str, Any] = {"op": op, "engine": self._number, "adapter": None}
        sent = None
        if adapter is not None:
            sent = self._sent.get(adapter.number)
            changed = sent is None or not torch.equal(sent, adapter.flat)
            if changed:
                sent = adapter.flat.detach().clone()
            config = plain_config(adapter.slot.config)
            header["adapter"] = {"number": adapter.number, "config": config, "changed": changed}
        packets = [Packet({**header, **each.header}, each.tensors) for each in work]
        try:
            with self._group.request(packets) as request:
                if adapter is not None and sent is not None:
                    if header["adapter"]["changed"]:
                        self._group.broadcast(sent)
                    _keep(self._sent, adapter.number, sent)
                yield request
        except BaseException:
            self._sent.clear()  # what the other ranks have is unknown now: send it again
            raise


class SharedScores:
    """`BatchScores` of a batch of which each process scored a share."""

    def __init__(
        self,
        own: BatchScores,
        views: list[View] | None,
        shares: Sequence[Sequence[int]],
        request: Request,
        group: Group,
        base: BaseModel,
    ) -> None:
        self._own, self._shares, self._request, self._group = own, shares, request, group
        self._base = base
        self.views, self.loss_params, self.passes = views, own.loss_params, own.passes
        self.limits = own.limits
        answers = [[self._like_own(t) for t in answer.tensors] for answer in request.answers()]
        self.logprobs = _in_order(shares, [own.logprobs, *answers])

    def pull_back(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Pull each share back through its process's graph; sum the gradients on rank 0.

        Args:
            grads: D tensors shaped like logprobs.

        Returns:
            One tensor per parameter, in its shape.
        """
        shares = [[grads[i] for i in share] for share in self._shares]
        self._request.next_round(shares)
        with _in_step(self._group, self._base):
            own = self._own.pull_back(shares[0])
        passes = [answer.header["passes"] for answer in self._request.answers()]
        self.passes = max(self._own.passes, *passes)
        self._request.finish()
        return _like(self._group.sum_on_first(_flat(own)), own)

    def _like_own(self, scores: torch.Tensor) -> torch.Tensor:
        """Move hidden states to rank 0's device; leave logprobs on the CPU."""
        return scores.to(self._base.device) if self.views else scores


class Follower:
    """Every other rank: base models, copies of adapters, and a loop that serves rank 0."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._engines: dict[int, Engine] = {}
        self._copies: dict[int, OrderedDict[int, Adapter]] = {}
        if not torch.cuda.is_available():
            keep_freed_memory()

    def serve(self) -> None:
        """Serve requests until rank 0 ends.

        Raises:
            ProcessError: rank 0 died.
        """
        watch = LoadWatch()
        try:
            self._serve(watch)
        finally:
            watch.end()

    def _serve(self, watch: LoadWatch) -> None:
        group = self._group
        while (request := group.receive_request()).header["op"] != "end":
            watch.resume()
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
                group.report_error(error)

    def _load(self, header: dict[str, Any]) -> None:
        options = header["options"]
        wanted = options["device"]
        if wanted.startswith("cuda") or (wanted == "auto" and torch.cuda.is_available()):
            options["device"] = f"cuda:{torch.cuda.current_device()}"  # which Group has set
        base = load_base_model(**options)
        self._group.exchange({"files": folder_digest(options["name"])})
        with _in_step(self._group, base):
            mine = base.identity()["fingerprint"]
            agreement = _agreement(self._group, base)
            engine = Engine(base, header["gradient_checkpointing"], agreement)
        self._group.exchange({"fingerprint": mine})
        self._engines[header["engine"]] = engine
        self._copies[header["engine"]] = OrderedDict()

    def _work(self, request: Packet) -> None:
        header = request.header
        engine = self._engines[header["engine"]]
        adapter = self._adapter(header)
        in_step = _in_step(self._group, engine.base)
        if header["op"] == "sample":
            requests = sample_requests(request)
            with in_step:
                responses = engine.sample(adapter, requests) if requests else []
            self._group.exchange({"responses": [dataclasses.asdict(r) for r in responses]})
            return
        data, datum_indices = datums_in(request), header["datum_indices"]
        if header["op"] in ("score", "hidden"):
            compute = engine.score if header["op"] == "score" else engine.hidden
            with in_step:
                scores = compute(adapter, data, datum_indices)
            self._group.exchange({}, scores)
            return
        assert adapter is not None, "gradient request without an adapter"

        scoring = engine.score_with_graph(adapter, data, header["loss_type_input"], datum_indices)
        with ExitStack() as stack:
            with in_step:
                scored = stack.enter_context(scoring)
            grads = self._group.exchange({}, scored.logprobs).tensors
            with _in_step(self._group, engine.base):
                flat = _flat(scored.pull_back(grads))
        self._group.exchange({"passes": scored.passes})
        self._group.sum_on_first(flat)

    def _adapter(self, header: dict[str, Any]) -> Adapter | None:
        """Return this rank's copy of the request's adapter, updated to rank 0's values."""
        if header["adapter"] is None:
            return None
        import peft

        bank, copies = self._engines[header["engine"]].bank, self._copies[header["engine"]]
        number, config = header["adapter"]["number"], header["adapter"]["config"]
        adapter = copies.get(number)
        if adapter is None:
            adapter = bank.empty(peft.LoraConfig(**config))
        if header["adapter"]["changed"]:
            flat = adapter.flat.data
            flat.copy_(self._group.broadcast(flat))
        _keep(copies, number, adapter)
        return adapter


_numbers = itertools.count()


def _other_weights(process: str, expected: Any, got: Any) -> ModelError:
    fix = "Give every process the same model folder."
    where = f"base_model in {process}"
    return ModelError(where, "has other weights", expected=expected, got=got, fix=fix)


def _in_step(group: Group, base: BaseModel) -> AbstractContextManager[None]:
    """`Group.in_step` where the model is sharded; else an error ends the request alone."""
    return group.in_step() if base.shards > 1 else nullcontext()


def _agreement(group: Group, base: BaseModel) -> Callable[[Sequence[int]], Sequence[int]]:
    """See `Scorer`."""
    return group.largest if base.shards > 1 else list


def _keep(copies: OrderedDict[int, Any], number: int, value: Any) -> None:
    """Mark as most recently used; evict the least recently used beyond COPIES."""
    copies[number] = value
    copies.move_to_end(number)
    while len(copies) > COPIES:
        copies.popitem(last=False)


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _like(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = flat.split([t.numel() for t in tensors])
    return [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]


def _in_order(shares: Sequence[Sequence[int]], results: Sequence[Sequence[Any]]) -> list[Any]:
    """The results of each share -> in the order of the whole batch."""
    pairs = [
        pair
        for share, each in zip(shares, results, strict=True)
        for pair in zip(share, each, strict=True)
    ]
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def _seeded(request: SampleRequest) -> SampleRequest:
    """Return the request with a random seed if it has none."""
    if request.params.seed is not None:
        return request
    seed = int(torch.randint(2**62, ()))
    return dataclasses.replace(request, params=dataclasses.replace(request.params, seed=seed))
