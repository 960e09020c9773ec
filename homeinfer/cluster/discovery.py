"""Own addresses, and finding a head that has another one than before by mDNS. What is found there grants nothing: the
head must still hold its key."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import socket as system_socket
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import psutil

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

_KIND = "_homeinfer._tcp.local."
_VIRTUAL = ("docker", "br-", "virbr", "veth", "vmnet", "vboxnet", "lxc", "lxd", "cni", "podman", "utun", "awdl", "llw")
_MOST_HOSTS = 8
_CLOSE_SECONDS = 5.0


class Found(msgspec.Struct, frozen=True):
    """Where a head says it is. port: of its control socket."""

    hosts: tuple[str, ...]
    port: int


def own_hosts() -> tuple[str, ...]:
    """This machine's addresses that others may reach it at, the best first: the one of the way out, other IPv4, IPv6,
    those of virtual networks; 127.0.0.1 if there are no others."""
    stats = psutil.net_if_stats()
    ranked: list[tuple[tuple[bool, bool, bool], str]] = []
    way_out = _way_out()
    for interface, addresses in psutil.net_if_addrs().items():
        if interface not in stats or not stats[interface].isup:
            continue
        for address in addresses:
            host = address.address
            if address.family in (system_socket.AF_INET, system_socket.AF_INET6) and _is_reachable(host):
                ranked.append(((host != way_out, interface.startswith(_VIRTUAL), ":" in host), host))
    hosts = tuple(dict.fromkeys(host for _, host in sorted(ranked, key=lambda pair: pair[0])))
    return hosts[:_MOST_HOSTS] or ("127.0.0.1",)


def _is_reachable(host: str) -> bool:
    """Whether others can use this address as it stands: not one that needs the name of an interface beside it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast)


def _way_out() -> str | None:
    """The address that this machine would speak from to far away, None without a route there; sends nothing."""
    with contextlib.suppress(OSError), system_socket.socket(system_socket.AF_INET, system_socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return None


@contextlib.asynccontextmanager
async def announce(key: str, port: int, hosts: Sequence[str] | None = None) -> AsyncIterator[bool]:
    """While this is open, `find` with the same key finds this machine. Yields whether that works: mDNS is a comfort,
    and where it can't be had, nothing else fails. Neither key nor name are told, only a digest of the key."""
    try:
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

        packed = [ipaddress.ip_address(host).packed for host in (hosts or own_hosts())]
        info = AsyncServiceInfo(_KIND, _instance(key), port=port, addresses=packed, server=_server(key))
        zeroconf = AsyncZeroconf()
    except (ImportError, OSError, ValueError, RuntimeError):  # RuntimeError: zeroconf's for a machine without a network
        yield False
        return
    try:
        yield await _registered(zeroconf, info)
    finally:
        await _close(zeroconf)


async def _close(zeroconf: AsyncZeroconf) -> None:
    """Nobody's end waits long for a comfort."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await zeroconf.async_close()


async def _registered(zeroconf: AsyncZeroconf, info: AsyncServiceInfo) -> bool:
    from zeroconf import Error

    try:
        await (await zeroconf.async_register_service(info, allow_name_change=False))
    except (Error, OSError, TimeoutError):
        return False
    return True


async def find(key: str, seconds: float = 3.0) -> Found | None:
    """Where the head with this key says that it is; None when nobody says so in time, or mDNS can't be had."""
    try:
        from zeroconf import Error
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

        zeroconf = AsyncZeroconf()
    except (ImportError, OSError, RuntimeError):
        return None
    try:
        info = AsyncServiceInfo(_KIND, _instance(key))
        if not await info.async_request(zeroconf.zeroconf, seconds * 1000):
            return None
        hosts = tuple(host for host in info.parsed_addresses() if _is_reachable(host))[:_MOST_HOSTS]
        return Found(hosts, info.port) if hosts and info.port else None
    except (Error, OSError):
        return None
    finally:
        await _close(zeroconf)


def _instance(key: str) -> str:
    return f"{_digest(key)}.{_KIND}"


def _server(key: str) -> str:
    return f"homeinfer-{_digest(key)}.local."


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:24]
