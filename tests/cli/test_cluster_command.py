"""`homeinfer cluster` as its users meet it: real heads, real devices, real terminals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from pseudo_terminal import Terminal

from homeinfer.cli.run import RunResult
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Workload
from homeinfer.cluster.planning.profile import VERSION, Network, ProfileFile
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.client import ClusterStatus
from homeinfer.model.header import read_header
from tests.support.processes import wait_until
from tests.support.profiles import Machine, device_of

HOMEINFER = [sys.executable, "-m", "homeinfer"]
PATIENCE = 180.0
"""On a busy machine a cluster may take half a minute to come up."""
ASKED = ("-p", "Once upon a time", "--raw", "--temp", "0", "-n", "12", "--json")


class Device:
    """One device of a home: its folders, and commands that run there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        folder.mkdir()
        names = ("STATE", "WINDOWS", "WEIGHTS", "DATA")
        self.environment = os.environ | {f"HOMEINFER_{name}": str(folder / name.lower()) for name in names}
        self.environment |= {"TERM": "xterm-256color", "PYTHONUTF8": "1", "COLUMNS": "100"}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*HOMEINFER, *words],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            cwd=self.folder,
        )

    def said(self, *words: str) -> str:
        """What it prints, when all goes well."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refusal(self, *words: str) -> str:
        """The one line that it ends with."""
        done = self.run(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("homeinfer: ")
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [*HOMEINFER, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=self.folder,
            )
        self.started.append(process)
        return process

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def see(self, pattern: str) -> str:
        """Wait until what was started said this."""

        def found() -> re.Match[str] | None:
            return re.search(pattern, self.log.read_text("utf-8", "replace"))

        try:
            wait_until(lambda: found() is not None, PATIENCE)
        except AssertionError:
            raise AssertionError(f"{pattern!r} was not said: {self.log.read_text('utf-8', 'replace')}") from None
        match = found()
        assert match is not None
        return match[1] if match.groups() else match[0]

    def status(self) -> ClusterStatus:
        return msgspec.json.decode(self.said("cluster", "status", "--json"), type=ClusterStatus)


class Home:
    """Devices by name; profiles for all of them, so that nothing is measured."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.desk, self.attic = Device(folder / "desk"), Device(folder / "attic")
        shape = model_shape(read_header(model), Workload(n_ctx=256))
        network = Network(bytes_per_s=1e8, latency_s=1e-4)
        machines = [Machine(name, 2 * 10**9, 10e9, 1e11, 1e9, network=network) for name in ("desk", "attic")]
        profiles = ProfileFile(VERSION, tuple(device_of(machine, shape) for machine in machines))
        (folder / "profiles.json").write_bytes(msgspec.json.encode(profiles))
        here = ("--name", "desk", "--host", "127.0.0.1", "--port", "0", "--threads", "1", "--ctx", "256")
        self.up = ("cluster", "up", *here, "--profile", str(folder / "profiles.json"))

    def processes(self) -> list[psutil.Process]:
        """All that use this home's folders."""
        found = []
        folders = {str(device.folder / "state") for device in (self.desk, self.attic)}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOMEINFER_STATE") in folders and process.pid != os.getpid():
                    found.append(process)
        return found


@pytest.fixture
def home(temp_folder: Path, smollm2_path: Path) -> Iterator[Home]:
    """At its end nothing of it runs any more; what a failed test left is killed."""
    made = Home(temp_folder, smollm2_path)
    yield made
    with contextlib.suppress(AssertionError):
        wait_until(lambda: made.processes() == [], 30)  # for those that are ending at this moment
    left = made.processes()
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    for device in (made.desk, made.attic):
        for started in device.started:
            started.wait(10)
    assert left == []


def test_the_evening_of_a_user(home: Home) -> None:
    desk, attic = home.desk, home.attic
    up = desk.start(*home.up, "--devices", "2", "--require", "attic")
    code = desk.see(r"homeinfer cluster join ([A-Z2-7-]+)\n")
    join = attic.start("cluster", "join", code, "--name", "attic", "--threads", "1")
    desk.see("ready: homeinfer chat")
    attic.see("takes part with layers")

    status = desk.status()
    assert [device.name for device in status.devices if device.layers] == ["desk", "attic"]
    assert (status.state, status.n_ctx) == ("ready", 256)
    assert "attic" in desk.said("cluster", "devices")
    plan = msgspec.json.decode(desk.said("cluster", "plan", "--json"), type=PlanReport)
    assert {window.device for window in plan.windows} == {"desk", "attic"}

    together = desk.run("run", *ASKED)
    answer = msgspec.json.decode(together.stdout, type=RunResult)
    assert together.stderr == ""
    assert [device.name for device in answer.devices] == ["desk", "attic"]
    alone = msgspec.json.decode(desk.said("run", *ASKED, "--local", "--ctx", "256", "-t", "1"), type=RunResult)
    assert answer.tokens == alone.tokens
    assert [device.name for device in alone.devices] == ["device-1"]

    for words in (("cluster", "join"), ("cluster", "up")):
        assert "takes part in a cluster already" in attic.refusal(*words)
    for order in ("status", "devices"):
        assert "this machine takes part in the cluster of desk: ask there" in attic.refusal("cluster", order)
    assert "is the head of a cluster that runs" in desk.refusal("cluster", "join")
    assert attic.said("cluster", "leave").startswith("left, and desk is forgotten here")
    assert join.wait(PATIENCE) == 128 + signal.SIGTERM
    assert "this machine is in no cluster yet" in attic.refusal("cluster", "join")
    assert desk.said("cluster", "forget", "attic") == "attic is forgotten: it needs a new code to come back\n"
    assert "no device named attic" in desk.refusal("cluster", "forget", "attic")
    assert desk.said("cluster", "down") == "the cluster is down\n"
    assert up.wait(PATIENCE) == 0


