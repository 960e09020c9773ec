"""One token's way around the ring as a picture: a lane for each device, time from left to right. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from homeinfer.cluster.planning.plan import Span
from homeinfer.svg import WIDTH, box, coord, figures, line, safe, text, text_width

_LEFT = 172.0
_RIGHT = 20.0
_TOP = 92.0
_LANE = 58.0
_COMPUTE = 22.0
_READ = 10.0
_EDGE = 28.0
_MOST_SPANS = 20_000
_LEAST_BAR = 0.7
"""Narrower bars would not be seen."""

_STYLE = """
.tl{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:12px;\
font-variant-numeric:tabular-nums}
.tl .small{font-size:11px}.tl .big{font-size:19px;font-weight:600}.tl .name{font-size:13px;font-weight:600}
.tl .send{fill:none;stroke-width:1.5}.tl .grid,.tl .axis,.tl .lane{stroke-width:1}.tl .end{stroke-width:1.5}
.tl .start{stroke-dasharray:4 3;stroke-width:1}.tl .in{font-size:11px;font-weight:600}
"""
_LIGHT = {
    "paper": "fill:#ffffff;stroke:#d1d9e0",
    "ink": "fill:#1f2328",
    "soft": "fill:#59636e",
    "grid": "stroke:#e4e8ec",
    "axis": "stroke:#afb8c1",
    "lane": "stroke:#e4e8ec",
    "start": "stroke:#59636e",
    "end": "stroke:#1f2328",
    "compute": "fill:#2a69ae",
    "in": "fill:#ffffff",
    "read": "fill:#d97706",
    "wait": "fill:#f3d9b8",
    "send": "stroke:#0f8a7a",
    "arrow": "fill:#0f8a7a",
}
_DARK = {
    "paper": "fill:#0d1117;stroke:#30363d",
    "ink": "fill:#e6edf3",
    "soft": "fill:#9198a1",
    "grid": "stroke:#21262d",
    "axis": "stroke:#484f58",
    "lane": "stroke:#21262d",
    "start": "stroke:#9198a1",
    "end": "stroke:#e6edf3",
    "compute": "fill:#5a9be6",
    "in": "fill:#0d1117",
    "read": "fill:#f0a53b",
    "wait": "fill:#4a3a22",
    "send": "stroke:#3fcfb8",
    "arrow": "fill:#3fcfb8",
}
_LEGEND = (
    ("compute", "computing"),
    ("read", "reading from disk"),
    ("wait", "waiting for the disk"),
    ("send", "network"),
)


class Lane(msgspec.Struct, frozen=True):
    """A device of the picture and what stands under its name."""

    device: str
    about: str


class _Scale(msgspec.Struct, frozen=True):
    begin_ms: float
    end_ms: float

    def x(self, ms: float) -> float:
        return _LEFT + (ms - self.begin_ms) / (self.end_ms - self.begin_ms) * (WIDTH - _LEFT - _RIGHT)


def timeline_svg(spans: Sequence[Span], lanes: Sequence[Lane], title: str, about: str) -> str:
    """A whole SVG file that needs nothing else and is readable on light and dark pages.

    spans: Prediction.timeline; what lies before 0 was read ahead for this token. lanes: devices from top to bottom;
    spans of others are left out. A send's line leads to the device that computes next.
    """
    rows = {lane.device: index for index, lane in enumerate(lanes)}
    shown = [s for s in spans if s.device in rows and math.isfinite(s.begin_ms) and math.isfinite(s.end_ms)]
    shown = sorted(shown, key=lambda span: (span.begin_ms, span.end_ms))[:_MOST_SPANS]
    scale = _scale(shown)
    bottom = _TOP + _LANE * len(lanes)
    body = [
        text(0, 18, title, "big ink"),
        text(0, 40, about, "soft"),
        _legend(),
        _axis(scale, bottom),
        "".join(_lane(lane, index) for index, lane in enumerate(lanes)),
        *(_bar(span, rows[span.device], scale) for span in shown if span.what != "send"),
        *_hops(shown, rows, scale),
        _limits(shown, scale, bottom),
    ]
    return _sheet("".join(body), bottom + 18, f"{title}: {about}")


def _scale(spans: Sequence[Span]) -> _Scale:
    begin = min((span.begin_ms for span in spans), default=0.0)
    end = max((span.end_ms for span in spans), default=1.0)
    return _Scale(min(begin, 0.0), max(end, begin + 1e-3, 1e-3))


def _sheet(body: str, height: float, about: str) -> str:
    width, tall = WIDTH + 2 * _EDGE, coord(height + 2 * _EDGE)
    style = f"{_STYLE}{_rules(_LIGHT)}\n@media screen and (prefers-color-scheme:dark){{{_rules(_DARK)}}}\n"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{coord(width)}" height="{tall}" '
        f'viewBox="0 0 {coord(width)} {tall}" class="tl" role="img"><title>{safe(about, 500)}</title>'
        f"<style>{style}</style>{box(0.5, 0.5, width - 1, height + 2 * _EDGE - 1, 'paper', radius=8)}"
        f'<g transform="translate({coord(_EDGE)} {coord(_EDGE)})">{body}</g></svg>\n'
    )


def _rules(kinds: dict[str, str]) -> str:
    return "".join(f".tl .{kind}{{{look}}}" for kind, look in kinds.items())


def _legend() -> str:
    parts, x = [], 0.0
    for kind, words in _LEGEND:
        if kind == "send":
            parts.append(line(x, 64, x + 16, 56, "send") + _head(x + 16, 56, -1))
        else:
            parts.append(box(x, 55, 16, 10, kind))
        parts.append(text(x + 22, 64.5, words, "small ink"))
        x += 36 + 0.9 * text_width(words, 11)
    return "".join(parts)


def _axis(scale: _Scale, bottom: float) -> str:
    parts = [line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "axis")]
    step = _step(scale.end_ms - scale.begin_ms)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    for index in range(math.ceil(scale.begin_ms / step - 1e-9), math.floor(scale.end_ms / step + 1e-9) + 1):
        x = scale.x(index * step)
        parts.append(line(x, _TOP, x, bottom, "grid"))
        parts.append(text(x, bottom + 17, f"{index * step:,.{digits}f}".replace("-", "−"), "small soft", "middle"))
    parts.append(text(_LEFT - 24, bottom + 17, "ms", "small soft", "end"))
    return "".join(parts)


def _step(length: float) -> float:
    """1, 2 or 5 times a power of ten, for about eight ticks."""
    power = 10.0 ** math.floor(math.log10(length / 8))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= length / 8)


def _lane(lane: Lane, row: int) -> str:
    y = _TOP + _LANE * row
    return (
        line(0, y, WIDTH - _RIGHT, y, "lane")
        + text(0, y + 26, _fitting(lane.device, 13), "name ink")
        + text(0, y + 43, _fitting(lane.about, 11), "small soft")
    )


def _fitting(words: str, size: float) -> str:
    most = max(int((_LEFT - 16) / (0.62 * size)), 1)
    return words if text_width(words, size) <= _LEFT - 16 else f"{words[: most - 1]}…"


def _middle(row: int) -> float:
    """Where the compute bar's middle is."""
    return _TOP + _LANE * row + 12 + _COMPUTE / 2


