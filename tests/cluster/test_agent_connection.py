"""How an agent finds its head, and what it says when it does not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from homeinfer import __version__
from homeinfer.cluster import agent_connection
from homeinfer.cluster.agent_options import AgentEvent, Connected, Ended, Seeking
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.keys import own_keys
from homeinfer.cluster.wire.secure import Secure
from homeinfer.folders import private_folder
from tests.support.scripted_head import HERE, a_head, agent_options, an_agent


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is silent for a second is gone."""
    monkeypatch.setattr(agent_connection, "LOST_SECONDS", 1.5)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine does not make a head that is there one that is not, nor a name server that is away keep a test."""
    monkeypatch.setattr(agent_connection, "_KNOCK_SECONDS", 20.0)
    monkeypatch.setenv("RES_OPTIONS", "timeout:1 attempts:1")


async def complaint(events: list[AgentEvent], about: str) -> str:
    """The first reason why the head is not there that says so; on a busy machine others may come before."""
    while True:
        for event in events:
            if isinstance(event, Seeking) and about in event.reason:
                return event.reason
        await asyncio.sleep(0.02)


@pytest.mark.usefixtures("impatient")
def test_a_head_with_another_key_hears_nothing_and_the_user_a_clear_line(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_head(tmp_path / "head") as head:
            other = own_keys(private_folder(tmp_path / "other")).public
            options = msgspec.structs.replace(agent_options(head, tmp_path / "desk"), key=other)
            async with an_agent(options) as (_, events):
                reason = await complaint(events, "another head runs there")
                assert "join again with a new code" in reason
            assert head.heard == []

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_device_that_is_not_registered_hears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_connection, "LOST_SECONDS", 0.3)

    async def test() -> None:
        async with a_head(tmp_path / "head", is_allowed=lambda _key: False) as head:
            async with an_agent(agent_options(head, tmp_path / "desk")) as (_, events):
                await complaint(events, "it has forgotten this device")
            assert head.heard == []

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.usefixtures("impatient")
def test_a_port_where_nothing_listens_and_a_host_that_nobody_knows_are_named(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_head(tmp_path / "head") as head:
            options = agent_options(head, tmp_path / "desk")
        async with an_agent(options) as (_, events):
            await complaint(events, f"nothing listens at its port {options.port}")
        for nobody in ("no-such-host.invalid", "no..host"):
            nowhere = msgspec.structs.replace(options, hosts=(nobody,))
            async with an_agent(nowhere) as (_, events):
                assert "firewall" in await complaint(events, f"{nobody} can't be reached")

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("reached", ["nothing", "port", "head"])
def test_a_head_that_listens_already_but_says_nothing_may_be_starting(reached: agent_connection.Reached) -> None:
    async def test() -> None:
        async with await asyncio.start_server(lambda _r, _w: None, HERE, 0) as server:
            port = server.sockets[0].getsockname()[1]
            reason = await agent_connection.why_silent(HERE, port, reached)
            assert "may be starting" in reason
            assert "another head" not in reason

    asyncio.run(asyncio.wait_for(test(), 60))


def test_what_listens_and_is_silent_is_not_called_another_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_connection, "LOST_SECONDS", 0.3)

    async def test() -> None:
        async with a_head(tmp_path / "head") as head:
            options = agent_options(head, tmp_path / "desk")
        silent = await asyncio.start_server(lambda _r, _w: None, HERE, 0)
        its = msgspec.structs.replace(options, port=silent.sockets[0].getsockname()[1])
        async with silent, an_agent(its) as (_, events):
            await complaint(events, "the head may be starting, or busy")

    asyncio.run(asyncio.wait_for(test(), 60))


def test_the_second_address_serves_when_the_first_does_not(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_head(tmp_path / "head") as head:
            options = agent_options(head, tmp_path / "desk")
            both = msgspec.structs.replace(options, hosts=("no-such-host.invalid", HERE))
            async with an_agent(both) as (_, events):
                hello = await head.expect(control.Hello)
                assert (hello.protocol, hello.version, hello.host) == (control.PROTOCOL, __version__, HERE)
                await head.expect(control.Beat)
                assert Connected("desk", HERE) in events

    asyncio.run(asyncio.wait_for(test(), 60))


def test_what_the_network_says_of_a_head_comes_beside_what_is_known_and_not_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_connection, "LOST_SECONDS", 0.3)
    found = asyncio.Event()

    async def find() -> tuple[tuple[str, ...], int]:
        found.set()
        return (HERE,), 1

    async def test() -> None:
        async with a_head(tmp_path / "head") as head:
            place = agent_connection.HeadAddress((HERE,), head.port, head.keys.public)
        secure = Secure(own_keys(private_folder(tmp_path / "desk")))

        def hello(host: str) -> control.Hello:
            return control.Hello(control.PROTOCOL, __version__, "desk", host)

        connection = agent_connection.Connection(secure, place, hello, lambda *_: None, find)
        running = asyncio.create_task(connection.run(lambda _: None))
        await found.wait()
        async with a_head(tmp_path / "head", place.port) as head:
            await head.expect(control.Hello)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        secure.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_an_agent_without_a_head_can_be_stopped_at_any_moment(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_head(tmp_path / "head") as head:
            options = agent_options(head, tmp_path / "desk")
        refused = msgspec.structs.replace(options, hosts=(HERE, HERE, HERE))
        for number in range(12):
            async with an_agent(refused):
                await asyncio.sleep(number * 0.007)

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.usefixtures("impatient")
def test_a_silent_head_is_called_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_head(tmp_path / "head") as head:
            head.welcomes = False
            async with an_agent(agent_options(head, tmp_path / "desk")):
                await head.expect(control.Hello)
                head.welcomes = True
                await head.expect(control.Hello)
                await head.expect(control.Beat)

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (control.Refuse(2, "9.0", "the head runs homeinfer 9.0"), Ended("the head runs homeinfer 9.0", True)),
        (control.Bye(), Ended("the cluster is down")),
    ],
)
def test_an_agent_ends_when_the_head_says_so(
    tmp_path: Path, last: control.Refuse | control.Bye, expected: Ended
) -> None:
    async def test() -> None:
        async with a_head(tmp_path / "head") as head, an_agent(agent_options(head, tmp_path / "desk")) as (_, events):
            await head.expect(control.Hello)
            head.say(last)
            while expected not in events:
                await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_an_agent_that_stays_waits_for_the_cluster_to_come_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homeinfer.cluster.agent._STAY_SECONDS", 0.1)

    async def test() -> None:
        async with a_head(tmp_path / "head") as head:
            options = msgspec.structs.replace(agent_options(head, tmp_path / "desk"), stays=True)
            async with an_agent(options):
                await head.expect(control.Hello)
                head.say(control.Bye())
                await head.expect(control.Hello)
                await head.expect(control.Beat)
            await head.expect(control.Bye)

    asyncio.run(asyncio.wait_for(test(), 60))
