"""A head that does what a test says: a real control socket, a real weights server, and agents that are real."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from homeinfer.cluster.agent import Agent
from homeinfer.cluster.agent_options import AgentEvent, AgentOptions
from homeinfer.cluster.ring_client import RingClient
from homeinfer.cluster.weights.manifest import make_manifest
from homeinfer.cluster.weights.rate import RateLimit
from homeinfer.cluster.weights.serve import WeightsServer
from homeinfer.cluster.weights.store import Store
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.control import (
    EngineOptions,
    FromAgent,
    FromHead,
    Hello,
    Manifest,
    Neighbour,
    Part,
    Route,
    RouteHop,
    Source,
    Welcome,
    WindowRun,
)
from homeinfer.cluster.wire.keys import DeviceKeys, own_keys
from homeinfer.cluster.wire.secure import Secure, bound_port, frames_of, sender_key, tcp_address
from homeinfer.cluster.wire.transport import Keys, Peer
from homeinfer.engine.request import Request, Sampling
from homeinfer.folders import private_folder
from homeinfer.model.header import read_header
from tests.support.tiny_models import make_tiny_model

HERE = "127.0.0.1"
OPTIONS = EngineOptions(n_ctx=256, n_batch=64, n_seq=1)
PROMPT = tuple(range(20, 40))
_T = TypeVar("_T", bound=msgspec.Struct)


class Head:
    """Says Welcome to every Hello, beats, and keeps what it hears."""

    def __init__(self, keys: DeviceKeys, port: int | str = "*", is_allowed: Callable[[str], bool] = bool) -> None:
        self.keys = keys
        self.secure = Secure(keys)
        self._socket = self.secure.router(tcp_address(HERE, port), "control", is_allowed, control.MOST_BYTES)
        self.port = bound_port(self._socket)
        self.heard: list[FromAgent] = []
        self.device_key = ""
        self.hello: Hello | None = None
        self.welcomes = True
        self._to = b""
        self._news = asyncio.Event()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]
        self._limit = RateLimit()

    async def _listen(self) -> None:
        while True:
            frames = frames_of(await self._socket.recv_multipart(copy=False))
            message = control.from_agent(frames[1].bytes)
            if isinstance(message, Hello):
                self._to, self.device_key, self.hello = frames[0].bytes, sender_key(frames[1]), message
                if self.welcomes:
                    self.say(Welcome(message.name))
            self.heard.append(message)
            self._news.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(control.BEAT_SECONDS)
            if self._to:
                self.say(control.HeadBeat())

    def say(self, message: FromHead) -> None:
        self._socket.send_multipart([self._to, control.encode(message)])

    async def expect(self, kind: type[_T], true: Callable[[_T], bool] = lambda _m: True, seconds: float = 60) -> _T:
        """The next message of a kind; those before it, of other kinds too, are forgotten."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            while self.heard:
                message = self.heard.pop(0)
                if isinstance(message, kind) and true(message):
                    return message
                assert not isinstance(message, control.Sorry), message
            self._news.clear()
            left = deadline - asyncio.get_running_loop().time()
            assert left > 0, f"no {kind.__name__} in {seconds:.0f} seconds"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)

    def serve(self, model: Path, folder: Path) -> tuple[Manifest, Source]:
        """Serve a model's weights: its manifest, and this head as a source of all of them."""
        manifest = make_manifest(read_header(model), folder=folder)
        store = Store(folder, (model.parent,))
        store.know(manifest)
        server = WeightsServer(self.secure, tcp_address(HERE, "*"), bool, store, self._limit)
        self._tasks.append(asyncio.create_task(server.serve()))
        everything = tuple(range(len(manifest.tensors)))
        return manifest, Source("head", HERE, server.port, self.keys.public, everything)

    async def give(self, model: Path, folder: Path) -> Manifest:
        """The device gets all of a model from this head."""
        manifest, source = self.serve(model, folder)
        self.say(control.Know(manifest, source))
        assert (await self.expect(control.Holds)).tensors == ()
        self.say(control.Fetch(manifest.digest, source.tensors, (source,)))
        assert (await self.expect(control.Holds)).tensors == source.tensors
        return manifest

    async def load(self, epoch: int, part: Part) -> tuple[int, control.Loaded]:
        """The engine's port, and what it said when it was loaded."""
        self.say(control.Load(epoch, part))
        listening = await self.expect(control.Listening, lambda m: m.epoch == epoch)
        return listening.port, await self.expect(control.Loaded, lambda m: m.epoch == epoch)

    async def join(self, epoch: int, part: Part, port: int, client: RingClient) -> None:
        """All windows of a ring on one device, and the client aimed at it."""
        n = len(part.runs)
        hops = tuple(RouteHop(i, i, None) for i in range(n))
        back = Neighbour(client.address, self.keys.public)
        allowed = (self.keys.public, self.device_key)
        self.say(Route(epoch, hops, n, back, None, allowed))
        await self.expect(control.Joined, lambda m: m.epoch == epoch)
        client.retarget(epoch, Peer(tcp_address(HERE, port), self.device_key), allowed=allowed)

    def client(self) -> RingClient:
        return RingClient(tcp_address(HERE, "*"), Keys(self.keys.public, self.keys.secret, ()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self.secure.close()


@contextlib.asynccontextmanager
async def a_head(folder: Path, port: int | str = "*", is_allowed: Callable[[str], bool] = bool) -> AsyncIterator[Head]:
    """A head with its keys in `folder`, closed on the way out."""
    head = Head(own_keys(private_folder(folder)), port, is_allowed)
    try:
        yield head
    finally:
        await head.close()


def agent_options(head: Head, folder: Path) -> AgentOptions:
    """How a device with all its folders in `folder` takes part."""
    return AgentOptions(
        hosts=(HERE,),
        port=head.port,
        key=head.keys.public,
        name="desk",
        n_threads=1,
        state=str(folder / "state"),
        weights=str(folder / "weights"),
        windows=str(folder / "windows"),
    )


@contextlib.asynccontextmanager
async def an_agent(options: AgentOptions) -> AsyncIterator[tuple[Agent, list[AgentEvent]]]:
    """An agent in this process, stopped on the way out."""
    events: list[AgentEvent] = []
    agent = Agent(options, events.append)
    running = asyncio.create_task(agent.run())
    try:
        yield agent, events
    finally:
        agent.stop()
        await running


def tiny_model(folder: Path) -> Path:
    """A llama of a few layers, made of random numbers."""
    folder.mkdir()
    make_tiny_model("llama", folder / "tiny.gguf")
    return folder / "tiny.gguf"


def part_of(manifest: Manifest, *edges: tuple[int, int]) -> Part:
    """Resident windows, one for each pair of edges, the last of which is the model's last."""
    runs = tuple(WindowRun(first, last, "r") for first, last in edges)
    return Part(manifest.digest, runs, OPTIONS, stream_bytes=0, has_last=True)


async def greedy(client: RingClient, limit: int = 8) -> list[int]:
    """The answer to PROMPT."""
    tokens: list[int] = []
    request = Request(Sampling(temperature=0.0), limit, fresh=True)
    answering = client.answer(PROMPT, request, lambda told: tokens.extend(each.token for each in told), asyncio.Event())
    await asyncio.wait_for(answering, 60)
    return tokens
