"""The connection to one device that serves weights: what it was asked for, and what it answers."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from homeinfer.cluster.weights.messages import MOST_ANSWER_BYTES, HaveNot, Want, answer_of, encode
from homeinfer.cluster.weights.schedule import Piece
from homeinfer.cluster.wire.control import Source
from homeinfer.cluster.wire.secure import Secure, received, tcp_address
from homeinfer.errors import HomeinferError

CREDIT: Final = 8
"""Pieces under way from one source: 2 MiB, a gigabit's worth of any delay at home. On a slow link they are seconds, for
which whatever comes behind them waits."""
_RESTS: Final = 3
_LONGEST_REST: Final = 10.0


class Patience(msgspec.Struct, frozen=True):
    """Seconds. silence: without a byte from a source that was asked, after which others are asked instead; retry: until
    it is tried again; give_up: without a byte from any."""

    silence: float = 8.0
    retry: float = 3.0
    give_up: float = 45.0


def rest_seconds(took: float, since: float) -> float:
    """How long to leave the link to others, `since` seconds after a piece came that took so many: they have it three
    times as long as the piece did, whatever the link's rate is."""
    return min(max(_RESTS * took - since, 0.0), _LONGEST_REST)


class SourceLink:
    """One source's socket."""

    def __init__(self, secure: Secure, source: Source) -> None:
        """Connects; raises HomeinferError for what is no address."""
        self.source = source
        self._socket = secure.dealer(tcp_address(source.host, source.port), source.key, MOST_ANSWER_BYTES)
        self._under_way: dict[int, Piece] = {}
        self._next_id = 0
        self._asked_at = self._answered_at = 0.0

    @property
    def under_way(self) -> int:
        """Requests without an answer so far."""
        return len(self._under_way)

    def has_credit(self, *, is_polite: bool) -> bool:
        """Whether more may be asked for; of a polite one, one piece at a time."""
        return len(self._under_way) < (1 if is_polite else CREDIT)

    def rest_seconds(self, now: float) -> float:
        """How long not to ask for the next piece."""
        return rest_seconds(self._answered_at - self._asked_at, now - self._answered_at)

    async def ask(self, digest: str, file: int, offset: int, nbytes: int, piece: Piece) -> None:
        """Bytes [offset, offset + nbytes) of a file, which are this piece."""
        self._next_id += 1
        self._under_way[self._next_id] = piece
        self._asked_at = time.monotonic()
        await self._socket.send(encode(Want(self._next_id, digest, file, offset, nbytes)))

    async def answer(self, seconds: float) -> tuple[Piece, memoryview | None] | None:
        """The next answer: a piece and its bytes, None for bytes that the source has not; None after a silence of so
        many seconds. Raises HomeinferError for what was not asked for, or not in this length."""
        frames = await received(self._socket, seconds)
        if frames is None:
            return None
        self._answered_at = time.monotonic()
        answer = answer_of(frames[0].buffer)
        piece = self._under_way.pop(answer.id, None)
        if piece is None or len(frames) != 2:
            raise HomeinferError("it answers what it was not asked")
        if isinstance(answer, HaveNot):
            return piece, None
        data = memoryview(frames[1].buffer)
        if data.nbytes != piece.nbytes:
            raise HomeinferError(f"it sent {data.nbytes:,} bytes for {piece.nbytes:,}")
        return piece, data

    def close(self) -> None:
        self._socket.close(linger=0)
