from __future__ import annotations

from homeinfer.cluster.hops import onward


def test_what_comes_out_goes_to_whoever_has_the_next_window_or_stays() -> None:
    ring = [("desk", 0), ("desk", 1), ("laptop", 0), ("desk", 2), ("laptop", 1)]
    assert onward(ring, "desk") == [(0, 0, None), (1, 1, "laptop"), (3, 2, "laptop")]
    assert onward(ring, "laptop") == [(2, 0, "desk"), (4, 1, None)]
    assert onward(ring, "phone") == []
