"""Rings as plans describe them: several windows a device, in rounds, some of them streamed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from homeinfer import folders
from homeinfer.cluster.engine_messages import Hop
from homeinfer.cluster.local import RingOptions, most_logits
from homeinfer.cluster.planned import device_windows
from homeinfer.cluster.planning.plan import Ring, Window
from homeinfer.cluster.ring_start import DeviceStart, RingStart, routes, start_ring
from homeinfer.cluster.wire.transport import Peer
from homeinfer.engine.request import Request, Sampling
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header

GREEDY = Sampling(temperature=0)
PROMPT = list(range(1000, 1024))
OPTIONS = RingOptions(n_ctx=128, n_batch=16, n_threads=1)
"""A prompt of two chunks."""
ROUNDS = Ring(
    (
        Window("desk", 0, 5, "rrrrr"),
        Window("box", 5, 12, "rrrssss"),
        Window("desk", 12, 20, "ssssssss"),
        Window("box", 20, 26, "ssrrrr"),
        Window("desk", 26, 30, "rrrr"),
    )
)


@pytest.fixture(scope="module")
def header(smollm2_path: Path) -> Header:
    return read_header(smollm2_path)


def answer(
    header: Header, ring: Ring, stream_bytes: int, count: int = 24
) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Greedy tokens, and which windows each device had."""
    devices = tuple(
        DeviceStart(
            name,
            device_windows(header, ring, name, OPTIONS, folders.windows_folder()),
            stream_bytes=stream_bytes,
        )
        for name in dict.fromkeys(window.device for window in ring.windows)
    )
    start = RingStart(devices, header.files[0].path, most_logits(header, OPTIONS.n_batch))
    with closing(start_ring(start)) as pipeline:
        tokens: list[int] = []
        pipeline.tell(PROMPT, Request(GREEDY, count, fresh=True), tokens.append, lambda: False)
        return tokens, [device.windows for device in pipeline.devices]


def all_in(place: str, ring: Ring) -> Ring:
    return Ring(tuple(Window(w.device, w.first, w.last, place * len(w.places)) for w in ring.windows))


def test_a_ring_of_two_rounds_answers_as_one_device_does(header: Header) -> None:
    expected, windows = answer(header, Ring((Window("desk", 0, 30, "r" * 30),)), 0)
    assert windows == [[(0, 30)]]
    got, windows = answer(header, all_in("r", ROUNDS), 0)
    assert windows == [[(0, 5), (12, 20), (26, 30)], [(5, 12), (20, 26)]]
    assert got == expected


def test_streaming_some_layers_changes_no_token(header: Header) -> None:
    mapped, _ = answer(header, ROUNDS, 0)
    streamed, windows = answer(header, ROUNDS, 12_000_000)
    assert windows[1] == [(5, 8), (8, 12), (20, 22), (22, 26)]
    assert streamed == mapped


def test_a_stream_buffer_smaller_than_a_layer_is_one_line(header: Header) -> None:
    with pytest.raises(HomeinferError, match=r"^(desk|box) \(layers .*\): a buffer of 0.0 MB for streamed layers"):
        answer(header, ROUNDS, 1000)


def test_neighbouring_windows_of_one_device_need_no_message() -> None:
    peers, head = [Peer("a"), Peer("b")], Peer("head")
    first, second = routes([(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)], peers, head)
    assert first.hops == (Hop(0, 0, None), Hop(1, 1, peers[1]), Hop(4, 2, None))
    assert second.hops == (Hop(2, 0, None), Hop(3, 1, peers[0]))
    assert (first.first, first.n_hops) == (None, 5)
    _, last = routes([(0, 0), (1, 0)], peers, head)
    assert last.first == peers[0]
