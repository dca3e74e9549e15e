"""The processes of one run, as torchrun starts them: rank 0 sends requests, the others answer.

    rank 0                        every other rank
    request(packets) -----------> receive_request() -> packet
                                  computes
    answers() <------------------ exchange(answer)
    next_round(tensors) --------> what exchange() returns
    ... as many rounds as the work has ...

Each answer is followed by a verdict, continue or stop, so an error anywhere ends the request
everywhere. Messages are JSON and plain bytes of tensors over gloo; nothing is unpickled.
Collectives over gradients and adapters use the device's own backend: nccl on CUDA.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from cookbook_core import errors
from cookbook_core.backend.local.multiprocess.heartbeat import Heartbeat
from cookbook_core.backend.local.multiprocess.joining import choose_interface, open_store
from cookbook_core.backend.worker import close_all
from cookbook_core.errors import CookbookError, ProcessError, RequestError

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)
"""To connect, and of a collective, which all processes enter together."""
NCCL_TIMEOUT = timedelta(minutes=5)
"""Of a collective over nccl."""
_UNLIMITED = timedelta(days=365)
"""Of a message: its sender may compute, or wait for a reward function or in a debugger. A dead one
is detected at once, as its connections close, and a hung one by its heartbeat."""


class Stopped(Exception):
    """Raised when rank 0 aborts a request that failed on another rank."""


@dataclass(frozen=True)
class Packet:
    """A message: JSON values by name, and tensors."""

    header: dict[str, Any]
    tensors: list[torch.Tensor] = field(default_factory=list)


class Group:
    """This process's connection to the others.

    Attributes:
        rank: of this process; rank 0 runs the script.
        size: number of processes.
        lock: rank 0 holds it during a request: one at a time, whichever thread it is from.
        lost: the error that a process died or hangs, after one did.
        heartbeat: signs of life of all processes.
    """

    def __init__(self) -> None:
        choose_interface()
        store, self.rank, self.size = open_store(TIMEOUT)
        self.heartbeat = Heartbeat(store, self.rank, self.size)
        # a sharded model's collectives run in groups that are made after the default one
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backends, timeout=TIMEOUT, store=store, rank=self.rank, world_size=self.size
        )
        self.heartbeat.start()
        self._nccl = None
        if torch.cuda.is_available():
            torch.cuda.set_device(
                int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
            )
            self._nccl = dist.new_group(backend="nccl", timeout=NCCL_TIMEOUT)
        self.lock = threading.Lock()
        self.lost: ProcessError | None = None

    @property
    def others(self) -> range:
        """Every rank but 0."""
        return range(1, self.size)

    def name(self, rank: int) -> str:
        """Return the name of a process in errors."""
        return f"process {rank} of {self.size}"

    # ---- messages --------------------------------------------------------------------------------

    def send(self, to: int, packet: Packet) -> None:
        """Send a packet to a process that waits for one.

        Raises:
            ProcessError: it died, or hangs.
        """
        tensors = [t.detach().cpu().contiguous() for t in packet.tensors]
        kinds = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        text = json.dumps({**packet.header, "tensors": kinds}, default=_plain).encode()
        head = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        body = torch.cat([head, *(t.flatten().view(torch.uint8) for t in tensors)])
        sizes = torch.tensor([len(head), len(body)])

        def transfer() -> None:
            _finish(dist.isend(sizes, to))
            _finish(dist.isend(body, to))

        with self._detecting_loss(self.name(to)):
            self.heartbeat.run([to], transfer)

    def receive(self, source: int) -> Packet:
        """Wait for a packet.

        Raises:
            ProcessError: the process died, or hangs.
        """
        sizes = torch.empty(2, dtype=torch.int64)

        def transfer() -> torch.Tensor:
            _finish(dist.irecv(sizes, source))
            body = torch.empty(int(sizes[1]), dtype=torch.uint8)
            _finish(dist.irecv(body, source))
            return body

        # on rank 0 all: one that ends, as another hangs, is not the cause
        watched = [source] if self.rank else self._others()
        with self._detecting_loss(self.name(source)):
            body = self.heartbeat.run(watched, transfer)
        at = int(sizes[0])
        header = json.loads(bytes(body[:at].numpy()))
        tensors = []
        for kind, shape in header.pop("tensors"):
            dtype = getattr(torch, kind)
            end = at + dtype.itemsize * int(torch.Size(shape).numel())
            tensors.append(body[at:end].clone().view(dtype).reshape(shape))
            at = end
        return Packet(header, tensors)

    # ---- collectives -----------------------------------------------------------------------------

    def broadcast(self, flat: torch.Tensor) -> torch.Tensor:
        """Return rank 0's `flat` in every process; all call this together.

        Args:
            flat: `(P,)`, P = parameter elements.
        """
        return self._collective(flat, lambda x, group: dist.broadcast(x, 0, group=group))

    def sum_on_first(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the sum over processes, valid on rank 0 only; all call this together.

        Args:
            flat: `(P,)`, P = parameter elements.
        """
        return self._collective(flat, lambda x, group: dist.reduce(x, 0, group=group))

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest of all processes' numbers, place by place; all call this together."""
        wire = torch.tensor([int(n) for n in numbers])
        with self._detecting_loss(self._any_other()):
            dist.all_reduce(wire, dist.ReduceOp.MAX)
        return wire.tolist()

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside, this process takes part in forwards and backwards of a sharded model.

        Each layer's weights are gathered by all processes together. So where one of them fails, the
        others wait in the middle of a forward, for a part that will not come: the run ends. Where
        one hangs, the others exit with status 1: nothing can interrupt such a wait.

        Raises:
            ProcessError: in place of any exception inside; nothing more can be computed.
        """
        done = threading.Event()
        threading.Thread(target=self._exit_if_hung, args=[done], daemon=True).start()
        try:
            yield
        except ProcessError:
            raise
        except Exception as error:
            broken = isinstance(error, dist.DistError) or "gloo" in str(error)
            where = self.name(self.rank)
            what = "failed while all processes computed together"
            if broken:
                where, what = self._any_other(), "died: the connection to it broke"
            got = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.lost = ProcessError(where, what, got=got)
            raise self.lost from error
        finally:
            done.set()

    def _exit_if_hung(self, done: threading.Event) -> None:
        if silent := self.heartbeat.wait(done, self._others()):
            print(self.heartbeat.hung(silent[0]), file=sys.stderr, flush=True)
            os._exit(1)

    def _others(self) -> list[int]:
        """Every rank but this one."""
        return [r for r in range(self.size) if r != self.rank]

    def _any_other(self) -> str:
        """The name of the other process, or of one of them."""
        others = self._others()
        return self.name(others[0]) if len(others) == 1 else "a process of the run"

    def _collective(self, flat: torch.Tensor, run: Any) -> torch.Tensor:
        nccl = flat.device.type == "cuda"
        wire = flat if nccl else flat.cpu()
        with self._detecting_loss(self._any_other()):
            if nccl:  # which has a timeout of its own
                run(wire, self._nccl)
                torch.cuda.synchronize(flat.device)
            else:
                self.heartbeat.run(self._others(), lambda: run(wire, None))
        return wire.to(flat.device)

    # ---- loss of a process -----------------------------------------------------------------------

    @contextmanager
    def _detecting_loss(self, whom: str) -> Iterator[None]:
        """Inside, a connection to `whom` that breaks means that the process died."""
        if self.lost is not None:
            raise self.lost
        try:
            yield
        except ProcessError as error:
            self.lost = error
            raise
        except RuntimeError as error:
            self.lost = ProcessError(whom, "died: the connection to it broke")
            raise self.lost from error

    # ---- rank 0 ----------------------------------------------------------------------------------

    @contextmanager
    def request(self, packets: Sequence[Packet]) -> Iterator[Request]:
        """Send a request to the other processes, `packets[r]` to rank r (that at 0 is unused).

        An exception inside the block ends the request in all of them.
        """
        with self.lock:
            for rank in self.others:
                self.send(rank, packets[rank])
            request = Request(self)
            try:
                yield request
            except BaseException:
                if self.lost is None:
                    request.stop()
                raise

    # ---- the other ranks -------------------------------------------------------------------------

    def receive_request(self) -> Packet:
        """Wait for the next request of rank 0."""
        return self.receive(0)

    def exchange(self, header: Mapping[str, Any], tensors: Sequence[torch.Tensor] = ()) -> Packet:
        """Send this rank's result; return rank 0's next packet.

        Raises:
            Stopped: the request failed on another rank.
        """
        self.send(0, Packet(dict(header), list(tensors)))
        verdict = self.receive(0)
        if verdict.header["stop"]:
            raise Stopped
        return verdict

    def report_error(self, error: Exception) -> None:
        """Send rank 0 the error that the request raised on this rank."""
        try:
            kind = type(error).__name__
            slots = {"where": "", "what": f"{kind}: {error}"}
            if isinstance(error, CookbookError):
                slots = error.slots()
            self.exchange({"error": {"kind": kind, **slots}})
        except Stopped:
            return
        raise AssertionError("rank 0 continued a failed request")


class Request:
    """A request of rank 0.

    In each round every rank sends a result and rank 0 replies continue or stop.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._answered = self._finished = False

    def answers(self) -> list[Packet]:
        """The answers of this round, from rank 1 up.

        Raises:
            ProcessError: a process died. An error that a process reports is raised as the class it
                has among our errors, any other as RequestError.
        """
        group = self._group
        packets = [group.receive(rank) for rank in group.others]
        self._answered = True
        for rank, packet in zip(group.others, packets, strict=True):
            if "error" in packet.header:
                slots = packet.header["error"]
                kind = getattr(errors, slots.pop("kind"), None)
                if not isinstance(kind, type) or not issubclass(kind, CookbookError):
                    kind = RequestError
                where = f"in {group.name(rank)}: {slots.pop('where')}".removesuffix(": ")
                raise kind(where, **slots)
        return packets

    def next_round(self, tensors: Sequence[list[torch.Tensor]]) -> None:
        """Let the others continue with the next round, `tensors[r]` on rank r."""
        for rank in self._group.others:
            self._group.send(rank, Packet({"stop": False}, tensors[rank]))
        self._answered = False

    def finish(self) -> None:
        """Let the others finish: the last round succeeded."""
        self.next_round([[]] * self._group.size)
        self._finished = True

    def stop(self) -> None:
        """End an unfinished request in the other processes, after they have answered."""
        group = self._group
        if self._finished:
            return
        for rank in group.others:
            if not self._answered:
                group.receive(rank)
            group.send(rank, Packet({"stop": True}))


def _finish(message: Any) -> None:
    """Wait until a message is through."""
    message.wait(_UNLIMITED)


def _plain(value: Any) -> Any:
    """A numpy number or array as a JSON value."""
    return value.tolist()


# ---- joining -------------------------------------------------------------------------------------

_group: Group | None = None


def joined() -> Group | None:
    """The group this process joined; None in a run of one process."""
    return _group


def join() -> Group:
    """Connect to the other processes; when rank 0 ends it releases them."""
    global _group
    _group = Group()
    if _group.rank == 0:
        atexit.register(leave)
    return _group


def leave() -> None:
    """On rank 0: serve what is queued, then end the other processes."""
    global _group
    group, _group = _group, None
    if group is None:
        return
    close_all()
    if group.lock.acquire(timeout=5):  # after 5 s a request is hung; the others detect our end
        with contextlib.suppress(ProcessError):
            for rank in group.others:
                group.send(rank, Packet({"op": "end"}))
        group.heartbeat.stop()
        dist.destroy_process_group()
