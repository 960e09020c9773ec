"""The map of a quantized model: bits per weight, modules down, layers across, with what each row
takes and costs beside it and what each layer costs below."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from homeinfer.quant.report_data import TensorChoice
from homeinfer.quant.report_svg import Drawing, bits_per_weight, bits_step, nbytes, percent
from homeinfer.svg import WIDTH, box, figures, line, text

_EXPERT_NUMBER = re.compile(r"\.\d+$")
_PARTS = (
    "qkv", "q", "q_a", "q_b", "k", "kv_a_mqa", "kv_b", "k_b", "v", "v_b", "output",
    "gate_inp", "gate_up", "gate", "up", "down",
)  # fmt: skip
_MINOR_SHARE = 0.005
_MAX_ROWS, _MAX_COLUMNS = 40, 256
_LEFT, _CELLS, _ROW, _WIDEST_CELL = 136, 516, 22, 40
_NUMBERED_CELL = 16.5
"""Cells at least so wide have room for their number."""


class Module(msgspec.Struct, frozen=True):
    """All tensors of one role: in the layers, or outside of them."""

    role: str
    in_layers: bool
    tensors: tuple[TensorChoice, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        return bits_per_weight(self.nbytes, sum(tensor.n_weights for tensor in self.tensors))

    @property
    def kld(self) -> float:
        return total_kld(self.tensors)


def total_kld(tensors: Iterable[TensorChoice]) -> float:
    """The sum of the predicted shares that can be any, in nats: not of negative, endless or missing ones."""
    return sum(kld for tensor in tensors if 0 < (kld := tensor.predicted_kld) < 1e9)


def modules(tensors: Iterable[TensorChoice]) -> tuple[Module, ...]:
    """By role: embeddings and output, then the layers' own in the order of a forward pass. Experts
    that are tensors of their own (ffn_up.17) count as one role."""
    found: defaultdict[tuple[bool, str], list[TensorChoice]] = defaultdict(list)
    for tensor in tensors:
        found[tensor.layer is not None, _EXPERT_NUMBER.sub("", tensor.role)].append(tensor)
    order = sorted(found, key=lambda key: _order(*key))
    return tuple(Module(role, in_layers, tuple(found[in_layers, role])) for in_layers, role in order)


def bits_map(tensors: Sequence[TensorChoice]) -> Drawing:
    """The map with its legend; tensors too small to matter are counted below it."""
    rows, rest = _shown(modules(tensors))
    if not rows:
        return Drawing(30, text(0, 20, "There are no tensors to show.", "soft"), "no tensors")
    columns = _columns(rows)
    cell = min(_CELLS / max(len(columns), 1), _WIDEST_CELL)
    width = cell * max(len(columns), 1) if columns else _CELLS / 2
    parts = [text(0, 14, "Bits per weight, module by module and layer by layer", "ink head")]
    y = _legend(rows, sum(tensor.bytes for tensor in tensors), parts)
    margin = _Margin(rows, _LEFT + width + 14)
    parts.append(margin.titles(y))
    y += 8
    for above, row in zip((None, *rows), rows, strict=False):
        y += 8 if above and above.in_layers != row.in_layers else 0
        parts.append(text(_LEFT - 8, y + 15, _short(row.role), "ink", "end"))
        parts += _cells(row, columns, cell, width, y)
        parts.append(margin.row(row, y))
        y += _ROW
    y = _layer_axis(columns, cell, y, parts)
    y = _layer_costs(rows, columns, cell, y, parts)
    if rest:
        y += 18
        parts.append(text(0, y, _rest(rest), "soft small"))
    return Drawing(y + 6, "".join(parts), "bits per weight of every module in every layer")


class _Margin:
    """Right of the map: each row's mean bits, bytes and share of the predicted KLD."""

    def __init__(self, rows: Sequence[Module], left: float) -> None:
        self._most_bytes = max(row.nbytes for row in rows) or 1
        self._all_kld = sum(row.kld for row in rows)
        self._most_kld = max(row.kld for row in rows)
        self._bits_end = left + 28
        self._bytes = left + 44
        bars = 2 if self._all_kld else 1
        room = (WIDTH - self._bytes) / bars
        self._bar = min(room - 62, 200)
        self._kld = self._bytes + room

    def titles(self, y: float) -> str:
        titles = text(self._bits_end, y, "bpw", "soft small", "end") + text(self._bytes, y, "size", "soft small")
        return titles + (text(self._kld, y, "predicted KLD", "soft small") if self._all_kld else "")

    def row(self, row: Module, y: float) -> str:
        parts = [text(self._bits_end, y + 15, f"{row.bpw:.2f}", "ink small", "end")]
        parts += self._measure(self._bytes, y, row.nbytes / self._most_bytes, "bar", nbytes(row.nbytes, 3))
        if self._all_kld:
            parts += self._measure(
                self._kld, y, row.kld / self._most_kld, "mine cost", percent(row.kld / self._all_kld)
            )
        return "".join(parts)

    def _measure(self, x: float, y: float, share: float, kind: str, words: str) -> list[str]:
        length = max(self._bar * share, 0.75 if share else 0)
        return [box(x, y + 5, length, _ROW - 11, kind), text(x + length + 5, y + 15, words, "soft small")]


