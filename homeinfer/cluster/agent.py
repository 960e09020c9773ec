"""The agent of a device: keeps it a member of a cluster, supervises its engine, serves and fetches weights.

python -m homeinfer.cluster.agent    (an AgentStart line on stdin; ends when that closes, or on SIGTERM)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from homeinfer import __version__
from homeinfer.cluster.agent_connection import Connection, HeadAddress, Left
from homeinfer.cluster.agent_duties import Device, Duties
from homeinfer.cluster.agent_jobs import FindHead, Found
from homeinfer.cluster.agent_lock import only_agent
from homeinfer.cluster.agent_options import (
    AgentEvent,
    AgentOptions,
    AgentStart,
    Connected,
    Ended,
    Seeking,
    StatsNow,
    Trouble,
)
from homeinfer.cluster.agent_stats import Meter
from homeinfer.cluster.agent_tasks import end
from homeinfer.cluster.agent_weights import Allowed, Weights
from homeinfer.cluster.agent_work import work
from homeinfer.cluster.members import Members
from homeinfer.cluster.wire.control import BEAT_SECONDS, PROTOCOL, Allow, Beat, FromHead, Hello, Welcome
from homeinfer.cluster.wire.keys import own_keys
from homeinfer.cluster.wire.secure import Secure, tcp_address
from homeinfer.errors import HomeinferError
from homeinfer.folders import private_folder, state_folder, weights_folder, windows_folder

__all__ = ["Agent", "AgentEvent", "AgentOptions", "AgentStart"]

_STAY_SECONDS = 5.0


class Agent:
    """One device of a cluster. `on_event` is called on the event loop's thread and must not block."""

    def __init__(self, options: AgentOptions, on_event: Callable[[AgentEvent], None] = lambda _event: None) -> None:
        self._options, self._on_event = options, on_event
        self._stopping: asyncio.Event = asyncio.Event()
        self._reason = ""

    def stop(self, reason: str = "") -> None:
        """Leave the cluster: `run` says Bye to the head, ends the engine and returns. From the loop's thread."""
        self._reason = self._reason or reason or "stopped"
        self._stopping.set()

    async def run(self) -> str:
        """Take part until `stop`, the head's Bye or Refuse; returns why it ended, in one line. Cancelling it leaves
        nothing behind either. Raises HomeinferError for what can't work at all (keys, folders, another agent)."""
        if not self._options.hosts:
            raise HomeinferError("no address of the head is known here: join again with a code")
        state = private_folder(Path(self._options.state) if self._options.state else state_folder())
        async with only_agent(state, self._options.patience, self._stopping):
            keys = own_keys(state)
            secure = Secure(keys)
            try:
                ended = await self._take_part(secure, state)
            finally:
                secure.close()
        self._on_event(ended)
        return ended.reason

    async def _take_part(self, secure: Secure, state: Path) -> Ended:
        options, keys = self._options, secure.keys
        folder = Path(options.weights) if options.weights else weights_folder()
        listen = listens_at(options.host, options.hosts)
        members = Members(state) if options.key == keys.public else None
        allowed = Allowed(frozenset((options.key, keys.public)), members)
        weights = Weights(secure, folder, options.models, listen, allowed)
        meter = Meter(folder)
        device = Device(keys, options.n_threads, listen, plan_folder(options.windows))
        head = HeadAddress(options.hosts, options.port, options.key)
        duties: Duties

        def hello(own: str) -> Hello:
            return Hello(
                protocol=PROTOCOL,
                version=__version__,
                name=(options.name or socket.gethostname() or "device")[:64],
                host=options.host or own,
                system=f"{platform.system()} {platform.release()} {platform.machine()}",
                weights_port=weights.port,
                engine=duties.engine.status,
            )

        connection = Connection(secure, head, hello, self._seeking, self._find if options.finds else None)
        duties = Duties(device, weights, meter, connection.send, self._on_event)
        tasks = [
            asyncio.create_task(self._beat(connection, duties, meter)),
            asyncio.create_task(duties.engine.watch()),
            asyncio.create_task(weights.serve()),
        ]
        talking = asyncio.create_task(self._talk(connection, duties, allowed))
        try:
            return await self._until_end(talking, tasks, connection)
        finally:
            await end(talking, *tasks)
            await duties.close()
            weights.close()

    async def _until_end(
        self, talking: asyncio.Task[Left], tasks: list[asyncio.Task[None]], connection: Connection
    ) -> Ended:
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({talking, stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if self._stopping.is_set():
            connection.leave(self._reason)
            return Ended(self._reason)
        for task in (talking, *tasks):
            if task.done():
                task.result()  # whatever ended one of the others is nothing to go on with
        left = talking.result()
        default = "the head has removed this device" if left.is_refused else "the cluster is down"
        return Ended(left.reason or default, is_problem=left.is_refused)

    async def _talk(self, connection: Connection, duties: Duties, allowed: Allowed) -> Left:
        def heard(message: FromHead) -> None:
            if isinstance(message, Welcome):
                self._on_event(Connected(message.name, connection.host))
            elif isinstance(message, Allow):
                allowed.keys = frozenset(message.keys)
            duties.heard(message)

        while True:
            left = await connection.run(heard)
            if left.is_refused or not self._options.stays:
                return left
            self._on_event(Trouble(left.reason or "the cluster is down; waiting for it to come up again"))
            await duties.unload()
            await asyncio.sleep(_STAY_SECONDS)

    async def _beat(self, connection: Connection, duties: Duties, meter: Meter) -> None:
        while True:
            stats = meter.read()
            connection.send(Beat(stats))
            self._on_event(StatsNow(stats))
            if duties.engine.is_there and connection.away_seconds > self._options.keep_seconds:
                self._on_event(Trouble("the head has been away for long: the engine is ended, memory is free again"))
                await duties.unload()
            await asyncio.sleep(BEAT_SECONDS)

    def _seeking(self, host: str, reason: str, away_seconds: float) -> None:
        self._on_event(Seeking(host, reason, away_seconds))

    async def _find(self) -> tuple[tuple[str, ...], int]:
        with contextlib.suppress(HomeinferError):  # a comfort: the addresses known go on being tried
            found = await work(FindHead(self._options.key))
            if isinstance(found, Found):
                return found.hosts, found.port
        return (), 0


def listens_at(host: str, hosts: tuple[str, ...]) -> str:
    """Where a device's sockets listen: on all its networks, or on this machine only when the cluster is on it alone.
    host: where others reach this device, "" when that is not known; hosts: the head's."""
    named = (host,) if host else hosts
    if not all(each in ("localhost", "::1") or each.startswith("127.") for each in named):
        return tcp_address("*", "*")
    if host and host != "localhost":
        return tcp_address(host, "*")
    return tcp_address("::1" if "::1" in named else "127.0.0.1", "*")


def plan_folder(named: str) -> Path:
    """Where a device keeps the windows of its plan, and nothing else."""
    return (Path(named) if named else windows_folder()) / "cluster"


async def _main() -> Ended:
    try:
        start = msgspec.json.decode(await asyncio.to_thread(sys.stdin.buffer.readline), type=AgentStart)
    except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
        return Ended(f"the agent was given what it can't read: {problem}", is_problem=True)
    ended: list[Ended] = []
    agent = Agent(start.options, lambda event: ended.append(event) if isinstance(event, Ended) else None)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows: it ends with its standard input
            loop.add_signal_handler(number, agent.stop)

    def leave_with_starter() -> None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):  # not the buffer: its lock, held here, would stop Python's end
                pass
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(agent.stop)

    threading.Thread(target=leave_with_starter, daemon=True).start()
    try:
        await agent.run()
    except HomeinferError as problem:
        return Ended(str(problem), is_problem=True)
    return ended[-1]


def main() -> None:
    """Entry of the process."""
    ended = asyncio.run(_main())
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(msgspec.json.encode(ended) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
