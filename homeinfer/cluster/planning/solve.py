"""The assignment that is best: which layers on which device, where, in which order around the ring. Pure.

Starts are constructed (also every baseline's plan, so that none is better), averaged ones come from a MILP; each is
improved by moves on the real layers until none helps, judged by the simulator. Small instances are then searched by
branch and bound. The same problem has the same plan on any machine: effort is counted, not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from homeinfer.cluster.planning.moves import Moves
from homeinfer.cluster.planning.plan import Prediction, Ring
from homeinfer.cluster.planning.problem import Problem
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
_SHARE, _ROUGH_SHARE = 0.5, 0.4
_ROUNDS = (2, 3, 4)
_SMALL_LAYERS, _SMALL_SLOTS = 14, 4
_NODES, _NODES_IN_ROUNDS = 1_000_000, 100_000
"""Bounds know nothing of how many rounds are demanded: they cut off less then."""
_MORE_DESCENTS, _MORE_EFFORT = 8, 150_000

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
    reasons = search.reasons()
    ring = search.judge.ring(search.state)
    return Solution(
        ring=ring,
        rounds=count_rounds(tuple(window.device for window in ring.windows)),
        prediction=simulator.predict(ring),
        reasons=reasons,
    )


class _Search:
    """The best plan so far and the ways to a better one."""

    def __init__(self, table: Table, simulator: Simulator, on_progress: Progress) -> None:
        self._table, self._on_progress = table, on_progress
        self._filler = Filler(table.problem, table.slots, table.memory)
        self.judge = Judge(table, simulator, _effort(len(table.usable)))
        self.best = math.inf
        self.state: State | None = None

    def run(self) -> None:
        tried: dict[State, float] = {}
        for state in starts(self._table, self._filler):
            if state not in tried:
                tried[state] = self.judge.value(state)
        self._on_progress(0.1)
        ranked = sorted((value, s.owners, s.places) for s, value in tried.items() if math.isfinite(value))
        for count, (_, owners, places) in enumerate(ranked[:_DESCENTS], 1):
            self._descend(State(owners, places))
            self._on_progress(0.1 + 0.5 * count / _DESCENTS)
        if self.state is not None and "s" in self.state.places and not self._table.rounds:
            self._try_rounds(self.state)
        work = self._table.problem.workload
        if self._is_small and work.objective != "ttft" and work.sequences == 1:
            self._descend_again([State(owners, places) for _, owners, places in ranked[:_MORE_DESCENTS]])
        self._on_progress(0.8)
        self.judge.left = max(self.judge.left, _effort(len(self._table.usable)) // 5)
        self._search_exactly()

    def reasons(self) -> dict[str, str]:
        """Why devices are left out; what turns out to be better with one of them is taken instead."""
        while True:
            assert self.state is not None
            found = self._reasons(self.state)
            if found is not None:
                self._on_progress(1.0)
                return found

    def _reasons(self, state: State) -> dict[str, str] | None:
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

    def _descend(self, state: State) -> None:
        rough = descend_roughly(self.judge, self._filler, state, _ROUGH_SHARE)
        if self.judge.value(rough) > self.judge.value(state):
            rough = state
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
        for rounds in _ROUNDS:
            changed = with_rounds(state, rounds, self._table)
            if changed is None or not self._table.is_allowed(changed.owners):
                continue
            options = list(in_all_orders(self._filler, changed))
            better = self.judge.best_of(options, math.inf)
            if better is not None:
                self._descend(better[1])

    def _search_exactly(self) -> None:
        work = self._table.problem.workload
        if work.objective == "ttft" or work.sequences > 1:
            return
        if self._is_small:
            nodes = _NODES_IN_ROUNDS if self._table.rounds else _NODES
            self.best, self.state = Exact(self.judge, nodes).run(self.best, self.state)


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
