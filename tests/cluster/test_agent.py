"""An agent and its head: real sockets, real engines, weights that really travel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from homeinfer.cluster import agent_engine
from homeinfer.cluster.agent import Agent
from homeinfer.cluster.agent_options import AgentEvent, Ended, EngineNow, Seeking
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.control import WindowRun
from homeinfer.model.header import read_header
from homeinfer.model.window_plan import n_layers
from tests.support.processes import engines
from tests.support.scripted_head import Head, a_head, agent_options, an_agent, greedy, part_of, tiny_model


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


def test_a_device_fetches_loads_answers_and_survives_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_engine, "oom_kills", lambda: 0)  # of the whole machine, whatever else runs there
    model = tiny_model(tmp_path / "model")
    n = n_layers(read_header(model))

    async def test() -> None:
        async with a_head(tmp_path / "head") as head, an_agent(agent_options(head, tmp_path / "desk")) as (_, events):
            await head.expect(control.Beat)
            manifest = await head.give(model, tmp_path / "head-weights")
            part = part_of(manifest, (0, 2), (2, n))
            client = head.client()
            port, loaded = await head.load(1, part)
            assert loaded.can_shift
            await head.join(1, part, port, client)
            tokens = await greedy(client)
            assert len(tokens) == 8

            (engine,) = engines()
            port, _ = await head.load(2, part)  # an equal part: the same engine, empty
            await head.join(2, part, port, client)
            assert engines() == [engine]
            assert await greedy(client) == tokens

            engine.kill()
            gone = await head.expect(control.EngineGone)
            assert (gone.epoch, gone.is_memory) == (2, False)
            assert "SIGKILL" in gone.reason
            port, _ = await head.load(3, part)
            await head.join(3, part, port, client)
            assert await greedy(client) == tokens

            streamed = (WindowRun(0, 2, "r"), WindowRun(2, n - 1, "s"), WindowRun(n - 1, n, "r"))
            other = msgspec.structs.replace(part, runs=streamed, stream_bytes=1 << 20)
            port, _ = await head.load(4, other)
            await head.join(4, other, port, client)
            assert await greedy(client) == tokens
            assert len(engines()) == 1
            assert len(list((tmp_path / "desk" / "windows" / "cluster").iterdir())) == 4
            head.say(control.Unload())
            await head.expect(control.Beat, lambda _beat: not engines())
            client.close()
        assert isinstance(events[-1], Ended)
        assert not engines()

    run(test())


@asynccontextmanager
async def loaded(folder: Path) -> AsyncIterator[tuple[Head, Agent, list[AgentEvent], control.Part, int]]:
    """A head, and an agent whose engine has two windows; the part, and the engine's port."""
    model = tiny_model(folder / "model")
    n = n_layers(read_header(model))
    async with a_head(folder / "head") as head, an_agent(agent_options(head, folder / "desk")) as (agent, events):
        await head.expect(control.Hello)
        part = part_of(await head.give(model, folder / "head-weights"), (0, 1), (1, n))
        port, _ = await head.load(1, part)
        assert len(engines()) == 1
        yield head, agent, events, part, port


def test_the_engine_is_kept_while_the_head_is_away(tmp_path: Path) -> None:
    async def test() -> None:
        async with loaded(tmp_path) as (head, _, events, part, port):
            (engine,) = engines()
            await head.close()
            while not (isinstance(events[-1], Seeking) and events[-1].reason):
                await asyncio.sleep(0.05)
            async with a_head(tmp_path / "head", head.port) as again:
                hello = await again.expect(control.Hello)
                assert hello.engine is not None
                assert (hello.engine.part, hello.engine.port) == (part, port)
                client = again.client()
                assert (await again.load(2, part))[0] == port
                await again.join(2, part, port, client)
                assert len(await greedy(client)) == 8
                assert engines() == [engine]
                client.close()

    run(test())


def test_the_engine_is_not_kept_for_ever(tmp_path: Path) -> None:
    async def test() -> None:
        async with loaded(tmp_path) as (head, agent, events, _, _):
            await head.close()
            # not before: a head that is there says something every second
            agent._options = msgspec.structs.replace(agent._options, keep_seconds=0.5)
            while EngineNow("none") not in events:
                await asyncio.sleep(0.05)
            assert not engines()

    run(test())
