"""plan_model: what it chooses besides the windows."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster.planning.batch_choice import batch_sizes, best_where_room_matters
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Constraints, Workload
from homeinfer.cluster.planning.planner import plan_model
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve import solve
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from tests.support.header_file import LLAMA_8B, LLAMA_70B, write_header_file
from tests.support.profiles import LAPTOP, device_of

WORK = Workload(n_ctx=1024, n_batch=512)
GIGABYTE = 10**9


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    path = tmp_path_factory.mktemp("planner") / "model.gguf"
    write_header_file(path, LLAMA_8B)
    return read_header(path, allow_truncated=True)


def chosen(header: Header, memory_bytes: int) -> tuple[int, int]:
    """Tokens of a prompt in one step, and bytes read for each token, on one machine without a GPU."""
    machine = msgspec.structs.replace(LAPTOP, memory_bytes=memory_bytes, gpu_bytes=0)
    planned = plan_model(header, [device_of(machine, model_shape(header, WORK))], WORK, Constraints())
    return planned.problem.workload.n_batch, sum(load.read_bytes for load in planned.solution.prediction.loads)


def test_prompts_are_taken_in_the_largest_steps_where_memory_suffices(header: Header) -> None:
    assert chosen(header, 16 * GIGABYTE) == (512, 0)


def test_a_model_that_fits_only_with_smaller_steps_gets_them(header: Header) -> None:
    steps = range(4 * GIGABYTE, 8 * GIGABYTE, 20_000_000)
    needed = steps[bisect_left(steps, True, key=lambda n: chosen(header, n)[1] == 0)]
    n_batch, _ = chosen(header, needed)
    assert n_batch < 512
    assert chosen(header, needed + GIGABYTE) == (512, 0)


def test_steps_stay_large_where_smaller_ones_would_help_little(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_header_file(path, LLAMA_70B)
    large = read_header(path, allow_truncated=True)
    fast = msgspec.structs.replace(LAPTOP, memory_bytes=4 * GIGABYTE, gpu_bytes=0, operations=1e14)
    planned = plan_model(large, [device_of(fast, model_shape(large, WORK))], WORK, Constraints())
    assert sum(load.read_bytes for load in planned.solution.prediction.loads) > 30 * GIGABYTE
    assert planned.problem.workload.n_batch == 512


def test_steps_are_smaller_where_that_makes_tokens_faster(header: Header) -> None:
    """One layer more on the GPU, or in memory, is worth more than the largest steps."""
    machine = msgspec.structs.replace(LAPTOP, memory_bytes=16 * GIGABYTE, gpu_bytes=4 * GIGABYTE)
    planned = plan_model(header, [device_of(machine, model_shape(header, WORK))], WORK, Constraints())
    only = msgspec.structs.replace(planned.problem.workload, n_batch=512)
    problem = Problem(model_shape(header, only), planned.problem.devices, only, planned.problem.constraints)
    assert planned.problem.workload.n_batch < 512
    assert planned.value < Simulator(problem).value(solve(problem).ring)


def test_the_plan_of_the_least_cost_is_taken_and_the_largest_steps_where_none_is_faster() -> None:
    class Made(msgspec.Struct, frozen=True):
        n: int
        value: float
        ttft_ms: float

    def best(values: dict[int, tuple[float, float]]) -> int:
        plans = {n: Made(n, *numbers) for n, numbers in values.items()}
        found = best_where_room_matters(tuple(plans), plans.get, lambda n, _plan, limit: _below(plans[n], limit))
        assert found is not None
        return found.n

    def _below(plan: Made, limit: float) -> Made | None:
        return plan if plan.value <= limit else None

    assert best({512: (10.0, 900.0), 256: (10.0, 800.0), 32: (10.0, 700.0)}) == 512
    assert best({512: (14.0, 900.0), 256: (10.0, 950.0), 32: (10.0, 900.0)}) == 256
    assert best({512: (10.2, 500.0), 256: (10.1, 4000.0), 32: (10.0, 8000.0)}) == 512
    assert best({512: (20.0, 500.0), 256: (19.0, 4000.0), 32: (10.0, 8000.0)}) == 32


def test_no_step_is_larger_than_wanted() -> None:
    assert batch_sizes(512) == (512, 256, 128, 64, 32)
    assert batch_sizes(100) == (100, 64, 32)
    assert batch_sizes(8) == (8,)


def test_too_little_memory_for_any_step_is_one_line(header: Header) -> None:
    with pytest.raises(HomeinferError, match="take a shorter context"):
        chosen(header, 200_000_000)


def test_layers_stay_in_memory_where_streaming_them_would_read_nothing(header: Header) -> None:
    machine = device_of(
        msgspec.structs.replace(LAPTOP, memory_bytes=16 * GIGABYTE, gpu_bytes=0), model_shape(header, WORK)
    )
    faster = [
        msgspec.structs.replace(t, decode_1_ms=t.decode_1_ms * 0.7) if t.place == "mapped" else t for t in machine.times
    ]
    disturbed = msgspec.structs.replace(machine, times=tuple(faster))
    planned = plan_model(header, [disturbed], WORK, Constraints())
    assert {window.places for window in planned.solution.ring.windows} == {"r" * 32}
