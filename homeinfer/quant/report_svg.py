"""What the report's pictures have in common: colours, sizes in words, a document around them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

import msgspec

from homeinfer.svg import WIDTH, box, coord, figures, safe

_STEPS = (1.0, 2.0, 2.45, 2.9, 3.3, 4.0, 4.4, 5.2, 6.3, 8.0, 12.0)
"""Least bits per weight of each colour, so that neighbouring block types get different ones."""
_RAMP = (
    "#eef3b4", "#d4eb9f", "#a8dcae", "#7dcdbb", "#55bec1", "#35a8c3",
    "#2389bc", "#2a69ae", "#264a9c", "#1f3083", "#101d5c",
)  # fmt: skip
"""Light to dark after ColorBrewer's YlGnBu: lightness alone tells the steps apart. Dark pages take it backwards,
so that more bits always stand out more."""
_ON_CELLS = ("#0d1117", "#ffffff")

_LIGHT = {
    "ink": "fill:#1f2328",
    "soft": "fill:#59636e",
    "grid": "stroke:#e4e8ec",
    "axis": "stroke:#afb8c1",
    "bar": "fill:#c3cad2",
    "dot": "fill:#6e7781;stroke:#ffffff",
    "link": "stroke:#c3cad2",
    "mine": "fill:#c2410c",
    "mine-line": "stroke:#c2410c",
    "mine-dot": "fill:#c2410c;stroke:#ffffff",
    "mine-hollow": "fill:#ffffff;stroke:#c2410c",
    "paper": "fill:#ffffff;stroke:#d1d9e0",
}
_DARK = {
    "ink": "fill:#e6edf3",
    "soft": "fill:#9198a1",
    "grid": "stroke:#21262d",
    "axis": "stroke:#484f58",
    "bar": "fill:#444c56",
    "dot": "fill:#9198a1;stroke:#0d1117",
    "link": "stroke:#484f58",
    "mine": "fill:#ff9b5e",
    "mine-line": "stroke:#ff9b5e",
    "mine-dot": "fill:#ff9b5e;stroke:#0d1117",
    "mine-hollow": "fill:#0d1117;stroke:#ff9b5e",
    "paper": "fill:#0d1117;stroke:#30363d",
}
_SHAPES = """
.hi{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:12px;\
font-variant-numeric:tabular-nums}
.hi .small{font-size:11px}.hi .cell{font-size:9px}.hi .big{font-size:21px;font-weight:600}
.hi .head{font-size:14px;font-weight:600}.hi .strong{font-weight:600}.hi .cost{fill-opacity:.8}
.hi .grid,.hi .axis{stroke-width:1}.hi .dot,.hi .mine-dot{stroke-width:1.5}.hi .link{fill:none;stroke-width:1.5}
.hi .leader{stroke-width:.75}.hi .mine-line{fill:none;stroke-width:2}.hi .mine-hollow{stroke-width:2}
.hi .limit{stroke-dasharray:4 3;stroke-width:1}.hi .thin{stroke-width:1.5}
"""


class Drawing(msgspec.Struct, frozen=True):
    """A part of a picture: SVG elements in a space WIDTH wide and height high, and what they show in words."""

    height: float
    body: str
    about: str


def nbytes(count: float, digits: int = 4) -> str:
    """A size in the decimal units that `--size` takes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            shown = figures(count / size, digits) if count < 1000 * size else f"{count / size:,.0f}"
            return f"{shown} {unit}"
    return f"{count:,.0f} bytes"


def percent(fraction: float) -> str:
    if not math.isfinite(fraction):
        return "–"
    if 0 < fraction < 0.0005:
        return "<0.1 %"
    return f"{100 * fraction:.1f} %" if abs(fraction) < 0.9995 else f"{100 * fraction:.0f} %"


def bits_per_weight(size: int, weights: int) -> float:
    """8 · size / weights; 0 for nothing."""
    return 8 * size / weights if weights > 0 and size > 0 else 0.0


def bits_step(bits: float) -> int:
    """Which colour of the ramp shows so many bits per weight."""
    return max(bisect_right(_STEPS, bits) - 1, 0)


def style() -> str:
    """CSS of every picture: light by default and in print, dark where the screen asks for it."""
    light = _rules(_LIGHT) + _cell_rules(_RAMP)
    dark = _rules(_DARK) + _cell_rules(_RAMP[::-1])
    return f"{_SHAPES}{light}\n@media screen and (prefers-color-scheme:dark){{{dark}}}\n"


def inline(drawing: Drawing) -> str:
    """The drawing as an element of an HTML page that brings `style` itself."""
    return (
        f'<svg class="hi" viewBox="0 0 {WIDTH} {coord(drawing.height)}" role="img" '
        f'aria-label="{safe(drawing.about, 500)}">{drawing.body}</svg>'
    )


def standalone(drawings: Iterable[Drawing], about: str) -> str:
    """The drawings one below the other on a sheet of their own: a whole SVG file."""
    edge, gap = 28, 30
    y, parts = float(edge), []
    for drawing in drawings:
        parts.append(f'<g transform="translate({edge} {coord(y)})">{drawing.body}</g>')
        y += drawing.height + gap
    width, height = WIDTH + 2 * edge, coord(y - gap + edge)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'class="hi" role="img"><title>{safe(about, 500)}</title><style>{style()}</style>'
        f"{box(0.5, 0.5, width - 1, float(height) - 1, 'paper', radius=8)}{''.join(parts)}</svg>\n"
    )


def _rules(kinds: dict[str, str]) -> str:
    return "".join(f".hi .{kind}{{{look}}}" for kind, look in kinds.items())


def _cell_rules(ramp: tuple[str, ...]) -> str:
    rules = []
    for step, colour in enumerate(ramp):
        light = luminance(colour) + 0.05
        on_it = max(_ON_CELLS, key=lambda ink: max(light, luminance(ink) + 0.05) / min(light, luminance(ink) + 0.05))
        rules.append(f".hi .q{step}{{fill:{colour}}}.hi .on{step}{{fill:{on_it}}}")
    return "".join(rules)


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "#rrggbb": 0 is black, 1 is white."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
