"""Processes that stay up while nobody asks import little, and what they import can be imported whole later."""

from __future__ import annotations

import subprocess
import sys

import pytest

_HEAVY = ("numpy", "gguf", "yaml", "highspy", "llama_cpp", "homeinfer.cluster.planning.planner")


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("homeinfer.cluster.agent", (*_HEAVY, "rich", "typer", "zeroconf")),
        ("homeinfer.cli.cluster_join", _HEAVY),
        ("homeinfer.cluster.engine", ("asyncio", "gguf", "rich", "typer", "llama_cpp")),
        ("homeinfer.cluster.coordinator.coordinator", ("gguf", "homeinfer.engine.runtime")),
    ],
)
def test_a_process_that_stays_imports_little(module: str, without: tuple[str, ...]) -> None:
    found = run(f"import sys, {module}; print(*sorted(set(sys.modules) & set({without!r})))")
    assert found.split() == []


def test_the_bindings_of_llama_cpp_come_alone_and_its_package_whole_later() -> None:
    found = run(
        "import sys; from homeinfer.engine import runtime; lib = runtime.llama(); runtime.ggml(); "
        "print('llama_cpp' in sys.modules, 'jinja2' in sys.modules); "
        "import llama_cpp; print(llama_cpp.Llama.__name__, llama_cpp.llama_decode is lib.llama_decode)"
    )
    assert found.splitlines() == ["False False", "Llama True"]


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
