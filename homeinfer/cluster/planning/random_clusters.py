"""Random clusters and models for judging the solver: unlike layers, unlike devices, some short of memory."""

from __future__ import annotations

import math
from random import Random

import msgspec

from homeinfer.cluster.planning.plan import Constraints, Objective, Workload
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.profile import DeviceProfile, Disk, Gpu, KindTimes, Link, Network
from homeinfer.cluster.planning.shape import LayerShape, ModelShape

_BYTES_PER_WEIGHT = 0.56
_OVERHEAD = 100_000_000
_SCRATCH = 60_000_000
_BLOCK = 8_000_000


class Sizes(msgspec.Struct, frozen=True):
    """What to draw from, both ends included. layer_bytes: of a layer of the model. memory: all devices' memory together
    as a share of the model's bytes; what engines and compute buffers take is added to it."""

    devices: tuple[int, int] = (2, 3)
    layers: tuple[int, int] = (4, 10)
    layer_bytes: tuple[float, float] = (20e6, 300e6)
    memory: tuple[float, float] = (0.25, 2.5)


SMALL = Sizes()
HOMES = Sizes(devices=(2, 8), layers=(16, 80), layer_bytes=(20e6, 500e6), memory=(0.3, 3.0))


def random_problem(seed: int, sizes: Sizes = SMALL, objective: Objective = "latency") -> Problem:
    """One cluster and model, the same for the same seed. It may have no plan at all (disks or memory too small)."""
    random = Random(seed)
    shape, speeds = _model(random, sizes)
    n_devices = random.randint(*sizes.devices)
    model_bytes = sum(layer.nbytes for layer in shape.layers) + shape.output_bytes
    shares = [random.expovariate(1.0) + 0.05 for _ in range(n_devices)]
    scale = _log_uniform(random, *sizes.memory) * model_bytes / sum(shares)
    names = [f"device{index}" for index in range(n_devices)]
    groups = ["shared" if n_devices > 2 and random.random() < 0.1 else "" for _ in names]
    devices = tuple(
        _device(random, name, names, shape, speeds, share * scale, group)
        for name, share, group in zip(names, shares, groups, strict=True)
    )
    n_ctx = random.choice((512, 2048, 8192))
    workload = Workload(
        n_ctx=n_ctx,
        sequences=1 if objective == "latency" else random.choice((1, 2, 4)),
        prompt_tokens=min(random.choice((64, 512, 1500)), n_ctx - 1),
        objective=objective,
    )
    return Problem(shape=shape, devices=devices, workload=workload, constraints=_constraints(random, names, shape))


