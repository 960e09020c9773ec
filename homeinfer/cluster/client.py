"""The running cluster as chat, run, bench and status see it: a Teller, its status, and orders. Blocking."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from homeinfer.cluster.client_connection import Connection
from homeinfer.cluster.client_telling import Telling, new_id
from homeinfer.cluster.coordinator.running import running_cluster
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.client import (
    CancelAnswer,
    ClusterStatus,
    Done,
    Notice,
    Open,
    Order,
    Status,
    ToClient,
    Watch,
)
from homeinfer.engine.device_info import DeviceInfo
from homeinfer.engine.request import Finish, Request
from homeinfer.errors import HomeinferError
from homeinfer.folders import state_folder

ANSWER_SECONDS = 10.0
"""A coordinator that says nothing to a question for so long is taken for stuck."""
QUIET_SECONDS = 2.0
"""After so long without news of an answer, ask for it again: the coordinator may have been started anew."""
LOST_SECONDS = 6.0
"""A coordinator that says nothing at all for so long is taken for gone."""
RETURN_SECONDS = 120.0
"""How long an answer waits for a coordinator that was killed or does not answer."""
DOWN_SECONDS = 15.0
"""How long for one that ended on purpose: it may just be started anew."""

_AWAY = "the cluster's head does not answer: waiting for it to come back"

_T = TypeVar("_T")


def _ignore(_text: str) -> None:
    pass


class ClusterClient:
    """Questions and orders to the coordinator of this machine. `close` it in any case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._connection = Connection(folder)
        self._asking = threading.Lock()

    def status(self) -> ClusterStatus:
        """How the cluster is now. Raises HomeinferError when it is gone or stuck."""
        return self.watch().status

    def plan(self) -> PlanReport | None:
        """The plan that runs, or waits for a yes; None before there is one. Raises HomeinferError as status does."""
        return self.watch(plan=True).plan

    def watch(self, *, plan: bool = False) -> Status:
        """Both at once, the plan only when asked for. Raises HomeinferError as status does."""
        return self._asked(Watch(plan), Status)

    def order(
        self,
        what: Literal["down", "forget", "code", "replan", "yes", "no"],
        device: str = "",
        patience: float = 30.0,
    ) -> None:
        """Have it do something. Raises HomeinferError with why it can't, and as status does."""
        done = self._asked(Order(what, device), Done, patience)
        if done.problem is not None:
            raise HomeinferError(done.problem)

    def _asked(self, question: msgspec.Struct, kind: type[_T], patience: float = ANSWER_SECONDS) -> _T:
        with self._asking:
            if not self._connection.send(question):
                self._connection.reopen()
                if not self._connection.send(question):
                    raise _gone()
            deadline = time.monotonic() + patience
            while (left := deadline - time.monotonic()) > 0:
                message = self._connection.receive(min(left, 1.0))
                if isinstance(message, kind):
                    return message
                if message is None and not self._connection.is_there():
                    raise _gone()
        raise HomeinferError(f"the cluster on this machine says nothing for {patience:.0f} s: it is busy or stuck")

    def close(self) -> None:
        """Safe to call twice. Waits for another thread's question: a socket is no two threads' at once."""
        with self._asking:
            self._connection.close()


def _gone() -> HomeinferError:
    return HomeinferError("the cluster on this machine is gone: homeinfer cluster up starts it again")


def find_cluster(folder: Path | None = None) -> ClusterClient | None:
    """The cluster whose head is this machine and user, None when none is running.

    folder: its state folder, the user's unless given. Raises HomeinferError for one that does not answer.
    """
    folder = folder or state_folder()
    return ClusterClient(folder) if running_cluster(folder) is not None else None


def need_cluster(folder: Path | None = None) -> ClusterClient:
    """Raises HomeinferError when none is running here."""
    found = find_cluster(folder)
    if found is None:
        raise HomeinferError(
            "no cluster is running on this machine: homeinfer cluster up starts one; where one is joined, ask its head"
        )
    return found


