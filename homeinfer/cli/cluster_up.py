"""`homeinfer cluster up`: the head, with a view of it, in this process; or with --detach in one that stays."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import typer

from homeinfer.cli.cluster_leave import check_not_joined
from homeinfer.cli.cluster_live import Screen, has_person
from homeinfer.cli.cluster_watch import Watch
from homeinfer.cli.opening import default_model
from homeinfer.cluster.coordinator.coordinator import Coordinator
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.planning.plan import Objective, Wire
from homeinfer.cluster.planning.problem_checks import check_rounds
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.profiles_file import read_device_profiles
from homeinfer.cluster.wire.client import ClusterStatus, Order
from homeinfer.folders import state_folder
from homeinfer.model.architectures import check_generates
from homeinfer.model.header import read_header

CTRL_C = 128 + signal.SIGINT


class Wishes(msgspec.Struct, frozen=True):
    """The options of `cluster up`, as typed."""

    model: Path | None
    devices: int
    wait: float
    required: tuple[str, ...]
    forbidden: tuple[str, ...]
    profiles: tuple[Path, ...]
    fresh: bool
    yes: bool
    ctx: int
    sequences: int
    wire: Wire | Literal["auto"]
    replicas: int
    rounds: int
    objective: Objective
    headroom: float
    name: str
    host: str
    port: int
    threads: int


def bring_up(wishes: Wishes, *, detach: bool) -> None:
    """Raises HomeinferError; exits with 130 after Ctrl-C."""
    header = read_header(wishes.model or default_model())  # a wrong file is said before anything starts
    check_generates(header)
    check_rounds(wishes.rounds, 2, header.n_layer)
    check_not_joined(state_folder())
    asks = has_person() and not wishes.yes
    options = cluster_options(wishes, needs_yes=asks)
    if detach:
        from homeinfer.cli.cluster_detached import bring_up_detached

        bring_up_detached(options, asks=asks)
        return
    asyncio.run(_stay(options, asks=asks))


def cluster_options(wishes: Wishes, *, needs_yes: bool) -> ClusterOptions:
    """What the coordinator is told."""
    return ClusterOptions(
        model=str((wishes.model or default_model()).absolute()),
        name=wishes.name,
        port=wishes.port,
        host=wishes.host,
        devices=wishes.devices,
        wait_seconds=wishes.wait,
        n_ctx=wishes.ctx,
        sequences=wishes.sequences,
        wire=wishes.wire,
        replicas=wishes.replicas,
        rounds=wishes.rounds,
        objective=wishes.objective,
        headroom=wishes.headroom,
        needs_yes=needs_yes,
        threads=wishes.threads,
        required=wishes.required,
        forbidden=wishes.forbidden,
        profiles=read_device_profiles(wishes.profiles) if wishes.profiles else (),
        fresh=wishes.fresh,
    )


async def _stay(options: ClusterOptions, *, asks: bool) -> None:
    coordinator = Coordinator(options, state_folder())
    running = asyncio.create_task(coordinator.run())
    with Screen() as screen, signals_as_stop() as stopped:
        watching = asyncio.create_task(Watch(_Here(coordinator), screen, asks=asks).forever())
        waiting = asyncio.create_task(stopped.wait())
        try:
            await asyncio.wait({running, watching, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_task(waiting)
            if stopped.code == CTRL_C:
                coordinator.order(Order("down"))  # whoever waits for an answer is told so
            coordinator.stop()
            try:
                await end_task(watching)
                screen.pause()
                if stopped.is_set():
                    screen.say("ending the cluster")
            finally:
                reason = await running
        if stopped.is_set():
            raise typer.Exit(stopped.code)
        screen.say(reason)


class Stopped(asyncio.Event):
    """Set when this process is asked to end. code: what it is to exit with."""

    code = 0


@contextlib.contextmanager
def signals_as_stop() -> Iterator[Stopped]:
    """Ctrl-C, and the signals of a closed terminal or a shutdown, asked for once; a second one is what it always is."""
    stopped = Stopped()
    loop = asyncio.get_running_loop()
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def stop(number: int) -> None:
        stopped.code = 128 + number
        stopped.set()
        for each in numbers:
            loop.remove_signal_handler(each)

    installed = []
    for number in numbers:
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C cancels the task there
            loop.add_signal_handler(number, stop, number)
            installed.append(number)
    try:
        yield stopped
    finally:
        for number in installed:
            loop.remove_signal_handler(number)


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel it and wait until it is over."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


class _Here:
    """A coordinator in this process, as a cluster_watch.Head."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def status(self) -> ClusterStatus:
        return self._coordinator.status()

    async def plan(self) -> PlanReport | None:
        return self._coordinator.plan()

    async def order(self, what: Literal["yes", "no", "replan"]) -> str | None:
        return self._coordinator.order(Order(what))
