"""What a device gives away of its weights: to whom, how much, how fast."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
import zmq
import zmq.asyncio

from homeinfer.cluster.weights.fetch import Patience, fetch_tensors
from homeinfer.cluster.weights.messages import MOST_PIECE_BYTES, Have, HaveNot, Want, answer_of, encode
from homeinfer.cluster.weights.rate import RateLimit
from homeinfer.cluster.weights.store import Store
from homeinfer.cluster.wire.control import Source
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.secure import Secure, tcp_address
from homeinfer.errors import HomeinferError
from tests.cluster.weights_peers import SLOW, Model, assert_right, empty, full, peers, run, until


@pytest.fixture(scope="module")
def model(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(smollm2_path, tmp_path_factory.mktemp("manifest"))


async def ask(secure: Secure, source: Source, *messages: list[bytes], seconds: float = 30) -> list[bytes] | None:
    """The first answer to raw messages, one after the other; the last is said again each second, since the first may
    have cost the connection."""
    socket = secure.dealer(tcp_address(source.host, source.port), source.key, 2 << 20)
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        for frames in messages[:-1]:
            await socket.send_multipart(frames)
        while asyncio.get_running_loop().time() < deadline:
            await socket.send_multipart(messages[-1])
            if await socket.poll(int(min(seconds, 1) * 1000)):
                return await socket.recv_multipart()
        return None
    finally:
        socket.close(linger=0)


def test_hostile_requests_get_nothing(model: Model, tmp_path: Path) -> None:
    manifest = model.manifest
    held = manifest.tensors[model.tensors[0]]
    not_held = next(t for n, t in enumerate(manifest.tensors) if n not in model.tensors)
    header_bytes = manifest.files[0].header_bytes

    def want(offset: int, nbytes: int, file: int = 0, digest: str = manifest.digest) -> list[bytes]:
        return [encode(Want(1, digest, file, offset, nbytes))]

    refused = [
        want(not_held.offset, 10),
        want(held.offset - 1, 10),
        want(held.offset + held.nbytes - 5, 10),
        want(header_bytes - 5, 10),
        want(manifest.files[0].nbytes - 5, 10),
        want(1 << 49, 10),
        want(held.offset, 10, file=1),
        want(held.offset, 10, digest="0" * 64),
    ]
    dropped = [
        want(-1, 10),
        want(held.offset, MOST_PIECE_BYTES + 1),
        want(held.offset, 0),
        want(held.offset, -5),
        want(1 << 62, 10),
        want(held.offset, 10, digest="../../etc/passwd"),
        [b""],
        [b"\xff" * 400],
        [b"\x91" * 400],
        [*want(held.offset, 10), b"more"],
        [b"x" * 100_000],
    ]

    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "a")).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            await fetch_tensors(desk.secure, desk.store, model.tensors, [head.source()], RateLimit())
            desk.serve()
            enemy = make("enemy", Store(tmp_path / "enemy"))
            answers = await asyncio.gather(*(ask(enemy.secure, desk.source(), frames) for frames in refused))
            assert [answer and answer_of(answer[0]) for answer in answers] == [HaveNot(1)] * len(refused)
            assert all(answer is not None and answer[1:] == [b""] for answer in answers)
            good = [encode(Want(2, manifest.digest, 0, held.offset, 10))]
            later = await asyncio.gather(*(ask(enemy.secure, desk.source(), frames, good) for frames in dropped))
            # to what came before it there was no answer
            assert [answer and answer_of(answer[0]) for answer in later] == [Have(2)] * len(dropped)
            desk.refused.add(enemy.keys.public)
            assert await ask(enemy.secure, desk.source(), want(held.offset, 10), seconds=0.5) is None

    run(main())


def test_a_device_that_is_forgotten_in_the_middle_gets_no_more(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "a"), SLOW).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            patience = Patience(silence=0.5, retry=0.1, give_up=3.0)
            fetching = asyncio.create_task(
                fetch_tensors(desk.secure, desk.store, model.tensors, [head.source()], RateLimit(), patience=patience)
            )
            await until(lambda: head.server.sent_bytes > 2 << 20)
            head.refused.add(desk.keys.public)
            with pytest.raises(HomeinferError, match="head did not answer"):
                await fetching

    run(main())


def test_a_limit_holds_and_can_be_lifted_while_running(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "a")).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            limit = RateLimit(2_000_000)
            loop = asyncio.get_running_loop()
            began = loop.time()
            fetching = asyncio.create_task(
                fetch_tensors(desk.secure, desk.store, model.tensors, [head.source()], limit)
            )
            await asyncio.sleep(0.7)
            assert head.server.sent_bytes < 2_000_000 * (loop.time() - began) + (2 << 20)
            assert not fetching.done()
            limit.set(0)
            await fetching
            assert_right(model, desk.store, model.tensors)

    run(main())


def test_who_waits_under_a_limit_goes_on_when_it_is_lifted() -> None:
    async def main() -> None:
        limit = RateLimit(1)
        await limit.take(1 << 20)
        waiting = [asyncio.create_task(limit.take(1 << 20)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        limit.set(0)
        await asyncio.wait_for(asyncio.gather(*waiting), 10)

    run(main())


def never_read(context: zmq.asyncio.Context, keys: DeviceKeys, address: str, server_key: str) -> zmq.asyncio.Socket:
    """A device's socket without homeinfer's own care: what nobody takes fills the network."""
    socket: zmq.asyncio.Socket = context.socket(zmq.DEALER)
    socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
    socket.curve_serverkey = server_key.encode()
    socket.rcvhwm = 2
    socket.connect(address)
    return socket


def test_a_device_that_asks_and_never_reads_costs_little_and_others_are_served(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "a")).serve()
            greedy = make("greedy", Store(tmp_path / "greedy"))
            large = max(model.manifest.tensors, key=lambda t: t.nbytes)
            context = zmq.asyncio.Context()
            socket = never_read(context, greedy.keys, tcp_address("127.0.0.1", head.port), head.keys.public)
            request = encode(Want(1, model.manifest.digest, 0, large.offset, MOST_PIECE_BYTES))
            desk = make("desk", empty(model, tmp_path / "desk"))

            before = psutil.Process().memory_info().rss

            async def flood() -> None:
                while True:
                    for _ in range(16):
                        await socket.send(request)
                    await asyncio.sleep(0.02)

            flooding = asyncio.create_task(flood())
            await until(lambda: head.server.sent_bytes > 400_000_000)
            assert psutil.Process().memory_info().rss - before < 200_000_000
            await fetch_tensors(desk.secure, desk.store, model.tensors, [head.source()], RateLimit())
            flooding.cancel()
            context.destroy(linger=0)
            assert_right(model, desk.store, model.tensors)

    run(main())