def test_a_detached_cluster_stays_until_it_is_taken_down_and_devices_wait_for_it(home: Home) -> None:
    desk, attic = home.desk, home.attic
    said = desk.said(*home.up, "--detach")
    assert "ready: homeinfer chat" in said
    assert "a cluster runs on this machine already" in desk.refusal(*home.up, "--detach")
    old, new = desk.status().code, desk.said("cluster", "code")
    assert old is not None
    assert old in said
    assert old not in new
    chat = subprocess.run(
        [*HOMEINFER, "chat", "-n", "4"],
        input="Hi\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=desk.environment,
    )
    assert chat.returncode == 0
    assert chat.stdout.strip()
    assert "the cluster on this machine answers: desk" in chat.stderr
    found = re.search("cluster join ([A-Z2-7-]+)", new)
    assert found is not None
    with Terminal([*HOMEINFER, "cluster", "join", found[1], "--name", "attic"], attic.environment) as terminal:
        terminal.see("cluster of desk · connected")
        assert desk.said("cluster", "down") == "the cluster is down\n"
        assert terminal.ends() == 0
    with Terminal([*HOMEINFER, "cluster", "join"], attic.environment) as terminal:
        terminal.see("looking for it")
        terminal.type("\x03")
        assert terminal.ends() == 130
        assert "Traceback" not in terminal.text


def test_a_person_sees_the_plan_lets_a_device_join_says_yes_and_ends_it_with_ctrl_c(home: Home) -> None:
    with Terminal([*HOMEINFER, *home.up], home.desk.environment) as terminal:
        terminal.see("homeinfer cluster join ")
        terminal.see(r"Load it so\?")
        assert "SmolLM2-135M" in terminal.text
        found = re.search("cluster join ([A-Z2-7-]+)", terminal.text)
        assert found is not None
        join = home.attic.start("cluster", "join", found[1], "--name", "attic")
        terminal.see("attic was paired")
        terminal.see("left out")
        terminal.see(r"Load it so\?")
        terminal.type("perhaps\n")
        terminal.see(r"Load it so\?")
        terminal.type("\n")
        terminal.see("ready: homeinfer chat")
        terminal.see("attic takes no part")
        terminal.type("\x03")
        assert terminal.ends() == 130
        assert "Traceback" not in terminal.text
    assert join.wait(PATIENCE) == 0


def test_a_person_who_says_no_is_left_with_nothing(home: Home) -> None:
    with Terminal([*HOMEINFER, *home.up], home.desk.environment) as terminal:
        terminal.see(r"Load it so\?")
        terminal.type("n\n")
        assert terminal.ends() == 0
        assert "Traceback" not in terminal.text


def test_ctrl_c_while_it_waits_for_devices_leaves_nothing(home: Home) -> None:
    with Terminal([*HOMEINFER, *home.up, "--devices", "2", "--detach"], home.desk.environment) as terminal:
        terminal.see("waiting for devices")
        terminal.type("\x03")
        assert terminal.ends() == 130
        assert "Traceback" not in terminal.text


@pytest.mark.parametrize("order", ["status", "plan", "code", "down"])
def test_without_a_cluster_orders_are_one_line(home: Home, order: str) -> None:
    assert "no cluster is running on this machine" in home.desk.refusal("cluster", order)


def test_what_can_not_work_is_one_line(home: Home) -> None:
    desk = home.desk
    text = desk.folder / "letter.txt"
    text.write_text("Dear model,\nplease answer.\n")
    assert "this is a text file, not a GGUF model" in desk.refusal("cluster", "up", str(text))
    assert "type the code that homeinfer cluster up shows" in desk.refusal("cluster", "join")
    assert "mistyped or cut off" in desk.refusal("cluster", "join", "ABCD-EFGH")
    assert "there is nothing to leave" in desk.refusal("cluster", "leave")
    assert "no device named attic is paired" in desk.refusal("cluster", "forget", "attic")
    assert "2 devices need 31 layers for that, the model has 30" in desk.refusal("cluster", "up", "--rounds", "15")
    assert "no device is paired with this machine yet" in desk.said("cluster", "devices")
    assert desk.run("cluster", "up", "--headroom", "lots").returncode == 2
    assert desk.run("cluster", "join", "--host", "1.2.3.4.5x").returncode == 2
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in desk.refusal("cluster", "up", "--detach", "--port", str(port))
