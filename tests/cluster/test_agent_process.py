"""`python -m homeinfer.cluster.agent`: how it ends, and that nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster.agent_lock import running_agent
from homeinfer.cluster.agent_options import AgentOptions, AgentStart, Ended
from homeinfer.cluster.wire import control
from homeinfer.model.header import read_header
from homeinfer.model.window_plan import n_layers
from tests.support.processes import engines, have_ended, wait_until
from tests.support.scripted_head import Head, a_head, agent_options, part_of, tiny_model


@contextlib.asynccontextmanager
async def a_process(options: AgentOptions) -> AsyncIterator[asyncio.subprocess.Process]:
    """An agent's process, ended on the way out."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "homeinfer.cluster.agent",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(Path(options.state).parent)},
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(AgentStart(options)) + b"\n")
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def loaded(head: Head, model: Path, folder: Path) -> None:
    """The device has an engine with all of the model, as two windows."""
    manifest = await head.give(model, folder)
    await head.load(1, part_of(manifest, (0, 1), (1, n_layers(read_header(model)))))


async def last_word(process: asyncio.subprocess.Process) -> Ended:
    assert process.stdout is not None
    return msgspec.json.decode(await process.stdout.read(), type=Ended)


@pytest.mark.parametrize("how", ["SIGTERM", "stdin", "SIGKILL"])
def test_an_agent_that_ends_leaves_nothing_behind(tmp_path: Path, how: str) -> None:
    model, folder = tiny_model(tmp_path / "model"), tmp_path / "desk"
    folder.mkdir()

    async def test() -> None:
        async with a_head(tmp_path / "head") as head:
            options = agent_options(head, folder)
            async with a_process(options) as process:
                await head.expect(control.Hello)
                await loaded(head, model, tmp_path / "head-weights")
                assert running_agent(Path(options.state)) == process.pid
                (engine,) = engines(process.pid)
                if how == "stdin":
                    assert process.stdin is not None
                    process.stdin.close()
                else:
                    process.send_signal(getattr(signal, how))
                if how != "SIGKILL":
                    await head.expect(control.Bye)
                    assert await last_word(process) == Ended("stopped")
                # only then is its lock surely gone: the system closes what a killed process had open in any order
                assert await process.wait() == (-signal.SIGKILL if how == "SIGKILL" else 0)
                await asyncio.to_thread(wait_until, lambda: have_ended([engine]))
                assert running_agent(Path(options.state)) is None
            left = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
            assert left <= {"state", "weights", "windows"}
            assert not [path for path in folder.rglob("*") if path.suffix in (".part", ".partial") or path.is_socket()]

    asyncio.run(asyncio.wait_for(test(), 120))


def test_an_agent_that_is_given_nothing_to_do_says_so_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "homeinfer.cluster.agent"], input=b"", capture_output=True, timeout=120, check=False
    )
    ended = msgspec.json.decode(done.stdout, type=Ended)
    assert ended.is_problem
    assert "can't read" in ended.reason
    assert not done.stderr


def test_a_second_agent_of_the_same_device_is_told_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_head(tmp_path / "head") as head:
            options = agent_options(head, tmp_path / "desk")
            async with a_process(options) as first:
                await head.expect(control.Hello)
                async with a_process(options) as second:
                    ended = await last_word(second)
                    assert ended.is_problem
                    assert f"process {first.pid}" in ended.reason

    asyncio.run(asyncio.wait_for(test(), 120))
