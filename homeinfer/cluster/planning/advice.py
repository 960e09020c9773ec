"""What would help most: the problem with something changed, planned again, and what that gains. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import msgspec

from homeinfer.cluster.planning.plan import Prediction, Workload
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.profile import DeviceProfile, Link, Network
from homeinfer.cluster.planning.report import Advice
from homeinfer.cluster.planning.shape import LayerShape, ModelShape

LEAST_GAIN = 0.03
"""Advice that changes less is not worth a user's time, and within what the prediction may be off."""
_NEARLY = 0.8
"""The smallest of several amounts that gains this share of what the largest does is advised."""
_MEMORY_GB = (8, 4, 2, 1)
_CABLE = Network(bytes_per_s=1e9 / 8 * 0.94, latency_s=0.0001)
"""Gigabit Ethernet, less what frames take."""
_SMALLER_BPW = (4.8, 3.5, 2.7)
_MOST_DEVICES = 4
_MOST_DISKS = 2
_GB = 1_000_000_000

Judge = Callable[[Problem], float]
"""The objective's value of the best plan that is found for a problem, small is good; math.inf where there is none."""
Reshape = Callable[[Workload], ModelShape]
"""The same model's shape for another workload."""


class Change(msgspec.Struct, frozen=True):
    """what: in a user's words. problem: what would then be planned."""

    what: str
    problem: Problem


Group = tuple[Change, ...]
"""Changes of one thing by several amounts, the largest first."""


def advise(
    problem: Problem, prediction: Prediction, value: float, reshape: Reshape, bpw: float, judge: Judge, most: int = 3
) -> tuple[Advice, ...]:
    """The changes that gain most, at most one of each thing, the best first, each more than LEAST_GAIN.

    prediction, value: of the plan as it is (Simulator.value). bpw: the model's bits per weight.
    """
    found: list[tuple[float, Group]] = []
    for group in changes(problem, prediction, reshape, bpw):
        gained = value - judge(group[0].problem)
        if math.isfinite(gained) and gained > LEAST_GAIN * value:
            found.append((gained, group))
    found.sort(key=lambda pair: -pair[0])
    advice = []
    for gained, group in found[:most]:
        change, gain = _least(group, gained, value, judge)
        advice.append(_advice(problem, change, value, value - gain))
    return tuple(sorted(advice, key=lambda one: -abs(one.change)))


def _least(group: Group, gained: float, value: float, judge: Judge) -> tuple[Change, float]:
    """The smallest amount that does nearly what the largest does."""
    chosen, gain = group[0], gained
    for change in group[1:]:
        less = value - judge(change.problem)
        if less < max(_NEARLY * gained, LEAST_GAIN * value):
            break
        chosen, gain = change, less
    return chosen, gain


def _advice(problem: Problem, change: Change, before: float, after: float) -> Advice:
    if problem.workload.objective == "throughput":
        before, after = 1e3 / before, 1e3 / after
    return Advice(change.what, after, after - before, (after - before) / before)


def changes(problem: Problem, prediction: Prediction, reshape: Reshape, bpw: float) -> list[Group]:
    """What could be changed about this plan and may gain enough, the likeliest help first; few, so that all can be
    judged."""
    full = _full_devices(problem, prediction)
    found = [
        *_memory_changes(problem, full),
        *_disk_changes(problem, prediction),
        *_smaller_model(problem, bpw),
        *_network_changes(problem, prediction),
    ]
    if full:
        found += _workload_changes(problem, reshape)
    return found


def _full_devices(problem: Problem, prediction: Prediction) -> list[DeviceProfile]:
    """Those that could not take one layer more: who waits for a disk first, then the fastest."""
    shape, work = problem.shape, problem.workload
    layer = max(one.nbytes + one.kv_bytes * work.n_ctx * work.sequences for one in shape.layers) + shape.scratch_bytes
    loads = {load.name: load for load in prediction.loads}
    full = [
        device
        for device in problem.devices
        if loads[device.name].memory_free_bytes - work.headroom * device.memory_bytes < layer
        or loads[device.name].read_bytes
    ]
    return sorted(full, key=lambda device: (-loads[device.name].cause.disk_ms, -device.memory_bytes_per_s))


def _memory_changes(problem: Problem, full: list[DeviceProfile]) -> Iterator[Group]:
    for device in full[:_MOST_DEVICES]:
        yield tuple(
            Change(
                f"+{gigabytes} GB on {device.name}",
                _with_device(
                    problem, msgspec.structs.replace(device, memory_bytes=device.memory_bytes + gigabytes * _GB)
                ),
            )
            for gigabytes in _MEMORY_GB
        )


def _disk_changes(problem: Problem, prediction: Prediction) -> Iterator[Group]:
    """The disks that are waited for longest."""
    if prediction.cause.disk_ms < LEAST_GAIN * prediction.tpot_ms:
        return
    readers = sorted((load for load in prediction.loads if load.read_bytes), key=lambda load: -load.cause.disk_ms)
    devices = {device.name: device for device in problem.devices}
    for load in readers[:_MOST_DISKS]:
        device = devices[load.name]
        disk = msgspec.structs.replace(
            device.disk,
            sequential_bytes_per_s=2 * device.disk.sequential_bytes_per_s,
            layer_bytes_per_s=2 * device.disk.layer_bytes_per_s,
            fault_bytes_per_s=2 * device.disk.fault_bytes_per_s,
        )
        changed = msgspec.structs.replace(device, disk=disk)
        yield (Change(f"a disk twice as fast in {device.name}", _with_device(problem, changed)),)


