"""`homeinfer quantize --bpw | --size` as a user runs it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil
import pytest

from homeinfer.quant.dynamic import DynamicResult
from tests.quant.talking_model import write_talking_model, write_text
from tests.support.processes import running

HOMEINFER = [sys.executable, "-c", "from homeinfer.cli.main import main; main()", "quantize"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking_model(tmp_path_factory.mktemp("model") / "tiny-F16.gguf", layers=1, ffn=256)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def command(model: Path, folder: Path, text: Path, *more: str | Path) -> list[str]:
    return [*HOMEINFER, *map(str, (model, folder / "small.gguf", "--text", text, "--threads", "1", *more))]


def environment(kept: Path | None = None) -> dict[str, str]:
    more = {} if kept is None else {"HOMEINFER_KEPT": str(kept)}
    return {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "OPENBLAS_NUM_THREADS": "1", **more}


def run(arguments: list[str], kept: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300, env=environment(kept))


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.003)


def test_a_size_gives_a_file_a_report_and_one_line_or_json(model: Path, text: Path, tmp_path: Path) -> None:
    ran = run(command(model, tmp_path, text, "--bpw", "5", "--report", tmp_path / "report.html"))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"{tmp_path / 'small.gguf'}: dynamic, ")
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".svg", ".gguf"}
    size = (tmp_path / "small.gguf").stat().st_size
    ran = run(command(model, tmp_path, text, "--size", str(size), "--json"))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "--force overwrites it" in ran.stderr
    ran = run(command(model, tmp_path, text, "--size", str(size), "--json", "--force"))
    result = msgspec.json.decode(ran.stdout, type=DynamicResult)
    assert result.size_bytes <= size == result.limit_bytes


def children_of(process: subprocess.Popen[str], module: str) -> list[psutil.Process]:
    return running(module, process.pid)


@pytest.fixture(scope="module")
def measured(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was measured of the model; the tests before may have done that already."""
    assert run(command(model, tmp_path_factory.mktemp("measured"), text, "--bpw", "5")).returncode == 0
    return Path(os.environ["HOMEINFER_KEPT"])


@pytest.mark.parametrize("stage", ["observer", "errors", "evaluator"])
def test_ctrl_c_leaves_nothing_behind(model: Path, text: Path, tmp_path: Path, stage: str, measured: Path) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    out.mkdir()
    if stage == "errors":
        shutil.copytree(measured, kept, ignore=shutil.ignore_patterns("errors.jsonl"))
    process = subprocess.Popen(
        command(model, out, text, "--bpw", "5"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(None if stage == "evaluator" else kept), start_new_session=True,
    )  # fmt: skip
    if stage == "errors":
        wait_until(lambda: any(kept.rglob("errors.jsonl")))
    else:
        wait_until(lambda: bool(children_of(process, f"homeinfer.quant.{stage}_process")))
    os.killpg(process.pid, signal.SIGINT)
    told, said = process.communicate(timeout=60)
    assert (process.returncode, told, said) == (130, "", "homeinfer: interrupted: nothing was written\n")
    assert list(out.iterdir()) == []
    assert not list(kept.rglob("*.partial"))


def test_a_killed_child_is_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        command(model, out, text, "--bpw", "5"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(kept),
    )  # fmt: skip
    wait_until(lambda: bool(children_of(process, "homeinfer.quant.observer_process")))
    for child in children_of(process, "homeinfer.quant.observer_process"):
        child.kill()
    told, said = process.communicate(timeout=60)
    assert (process.returncode, told, said.count("\n")) == (1, "", 1)
    assert "the process that ran the model was killed" in said
    assert list(out.iterdir()) == []


def test_a_full_disk_is_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    """In mount namespaces of their own, with a small disk for what is measured, or for the output."""

    def told(full: str, kilobytes: int) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / f"{full}-{kilobytes}"
        for name in ("kept", "out"):
            (folder / name).mkdir(parents=True)
        mount = f"mount -t tmpfs -o size={kilobytes}k none {shlex.quote(str(folder / full))}"
        quantize = shlex.join(command(model, folder / "out", text, "--bpw", "5"))
        script = f"{mount} && {quantize}; echo $?; ls -A {shlex.quote(str(folder / 'out'))}"
        return run(["unshare", "-rm", "sh", "-c", script], folder / "kept" if full == "kept" else None)

    with ThreadPoolExecutor(2) as pool:  # each uses one core
        for ran in pool.map(told, ("kept", "kept", "kept", "out"), (16, 200, 1500, 256)):
            assert (ran.stdout, ran.stderr.count("\n")) == ("1\n", 1)
            assert any(words in ran.stderr for words in ("No space left", "too full", "HOMEINFER_KEPT"))
