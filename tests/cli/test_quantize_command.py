from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from homeinfer.model.header import read_header
from homeinfer.quant.quantize import QuantizeResult
from homeinfer.quant.recipes import RECIPES
from tests.quant.f16_model import write_f16_model

HOMEINFER = [sys.executable, "-c", "from homeinfer.cli.main import main; main()", "quantize"]
ENVIRONMENT = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
SLOW = ("--recipe", "IQ3_S", "--threads", "1")
"""Some seconds for slow_source: long enough to be interrupted."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("source") / "model-f16.gguf")


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("source") / "model-f16.gguf", layers=32)


def quantize(*arguments: str | Path, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.run(
        [*HOMEINFER, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=ENVIRONMENT,
        preexec_fn=limit,
    )


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start_and_wait_for_output(source: Path, folder: Path) -> subprocess.Popen[str]:
    """A quantization that is writing, in a session of its own as a terminal would have it."""
    process = subprocess.Popen(
        [*HOMEINFER, str(source), str(folder / "small.gguf"), *SLOW],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    wait_until(lambda: any(path.stat().st_size > 0 for path in folder.iterdir()) or process.poll() is not None)
    assert process.poll() is None
    assert [path.suffix for path in folder.iterdir()] == [".partial"]
    return process


def test_last_line_says_size_bits_and_seconds(source: Path, tmp_path: Path) -> None:
    ran = quantize(source, tmp_path / "small.gguf", "--recipe", "q4_k_m")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"{tmp_path / 'small.gguf'}: Q4_K_M, 1.60 MB, 4.88 bpw, ")
    assert ran.stdout.endswith(" s\n")
    assert read_header(tmp_path / "small.gguf").tensors


def test_json_is_one_object_and_notes_go_to_stderr(source: Path, tmp_path: Path) -> None:
    ran = quantize(source, tmp_path / "small.gguf", "--recipe", "DQ3_K_M", "--json")
    assert ran.returncode == 0
    result = msgspec.json.decode(ran.stdout, type=QuantizeResult)
    assert result.size_bytes == (tmp_path / "small.gguf").stat().st_size
    assert ran.stderr == "".join(f"{note}\n" for note in result.notes)


def test_help_lists_every_recipe_and_examples() -> None:
    shown = " ".join(quantize("--help").stdout.replace("│", " ").split())
    assert ", ".join(RECIPES) in shown
    assert "homeinfer quantize model-F16.gguf model.gguf --recipe DQ3_K_M" in shown


def test_list_of_recipes_needs_no_model() -> None:
    shown = quantize("--list-recipes")
    assert shown.returncode == 0
    listed = [line.split()[:2] for line in shown.stdout.splitlines() if "." in line]
    assert [[info.name, f"{info.bpw:.2f}"] for info in RECIPES.values()] == listed


@pytest.mark.parametrize(
    "wrong",
    [("a.gguf",), ("a.gguf", "b.gguf"), ("a.gguf", "b.gguf", "--recipe", "Q4_K_M", "--threads", "0")],
)
def test_wrong_usage_exits_with_2(wrong: tuple[str, ...]) -> None:
    assert quantize(*wrong).returncode == 2


def test_refusal_is_one_line_and_exit_code_1(source: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((tmp_path / "missing.gguf", tmp_path / "small.gguf", "--recipe", "Q4_K_M"), "no such file"),
        ((source, source, "--recipe", "Q4_K_M"), "the source itself"),
        ((source, tmp_path / "small.gguf", "--recipe", "Q4KM"), "did you mean Q4_K_M"),
    ):
        ran = quantize(*arguments)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith("homeinfer: ")
        assert ran.stderr.count("\n") == 1
        assert words in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_written_to_its_end_is_removed(source: Path, tmp_path: Path) -> None:
    for limit in (1_000, 500_000, 1_604_000):
        ran = quantize(source, tmp_path / "small.gguf", "--recipe", "Q4_K_M", largest_file=limit)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert "writing failed half-way" in ran.stderr
        assert ran.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(slow_source: Path, tmp_path: Path) -> None:
    before = slow_source.stat()
    process = start_and_wait_for_output(slow_source, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err == "homeinfer: interrupted: nothing was written\n"
    assert list(tmp_path.iterdir()) == []
    assert slow_source.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("deadly", [signal.SIGTERM, signal.SIGKILL])
def test_quantizer_ends_and_cleans_up_when_its_parent_dies(
    slow_source: Path, tmp_path: Path, deadly: signal.Signals
) -> None:
    process = start_and_wait_for_output(slow_source, tmp_path)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 1
    process.send_signal(deadly)
    process.communicate(timeout=20)
    assert process.returncode == -deadly
    wait_until(lambda: list(tmp_path.iterdir()) == [])
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
