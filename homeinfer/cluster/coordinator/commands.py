"""Does what was decided."""

from __future__ import annotations

from typing import Protocol

from homeinfer.cluster.coordinator.answer_rules import Patience
from homeinfer.cluster.coordinator.head import Head
from homeinfer.cluster.coordinator.ring_plan import engine_address
from homeinfer.cluster.coordinator.state import (
    Cluster,
    Command,
    End,
    Halt,
    KeepEpoch,
    KeepPlan,
    KeepProfile,
    MakePlan,
    Note,
    Serve,
    Tell,
)
from homeinfer.cluster.wire.transport import Peer
from homeinfer.errors import HomeinferError
from homeinfer.model.records import printable

MOST_NOTE = 500
"""Characters of a line for the user: what devices say of their engines may be long, and clients read 2,000 at most."""


class Owner(Protocol):
    """What of the coordinator commands need."""

    @property
    def cluster(self) -> Cluster: ...
    def make_plan(self, asked: MakePlan) -> None: ...
    def note(self, text: str) -> None: ...
    def end(self, reason: str, *, is_problem: bool = False) -> None: ...


class Performer:
    def __init__(self, head: Head, owner: Owner) -> None:
        self._head, self._owner = head, owner
        self._is_over = False

    def perform(self, command: Command) -> None:
        """At once and without waiting; what takes time goes on by itself."""
        if self._is_over:
            return
        head, owner = self._head, self._owner
        match command:
            case Tell(device, message):
                head.control.send(device, message)
            case MakePlan():
                owner.make_plan(command)
            case KeepEpoch(epoch):
                self._keep_epoch(epoch)
            case KeepProfile(name):
                self._keep_profile(name)
            case KeepPlan():
                if owner.cluster.plan is not None:
                    head.files.keep_plan(owner.cluster.plan.report)
            case Halt():
                head.answers.halt()
            case Serve(epoch):
                self._serve(epoch)
            case Note(text, is_notice):
                said = printable(text, MOST_NOTE)
                owner.note(said)
                if is_notice:
                    head.answers.notice(said)
            case End(reason, is_problem):
                owner.end(reason, is_problem=is_problem)

    def _keep_profile(self, name: str) -> None:
        cluster = self._owner.cluster
        device = cluster.get(name)
        if device is not None and device.profile is not None:
            self._head.files.keep_profile(device.key, cluster.model.manifest.digest, device.profile)

    def _keep_epoch(self, epoch: int) -> None:
        try:
            self._head.files.keep_epoch(epoch)
        except HomeinferError as problem:
            self._is_over = True  # nobody may hear of a number that could come again
            self._owner.end(str(problem), is_problem=True)

    def _serve(self, epoch: int) -> None:
        cluster = self._owner.cluster
        plan, last = cluster.plan, None
        if plan is not None:
            last = cluster.device(plan.hops[-1][0])
        if plan is None or last is None or last.engine is None or epoch != cluster.epoch:
            return
        engines = [cluster.device(name).engine for name in plan.parts]
        can_shift = all(engine is not None and engine.can_shift for engine in engines)
        address = engine_address(last)
        self._head.ring.retarget(epoch, Peer(address.address, address.key), can_shift=can_shift, allowed=(last.key,))
        self._head.answers.serve(self._head.ring, last.engine.n_vocab, Patience.of(plan.report))
