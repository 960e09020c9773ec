"""From a model, devices and demands to a PlanReport: checked, solved, explained, compared. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from homeinfer.cluster.planning.advice import advise
from homeinfer.cluster.planning.baselines import BASELINES, baseline
from homeinfer.cluster.planning.batch_choice import batch_sizes, best_where_room_matters, best_where_steps_matter
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Constraints, Prediction, Ring, Workload
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.problem_checks import check_constraints, check_disks, check_kinds, used_devices
from homeinfer.cluster.planning.profile import DeviceProfile, Network
from homeinfer.cluster.planning.quick import adapted_value, has_plan
from homeinfer.cluster.planning.report import Advice, Compared, PlannedModel, PlanReport, plan_report
from homeinfer.cluster.planning.shape import ModelShape
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve import Solution, solve, solve_again
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header

_CONTEXT_STEP = 256
_ADVICE_SIMULATIONS = 150
_AS_FAST = 1.25
"""Times of layers in memory and of mapped ones that are all in memory differ by less, unless something disturbed."""
_RULES = {"prima": "prima.cpp's rule", "proportional": "by memory", "even": "even split"}
"""What to call each of BASELINES."""


class Planned(msgspec.Struct, frozen=True):
    """A plan and what it was made of."""

    problem: Problem
    solution: Solution
    value: float

    @property
    def ttft_ms(self) -> float:
        """Milliseconds to the first token."""
        return self.solution.prediction.ttft_ms


def plan_model(
    header: Header,
    devices: Sequence[DeviceProfile],
    workload: Workload,
    constraints: Constraints,
    on_progress: Callable[[float], None] | None = None,
) -> Planned:
    """The best plan for a model on devices. A header without data is enough. Where memory is short the plan may take
    prompts in smaller steps than workload.n_batch; the plan's own workload says which.

    Raises HomeinferError for demands that can't be met: names that no profile has, devices that were not measured with
    this model, too little disk or memory, and a context that fits nowhere (with the largest that would).
    """
    shape = model_shape(header, workload)
    check_constraints(devices, constraints, len(shape.layers))
    usable = used_devices(devices, constraints)
    head = constraints.head or devices[0].name
    check_kinds(shape, usable, head)
    check_disks(shape, usable)
    demands = msgspec.structs.replace(constraints, head=head, forbidden=())
    sizes = batch_sizes(workload.n_batch)

    def problem_of(n_batch: int) -> Problem:
        work = msgspec.structs.replace(workload, n_batch=n_batch)
        return Problem(model_shape(header, work), usable, work, demands)

    def solved(n_batch: int) -> Planned | None:
        problem = problem_of(n_batch)
        try:
            return resident_where_it_fits(problem, solve(problem, on_progress))
        except HomeinferError:
            if n_batch > sizes[-1]:
                return None
            _refuse_context(header, problem)
            raise

    def again(n_batch: int, planned: Planned, limit: float) -> Planned | None:
        problem = problem_of(n_batch)
        found = solve_again(problem, planned.solution.ring, limit)
        return None if found is None else resident_where_it_fits(problem, found)

    best_of = best_where_steps_matter if workload.objective == "ttft" else best_where_room_matters
    found = best_of(sizes, solved, again)
    assert found is not None  # where the smallest steps have no plan, that was said
    return found


def resident_where_it_fits(problem: Problem, solution: Solution) -> Planned:
    """The plan, with layers in memory that would be streamed from a buffer which holds all of them: on such devices
    nothing is read from disk, the measured times of both ways differ by chance or little, and layers that llama.cpp
    may repack give the very numbers that it gives alone."""
    simulator = Simulator(problem)
    value = simulator.value(solution.ring)
    still = {load.name for load in solution.prediction.loads if not load.read_bytes}
    windows = tuple(
        msgspec.structs.replace(window, places=window.places.replace("s", "r")) if window.device in still else window
        for window in solution.ring.windows
    )
    ring = Ring(windows)
    if ring == solution.ring or simulator.trouble(ring) is not None:
        return Planned(problem, solution, value)
    resident = simulator.value(ring)
    if resident > _AS_FAST * value:
        return Planned(problem, solution, value)
    changed = msgspec.structs.replace(solution, ring=ring, prediction=simulator.predict(ring))
    return Planned(problem, changed, resident)


def _refuse_context(header: Header, problem: Problem) -> None:
    """Raises HomeinferError when it is the context that is too long."""
    work = problem.workload

    def fits(n_ctx: int) -> bool:
        workload = with_context(work, n_ctx)
        return has_plan(msgspec.structs.replace(problem, shape=model_shape(header, workload), workload=workload))

    most = largest_context(work.n_ctx, fits)
    if most:
        each = f"{work.sequences} answers of " if work.sequences > 1 else ""
        raise HomeinferError(
            f"the KV cache of {each}{work.n_ctx:,} tokens fits nowhere beside the layers; the largest context that "
            f"does is {most:,}: --ctx {most}"
        )


def with_context(workload: Workload, n_ctx: int) -> Workload:
    """The workload with another context, its prompt no longer than that."""
    return msgspec.structs.replace(workload, n_ctx=n_ctx, prompt_tokens=min(workload.prompt_tokens, n_ctx))


def largest_context(asked: int, fits: Callable[[int], bool]) -> int:
    """The largest multiple of 256 below `asked` that fits, 0 for none; what fits must fit when shorter, too."""
    low, high = 0, (asked - 1) // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _CONTEXT_STEP) else (low, middle - 1)
    return low * _CONTEXT_STEP


def with_network(devices: Sequence[DeviceProfile], network: Network) -> tuple[DeviceProfile, ...]:
    """The devices, those without any figures of their network with these."""
    return tuple(
        device if device.network or device.links else msgspec.structs.replace(device, network=network)
        for device in devices
    )


def predict(planned: Planned, *, timeline: bool = False) -> Prediction:
    """The plan's prediction, with the spans of one token if wanted."""
    if not timeline:
        return planned.solution.prediction
    return Simulator(planned.problem).predict(planned.solution.ring, timeline=True)


