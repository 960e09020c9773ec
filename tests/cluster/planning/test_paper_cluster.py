"""prima.cpp's four devices: what goes where when the model is small, and when it is too big for each of them."""

from __future__ import annotations

import pytest

from homeinfer.cluster.planning.baselines import BASELINES, baseline
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve import solve
from tests.support.clusters import llama, paper_cluster

SMALL = llama("Llama-3-8B", 32, 4.6e9, 4096)
LARGE = llama("Llama-3-70B", 80, 41e9, 8192)


@pytest.mark.parametrize("head", ["desktop", "laptop"])
def test_small_model_goes_whole_to_the_gpu_of_the_head(head: str) -> None:
    solution = solve(paper_cluster(SMALL, head))
    assert [(window.device, window.places) for window in solution.ring.windows] == [(head, "g" * 32)]
    assert set(solution.reasons) == {"desktop", "laptop", "mac", "phone"} - {head}
    assert all("ms slower" in reason for reason in solution.reasons.values())


def test_small_model_leaves_a_mac_for_the_best_gpu() -> None:
    solution = solve(paper_cluster(SMALL, "mac"))
    layers = dict.fromkeys(("mac", "desktop", "laptop"), 0)
    for window in solution.ring.windows:
        layers[window.device] += window.last - window.first
    assert layers["desktop"] >= 28
    assert layers["laptop"] == 0


def test_large_model_spreads_and_judges_the_phone() -> None:
    problem = paper_cluster(LARGE)
    solution = solve(problem)
    used = {window.device for window in solution.ring.windows}
    assert {"desktop", "laptop"} <= used
    assert "phone" in used or "phone" in solution.reasons
    assert any("g" in window.places for window in solution.ring.windows if window.device == "laptop")


def test_large_model_is_never_slower_than_other_rules() -> None:
    problem = paper_cluster(LARGE)
    simulator = Simulator(problem)
    ours = simulator.value(solve(problem).ring)
    for name in BASELINES:
        ring = baseline(name, problem)
        assert ring is None or ours <= simulator.value(ring) * (1 + 1e-9)
