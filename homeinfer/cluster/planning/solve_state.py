"""The solver's own notation of a plan: for every layer who holds it and where. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from homeinfer.cluster.planning.plan import Ring, Window
from homeinfer.cluster.planning.shape import ModelShape


class Slot(msgspec.Struct, frozen=True):
    """Who can hold a window: a device with one of its GPUs (or none, gpu 0). device: its index in the problem."""

    device: int
    gpu: int
    has_gpu: bool


MOST_SLOTS = 256
_SAME_OWNER = re.compile(rb"(?s)(.)\1*")
_SAME_PLACE = re.compile(r"(.)\1*")


class State(msgspec.Struct, frozen=True):
    """owners[layer]: index of a slot, a byte each; places[layer]: r, s or g. Neighbouring layers of one slot are one
    window."""

    owners: bytes
    places: str

    def windows(self) -> list[tuple[int, int, int]]:
        """(slot, first, last) in ring order."""
        return windows_of(self.owners)

    def runs(self) -> Iterator[tuple[int, int, int, str]]:
        """(slot, first, last, place) of neighbouring layers in one place, in ring order."""
        for slot, first, last in windows_of(self.owners):
            for begin, end, place in runs_of(self.places, first, last):
                yield slot, begin, end, place


def windows_of(owners: bytes) -> list[tuple[int, int, int]]:
    """(slot, first, last) of neighbouring layers of one owner."""
    return [(found[0][0], found.start(), found.end()) for found in _SAME_OWNER.finditer(owners)]


def runs_of(places: str, first: int, last: int) -> list[tuple[int, int, str]]:
    """(first, last, place) of neighbouring layers in one place, between two layers."""
    return [(found.start(), found.end(), found[1]) for found in _SAME_PLACE.finditer(places, first, last)]


def to_ring(state: State, slots: tuple[Slot, ...], names: tuple[str, ...]) -> Ring:
    """The plan that a state stands for."""
    return Ring(
        tuple(
            Window(names[slots[slot].device], first, last, state.places[first:last], slots[slot].gpu)
            for slot, first, last in state.windows()
        )
    )


def to_state(ring: Ring, slots: tuple[Slot, ...], names: tuple[str, ...]) -> State:
    """The state that stands for a plan; the other way round."""
    owners = bytearray()
    for window in ring.windows:
        owner = next(
            index
            for index, slot in enumerate(slots)
            if names[slot.device] == window.device and (slot.gpu == window.gpu or not slot.has_gpu)
        )
        owners += bytes([owner]) * (window.last - window.first)
    return State(bytes(owners), "".join(window.places for window in ring.windows))


def may_cut(state: State, shape: ModelShape, slots: tuple[Slot, ...]) -> bool:
    """Whether every window and every run of one place in it can be a model of its own, and no device follows itself."""
    previous = -1
    for slot, first, last in state.windows():
        if slots[slot].device == previous or not shape.may_cut(first, last):
            return False
        previous = slots[slot].device
        if not may_run(state.places, shape, first, last):
            return False
    return True


def may_run(places: str, shape: ModelShape, first: int, last: int) -> bool:
    """Whether the runs of one place in the window [first, last) can be models of their own."""
    return all(shape.may_cut(begin, end) for begin, end, _ in runs_of(places, first, last))


def recolour(state: State, first: int, last: int, owner: int) -> State:
    """Layers [first, last) given to another slot, streamed until somebody fills them in."""
    owners = state.owners[:first] + bytes([owner]) * (last - first) + state.owners[last:]
    return State(owners, state.places[:first] + "s" * (last - first) + state.places[last:])
