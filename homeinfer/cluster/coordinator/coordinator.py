"""The head of a cluster: members, plan, recovery and answers. See `Coordinator`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from homeinfer.cluster.agent_tasks import end
from homeinfer.cluster.coordinator import events
from homeinfer.cluster.coordinator.answers import Trouble
from homeinfer.cluster.coordinator.commands import Performer
from homeinfer.cluster.coordinator.control_desk import Said
from homeinfer.cluster.coordinator.head import Head, opened_head
from homeinfer.cluster.coordinator.make_plan import Planner, read_model
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.coordinator.planning import allows, planned
from homeinfer.cluster.coordinator.ring_plan import hops_of
from homeinfer.cluster.coordinator.settle import settle
from homeinfer.cluster.coordinator.show import cluster_status, shown_plan
from homeinfer.cluster.coordinator.speed import Meters, Speed
from homeinfer.cluster.coordinator.state import Cluster, MakePlan, Model, Outcome, RingPlan
from homeinfer.cluster.discovery import own_hosts
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.client import (
    AskAnswer,
    CancelAnswer,
    ClusterStatus,
    Done,
    FromClient,
    Open,
    Order,
    Resume,
    Status,
    Watch,
)
from homeinfer.cluster.wire.control import BEAT_SECONDS, Beat, Bye, HeadBeat, Hello, Manifest, Neighbour
from homeinfer.errors import HomeinferError

_TICK = 0.2
_LATE = 2.0
"""Seconds after which a tick says that this process was stopped, and not that devices were silent."""
_EVENTS = 40


class Coordinator:
    """Brings a cluster up, keeps it running and answers clients (cluster/wire/client.py).

    folder: the state folder (homeinfer.folders.state_folder()). Everything in one asyncio loop, to which all methods
    but `stop` belong.
    """

    def __init__(self, options: ClusterOptions, folder: Path) -> None:
        self._options, self._folder = options, folder
        model = Model(Path(options.model).stem, options.model, Manifest("", (), ()), options.n_ctx, (0, 0))
        self._cluster = Cluster(options, model, "", time.monotonic())
        self._events: deque[str] = deque(maxlen=_EVENTS)
        self._meters = Meters()
        self._head: Head | None = None
        self._performer: Performer | None = None
        self._planner: Planner | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Future[str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> str:
        """Until the cluster is taken down (Order "down", or "no" to its plan, or `stop`): says why it ended.

        Cancelling it ends the cluster too. Raises HomeinferError for what makes a cluster impossible: the model can't
        be used, the port is taken, another cluster runs in this folder, the head's agent doesn't come up.
        """
        self._loop = asyncio.get_running_loop()
        self._ending = self._loop.create_future()
        async with opened_head(self._options, self._folder, self) as head:
            self._head = head
            began = time.monotonic()
            ring_head = Neighbour(head.ring.address, None if head.ring.address.startswith("ipc") else head.own_key)
            self._cluster = self._cluster.having(
                head=head.name,
                began=began,
                since=began,
                epoch=head.files.epoch(),
                members=len(head.members.all()),
                answering=head.answers.unfinished,
                is_restart=head.is_restart or head.answers.unfinished > 0,
                ring_head=ring_head,
                model=head.model,
            )
            self._performer = Performer(head, self)
            for work in (head.agent.run(), head.control.serve(), head.clients.serve(), head.pairing.serve()):
                self._spawn(work)
            self._spawn(self._get_ready())
            self._spawn(self._tick())
            if self._options.opens_code:
                self.open_code()
            try:
                return await self._ending
            finally:
                await self._close()

    def stop(self, reason: str = "it was stopped") -> None:
        """Let `run` end; from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self.end, reason)

    def status(self) -> ClusterStatus:
        """What there is to see now."""
        head, cluster, now = self._head, self._cluster, time.monotonic()
        answers = head.answers if head is not None else None
        speed = answers.speed if answers is not None else Speed()
        return cluster_status(
            cluster,
            {d.name: self._meters.of(d.name, hops_of(cluster.plan, d.name), speed, now) for d in cluster.devices},
            code=head.code if head is not None else None,
            events=tuple(self._events),
            tokens_per_s=speed.tokens_per_s(now),
            answers=answers.under_way if answers is not None else 0,
            answered=answers.answered if answers is not None else 0,
            pid=os.getpid(),
        )

    def plan(self) -> PlanReport | None:
        """The plan that runs, or that waits for a yes; None before there is one."""
        return shown_plan(self._cluster)

    def order(self, order: Order) -> str | None:
        """Follow an order of the user; the reason why it could not be followed, or None. From the loop's thread
        (from others: loop.call_soon_threadsafe, or the clients' socket)."""
        if order.what == "code":
            return self.open_code()
        if order.what == "forget":
            return self._forget(order.device)
        if order.what == "down" and self._head is not None:
            self._head.answers.end("the cluster was taken down")
        outcome, problem = events.ordered(self._cluster, order, time.monotonic())
        self.apply(outcome)
        return problem

    @property
    def cluster(self) -> Cluster:
        return self._cluster

    def apply(self, outcome: Outcome) -> None:
        """Take a new state, do what follows from it, and look what else there is to do."""
        if self._performer is None:
            return
        self._cluster = outcome.cluster
        for command in outcome.commands:
            self._performer.perform(command)
        further = settle(self._cluster, time.monotonic())
        self._cluster = further.cluster
        for command in further.commands:
            self._performer.perform(command)

    def make_plan(self, asked: MakePlan) -> None:
        self._spawn(self._plan(asked))

    def note(self, text: str) -> None:
        """A line for whoever looks at the cluster."""
        if not self._events or self._events[-1] != text:
            self._events.append(text)

    def end(self, reason: str, *, is_problem: bool = False) -> None:
        if self._ending is None or self._ending.done():
            return
        if is_problem:
            self._ending.set_exception(HomeinferError(reason))
        else:
            self._ending.set_result(reason)

    def open_code(self) -> str | None:
        """A new pairing code."""
        if self._head is not None:
            self._spawn(self._open_code(self._head))
        return None

    def on_said(self, said: Said) -> None:
        """A registered device said something."""
        cluster, now, message = self._cluster, time.monotonic(), said.message
        if isinstance(message, Hello):
            outcome = events.connected(
                cluster, said.key, said.device, message, message.host or said.host, said.connection, now
            )
            hosts = () if self._options.host else own_hosts()
            told = events.head_at(self._with_kept_profiles(outcome.cluster), hosts)
            self.apply(Outcome(told, outcome.commands))
            return
        if isinstance(message, Beat):
            self._meters.see(said.device, message.stats, now)
        self.apply(events.heard(cluster, said.device, message, now))

    def on_gone(self, device: str, connection: int) -> None:
        """A device's connection is closed."""
        known = self._cluster.get(device)
        if known is not None and known.connection == connection:
            self.apply(events.lost(self._cluster, device, "", time.monotonic()))

    def on_client(self, client: bytes, message: FromClient) -> None:
        """A client said something."""
        if self._head is None:
            return
        answers, send = self._head.answers, self._head.clients.send
        match message:
            case Open():
                send(client, Status(self.status()))
            case Watch(plan):
                send(client, Status(self.status(), self.plan() if plan else None))
            case AskAnswer():
                answers.ask(client, message)
            case Resume():
                answers.resume(client, message)
            case CancelAnswer():
                answers.cancel(message)
            case Order():
                send(client, Done(self.order(message)))

    def on_trouble(self, trouble: Trouble) -> None:
        """An answer gets no further."""
        cluster, now = self._cluster, time.monotonic()
        if trouble.is_silent:
            self.apply(events.stuck(cluster, cluster.epoch, trouble.why, now))
        else:
            self.apply(events.faulty(cluster, trouble.culprit, trouble.why, now))

    def on_busy(self, answering: int) -> None:
        if self._performer is not None:
            self._cluster = events.busy(self._cluster, answering).cluster

    def on_member(self, name: str) -> None:
        """A device was paired."""
        self.note(f"{name} was paired")
        if self._head is not None:
            self._cluster = self._cluster.having(members=len(self._head.members.all()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        problem = None if task.cancelled() else task.exception()
        if problem is not None and self._ending is not None and not self._ending.done():
            self._ending.set_exception(problem)

    async def _get_ready(self) -> None:
        """Read the model through, which may take minutes the first time; devices may come meanwhile."""
        head = self._head
        assert head is not None
        manifest = await read_model(head.header, self._reading)
        self._planner = planner = Planner(head.header, manifest, self._options, head.model.n_ctx)
        model = Model(head.model.name, head.model.path, manifest, head.model.n_ctx, head.model.sizes)
        remembered = self._remembered(planner, head)
        self._cluster = self._cluster.having(model=model, remembered=remembered, began=time.monotonic())
        self._cluster = self._with_kept_profiles(self._cluster)
        self.apply(Outcome(self._cluster))

    def _reading(self, share: float) -> None:
        if self._cluster.get(self._cluster.head) is not None and self._planner is None:
            self._cluster = self._cluster.with_device(self._cluster.head, share=share, detail="checking the model")

    def _remembered(self, planner: Planner, head: Head) -> RingPlan | None:
        report = head.files.plan()
        if report is None or report.constraints.head != head.name or self._options.fresh:
            return None
        if not planner.fits(report) or not allows(self._options, report):
            return None
        with contextlib.suppress(HomeinferError):
            return planner.of_report(report)
        return None

    def _with_kept_profiles(self, cluster: Cluster) -> Cluster:
        digest = cluster.model.manifest.digest
        if self._head is None or not digest or self._options.fresh:
            return cluster
        for device in cluster.devices:
            if device.profile is None:
                kept = self._head.files.profile(device.key, digest)
                cluster = cluster.with_device(device.name, profile=kept) if kept is not None else cluster
        return cluster

    async def _plan(self, asked: MakePlan) -> None:
        assert self._planner is not None
        made: RingPlan | str
        try:
            made = await asyncio.to_thread(self._planner.make, asked)
        except HomeinferError as problem:
            made = str(problem)
        self.apply(planned(self._cluster, asked.number, made, time.monotonic()))

    async def _tick(self) -> None:
        beaten, before = 0.0, time.monotonic()
        while True:
            await asyncio.sleep(_TICK)
            now = time.monotonic()
            if now - before > _LATE:
                self._cluster = events.woke(self._cluster, now)
                if self._head is not None:
                    self._head.answers.woke(now)
            before = now
            self.apply(events.silent(self._cluster, now))
            if self._head is not None:
                self._head.answers.tick(now)
                if now - beaten >= BEAT_SECONDS:
                    beaten = now
                    for device in self._cluster.devices:
                        if device.is_alive:
                            self._head.control.send(device.name, HeadBeat())

    async def _open_code(self, head: Head) -> None:
        try:
            await head.pairing.open()
        except HomeinferError as problem:
            self.note(f"no pairing code: {problem} (pairing takes the port that follows --port)")

    def _forget(self, name: str) -> str | None:
        if self._head is None:
            return "the cluster is not up yet"
        if name == self._cluster.head:
            return f"{name} is this machine, the head: it can't be forgotten"
        member = self._head.control.member(name)
        try:
            self._head.members.forget(member.name if member is not None else name)
        except HomeinferError as problem:
            return str(problem)
        self._cluster = self._cluster.having(members=len(self._head.members.all()))
        self.apply(events.forgotten(self._cluster, name, time.monotonic()))
        return None

    async def _close(self) -> None:
        """Say goodbye, so that devices end their engines and nobody waits."""
        head, self._performer = self._head, None
        self._cluster = self._cluster.having(phase="stopping")
        if head is not None:
            await head.answers.close()
            for device in self._cluster.devices:
                if device.is_alive and not device.is_head:
                    head.control.send(device.name, Bye("the cluster was taken down"))
        await end(*self._tasks)
