"""Who is asked for what: pieces of tensors over several sources, one of which may be slow, leave, or lie. No sockets,
no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from homeinfer.cluster.weights.messages import PIECE_BYTES

SLOW_SECONDS: Final = 2.0
"""A piece that a source was asked for so long ago is asked of another too, when that has nothing else to do."""


class Piece(msgspec.Struct, frozen=True):
    """Bytes [offset, offset + nbytes) of a tensor."""

    tensor: int
    offset: int
    nbytes: int


class Wanted(msgspec.Struct, frozen=True):
    """A tensor that must come: its bytes, and numbers of its pieces that came in an earlier run."""

    tensor: int
    nbytes: int
    pieces: frozenset[int] = frozenset()


class _Coming:
    """A tensor on its way. alone: all of it from one source, so that it is plain who lies."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.owner: str | None = None
        self.alone = False
        self.given: dict[int, str | None] = dict.fromkeys(wanted.pieces)
        self.asked: dict[int, dict[str, float]] = {}
        self.taken: dict[int, str] = {}
        self.free = sorted(set(range(self.n_pieces)) - wanted.pieces, reverse=True)

    @property
    def n_pieces(self) -> int:
        return -(-self.wanted.nbytes // PIECE_BYTES)

    @property
    def is_whole(self) -> bool:
        return len(self.given) >= self.n_pieces

    def piece(self, number: int) -> Piece:
        offset = number * PIECE_BYTES
        return Piece(self.wanted.tensor, offset, min(PIECE_BYTES, self.wanted.nbytes - offset))

    def start_again(self) -> None:
        self.owner, self.given, self.asked, self.taken = None, {}, {}, {}
        self.free = list(range(self.n_pieces - 1, -1, -1))


class Schedule:
    """What has come, what is under way, what comes next.

    A source works on tensors of its own, the rarest first, so that a wrong digest names who sent it; when none is left
    it helps with those of others. A tensor that several gave, and whose digest is wrong, comes again from one alone.
    """

    def __init__(self, wanted: Iterable[Wanted], sources: Mapping[str, Iterable[int]]) -> None:
        """sources: the tensors that each has."""
        self._coming = {one.tensor: _Coming(one) for one in wanted}
        self._has = {name: set(tensors) & self._coming.keys() for name, tensors in sources.items()}
        count = Counter(n for tensors in self._has.values() for n in tensors)
        self._waiting = sorted(self._coming, key=lambda n: (count[n], n))
        self._own: dict[str, list[int]] = {name: [] for name in sources}

    @property
    def is_done(self) -> bool:
        return not self._coming

    @property
    def left(self) -> tuple[int, ...]:
        """Tensors that are not here."""
        return tuple(sorted(self._coming))

    def whole(self) -> tuple[int, ...]:
        """Tensors all of whose pieces came, to be checked: those of an earlier run, or of no bytes."""
        return tuple(n for n, one in sorted(self._coming.items()) if one.is_whole)

    def serves(self, source: str) -> bool:
        """Whether it has anything that is still wanted."""
        return any(n in self._coming for n in self._has.get(source, ()))

    def next(self, source: str, now: float) -> Piece | None:
        """What to ask this source for; None for nothing at present. now: seconds of any clock that never goes back."""
        one = self._own_next(source) or self._new(source) or self._helping(source)
        if one is not None:
            number = one.free.pop()
        else:
            late = self._late(source, now)
            if late is None:
                return None
            one, number = late
        one.asked.setdefault(number, {})[source] = now
        return one.piece(number)

    def _own_next(self, source: str) -> _Coming | None:
        mine = self._own[source]
        while mine:
            one = self._coming.get(mine[0])
            if one is not None and one.owner == source and one.free:
                return one
            mine.pop(0)
        return None

    def _new(self, source: str) -> _Coming | None:
        for n in self._waiting:
            one = self._coming.get(n)
            if one is not None and one.owner is None and one.free and n in self._has[source]:
                self._waiting.remove(n)
                one.owner = source
                self._own[source].append(n)
                return one
        return None

    def _helping(self, source: str) -> _Coming | None:
        for n in self._has[source]:
            one = self._coming.get(n)
            if one is not None and one.free and not one.alone:
                return one
        return None

    def _late(self, source: str, now: float) -> tuple[_Coming, int] | None:
        for n in self._has[source]:
            one = self._coming.get(n)
            if one is None or one.alone:
                continue
            for number, asked in one.asked.items():
                if source not in asked and now - max(asked.values(), default=now) >= SLOW_SECONDS:
                    return one, number
        return None

    def take(self, source: str, piece: Piece) -> bool:
        """A piece came from a source. Whether it is to be written: False for what came from another meanwhile, so that
        nothing is ever written into a tensor that was checked."""
        one = self._coming.get(piece.tensor)
        number = piece.offset // PIECE_BYTES
        if one is None or source not in one.asked.get(number, ()):
            return False
        del one.asked[number]
        one.taken[number] = source
        return True

    def arrived(self, source: str, piece: Piece) -> bool:
        """A piece that was taken is on the disk. Whether it was its tensor's last: the digest must be compared now."""
        one = self._coming[piece.tensor]
        number = piece.offset // PIECE_BYTES
        if one.taken.get(number) != source:
            return False
        del one.taken[number]
        one.given[number] = source
        return one.is_whole

    def right(self, tensor: int) -> None:
        """Its digest is the model's."""
        self._coming.pop(tensor, None)

    def wrong(self, tensor: int) -> str | None:
        """Its digest is not the model's: it must come again. Who lied, where that is plain."""
        one = self._coming[tensor]
        givers = set(one.given.values())
        one.start_again()
        one.alone = len(givers) > 1
        self._wait_again(one)
        return next(iter(givers)) if len(givers) == 1 else None

    def refused(self, source: str, piece: Piece) -> None:
        """The source has no such tensor (any more)."""
        self._has[source].discard(piece.tensor)
        one = self._coming.get(piece.tensor)
        if one is not None:
            self._leave(source, one)

    def drop(self, source: str) -> None:
        """The source does not answer: what it was asked for is asked of others, until it is asked again itself."""
        for one in self._coming.values():
            self._leave(source, one)
        self._own[source] = []

    def drop_for_good(self, source: str) -> None:
        """The source lied: what it gave to tensors that are not whole yet must come again from others."""
        self.drop(source)
        self._has[source] = set()
        for one in self._coming.values():
            if not one.is_whole:
                wrong = [number for number, giver in one.given.items() if giver == source]
                for number in wrong:
                    del one.given[number]
                one.free += wrong
                if one.owner is None:
                    self._wait_again(one)

    def _wait_again(self, one: _Coming) -> None:
        if one.wanted.tensor not in self._waiting:
            self._waiting.insert(0, one.wanted.tensor)

    def _leave(self, source: str, one: _Coming) -> None:
        for number in [number for number, asked in one.asked.items() if source in asked]:
            del one.asked[number][source]
            if not one.asked[number]:
                del one.asked[number]
                one.free.append(number)
        if one.owner == source:
            one.owner = None
            if one.alone and not one.is_whole:
                one.start_again()
            if not one.is_whole:
                self._wait_again(one)

    def nobody_has(self) -> tuple[int, ...]:
        """Tensors that no source has any more."""
        return tuple(n for n in self.left if not any(n in tensors for tensors in self._has.values()))
