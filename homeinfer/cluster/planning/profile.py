"""What is known of a device: the file that `homeinfer profile` writes and `homeinfer plan` reads."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

VERSION = 1

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Place = Literal["resident", "mapped", "gpu"]
"""Where a layer's weights are when it computes: read into memory and repacked for the CPU, mapped from the
file and in memory by then, or on a GPU."""


class KindTimes(msgspec.Struct, frozen=True):
    """Milliseconds that one layer of a kind takes in one place, for so many tokens at once, at the beginning of a
    context. `kind` is kinds.layer_kinds' key, or kinds.output_kind's for final norm and output matrix.
    `gpu`: which of the device's GPUs, where place is "gpu"."""

    kind: str
    place: Place
    decode_1_ms: Positive
    decode_8_ms: Positive
    prefill_512_ms: Positive
    gpu: int = 0


class Disk(msgspec.Struct, frozen=True):
    """Bytes per second that reading weights gets, past the page cache.

    sequential: one large file from beginning to end. layer: the same layers again and again, as streaming asks for
    each token. fault: on demand, by page faults of a mapping (experts that nobody foresaw). free_bytes: room for files.
    Devices that name the same `group` share one disk (containers, virtual machines).
    """

    sequential_bytes_per_s: Positive
    layer_bytes_per_s: Positive
    fault_bytes_per_s: Positive
    free_bytes: Bytes
    group: str = ""


class Gpu(msgspec.Struct, frozen=True):
    """One of ggml's devices that is no CPU. memory_bytes: free now. is_unified: it shares the device's memory."""

    name: str
    backend: str
    memory_bytes: Bytes
    is_unified: bool = False


class Network(msgspec.Struct, frozen=True):
    """A device's own link: what it can send or receive, and one way's delay to a device with a perfect link."""

    bytes_per_s: Positive
    latency_s: NotNegative


class Link(msgspec.Struct, frozen=True):
    """What was measured from this device to another one; it counts instead of both devices' `network`."""

    to: str
    bytes_per_s: Positive
    latency_s: NotNegative


class DeviceProfile(msgspec.Struct, frozen=True):
    """One device.

    memory_bytes: what can be used now (cgroup limits count), of which an engine process takes overhead_bytes
    before any weight. window_ms: what each window costs a step besides its layers (llama_decode's preparation,
    Python). hop_ms: receiving, sending and waking up, per message, without the wire itself.
    attention_macs_per_s: multiplications per second of a decode step's attention over F16 keys and values, on the CPU;
    0: not measured. is_quiet: nothing else disturbed the measurement; noise: the share by which repeated timings
    differed.
    """

    name: str
    memory_bytes: Bytes
    cores: Annotated[int, msgspec.Meta(ge=1)]
    threads: Annotated[int, msgspec.Meta(ge=1)]
    memory_bytes_per_s: Positive
    disk: Disk
    cpu: str = ""
    system: str = ""
    overhead_bytes: Bytes = 120_000_000
    window_ms: NotNegative = 0.2
    hop_ms: NotNegative = 0.3
    gpus: tuple[Gpu, ...] = ()
    times: tuple[KindTimes, ...] = ()
    network: Network | None = None
    links: tuple[Link, ...] = ()
    attention_macs_per_s: NotNegative = 0.0
    is_quiet: bool = True
    noise: NotNegative = 0.0


class ProfileFile(msgspec.Struct, frozen=True):
    """What the file holds: one device from `homeinfer profile`, or several."""

    version: int
    devices: tuple[DeviceProfile, ...]
