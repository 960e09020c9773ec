"""Weights over real sockets: from several devices, of which one lies or leaves, resumed, limited, and never trusted."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from homeinfer.cluster.weights import room
from homeinfer.cluster.weights.fetch import FetchProgress, Patience, fetch_headers, fetch_tensors
from homeinfer.cluster.weights.rate import RateLimit
from homeinfer.cluster.weights.store import Store
from homeinfer.errors import HomeinferError
from homeinfer.model.window_file import cut_windows
from tests.cluster.weights_peers import SLOW, LyingStore, Model, assert_right, empty, full, peers, run, until

IMPATIENT = Patience(silence=1.2, retry=0.2, give_up=20.0)


@pytest.fixture(scope="module")
def model(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(smollm2_path, tmp_path_factory.mktemp("manifest"))


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
            assert "dying" in got.lost
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
            await until(lambda: head.server.sent_bytes > model.nbytes * 2 // 3)
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