def _constraints(random: Random, names: list[str], shape: ModelShape) -> Constraints:
    if random.random() < 0.85:
        return Constraints()
    head = random.choice(names)
    others = [name for name in names if name != head]
    room = max(1, len(shape.layers) // 4)
    return Constraints(
        head=head,
        required=(random.choice(others),) if random.random() < 0.3 else (),
        private_first=random.randint(1, room) if _is_free(shape) else 1,
        private_last=random.randint(1, room) if _is_free(shape) else 1,
    )


def _is_free(shape: ModelShape) -> bool:
    return all(shape.may_cut(index, index + 1) for index in range(len(shape.layers)))


def _model(random: Random, sizes: Sizes) -> tuple[ModelShape, dict[str, float]]:
    n_layers = random.randint(*sizes.layers)
    typical = _log_uniform(random, *sizes.layer_bytes)
    has_experts = random.random() < 0.15
    kinds = [_layer(random, f"kind{index}", typical, has_experts) for index in range(random.randint(2, 6))]
    layers = tuple(random.choice(kinds) for _ in range(n_layers))
    row = random.choice((1024, 2048, 4096, 8192))
    n_vocab = random.choice((32_000, 128_000))
    output = min(int(n_vocab * row * _BYTES_PER_WEIGHT), int(2 * typical))
    shape = ModelShape(
        name="random",
        layers=layers,
        output_kind="output",
        output_bytes=output,
        embedding_bytes=output,
        hidden_bytes=4 * row,
        n_vocab=n_vocab,
        scratch_bytes=_SCRATCH,
        scratch_logits_bytes=_SCRATCH // 2,
        allowed=_cuts(random, n_layers),
        has_experts=has_experts,
        output_block_bytes=_BLOCK if n_vocab > 100_000 else 0,
        is_tied=row > 2048,
    )
    speeds = {kind.kind: random.uniform(0.8, 1.5) for kind in kinds}
    return shape, speeds


def _layer(random: Random, kind: str, typical: float, has_experts: bool) -> LayerShape:
    nbytes = int(typical * random.uniform(0.5, 2.0))
    is_sliding = random.random() < 0.2
    return LayerShape(
        kind=kind,
        nbytes=nbytes,
        expert_bytes=int(0.85 * nbytes) if has_experts and random.random() < 0.8 else 0,
        expert_share=random.choice((1 / 32, 1 / 8, 1 / 4)),
        kv_bytes=random.choice((512, 1024, 2048, 4096)),
        kv_window=512 if is_sliding else 0,
    )


def _cuts(random: Random, n_layers: int) -> tuple[int, ...]:
    rule = random.random()
    step = 2 if rule < 0.1 and n_layers % 2 == 0 else 1
    least = 2 if 0.1 <= rule < 0.2 else 1
    return tuple(
        sum(1 << last for last in range(first + least, n_layers + 1) if first % step == 0 and last % step == 0)
        for first in range(n_layers)
    )


def _device(
    random: Random,
    name: str,
    names: list[str],
    shape: ModelShape,
    speeds: dict[str, float],
    memory: float,
    group: str,
) -> DeviceProfile:
    bandwidth = _log_uniform(random, 5e9, 1e11)
    rate = _log_uniform(random, 2e10, 5e11)
    disk = 6e8 if group else _log_uniform(random, 1e8, 5e9)
    gpus, gpu_times = _gpu(random, shape, speeds, bandwidth, rate)
    return DeviceProfile(
        name=name,
        memory_bytes=int((memory + _floor(shape, is_head=name == names[0])) / 0.9),
        cores=8,
        threads=8,
        memory_bytes_per_s=bandwidth,
        disk=Disk(
            sequential_bytes_per_s=disk * 1.1,
            layer_bytes_per_s=disk,
            fault_bytes_per_s=disk * 0.3,
            free_bytes=10**13 if random.random() < 0.9 else int(1.5 * memory) + 10**8,
            group=group,
        ),
        overhead_bytes=_OVERHEAD,
        window_ms=random.uniform(0.05, 0.6),
        hop_ms=random.uniform(0.1, 1.0),
        gpus=gpus,
        times=(*_times(random, shape, speeds, "resident", bandwidth, rate), *gpu_times),
        network=Network(bytes_per_s=_log_uniform(random, 3e6, 1.2e8), latency_s=_log_uniform(random, 5e-5, 8e-3)),
        links=_links(random, name, names),
    )


def _floor(shape: ModelShape, *, is_head: bool) -> int:
    """What an engine takes before it holds anything of the model worth mentioning."""
    least = _OVERHEAD + 1024 * shape.hidden_bytes + 2 * _SCRATCH
    if is_head:
        least += shape.output_bytes + shape.scratch_logits_bytes
    return least + max(layer.nbytes for layer in shape.layers) // 2


def _gpu(
    random: Random, shape: ModelShape, speeds: dict[str, float], bandwidth: float, rate: float
) -> tuple[tuple[Gpu, ...], list[KindTimes]]:
    if random.random() < 0.6:
        return (), []
    model_bytes = sum(layer.nbytes for layer in shape.layers)
    memory = int(_log_uniform(random, 0.15, 1.2) * model_bytes) + _SCRATCH
    faster = random.uniform(1.5, 12)
    gpu = Gpu(name="GPU", backend="CUDA", memory_bytes=memory, is_unified=random.random() < 0.2)
    return (gpu,), _times(random, shape, speeds, "gpu", faster * bandwidth, 10 * rate)


def _times(
    random: Random, shape: ModelShape, speeds: dict[str, float], place: str, bandwidth: float, rate: float
) -> list[KindTimes]:
    found: list[KindTimes] = []
    kinds = {layer.kind: layer for layer in shape.layers}
    output = LayerShape(kind=shape.output_kind, nbytes=shape.output_bytes)
    for layer in (*kinds.values(), output):
        touched = layer.nbytes - layer.expert_bytes * (1 - layer.expert_share)
        one = 1e3 * touched / bandwidth * speeds.get(layer.kind, 1.0) * random.uniform(0.9, 1.1) + 0.02
        eight = one * random.uniform(1.3, 4)
        prefill = max(1e3 * 2 * 512 * touched / _BYTES_PER_WEIGHT / rate, eight * 1.5)
        slower = random.uniform(1.0, 1.4)
        if place == "gpu":
            found.append(KindTimes(layer.kind, "gpu", one, eight, prefill))
        else:
            found.append(KindTimes(layer.kind, "resident", one, eight, prefill))
            found.append(KindTimes(layer.kind, "mapped", one * slower, eight * slower, prefill * slower))
    return found


def _links(random: Random, name: str, names: list[str]) -> tuple[Link, ...]:
    return tuple(
        Link(to=other, bytes_per_s=_log_uniform(random, 3e6, 1.2e8), latency_s=_log_uniform(random, 5e-5, 8e-3))
        for other in names
        if other != name and random.random() < 0.2
    )


def _log_uniform(random: Random, low: float, high: float) -> float:
    return math.exp(random.uniform(math.log(low), math.log(high)))