def _shown(found: Sequence[Module]) -> tuple[list[Module], list[Module]]:
    """The modules worth a row, and the others: kept and small, or too many."""
    total = sum(module.nbytes for module in found)
    minor = {
        id(module)
        for module in found
        if module.nbytes < _MINOR_SHARE * total and all(tensor.method == "kept" for tensor in module.tensors)
    }
    worth = sorted((module for module in found if id(module) not in minor), key=lambda module: -module.nbytes)
    rows = {id(module) for module in worth[:_MAX_ROWS]}
    return [module for module in found if id(module) in rows], [module for module in found if id(module) not in rows]


def _columns(rows: Sequence[Module]) -> list[tuple[int, int]]:
    """First and last layer of each column; several layers share one in models deeper than any known."""
    layers = sorted({tensor.layer for row in rows for tensor in row.tensors if tensor.layer is not None})
    step = -(-len(layers) // _MAX_COLUMNS)
    return [(layers[at], layers[min(at + step, len(layers)) - 1]) for at in range(0, len(layers), max(step, 1))]


def _by_column(row: Module, columns: Sequence[tuple[int, int]]) -> list[list[TensorChoice]]:
    starts = [first for first, _ in columns]
    cells: list[list[TensorChoice]] = [[] for _ in columns]
    for tensor in row.tensors:
        if tensor.layer is not None:
            cells[bisect_right(starts, tensor.layer) - 1].append(tensor)
    return cells


def _cells(row: Module, columns: Sequence[tuple[int, int]], cell: float, width: float, y: float) -> list[str]:
    if not row.in_layers:
        kinds = ", ".join(sorted({tensor.type for tensor in row.tensors}))
        words = f"{kinds}, {row.bpw:.2f} bits" if width > 10 * _WIDEST_CELL else f"{row.bpw:.1f}"
        return _cell(row.tensors, _LEFT, y, width, words)
    parts = []
    for at, tensors in enumerate(_by_column(row, columns)):
        if tensors:
            bits = bits_per_weight(sum(t.bytes for t in tensors), sum(t.n_weights for t in tensors))
            number = (f"{bits:.1f}" if bits < 9.95 else f"{bits:.0f}") if cell >= _NUMBERED_CELL else ""
            parts += _cell(tensors, _LEFT + at * cell, y, cell, number)
    return parts


def _cell(tensors: Sequence[TensorChoice], x: float, y: float, width: float, number: str) -> list[str]:
    bits = bits_per_weight(sum(t.bytes for t in tensors), sum(t.n_weights for t in tensors))
    step = bits_step(bits)
    gap = 1.0 if width > 6 else 0.4
    parts = [box(x, y, width - gap, _ROW - 1, f"q{step}", _told(tensors))]
    if number:
        parts.append(text(x + (width - gap) / 2, y + 14, number, f"cell on{step}", "middle"))
    return parts


def _told(tensors: Sequence[TensorChoice]) -> str:
    """What a cell says when pointed at."""
    size, kld = sum(tensor.bytes for tensor in tensors), total_kld(tensors)
    bits = bits_per_weight(size, sum(tensor.n_weights for tensor in tensors))
    name = tensors[0].name + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")
    kinds = ", ".join(kind for kind, _ in Counter(tensor.type for tensor in tensors).most_common(3))
    methods = ", ".join(sorted({tensor.method for tensor in tensors}))
    cost = f", predicted KLD {kld:.3g}" if kld else ""
    return f"{name}: {kinds}, {bits:.2f} bits, {nbytes(size)}{cost}, {methods}"


def _legend(rows: Sequence[Module], total: int, parts: list[str]) -> float:
    """The types on the map, fewest bits first, with their share of all bytes; returns where it ends."""
    by_type: defaultdict[str, list[TensorChoice]] = defaultdict(list)
    for row in rows:
        for tensor in row.tensors:
            by_type[tensor.type].append(tensor)
    kinds = []
    for kind, tensors in by_type.items():
        size = sum(tensor.bytes for tensor in tensors)
        kinds.append((bits_per_weight(size, sum(tensor.n_weights for tensor in tensors)), kind, size / (total or 1)))
    y = 38.0
    for at, (bits, kind, share) in enumerate(sorted(kinds)[:25]):
        x, y = at % 5 * WIDTH / 5, 38.0 + at // 5 * 19
        parts.append(box(x, y - 10, 12, 12, f"q{bits_step(bits)}", radius=2))
        parts.append(text(x + 18, y, f"{kind[:9]} {figures(bits)} bits, {percent(share)}", "soft small"))
    return y + 30


def _layer_axis(columns: Sequence[tuple[int, int]], cell: float, y: float, parts: list[str]) -> float:
    if not columns:
        return y
    every = next((step for step in (1, 2, 5, 10, 20, 50, 100) if step * cell >= 22), 200)
    parts.append(text(_LEFT - 8, y + 14, "layer", "soft small", "end"))
    for at, (first, _) in enumerate(columns):
        if at % every == 0:
            parts.append(text(_LEFT + at * cell + (cell - 1) / 2, y + 14, str(first)[:8], "soft small", "middle"))
    return y + 18


def _layer_costs(
    rows: Sequence[Module], columns: Sequence[tuple[int, int]], cell: float, y: float, parts: list[str]
) -> float:
    """Each layer's share of the predicted KLD as bars."""
    everything = sum(row.kld for row in rows)
    costs = [0.0] * len(columns)
    for row in rows:
        for at, tensors in enumerate(_by_column(row, columns) if row.in_layers else []):
            costs[at] += total_kld(tensors)
    most = max(costs, default=0.0)
    if not most or len(columns) < 2:
        return y
    high, base = 40.0, y + 48
    parts.append(text(_LEFT - 8, base - 16, "predicted KLD", "soft small", "end"))
    parts.append(text(_LEFT - 8, base - 2, f"up to {percent(most / everything)}", "soft small", "end"))
    for at, (cost, (first, last)) in enumerate(zip(costs, columns, strict=True)):
        tall = high * cost / most
        name = f"layer {first}" if first == last else f"layers {first} to {last}"
        title = f"{name}: {percent(cost / everything)} of the predicted KLD, {cost:.3g}"
        parts.append(box(_LEFT + at * cell, base - tall, cell - (1.0 if cell > 6 else 0.4), tall, "mine cost", title))
    parts.append(line(_LEFT, base + 0.5, _LEFT + cell * len(columns), base + 0.5, "axis"))
    return base + 2


def _rest(rest: Sequence[Module]) -> str:
    tensors = [tensor for module in rest for tensor in module.tensors]
    kept = all(tensor.method == "kept" for tensor in tensors)
    what = "small tensors kept as they are" if kept else "tensors of other modules"
    some = ", ".join(_short(module.role) for module in rest[:3]) + ("…" if len(rest) > 3 else "")
    return f"Not on the map: {len(tensors):,} {what} ({some}), {nbytes(sum(tensor.bytes for tensor in tensors))}."


def _short(role: str) -> str:
    return role if len(role) <= 20 else role[:19] + "…"


def _order(in_layers: bool, role: str) -> tuple[int, int, str]:
    if not in_layers:
        return 0, int(role.startswith("output")), role
    base = role.removesuffix("_chexps").removesuffix("_exps").removesuffix("_shexp")
    if role.startswith("ffn"):
        group = 6 if role.endswith(("exps", "gate_inp")) else 5 if role.endswith("shexp") else 4
    else:
        group = 2 if role.startswith("attn") else 3
    part = base.partition("_")[2]
    return group, _PARTS.index(part) if part in _PARTS else len(_PARTS), role
