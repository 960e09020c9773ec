"""Everything that a head has open while its cluster runs: opened together, closed together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

from homeinfer.cluster.agent_options import AgentOptions
from homeinfer.cluster.coordinator.answers import Answers, Trouble
from homeinfer.cluster.coordinator.clients import Clients
from homeinfer.cluster.coordinator.control_desk import ControlDesk, Said
from homeinfer.cluster.coordinator.journal import Journal
from homeinfer.cluster.coordinator.kept import HeadFiles
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.coordinator.own_agent import OwnAgent
from homeinfer.cluster.coordinator.running import (
    RunningCluster,
    remove_running,
    run_folder,
    running_cluster,
    was_killed,
    write_running,
)
from homeinfer.cluster.coordinator.state import Model
from homeinfer.cluster.discovery import announce, own_hosts
from homeinfer.cluster.members import Members, free_name
from homeinfer.cluster.pairing import PairingDesk
from homeinfer.cluster.plan_files import planned_model
from homeinfer.cluster.ring_client import RingClient
from homeinfer.cluster.wire.client import FromClient
from homeinfer.cluster.wire.codes import PairingCode, encode_code
from homeinfer.cluster.wire.control import Manifest
from homeinfer.cluster.wire.keys import own_keys
from homeinfer.cluster.wire.secure import Secure
from homeinfer.cluster.wire.transport import Keys, has_ipc
from homeinfer.errors import HomeinferError
from homeinfer.folders import private_folder
from homeinfer.model.architectures import check_generates, context_length
from homeinfer.model.header import Header, read_header
from homeinfer.process_start import process_start

_LONGEST_PATH = 100
_LEAVING_SECONDS = 15.0
"""The agent of a head that was killed ends with it, but not at once: it ends a large engine, on a busy machine. Less
than the life of an agent that counts as a long one (own_agent): whoever never ends is said."""
_PROBED_BYTES = 1 << 18
"""The larger message by which links are timed: 26 of them take 11 s at 5 Mbit/s."""


class Listener(Protocol):
    """Who hears what comes in."""

    def on_said(self, said: Said) -> None: ...
    def on_gone(self, device: str, connection: int) -> None: ...
    def on_client(self, client: bytes, message: FromClient) -> None: ...
    def on_trouble(self, trouble: Trouble) -> None: ...
    def on_busy(self, answering: int) -> None: ...
    def on_member(self, name: str) -> None: ...
    def note(self, text: str) -> None: ...


class Head:
    """The open things, and what is known from the beginning."""

    def __init__(self, options: ClusterOptions, folder: Path, header: Header, secure: Secure, to: Listener) -> None:
        """Opens all sockets. Raises HomeinferError."""
        self.header = header
        self.own_key = secure.keys.public
        self.members = Members(folder)
        self.files = HeadFiles(folder)
        self.name = free_name(options.name or socket.gethostname(), [])
        self.host = options.host or own_hosts()[0]
        self.model = _model(header, options)
        self.control = ControlDesk(secure, self.members, self.name, options.port, to.on_said, to.note, to.on_gone)
        self.pairing = PairingDesk(
            secure,
            self.members,
            name=self.name,
            control_port=self.control.port,
            port=options.port + 1 if options.port else 0,
            hosts=(options.host,) if options.host else None,
            on_member=lambda member: to.on_member(member.name),
            on_change=lambda code, why: self._code_changed(code, why, to),
        )
        self.code: str | None = None
        self.is_restart = was_killed(folder)
        journal = Journal(folder / "cluster" / "answers")
        with contextlib.ExitStack() as opened:
            self.clients = Clients(secure, run_folder(folder), to.on_client)
            opened.callback(self.clients.close)
            self.ring = _ring_client(run_folder(folder), secure)
            opened.callback(_close_ring, self.ring)
            self.answers = Answers(
                journal,
                self.clients.send,
                n_ctx=self.model.n_ctx,
                sequences=options.sequences,
                step_seconds=options.step_seconds,
                on_trouble=to.on_trouble,
                on_busy=to.on_busy,
            )
            self._opened = opened.pop_all()
        self.agent = OwnAgent(
            AgentOptions(
                hosts=("127.0.0.1",),
                port=self.control.port,
                key=self.own_key,
                name=self.name,
                host=self.host,
                models=(str(Path(header.files[0].path).resolve()),),
                n_threads=options.threads,
                state=str(folder),
                patience=_LEAVING_SECONDS,
            ),
            lambda why: to.note(f"this machine's own agent ended ({why}); it is started again"),
        )

    def _code_changed(self, code: PairingCode | None, why: str, to: Listener) -> None:
        self.code = encode_code(code) if code is not None else None
        if code is None:
            to.note(why)

    def close(self) -> None:
        self.pairing.close()
        self._opened.close()


@contextlib.asynccontextmanager
async def opened_head(options: ClusterOptions, folder: Path, to: Listener) -> AsyncIterator[Head]:
    """Everything open, and closed again in any case. Raises HomeinferError for what makes a cluster impossible."""
    header = await asyncio.to_thread(_usable_header, Path(options.model))
    private_folder(folder)
    run = private_folder(run_folder(folder))
    with _only_one(folder, run):
        secure = Secure(own_keys(folder))
        try:
            head = Head(options, folder, header, secure, to)
            try:
                async with _announced(options, head):
                    _say_running(folder, head, header)
                    try:
                        yield head
                    finally:
                        remove_running(folder)
            finally:
                head.close()
        finally:
            secure.close()


def _usable_header(model: Path) -> Header:
    header = read_header(model, vocabulary=False)
    check_generates(header)
    return header


def _model(header: Header, options: ClusterOptions) -> Model:
    n_ctx = context_length(header, options.n_ctx)
    row = 4 * int(header.arch_get("embedding_length", 0))
    sizes = (row, max(2 * row, min(row * options.n_batch, _PROBED_BYTES)))
    name = planned_model(header).name
    return Model(name, str(Path(header.files[0].path).resolve()), Manifest("", (), ()), n_ctx, sizes)


def _ring_client(folder: Path, secure: Secure) -> RingClient:
    path = folder / "ring.sock"
    keys = Keys(secure.keys.public, secure.keys.secret, (secure.keys.public,))
    if has_ipc() and len(str(path)) < _LONGEST_PATH:
        path.unlink(missing_ok=True)
        return RingClient(f"ipc://{path}", keys)
    return RingClient("tcp://127.0.0.1:*", keys)


def _close_ring(ring: RingClient) -> None:
    ring.close()
    if ring.address.startswith("ipc://"):
        Path(ring.address.removeprefix("ipc://")).unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _announced(options: ClusterOptions, head: Head) -> AsyncIterator[None]:
    if not options.announces:
        yield
        return
    async with announce(head.own_key, head.control.port, (options.host,) if options.host else None):
        yield


def _say_running(folder: Path, head: Head, header: Header) -> None:
    own = RunningCluster(
        pid=os.getpid(),
        began=process_start(),
        address=head.clients.address,
        key=head.own_key,
        model_path=str(Path(header.files[0].path).resolve()),
        port=head.control.port,
    )
    write_running(folder, own)


@contextlib.contextmanager
def _only_one(folder: Path, run: Path) -> Iterator[None]:
    """One cluster for each state folder. Raises HomeinferError when another one runs."""
    running = running_cluster(folder)
    taken = HomeinferError(
        f"a cluster runs on this machine already (process {running.pid if running else 'unknown'}): "
        "homeinfer cluster status shows it, homeinfer cluster down ends it"
    )
    if running is not None:
        raise taken
    try:
        import fcntl
    except ImportError:  # a system without: then the look above must do
        yield
        return
    with (run / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise taken from None
        yield
