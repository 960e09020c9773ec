"""`homeinfer cluster up --detach`: the head in a process that stays when this one ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Literal

import msgspec
import typer

import homeinfer
from homeinfer.cli.cluster_live import Screen
from homeinfer.cli.cluster_stopping import signals_as_stop
from homeinfer.cli.cluster_watch import Watch
from homeinfer.cluster.client import ClusterClient
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.coordinator.running import run_folder, running_cluster
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.client import ClusterStatus
from homeinfer.errors import HomeinferError
from homeinfer.folders import private_folder, state_folder
from homeinfer.model.records import printable

_START_SECONDS = 60.0
_END_SECONDS = 30.0
_LAST_SECONDS = 10.0
"""A coordinator that answers no more may be ending."""
_LAST_WORDS = 4000


class Ended(msgspec.Struct, frozen=True):
    """The last line of a coordinator's process."""

    reason: str


def bring_up_detached(options: ClusterOptions, *, asks: bool) -> None:
    """Returns when it is ready. Raises HomeinferError with the reason why it ended instead; Ctrl-C ends it."""
    folder = private_folder(state_folder())
    cluster = running_cluster(folder)
    if cluster is not None:
        raise HomeinferError(
            f"a cluster runs on this machine already (process {cluster.pid}, {Path(cluster.model_path).name}): "
            "homeinfer cluster down ends it"
        )
    asyncio.run(_until_ready(Detached(options, folder), asks=asks))


async def _until_ready(detached: Detached, *, asks: bool) -> None:
    is_ready = False
    try:
        with Screen() as screen, signals_as_stop() as stopped:
            watching = asyncio.create_task(_watch(detached, screen, asks=asks))
            waiting = asyncio.create_task(stopped.wait())
            await asyncio.wait({watching, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if stopped.is_set():
                watching.cancel()
                screen.pause()
                screen.say("ending the cluster")
                raise typer.Exit(stopped.code)
            await watching
            is_ready = True
            screen.pause()
            screen.say("It stays when this terminal closes: homeinfer cluster status shows it, cluster down ends it.")
    finally:
        if not is_ready:
            detached.end()
        detached.close()


async def _watch(detached: Detached, screen: Screen, *, asks: bool) -> None:
    await detached.connect()
    await Watch(detached, screen, asks=asks).until_ready()


class Detached:
    """A coordinator in a process of its own, as a cluster_watch.Head."""

    def __init__(self, options: ClusterOptions, folder: Path) -> None:
        self._folder = folder
        self._log_path = private_folder(run_folder(folder)) / "coordinator.log"
        handle = os.open(self._log_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as log:
            self._process = _started(log)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError), self._process.stdin as pipe:  # it says in its log why it ended
            pipe.write(msgspec.json.encode(options) + b"\n")
        self._client: ClusterClient | None = None

    async def connect(self) -> None:
        """Wait until it listens. Raises HomeinferError when it ends instead."""
        deadline = time.monotonic() + _START_SECONDS
        while (cluster := running_cluster(self._folder)) is None or cluster.pid != self._process.pid:
            self._check()
            if time.monotonic() > deadline:
                raise HomeinferError(f"the cluster did not start within {_START_SECONDS:.0f} s; see {self._log_path}")
            await asyncio.sleep(0.05)
        self._client = ClusterClient(self._folder)

    async def status(self) -> ClusterStatus:
        self._check()
        try:
            return await asyncio.to_thread(self._there().status)
        except HomeinferError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _LAST_SECONDS)
            self._check()  # why it is gone says more than that it is
            raise

    async def plan(self) -> PlanReport | None:
        return await asyncio.to_thread(self._there().plan)

    async def order(self, what: Literal["yes", "no", "replan"]) -> str | None:
        await asyncio.to_thread(self._there().order, what)
        return None

    def _there(self) -> ClusterClient:
        assert self._client is not None
        return self._client

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise HomeinferError(self._last_words())

    def _last_words(self) -> str:
        """Why it ended, as it said in its last line."""
        with contextlib.suppress(OSError):
            lines = self._log_path.read_text("utf-8", "replace")[-_LAST_WORDS:].strip().splitlines() or [""]
            with contextlib.suppress(msgspec.MsgspecError):
                return msgspec.json.decode(lines[-1], type=Ended).reason
            if lines[-1]:
                return printable(lines[-1], 1000)
        return f"the cluster ended with status {self._process.returncode}"

    def end(self) -> None:
        """End it and wait for it."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Let go of it; it stays if it runs."""
        if self._client is not None:
            self._client.close()


def _started(log: IO[bytes]) -> subprocess.Popen[bytes]:
    paths = (str(Path(homeinfer.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "homeinfer.cluster.coordinator"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,
        creationflags=getattr(subprocess, "DETACHED_PROCESS", 0),  # what a new session is on Windows
    )
