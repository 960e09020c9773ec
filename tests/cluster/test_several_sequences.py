"""Several answers on one ring at once: each is what it is alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from homeinfer.cluster.engine_messages import Pace
from homeinfer.cluster.local import RingOptions
from homeinfer.cluster.ring_client import RingFailed
from homeinfer.engine.request import Sampling
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.model.header import Header, read_header
from tests.support.async_ring import AsyncRing, KeptRing, async_ring, greedy, until
from tests.support.reference import Reference, agreement, references

TEXTS = (
    "1, 2, 3, 4, 5, 6,",
    "Monday, Tuesday, Wednesday,",
    "2, 4, 6, 8, 10,",
    "A, B, C, D, E, F,",
    "10, 20, 30, 40, 50,",
)
LIMIT = 16
OPTIONS = RingOptions(n_ctx=160, n_batch=64, n_seq=3, n_threads=1)
TWO = [[(0, 10), (20, 30)], [(10, 20)]]
PACES = [Pace(), Pace(groups=2), Pace(chunk=5, ahead=2)]


@pytest.fixture(scope="module")
def header(smollm2_path: Path) -> Header:
    return read_header(smollm2_path)


@pytest.fixture(scope="module")
def kept(header: Header) -> Iterator[KeptRing]:
    with closing(KeptRing(header, TWO, OPTIONS)) as ring:
        yield ring


@pytest.fixture(scope="module")
def expected(smollm2_path: Path) -> list[Reference]:
    return references(smollm2_path, TEXTS, LIMIT, longest=64, n_ctx=160)


@pytest.mark.parametrize("pace", PACES, ids=["as it comes", "two groups", "small parts"])
def test_answers_at_once_are_those_of_llama_cpp_one_after_the_other(
    kept: KeptRing, expected: list[Reference], pace: Pace
) -> None:
    async def test(ring: AsyncRing) -> None:
        found = await asyncio.gather(*(ring.answer(e.prompt, greedy(LIMIT)) for e in expected))
        assert agreement(expected, [tokens for tokens, _ in found]).ties <= 1

    kept.run(test, pace)


def test_ordinary_answers_at_once_are_exactly_what_each_is_alone(smollm2_path: Path, kept: KeptRing) -> None:
    """Their best tokens are at times hardly better than others: each number must be what it is alone."""
    with closing(Tokenizer(str(smollm2_path))) as tokenizer:
        texts = ("Once upon a time there was a small robot that", "To make bread you need", "In the year 1969")
        prompts = [tokenizer.encode(text) for text in texts]

    async def together(ring: AsyncRing, begin: int) -> list[list[int]]:
        first: list[int] = []
        tasks = [asyncio.ensure_future(ring.answer(prompts[0], greedy(40, fresh=True), tokens=first))]
        await until(lambda: len(first) >= begin, ring.engines)
        tasks += [asyncio.ensure_future(ring.answer(prompt, greedy(40, fresh=True))) for prompt in prompts[1:]]
        return [tokens for tokens, _ in await asyncio.gather(*tasks)]

    async def test(ring: AsyncRing) -> None:
        alone = [(await ring.answer(prompt, greedy(40, fresh=True)))[0] for prompt in prompts]
        for begin in (0, 1, 9, 20):
            assert await together(ring, begin) == alone

    kept.run(test, Pace(groups=2))


def test_one_answer_is_stopped_and_another_refused_while_a_third_goes_on(
    kept: KeptRing, expected: list[Reference]
) -> None:
    async def test(ring: AsyncRing) -> None:
        stop, told = asyncio.Event(), list[int]()
        third = asyncio.ensure_future(ring.answer(expected[0].prompt, greedy(LIMIT)))
        stopped = asyncio.ensure_future(ring.answer(expected[1].prompt, greedy(150), stop, told))
        await until(lambda: len(told) >= 3, ring.engines)
        stop.set()
        assert (await stopped)[1].reason == "cancelled"
        with pytest.raises(RingFailed, match="the grammar can't be read"):
            await ring.answer([5], greedy(3, sampling=Sampling(grammar="rut ::= [")))
        with pytest.raises(RingFailed, match="does not fit a context of 160"):
            await ring.answer([5] * 160, greedy(3))
        assert agreement(expected[:1], [(await third)[0]]).ties == 0

    kept.run(test)


def test_a_task_that_is_cancelled_stops_its_answer(header: Header) -> None:
    async def run() -> None:
        async with async_ring(header, TWO, RingOptions(n_ctx=4096, n_batch=64, n_threads=1)) as ring:
            told: list[int] = []
            task = asyncio.ensure_future(ring.answer([5, 6, 7], greedy(4000), tokens=told))
            await until(lambda: len(told) >= 3, ring.engines)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            tokens, _ = await ring.answer([5, 6, 7], greedy(3))
            assert len(tokens) == 3, "the only sequence is free again"

    asyncio.run(run())


def test_each_conversation_finds_its_own_memory(smollm2_path: Path, kept: KeptRing) -> None:
    with closing(Tokenizer(str(smollm2_path))) as tokenizer:
        texts = [tokenizer.encode(f"The {thing} is a kind of thing that people") for thing in ("horse", "boat", "tree")]

    async def test(ring: AsyncRing) -> None:
        for turn in range(3):
            for number, text in enumerate(texts):
                tokens, finish = await ring.answer(text, greedy(6, session=f"{number:032x}"))
                assert turn == 0 or finish.reused >= len(text) - 2
                text += [*tokens, 28]

    kept.run(test)
