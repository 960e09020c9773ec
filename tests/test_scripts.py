"""The scripts that README promises, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from homeinfer.cli.default_model import default_model
from homeinfer.model.header import read_header

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A script that goes well, with its window files in `folder`, without standard input."""
    environment = {**os.environ, "HOMEINFER_WINDOWS": str(folder)}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_demo_has_a_model_of_its_own_and_answers_through_three_devices(tmp_path: Path) -> None:
    """The model is quantized by the first run of all in a checkout, and kept."""
    done = run("./scripts/demo", "-p", "What is the capital of France?", folder=tmp_path)
    assert read_header(ROOT / ".venv/demo/SmolLM2-135M-Instruct-DQ3_K_M.gguf").get("homeinfer.recipe") == "DQ3_K_M"
    assert "Paris" in done.stdout
    assert all(f"device-{i}" in done.stderr for i in (1, 2, 3))


def test_the_window_benchmark_prints_the_ratios_it_is_named_for(tmp_path: Path) -> None:
    few = ("--rounds", "1", "--tokens", "8", "--prompt", "8", "--threads", "1")
    said = json.loads(run(sys.executable, "scripts/bench_window.py", default_model(), *few, folder=tmp_path).stdout)
    ratios = ("layerwindow_decode_ratio", "layerwindow_prefill_ratio", "ring3_tpot_ratio")
    assert all(said[name] > 0 for name in ratios)
    assert isinstance(said["hop_overhead_ms"], float), "of so few tokens it may be below 0 on a busy machine"
    assert set(said["tpot_ms"]) == {"llama_cpp", "layerwindow", "three_windows", "ring3"}
