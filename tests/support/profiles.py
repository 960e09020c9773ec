"""Profiles made by hand for a model: machines as in prima.cpp's paper, timed by what memory and GPUs can do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from homeinfer.cluster.planning.profile import VERSION, DeviceProfile, Disk, Gpu, KindTimes, Network, Place, ProfileFile
from homeinfer.cluster.planning.shape import LayerShape, ModelShape


class Machine(msgspec.Struct, frozen=True):
    """What a paper says of a computer; bytes per second, and operations per second for prefill."""

    name: str
    memory_bytes: int
    memory_rate: float
    operations: float
    disk_rate: float
    gpu_bytes: int = 0
    gpu_rate: float = 0.0
    gpu_operations: float = 0.0
    cores: int = 8
    free_bytes: int = 500_000_000_000
    network: Network | None = None


DESK = Machine("desk", 9_700_000_000, 40e9, 4e11, 3.17e9, 11_000_000_000, 500e9, 2e13)
LAPTOP = Machine("laptop", 4_100_000_000, 35e9, 3e11, 2.98e9, 8_000_000_000, 380e9, 1.5e13)
MAC = Machine("mac", 2_400_000_000, 55e9, 5e11, 0.72e9)
PHONE = Machine("phone", 1_900_000_000, 12e9, 6e10, 1.37e9)


SHAPE = ModelShape(
    name="model",
    layers=(*[LayerShape("attention", 40_000_000)] * 3, LayerShape("dense", 60_000_000), LayerShape("odd", 10_000_000)),
    output_kind="output",
    output_bytes=200_000_000,
    embedding_bytes=100_000_000,
    hidden_bytes=8192,
    n_vocab=32_000,
    scratch_bytes=50_000_000,
    scratch_logits_bytes=20_000_000,
    allowed=(0b111110, 0b111100, 0b111000, 0b110000, 0b100000),
)
"""A model of five layers of three kinds, 390 MB, that may be cut anywhere."""


def device_of(machine: Machine, shape: ModelShape) -> DeviceProfile:
    """A profile of `machine` with times for all of the model's kinds of layer."""
    gpus = (Gpu(f"GPU of {machine.name}", "CUDA", machine.gpu_bytes),) if machine.gpu_bytes else ()
    times = [*_times(shape, "resident", machine.memory_rate, machine.operations)]
    times += _times(shape, "mapped", machine.memory_rate / 1.3, machine.operations / 1.3)
    if gpus:
        times += _times(shape, "gpu", machine.gpu_rate, machine.gpu_operations)
    return DeviceProfile(
        name=machine.name,
        memory_bytes=machine.memory_bytes,
        cores=machine.cores,
        threads=machine.cores,
        memory_bytes_per_s=machine.memory_rate,
        disk=Disk(machine.disk_rate, 0.9 * machine.disk_rate, 0.3 * machine.disk_rate, machine.free_bytes),
        gpus=gpus,
        times=tuple(times),
        network=machine.network,
    )


def write_profile(path: Path, *devices: DeviceProfile, version: int = VERSION) -> Path:
    """A profile file, as `homeinfer profile -o` writes one."""
    path.write_bytes(msgspec.json.encode(ProfileFile(version, devices)))
    return path


def _times(shape: ModelShape, place: Place, rate: float, operations: float) -> Iterable[KindTimes]:
    kinds = {layer.kind: (layer.nbytes, layer.nbytes - layer.expert_bytes) for layer in shape.layers}
    kinds[shape.output_kind] = (shape.output_bytes, shape.output_bytes)
    share = {layer.kind: layer.expert_share for layer in shape.layers}
    for kind, (nbytes, always) in kinds.items():
        touched = always + (nbytes - always) * share.get(kind, 1.0)
        one = 1e3 * touched / rate + 0.01
        yield KindTimes(kind, place, one, 2 * one, max(4 * one, 1e3 * 2 * 512 * touched / 0.56 / operations))
