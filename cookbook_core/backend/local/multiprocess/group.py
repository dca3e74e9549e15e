"""The processes of one run, as torchrun starts them: process 0 asks, the others answer.

    process 0                     every other process
    ask(message) ---------------> hear() -> message
                                  works
    answers() <------------------ exchange(answer)
    go(more) -------------------> what exchange() gives
    ... as many rounds as the work has ...

Each answer is followed by a verdict, "go on" or "stop", so an error anywhere ends the request
everywhere. Messages are JSON and plain bytes of tensors over gloo; nothing is unpickled. Tensors
that all have, gradients and adapters, take the device's own way: nccl on CUDA.
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

import torch
import torch.distributed as dist

from cookbook_core import errors
from cookbook_core.backend.worker import close_all
from cookbook_core.errors import CookbookError, ProcessError, RequestError

PATIENCE = timedelta(days=1)
"""For a process that lives and says nothing; one that dies is noticed at once, as its connections
close. Process 0 may take its time between two requests: a reward function, a debugger."""
NCCL_PATIENCE = timedelta(minutes=5)
"""Within a product of all processes, which they enter together."""


class Stopped(Exception):
    """The verdict on an answer: the request has failed elsewhere."""


@dataclass(frozen=True)
class Packet:
    """A message: JSON values by name, and tensors."""

    header: dict[str, Any]
    tensors: list[torch.Tensor] = field(default_factory=list)


class Group:
    """This process's connection to the others.

    Attributes:
        rank: of this process; 0 runs the script.
        size: how many there are.
        turn: held by process 0 while it asks; one request at a time, whichever thread it is from.
        lost: the error that a process is gone, once it is.
    """

    def __init__(self) -> None:
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # all on this machine
            loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
            if loopback:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        dist.init_process_group("gloo", timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._nccl = None
        if torch.cuda.is_available():
            torch.cuda.set_device(
                int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
            )
            self._nccl = dist.new_group(backend="nccl", timeout=NCCL_PATIENCE)
        self.turn = threading.Lock()
        self.lost: ProcessError | None = None

    @property
    def others(self) -> range:
        """Every process but 0."""
        return range(1, self.size)

    def name(self, rank: int) -> str:
        """What to call a process in a message."""
        return f"process {rank} of {self.size}"

    # ---- messages --------------------------------------------------------------------------------

    def send(self, to: int, packet: Packet) -> None:
        """Hand a message to a process that waits for one.

        Raises:
            ProcessError: it is gone.
        """
        tensors = [t.detach().cpu().contiguous() for t in packet.tensors]
        kinds = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        text = json.dumps({**packet.header, "tensors": kinds}, default=_plain).encode()
        head = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        body = torch.cat([head, *(t.flatten().view(torch.uint8) for t in tensors)])
        with self._noticing(self.name(to)):
            dist.send(torch.tensor([len(head), len(body)]), to)
            dist.send(body, to)

    def receive(self, source: int) -> Packet:
        """Wait for a message.

        Raises:
            ProcessError: the process is gone.
        """
        sizes = torch.empty(2, dtype=torch.int64)
        with self._noticing(self.name(source)):
            dist.recv(sizes, source)
            body = torch.empty(int(sizes[1]), dtype=torch.uint8)
            dist.recv(body, source)
        at = int(sizes[0])
        header = json.loads(bytes(body[:at].numpy()))
        tensors = []
        for kind, shape in header.pop("tensors"):
            dtype = getattr(torch, kind)
            end = at + dtype.itemsize * int(torch.Size(shape).numel())
            tensors.append(body[at:end].clone().view(dtype).reshape(shape))
            at = end
        return Packet(header, tensors)

    # ---- what all have ---------------------------------------------------------------------------

    def broadcast(self, flat: torch.Tensor) -> torch.Tensor:
        """Process 0's `flat` in every process; all call this together."""
        return self._together(flat, lambda x, group: dist.broadcast(x, 0, group=group))

    def sum_on_first(self, flat: torch.Tensor) -> torch.Tensor:
        """The sum over processes, of use on process 0 only; all call this together."""
        return self._together(flat, lambda x, group: dist.reduce(x, 0, group=group))

    def _together(self, flat: torch.Tensor, run: Any) -> torch.Tensor:
        others = [self.name(r) for r in range(self.size) if r != self.rank]
        nccl = flat.device.type == "cuda"
        wire = flat if nccl else flat.cpu()
        with self._noticing(others[0] if len(others) == 1 else "a process of the run"):
            run(wire, self._nccl if nccl else None)
            if nccl:
                torch.cuda.synchronize(flat.device)
        return wire.to(flat.device)

    @contextmanager
    def _noticing(self, whom: str) -> Iterator[None]:
        """Within: talk with `whom`; a connection that breaks is a process that is gone."""
        if self.lost is not None:
            raise self.lost
        try:
            yield
        except RuntimeError as error:
            rule, got = "every process to live as long as the run", "a broken connection to it"
            self.lost = ProcessError(whom, "is gone", expected=rule, got=got)
            raise self.lost from error

    # ---- process 0 asks --------------------------------------------------------------------------

    @contextmanager
    def ask(self, packets: Sequence[Packet]) -> Iterator[Request]:
        """A request to the other processes, `packets[r]` to r (that at 0 stays unused).

        Whatever is raised within ends the request in all of them.
        """
        with self.turn:
            for rank in self.others:
                self.send(rank, packets[rank])
            request = Request(self)
            try:
                yield request
            except BaseException:
                if self.lost is None:
                    request.stop()
                raise

    # ---- the others answer -----------------------------------------------------------------------

    def hear(self) -> Packet:
        """The next request."""
        return self.receive(0)

    def exchange(self, header: Mapping[str, Any], tensors: Sequence[torch.Tensor] = ()) -> Packet:
        """Answer, and hear the verdict.

        Raises:
            Stopped: the request has failed elsewhere.
        """
        self.send(0, Packet(dict(header), list(tensors)))
        verdict = self.receive(0)
        if verdict.header["stop"]:
            raise Stopped
        return verdict

    def report(self, error: Exception) -> None:
        """Answer that the work failed."""
        try:
            kind = type(error).__name__
            slots = {"where": "", "what": f"{kind}: {error}"}
            if isinstance(error, CookbookError):
                slots = error.slots()
            self.exchange({"error": {"kind": kind, **slots}})
        except Stopped:
            return
        raise AssertionError("a failed request goes on")


