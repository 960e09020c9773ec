"""Rings that are made anew while engines run: nothing of the old one counts, and answers go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest

from homeinfer.cluster.local import RingOptions
from homeinfer.cluster.ring_client import RingFailed, RingMoved, Signs
from homeinfer.cluster.ring_steps import first_step
from homeinfer.cluster.wire.messages import Step, decode, encode
from homeinfer.cluster.wire.transport import Keys, Links, Peer, new_keys
from homeinfer.engine.pipeline import Batch
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.model.header import Header, read_header
from tests.support.async_ring import LOOPBACK, AsyncRing, KeptRing, async_ring, greedy, until

OPTIONS = RingOptions(n_ctx=192, n_batch=64, n_seq=2, n_threads=1)
TWO = [[(0, 10), (20, 30)], [(10, 20)]]
"""As plans make rings: the first device has the first window and the last one."""
PROMPT: list[int] = []
"""Counting."""
LONG, MOST_TOLD = 150, 20
"""Tokens of an answer that is to be interrupted, and how many of these are kept at most."""


@pytest.fixture(scope="module")
def header(smollm2_path: Path) -> Header:
    with closing(Tokenizer(str(smollm2_path))) as tokenizer:
        PROMPT[:] = tokenizer.encode("1, 2, 3, 4, 5, 6, 7, 8,")
    return read_header(smollm2_path)


@pytest.fixture(scope="module")
def kept(header: Header) -> Iterator[KeptRing]:
    with closing(KeptRing(header, TWO, OPTIONS)) as ring:
        yield ring


async def interrupted(ring: AsyncRing, after: int) -> list[int]:
    """The first tokens of an answer in whose middle the ring is made anew: it would go on far beyond them, so that even
    who is late comes in its middle."""
    told: list[int] = []
    task = asyncio.ensure_future(ring.answer(PROMPT, greedy(LONG, fresh=True), tokens=told))
    await until(lambda: len(told) >= after, ring.engines)
    assert not task.done()
    await ring.route()
    with pytest.raises(RingMoved):
        await task
    return told[:MOST_TOLD]


def test_an_answer_goes_on_with_the_tokens_that_would_have_come(kept: KeptRing) -> None:
    async def test(ring: AsyncRing) -> None:
        whole, _ = await ring.answer(PROMPT, greedy(60))
        told = await interrupted(ring, after=7)
        rest, finish = await ring.answer([*PROMPT, *told], greedy(60, resumed=len(told)))
        assert told + rest == whole
        assert (len(whole), finish.reason) == (60, "length")

    kept.run(test)


def test_an_ordinary_answer_goes_on_with_exactly_the_tokens_that_would_have_come(
    smollm2_path: Path, kept: KeptRing
) -> None:
    """Its best tokens are at times hardly better than others: each number must be what it was."""
    with closing(Tokenizer(str(smollm2_path))) as tokenizer:
        prompt = tokenizer.encode("Once upon a time there was a small robot that")

    async def test(ring: AsyncRing) -> None:
        whole, _ = await ring.answer(prompt, greedy(40, fresh=True))
        for told in (1, 3, 5, 11, 13, 25, 39):
            request = greedy(40, fresh=True, resumed=told)
            rest, _ = await ring.answer([*prompt, *whole[:told]], request)
            assert whole[:told] + rest == whole

    kept.run(test)


def test_an_answer_longer_than_the_context_goes_on(header: Header) -> None:
    async def run() -> None:
        async with async_ring(header, TWO, msgspec.structs.replace(OPTIONS, n_ctx=64)) as ring:
            request = greedy(100, keep=4)
            whole, finish = await ring.answer(PROMPT, request)
            assert finish.shifted > 0
            rest, again = await ring.answer([*PROMPT, *whole[:80]], msgspec.structs.replace(request, resumed=80))
            assert len(rest) == 20
            assert again.shifted == finish.shifted

    asyncio.run(run())


def test_an_engine_that_was_killed_is_replaced_and_the_other_one_kept(kept: KeptRing) -> None:
    async def test(ring: AsyncRing) -> None:
        whole, _ = await ring.answer(PROMPT, greedy(30))
        told: list[int] = []
        task = asyncio.ensure_future(ring.answer(PROMPT, greedy(LONG, fresh=True), tokens=told))
        await until(lambda: len(told) >= 5, ring.engines)
        first = ring.engines[0].pid
        ring.engines[1].close()
        await asyncio.sleep(0.1)
        assert not task.done(), "nobody but the coordinator knows"
        ring.start(1)
        await ring.route()
        with pytest.raises(RingMoved):
            await task
        del told[MOST_TOLD:]
        rest, _ = await ring.answer([*PROMPT, *told], greedy(30, resumed=len(told)))
        assert told + rest == whole
        assert ring.engines[0].pid == first

    kept.run(test)


def test_a_coordinator_that_comes_back_elsewhere_is_answered_there(kept: KeptRing) -> None:
    async def test(ring: AsyncRing) -> None:
        whole, _ = await ring.answer(PROMPT, greedy(10))
        other = AsyncRing(ring.header, TWO, OPTIONS)
        other.engines, other.keys[:2], other.epoch = ring.engines, ring.keys[:2], ring.epoch
        other.client._links.allow(public for public, _ in other.keys)
        await other.route()
        again, _ = await other.answer(PROMPT, greedy(10))
        assert again == whole
        other.client.close()
        ring.epoch = other.epoch

    kept.run(test)


def test_what_strangers_and_old_epochs_say_changes_nothing(kept: KeptRing) -> None:
    async def test(ring: AsyncRing) -> None:
        whole, _ = await ring.answer(PROMPT, greedy(30))
        await ring.route()
        task = asyncio.ensure_future(ring.answer(PROMPT, greedy(30)))
        stranger = Links(LOOPBACK, Keys(*new_keys(), ()))
        device = Links(LOOPBACK, Keys(*ring.keys[1], ()))
        try:
            for said_by in (stranger, device):
                for peer in ring.peers:
                    shower(said_by, peer, ring.epoch)
            assert (await task)[0] == whole
            assert (await ring.answer(PROMPT, greedy(30, fresh=True)))[0] == whole
        finally:
            stranger.close()
            device.close()

    kept.run(test)


def shower(links: Links, peer: Peer, epoch: int) -> None:
    """Random frames, a huge one, messages of another epoch, steps that were there before, a hop that is not there."""
    random = np.random.default_rng(0)
    for n in (0, 1, 3, 40, 4000):
        links.send(peer, [random.bytes(n)])
    batch = Batch.of([7] * 20, 0)
    for old in (epoch - 1, epoch + 1000, 0):  # the next test's epoch is epoch + 1
        links.send(peer, encode(*first_step(old, -1, batch)))
    links.send(peer, encode(*first_step(epoch, 0, batch)))
    links.send(peer, encode(Step(epoch, -1, 99, 1, 0, b"")))
    links.send(peer, encode(Step(epoch, -(1 << 40), 3, 1, 0, b"")))
    links.send(peer, [random.bytes(1 << 26)])


@pytest.mark.parametrize(
    ("rows", "width", "said"),
    [
        (
            np.full(576, np.nan, np.float32),
            576,
            "what came for layer 20 can't be used: hidden states that are not numbers",
        ),
        (np.full(576, np.inf, np.float32), 576, "hidden states that are not numbers"),
        (bytes(12), 576, "12 bytes for 1 rows of 576 numbers"),
        (bytes(12), 3, "rows of 3 numbers came for layer 20"),
    ],
    ids=["nan", "inf", "short", "narrow"],
)
def test_rows_that_are_no_numbers_or_of_another_shape_are_named(
    kept: KeptRing, rows: object, width: int, said: str
) -> None:
    async def test(ring: AsyncRing) -> None:
        told = ring.route_of(0)
        with closing(Links(LOOPBACK, Keys(*ring.keys[1], told.allowed), patience_ms=30_000)) as device:
            here = Peer(device.address, ring.keys[1][0])
            hops = tuple(msgspec.structs.replace(hop, next=hop.next and here) for hop in told.hops)
            ring.epoch += 1
            ring.engines[0].route(msgspec.structs.replace(told, epoch=ring.epoch, hops=hops))
            await until(lambda: ring.engines[0].joined == ring.epoch, ring.engines)
            ring.client.retarget(ring.epoch, ring.peers[0])
            task = asyncio.ensure_future(ring.answer([7], greedy(5)))
            step, _ = decode(await asyncio.to_thread(lambda: device.receive() or []))
            assert isinstance(step, Step)
            device.send(ring.peers[0], encode(msgspec.structs.replace(step, hop=2, width=width), rows))
            with pytest.raises(RingFailed, match=said) as failure:
                await task
            assert failure.value.device == "device-1"
            assert failure.value.culprit == 1

    kept.run(test)


def test_a_device_that_is_no_longer_allowed_is_not_heard(kept: KeptRing) -> None:
    async def test(ring: AsyncRing) -> None:
        device = Links(LOOPBACK, Keys(*new_keys(), ()))
        public = device._keys.public if device._keys else ""
        engine, told = ring.engines[0], ring.route_of(0)
        ring.epoch += 1
        engine.route(msgspec.structs.replace(told, epoch=ring.epoch, allowed=(*told.allowed, public)))
        try:
            await until(lambda: engine.joined == ring.epoch, ring.engines)
            peer = Peer(ring.peers[0].address, ring.keys[0][0])
            device.send(peer, [b"noise"])
            await asyncio.sleep(0.3)
            await ring.route()
            whole, _ = await ring.answer(PROMPT, greedy(20))
            await ring.route()
            device.send(peer, encode(*first_step(ring.epoch, -(1 << 40), Batch.of([7] * 20, 0))))
            await asyncio.sleep(0.1)
            assert (await ring.answer(PROMPT, greedy(20)))[0] == whole
        finally:
            device.close()

    kept.run(test)


def test_signs_of_life_come_with_each_part_of_the_prompt(kept: KeptRing) -> None:
    async def test(ring: AsyncRing) -> None:
        signs = Signs()
        before = signs.last_heard
        tokens, _ = await ring.answer(list(range(1000, 1150)), greedy(3), signs=signs)
        assert (signs.prefilled, signs.told) == (150, len(tokens))
        assert signs.last_heard > before
        assert ring.client.longest_silence() == 0.0
        assert ring.client.under_way == 0

    kept.run(test)


def test_an_answer_without_a_ring_has_to_be_asked_again(kept: KeptRing) -> None:
    async def test(ring: AsyncRing) -> None:
        ring.client.drop()
        with pytest.raises(RingMoved):
            await ring.answer(PROMPT, greedy(3))

    kept.run(test)
