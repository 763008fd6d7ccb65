"""An address of one rank that all the others of a group can reach, found by trying, and the interface that leads there.

Names of hosts are no guide: Debian gives a host's own name a loopback address, clusters have several networks, and
containers have bridges that lead nowhere.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915
_LEAD_NOWHERE = ("docker", "br-", "virbr", "veth", "cni", "podman", "lxc")


def interfaces() -> dict[str, str]:
    """IPv4 address -> name of the network interface that has it; empty where the system does not tell (not Linux)."""
    addresses: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                addresses.setdefault(socket.inet_ntoa(answer[20:24]), name)
    return addresses


def candidates(one_host: bool) -> list[str]:
    """Addresses of this host, the likeliest first.

    Args:
        one_host: all who are to connect run on this host: loopback comes first, else it comes last.
    """
    named = interfaces()
    chosen = os.environ.get(GLOO_INTERFACE, "").split(",")[0]
    first = [address for address, name in named.items() if chosen and name == chosen]
    with suppress(OSError):
        host = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
        first += [str(entry[4][0]) for entry in host if not str(entry[4][0]).startswith("127.")]
    rest = sorted(named, key=lambda address: (named[address].startswith(_LEAD_NOWHERE), address))
    rest = [address for address in rest if not address.startswith("127.")]
    ordered = [LOOPBACK, *first, *rest] if one_host and not chosen else [*first, *rest, LOOPBACK]
    return list(dict.fromkeys(ordered))


class Beacon:
    """A port of this host that others may connect to and nothing more: it reads nothing and says nothing.

    It listens on the one address on offer, or on all where several are still to be tried.
    """

    def __init__(self, backlog: int, addresses: Sequence[str]) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.bind((addresses[0] if len(addresses) == 1 else "", 0))
        self._socket.listen(backlog)  # the kernel completes connections by itself
        self.port = int(self._socket.getsockname()[1])

    def __enter__(self) -> Beacon:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()


def reachable(addresses: Sequence[str], port: int, limit_s: float = 3.0) -> dict[str, str]:
    """Which of these addresses answer, each with the interface of this host that leads there ("" if unknown)."""
    named = interfaces()
    routes: dict[str, str] = {}
    for address in addresses:
        with suppress(OSError), socket.create_connection((address, port), limit_s) as connection:
            routes[address] = named.get(connection.getsockname()[0], "")
    return routes
