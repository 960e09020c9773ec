"""The connection to one device that serves weights: what it was asked for, and what it answers."""

from __future__ import annotations

from typing import Final

import msgspec

from homeinfer.cluster.weights.messages import MOST_ANSWER_BYTES, HaveNot, Want, answer_of, encode
from homeinfer.cluster.weights.schedule import Piece
from homeinfer.cluster.wire.control import Source
from homeinfer.cluster.wire.secure import Secure, tcp_address
from homeinfer.errors import HomeinferError

_CREDIT: Final = 16
"""Pieces under way from one source: 4 MiB, more than a gigabit's worth of any delay at home."""


class Patience(msgspec.Struct, frozen=True):
    """Seconds. silence: without a byte from a source that was asked, after which others are asked instead; retry: until
    it is tried again; give_up: without a byte from any."""

    silence: float = 8.0
    retry: float = 3.0
    give_up: float = 45.0


class SourceLink:
    """One source's socket."""

    def __init__(self, secure: Secure, source: Source) -> None:
        """Connects; raises HomeinferError for what is no address."""
        self.source = source
        self._socket = secure.dealer(tcp_address(source.host, source.port), source.key, MOST_ANSWER_BYTES)
        self._under_way: dict[int, Piece] = {}
        self._next_id = 0

    @property
    def under_way(self) -> int:
        """Requests without an answer so far."""
        return len(self._under_way)

    @property
    def has_credit(self) -> bool:
        return len(self._under_way) < _CREDIT

    async def ask(self, digest: str, file: int, offset: int, nbytes: int, piece: Piece) -> None:
        """Bytes [offset, offset + nbytes) of a file, which are this piece."""
        self._next_id += 1
        self._under_way[self._next_id] = piece
        await self._socket.send(encode(Want(self._next_id, digest, file, offset, nbytes)))

    async def answer(self, seconds: float) -> tuple[Piece, memoryview | None] | None:
        """The next answer: a piece and its bytes, None for bytes that the source has not; None after a silence of so
        many seconds. Raises HomeinferError for what was not asked for, or not in this length."""
        if not await self._socket.poll(int(seconds * 1000)):
            return None
        frames = await self._socket.recv_multipart(copy=False)
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
