"""`homeinfer cluster join`: this machine's agent, and what it is doing."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.text import Text

from homeinfer.cli.cluster_changes import Pace
from homeinfer.cli.cluster_device_view import Part, after, is_problem, line_of, part_view, tasks_of
from homeinfer.cli.cluster_leave import check_free, joined
from homeinfer.cli.cluster_live import Screen
from homeinfer.cli.cluster_options import JoinOptions
from homeinfer.cli.cluster_stopping import CTRL_C, end_task, signals_as_stop
from homeinfer.cluster.agent import Agent
from homeinfer.cluster.agent_options import AgentEvent, AgentOptions, Working
from homeinfer.cluster.known_heads import KnownHead, known_heads, remember_head
from homeinfer.cluster.pairing import pair
from homeinfer.cluster.wire.codes import decode_code
from homeinfer.cluster.wire.keys import own_keys
from homeinfer.errors import HomeinferError
from homeinfer.folders import private_folder, state_folder

_LOOK_SECONDS = 0.5


def take_part(options: JoinOptions) -> None:
    """Until the cluster ends or the user wants no more. Raises HomeinferError; exits with 130 after Ctrl-C."""
    folder = private_folder(state_folder())
    check_free(folder)  # a code serves once: it is not spent on a join that can't be
    code = " ".join(options.code or ())
    known = asyncio.run(_paired(code, options.name, folder)) if code else which_head(known_heads(folder), options.head)
    with joined(folder, known):
        asyncio.run(_take_part(options, known))


async def _paired(typed: str, name: str, folder: Path) -> KnownHead:
    code = decode_code(typed)
    with Screen() as screen:
        screen.show(Text(f"looking for the head at {' or '.join(code.hosts)} port {code.port}, 15 s at most"))
        known = await pair(code, own_keys(folder), name or platform.node() or "device", timeout=15.0)
    remember_head(folder, known)
    return known


def which_head(heads: Sequence[KnownHead], name: str) -> KnownHead:
    """The one of this name, or the one used last. Raises HomeinferError when there is none."""
    if not heads:
        raise HomeinferError(
            "this machine is in no cluster yet: type the code that homeinfer cluster up shows on the head, "
            "homeinfer cluster join CODE"
        )
    found = [head for head in heads if not name or head.name == name]
    if not found:
        names = ", ".join(head.name for head in heads)
        raise HomeinferError(f"no head named {name} is known here; known are: {names}")
    return found[0]


def agent_options(options: JoinOptions, known: KnownHead) -> AgentOptions:
    """What the agent is told."""
    folders = options.models or (Path.cwd(),)
    return AgentOptions(
        hosts=known.hosts,
        port=known.port,
        key=known.key,
        name=options.name,
        host=options.host,
        models=tuple(str(folder.absolute()) for folder in folders),
        n_threads=options.threads,
        stays=options.stay,
        finds=True,
    )


async def _take_part(options: JoinOptions, known: KnownHead) -> None:
    with Screen() as screen, signals_as_stop() as stopped:
        shown = _Shown(known.name, screen)
        agent = Agent(agent_options(options, known), shown.on_event)
        running = asyncio.create_task(agent.run())
        looking = asyncio.create_task(shown.forever())
        waiting = asyncio.create_task(stopped.wait())
        try:
            await asyncio.wait({running, looking, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            agent.stop()
            try:
                await end_task(waiting)
                await end_task(looking)
                screen.pause()
            finally:
                reason = await running
        if stopped.is_set():
            back = "; homeinfer cluster join takes part again" if stopped.code == CTRL_C else ""
            screen.say(f"left the cluster of {known.name}{back}")
            raise typer.Exit(stopped.code)
        if shown.is_problem:
            raise HomeinferError(reason)
        screen.say(reason)


class _Shown:
    """What the agent said, on the screen."""

    def __init__(self, head: str, screen: Screen) -> None:
        self._part = Part(head)
        self._screen = screen
        self._pace = Pace()
        self._changed = asyncio.Event()
        self.is_problem = False

    def on_event(self, event: AgentEvent) -> None:
        """For Agent."""
        line = line_of(event, self._part)
        if line is not None and (not self._screen.is_live or not isinstance(event, Working)):
            self._screen.say(line)
        self._part = after(self._part, event, time.monotonic())
        self.is_problem = self.is_problem or is_problem(event)
        self._changed.set()

    async def forever(self) -> None:
        """Draw when there is something new, a few times a second at most."""
        while True:
            self._screen.show(part_view(self._part, self._pace.left(tasks_of(self._part), time.monotonic())))
            await self._changed.wait()
            self._changed.clear()
            await asyncio.sleep(_LOOK_SECONDS)
