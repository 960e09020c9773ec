"""The picture of one token: valid XML, a lane for each device, names that can't break out of it."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from homeinfer.cluster.planning.plan import Span
from homeinfer.cluster.planning.timeline_svg import Lane, timeline_svg

SVG = "{http://www.w3.org/2000/svg}"


def ring_of(n: int, device_ms: float = 12.0) -> tuple[list[Span], list[Lane]]:
    """n devices, one after the other, each of which has read something ahead and waits for the rest of it."""
    lanes = [Lane(f"device-{index}", f"layers {4 * index}–{4 * index + 3}") for index in range(n)]
    spans, now = [], 0.0
    for index, lane in enumerate(lanes):
        spans += [
            Span(lane.device, "read", now - 20, now + 4, f"layer {4 * index}"),
            Span(lane.device, "wait", now, now + 4, "for layer 0"),
            Span(lane.device, "compute", now + 4, now + device_ms, f"layers {4 * index}–{4 * index + 3}"),
            Span(lane.device, "send", now + device_ms, now + device_ms + 1.5, "8 kB"),
        ]
        now += device_ms + 1.5
    spans.append(Span(lanes[0].device, "compute", now, now + 3, "output"))
    return spans, lanes


@pytest.mark.parametrize("n", [1, 2, 3, 8, 16])
def test_every_device_has_a_lane_and_every_span_a_shape_within_the_sheet(n: int) -> None:
    spans, lanes = ring_of(n)
    sheet = ElementTree.fromstring(timeline_svg(spans, lanes, "model", "40 ms per token"))
    width, height = float(sheet.attrib["width"]), float(sheet.attrib["height"])
    words = [element.text for element in sheet.iter(f"{SVG}text")]
    assert all(lane.device in words and lane.about in words for lane in lanes)
    bars = [element for element in sheet.iter(f"{SVG}rect") if element.find(f"{SVG}title") is not None]
    assert len(bars) == sum(span.what != "send" for span in spans)
    arrows = [group for group in sheet.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]
    assert len(arrows) == (n if n > 1 else 0)
    for bar in bars:
        assert 0 <= float(bar.attrib["x"]) <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width
        assert 0 <= float(bar.attrib["y"]) <= height


def test_a_hop_leads_to_the_device_that_computes_next() -> None:
    spans, lanes = ring_of(3)
    picture = timeline_svg(spans, lanes, "model", "")
    for sender, receiver in ((0, 1), (1, 2), (2, 0)):
        assert f"<title>device-{sender} to device-{receiver}: 8 kB, 1.50 ms</title>" in picture


def test_what_was_read_ahead_lies_before_the_tokens_start() -> None:
    spans, lanes = ring_of(2)
    assert "the token starts" in timeline_svg(spans, lanes, "model", "")
    later = [span for span in spans if span.begin_ms >= 0]
    assert "the token starts" not in timeline_svg(later, lanes, "model", "")


def test_it_is_readable_on_dark_pages_and_explains_its_colours() -> None:
    picture = timeline_svg(*ring_of(2), "model", "")
    assert "prefers-color-scheme:dark" in picture
    assert all(words in picture for words in ("computing", "reading from disk", "waiting for the disk", "network"))


def test_hostile_names_and_numbers_that_are_none_stay_text() -> None:
    name = '</text><script>alert("x")</script>\x1b[31m\n' * 3
    spans = [
        Span(name, "compute", 0.0, 5.0, name),
        Span(name, "compute", math.nan, math.inf, "never"),
        Span("somebody else", "compute", 0.0, 1.0, "not in the picture"),
    ]
    sheet = ElementTree.fromstring(timeline_svg(spans, [Lane(name, name)], name, name))
    assert [element.tag for element in sheet.iter() if "script" in element.tag] == []
    assert "not in the picture" not in ElementTree.tostring(sheet, encoding="unicode")


def test_nothing_to_show_is_still_a_picture() -> None:
    ElementTree.fromstring(timeline_svg([], [Lane("desk", "")], "model", ""))
