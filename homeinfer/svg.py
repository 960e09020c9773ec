"""What pictures are made of: text made safe, numbers in words, SVG elements.

Names come from files that anyone may have written, numbers may be NaN: everything goes through
`safe` and `coord` before it becomes part of a document.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from homeinfer.model.records import printable

WIDTH = 960
"""Of every picture, in its own units; about CSS pixels at full width."""


def safe(text: str, limit: int = 200) -> str:
    """Text from anywhere as HTML and XML character data or attribute value, in one line, cut at `limit`."""
    return html.escape(printable(text, limit))


def coord(value: float) -> str:
    """A coordinate; numbers that are none become 0."""
    if not math.isfinite(value):
        return "0"
    return f"{value:.1f}".removesuffix(".0")


def figures(value: float, digits: int = 3) -> str:
    """A number to so many significant digits; a dash for NaN and infinities."""
    if not math.isfinite(value):
        return "–"
    if value and not 1e-5 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}".removesuffix(".") if value else "0"


def text_width(text: str, size: float = 12) -> float:
    """How wide text becomes at most, near enough: fonts differ, and CJK characters are square."""
    return size * sum(0.62 if char < "\u2e80" else 1.05 for char in text)


def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> str:
    """One line of text, its baseline's start, middle or end at (x, y)."""
    where = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{coord(x)}" y="{coord(y)}" class="{kind}"{where}>{safe(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, title: str = "", radius: float = 0) -> str:
    """A rectangle; title is shown when pointed at."""
    size = f'width="{coord(max(width, 0))}" height="{coord(max(height, 0))}"'
    round_by = f' rx="{coord(radius)}"' if radius else ""
    start = f'<rect x="{coord(x)}" y="{coord(y)}" {size} class="{kind}"{round_by}'
    return f"{start}><title>{safe(title, 400)}</title></rect>" if title else f"{start}/>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    ends = f'x1="{coord(x1)}" y1="{coord(y1)}" x2="{coord(x2)}" y2="{coord(y2)}"'
    return f'<line {ends} class="{kind}"/>'


def polyline(points: Iterable[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{coord(x)},{coord(y)}" for x, y in points)
    return f'<polyline points="{path}" class="{kind}"/>'


def dot(x: float, y: float, radius: float, kind: str, title: str) -> str:
    where = f'cx="{coord(x)}" cy="{coord(y)}" r="{coord(radius)}"'
    return f'<circle {where} class="{kind}"><title>{safe(title, 400)}</title></circle>'
