"""Weights over real sockets: from several devices, of which one lies or leaves, resumed, limited, and never trusted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

import psutil
import pytest

from homeinfer.cluster.weights import room
from homeinfer.cluster.weights.fetch import FetchProgress, Patience, fetch_headers, fetch_tensors
from homeinfer.cluster.weights.manifest import make_manifest, needed_tensors
from homeinfer.cluster.weights.messages import MOST_PIECE_BYTES, Have, HaveNot, Want, answer_of, encode
from homeinfer.cluster.weights.rate import RateLimit
from homeinfer.cluster.weights.store import Store
from homeinfer.cluster.wire.control import Manifest, Source
from homeinfer.cluster.wire.secure import Secure, tcp_address
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.model.window_file import cut_windows
from tests.cluster.weights_peers import LyingStore, holding, peers

IMPATIENT = Patience(silence=0.7, retry=0.2, give_up=10.0)
SLOW = 15_000_000
"""Bytes per second, so that a fetch of some layers takes long enough for something to happen in it."""


class Model:
    """The small model, and the layers that most tests fetch: 18 MB."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.header: Header = read_header(path)
        self.manifest: Manifest = make_manifest(self.header, folder=folder)
        self.tensors = needed_tensors(self.header, self.manifest, 3, 8)
        self.nbytes = sum(self.manifest.tensors[n].nbytes for n in self.tensors)


@pytest.fixture(scope="module")
def model(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(smollm2_path, tmp_path_factory.mktemp("manifest"))


def empty(model: Model, folder: Path) -> Store:
    store = Store(folder)
    store.know(model.manifest)
    return store


def full(model: Model, folder: Path, kind: Callable[[Path, Sequence[Path]], Store] = Store) -> Store:
    return holding(kind(folder, [model.path]), model.manifest)


def assert_right(model: Model, store: Store, tensors: Sequence[int]) -> None:
    """Byte for byte, as the file on disk says."""
    assert set(tensors) <= set(store.holds())
    ours = Path(store.header().files[0].path).read_bytes()
    for n in tensors:
        tensor = model.manifest.tensors[n]
        assert hashlib.sha256(ours[tensor.offset : tensor.offset + tensor.nbytes]).hexdigest() == tensor.digest


def run(test: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.01)


def test_a_window_comes_from_another_device_and_goes_on_to_a_third(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "head")).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            told: list[FetchProgress] = []
            got = await fetch_tensors(desk.secure, desk.store, model.tensors, [head.source()], RateLimit(), told.append)
            assert (got.nbytes, got.liars, got.lost) == (model.nbytes, (), ())
            assert told[-1].share == 1.0
            desk.serve()
            tablet = make("tablet", empty(model, tmp_path / "tablet"))
            await fetch_headers(tablet.secure, tablet.store, [desk.source()], RateLimit())
            await fetch_tensors(tablet.secure, tablet.store, model.tensors, [desk.source()], RateLimit())
            assert_right(model, tablet.store, model.tensors)
            [cut] = tablet.store.cut(((3, 8),), tmp_path / "cut")
            [original] = cut_windows(model.header, ((3, 8),), tmp_path / "original")
            assert cut.read_bytes() == original.read_bytes()
            again = await fetch_tensors(tablet.secure, tablet.store, model.tensors, [], RateLimit())
            assert again.nbytes == 0

    run(main())


