"""A search that is free to choose is never worse than one that is told what to do: rounds, or whom to leave out."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from homeinfer.cluster.planning.batch_choice import cost
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Constraints, Workload
from homeinfer.cluster.planning.planner import Planned, plan_model
from homeinfer.cluster.planning.profile import DeviceProfile, Network
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from tests.support.profiles import Machine, device_of

WORK = Workload(n_ctx=512, n_batch=256)
_NETWORKS = (Network(3e6, 4e-3), Network(12e6, 2e-3), Network(117e6, 2e-4), Network(1.1e9, 5e-5))
_TOLERANCE = 1.002


@pytest.fixture(scope="module")
def header(smollm2_path: Path) -> Header:
    return read_header(smollm2_path)


def home(seed: int, header: Header) -> list[DeviceProfile]:
    """Two to four devices that hold a third of the model together, or three times as much."""
    random, shape = Random(seed), model_shape(header, WORK)
    model_bytes = sum(layer.nbytes for layer in shape.layers) + shape.output_bytes
    n_devices, share = random.randint(2, 4), random.choice((0.35, 0.7, 1.2, 3.0))
    devices = []
    for index in range(n_devices):
        floor = 2 * shape.scratch_bytes + 120_000_000
        floor += shape.output_bytes + shape.scratch_logits_bytes if index == 0 else 0
        rate = random.uniform(6e9, 6e10)
        machine = Machine(
            f"d{index}",
            round((share * model_bytes * random.uniform(0.3, 1.7) / n_devices + floor) / 0.9),
            rate,
            random.uniform(5e10, 5e11),
            random.uniform(1e8, 3e9),
            gpu_bytes=round(random.uniform(0.3, 1.2) * model_bytes) if random.random() < 0.3 else 0,
            gpu_rate=rate * random.uniform(2, 10),
            gpu_operations=5e12,
            network=random.choice(_NETWORKS),
        )
        devices.append(device_of(machine, shape))
    return devices


def planned(header: Header, devices: list[DeviceProfile], demands: Constraints) -> Planned | None:
    try:
        return plan_model(header, devices, WORK, demands)
    except HomeinferError:
        return None


@pytest.mark.parametrize("seed", range(6))
def test_a_free_plan_is_not_slower_than_one_of_so_many_rounds(header: Header, seed: int) -> None:
    devices = home(seed, header)
    free = plan_model(header, devices, WORK, Constraints())
    for rounds in (1, 2, 3):
        told = planned(header, devices, Constraints(rounds=rounds))
        assert told is None or is_not_worse(free, told), (rounds, told.solution.ring, free.solution.ring)


@pytest.mark.parametrize("seed", [8, 10, 11])
def test_a_free_plan_is_not_slower_than_one_without_a_device(header: Header, seed: int) -> None:
    devices = home(seed, header)
    free = plan_model(header, devices, WORK, Constraints())
    for device in devices[1:]:
        told = planned(header, devices, Constraints(forbidden=(device.name,)))
        assert told is None or is_not_worse(free, told), (device.name, told.solution.ring, free.solution.ring)


def test_the_order_in_which_devices_are_named_makes_no_plan_slower(header: Header) -> None:
    for seed in (1, 5):
        head, *others = home(seed, header)
        one = plan_model(header, [head, *others], WORK, Constraints())
        other = plan_model(header, [head, *reversed(others)], WORK, Constraints())
        assert one.value == pytest.approx(other.value, rel=_TOLERANCE - 1)


def is_not_worse(free: Planned, told: Planned) -> bool:
    """Slower for each token only where its first one comes so much sooner that that is worth more."""
    return free.value <= told.value * _TOLERANCE or cost(free) <= cost(told)
