"""How small, by planning: the largest file whose plan keeps all layers in memory, or meets a time per token. Pure.

A file of another size is judged as the profiled model with all bytes, and the times of decoding, in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from homeinfer.cluster.planning.advice import scaled
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Constraints, Ring, Workload
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.profile import DeviceProfile, KindTimes, Place
from homeinfer.cluster.planning.quick import adapted_value, has_plan
from homeinfer.cluster.planning.shape import ModelShape
from homeinfer.cluster.planning.solve import Solution, solve
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable
from homeinfer.quant.budget import Budget, smallest_bytes, source_bytes
from homeinfer.quant.recipes import RECIPES, is_complete, plan, recipe_for

_CLOSE = 0.005
"""Sizes are searched to this share."""
_SPARE = 0.01
"""The share of the size found that is left out, since layers do not shrink alike."""
_FAR_OFF = 1.5
"""A plan made from that of another size that is so much too slow is not searched for better ones."""
_SIMULATIONS = 300


class Reference(msgspec.Struct, frozen=True):
    """A model of which all devices have times: the source, or a recipe's version of it. nbytes: of its tensors."""

    name: str
    problem: Problem
    nbytes: int


def references(header: Header, devices: Sequence[DeviceProfile]) -> tuple[Reference, ...]:
    """The versions of this model that all devices were profiled with: the source itself, what recipes make of it."""
    workload = Workload()
    known = [frozenset(times.kind for times in device.times) for device in devices]
    found = []
    for name, version in _versions(header):
        shape = model_shape(version, workload)
        kinds = {shape.output_kind, *(layer.kind for layer in shape.layers)}
        if all(kinds <= one for one in known):
            problem = Problem(shape, tuple(devices), workload, Constraints(head=devices[0].name))
            found.append(Reference(name, problem, version.nbytes))
    return tuple(found)


def _versions(header: Header) -> Iterator[tuple[str, Header]]:
    yield "the source", header
    for name in RECIPES:
        recipe = recipe_for(name, header)
        if recipe.overrides and is_complete(recipe, header):
            yield name, with_types(header, dict(recipe.overrides))


def with_types(header: Header, types: Mapping[str, str]) -> Header:
    """The header with other types of some tensors, as if it had been quantized so."""
    planned = {tensor.name: tensor for tensor in plan(header, types.items())}
    tensors = tuple(
        msgspec.structs.replace(tensor, type=planned[tensor.name].type, nbytes=planned[tensor.name].bytes)
        for tensor in header.tensors
    )
    return msgspec.structs.replace(header, tensors=tensors)


def by_bandwidth(header: Header, devices: Sequence[DeviceProfile]) -> Reference:
    """A stand-in for profiles of other models: layers take as long as memory takes to give their bytes. Enough to tell
    what fits, not how fast it is."""
    workload = Workload()
    shape = model_shape(header, workload)
    timed = tuple(msgspec.structs.replace(device, times=tuple(_assumed(shape, device))) for device in devices)
    return Reference("", Problem(shape, timed, workload, Constraints(head=devices[0].name)), header.nbytes)


def _assumed(shape: ModelShape, device: DeviceProfile) -> Iterator[KindTimes]:
    sizes = {layer.kind: layer.nbytes for layer in shape.layers} | {shape.output_kind: shape.output_bytes}
    places: list[tuple[Place, int]] = [("resident", 0), ("mapped", 0), *(("gpu", i) for i in range(len(device.gpus)))]
    for kind, nbytes in sizes.items():
        one = 1e3 * max(nbytes, 1) / device.memory_bytes_per_s
        for place, gpu in places:
            # a GPU is quicker than its device, and fit cares for nothing else
            factor = 0.2 if place == "gpu" else 1.0
            yield KindTimes(kind, place, factor * one, 2 * factor * one, 20 * factor * one, gpu)


def budget_in_memory(header: Header, devices: Sequence[DeviceProfile]) -> Budget:
    """The largest file of which a plan keeps all layers in memory or on GPUs. Raises HomeinferError when none does."""
    found = references(header, devices) or (by_bandwidth(header, devices),)

    def fits(size: int) -> bool:
        return has_plan(_scaled_to(found, header, size), in_memory=True)

    size = _largest(header, fits)
    if size is None:
        raise HomeinferError(
            f"{_named(devices)}: even the smallest file ({smallest_bytes(header):,} bytes) does not fit into their "
            "memory; add a device, or take a smaller model"
        )
    return Budget(size, f"a plan for {_named(devices)} that keeps all layers in memory")


