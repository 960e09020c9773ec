"""Rings whose devices fail: one line says which, soon, and nothing stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from homeinfer.cluster import engine_process
from homeinfer.cluster.engine_messages import Routes
from homeinfer.cluster.engine_process import EngineProcess
from homeinfer.cluster.local import RingOptions, start_local_ring
from homeinfer.engine.answers import Generator
from homeinfer.engine.pipeline import Batch
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.model.window_file import cut_windows
from homeinfer.model.window_plan import split_layers
from tests.support.processes import ENDLESS, engines, have_ended, wait_until
from tests.support.reference import GREEDY

THREE = RingOptions(devices=3, n_ctx=256, n_threads=1)
PROMPT = list(range(1000, 1016))


@pytest.fixture(scope="module")
def header(smollm2_path: Path) -> Header:
    return read_header(smollm2_path)


def second(header: Header) -> str:
    """What the second of three devices is called."""
    first, last = split_layers(header, THREE.devices)[1]
    return f"device-2 (layers {first}-{last - 1})"


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("homeinfer-*"))


def answer_until(header: Header, at_third_token: Callable[[], None]) -> tuple[str, float]:
    """The line that an answer ends with, and how many seconds after its third token; nothing may be left."""
    when = 0.0
    heard: list[str] = []

    def on_text(text: str) -> None:
        nonlocal when
        heard.append(text)
        if len(heard) == 3:
            when = time.monotonic()
            at_third_token()

    with closing(Tokenizer(header.files[0].path)) as tokenizer, closing(start_local_ring(header, THREE)) as ring:
        processes = engines()
        assert len(processes) == 3
        with pytest.raises(HomeinferError) as failure:
            Generator(ring, tokenizer).answer(PROMPT, GREEDY, 200, on_text=on_text)
        seconds = time.monotonic() - when
    assert not any(process.is_running() for process in processes)
    return str(failure.value), seconds


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_engine_killed_in_mid_answer_is_named(number: int, header: Header, temp_folder: Path) -> None:
    first, last = split_layers(header, THREE.devices)[number - 1]
    line, seconds = answer_until(header, lambda: engines()[number - 1].kill())
    assert line.startswith(f"the engine of device-{number} (layers {first}-{last - 1}) ended: killed by SIGKILL")
    assert seconds < engine_process.SILENCE_SECONDS
    assert left_behind(temp_folder) == []


def test_an_engine_that_stands_still_is_named(
    header: Header, temp_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "SILENCE_SECONDS", 6.5)  # the others say something every two seconds
    line, seconds = answer_until(header, lambda: engines()[1].send_signal(signal.SIGSTOP))
    assert line == f"the engine of {second(header)} has given no sign of life for 6 seconds"
    assert seconds < 30
    assert left_behind(temp_folder) == []


def test_an_engine_that_ends_while_loading_is_named(
    header: Header, temp_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = EngineProcess.route

    def killed(engine: EngineProcess, routes: Routes) -> None:
        """Before it hears of the ring, which it would join when it has loaded."""
        if engine.setup.name == "device-3":
            psutil.Process(engine.pid).kill()
        route(engine, routes)

    monkeypatch.setattr(EngineProcess, "route", killed)
    with pytest.raises(HomeinferError, match=r"^the engine of device-3 \(layers [\d-]+\) ended: killed by SIGKILL"):
        start_local_ring(header, THREE)
    assert engines() == []
    assert left_behind(temp_folder) == []


@pytest.mark.parametrize(
    "damage",
    [lambda _data: b"no model\n" * 1000, lambda data: data[: len(data) // 2], lambda data: data[:100]],
    ids=["text", "half", "beginning"],
)
def test_a_damaged_window_file_is_named(
    damage: Callable[[bytes], bytes],
    header: Header,
    temp_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOMEINFER_WINDOWS", str(tmp_path))
    path = cut_windows(header, split_layers(header, THREE.devices), tmp_path)[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(HomeinferError) as failure:
        start_local_ring(header, THREE)
    line = str(failure.value)
    assert line.startswith(f"{second(header)}: {path} can't be loaded: ")
    assert "\n" not in line
    assert engines() == []
    assert left_behind(temp_folder) == []


def test_a_folder_whose_name_is_too_long_for_sockets_is_done_without(
    header: Header, temp_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = temp_folder / ("x" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with closing(start_local_ring(header, RingOptions(devices=2, n_ctx=64, n_threads=1))) as ring:
        assert ring.forward(Batch.of(PROMPT, 0)).shape == (1, ring.n_vocab)
    assert left_behind(deep) == []


def test_more_devices_than_layers_is_one_line(header: Header) -> None:
    with pytest.raises(HomeinferError, match="this model of 30 layers can be cut into at most 30 windows, not 31"):
        start_local_ring(header, RingOptions(devices=31))
    assert engines() == []


def test_closing_twice_is_closing_once(header: Header, temp_folder: Path) -> None:
    ring = start_local_ring(header, RingOptions(devices=2, n_ctx=64, n_threads=1))
    assert len(left_behind(temp_folder)) == 1
    ring.close()
    ring.close()
    assert engines() == []
    assert left_behind(temp_folder) == []


def start_head(*options: str) -> subprocess.Popen[bytes]:
    """`homeinfer run` with an answer that does not end soon, on three devices."""
    command = [sys.executable, "-m", "homeinfer", "run", *ENDLESS]
    return subprocess.Popen(
        [*command, "--local-ring", "3", "--threads", "1", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def kill_and_look(head: subprocess.Popen[bytes], devices: list[psutil.Process], folder: Path) -> None:
    head.kill()
    head.wait()
    assert head.stdout is not None
    head.stdout.close()
    try:
        wait_until(lambda: have_ended(devices))
        assert left_behind(folder) == []
    finally:
        for device in devices:
            if device.is_running():
                device.kill()


def test_devices_leave_when_the_head_is_killed_in_mid_answer(temp_folder: Path) -> None:
    head = start_head()
    assert head.stdout is not None
    head.stdout.read(12)
    devices = engines(head.pid)
    assert len(devices) == 3
    kill_and_look(head, devices, temp_folder)


def test_devices_leave_when_the_head_is_killed_before_they_are_ready(temp_folder: Path) -> None:
    head = start_head()
    wait_until(lambda: len(engines(head.pid)) == 3 and any(temp_folder.glob("homeinfer-*/device-*")))
    kill_and_look(head, engines(head.pid), temp_folder)
