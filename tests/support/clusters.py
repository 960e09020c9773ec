"""Clusters for tests: random ones, and the four devices of prima.cpp's paper (arXiv 2504.08791, table 2).

The paper gives memory free, disk and GPU memory. A layer's decode time is its bytes over the memory bandwidth that
data sheets give for such a machine (decoding is bound by it), times 1.3 for what is lost; prefill from its FLOPS.
"""

from __future__ import annotations

from homeinfer.cluster.planning.plan import Constraints, Workload
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.profile import DeviceProfile, Disk, Gpu, KindTimes, Network
from homeinfer.cluster.planning.random_clusters import HOMES, SMALL, Sizes, random_problem
from homeinfer.cluster.planning.shape import LayerShape, ModelShape

__all__ = ["HOMES", "SMALL", "Sizes", "llama", "paper_cluster", "random_problem"]

GIB = 1 << 30
_LOST = 1.3


def llama(name: str, n_layers: int, nbytes: float, n_embd: int) -> ModelShape:
    """A Llama 3 as Q4_K: layers all alike, an output matrix of 128,256 rows."""
    output = int(128_256 * n_embd * 0.82)  # Q6_K
    layer = LayerShape(kind="layer", nbytes=int((nbytes - 2 * output) / n_layers), kv_bytes=4096)
    return ModelShape(
        name=name,
        layers=(layer,) * n_layers,
        output_kind="output",
        output_bytes=output,
        embedding_bytes=output,
        hidden_bytes=4 * n_embd,
        n_vocab=128_256,
        scratch_bytes=100_000_000,
        scratch_logits_bytes=50_000_000,
        allowed=tuple(sum(1 << last for last in range(first + 1, n_layers + 1)) for first in range(n_layers)),
    )


def paper_cluster(shape: ModelShape, head: str = "desktop", n_ctx: int = 1024) -> Problem:
    """M1 Mac, i9 laptop with an RTX 3070, i9 desktop with an RTX 2080 Ti, a Kirin 9000 phone, all on Wi-Fi."""
    devices = (
        _device(shape, "desktop", 9.7, 3.17, 38e9, 1.0e12, gpu=(11.0, 616e9, 13e12)),
        _device(shape, "laptop", 4.1, 2.98, 45e9, 1.0e12, gpu=(8.0, 448e9, 16e12)),
        _device(shape, "mac", 2.4, 0.72, 60e9, 0.6e12, gpu=(2.4, 68e9, 2.6e12), is_unified=True),
        _device(shape, "phone", 1.9, 1.37, 20e9, 0.2e12),
    )
    work = Workload(n_ctx=n_ctx, prompt_tokens=64, headroom=0.05)
    return Problem(shape=shape, devices=devices, workload=work, constraints=Constraints(head=head))


def _device(
    shape: ModelShape,
    name: str,
    memory_gib: float,
    disk_gb: float,
    bandwidth: float,
    flops: float,
    gpu: tuple[float, float, float] | None = None,
    is_unified: bool = False,
) -> DeviceProfile:
    times = _times(shape, bandwidth, flops, ("resident", "mapped"))
    gpus: tuple[Gpu, ...] = ()
    if gpu is not None:
        times += _times(shape, gpu[1], gpu[2], ("gpu",))
        gpus = (Gpu(f"{name}'s GPU", "Metal" if is_unified else "CUDA", int(gpu[0] * GIB), is_unified),)
    rate = disk_gb * 1e9
    return DeviceProfile(
        name=name,
        memory_bytes=int(memory_gib * GIB),
        cores=8,
        threads=8,
        memory_bytes_per_s=bandwidth,
        disk=Disk(rate, rate, 0.3 * rate, 10**12),
        gpus=gpus,
        times=times,
        network=Network(bytes_per_s=30e6, latency_s=0.0015),
    )


def _times(shape: ModelShape, bandwidth: float, flops: float, places: tuple[str, ...]) -> tuple[KindTimes, ...]:
    found = []
    for kind, nbytes in ((shape.layers[0].kind, shape.layers[0].nbytes), (shape.output_kind, shape.output_bytes)):
        one = 1e3 * nbytes / bandwidth * _LOST
        many = max(1e3 * 2 * 512 * nbytes / 0.58 / flops, 2 * one)
        found += [KindTimes(kind, place, one, 1.5 * one, many) for place in places]  # type: ignore[arg-type]
    return tuple(found)
