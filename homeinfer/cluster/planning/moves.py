"""Neighbours of a plan: small changes that may make it better. Pure functions; the simulator judges them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from homeinfer.cluster.planning.solve_fill import ORDERS, Filler
from homeinfer.cluster.planning.solve_state import State
from homeinfer.cluster.planning.solve_table import Table
from homeinfer.cluster.planning.start_cut import with_rounds

_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_FEW_LAYERS = 16


class Proposal(NamedTuple):
    """Owners with which there may be a better plan. refilled: slots whose places are to be filled anew. given: layers
    [first, last) that came to a slot, which can have one place while all others keep theirs; (0, 0) where none did."""

    owners: bytes
    places: str
    refilled: tuple[int, ...]
    given: tuple[int, int] = (0, 0)


class Moves:
    """All neighbours of one kind of a state; expand makes plans of them."""

    def __init__(self, table: Table, filler: Filler) -> None:
        self._table, self._filler = table, filler

    def expand(self, proposal: Proposal) -> Iterator[State]:
        """The plans with these owners: filled in several ways."""
        owners, places, refilled, (first, last) = proposal
        if last:
            for place in self._table.step.sums[owners[first]]:
                yield State(owners, places[:first] + place * (last - first) + places[last:])
        elif not refilled:
            yield State(owners, places)
        seen = set[str]()
        for order in ORDERS if refilled else ():
            found = self._filler.filled(State(owners, places), refilled, order)
            if found is None or found.places in seen:
                continue
            yield found
            if not seen and all(len(set(found.places[a:b])) == 1 for s, a, b in found.windows() if s in refilled):
                return
            seen.add(found.places)

    def shifts(self, state: State) -> Iterator[Proposal]:
        """A boundary between two windows moved."""
        for (left, first, cut), (right, _, last) in pairwise(state.windows()):
            for step in _STEPS:
                if cut - step >= first:
                    yield from _given(state, cut - step, cut, right)
                if cut + step <= last:
                    yield from _given(state, cut, cut + step, left)

    def swaps(self, state: State) -> Iterator[Proposal]:
        """Two windows' devices exchanged, or two neighbouring windows put the other way round."""
        windows, owners = state.windows(), state.owners
        for index, (left, first, cut) in enumerate(windows):
            for right, begin, last in windows[index + 1 :]:
                if left == right:
                    continue
                one, other = bytes([left]), bytes([right])
                middle = owners[cut:begin]
                exchanged = other * (cut - first) + middle + one * (last - begin)
                yield Proposal(owners[:first] + exchanged + owners[last:], state.places, (left, right))
                if begin == cut and last - cut != cut - first:
                    exchanged = other * (last - cut) + one * (cut - first)
                    yield Proposal(owners[:first] + exchanged + owners[last:], state.places, (left, right))

    def replacements(self, state: State) -> Iterator[Proposal]:
        """A device in place of another one, in all its windows or in one, whether it had any or not."""
        owners = state.owners
        for old in dict.fromkeys(owners):
            for new in self._table.usable:
                if new != old:
                    changed = owners.replace(bytes([old]), bytes([new]))
                    yield Proposal(changed, state.places, (new,))
        for old, first, last in state.windows():
            for new in self._table.usable:
                if new != old:
                    changed = owners[:first] + bytes([new]) * (last - first) + owners[last:]
                    yield Proposal(changed, state.places, (old, new))

    def insertions(self, state: State) -> Iterator[Proposal]:
        """A window of some layers for a device, cut out anywhere: adds devices and rounds."""
        for slot in self._table.usable:
            yield from self.with_slot(state, slot)

    def with_slot(self, state: State, slot: int) -> Iterator[Proposal]:
        """A window of some layers for this device, cut out anywhere; several, where somebody demands so many rounds."""
        n_layers = self._table.n_layers
        if self._table.rounds:
            yield from self._with_slot_in_rounds(state, slot)
            return
        for edge in self._edges(state):
            for step in _STEPS:
                for first in dict.fromkeys((edge, edge - step)):
                    if first >= 0 and first + step <= n_layers:
                        yield from _given(state, first, first + step, slot)

    def _with_slot_in_rounds(self, state: State, slot: int) -> Iterator[Proposal]:
        """So many windows of some layers for a device that has none, behind each of the others."""
        rounds, order = self._table.rounds, tuple(dict.fromkeys(state.owners))
        if slot in order:
            return
        one_round = b"".join(bytes([each]) * state.owners.count(each) for each in order)
        for each in order:
            end = one_round.rindex(each) + 1
            for first in dict.fromkeys(max(end - rounds * step, 1) for step in _STEPS):
                owners = one_round[:first] + bytes([slot]) * (end - first) + one_round[end:]
                cut = with_rounds(State(owners, state.places), rounds, self._table)
                if cut is not None and slot in cut.owners:  # with_rounds leaves out those with too few layers
                    yield Proposal(cut.owners, cut.places, tuple(dict.fromkeys(cut.owners)))

    def transplants(self, state: State) -> Iterator[Proposal]:
        """Some of a window's layers taken out and put back elsewhere, all between shifted: rounds made and balanced."""
        owners, places, n_layers = state.owners, state.places, self._table.n_layers
        for slot, first, last in state.windows():
            for step in (1, 2, 4, 8):
                if step > last - first:
                    break
                rest, texts = owners[:first] + owners[first + step :], places[:first] + places[first + step :]
                for at in self._edges(state):
                    if at <= n_layers - step and at != first:
                        moved = rest[:at] + bytes([slot]) * step + rest[at:]
                        yield Proposal(moved, texts[:at] + places[first : first + step] + texts[at:], ())
                        yield Proposal(moved, places, tuple(dict.fromkeys(owners)))

    def passes(self, state: State) -> Iterator[Proposal]:
        """Some of a window's layers given to one further away, all between shifted: past those that are full."""
        windows = state.windows()
        for giver, (_, first, last) in enumerate(windows):
            for taker in range(len(windows)):
                if abs(giver - taker) < 2 or windows[giver][0] == windows[taker][0]:
                    continue
                low, high = min(giver, taker), max(giver, taker) + 1
                begin, end = windows[low][1], windows[high - 1][2]
                for step in (1, 2, 4, 8):
                    if step >= last - first:
                        break
                    lengths = [end - begin for _, begin, end in windows[low:high]]
                    lengths[giver - low] -= step
                    lengths[taker - low] += step
                    between = b"".join(bytes([w[0]]) * n for w, n in zip(windows[low:high], lengths, strict=True))
                    owners = state.owners[:begin] + between + state.owners[end:]
                    yield Proposal(owners, state.places, tuple(dict.fromkeys(between)))

    def places(self, state: State) -> Iterator[Proposal]:
        """A run of one place made longer or shorter, cut in two by another place, or filled anew."""
        owners, text = state.owners, state.places
        for slot in dict.fromkeys(owners):
            yield Proposal(owners, text, (slot,))
        for slot, first, last, place in state.runs():
            for other in self._table.step.sums[slot]:
                if other == place:
                    continue
                for step in (1, 2, 3, 4, 8, 16):
                    for begin in range(first, last - step + 1, max(1, step // 2)):
                        yield Proposal(owners, text[:begin] + other * step + text[begin + step :], ())

    def place_swaps(self, state: State) -> Iterator[Proposal]:
        """Two layers of a device in different places exchanged, at the edges of runs."""
        edges: dict[int, list[int]] = {}
        for slot, first, last, _ in state.runs():
            edges.setdefault(self._table.slots[slot].device, []).extend({first, last - 1})
        for layers in edges.values():
            for index, one in enumerate(layers):
                for other in layers[index + 1 :]:
                    if state.places[one] != state.places[other]:
                        text = list(state.places)
                        text[one], text[other] = text[other], text[one]
                        yield Proposal(state.owners, "".join(text), ())

    def _edges(self, state: State) -> Iterable[int]:
        """Where something may be put in: anywhere in small models, else at windows' ends and middles."""
        if self._table.n_layers <= _FEW_LAYERS:
            return range(self._table.n_layers + 1)
        return sorted({edge for _, first, last in state.windows() for edge in (first, (first + last) // 2, last)})


def _given(state: State, first: int, last: int, slot: int) -> Iterator[Proposal]:
    """Layers [first, last) given to a slot: in one place with all others where they are, or both filled anew."""
    old = set(state.owners[first:last])
    if old == {slot}:
        return
    owners = state.owners[:first] + bytes([slot]) * (last - first) + state.owners[last:]
    yield Proposal(owners, state.places, (), (first, last))
    yield Proposal(owners, state.places, (*sorted(old - {slot}), slot))
