"""Whether windows are a ring at all: every layer once and in order, cuts that the model allows, the user's demands."""

from __future__ import annotations

from homeinfer.cluster.planning.plan import Ring
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.rounds import has_rounds
from homeinfer.model.records import printable


def ring_trouble(problem: Problem, ring: Ring, head: str, names: frozenset[str]) -> str | None:
    """What is wrong with a ring whatever memory and time it takes, or None."""
    windows, shape = ring.windows, problem.shape
    at = 0
    for window in windows:
        if window.first != at or window.last <= at or len(window.places) != window.last - window.first:
            return f"layer {at} must come next, and a window of layers {window.first} to {window.last - 1} comes"
        if window.device not in names:
            return f"no profile is named {printable(window.device, 60)}"
        for first, last, _place in window.runs():
            if not shape.may_cut(first, last):
                return f"layers {first} to {last - 1} of this model can't be a window"
        at = window.last
    if at != len(shape.layers):
        return f"the ring ends with layer {at - 1}, the model with {len(shape.layers) - 1}"
    if windows[0].device != head or windows[-1].device != head:
        return f"the first and the last window must be {printable(head, 60)}'s, where the user is"
    return _unmet(problem, ring, head)


def _unmet(problem: Problem, ring: Ring, head: str) -> str | None:
    demands, n = problem.constraints, len(problem.shape.layers)
    used = {window.device for window in ring.windows}
    for name in demands.forbidden:
        if name in used:
            return f"{printable(name, 60)} was ruled out"
    for name in demands.required:
        if name not in used:
            return f"{printable(name, 60)} must take part"
    if demands.rounds and not has_rounds([window.device for window in ring.windows], demands.rounds):
        return f"each device must have {demands.rounds} of the windows, and the head the last one besides"
    for window in ring.windows:
        is_private = window.first < demands.private_first or window.last > n - demands.private_last
        if is_private and window.device != head:
            return f"the first {demands.private_first} and last {demands.private_last} layers stay on the head"
    return None