class Request:
    """What process 0 has asked: rounds of an answer from each process and a verdict for each."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._answered = self._over = False

    def answers(self) -> list[Packet]:
        """The answers of this round, of process 1 and up.

        Raises:
            ProcessError: a process is gone. Whatever a process says has failed there, as the class
                it has among our errors, else RequestError.
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

    def go(self, tensors: Sequence[list[torch.Tensor]]) -> None:
        """Let the others go on to the next round, `tensors[r]` to process r."""
        for rank in self._group.others:
            self._group.send(rank, Packet({"stop": False}, tensors[rank]))
        self._answered = False

    def finish(self) -> None:
        """Let the others finish: the last round was a good one."""
        self.go([[]] * self._group.size)
        self._over = True

    def stop(self) -> None:
        """End a request that is not over in the other processes, once they have answered."""
        group = self._group
        if self._over:
            return
        for rank in group.others:
            if not self._answered:
                group.receive(rank)
            group.send(rank, Packet({"stop": True}))


def _plain(value: Any) -> Any:
    """A numpy number or array as JSON holds it."""
    return value.tolist()


# ---- joining -------------------------------------------------------------------------------------

_group: Group | None = None


def joined() -> Group | None:
    """The group this process has joined, None where it is alone."""
    return _group


def join() -> Group:
    """Meet the other processes; on process 0 they are let go when it ends."""
    global _group
    _group = Group()
    if _group.rank == 0:
        atexit.register(leave)
    return _group


def leave() -> None:
    """Process 0: finish what is queued, and let the others end."""
    global _group
    group, _group = _group, None
    if group is None:
        return
    close_all()
    if group.turn.acquire(timeout=5):  # else a request is stuck; the others hear of our end
        with contextlib.suppress(ProcessError):
            for rank in group.others:
                group.send(rank, Packet({"op": "end"}))
        dist.destroy_process_group()