def advice_for(header: Header, planned: Planned) -> tuple[Advice, ...]:
    """What would help most."""

    def reshape(workload: Workload) -> ModelShape:
        return model_shape(header, workload)

    def judge(problem: Problem) -> float:
        return adapted_value(problem, planned.solution.ring, _ADVICE_SIMULATIONS)

    bpw = 8 * header.nbytes / max(header.n_weights, 1)
    return advise(planned.problem, planned.solution.prediction, planned.value, reshape, bpw, judge)


def compare_rules(problem: Problem) -> tuple[Compared, ...]:
    """prima.cpp's rule, layers by memory, as many layers for each: judged by the same simulator."""
    simulator = Simulator(problem)
    found = []
    for rule in BASELINES:
        ring, name = baseline(rule, problem), _RULES.get(rule, rule)
        trouble = "no split of this kind fits" if ring is None else simulator.trouble(ring)
        if ring is None or trouble is not None:
            found.append(Compared(name, False, why_not=trouble or ""))
            continue
        told = simulator.predict(ring)
        found.append(Compared(name, True, told.tpot_ms, told.ttft_ms, told.tokens_per_s))
    return tuple(found)


def report_of(
    model: PlannedModel,
    devices: Sequence[DeviceProfile],
    constraints: Constraints,
    planned: Planned,
    *,
    advice: Sequence[Advice] = (),
    compare: Sequence[Compared] = (),
    notes: Sequence[str] = (),
) -> PlanReport:
    """The report of a plan; devices are all, also those that were forbidden."""
    solution = planned.solution
    forbidden = dict.fromkeys(constraints.forbidden, "you ruled it out (--forbid)")
    return plan_report(
        model, planned.problem.workload, constraints, devices, solution.ring, solution.rounds, solution.prediction,
        {**solution.reasons, **forbidden}, advice=advice, compare=compare, notes=notes,
    )  # fmt: skip
