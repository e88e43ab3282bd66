"""This host on the network: its address, the interface that leads to another host, a free port."""

from __future__ import annotations

import socket

import psutil

LOOPBACK = "127."


def own_address() -> str:
    """This host's first IPv4 address that others may reach; where there are several networks, export MASTER_ADDR."""
    return next((address for _, address in _addresses() if not address.startswith(LOOPBACK)), "127.0.0.1")


def address_towards(host: str) -> str | None:
    """The address packets to ``host`` leave from; None where the name or the route is not known."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: the kernel only chooses the route
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_towards(host: str) -> str | None:
    """Name of the interface that has that address."""
    mine = address_towards(host)
    return next((name for name, address in _addresses() if address == mine), None)


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _addresses() -> list[tuple[str, str]]:
    """(interface, IPv4 address) of every interface that is up."""
    up = {name for name, facts in psutil.net_if_stats().items() if facts.isup}
    return [(name, a.address) for name, found in psutil.net_if_addrs().items() if name in up for a in found if a.family == socket.AF_INET]
