"""What a device takes for a layer, and a hop for its bytes: from profiles to milliseconds. Pure."""

from __future__ import annotations

from itertools import accumulate

import msgspec

from homeinfer.cluster.planning.plan import Wire, Workload
from homeinfer.cluster.planning.profile import DeviceProfile, KindTimes, Network, Place
from homeinfer.cluster.planning.scratch import CELL_STEP
from homeinfer.cluster.planning.shape import LayerShape, ModelShape
from homeinfer.errors import HomeinferError
from homeinfer.model.records import printable

MAPPED_SLOWDOWN = 1.3
"""How much slower a layer computes mapped than repacked for the CPU, where only that was timed: 40.5 against 31.4
tokens/s on 1.2B Q4_K_M (design/ENGINE.md)."""
DEFAULT_NETWORK = Network(bytes_per_s=300e6 / 8, latency_s=0.001)
"""What a home's wireless network gives, for devices that nobody measured."""
WIRE_BYTES: dict[Wire, float] = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8": 34 / 32}
"""Bytes of a number of the hidden states on the wire."""
DECODE_MACS_PER_BYTE = 0.5
"""Attention of a decode step in multiplications per byte that the memory gives meanwhile, where it was not measured:
llama.cpp without flash attention did 12 to 13 thousand million a second with one thread and 25 GB/s, for SmolLM2 as
for a 1.2B of 32 heads, behind 256 to 2,048 positions."""
PREFILL_SPEEDUP = 3.0
"""How much faster attention multiplies for a whole chunk of a prompt: 28 to 37 thousand million a second there."""
GPU_SHARE = 0.5
"""The share of the rate at which a GPU reads weights that it reads keys and values with."""

_PLACES: dict[str, Place] = {"r": "resident", "s": "mapped", "g": "gpu"}


class Hop(msgspec.Struct, frozen=True):
    """From one device to another: milliseconds of delay, and of the channel for each token."""

    latency_ms: float
    token_ms: float


def interpolated(times: KindTimes, n_tokens: float) -> float:
    """Milliseconds for so many tokens at once: linear between the measured 1, 8 and 512, and beyond."""
    one, eight, many = times.decode_1_ms, times.decode_8_ms, times.prefill_512_ms
    if n_tokens <= 8:
        return max(one + (eight - one) * (n_tokens - 1) / 7, min(one, eight))
    return max(eight + (many - eight) * (n_tokens - 8) / 504, 0.0)


