"""How many layers each device gets when all are like the average: a mixed-integer linear program (HiGHS). Pure.

For each device r, s and g layers in memory, streamed and on the GPU, u: it takes part, v: it streams; T: ms per token.
minimize T;  T >= sum(ms of all layers + u * hop);  T >= each disk's reads;  memory and GPU hold what they must;
sum(r + s + g) = L. Halda's program (arXiv 2504.08791) without its classes and without a layer for everyone.
"""

from __future__ import annotations

import math

import highspy
import msgspec

from homeinfer.cluster.planning.solve_table import Table

_GAP = 0.01
_MOST_NODES = 300


class Counts(msgspec.Struct, frozen=True):
    """Layers of one slot."""

    resident: int
    streamed: int
    gpu: int


class _Program:
    """Columns and rows for HiGHS."""

    def __init__(self) -> None:
        self.highs = highspy.Highs()  # type: ignore[no-untyped-call]
        for option, value in (("output_flag", False), ("threads", 1), ("random_seed", 0)):
            self.highs.setOptionValue(option, value)
        self.highs.setOptionValue("mip_rel_gap", _GAP)
        self.highs.setOptionValue("mip_max_nodes", _MOST_NODES)
        self._n = 0

    def column(self, upper: float, cost: float = 0.0, lower: float = 0.0, *, is_integer: bool = True) -> int:
        self.highs.addCol(cost, lower, upper, 0, [], [])
        if is_integer:
            self.highs.changeColIntegrality(self._n, highspy.HighsVarType.kInteger)
        self._n += 1
        return self._n - 1

    def row(self, terms: dict[int, float], lower: float, upper: float) -> None:
        self.highs.addRow(lower, upper, len(terms), list(terms), list(terms.values()))

    def solve(self) -> list[float] | None:
        self.highs.run()
        info = self.highs.getInfo()
        if info.primal_solution_status != 2:
            return None
        return [float(value) for value in self.highs.getSolution().col_value]


def average_counts(table: Table) -> dict[int, Counts] | None:
    """Slots that hold layers, with how many; None when averages fit nowhere."""
    program, n_layers = _Program(), table.n_layers
    infinity = highspy.kHighsInf
    whole = program.column(infinity, 1.0, is_integer=False)
    way, every = {whole: -1.0}, dict[int, float]()
    disks: dict[int, dict[int, float]] = {}
    columns: dict[int, tuple[int, int, int]] = {}
    taking_part: dict[int, list[int]] = {}
    for slot in table.usable:
        found = _add_slot(program, table, slot, way, disks)
        columns[slot] = found[:3]
        taking_part.setdefault(table.slots[slot].device, []).append(found[3])
        every.update(dict.fromkeys(found[:3], 1.0))
    private = table.problem.constraints.private_first + table.problem.constraints.private_last
    heads = {column: 1.0 for slot in table.heads for column in columns[slot]}
    program.row(heads, min(private, n_layers), infinity)
    for device in table.required:
        program.row(dict.fromkeys(taking_part[device], 1.0), 1.0, infinity)
    program.row(every, n_layers, n_layers)
    program.row(way, -infinity, 0.0)
    for terms in disks.values():
        program.row({whole: -1.0, **terms}, -infinity, 0.0)
    values = program.solve()
    if values is None:
        return None
    found_counts = {slot: Counts(*(round(values[column]) for column in own)) for slot, own in columns.items()}
    return {slot: c for slot, c in found_counts.items() if c.resident + c.streamed + c.gpu}


def _add_slot(
    program: _Program, table: Table, slot: int, way: dict[int, float], disks: dict[int, dict[int, float]]
) -> tuple[int, int, int, int]:
    """Columns r, s, g and u of one slot, with its memory's rows and its part of the way around."""
    n_layers, where = table.n_layers, table.slots[slot]
    profile, sums = table.problem.devices[where.device], table.step.sums[slot]
    weights, kept = table.memory.weights[-1] / n_layers / 1e6, table.memory.kept[-1] / n_layers / 1e6
    ends = (table.shape.output_bytes + table.shape.scratch_logits_bytes) / 1e6 if slot in table.heads else 0.0
    fixed = (profile.overhead_bytes + table.shape.scratch_bytes) / 1e6 + ends
    uppers = [float(n_layers) if place in sums else 0.0 for place in ("r", "s", "g")]
    resident, streamed, gpu = (program.column(upper) for upper in uppers)
    used, streams = program.column(1.0), program.column(1.0)
    for place, column in zip(("r", "s", "g"), (resident, streamed, gpu), strict=True):
        if place in sums:
            way[column] = sums[place][n_layers] / n_layers
    way[used] = table.lead[slot] + (0.0 if slot in table.heads else _hop(table, slot))
    shared = 1.0 if where.has_gpu and profile.gpus[where.gpu].is_unified else 0.0
    program.row(
        {
            resident: weights + kept,
            streamed: kept,
            gpu: shared * (weights + kept),
            used: fixed,
            streams: weights,
        },
        -highspy.kHighsInf,
        table.memory.limit(profile) / 1e6,
    )
    if where.has_gpu:
        room = profile.gpus[where.gpu].memory_bytes * (1 - table.problem.workload.headroom)
        program.row({gpu: weights + kept}, -highspy.kHighsInf, (room - table.shape.scratch_bytes) / 1e6)
    program.row({resident: 1.0, streamed: 1.0, gpu: 1.0, used: -float(n_layers)}, -highspy.kHighsInf, 0.0)
    program.row({streamed: 1.0, streams: -float(n_layers)}, -highspy.kHighsInf, 0.0)
    always = table.always[-1] / n_layers
    disks.setdefault(table.disk_of[where.device], {})[streamed] = always * table.read_ms[where.device]
    return resident, streamed, gpu, used


def _hop(table: Table, slot: int) -> float:
    """What it costs to have a device in the ring: the median hop to it."""
    ways = sorted(table.step.hops[other][slot] for other in table.usable if other != slot)
    return ways[len(ways) // 2] if ways else math.inf