def test_a_source_that_lies_is_named_and_replaced(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            honest = make("honest", full(model, tmp_path / "a"), SLOW).serve()
            liar = make("liar", full(model, tmp_path / "b", LyingStore)).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            told: list[FetchProgress] = []
            sources = [liar.source(), honest.source()]
            got = await fetch_tensors(desk.secure, desk.store, model.tensors, sources, RateLimit(), told.append)
            assert got.liars == ("liar",)
            assert "liar sent wrong weights" in told[-1].detail
            assert_right(model, desk.store, model.tensors)

    run(main())


def test_when_all_lie_nothing_is_believed(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            liar = make("liar", full(model, tmp_path / "b", LyingStore)).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            with pytest.raises(HomeinferError, match=r"can't be got .*: liar sent wrong bytes; see that"):
                await fetch_tensors(desk.secure, desk.store, model.tensors, [liar.source()], RateLimit())
            assert desk.store.holds() == ()

    run(main())


def test_a_source_that_dies_in_the_middle_is_replaced(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            dying = make("dying", full(model, tmp_path / "a"), SLOW).serve()
            other = make("other", full(model, tmp_path / "b"), SLOW).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            sources = [dying.source(), other.source()]
            fetching = asyncio.create_task(
                fetch_tensors(desk.secure, desk.store, model.tensors, sources, RateLimit(), patience=IMPATIENT)
            )
            await until(lambda: dying.server.sent_bytes > 2 << 20)
            await dying.stop()
            got = await fetching
            assert got.lost == ("dying",)
            assert got.liars == ()
            assert_right(model, desk.store, model.tensors)

    run(main())


def test_the_only_source_goes_and_comes_back(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "a"), SLOW).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            fetching = asyncio.create_task(
                fetch_tensors(desk.secure, desk.store, model.tensors, [head.source()], RateLimit(), patience=IMPATIENT)
            )
            await until(lambda: head.server.sent_bytes > 2 << 20)
            await head.stop()
            await asyncio.sleep(0.7)
            head.serve()
            await fetching
            assert_right(model, desk.store, model.tensors)

    run(main())


def test_a_cancelled_fetch_goes_on_where_it_was(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "a"), SLOW).serve()
            first = make("first", empty(model, tmp_path / "desk"))
            fetching = asyncio.create_task(
                fetch_tensors(first.secure, first.store, model.tensors, [head.source()], RateLimit())
            )
            await until(lambda: head.server.sent_bytes > model.nbytes // 2)
            fetching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await fetching
            first.store.close()
            second = make("second", empty(model, tmp_path / "desk"))
            got = await fetch_tensors(second.secure, second.store, model.tensors, [head.source()], RateLimit())
            assert 0 < got.nbytes < model.nbytes * 0.7
            assert_right(model, second.store, model.tensors)

    run(main())


def test_headers_of_another_model_are_not_taken(model: Model, tmp_path: Path) -> None:
    class WrongHeader(Store):
        def read(self, digest: str, file: int, offset: int, nbytes: int) -> bytes | None:
            data = super().read(digest, file, offset, nbytes)
            return None if data is None else b"\0" * len(data)

    async def main() -> None:
        async with peers() as make:
            wrong = make("wrong", full(model, tmp_path / "a", WrongHeader)).serve()
            right = make("right", full(model, tmp_path / "b")).serve()
            without = make("without", Store(tmp_path / "c")).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            with pytest.raises(HomeinferError, match=r"wrong sent another header .*; without has not this model; see"):
                await fetch_headers(desk.secure, desk.store, [wrong.source(), without.source()], RateLimit())
            assert desk.store.missing_headers == (0,)
            await fetch_headers(desk.secure, desk.store, [wrong.source(), right.source()], RateLimit())
            assert desk.store.header().tensors == model.header.tensors

    run(main())


def test_tensors_that_no_source_has_are_said_at_once(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "a")).serve()
            claims_too_much = make("claims", empty(model, tmp_path / "b"))
            await fetch_headers(claims_too_much.secure, claims_too_much.store, [head.source()], RateLimit())
            claims_too_much.serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            for sources in ([head.source(model.tensors[1:])], [claims_too_much.source(model.tensors)]):
                with pytest.raises(HomeinferError, match="no device that was asked has them"):
                    await fetch_tensors(desk.secure, desk.store, model.tensors, sources, RateLimit())

    run(main())


def test_a_full_disk_ends_a_fetch_in_one_line(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "a")).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            monkeypatch.setattr(room, "free_bytes", lambda _folder: 1 << 20)
            with pytest.raises(
                HomeinferError, match=r"need 11 MB more in .* where 1 MB are free and 268 MB stay so: make room"
            ):
                await fetch_tensors(desk.secure, desk.store, model.tensors, [head.source()], RateLimit())
            assert head.server.sent_bytes <= model.manifest.files[0].header_bytes

    run(main())


async def ask(secure: Secure, source: Source, frames: list[bytes]) -> list[bytes] | None:
    """The answer within half a second to raw frames."""
    socket = secure.dealer(tcp_address(source.host, source.port), source.key, 2 << 20)
    try:
        await socket.send_multipart(frames)
        return await socket.recv_multipart() if await socket.poll(500) else None
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
            silent = await asyncio.gather(*(ask(enemy.secure, desk.source(), frames) for frames in dropped))
            assert silent == [None] * len(dropped)
            answer = await ask(enemy.secure, desk.source(), want(held.offset, 10))
            assert answer is not None
            assert answer_of(answer[0]) == Have(1)
            desk.refused.add(enemy.keys.public)
            assert await ask(enemy.secure, desk.source(), want(held.offset, 10)) is None

    run(main())


def test_a_device_that_is_forgotten_in_the_middle_gets_no_more(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "a"), SLOW).serve()
            desk = make("desk", empty(model, tmp_path / "desk"))
            patience = Patience(silence=0.5, retry=0.1, give_up=1.0)
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


def test_a_device_that_asks_and_never_reads_costs_little_and_others_are_served(model: Model, tmp_path: Path) -> None:
    async def main() -> None:
        async with peers() as make:
            head = make("head", full(model, tmp_path / "a")).serve()
            greedy = make("greedy", Store(tmp_path / "greedy"))
            large = max(model.manifest.tensors, key=lambda t: t.nbytes)
            socket = greedy.secure.dealer(tcp_address("127.0.0.1", head.port), head.keys.public, 2 << 20)
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
            socket.close(linger=0)
            assert_right(model, desk.store, model.tensors)

    run(main())
