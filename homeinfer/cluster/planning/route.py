"""A ring as what happens at one step in turn: hops, overhead, waiting for a layer, computing. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from homeinfer.cluster.planning.costs import DeviceCosts, Hop
from homeinfer.cluster.planning.memory import DeviceMemory, MemoryModel, distinct_share
from homeinfer.cluster.planning.plan import Ring
from homeinfer.cluster.planning.shape import ModelShape

ZIPF_EXPONENT = 0.5
"""How uneven experts are used: the i-th most used one in proportion to i^-s. An assumption: routers are trained to
balance it. To be replaced by counts where an imatrix has them."""


class Piece(NamedTuple):
    """lead: preparing a run. item: which of the device's streamed layers must be in memory, -1: none.
    fault: experts read on demand. compute: of [first, last), all in milliseconds."""

    lead: float
    item: int
    fault: float
    compute: float
    first: int
    last: int


class Stage(NamedTuple):
    """One window: the hop to it (delay, wire, and the receiver's own work), then its pieces."""

    device: str
    sender: str
    delay: float
    wire: float
    receive: float
    pieces: tuple[Piece, ...]


class Stream(NamedTuple):
    """A device's streamed layers in ring order, a layer once for each of its parts: bytes of each, milliseconds of
    reading it, and `back`: item i may be read when item i - back was released. The output matrix is the layer after
    the last. buffer: the bytes that they pass through."""

    layers: tuple[int, ...]
    sizes: tuple[float, ...]
    read: tuple[float, ...]
    back: tuple[int, ...]
    buffer: int


class Streamed(NamedTuple):
    """What a device does with layers that are not resident. buffer: for the engine's streamer; used: memory in all,
    with experts that stay in the page cache; miss: the share of expert reads that go to the disk; stream: None
    where everything fits and is read once."""

    buffer: int
    used: int
    miss: float
    stream: Stream | None


def expert_hits(kept: float) -> float:
    """The share of expert reads that memory answers when the most used `kept` (0..1) of them are there: the integral
    of a Zipf law over a continuum of experts."""
    return float(min(max(kept, 0.0), 1.0) ** (1 - ZIPF_EXPONENT))


def streamed_of(
    model: MemoryModel, shape: ModelShape, ring: Ring, memories: dict[str, DeviceMemory], costs: dict[str, DeviceCosts]
) -> dict[str, Streamed]:
    """What each device with streamed layers does with them."""
    layers_of: dict[str, list[int]] = {}
    for window in ring.windows:
        if "s" in window.places:
            layers = layers_of.setdefault(window.device, [])
            layers += [index for index, place in enumerate(window.places, window.first) if place == "s"]
            if window.last == len(shape.layers) and window.places[-1] == "s":
                layers.append(window.last)
    return {
        name: _streamed(model, shape, tuple(layers), memories[name].buffer, costs[name])
        for name, layers in layers_of.items()
    }


def _streamed(model: MemoryModel, shape: ModelShape, layers: tuple[int, ...], room: int, cost: DeviceCosts) -> Streamed:
    sizes = [model.always(layer) for layer in layers]
    total = sum(sizes)
    experts = sum(shape.layers[layer].expert_bytes for layer in layers if layer < len(shape.layers))
    if total + experts <= room:
        return Streamed(total, total + experts, 0.0, None)
    # what is always touched is kept first, then the experts that are used most; some room is for those passing by
    buffer = room - max(model.touched(layer) for layer in layers)
    miss = 1 - expert_hits(max(buffer - total, 0) / experts) if experts else 0.0
    if total <= buffer:
        return Streamed(total, room, miss, None)
    rate = cost.profile.disk.layer_bytes_per_s / 1e3
    parts = [(layer, size / n) for layer, size in zip(layers, sizes, strict=True) for n in repeat_parts(shape, layer)]
    pieces = tuple(size for _, size in parts)
    items = tuple(layer for layer, _ in parts)
    stream = Stream(items, pieces, tuple(size / rate for size in pieces), backs(pieces, buffer), buffer)
    return Streamed(buffer, room, miss, stream)


def repeat_parts(shape: ModelShape, layer: int) -> tuple[int, ...]:
    """A streamed layer is read and let go tensor by tensor: as many times their number as there are about, when all
    are as large as the largest."""
    if layer == len(shape.layers) or not shape.layers[layer].largest_bytes:
        return (1,)
    one = shape.layers[layer]
    n = max(1, round((one.nbytes - one.expert_bytes) / one.largest_bytes))
    return (n,) * n


def backs(sizes: tuple[float, ...], buffer: float) -> tuple[int, ...]:
    """How many items, ending with each, fit the buffer together (ring order, around the end)."""
    n, found = len(sizes), []
    for index in range(n):
        room, count = buffer, 0
        while count < n and sizes[(index - count) % n] <= room:
            room -= sizes[(index - count) % n]
            count += 1
        found.append(max(count, 1))
    return tuple(found)


Sums = Callable[[DeviceCosts, str, int], list[float]]


def route(
    shape: ModelShape,
    ring: Ring,
    costs: dict[str, DeviceCosts],
    hop_of: Callable[[str, str], Hop],
    streamed: dict[str, Streamed],
    sums_of: Sums,
    n_tokens: int,
    n_rows: int,
) -> list[Stage]:
    """The stages of a step of n_tokens, n_rows of which get logits. Where none does, the output matrix is not read
    (engine/output_rows.py; is_computed in native/stream.c)."""
    stages: list[Stage] = []
    before = ""
    items = {name: 0 for name, way in streamed.items() if way.stream is not None}
    for window in ring.windows:
        name, cost = window.device, costs[window.device]
        delay = wire = receive = 0.0
        if before and before != name:
            there = hop_of(before, name)
            delay, wire, receive = there.latency_ms, there.token_ms * n_tokens, cost.profile.hop_ms
        pieces: list[Piece] = []
        for first, last, place in window.runs():
            sums = sums_of(cost, place, window.gpu)
            lead = cost.profile.window_ms
            way = streamed[name] if place == "s" else None
            if way is None or (way.stream is None and way.miss == 0):
                pieces.append(Piece(lead, -1, 0.0, sums[last] - sums[first], first, last))
            else:
                for layer in range(first, last):
                    fault = _fault_ms(shape, layer, n_tokens, way.miss, cost)
                    for n in repeat_parts(shape, layer) if way.stream is not None else (1,):
                        compute = (sums[layer + 1] - sums[layer]) / n
                        pieces.append(Piece(lead, _next(items, name), fault, compute, layer, layer + 1))
                        lead = fault = 0.0
            if last == len(shape.layers) and n_rows:
                output = cost.output_ms(place, window.gpu, n_rows) or 0.0
                pieces.append(Piece(0.0, -1 if way is None else _next(items, name), 0.0, output, last, last))
        stages.append(Stage(name, before, delay, wire, receive, tuple(pieces)))
        before = name
    return stages


def _next(items: dict[str, int], name: str) -> int:
    """The number of a device's next streamed layer, -1 where none is read."""
    if name not in items:
        return -1
    items[name] += 1
    return items[name] - 1


def _fault_ms(shape: ModelShape, layer: int, n_tokens: int, miss: float, cost: DeviceCosts) -> float:
    experts = shape.layers[layer]
    touched = experts.expert_bytes * distinct_share(experts.expert_share, n_tokens)
    return touched * miss / cost.profile.disk.fault_bytes_per_s * 1e3
