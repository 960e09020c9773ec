"""The curve of KLD over size: llama.cpp's presets, what homeinfer predicts, what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from homeinfer.quant.report_data import CurvePoint, QuantReport
from homeinfer.quant.report_labels import Box, Placed, along, place
from homeinfer.quant.report_svg import Drawing, nbytes
from homeinfer.svg import WIDTH, dot, figures, line, polyline, text, text_width

_LEFT, _RIGHT, _TOP, _HEIGHT = 56.0, WIDTH - 8.0, 66.0, 320.0
_BOTTOM = _TOP + _HEIGHT
LEAST, MOST = 1e-7, 1e4
"""KLDs in nats that mean something; the axis goes no farther, and points beyond are drawn at its end."""
_MAX_LABELS, _LABEL = 60, 32


class _Point(msgspec.Struct, frozen=True):
    x: float
    y: float
    of: CurvePoint


class _Scales(msgspec.Struct, frozen=True):
    """Bytes to x, linear; KLD to y, logarithmic."""

    first: float
    last: float
    low: float
    high: float

    def x(self, size: float) -> float:
        return _LEFT + (size - self.first) / (self.last - self.first) * (_RIGHT - _LEFT)

    def y(self, kld: float) -> float:
        at = min(max(kld, self.low), self.high)
        return _BOTTOM - math.log(at / self.low) / math.log(self.high / self.low) * _HEIGHT


def this_file(report: QuantReport) -> CurvePoint | None:
    """The written file as a point: measured, or only predicted, or neither."""
    if report.measured and math.isfinite(report.measured[0].mean_kld):
        return CurvePoint("this file", report.size_bytes, report.measured[0].mean_kld, "measured")
    if report.predicted_kld is not None and math.isfinite(report.predicted_kld):
        return CurvePoint("this file", report.size_bytes, report.predicted_kld, "predicted")
    return None


def kld_curve(report: QuantReport) -> Drawing | None:
    """The curve; None when there are no two points to compare."""
    own = this_file(report)
    others = [point for point in report.curve if math.isfinite(point.mean_kld) and 0 < point.size_bytes < 1e18]
    known = [*others, own] if own else others
    if len(known) < 2:
        return None
    scales = _scales(known, report.limit_bytes)
    parts = [text(0, 14, "KLD to the original over size of the file", "ink head"), _key(others, own)]
    parts += _axes(scales)
    presets = _points(scales, others, "preset")
    predicted = _points(scales, others, "predicted")
    measured = [point for point in _points(scales, others, "measured") if point.of.size_bytes != report.size_bytes]
    lines = [[(point.x, point.y) for point in points] for points in (_frontier(presets), predicted)]
    for through, kind in zip(lines, ("link", "mine-line"), strict=True):
        parts.append(polyline(through, kind) if len(through) > 1 else "")
    limit, taken = _limit(report.limit_bytes, scales)
    parts += limit
    parts += [dot(point.x, point.y, 4.5, "dot", _told(point.of)) for point in presets]
    parts += [dot(point.x, point.y, 2, "mine", _told(point.of)) for point in predicted]
    parts += [dot(point.x, point.y, 4.5, "mine-dot", _told(point.of)) for point in measured]
    labels = [(point.of.label[:_LABEL], point.x, point.y) for point in (*measured, *presets)]
    if own is not None:
        bar, mark, covered = _own(own, report, scales)
        parts += [*bar, mark]
        taken += covered
        labels.insert(0, (f"this file {figures(own.mean_kld)}", scales.x(own.size_bytes), scales.y(own.mean_kld)))
    taken += [piece for through in lines for piece in along(through)]
    bounds = Box(_LEFT + 2, _TOP, _RIGHT + 8, _BOTTOM - 2)
    mine = len(labels) - len(presets)
    for at, label in enumerate(place(labels[:_MAX_LABELS], taken, bounds)):
        parts.append(_label(label, "mine strong" if at == 0 and own else "mine" if at < mine else "soft"))
    return Drawing(_BOTTOM + 42, "".join(parts), "mean KLD over file size, llama.cpp's presets and homeinfer")


def _scales(known: Sequence[CurvePoint], limit: int | None) -> _Scales:
    sizes = [point.size_bytes for point in known]
    if limit is not None and 0.8 * min(sizes) < limit < 1.25 * max(sizes):
        sizes.append(limit)
    first, last = min(sizes), max(sizes)
    edge = max((last - first) * 0.05, last * 0.08 - (last - first) / 2)
    klds = [min(max(point.mean_kld, LEAST), MOST) for point in known if point.mean_kld > 0]
    low, high = min(klds, default=0.01), max(klds, default=0.1)
    return _Scales(max(first - edge, 0), last + edge, _round(low / 1.1, math.floor), _round(high * 1.1, math.ceil))


def _points(scales: _Scales, points: Sequence[CurvePoint], kind: str) -> list[_Point]:
    chosen = sorted((point for point in points if point.kind == kind), key=lambda point: point.size_bytes)
    return [_Point(scales.x(point.size_bytes), scales.y(point.mean_kld), point) for point in chosen]


def _frontier(points: Sequence[_Point]) -> list[_Point]:
    """Those that no smaller one beats."""
    best: list[_Point] = []
    for point in points:
        if not best or point.of.mean_kld < best[-1].of.mean_kld:
            best.append(point)
    return best


def _axes(scales: _Scales) -> list[str]:
    parts = []
    for kld in _log_ticks(scales.low, scales.high):
        y = scales.y(kld)
        parts += [line(_LEFT, y, _RIGHT, y, "grid"), text(_LEFT - 8, y + 4, f"{kld:g}", "soft small", "end")]
    unit, name = (1e9, "GB") if scales.last >= 2e9 else (1e6, "MB")
    for size in _ticks(scales.first / unit, scales.last / unit):
        x = scales.x(size * unit)
        parts.append(line(x, _BOTTOM, x, _BOTTOM + 4, "axis"))
        parts.append(text(x, _BOTTOM + 18, f"{size:,.10g}", "soft small", "middle"))
    parts.append(line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis"))
    parts.append(text((_LEFT + _RIGHT) / 2, _BOTTOM + 36, f"size, {name}", "soft small", "middle"))
    return parts


def _ticks(first: float, last: float) -> list[float]:
    """Four to ten round numbers from first to last."""
    span = last - first
    base = 10 ** math.floor(math.log10(span)) if span > 0 else 1.0
    step = next(factor * base for factor in (0.1, 0.2, 0.5, 1, 2, 5, 10) if span / (factor * base) <= 10)
    return [number * step for number in range(math.ceil(first / step), math.floor(last / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 5 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _round(kld: float, way: Callable[[float], int]) -> float:
    """The next 1, 2 or 5 times a power of ten below (floor) or above (ceil)."""
    decade = 10.0 ** math.floor(math.log10(kld))
    ticks = [decade * factor for factor in (0.5, 1, 2, 5, 10, 20)]
    return max(tick for tick in ticks if tick <= kld) if way is math.floor else min(t for t in ticks if t >= kld)


def _limit(limit: int | None, scales: _Scales) -> tuple[list[str], list[Box]]:
    if not limit or not scales.first <= limit <= scales.last:
        return [], []
    x, words = scales.x(limit), f"limit {nbytes(limit)}"
    width = text_width(words, 11)
    left = x + 6 if x + 6 + width <= _RIGHT else x - 6 - width
    parts = [line(x, _TOP - 14, x, _BOTTOM, "axis limit"), text(left, _TOP - 6, words, "soft small")]
    return parts, [Box(x - 1, _TOP, x + 1, _BOTTOM)]


def _own(own: CurvePoint, report: QuantReport, scales: _Scales) -> tuple[list[str], str, list[Box]]:
    """The point of this file with its standard error, and what they cover."""
    x, y = scales.x(own.size_bytes), scales.y(own.mean_kld)
    if own.kind == "predicted":
        return [], dot(x, y, 5.5, "mine-hollow", f"this file, predicted KLD {figures(own.mean_kld)}"), []
    error = report.measured[0].mean_kld_stderr
    error = error if math.isfinite(error) and error > 0 else 0.0
    top, bottom = scales.y(own.mean_kld + error), scales.y(own.mean_kld - error)
    bar = [line(x, top, x, bottom, "mine-line thin")]
    bar += [line(x - 5, end, x + 5, end, "mine-line thin") for end in (top, bottom)]
    title = f"{_told(own)}, standard error {figures(error)}, measured on {report.measured[0].text}"
    return bar if error else [], dot(x, y, 6, "mine-dot", title), [Box(x - 6, top - 1, x + 6, bottom + 1)]


def _key(points: Sequence[CurvePoint], own: CurvePoint | None) -> str:
    """What the marks mean, only those that occur."""
    kinds = {point.kind for point in points}
    marks: list[tuple[bool, Callable[[float], str], str]] = [
        ("preset" in kinds, lambda x: dot(x + 6, 33, 4.5, "dot", "preset"), "llama.cpp's presets"),
        ("predicted" in kinds, lambda x: line(x, 33, x + 14, 33, "mine-line"), "homeinfer, predicted"),
        (
            "measured" in kinds or (own is not None and own.kind == "measured"),
            lambda x: dot(x + 6, 33, 5, "mine-dot", "measured"),
            "homeinfer, measured (bar: ± 1 standard error)",
        ),
        (
            own is not None and own.kind == "predicted",
            lambda x: dot(x + 6, 33, 5, "mine-hollow", "predicted"),
            "this file, predicted, not measured",
        ),
    ]
    x, parts = 0.0, []
    for occurs, mark, words in marks:
        if occurs:
            parts += [mark(x), text(x + 19, 37, words, "soft small")]
            x += 19 + text_width(words, 11) + 16
    return "".join(parts)


def _label(placed: Placed, kind: str) -> str:
    """The label, with a line to its point where it lies away from it."""
    area = placed.box
    words = text((area.left + area.right) / 2, area.bottom - 2.5, placed.label, kind, "middle")
    if not placed.led:
        return words
    x = min(max(placed.x, area.left), area.right)
    y = min(max(placed.y, area.top), area.bottom)
    off = 6 / max(math.hypot(x - placed.x, y - placed.y), 6)
    from_x, from_y = placed.x + (x - placed.x) * off, placed.y + (y - placed.y) * off
    return line(from_x, from_y, x, y, "axis leader") + words


def _told(point: CurvePoint) -> str:
    return f"{point.label}: KLD {figures(point.mean_kld)}, {nbytes(point.size_bytes)}"