def step_cells(workload: Workload, behind: int) -> int:
    """Cells that a token of a decode step attends to beyond those that the profile's timing had (CELL_STEP): the filled
    part of its own sequence's buffer."""
    filled = min(behind + 1, workload.n_ctx)
    return max(-(-filled // CELL_STEP) - 1, 0) * CELL_STEP


def chunk_cells(n_tokens: int, behind: int) -> float:
    """Cells that a chunk of a prompt attends to beyond those that the profile's timing of as many tokens had."""
    timed = CELL_STEP * (1 + min(n_tokens, 512) / 512)
    return max(-(-(behind + n_tokens) // CELL_STEP) * CELL_STEP - timed, 0.0)


class DeviceCosts:
    """A device's milliseconds for this model's layers."""

    def __init__(self, shape: ModelShape, profile: DeviceProfile, workload: Workload) -> None:
        """Raises HomeinferError, naming the device, where its profile lacks a kind of layer in any place."""
        self.profile = profile
        self._shape = shape
        self._workload = workload
        self._times = {(times.kind, times.place, times.gpu): times for times in profile.times}
        known = {times.kind for times in profile.times}
        missing = {layer.kind for layer in shape.layers} - known
        if missing:
            raise HomeinferError(
                f"the profile of {printable(profile.name, 60)} lacks {len(missing)} kinds of layer of this model: "
                "run 'homeinfer profile MODEL' there"
            )
        self._sums: dict[tuple[str, int, int, int], list[float]] = {}
        self._gaps: dict[tuple[str, int], list[int]] = {}

    def times(self, kind: str, place: str, gpu: int = 0) -> KindTimes | None:
        """What was timed for a kind in a place, or what stands for it; None where nothing does."""
        found = self._times.get((kind, _PLACES[place], gpu if place == "g" else 0))
        if found is not None or place == "g":
            return found
        other = self._times.get((kind, "mapped" if place == "r" else "resident", 0))
        if other is None or place == "r":
            return other
        return msgspec.structs.replace(
            other,
            place="mapped",
            decode_1_ms=other.decode_1_ms * MAPPED_SLOWDOWN,
            decode_8_ms=other.decode_8_ms * MAPPED_SLOWDOWN,
            prefill_512_ms=other.prefill_512_ms * MAPPED_SLOWDOWN,
        )

    def has_times(self, first: int, last: int, place: str, gpu: int) -> bool:
        """Whether layers [first, last) can be timed there."""
        gaps = self._gaps.get((place, gpu))
        if gaps is None:
            lacks = (int(self.times(layer.kind, place, gpu) is None) for layer in self._shape.layers)
            gaps = self._gaps[place, gpu] = [0, *accumulate(lacks)]
        return gaps[first] == gaps[last]

    def step_sums(self, place: str, gpu: int, n_tokens: int, behind: int) -> list[float]:
        """Milliseconds of layers [0, i) for a step of n_tokens, each of another sequence, behind so many positions."""
        return self._summed((place, gpu, n_tokens, behind), step_cells(self._workload, behind), 1.0)

    def chunk_sums(self, place: str, gpu: int, n_tokens: int, behind: int) -> list[float]:
        """Milliseconds of layers [0, i) for a chunk of one prompt behind so many of its positions."""
        return self._summed((place, gpu, n_tokens, -1 - behind), chunk_cells(n_tokens, behind), PREFILL_SPEEDUP)

    def _summed(self, key: tuple[str, int, int, int], cells: float, speedup: float) -> list[float]:
        sums = self._sums.get(key)
        if sums is None:
            place, gpu, n_tokens, _behind = key
            each: dict[LayerShape, float] = {}
            sums = [0.0]
            for layer in self._shape.layers:
                if layer not in each:
                    times = self.times(layer.kind, place, gpu)
                    attention = 0.0 if times is None else self._attention_ms(layer, times, n_tokens, cells, speedup)
                    each[layer] = 0.0 if times is None else interpolated(times, n_tokens) + attention
                sums.append(sums[-1] + each[layer])
            self._sums[key] = sums
        return sums

    def _attention_ms(self, layer: LayerShape, times: KindTimes, n_tokens: int, cells: float, speedup: float) -> float:
        """n_tokens attending to so many cells: reading them once and multiplying for each token."""
        seen = min(cells, layer.kv_window) if layer.kv_window else cells
        nbytes, macs = layer.kv_bytes * seen, layer.attention_macs * seen * n_tokens
        if times.place == "gpu":
            used = layer.nbytes - layer.expert_bytes * (1 - layer.expert_share)
            return nbytes / (GPU_SHARE * used / times.decode_1_ms) if used else 0.0
        memory = self.profile.memory_bytes_per_s
        rate = self.profile.attention_macs_per_s or DECODE_MACS_PER_BYTE * memory
        return max(nbytes / memory, macs / (rate * speedup)) * 1e3

    def output_ms(self, place: str, gpu: int, n_tokens: int) -> float | None:
        """Milliseconds of final norm and output matrix for so many rows, or None where nothing was timed."""
        kind = self._shape.output_kind
        times = self.times(kind, place, gpu) or self.times(kind, "r") or self.times(kind, "s")
        return None if times is None else interpolated(times, n_tokens)


def hop(sender: DeviceProfile, receiver: DeviceProfile, shape: ModelShape, wire: Wire) -> Hop:
    """What was measured between the two counts before what each of them can alone."""
    link = _link(sender, receiver.name) or _link(receiver, sender.name)
    if link is None:
        one, other = sender.network or DEFAULT_NETWORK, receiver.network or DEFAULT_NETWORK
        known = sender.network is not None and receiver.network is not None
        latency = one.latency_s + other.latency_s if known else max(one.latency_s, other.latency_s)
        rate = min(one.bytes_per_s, other.bytes_per_s)
    else:
        rate, latency = link
    nbytes = shape.hidden_bytes / 4 * WIRE_BYTES[wire]
    return Hop(latency * 1e3, nbytes / rate * 1e3)


def _link(sender: DeviceProfile, to: str) -> tuple[float, float] | None:
    return next(((link.bytes_per_s, link.latency_s) for link in sender.links if link.to == to), None)
