"""Links are timed over the ring's own sockets, by a process at each end."""

from __future__ import annotations

import psutil
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.profiling.hops import SWEEP_BYTES, sweep_bytes
from homeinfer.profiling.link_probe import fitted, measure_link

LOOPBACK = ((), "tcp://127.0.0.1:*")


def test_a_link_of_this_machine_to_itself_is_fast_and_leaves_no_process() -> None:
    before = psutil.Process().children()
    link = measure_link("here", LOOPBACK, LOOPBACK, (8192, 1 << 20), 0.0)
    assert link.to == "here"
    assert link.bytes_per_s > 1e6
    assert 0 <= link.latency_s < 1
    assert set(psutil.Process().children()) <= set(before)


def test_the_line_goes_through_both_sizes() -> None:
    link = fitted("there", (1000, 101_000), (2.0, 12.0), hop_ms=0.5)
    assert link.bytes_per_s == pytest.approx(10e6)
    assert 1e3 * (link.latency_s + 1000 / link.bytes_per_s) + 0.5 == pytest.approx(2.0)


def test_noise_makes_no_negative_latency_nor_endless_rate() -> None:
    link = fitted("there", (1000, 101_000), (2.0, 1.0), hop_ms=3.0)
    assert link.latency_s == 0
    assert link.bytes_per_s < 1e15


def test_an_end_that_cannot_start_is_one_line() -> None:
    with pytest.raises(HomeinferError, match="the process that times a link has ended"):
        measure_link("there", LOOPBACK, (("false",), "tcp://127.0.0.1:*"), (8192, 1 << 20), 0.0)


@pytest.mark.parametrize(("room", "expected"), [(64 << 30, SWEEP_BYTES), (200_000_000, 25_000_000), (0, 0), (-5, 0)])
def test_sweeping_the_caches_takes_no_more_memory_than_can_be_spared(room: int, expected: int) -> None:
    assert sweep_bytes(room) == expected
