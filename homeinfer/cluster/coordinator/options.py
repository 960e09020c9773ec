"""What a user asks of a cluster when it is brought up."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from homeinfer.cluster.planning.plan import Objective, Wire
from homeinfer.cluster.planning.profile import DeviceProfile

PORT = 47710
"""The control socket's; pairing is one above it."""


class ClusterOptions(msgspec.Struct, frozen=True):
    """How a cluster is brought up.

    model: the GGUF file's path. name: this device's ("" for the machine's own). port: of the control socket, pairing is
    one above; 0: any two. host: the address by which other devices reach this one ("" to find it out). devices: wait
    for so many, this one too; wait_seconds: wait so long for whoever comes; with neither, a moment for those that are
    registered. n_ctx 0: the model's own, 4,096 at most. sequences:
    answers at a time. wire auto: f32, or f16 where the network costs much. replicas: on how many devices' disks each
    layer is kept. rounds: windows of each device; 0: as many as are best. headroom: the share of each device's memory
    that stays free. needs_yes: nothing is loaded before Order("yes"). threads: of this device's engine; 0: one per
    core. profiles: devices that need no measuring, by name. fresh: what was
    measured before, and the plan that ran last, do not count.
    step_seconds: an answer that hears nothing for so long (or 20 times what was predicted) is taken for stuck.
    announces: by mDNS. opens_code: a pairing code from the beginning.
    """

    model: str
    name: str = ""
    port: Annotated[int, msgspec.Meta(ge=0, le=65534)] = PORT
    host: str = ""
    devices: Annotated[int, msgspec.Meta(ge=0)] = 0
    wait_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    n_ctx: Annotated[int, msgspec.Meta(ge=0)] = 0
    sequences: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    wire: Wire | Literal["auto"] = "auto"
    replicas: Annotated[int, msgspec.Meta(ge=1)] = 1
    rounds: Annotated[int, msgspec.Meta(ge=0, le=16)] = 0
    objective: Objective = "latency"
    headroom: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    needs_yes: bool = False
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    n_batch: Annotated[int, msgspec.Meta(ge=1, le=1 << 14)] = 512
    forbidden: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    profiles: tuple[DeviceProfile, ...] = ()
    fresh: bool = False
    step_seconds: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    announces: bool = True
    opens_code: bool = True