def _network_changes(problem: Problem, prediction: Prediction) -> Iterator[Group]:
    """A cable for one device, for all of them, and half the bytes on the wire."""
    if len(problem.devices) < 2 or prediction.cause.network_ms < LEAST_GAIN * prediction.tpot_ms:
        return
    used = {load.name for load in prediction.loads if load.memory_bytes}
    slow = [device for device in problem.devices if device.name in used and _is_slow(device)]
    if slow:
        worst = max(slow, key=lambda device: _hop_ms(device, problem.shape.hidden_bytes))
        one = Change(f"a network cable (1 Gbit/s) for {worst.name}", _cabled(problem, [worst]))
        every = Change("network cables (1 Gbit/s) for all devices", _cabled(problem, slow))
        yield (every, one) if len(slow) > 1 else (one,)
    if problem.workload.wire == "f32":
        workload = msgspec.structs.replace(problem.workload, wire="f16")
        yield (Change("hidden states of 16 bits (--wire f16)", msgspec.structs.replace(problem, workload=workload)),)


def _is_slow(device: DeviceProfile) -> bool:
    ways: list[Network | Link] = [*([device.network] if device.network else []), *device.links]
    return (
        any(way.bytes_per_s < 0.8 * _CABLE.bytes_per_s or way.latency_s > 2 * _CABLE.latency_s for way in ways)
        or not ways
    )


def _hop_ms(device: DeviceProfile, nbytes: int) -> float:
    """The slowest of a device's ways for one token."""
    ways: list[Network | Link] = [*([device.network] if device.network else []), *device.links]
    return max((1e3 * (way.latency_s + nbytes / way.bytes_per_s) for way in ways), default=0.0)


def _cabled(problem: Problem, chosen: list[DeviceProfile]) -> Problem:
    """With cables for the chosen; what was measured between two devices changes only when both have one then."""
    names = {device.name for device in chosen}
    for device in chosen:
        links = tuple(
            msgspec.structs.replace(
                link,
                bytes_per_s=max(link.bytes_per_s, _CABLE.bytes_per_s),
                latency_s=min(link.latency_s, 2 * _CABLE.latency_s),
            )
            if link.to in names
            else link
            for link in device.links
        )
        known = device.network or _CABLE
        network = Network(
            bytes_per_s=max(known.bytes_per_s, _CABLE.bytes_per_s), latency_s=min(known.latency_s, _CABLE.latency_s)
        )
        problem = _with_device(problem, msgspec.structs.replace(device, links=links, network=network))
    return problem


def _workload_changes(problem: Problem, reshape: Reshape) -> Iterator[Group]:
    """What costs nothing but some of what was asked for."""
    work = problem.workload
    if work.headroom > 0:
        yield (
            _with_workload(
                problem, work, reshape, "no memory kept free for other programs (--headroom 0%)", headroom=0.0
            ),
        )
    shorter = work.n_ctx // 2
    if shorter >= 2048:
        prompt = min(work.prompt_tokens, shorter)
        what = f"half the context (--ctx {shorter})"
        yield (_with_workload(problem, work, reshape, what, n_ctx=shorter, prompt_tokens=prompt),)


def _with_workload(
    problem: Problem, work: Workload, reshape: Reshape, what: str, **changed: float | int | str
) -> Change:
    workload = msgspec.structs.replace(work, **changed)
    return Change(what, msgspec.structs.replace(problem, workload=workload, shape=reshape(workload)))


def _smaller_model(problem: Problem, bpw: float) -> Iterator[Group]:
    target = next((target for target in _SMALLER_BPW if target < 0.9 * bpw), None)
    if target is not None:
        what = f"a smaller file, {target:g} bits per weight instead of {bpw:.1f}, at some loss of quality"
        yield (Change(what, scaled(problem, target / bpw)),)


def scaled(problem: Problem, factor: float) -> Problem:
    """The problem of a model with `factor` times the bytes: decoding, which reads all weights, takes that share of its
    time; prefill, which computes, takes as long as before."""

    def layer(one: LayerShape) -> LayerShape:
        return msgspec.structs.replace(
            one, nbytes=round(one.nbytes * factor), expert_bytes=round(one.expert_bytes * factor)
        )

    shape = msgspec.structs.replace(
        problem.shape,
        layers=tuple(map(layer, problem.shape.layers)),
        output_bytes=round(problem.shape.output_bytes * factor),
        embedding_bytes=round(problem.shape.embedding_bytes * factor),
    )
    devices = tuple(
        msgspec.structs.replace(
            device,
            times=tuple(
                msgspec.structs.replace(
                    times, decode_1_ms=times.decode_1_ms * factor, decode_8_ms=times.decode_8_ms * factor
                )
                for times in device.times
            ),
        )
        for device in problem.devices
    )
    return msgspec.structs.replace(problem, shape=shape, devices=devices)


def _with_device(problem: Problem, changed: DeviceProfile) -> Problem:
    devices: Iterable[DeviceProfile] = (
        changed if device.name == changed.name else device for device in problem.devices
    )
    return msgspec.structs.replace(problem, devices=tuple(devices))
