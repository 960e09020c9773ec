"""The solver against enumeration and other rules, on random clusters."""

from __future__ import annotations

import msgspec
import pytest

from homeinfer.cluster.planning.baselines import BASELINES, baseline
from homeinfer.cluster.planning.enumerate import best_plan
from homeinfer.cluster.planning.plan import Constraints
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve import solve
from homeinfer.errors import HomeinferError
from tests.support.clusters import HOMES, SMALL, Sizes, random_problem


def solvable(seed: int) -> Problem:
    return random_problem(seed, SMALL)


@pytest.mark.parametrize("seed", [0, 2, 3, 5, 8, 9, 10, 11])
def test_plan_is_the_best_of_all_enumerated_plans(seed: int) -> None:
    problem = random_problem(seed, SMALL)
    simulator = Simulator(problem)
    ours = simulator.value(solve(problem).ring)
    assert ours <= best_plan(problem, simulator, ours).value * 1.000001


@pytest.mark.parametrize("seed", [0, 3])
def test_plan_is_never_slower_than_other_rules(seed: int) -> None:
    problem = random_problem(seed, HOMES)
    simulator = Simulator(problem)
    ours = simulator.value(solve(problem).ring)
    for name in BASELINES:
        ring = baseline(name, problem)
        assert ring is None or ours <= simulator.value(ring) * (1 + 1e-9)


def test_same_problem_has_the_same_plan() -> None:
    assert solve(random_problem(9)) == solve(random_problem(9))


@pytest.mark.parametrize("objective", ["throughput", "ttft"])
def test_every_objective_has_a_plan_not_worse_than_one_device(objective: str) -> None:
    problem = random_problem(6, SMALL, objective)  # type: ignore[arg-type]
    simulator = Simulator(problem)
    ours = simulator.value(solve(problem).ring)
    for name in BASELINES:
        ring = baseline(name, problem)
        assert ring is None or ours <= simulator.value(ring) * (1 + 1e-9)


def test_required_and_forbidden_devices_are_obeyed() -> None:
    problem = random_problem(0)
    problem = msgspec.structs.replace(problem, constraints=Constraints(required=("device1",), forbidden=("device2",)))
    solution = solve(problem)
    used = {window.device for window in solution.ring.windows}
    assert "device1" in used
    assert "device2" not in used
    assert solution.reasons == {"device2": "you ruled it out"}


@pytest.mark.parametrize("memory", [(0.35, 0.45), (2.0, 2.5)], ids=["short of memory", "with memory to spare"])
@pytest.mark.parametrize("layers", [(9, 10), (24, 30)])
def test_all_of_three_required_devices_take_part(layers: tuple[int, int], memory: tuple[float, float]) -> None:
    sizes = Sizes(devices=(3, 3), layers=layers, memory=memory)
    names = ("device0", "device1", "device2")
    for seed in (0, 2):
        problem = random_problem(seed, sizes)
        problem = msgspec.structs.replace(problem, constraints=Constraints(required=names))
        assert {window.device for window in solve(problem).ring.windows} == set(names)


def test_required_devices_that_no_plan_can_have_are_named() -> None:
    problem = random_problem(0, Sizes(devices=(4, 4), layers=(3, 3), memory=(2.0, 2.5)))
    problem = msgspec.structs.replace(problem, constraints=Constraints(required=("device1", "device2", "device3")))
    with pytest.raises(HomeinferError, match=r"all required devices take part \(device1, device2, device3\)"):
        solve(problem)


def test_what_fits_nowhere_is_said_in_one_line() -> None:
    problem = random_problem(0)
    devices = tuple(
        msgspec.structs.replace(device, disk=msgspec.structs.replace(device.disk, free_bytes=10**8))
        for device in problem.devices
    )
    with pytest.raises(HomeinferError, match=r"the model needs .* GB and the devices' disks have room for 0\.3 GB"):
        solve(msgspec.structs.replace(problem, devices=devices))
