"""Finding a head by mDNS, and own addresses."""

from __future__ import annotations

import asyncio
import ipaddress

from homeinfer.cluster.discovery import Found, announce, find, own_hosts
from homeinfer.cluster.wire.transport import new_keys


def test_own_hosts_are_addresses_that_others_can_use() -> None:
    hosts = own_hosts()
    assert hosts
    assert len(set(hosts)) == len(hosts)
    addresses = [ipaddress.ip_address(host) for host in hosts]
    assert hosts == ("127.0.0.1",) or not any(a.is_loopback or a.is_link_local for a in addresses)


def test_who_announces_itself_is_found_by_its_key_until_it_leaves() -> None:
    key, other = new_keys()[0], new_keys()[0]

    async def test() -> tuple[bool, list[Found | None]]:
        async with announce(key, 47710, ("192.0.2.7", "2001:db8::7")) as works:
            during = [await find(key, 30), await find(other, 0.4)]
        return works, [*during, await find(key, 0.4)]

    works, (found, nobody, left) = asyncio.run(test())
    assert found == (Found(("192.0.2.7", "2001:db8::7"), 47710) if works else None)
    assert nobody is None
    assert left is None


def test_hosts_that_are_no_addresses_announce_nothing() -> None:
    async def test() -> bool:
        async with announce(new_keys()[0], 47710, ("not an address",)) as works:
            return works

    assert asyncio.run(test()) is False
