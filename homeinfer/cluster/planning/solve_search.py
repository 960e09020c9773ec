"""Descent on plans judged by the simulator; plans that a bound rules out are never simulated. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from homeinfer.cluster.planning.moves import Moves, Proposal
from homeinfer.cluster.planning.plan import Ring
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve_fill import Filler
from homeinfer.cluster.planning.solve_state import State, may_cut, to_ring
from homeinfer.cluster.planning.solve_table import Table

_CHUNK = 16
_COST, _STREAMED_COST, _BOUND_COST, _LEAST_COST, _FILL_COST = 10, 100, 10, 2, 60
"""Effort of a simulation without and with streaming, of bounds, of filling a proposal: about 5 microseconds each."""
_PROMPT_COST = 5
"""A prompt in chunks of each size takes so many times as long to simulate as a token."""
LEAST_GAIN = 1e-7
"""A plan is better than another one when it is faster by more than this share."""


class Judge:
    """Values of states, each simulated once; counts effort, so that a search stops at the same point on any machine.

    is_rough: values are bounds, which are some times faster than simulations of what is streamed and mostly close.
    """

    def __init__(self, table: Table, simulator: Simulator, most: int) -> None:
        self.table, self._simulator = table, simulator
        self._known: dict[State, float] = {}
        self._roughly: dict[tuple[State, int], float] = {}
        self.is_rough = False
        self.left = most
        self._simulation = _PROMPT_COST if table.problem.workload.objective == "ttft" else 1

    def ring(self, state: State) -> Ring:
        return to_ring(state, self.table.slots, self.table.names)

    def value(self, state: State) -> float:
        """What the objective wants to be small; math.inf for what can't be."""
        return self._rough_value(state) if self.is_rough else self._value(state)

    def _rough_value(self, state: State) -> float:
        key = state, self.table.rounds
        found = self._roughly.get(key)
        if found is None:
            self.left -= _BOUND_COST
            is_plan = self.table.is_allowed(state.owners) and may_cut(state, self.table.shape, self.table.slots)
            found = self._roughly[key] = self.table.bound(state) if is_plan else math.inf
        return found

    def _value(self, state: State) -> float:
        found = self._known.get(state)
        if found is None:
            self.left -= self._simulation * (_STREAMED_COST if "s" in state.places else _COST)
            found = math.inf
            if may_cut(state, self.table.shape, self.table.slots):
                found = self._simulator.value(self.ring(state))
            self._known[state] = found
        return found

    def best_of(self, states: Iterable[State], limit: float) -> tuple[float, State] | None:
        """The best of several states if it is below the limit, those with low bounds first."""
        bounded, seen = [], set()
        for state in states:
            if state in seen:
                continue
            seen.add(state)
            self.left -= _BOUND_COST
            bound = self.table.bound(state)
            if bound < limit * (1 - LEAST_GAIN):
                bounded.append((bound, state.owners, state.places))
        bounded.sort()
        best: tuple[float, State] | None = None
        for bound, owners, places in bounded:
            if bound >= limit * (1 - LEAST_GAIN) or self.left <= 0:
                break
            state = State(owners, places)
            value = self.value(state)
            if value < limit * (1 - LEAST_GAIN):
                best, limit = (value, state), value
        return best

    def best_proposal(self, moves: Moves, proposals: Iterable[Proposal], limit: float) -> tuple[float, State] | None:
        """A plan below the limit, the best one of the first few proposals that have any; those come first that may be
        the fastest."""
        bounded, leasts = [], dict[bytes, float]()
        for rank, proposal in enumerate(proposals):
            least = leasts.get(proposal.owners)
            if least is None:
                self.left -= _LEAST_COST
                least = leasts[proposal.owners] = self.table.least(proposal.owners)
            if least < limit * (1 - LEAST_GAIN) and math.isfinite(least):
                bounded.append((least, rank, proposal))
        bounded.sort(key=lambda found: found[:2])
        for begin in range(0, len(bounded), _CHUNK):
            chunk = bounded[begin : begin + _CHUNK]
            self.left -= sum(_FILL_COST if proposal.refilled else _BOUND_COST for *_, proposal in chunk)
            if chunk[0][0] >= limit * (1 - LEAST_GAIN) or self.left <= 0:
                break
            better = self.best_of((state for *_, proposal in chunk for state in moves.expand(proposal)), limit)
            if better is not None:
                return better
        return None


def descend_roughly(judge: Judge, filler: Filler, start: State, share: float) -> State:
    """A plan to descend from: where descent on bounds ends, for one sequence's latency with streamed layers."""
    work = judge.table.problem.workload
    if work.objective == "ttft" or work.sequences > 1 or "s" not in start.places:
        return start
    judge.is_rough = True
    try:
        return descend(judge, filler, start, share)[1]
    finally:
        judge.is_rough = False


def descend(judge: Judge, filler: Filler, start: State, share: float = 1.0) -> tuple[float, State]:
    """The plan from which no neighbour is better, or what was found with this share of the effort that is left."""
    end = judge.left * (1 - share)
    moves = Moves(judge.table, filler)
    best, state = judge.value(start), start
    kinds: tuple[Callable[[State], Iterator[Proposal]], ...] = (
        moves.shifts,
        moves.place_swaps,
        moves.swaps,
        moves.passes,
        moves.replacements,
        moves.transplants,
        moves.places,
        moves.insertions,
    )
    at, since = 0, 0
    while since < len(kinds) and judge.left > end:
        found = judge.best_proposal(moves, kinds[at](state), best)
        if found is None:
            at, since = (at + 1) % len(kinds), since + 1
        else:
            (best, state), since = found, 0
    return best, state
