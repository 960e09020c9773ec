"""prima.cpp's rule (Halda, arXiv 2504.08791, section 3): layers all alike, k rounds of equal windows. Pure functions.

Token time = k * sum over devices of (w * layer + n * (GPU layer - layer) + hop), w layers in a round of which n on the
GPU, sum(w) = L / k, w >= 1. Every layer of a device that is short of memory is charged with a read from disk, without
overlap (classes M1 to M3); a device whose layers fit is charged with none (M4). Halda guesses the classes, solves an
integer program and guesses again; here a dynamic program finds the best over all classes at once, which is never worse.
"""

from __future__ import annotations

import math

import msgspec

from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.profile import DeviceProfile, Place


class Coefficients(msgspec.Struct, frozen=True):
    """One device in Halda's terms: milliseconds for an average layer in memory and on the GPU, to read it, per round;
    how many average layers its memory and its GPU hold."""

    layer_ms: float
    gpu_ms: float
    disk_ms: float
    hop_ms: float
    memory_layers: float
    gpu_layers: float


class Shares(msgspec.Struct, frozen=True):
    """rounds: k. layers: w of each device. gpu: n of each. cost_ms: what the rule believes."""

    rounds: int
    layers: tuple[int, ...]
    gpu: tuple[int, ...]
    cost_ms: float


def halda(problem: Problem, order: tuple[int, ...]) -> list[Shares]:
    """For devices in ring order (the head first), the best shares for every k that divides L, the best first.

    Empty when there are fewer layers than devices.
    """
    n_layers = len(problem.shape.layers)
    devices = [coefficients(problem, problem.devices[index], is_head=not rank) for rank, index in enumerate(order)]
    found = []
    for rounds in range(1, n_layers // 2 + 1):
        if n_layers % rounds or n_layers // rounds < len(devices):
            continue
        shares = _divide(devices, n_layers // rounds, rounds)
        if shares is not None:
            found.append(shares)
    return sorted(found, key=lambda shares: (shares.cost_ms, shares.rounds))


def coefficients(problem: Problem, device: DeviceProfile, *, is_head: bool) -> Coefficients:
    """Averages over the model's layers."""
    shape, work = problem.shape, problem.workload
    n_layers = len(shape.layers)
    average = sum(layer.nbytes for layer in shape.layers) / n_layers
    kv = sum(layer.kv_bytes for layer in shape.layers) / n_layers * work.n_ctx * work.sequences
    ends = shape.output_bytes + shape.scratch_logits_bytes if is_head else 0
    room = device.memory_bytes * (1 - work.headroom) - device.overhead_bytes - shape.scratch_bytes - ends
    gpu = device.gpus[0] if device.gpus else None
    gpu_room = gpu.memory_bytes * (1 - work.headroom) - shape.scratch_bytes if gpu else 0.0
    hop = device.hop_ms + device.window_ms
    if device.network is not None:
        hop += 1e3 * (device.network.latency_s + shape.hidden_bytes / device.network.bytes_per_s)
    return Coefficients(
        layer_ms=_average_ms(problem, device, "resident"),
        gpu_ms=_average_ms(problem, device, "gpu"),
        disk_ms=1e3 * average / device.disk.layer_bytes_per_s,
        hop_ms=hop,
        memory_layers=max(room / (average + kv), 0.0),
        gpu_layers=max(gpu_room / (average + kv), 0.0),
    )


def _average_ms(problem: Problem, device: DeviceProfile, place: Place) -> float:
    times = {row.kind: row.decode_1_ms for row in reversed(device.times) if row.place == place}
    layers = [times.get(layer.kind, math.inf) for layer in problem.shape.layers]
    return sum(layers) / len(layers)


def _divide(devices: list[Coefficients], width: int, rounds: int) -> Shares | None:
    """The best w and n with sum(w) = width, by dynamic programming over devices."""
    best: list[tuple[float, tuple[int, ...], tuple[int, ...]] | None] = [None] * (width + 1)
    best[0] = (0.0, (), ())
    for device in devices:
        costs = [_device_cost(device, layers, rounds) for layers in range(1, width + 1)]
        following: list[tuple[float, tuple[int, ...], tuple[int, ...]] | None] = [None] * (width + 1)
        for total, so_far in enumerate(best):
            if so_far is None:
                continue
            for layers in range(1, width - total + 1):
                cost, gpu = costs[layers - 1]
                known = following[total + layers]
                if known is None or so_far[0] + cost < known[0] - 1e-12:
                    following[total + layers] = (so_far[0] + cost, (*so_far[1], layers), (*so_far[2], gpu))
        best = following
    end = best[width]
    return None if end is None or math.isinf(end[0]) else Shares(rounds, end[1], end[2], end[0])


def _device_cost(device: Coefficients, layers: int, rounds: int) -> tuple[float, int]:
    """Milliseconds per token of `layers` layers in each round, and how many of them on the GPU."""
    most = min(layers, int(device.gpu_layers / rounds)) if math.isfinite(device.gpu_ms) else 0
    candidates = []
    for gpu in sorted({0, most}):
        on_cpu = layers - gpu
        each = device.layer_ms if on_cpu * rounds <= device.memory_layers else device.layer_ms + device.disk_ms
        on_gpu = gpu * device.gpu_ms if gpu else 0.0
        candidates.append((rounds * (on_cpu * each + on_gpu + device.hop_ms), gpu))
    return min(candidates)
