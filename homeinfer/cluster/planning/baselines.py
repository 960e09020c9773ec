"""What others would do with the same devices: plans to compare ours with, judged by the same simulator. Pure.

As in our plans the head holds the first and the last window, and each device keeps as many of its layers on the GPU
and in memory as fit, by the same memory model; it streams the rest.
"""

from __future__ import annotations

import math

from homeinfer.cluster.planning.baselines_prima import Shares, halda
from homeinfer.cluster.planning.memory import MemoryModel
from homeinfer.cluster.planning.plan import Ring
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.solve_fill import ORDERS, Filler
from homeinfer.cluster.planning.solve_state import Slot, State, may_cut, to_ring

BASELINES = ("prima", "proportional", "even")


def prima_rule(problem: Problem) -> Ring | None:
    """prima.cpp's rule: equal windows per round, every device at least one layer, then those with a single layer in a
    round dropped and all done again. None when no division of it can run here."""
    order = device_order(problem)
    found: Ring | None = None
    while True:
        answers = halda(problem, order)
        shares = next(((each, ring) for each in answers if (ring := _rounds_ring(problem, order, each))), None)
        if shares is not None:
            found = shares[1]
        widths = shares[0].layers if shares else answers[0].layers if answers else None
        following = _without_weak(problem, order, widths)
        if len(following) == len(order):
            return found
        order = following


def proportional(problem: Problem) -> Ring | None:
    """Layers in proportion to each device's memory (and its GPUs'), one window each. None when that can't run."""
    order = device_order(problem)
    weights = []
    for index in order:
        device = problem.devices[index]
        own = sum(gpu.memory_bytes for gpu in device.gpus if not gpu.is_unified)
        weights.append(max(device.memory_bytes - device.overhead_bytes, 0) + own)
    return _weighted_ring(problem, order, weights)


def even(problem: Problem) -> Ring | None:
    """As many layers for each device, one window each. None when that can't run."""
    order = device_order(problem)
    return _weighted_ring(problem, order, [1] * len(order))


def baseline(name: str, problem: Problem) -> Ring | None:
    """The plan of one of BASELINES."""
    return {"prima": prima_rule, "proportional": proportional, "even": even}[name](problem)


def device_order(problem: Problem) -> tuple[int, ...]:
    """The head, then the others that are not forbidden, as their profiles were given."""
    indexes = [i for i, device in enumerate(problem.devices) if device.name not in problem.constraints.forbidden]
    return tuple(sorted(indexes, key=lambda i: problem.devices[i].name != problem.head))


def _without_weak(problem: Problem, order: tuple[int, ...], widths: tuple[int, ...] | None) -> tuple[int, ...]:
    """Without the devices of one layer per round; without the last one where nothing was found."""
    if widths is None:
        return order[:-1] if len(order) > 1 else order
    kept = set(problem.constraints.required)
    return tuple(
        index
        for rank, (index, width) in enumerate(zip(order, widths, strict=True))
        if not rank or width > 1 or problem.devices[index].name in kept
    )


def _rounds_ring(problem: Problem, order: tuple[int, ...], shares: Shares) -> Ring | None:
    ends, total = [], 0
    owners = []
    for _ in range(shares.rounds):
        for index, width in zip(order, shares.layers, strict=True):
            total += width
            ends.append(total)
            owners.append(index)
    return _ring(problem, owners, ends)


def _weighted_ring(problem: Problem, order: tuple[int, ...], weights: list[int]) -> Ring | None:
    n_layers, total = len(problem.shape.layers), sum(weights)
    if not total:
        return None
    so_far, ends = 0, []
    for weight in weights:
        so_far += weight
        ends.append(round(n_layers * so_far / total))
    return _ring(problem, list(order), ends)


def _ring(problem: Problem, owners: list[int], ends: list[int]) -> Ring | None:
    """Windows of devices that end at these layers, the head's last added, cut where the model may be cut."""
    n_layers, work = len(problem.shape.layers), problem.constraints
    slots = tuple(Slot(index, 0, bool(device.gpus)) for index, device in enumerate(problem.devices))
    head = next(index for index, device in enumerate(problem.devices) if device.name == problem.head)
    layers: list[int] = []
    for owner, end in zip(owners, ends, strict=True):
        layers += [owner] * (end - len(layers))
    for layer in (*range(work.private_first), *range(n_layers - work.private_last, n_layers)):
        layers[layer] = head
    state = _cut(State(bytes(layers), "r" * n_layers), problem, slots)
    if state is None or not _has_required(problem, state):
        return None
    filler = Filler(problem, slots, MemoryModel(problem))
    for order in ORDERS:
        filled = filler.filled(state, range(len(slots)), order)
        if filled is not None:
            return to_ring(filled, slots, tuple(device.name for device in problem.devices))
    return None


def _has_required(problem: Problem, state: State) -> bool:
    used = {problem.devices[owner].name for owner in state.owners}
    return used >= set(problem.constraints.required)


def _cut(state: State, problem: Problem, slots: tuple[Slot, ...]) -> State | None:
    """The state with its boundaries moved as little as needed to where the model may be cut, by dynamic programming."""
    if may_cut(state, problem.shape, slots):
        return state
    windows, n_layers = list(state.windows()), len(state.owners)
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for rank, (_, _, wanted) in enumerate(windows):
        following: dict[int, tuple[int, tuple[int, ...]]] = {}
        for begin, (cost, ends) in best.items():
            lasts = (n_layers,) if rank == len(windows) - 1 else range(begin + 1, n_layers)
            for end in lasts:
                if begin >= n_layers or end <= begin or not problem.shape.may_cut(begin, end):
                    continue
                moved = cost + abs(end - wanted)
                if moved < following.get(end, (math.inf, ()))[0]:
                    following[end] = (moved, (*ends, end))
        best = following
    if n_layers not in best:
        return None
    owners = bytearray()
    for (owner, _, _), end in zip(windows, best[n_layers][1], strict=True):
        owners += bytes([owner]) * (end - len(owners))
    limits = problem.constraints
    private = owners[: limits.private_first] + owners[n_layers - limits.private_last :]
    if any(owner != owners[0] for owner in private):
        return None
    return State(bytes(owners), state.places)
