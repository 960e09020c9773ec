"""How many tokens of a prompt the ring takes in one step: what intermediate results don't need, layers may. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

_SMALLER_BATCHES = (256, 128, 64, 32)
_OF_TTFT = 0.02
"""A plan whose first token takes twice as long is worth having for 1.4 % of the rest, one that takes 16 times as long
for 5.7 %: about what that is of an answer of a few hundred tokens, where layers are read from disk for each step."""
_SAME = 1 + 1e-9


class Plan(Protocol):
    """value: of its objective, small is good. ttft_ms: to the first token."""

    @property
    def value(self) -> float: ...
    @property
    def ttft_ms(self) -> float: ...


AnyPlan = TypeVar("AnyPlan", bound=Plan)
Solved = Callable[[int], AnyPlan | None]
"""The best plan for a size of steps, found at length; None where there is none."""
Again = Callable[[int, AnyPlan, float], AnyPlan | None]
"""The best plan for a size near another size's plan, found at once; None where none has a value up to the limit."""


def batch_sizes(most: int) -> tuple[int, ...]:
    """Tokens of a prompt in one step, from the most that is wanted down: fewer need less memory for intermediate
    results, which layers may be worth more."""
    return (most, *(n for n in _SMALLER_BATCHES if n < most))


def cost(plan: Plan) -> float:
    """What the best plan of several sizes of steps has the least of: its value, and a little of its TTFT."""
    return float(plan.value * plan.ttft_ms**_OF_TTFT)


def best_where_room_matters(sizes: Sequence[int], solved: Solved[AnyPlan], again: Again[AnyPlan]) -> AnyPlan | None:
    """The plan of the least cost of all sizes, the largest first, when steps only take room from layers.

    The smallest come first: their plan is none the worse with larger steps as long as these fit, so that one search
    is enough where there is plenty of memory.
    """
    smallest = solved(sizes[-1])
    if smallest is None:
        return None
    best = smallest
    for n in sizes[:-1]:
        limit = smallest.value * (n / sizes[-1]) ** _OF_TTFT
        plan = again(n, smallest, limit)
        is_as_fast = plan is not None and plan.value <= smallest.value * _SAME
        if plan is not None and (cost(plan) < cost(best) or (is_as_fast and best is smallest)):
            best = plan
        if is_as_fast:
            break
    return best


def best_where_steps_matter(sizes: Sequence[int], solved: Solved[AnyPlan], again: Again[AnyPlan]) -> AnyPlan | None:
    """The plan of the least value when larger steps are better themselves (time to the first token)."""
    best = solved(sizes[0]) or solved(sizes[-1])
    if best is None:
        return None
    start = best
    for n in sizes:
        plan = again(n, start, math.nextafter(best.value, 0.0))
        best = plan or best
    return best
