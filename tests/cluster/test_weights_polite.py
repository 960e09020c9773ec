"""Weights that come while answers are being written leave most of any link to the answers."""

from __future__ import annotations

import asyncio

import pytest

from homeinfer.cluster.weights.fetch_source import CREDIT, SourceLink, rest_seconds
from homeinfer.cluster.weights.rate import RateLimit
from homeinfer.cluster.weights.schedule import Piece
from homeinfer.cluster.wire.control import Source
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.secure import Secure
from homeinfer.cluster.wire.transport import new_keys


@pytest.mark.parametrize(("took", "since", "rest"), [(0.4, 0.0, 1.2), (0.4, 1.0, 0.2), (0.4, 5.0, 0.0), (60, 0, 10)])
def test_a_link_rests_three_times_as_long_as_a_piece_took(took: float, since: float, rest: float) -> None:
    assert rest_seconds(took, since) == pytest.approx(rest)


def test_under_a_limit_one_piece_at_a_time_is_asked_for() -> None:
    async def main() -> None:
        secure = Secure(DeviceKeys(*new_keys()))
        link = SourceLink(secure, Source("desk", "127.0.0.1", 9, new_keys()[0], (0,)))
        try:
            assert link.has_credit(is_polite=True)
            for n in range(CREDIT):
                assert link.has_credit(is_polite=False)
                await link.ask("d" * 64, 0, n, 1, Piece(0, n, 1))
                assert not link.has_credit(is_polite=True)
            assert not link.has_credit(is_polite=False)
        finally:
            link.close()
            secure.close()

    asyncio.run(main())


def test_a_rest_ends_when_the_limit_is_lifted() -> None:
    async def main() -> None:
        limit = RateLimit(1000)
        resting = asyncio.create_task(limit.rest(600))
        await asyncio.sleep(0)
        limit.set(0)
        await asyncio.wait_for(resting, 20)
        await limit.rest(0.001)

    asyncio.run(main())


def test_a_wait_that_is_cancelled_while_its_limit_is_lifted_is_cancelled() -> None:
    async def main() -> None:
        for rounds_later in range(6):
            limit = RateLimit(1000)
            resting = asyncio.create_task(limit.rest(600))
            await asyncio.sleep(0.01)
            limit.set(0)
            for _ in range(rounds_later):
                await asyncio.sleep(0)
            if not resting.done():
                resting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await resting

    asyncio.run(main())
