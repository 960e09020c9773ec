"""One type per tensor: the least predicted KLD for a number of bytes, as a multiple-choice knapsack (HiGHS).

Pure: options in, choices out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import highspy
import msgspec
import numpy as np

from homeinfer.errors import HomeinferError

_GAP = 1e-4
"""Relative distance to the best possible at which the search may stop: far below what predictions are good for."""
_SECONDS = 30.0


class Option(msgspec.Struct, frozen=True):
    """A tensor as this type: its bytes in the file, padding included, and the KLD it is predicted to cost."""

    type: str
    bytes: int
    kld: float


class Item(msgspec.Struct, frozen=True):
    """A tensor and the types it may have."""

    name: str
    options: tuple[Option, ...]


class Allocation(msgspec.Struct, frozen=True):
    """The option of each item, by name, with the sums over all of them."""

    choices: dict[str, Option]
    bytes: int
    kld: float


def efficient(options: Sequence[Option]) -> tuple[Option, ...]:
    """Those that no other beats in both bytes and KLD, smallest first; of equal ones the first given."""
    best: list[Option] = []
    for option in sorted(options, key=lambda each: (each.bytes, each.kld)):
        if not best or option.kld < best[-1].kld:
            best.append(option)
    return tuple(best)


def allocate(items: Sequence[Item], limit_bytes: int) -> Allocation:
    """The choice of one option per item with the least sum of KLD whose bytes are at most limit_bytes.

    Raises HomeinferError when even the smallest options are too many bytes.
    """
    pruned = [efficient(item.options) for item in items]
    least = sum(options[0].bytes for options in pruned)
    if least > limit_bytes:
        raise HomeinferError(
            f"the tensors take at least {least:,} bytes with the types there are to choose from, and {limit_bytes:,} "
            "are left for them; ask for more"
        )
    if sum(options[-1].bytes for options in pruned) <= limit_bytes:
        chosen = [len(options) - 1 for options in pruned]
    else:
        chosen = _within(pruned, _solve(pruned, limit_bytes), limit_bytes)
    choices = {item.name: options[k] for item, options, k in zip(items, pruned, chosen, strict=True)}
    return Allocation(
        choices, sum(option.bytes for option in choices.values()), sum(option.kld for option in choices.values())
    )


def _solve(pruned: Sequence[Sequence[Option]], limit_bytes: int) -> list[int]:
    """Which option of each item HiGHS takes; its tolerance may leave the sum some bytes over the limit."""
    flat = [option for options in pruned for option in options]
    owner = np.repeat(np.arange(len(pruned)), [len(options) for options in pruned])
    kld = np.array([option.kld for option in flat])
    size = np.array([option.bytes for option in flat], np.float64) / limit_bytes
    solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    for option, value in (("output_flag", False), ("threads", 1), ("mip_rel_gap", _GAP), ("time_limit", _SECONDS)):
        solver.setOptionValue(option, value)
    model = highspy.HighsLp()
    n = len(flat)
    model.num_col_, model.num_row_ = n, len(pruned) + 1
    # costs far below 1 would be lost in the solver's absolute tolerances
    model.col_cost_ = kld / max(kld.max(), 1e-30) * 1e3
    model.col_lower_, model.col_upper_ = np.zeros(n), np.ones(n)
    model.row_lower_ = np.append(np.ones(len(pruned)), 0.0)
    model.row_upper_ = np.append(np.ones(len(pruned)), 1.0)
    model.integrality_ = [highspy.HighsVarType.kInteger] * n
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.arange(0, 2 * n + 1, 2)
    model.a_matrix_.index_ = np.column_stack((owner, np.full(n, len(pruned)))).ravel()
    model.a_matrix_.value_ = np.column_stack((np.ones(n), size)).ravel()
    solver.passModel(model)
    solver.run()
    taken = np.array(solver.getSolution().col_value)
    if len(taken) != n:
        raise HomeinferError("HiGHS found no types for this budget; report this as a bug")
    starts = np.searchsorted(owner, np.arange(len(pruned)))
    return [int(np.argmax(taken[at : at + len(options)])) for at, options in zip(starts, pruned, strict=True)]


def _within(pruned: Sequence[Sequence[Option]], chosen: list[int], limit_bytes: int) -> list[int]:
    """The same choice with single steps down, cheapest per byte first, until the bytes are within the limit."""
    chosen = list(chosen)
    total = sum(options[k].bytes for options, k in zip(pruned, chosen, strict=True))
    while total > limit_bytes:
        steps = [
            ((options[k - 1].kld - options[k].kld) / (options[k].bytes - options[k - 1].bytes), index)
            for index, (options, k) in enumerate(zip(pruned, chosen, strict=True))
            if k > 0
        ]
        _, index = min(steps)
        total += pruned[index][chosen[index] - 1].bytes - pruned[index][chosen[index]].bytes
        chosen[index] -= 1
    return chosen
