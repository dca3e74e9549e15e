"""How the processes of a run find each other: a store with keys of their own, a network device."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import sys
import time
import uuid
from datetime import timedelta
from typing import Any

from cookbook_core.errors import ConfigError, ProcessError

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

VARIABLE = "GLOO_SOCKET_IFNAME"
"""Environment variable with the device that gloo uses."""
_SIOCGIFADDR = 0x8915


def open_store(timeout: timedelta) -> tuple[Any, int, int]:
    """Wait until all processes have started.

    torchrun keeps one store over restarts, in which the addresses of dead processes remain, and
    those who read them could not connect. So rank 0 names each start anew, and tells the name to
    every process under a key that this process has just made up.

    Returns:
        A store in which only the processes of this start write; this process's rank; their number.

    Raises:
        ProcessError: some did not start in time.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"here/{rank}", own)
        try:
            start = store.get(f"start/{own}").decode()
        except RuntimeError as error:
            raise _not_started(size, str(error).partition("\n")[0]) from error
        store.add(f"ready/{start}", 1)
        return PrefixStore(start, store), rank, size
    while (ready := store.add(f"ready/{own}", 0)) < size - 1:
        for key in (f"here/{other}" for other in range(1, size)):
            if store.check([key]):  # maybe written before the restart; then again soon
                store.set(f"start/{store.get(key).decode()}", own)
        if time.monotonic() > deadline:
            raise _not_started(size, 1 + ready)
        time.sleep(0.02)
    return PrefixStore(own, store), rank, size


def _not_started(size: int, got: Any) -> ProcessError:
    what, fix = "not all processes started", "Give the same command on every machine."
    return ProcessError("torchrun", what, expected=size, got=got, fix=fix)


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME where it is not set.

    On one machine the loopback device. On several the device of the route to MASTER_ADDR: by itself
    gloo listens on the address of this machine's name, which many distributions set to 127.0.1.1,
    and the others then try to connect for ever.

    Raises:
        ConfigError: no address of this machine is known that the others can reach.
    """
    if VARIABLE in os.environ:
        return
    master, name = os.environ["MASTER_ADDR"], socket.gethostname()
    here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if here or master in ("localhost", "127.0.0.1"):
        if loopback := {"linux": "lo", "darwin": "lo0"}.get(sys.platform):
            os.environ[VARIABLE] = loopback
        return
    address = _own_address(master)
    if address is None:
        return
    if not _is_loopback(address):
        if device := _device_of(address):
            os.environ[VARIABLE] = device
    elif (own := _own_address(name)) is None or _is_loopback(own):
        devices = ", ".join(device for _, device in socket.if_nameindex() if device != "lo")
        raise ConfigError(
            "MASTER_ADDR",
            f"{master} and this machine's name, {name}, are loopback addresses on this machine",
            expected="an address by which the other machines reach it",
            got=address,
            fix="Give torchrun that address as --rdzv_endpoint (or --master_addr), or set "
            f"{VARIABLE} to the network device to use: {devices}.",
        )


def _own_address(peer: str) -> str | None:
    """The IPv4 address of this machine on the route to `peer`; None if there is none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # a datagram socket: nothing is sent
        return probe.getsockname()[0]
    return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _device_of(address: str) -> str | None:
    """The network device with this IPv4 address; None where that is unknown (not on Linux)."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, device in socket.if_nameindex():
            with contextlib.suppress(OSError):  # has no IPv4 address
                request = struct.pack("256s", device.encode())
                found = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)[20:24]
                if socket.inet_ntoa(found) == address:
                    return device
    return None
