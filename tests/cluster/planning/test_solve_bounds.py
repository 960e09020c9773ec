"""What the search leaves out by a bound is not faster: bounds against simulations of random plans."""

from __future__ import annotations

import math
from random import Random

import pytest

from homeinfer.cluster.planning.plan import Objective
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve_bounds import Prices, Relaxed
from homeinfer.cluster.planning.solve_state import State, may_cut, to_ring
from homeinfer.cluster.planning.solve_table import Table
from tests.support.clusters import Sizes, random_problem

TINY = Sizes(layers=(3, 6))
_EXACT = 1 + 1e-9


def random_states(random: Random, table: Table, count: int) -> list[State]:
    """Plans of a few windows and places, many of which don't fit."""
    found = []
    for _ in range(count):
        owners, places = bytearray(), ""
        while len(owners) < table.n_layers:
            slot = random.choice(table.heads if not owners or random.random() < 0.4 else table.usable)
            length = random.randint(1, table.n_layers - len(owners))
            owners += bytes([slot]) * length
            places += "".join(random.choice(list(table.step.sums[slot])) for _ in range(length))
        found.append(State(bytes(owners), places))
    return found


def simulated(simulator: Simulator, table: Table, seed: int) -> list[tuple[State, float]]:
    plans = []
    for state in random_states(Random(seed), table, 300):
        if table.is_allowed(state.owners) and may_cut(state, table.shape, table.slots):
            value = simulator.value(to_ring(state, table.slots, table.names))
            if math.isfinite(value):
                plans.append((state, value))
    return plans


@pytest.mark.parametrize("objective", ["latency", "throughput", "ttft"])
def test_no_random_plan_is_faster_than_its_bounds(objective: Objective) -> None:
    count = 0
    for seed in range(40):
        problem = random_problem(seed, TINY, objective)
        simulator = Simulator(problem)
        table = Table(problem, simulator)
        for state, value in simulated(simulator, table, seed):
            assert table.bound(state) <= value * _EXACT, (seed, state)
            assert table.least(state.owners) <= value * _EXACT, (seed, state)
            count += 1
    assert count > 500


def test_no_random_plan_is_faster_than_the_prices_of_memories_and_disks_say() -> None:
    count = 0
    for seed in range(20):
        problem = random_problem(seed, TINY)
        simulator = Simulator(problem)
        table = Table(problem, simulator)
        for state, value in simulated(simulator, table, seed)[:10]:
            slots = zip(state.owners, state.places, strict=True)
            streaming = frozenset(table.slots[slot].device for slot, place in slots if place == "s")
            # the reads of a plan that takes `value` fit into a little more than that
            limit = value * (1 + 1e-6)
            assert Prices(Relaxed(table, streaming), limit, 100).least <= limit, (seed, state)
            count += 1
    assert count > 50
