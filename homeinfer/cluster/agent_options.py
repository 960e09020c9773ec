"""How a device takes part in a cluster, and what its agent says of itself to whoever started it."""

from __future__ import annotations

from typing import Literal

import msgspec

from homeinfer.cluster.wire.control import DeviceStats, Task

KEEP_SECONDS = 600.0
"""How long the engine stays loaded while the head is away."""


class AgentOptions(msgspec.Struct, frozen=True):
    """hosts: the head's addresses or names, tried in turn; port and key: its control socket's.

    name: how this device is called ("": the machine's own name; the head may add a number). host: where other devices
    reach this one ("": the address from which this one reaches the head, which is of no use on the head itself).
    models: folders in which the model's file may be. n_threads 0: one per core. state, weights, windows: folders
    ("": folders.state_folder(), folders.weights_folder(), folders.windows_folder()).
    stays: when the head says that the cluster is down, wait for it to come up again instead of ending.
    finds: ask the network (mDNS) for the head when none of its addresses answers.
    patience: seconds that another agent of this device, which may be leaving just now, has for that.
    """

    hosts: tuple[str, ...]
    port: int
    key: str
    name: str = ""
    host: str = ""
    models: tuple[str, ...] = ()
    n_threads: int = 0
    state: str = ""
    weights: str = ""
    windows: str = ""
    stays: bool = False
    finds: bool = False
    keep_seconds: float = KEEP_SECONDS
    patience: float = 0.0


class AgentStart(msgspec.Struct, frozen=True, tag="agent_start"):
    """The line on standard input of `python -m homeinfer.cluster.agent`, which ends when that closes.

    On its standard output comes one line, an Ended, when it ends by itself.
    """

    options: AgentOptions


class Seeking(msgspec.Struct, frozen=True, tag="seeking"):
    """The head is not there (yet). reason: what is known of why, "" while it is just being tried; away_seconds: since
    it was last heard of."""

    host: str
    reason: str
    away_seconds: float = 0.0


class Connected(msgspec.Struct, frozen=True, tag="connected"):
    """The head took this device as a member, by this name. host: where it was reached."""

    name: str
    host: str


class Working(msgspec.Struct, frozen=True, tag="working"):
    """How far a task is, 0 to 1; 1 when it is done (or given up). Some times a second at most."""

    task: Task
    share: float
    detail: str = ""


class EngineNow(msgspec.Struct, frozen=True, tag="engine_now"):
    """The engine's state changed. layers: [first, last) of its windows. reason: why it is gone."""

    state: Literal["none", "loading", "ready", "joined", "gone"]
    layers: tuple[tuple[int, int], ...] = ()
    reason: str = ""


class StatsNow(msgspec.Struct, frozen=True, tag="stats_now"):
    """What the device is doing, every BEAT_SECONDS."""

    stats: DeviceStats


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    """A line that the user should know; the agent goes on."""

    text: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """The agent ends, by itself or because it was told to. is_problem: the user has to do something."""

    reason: str
    is_problem: bool = False


AgentEvent = Seeking | Connected | Working | EngineNow | StatsNow | Trouble | Ended
