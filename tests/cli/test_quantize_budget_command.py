"""`homeinfer quantize --bpw | --size` as a user runs it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from homeinfer.quant.dynamic import DynamicResult
from tests.quant.talking_model import write_talking_model, write_text
from tests.support.commands import HANG_SECONDS
from tests.support.processes import have_ended, have_stopped, held_back, killed_at_the_end, running, wait_until

HOMEINFER = [sys.executable, "-c", "from homeinfer.cli.main import main; main()", "quantize"]
OBSERVER = "homeinfer.quant.observer_process"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking_model(tmp_path_factory.mktemp("model") / "tiny-F16.gguf", layers=1, ffn=256)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def command(model: Path, folder: Path, text: Path, *more: str | Path) -> list[str]:
    return [*HOMEINFER, *map(str, (model, folder / "small.gguf", "--text", text, "--threads", "1", *more))]


def environment(kept: Path | None = None, **more: str) -> dict[str, str]:
    where = {} if kept is None else {"HOMEINFER_KEPT": str(kept)}
    return {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "OPENBLAS_NUM_THREADS": "1", **where, **more}


def run(arguments: list[str], kept: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, check=False, timeout=HANG_SECONDS, env=environment(kept)
    )


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


@pytest.fixture(scope="module")
def measured(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was measured of the model; the tests before may have done that already."""
    assert run(command(model, tmp_path_factory.mktemp("measured"), text, "--bpw", "5")).returncode == 0
    return Path(os.environ["HOMEINFER_KEPT"])


@pytest.mark.parametrize("stage", ["observer", "errors", "evaluator"])
def test_ctrl_c_leaves_nothing_behind(model: Path, text: Path, tmp_path: Path, stage: str, measured: Path) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    out.mkdir()
    child = f"homeinfer.quant.{'observer' if stage == 'observer' else 'evaluator'}_process"
    held = held_back(tmp_path, child)  # the evaluator comes after the errors
    if stage == "errors":
        shutil.copytree(measured, kept, ignore=shutil.ignore_patterns("errors.jsonl"))
    process = subprocess.Popen(
        command(model, out, text, "--bpw", "5"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(None if stage == "evaluator" else kept, **held), start_new_session=True,
    )  # fmt: skip
    with killed_at_the_end(process):
        if stage == "errors":
            wait_until(lambda: any(kept.rglob("errors.jsonl")), pause=0.003)
        else:
            wait_until(lambda: have_stopped(running(child, process.pid)))
        children = running(child, process.pid)
        os.killpg(process.pid, signal.SIGINT)
        told, said = process.communicate(timeout=HANG_SECONDS)
    wait_until(lambda: have_ended(children))
    assert (process.returncode, told, said) == (130, "", "homeinfer: interrupted: nothing was written\n")
    assert list(out.iterdir()) == []
    assert not list(kept.rglob("*.partial"))


def test_a_killed_child_is_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        command(model, out, text, "--bpw", "5"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(kept, **held_back(tmp_path, OBSERVER)),
    )  # fmt: skip
    with killed_at_the_end(process):
        wait_until(lambda: have_stopped(running(OBSERVER, process.pid)))
        for child in running(OBSERVER, process.pid):
            child.kill()
        told, said = process.communicate(timeout=HANG_SECONDS)
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
