"""The assignment that is best: which layers on which device, where, in which order around the ring. Pure.

Starts are constructed (also every baseline's plan, so that none is better), averaged ones come from a MILP; each is
improved by moves on the real layers until none helps, judged by the simulator; so is the best one cut into so many
rounds, at first among plans of as many, as if they were demanded. Small instances are then searched by branch and
bound. The same problem has the same plan on any machine: effort is counted, not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from homeinfer.cluster.planning.moves import Moves
from homeinfer.cluster.planning.plan import Prediction, Ring
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.quick import adapted
from homeinfer.cluster.planning.rounds import count_rounds
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve_exact import Exact
from homeinfer.cluster.planning.solve_fill import Filler
from homeinfer.cluster.planning.solve_reasons import reason, with_device
from homeinfer.cluster.planning.solve_search import Judge, descend, descend_roughly
from homeinfer.cluster.planning.solve_state import State
from homeinfer.cluster.planning.solve_table import Table
from homeinfer.cluster.planning.start_all import in_all_orders, starts
from homeinfer.cluster.planning.start_cut import with_rounds
from homeinfer.errors import HomeinferError
from homeinfer.model.records import printable

_LEAST_EFFORT, _EFFORT_OF_PAIR, _EFFORT_OF_DEVICE = 200_000, 5_000, 80_000
"""About 5 microseconds each: 8 devices get a second, 16 some four, 64 some fifteen."""
_DESCENTS = 4
_SHARE, _ROUGH_SHARE, _LEAST_SHARE = 0.5, 0.4, 4
"""Of the effort that is left, for each descent; each number of rounds has a quarter of all of it at least."""
_ROUNDS = (1, 2, 3, 4)
_SMALL_LAYERS, _SMALL_SLOTS = 14, 4
_NODES, _NODES_IN_ROUNDS = 1_000_000, 100_000
"""Bounds know nothing of how many rounds are demanded: they cut off less then."""
_MORE_DESCENTS, _MORE_EFFORT = 8, 150_000
_EFFORT_AGAIN = 20_000
"""Of a search near a plan that is known (solve_again)."""

Progress = Callable[[float], None]


class Solution(msgspec.Struct, frozen=True):
    """rounds: how often a token comes by the busiest device. reasons: device to words, for those left out."""

    ring: Ring
    rounds: int
    prediction: Prediction
    reasons: dict[str, str]


def solve(problem: Problem, on_progress: Progress | None = None) -> Solution:
    """The best plan found for a problem. Raises HomeinferError, with what is missing, when no plan can be."""
    simulator = Simulator(problem)
    table = Table(problem, simulator)
    search = _Search(table, simulator, on_progress or (lambda _share: None))
    search.run()
    if search.state is None or math.isinf(search.best):
        raise HomeinferError(_missing(table, simulator))
    return search.solution()


def solve_again(problem: Problem, ring: Ring, limit: float) -> Solution | None:
    """The best plan near `ring`, a plan for a problem like this one, found within a tenth of a second; None where its
    value (Simulator.value) would be above the limit."""
    simulator = Simulator(problem)
    search = _Search(Table(problem, simulator), simulator, lambda _share: None)
    search.run_from(ring)
    return None if search.state is None or search.best > limit else search.solution()


class _Search:
    """The best plan so far and the ways to a better one."""

    def __init__(self, table: Table, simulator: Simulator, on_progress: Progress) -> None:
        self._table, self._simulator, self._on_progress = table, simulator, on_progress
        self._filler = Filler(table.problem, table.slots, table.memory)
        self._effort = _effort(len(table.usable))
        self.judge = Judge(table, simulator, self._effort)
        self.best = math.inf
        self.state: State | None = None

    def run(self) -> None:
        tried: dict[State, float] = {}
        for state in starts(self._table, self._filler):
            if state not in tried:
                tried[state] = self.judge.value(state)
        self._on_progress(0.1)
        ranked = sorted((value, s.owners, s.places) for s, value in tried.items() if math.isfinite(value))
        for count, state in enumerate(_unlike([State(owners, places) for _, owners, places in ranked])[:_DESCENTS], 1):
            self._descend(state)
            self._on_progress(0.1 + 0.5 * count / _DESCENTS)
        work = self._table.problem.workload
        if self.state is not None and not self._table.rounds:
            self._try_rounds(self.state)
        if self._is_small and work.objective != "ttft" and work.sequences == 1:
            self._descend_again([State(owners, places) for _, owners, places in ranked[:_MORE_DESCENTS]])
        self._on_progress(0.8)
        self.judge.left = max(self.judge.left, self._effort // 5)
        self._search_exactly()

    def run_from(self, ring: Ring) -> None:
        self.judge.left = _EFFORT_AGAIN
        self.best, self.state = adapted(self.judge, self._filler, ring, starts_too=False)
        self.judge.left = _EFFORT_AGAIN

    def solution(self) -> Solution:
        """The best plan, explained."""
        reasons = self._reasons()
        assert self.state is not None
        ring = self.judge.ring(self.state)
        rounds = count_rounds(tuple(window.device for window in ring.windows))
        return Solution(ring=ring, rounds=rounds, prediction=self._simulator.predict(ring), reasons=reasons)

    def _reasons(self) -> dict[str, str]:
        """Why devices are left out; what turns out to be better with one of them is taken instead."""
        while True:
            assert self.state is not None
            found = self._reasons_of(self.state)
            if found is not None:
                self._on_progress(1.0)
                return found

    def _reasons_of(self, state: State) -> dict[str, str] | None:
        table, found = self._table, dict[str, str]()
        used = {table.slots[owner].device for owner in state.owners}
        moves = Moves(table, self._filler)
        for device, name in enumerate(table.names):
            if device in used:
                continue
            other = with_device(self.judge, moves, state, device)
            if other is not None and other[0] < self.best * (1 - 1e-7):
                self._descend(other[1])
                return None
            found[name] = reason(self.judge, state, self.best, device, other)
        return found

    def _descend(self, state: State, rounds: int = 0) -> None:
        """rounds: only among plans that go around so often, at first."""
        free, self._table.rounds = self._table.rounds, rounds or self._table.rounds
        rough = descend_roughly(self.judge, self._filler, state, _ROUGH_SHARE)
        if self.judge.value(rough) > self.judge.value(state):
            rough = state
        if rounds:
            rough = descend(self.judge, self._filler, rough, _SHARE)[1]
        self._table.rounds = free
        value, found = descend(self.judge, self._filler, rough, _SHARE)
        if value < self.best:
            self.best, self.state = value, found

    def _descend_again(self, states: list[State]) -> None:
        """By simulations alone: where plans wait for disks, bounds can lead astray."""
        for state in states:
            self.judge.left = _MORE_EFFORT
            value, found = descend(self.judge, self._filler, state)
            if value < self.best:
                self.best, self.state = value, found

    @property
    def _is_small(self) -> bool:
        return self._table.n_layers <= _SMALL_LAYERS and len(self._table.usable) <= _SMALL_SLOTS

    def _try_rounds(self, state: State) -> None:
        reads = "s" in state.places or self._table.problem.workload.objective == "ttft"
        for rounds in _ROUNDS if reads else _ROUNDS[:1]:
            changed = with_rounds(state, rounds, self._table)
            if changed is None or not self._table.is_allowed(changed.owners):
                continue
            self.judge.left = max(self.judge.left, self._effort // _LEAST_SHARE)
            options = list(in_all_orders(self._filler, changed))
            better = self.judge.best_of(options, math.inf)
            if better is not None:
                self._descend(better[1], rounds)
        if self.state is not None and self.state != state:  # most of the effort was for others: it may not be done
            self.judge.left = max(self.judge.left, self._effort // _LEAST_SHARE)
            self._descend(self.state)

    def _search_exactly(self) -> None:
        work = self._table.problem.workload
        if work.objective == "ttft" or work.sequences > 1:
            return
        if self._is_small:
            nodes = _NODES_IN_ROUNDS if self._table.rounds else _NODES
            self.best, self.state = Exact(self.judge, nodes).run(self.best, self.state)


def _unlike(states: list[State]) -> list[State]:
    """The first of each order of windows, then the others."""
    first = {tuple(slot for slot, _, _ in state.windows()): state for state in reversed(states)}
    chosen = set(first.values())
    return [*(state for state in states if state in chosen), *(state for state in states if state not in chosen)]


def _effort(n: int) -> int:
    return max(_LEAST_EFFORT, min(_EFFORT_OF_PAIR * n * n, _EFFORT_OF_DEVICE * n))


def _missing(table: Table, simulator: Simulator) -> str:
    """What is missing for any plan, by how much."""
    problem, shape = table.problem, table.shape
    devices = [problem.devices[index] for index in sorted({table.slots[slot].device for slot in table.usable})]
    needed = sum(layer.nbytes for layer in shape.layers) + shape.output_bytes
    disks = sum({d.disk.group or d.name: d.disk.free_bytes for d in devices}.values())
    if needed > disks:
        return f"the model needs {needed / 1e9:.1f} GB and the devices' disks have room for {disks / 1e9:.1f} GB"
    kept = table.memory.kept[-1] + shape.output_bytes
    room = sum(
        max(table.memory.limit(d) - d.overhead_bytes - shape.scratch_bytes, 0)
        + sum(gpu.memory_bytes for gpu in d.gpus if not gpu.is_unified)
        for d in devices
    )
    if kept > room:
        return (
            f"the KV cache of {problem.workload.n_ctx} positions and the output matrix take {kept / 1e9:.1f} GB and "
            f"the devices have {room / 1e9:.1f} GB for them: take a shorter context or another KV type"
        )
    lacking = sorted(name for name in problem.constraints.required if name != problem.head)
    if lacking:
        names = ", ".join(printable(name, 60) for name in lacking)
        times = f" in {table.rounds} rounds" if table.rounds > 1 else ""
        return f"no plan was found in which all required devices take part{times} ({names}): require fewer"
    if table.rounds > 1:
        return f"no plan was found that goes around {table.rounds} times: ask for fewer rounds"
    alone = State(bytes([table.heads[0]]) * table.n_layers, "s" * table.n_layers)
    ring = Judge(table, simulator, 0).ring(alone)
    return f"no plan fits these devices; with all layers on the head, streamed: {simulator.trouble(ring)}"