class ClusterTeller:
    """A running cluster as a homeinfer.engine.answers.Teller. What it says in the middle of an answer goes to
    on_notice, a line each."""

    def __init__(self, folder: Path, status: ClusterStatus, on_notice: Callable[[str], None] = _ignore) -> None:
        self.status = status
        """The last one that was told."""
        self.on_notice = on_notice
        self._folder = folder
        self._connection = Connection(folder)
        self._session = new_id()
        self._is_lost = False
        self._began = self._asked_at = 0.0

    @property
    def n_ctx(self) -> int:
        return self.status.n_ctx

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        return ring_devices(self.status)

    def tell(
        self,
        prompt: Sequence[int],
        request: Request,
        on_token: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Finish:
        """Let the cluster write an answer, through changes of its devices and a restart of its coordinator.

        Raises HomeinferError when it can't, or when the coordinator stays away.
        """
        telling = Telling(self._session, prompt, request)
        self._began = self._asked_at = time.monotonic()
        self._is_lost = not self._connection.send(telling.ask())
        if self._is_lost:
            self.on_notice(_AWAY)
        try:
            return self._tell(telling, on_token, cancelled)
        except BaseException:
            self._connection.send(CancelAnswer(telling.id))
            raise

    def _tell(self, telling: Telling, on_token: Callable[[int], None], cancelled: Callable[[], bool]) -> Finish:
        is_cancelled = False
        while True:
            if not is_cancelled and cancelled():
                is_cancelled = True
                self._connection.send(CancelAnswer(telling.id))
            message = self._connection.receive(0.1)
            if message is None:
                if is_cancelled and self._is_lost:
                    return Finish("cancelled", 0, 0)
                self._after_silence(telling)
                continue
            finish = self._take(telling, message, on_token)
            if finish is not None:
                return finish

    def _take(self, telling: Telling, message: ToClient, on_token: Callable[[int], None]) -> Finish | None:
        if self._is_lost:
            self._is_lost = False
            self.on_notice("the cluster's head is back")
        if isinstance(message, Status):
            self.status = message.status
            return None
        if isinstance(message, Notice):
            self.on_notice(message.text)
            self._connection.send(Open())  # which devices there are now
            return None
        taken = telling.take(message)
        if taken.tokens:
            self._asked_at = time.monotonic()
        if taken.send is not None:
            self._connection.send(taken.send)
        for token in taken.tokens:
            on_token(token)
        return taken.finish

    def _after_silence(self, telling: Telling) -> None:
        now = time.monotonic()
        if self._is_lost:
            self._look_for_head(telling, now)
        elif now - self._asked_at >= QUIET_SECONDS:
            self._asked_at = now
            self._is_lost = now - self._connection.heard >= LOST_SECONDS or not self._connection.is_there()
            if self._is_lost:
                self.on_notice(_AWAY)
            else:
                self._resume(telling)

    def _look_for_head(self, telling: Telling, now: float) -> None:
        away = now - max(self._connection.heard, self._began)
        if away >= DOWN_SECONDS and self._connection.was_taken_down():
            raise HomeinferError("the cluster was taken down: homeinfer cluster up starts it again")
        if away >= RETURN_SECONDS:
            raise HomeinferError(
                f"the cluster's head did not come back for {RETURN_SECONDS:.0f} s: homeinfer cluster up starts it again"
            )
        if now - self._asked_at >= 1 and self._connection.is_there():
            self._connection.reopen()
            self._resume(telling)
            self._asked_at = now

    def _resume(self, telling: Telling) -> None:
        if self._connection.send(Open()):
            self._connection.send(telling.resume())

    def close(self) -> None:
        """Safe to call twice; the cluster stays."""
        self._connection.close()


def ring_devices(status: ClusterStatus) -> tuple[DeviceInfo, ...]:
    """The devices that have layers."""
    return tuple(DeviceInfo(device.name, list(device.layers)) for device in status.devices if device.layers)
