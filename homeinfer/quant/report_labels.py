"""Where labels of points go so that none lies on another, on a point or on a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from homeinfer.svg import text_width

_HEIGHT = 13.0
_NEAR = ((1, 0), (0.8, -0.8), (0.8, 0.8), (0, -1), (-0.8, -0.8), (-1, 0), (-0.8, 0.8), (0, 1))
_DISTANCES = (9.0, 17.0, 27.0, 40.0, 56.0)


class Box(msgspec.Struct, frozen=True):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def within(self, other: Box) -> bool:
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


class Placed(msgspec.Struct, frozen=True):
    """A label's box, the point it belongs to, and whether it lies so far off that a line must lead there."""

    label: str
    box: Box
    x: float
    y: float
    led: bool


def place(labels: Sequence[tuple[str, float, float]], taken: Sequence[Box], bounds: Box) -> list[Placed]:
    """Boxes for (label, x, y) within bounds, off everything taken; first come, first placed.

    A label that finds no free place is left out: its point still says its name when pointed at.
    """
    full = [*taken, *(Box(x - 5, y - 5, x + 5, y + 5) for _, x, y in labels)]
    placed: list[Placed] = []
    for label, x, y in labels:
        found = _free(label, x, y, full, bounds)
        if found is not None:
            placed.append(found)
            full.append(found.box)
    return placed


def along(points: Sequence[tuple[float, float]], step: float = 6, wide: float = 2) -> list[Box]:
    """Small boxes that cover a line through the points, to keep labels off it."""
    boxes = []
    for (x1, y1), (x2, y2) in pairwise(points):
        pieces = max(math.ceil(math.hypot(x2 - x1, y2 - y1) / step), 1)
        for piece in range(pieces + 1):
            x, y = x1 + (x2 - x1) * piece / pieces, y1 + (y2 - y1) * piece / pieces
            boxes.append(Box(x - wide, y - wide, x + wide, y + wide))
    return boxes


def _free(label: str, x: float, y: float, full: Sequence[Box], bounds: Box) -> Placed | None:
    width = text_width(label, 12)
    for distance in _DISTANCES:
        for right, down in _NEAR:
            near_x, near_y = x + right * distance, y + down * distance
            left = near_x - width * (1 - right) / 2 if abs(right) < 0.5 else near_x - (width if right < 0 else 0)
            box = Box(left, near_y - _HEIGHT / 2, left + width, near_y + _HEIGHT / 2)
            if box.within(bounds) and not any(box.meets(other) for other in full):
                return Placed(label, box, x, y, distance > 20)
    return None
