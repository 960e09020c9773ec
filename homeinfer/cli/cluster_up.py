"""`homeinfer cluster up`: the head, with a view of it, in this process; or with --detach in one that stays."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import typer

from homeinfer.cli.cluster_leave import check_not_joined
from homeinfer.cli.cluster_live import Screen, has_person
from homeinfer.cli.cluster_options import UpOptions
from homeinfer.cli.cluster_stopping import CTRL_C, end_task, signals_as_stop
from homeinfer.cli.cluster_watch import Watch
from homeinfer.cli.default_model import default_model
from homeinfer.cli.shared_options import parse_headroom
from homeinfer.cluster.coordinator.coordinator import Coordinator
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.planning.problem_checks import check_rounds
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.profiles_file import read_device_profiles
from homeinfer.cluster.wire.client import ClusterStatus, Order
from homeinfer.folders import state_folder
from homeinfer.model.architectures import check_generates
from homeinfer.model.header import read_header


def bring_up(model: Path | None, options: UpOptions) -> None:
    """model: None for the embedded one. Raises HomeinferError; exits with 130 after Ctrl-C, with 2 for wrong usage."""
    headroom = parse_headroom(options.headroom)
    path = model or default_model()
    header = read_header(path, vocabulary=False)  # a wrong file is said before anything starts
    check_generates(header)
    check_rounds(options.rounds, 2, header.n_layer)
    check_not_joined(state_folder())
    asks = has_person() and not options.yes
    told = cluster_options(path, options, headroom, needs_yes=asks)
    if options.detach:
        from homeinfer.cli.cluster_detached import bring_up_detached

        bring_up_detached(told, asks=asks)
        return
    asyncio.run(_stay(told, asks=asks))


def cluster_options(model: Path, options: UpOptions, headroom: float, *, needs_yes: bool) -> ClusterOptions:
    """What the coordinator is told. Raises HomeinferError for bad profiles."""
    return ClusterOptions(
        model=str(model.absolute()),
        name=options.name,
        port=options.port,
        host=options.host,
        devices=options.devices,
        wait_seconds=options.wait,
        n_ctx=options.ctx,
        sequences=options.sequences,
        wire=options.wire,
        replicas=options.replicas,
        rounds=options.rounds,
        objective=options.objective,
        headroom=headroom,
        needs_yes=needs_yes,
        threads=options.threads,
        required=tuple(options.require or ()),
        forbidden=tuple(options.forbid or ()),
        profiles=read_device_profiles(options.profile) if options.profile else (),
        fresh=options.fresh,
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