def _bar(span: Span, row: int, scale: _Scale) -> str:
    x, width = scale.x(span.begin_ms), max(scale.x(span.end_ms) - scale.x(span.begin_ms), _LEAST_BAR)
    y = _TOP + _LANE * row + 12
    says = f"{span.device}: {span.label}, {figures(span.begin_ms)} to {figures(span.end_ms)} ms"
    if span.what == "read":
        return box(x, y + _COMPUTE + 5, width, _READ, "read", says)
    label = ""
    if span.what == "compute" and text_width(span.label, 11) + 8 <= width:
        label = text(x + width / 2, y + _COMPUTE / 2 + 4, span.label, "in", "middle")
    return box(x, y, width, _COMPUTE, span.what, says, radius=min(2, width / 2)) + label


def _hops(spans: Sequence[Span], rows: dict[str, int], scale: _Scale) -> Iterable[str]:
    """Lines from the sender's lane to that of the device which works next."""
    for span in spans:
        if span.what != "send":
            continue
        target = _receiver(span, spans)
        if target is None:
            continue
        start, end = _middle(rows[span.device]), _middle(rows[target])
        way = 1 if end > start else -1
        start, end = start + way * _COMPUTE / 2, end - way * _COMPUTE / 2
        x1, x2 = scale.x(span.begin_ms), scale.x(span.end_ms)
        says = safe(f"{span.device} to {target}: {span.label}, {figures(span.end_ms - span.begin_ms)} ms", 400)
        yield f"<g><title>{says}</title>{line(x1, start, x2, end, 'send')}{_head(x2, end, way)}</g>"


def _receiver(send: Span, spans: Sequence[Span]) -> str | None:
    """Whoever computes or waits first after the message is there; the sender of the last message starts over."""
    slack = 1e-6 + 1e-9 * abs(send.end_ms)
    later = [s for s in spans if s.what in ("compute", "wait") and s.begin_ms >= send.end_ms - slack]
    return next((span.device for span in later if span.device != send.device), None)


def _head(x: float, y: float, way: int) -> str:
    """An arrow's head whose tip is at (x, y)."""
    points = f"{coord(x)},{coord(y)} {coord(x - 3)},{coord(y - 5 * way)} {coord(x + 3)},{coord(y - 5 * way)}"
    return f'<polygon points="{points}" class="arrow"/>'


def _limits(spans: Sequence[Span], scale: _Scale, bottom: float) -> str:
    """Where the token begins, when something was read before."""
    if scale.begin_ms > -0.02 * (scale.end_ms - scale.begin_ms) or not spans:
        return ""
    x = scale.x(0.0)
    return line(x, _TOP - 12, x, bottom, "start") + text(x + 5, _TOP - 5, "the token starts", "small soft")
