"""Starts for models larger than all memories: every disk reads all the time, in several rounds around the ring. Pure.

A device that streams T bytes per token in k windows needs room for T / k, since the next window's are read while
others compute; the rest of its memory M is for layers that stay. It holds M + T (1 - 1/k) then, and T is what its disk
reads meanwhile: for each token's time and each k what all hold together is known, as if layers were a liquid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from homeinfer.cluster.planning.solve_state import State
from homeinfer.cluster.planning.solve_table import Held, Table

_ROUNDS = (1, 2, 3, 4, 6, 8, 12, 16)
_TIMES = 40
_LONGEST_MS = 1e5
_MOST = 10
_SLACKS = (1.0, 0.85)


class _Share(NamedTuple):
    """One slot's bytes: on the GPU, in memory, streamed."""

    slot: int
    gpu: float
    resident: float
    streamed: float


class _Plan(NamedTuple):
    """Milliseconds that a token takes at least, rounds, and who holds what, in ring order."""

    value: float
    rounds: int
    shares: tuple[_Share, ...]


def round_starts(table: Table) -> Iterator[State]:
    """States that fit, those first that may be the fastest."""
    found = [plan for rounds in _ROUNDS for slack in _SLACKS for plan in _plans(table, rounds, slack)]
    seen = set[State]()
    for plan in sorted(found, key=lambda plan: (plan.value, plan.rounds)):
        state = _state(table, plan)
        if state is not None and state not in seen:
            seen.add(state)
            yield state
        if len(seen) >= _MOST:
            return


def _plans(table: Table, rounds: int, slack: float) -> Iterator[_Plan]:
    """For a row of times per token, the shares with which it can be done."""
    if rounds > table.n_layers // 2:
        return
    sizes = [_sizes(table, slot, rounds, slack) for slot in table.usable]
    for step in range(_TIMES):
        limit = _LONGEST_MS ** ((step + 8) / (_TIMES + 7))
        plan = _within(table, rounds, limit, sizes)
        if plan is not None:
            yield plan
            if plan.value < limit:
                return


def _within(table: Table, rounds: int, limit: float, sizes: list[tuple[float, float]]) -> _Plan | None:
    left = float(table.memory.weights[-1])
    speeds = {slot: min(sums[-1] for sums in table.step.sums[slot].values()) for slot in table.usable}
    required = {slot for slot in table.usable if table.slots[slot].device in table.required}
    ranked = sorted(
        zip(table.usable, sizes, strict=True),
        key=lambda pair: (pair[0] not in table.heads, pair[0] not in required, speeds[pair[0]], pair[0]),
    )
    least = left / table.n_layers
    shares, devices, way = [], set[int](), 0.0
    for slot, (gpu, memory) in ranked:
        device, sums = table.slots[slot].device, table.step.sums[slot]
        if device in devices or left <= 0 or "r" not in sums:
            continue
        on_gpu = min(gpu, left)
        held = min(memory, left - on_gpu)
        streamed = min(limit / table.read_ms[device], rounds * memory) if held < left - on_gpu and rounds > 1 else 0.0
        streamed = max(min(streamed, (left - on_gpu - memory) * rounds / max(rounds - 1, 1)), 0.0)
        kept = held - streamed / rounds
        if on_gpu + kept + streamed < least and slot not in table.heads:
            continue
        devices.add(device)
        shares.append(_Share(slot, on_gpu, kept, streamed))
        left -= on_gpu + kept + streamed
        whole = table.memory.weights[-1]
        way += sum(
            nbytes / whole * sums[place][-1]
            for place, nbytes in zip("grs", (on_gpu, kept, streamed), strict=True)
            if place in sums
        )
    if left > 0:
        return None
    order = _nearest(table, shares)
    hops = table.step.hops
    around = sum(
        hops[one.slot][other.slot] for one, other in zip(order, (*order[1:], order[0]), strict=True) if one is not other
    )
    return _Plan(max(limit if any(s.streamed for s in shares) else 0.0, way + around * rounds), rounds, order)


def _sizes(table: Table, slot: int, rounds: int, slack: float) -> tuple[float, float]:
    """Room for weights on a slot's GPU and in its device's memory when it has so many windows."""
    where, shape, work = table.slots[slot], table.shape, table.problem.workload
    profile, memory = table.problem.devices[where.device], table.memory
    kept = memory.kept[-1] / max(memory.weights[-1], 1)
    room = memory.limit(profile) - profile.overhead_bytes - 2 * work.n_batch * shape.hidden_bytes
    room -= 2 * rounds * shape.scratch_bytes
    gpu = 0.0
    if where.has_gpu and "g" in table.step.sums[slot]:
        own = profile.gpus[where.gpu]
        gpu = own.memory_bytes * (1 - work.headroom) - rounds * shape.scratch_bytes
        if own.is_unified:
            gpu = min(gpu, room)
            room -= max(int(gpu), 0)
    if slot in table.heads:
        room -= shape.output_bytes + shape.scratch_logits_bytes + 2 * shape.scratch_bytes
    return max(gpu * slack / (1 + kept), 0.0), max(room * slack / (1 + kept), 0.0)


def _nearest(table: Table, shares: list[_Share]) -> tuple[_Share, ...]:
    order, left = [shares[0]], shares[1:]
    while left:
        at = order[-1].slot
        order.append(min(left, key=lambda share: (table.step.hops[at][share.slot], share.slot)))
        left.remove(order[-1])
    return tuple(order)


def _state(table: Table, plan: _Plan) -> State | None:
    """Layers cut where the shares' ends are; what does not fit then is streamed instead of kept."""
    limits, n_layers, weights = table.problem.constraints, table.n_layers, table.memory.weights
    head = plan.shares[0].slot
    owners, places, reached = bytearray([head] * n_layers), ["r"] * n_layers, 0.0
    total = sum(share.gpu + share.resident + share.streamed for share in plan.shares)
    layer, final = 0, n_layers - limits.private_last
    for _ in range(plan.rounds):
        for share in plan.shares:
            for place, nbytes in zip("grs", (share.gpu, share.resident, share.streamed), strict=True):
                reached += nbytes / plan.rounds * weights[-1] / total
                while layer < final and (weights[layer] + weights[layer + 1]) / 2 <= reached:
                    owners[layer], places[layer] = share.slot, place
                    layer += 1
    owners[: limits.private_first] = bytes([head]) * limits.private_first
    state = State(bytes(owners), "".join(places))
    for slot in dict.fromkeys(state.owners):
        fitted = _fitted(table, state, slot)
        if fitted is None:
            return None
        state = fitted
    return state if table.is_allowed(state.owners) else None


def _fitted(table: Table, state: State, slot: int) -> State | None:
    """The state with as many of a slot's layers streamed that it fits."""
    where, spans = table.slots[slot], [(first, last) for s, first, last in state.windows() if s == slot]
    allowed = table.step.sums[slot]
    for first, last in spans:
        text = "".join(place if place in allowed else "s" for place in state.places[first:last])
        state = State(state.owners, state.places[:first] + text + state.places[last:])
    while True:
        held: Held = tuple((first, last, state.places[first:last], where.gpu) for first, last in spans)
        if table.held_ms(where.device, held)[0] < float("inf"):
            return state
        kept = [i for first, last in spans for i in range(first, last) if state.places[i] != "s"]
        if not kept:
            return None
        resident = [i for i in kept if state.places[i] == "r"] or kept
        text = state.places[: resident[-1]] + "s" + state.places[resident[-1] + 1 :]
        state = State(state.owners, text)
