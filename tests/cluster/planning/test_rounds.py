"""Rounds that a user demands: so many windows on each device, the head at both ends."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster.planning.enumerate import best_plan
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.moves import Moves
from homeinfer.cluster.planning.plan import Constraints, Workload
from homeinfer.cluster.planning.planner import advice_for, plan_model
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.problem_checks import check_constraints
from homeinfer.cluster.planning.rounds import count_rounds, has_rounds, least_layers
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve import solve
from homeinfer.cluster.planning.solve_fill import Filler
from homeinfer.cluster.planning.solve_state import State
from homeinfer.cluster.planning.solve_table import Table
from homeinfer.cluster.planning.start_cut import with_rounds
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from tests.cluster.planning.clusters import MB, a_device, a_ring, a_shape
from tests.support.clusters import HOMES, SMALL, random_problem
from tests.support.profiles import DESK, LAPTOP, PHONE, device_of


def everyone(problem: Problem, rounds: int) -> Problem:
    """The problem in which all devices must take part in so many rounds."""
    required = tuple(device.name for device in problem.devices)
    demands = msgspec.structs.replace(problem.constraints, required=required, forbidden=(), rounds=rounds)
    return msgspec.structs.replace(problem, constraints=demands)


def owners(problem: Problem) -> list[str]:
    return [window.device for window in solve(problem).ring.windows]


@pytest.mark.parametrize(
    ("ring", "rounds"),
    [("h", 1), ("hah", 1), ("habh", 1), ("hahah", 2), ("habhabh", 2), ("habhbah", 2), ("hahahah", 3)],
)
def test_rounds_are_windows_of_each_device_without_the_heads_last(ring: str, rounds: int) -> None:
    assert count_rounds(ring) == rounds
    assert has_rounds(ring, rounds)
    assert has_rounds(ring, rounds + 1) == (ring == "h")  # one alone has one window, whatever is asked for


@pytest.mark.parametrize("ring", ["habah", "hahbh", "habhah"])
def test_a_ring_in_which_one_comes_by_more_often_is_no_whole_number_of_rounds(ring: str) -> None:
    assert count_rounds(ring) == 2
    assert not any(has_rounds(ring, rounds) for rounds in (1, 2, 3))


def test_a_plan_of_other_rounds_is_refused_by_the_judge_of_every_plan() -> None:
    problem = Problem(a_shape(6), (a_device("h"), a_device("a")), constraints=Constraints(rounds=2))
    simulator = Simulator(problem)
    assert simulator.trouble(a_ring(("h", "r"), ("a", "r"), ("h", "rr"), ("a", "r"), ("h", "r"))) is None
    assert simulator.trouble(a_ring(("h", "rrrrrr"))) is None
    assert simulator.trouble(a_ring(("h", "r"), ("a", "rrrr"), ("h", "r"))) == (
        "each device must have 2 of the windows, and the head the last one besides"
    )


@pytest.mark.parametrize(("seed", "rounds"), [(3, 1), (4, 2), (5, 2), (8, 2), (9, 2), (11, 2)])
def test_a_plan_of_demanded_rounds_is_the_best_of_all_that_have_them(seed: int, rounds: int) -> None:
    problem = everyone(random_problem(seed, SMALL), rounds)
    simulator = Simulator(problem)
    ours = simulator.value(solve(problem).ring)
    assert ours <= best_plan(problem, simulator, ours).value * 1.000001


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 3, 4])
def test_all_of_many_required_devices_take_part_in_each_round(seed: int, rounds: int) -> None:
    problem = everyone(random_problem(seed, HOMES), rounds)
    ring = owners(problem)
    assert has_rounds(ring, rounds)
    assert len(ring) == rounds * len(problem.devices) + 1
    assert ring[0] == ring[-1] == problem.head


def test_rounds_alone_make_nobody_take_part_who_is_of_no_use() -> None:
    useful, useless = a_device("a", layer_ms=1.0), a_device("b", layer_ms=50.0, rate=1e4)
    problem = Problem(
        a_shape(12), (a_device("h", layer_ms=9.0), useful, useless), constraints=Constraints(head="h", rounds=2)
    )
    solution = solve(problem)
    assert [window.device for window in solution.ring.windows] == ["h", "a", "h", "a", "h"]
    assert solution.rounds == 2
    assert "slower" in solution.reasons["b"]


def test_a_short_model_leaves_out_those_with_the_fewest_layers() -> None:
    devices = tuple(a_device(name) for name in "habc")
    problem = Problem(a_shape(8), devices, constraints=Constraints(rounds=2))
    table = Table(problem, Simulator(problem))
    cut = with_rounds(State(bytes([0, 1, 1, 1, 2, 2, 3, 0]), "r" * 8), 2, table)
    assert cut is not None
    assert [slot for slot, _, _ in cut.windows()] == [0, 1, 2, 0, 1, 2, 0]


def test_a_device_for_which_a_model_is_too_short_is_left_out_with_a_reason() -> None:
    devices = (a_device("h"), *(a_device(name, layer_ms=0.1, rate=1e9) for name in "abc"))
    problem = Problem(a_shape(8), devices, constraints=Constraints(required=("a", "b"), rounds=2))
    solution = solve(problem)
    assert set(solution.reasons) == {"c"}
    table = Table(problem, Simulator(problem))
    moves = Moves(table, Filler(problem, table.slots, table.memory))
    state = State(bytes([0, 1, 2, 0, 1, 1, 2, 0]), "r" * 8)
    assert all(3 in proposal.owners for proposal in moves.with_slot(state, 3))


def test_cuts_are_only_where_the_model_allows_them_and_private_layers_stay_on_the_head() -> None:
    even = tuple(
        sum(1 << last for last in range(2, 21, 2) if last > first) if first % 2 == 0 else 0 for first in range(20)
    )
    shape = msgspec.structs.replace(a_shape(20), allowed=even)
    devices = (a_device("h", 20 * 100 * MB), a_device("a"), a_device("b"))
    demands = Constraints(required=("a", "b"), private_first=3, private_last=3, rounds=2)
    solution = solve(Problem(shape, devices, constraints=demands))
    windows = solution.ring.windows
    assert has_rounds([window.device for window in windows], 2)
    assert all(window.first % 2 == 0 for window in windows)
    assert windows[0].last >= 4
    assert windows[-1].first <= 16


def test_more_rounds_than_a_model_has_layers_for_are_refused_in_one_line() -> None:
    assert (least_layers(1, 3), least_layers(2, 3), least_layers(4, 3)) == (1, 7, 13)
    devices = [a_device(name) for name in "habc"]
    check_constraints(devices, Constraints(required=("a", "b", "c"), rounds=3), 13)
    with pytest.raises(HomeinferError, match="--rounds 3: 4 devices need 13 layers for that, the model has 12"):
        check_constraints(devices, Constraints(required=("a", "b", "c"), rounds=3), 12)


def test_rounds_that_no_memory_has_room_for_are_said_to_be_too_many() -> None:
    shape = msgspec.structs.replace(a_shape(12), scratch_bytes=300 * MB)
    devices = (a_device("h", 1250 * MB), a_device("a", 1250 * MB))
    solve(Problem(shape, devices, Workload(n_ctx=256), Constraints(required=("a",), rounds=1)))
    with pytest.raises(HomeinferError, match=r"required devices take part in 5 rounds \(a\): require fewer"):
        solve(Problem(shape, devices, Workload(n_ctx=256), Constraints(required=("a",), rounds=5)))


def test_the_planner_keeps_to_them_and_still_advises(smollm2_path: Path) -> None:
    header = read_header(smollm2_path)
    work = Workload(n_ctx=512)
    shape = model_shape(header, work)
    devices = [device_of(machine, shape) for machine in (DESK, LAPTOP, PHONE)]
    demands = Constraints(required=tuple(device.name for device in devices), rounds=3)
    planned = plan_model(header, devices, work, demands)
    assert has_rounds([window.device for window in planned.solution.ring.windows], 3)
    assert planned.solution.rounds == 3
    advice_for(header, planned)
