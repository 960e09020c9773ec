"""Quick tokens are told together: fewer messages, the same answer."""

from __future__ import annotations

import asyncio
from itertools import chain
from pathlib import Path

from homeinfer.cluster.engine_messages import Pace
from homeinfer.cluster.local import RingOptions
from homeinfer.model.header import read_header
from tests.support.async_ring import AsyncRing, async_ring, greedy, until

OPTIONS = RingOptions(n_ctx=512, n_batch=64, n_seq=2, n_threads=1)
TWO = [[(0, 10), (20, 30)], [(10, 20)]]
PROMPTS = [[5, 6, 7], [9, 10, 11, 12]]


async def told(ring: AsyncRing, prompt: list[int], limit: int) -> list[list[int]]:
    """What came together."""
    came: list[list[int]] = []
    await ring.client.answer(
        prompt,
        greedy(limit, fresh=True),
        lambda tokens: came.append([each.token for each in tokens]),
        asyncio.Event(),
    )
    return came


def test_quick_tokens_come_together_and_are_those_that_come_one_by_one(smollm2_path: Path) -> None:
    header = read_header(smollm2_path)

    async def run(pace: Pace) -> list[list[list[int]]]:
        async with async_ring(header, TWO, OPTIONS, pace) as ring:
            alone = await told(ring, PROMPTS[0], 20)
            return [alone, *await asyncio.gather(*(told(ring, prompt, 20) for prompt in PROMPTS))]

    one_by_one = asyncio.run(run(Pace()))
    gathered = asyncio.run(run(Pace(gather_ms=1000)))
    for single, together in zip(one_by_one, gathered, strict=True):
        assert [tokens for tokens in single if len(tokens) != 1] == []
        assert list(chain(*together)) == list(chain(*single))
    assert len(gathered[0]) < 15
    assert len(gathered[0][0]) == 1  # nobody waits for the first


def test_a_token_is_not_kept_back_while_another_prompt_is_read(smollm2_path: Path) -> None:
    header = read_header(smollm2_path)

    async def run() -> None:
        async with async_ring(header, TWO, OPTIONS, Pace(chunk=8, ahead=1, gather_ms=1000)) as ring:
            came: list[int] = []
            ending = asyncio.Event()
            first = ring.client.answer(PROMPTS[0], greedy(480), lambda tokens: came.append(len(tokens)), ending)
            running = asyncio.ensure_future(first)
            await until(lambda: bool(came), ring.engines)
            before = len(came)
            await told(ring, list(range(100, 200)), 1)
            ending.set()
            await running
            assert len(came) - before > 3

    asyncio.run(run())
