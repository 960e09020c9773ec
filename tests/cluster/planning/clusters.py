"""Small made-up models and devices for planning."""

from __future__ import annotations

from homeinfer.cluster.planning.plan import Ring, Window
from homeinfer.cluster.planning.profile import DeviceProfile, Disk, Gpu, KindTimes, Link, Network, Place
from homeinfer.cluster.planning.shape import LayerShape, ModelShape

MB = 1_000_000


def a_shape(
    n: int, *, nbytes: int = 100 * MB, expert_bytes: int = 0, expert_share: float = 1.0, kv_bytes: int = 0
) -> ModelShape:
    """n like layers that can be cut anywhere."""
    layer = LayerShape("layer", nbytes, expert_bytes, expert_share, kv_bytes, attention_macs=kv_bytes)
    allowed = tuple(sum(1 << last for last in range(first + 1, n + 1)) for first in range(n))
    return ModelShape("model", (layer,) * n, "output", 50 * MB, 50 * MB, 4 * 1000, 1000, 10 * MB, 5 * MB, allowed)


def a_device(
    name: str,
    memory: int = 8000 * MB,
    *,
    layer_ms: float = 2.0,
    disk: float = 1e9,
    group: str = "",
    rate: float = 100e6,
    latency: float = 0.0,
    gpu_ms: float = 0.0,
    gpu_bytes: int = 0,
    links: tuple[Link, ...] = (),
) -> DeviceProfile:
    """A device whose layers take layer_ms in memory, 1.5 times as long mapped; overheads are 0.5 and 0.25."""

    def times(kind: str, place: Place, ms: float) -> KindTimes:
        return KindTimes(kind, place, ms, 2 * ms, 20 * ms)

    found = [times("layer", "resident", layer_ms), times("output", "resident", 1.0), times("output", "mapped", 1.0)]
    found.append(times("layer", "mapped", 1.5 * layer_ms))
    if gpu_ms:
        found += [times("layer", "gpu", gpu_ms), times("output", "gpu", gpu_ms)]
    return DeviceProfile(
        name=name,
        memory_bytes=memory,
        cores=2,
        threads=2,
        memory_bytes_per_s=20e9,
        disk=Disk(disk, disk, disk / 4, 10**12, group),
        overhead_bytes=0,
        window_ms=0.5,
        hop_ms=0.25,
        gpus=(Gpu("card", "CUDA", gpu_bytes),) if gpu_ms else (),
        times=tuple(found),
        network=Network(rate, latency),
        links=links,
    )


def a_ring(*windows: tuple[str, str]) -> Ring:
    """Windows of (device, places), one after the other."""
    found, at = [], 0
    for device, places in windows:
        found.append(Window(device, at, at + len(places), places))
        at += len(places)
    return Ring(tuple(found))