def budget_of_tpot(header: Header, devices: Sequence[DeviceProfile], tpot_ms: float) -> Budget:
    """The largest file whose plan is predicted to take at most tpot_ms per token. Raises HomeinferError when none
    does, and for profiles that were not made with this model."""
    found = references(header, devices)
    if not found:
        raise HomeinferError(
            f"--tpot: the profiles of {_named(devices)} have no times of this model: run homeinfer profile with it, or "
            "with a version of it that a recipe made, on each device"
        )

    size = _largest(header, _Meets(found, header, tpot_ms))
    if size is None:
        least = smallest_bytes(header)
        solution = _solved(_scaled_to(found, header, least))
        takes = f"takes {solution.prediction.tpot_ms:,.1f} ms" if solution is not None else "has no plan"
        raise HomeinferError(
            f"--tpot {tpot_ms:g}: on {_named(devices)} even the smallest file ({least:,} bytes) {takes} per token; "
            "allow more, or add a faster device"
        )
    return Budget(size, f"a plan for {_named(devices)} of at most {tpot_ms:g} ms per token")


class _Meets:
    """Whether a file of some size meets a time per token; tries the plan of the size asked before, adapted, first."""

    def __init__(self, found: Sequence[Reference], header: Header, tpot_ms: float) -> None:
        self._found, self._header, self._tpot_ms = found, header, tpot_ms
        self._ring: Ring | None = None

    def __call__(self, size: int) -> bool:
        problem = _scaled_to(self._found, self._header, size)
        if self._ring is not None:
            value = adapted_value(problem, self._ring, _SIMULATIONS)
            if value <= self._tpot_ms or _FAR_OFF * self._tpot_ms < value < math.inf:
                return value <= self._tpot_ms
        solution = _solved(problem)
        if solution is None:
            return False
        self._ring = solution.ring
        return solution.prediction.tpot_ms <= self._tpot_ms


def predicted_tpot(header: Header, written: Header, devices: Sequence[DeviceProfile]) -> float | None:
    """Milliseconds per token of the best plan for what was written, layer by layer in proportion to the version that
    was profiled; None where no plan or no profile of this model is."""
    found = references(header, devices)
    if not found:
        return None
    reference = _nearest(found, written.nbytes)
    shape, old = model_shape(written, reference.problem.workload), reference.problem.shape
    pairs = {
        new.kind: (was.kind, new.nbytes / max(was.nbytes, 1)) for new, was in zip(shape.layers, old.layers, strict=True)
    }
    pairs[shape.output_kind] = (old.output_kind, shape.output_bytes / max(old.output_bytes, 1))
    timed = tuple(
        msgspec.structs.replace(device, times=tuple(_as_much(device, pairs))) for device in reference.problem.devices
    )
    solution = _solved(msgspec.structs.replace(reference.problem, shape=shape, devices=timed))
    return None if solution is None else solution.prediction.tpot_ms


def _as_much(device: DeviceProfile, pairs: Mapping[str, tuple[str, float]]) -> Iterator[KindTimes]:
    for kind, (was, factor) in pairs.items():
        for times in device.times:
            if times.kind == was:
                yield msgspec.structs.replace(
                    times, kind=kind, decode_1_ms=times.decode_1_ms * factor, decode_8_ms=times.decode_8_ms * factor
                )


def _scaled_to(found: Sequence[Reference], header: Header, size: int) -> Problem:
    """The problem of a file of so many bytes, from the version that is closest to it."""
    tensors = max(size - (source_bytes(header) - header.nbytes), 1)
    reference = _nearest(found, tensors)
    return scaled(reference.problem, tensors / reference.nbytes)


def _nearest(found: Sequence[Reference], nbytes: int) -> Reference:
    return min(found, key=lambda reference: abs(math.log(reference.nbytes / max(nbytes, 1))))


def _solved(problem: Problem) -> Solution | None:
    try:
        return solve(problem)
    except HomeinferError:
        return None


def _largest(header: Header, fits: Callable[[int], bool]) -> int | None:
    """The largest size that fits, between the smallest file and the source; None when not even the smallest does."""
    low, high = smallest_bytes(header), source_bytes(header)
    if fits(high):
        return high
    if not fits(low):
        return None
    while high - low > _CLOSE * low:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(int(low * (1 - _SPARE)), smallest_bytes(header))


def _named(devices: Sequence[DeviceProfile]) -> str:
    names = ", ".join(printable(device.name, 40) for device in devices[:4])
    return f"{names} and others" if len(devices) > 4 else names
