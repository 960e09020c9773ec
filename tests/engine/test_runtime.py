"""The door to llama.cpp: which versions pass, and what is set before it opens."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

from homeinfer.engine.runtime import OLDEST, TOO_NEW, check_version, prepare_environment
from homeinfer.errors import HomeinferError


@pytest.mark.parametrize(
    "version", [OLDEST, f"{OLDEST}+cu124", f"{OLDEST}.post1", importlib.metadata.version("llama-cpp-python")]
)
def test_known_versions_pass(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.3.35", "0.3.37", "0.3.37rc1", "0.3.100", "0.4.0", "1.0", "0.3", "", "unknown"])
def test_other_versions_are_refused_with_what_to_do(version: str) -> None:
    with pytest.raises(HomeinferError) as refused:
        check_version(version)
    assert str(refused.value) == (
        f"llama-cpp-python {version} is installed, homeinfer works with {OLDEST} up to, not including, {TOO_NEW}: "
        f"pip install 'llama-cpp-python=={OLDEST}'"
    )


def test_the_project_asks_for_the_versions_that_pass() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert f"llama-cpp-python>={OLDEST},<{TOO_NEW}" in project["project"]["dependencies"]


def test_idle_threads_are_told_not_to_spin_long() -> None:
    environment: dict[str, str] = {}
    prepare_environment(environment)
    assert environment["KMP_BLOCKTIME"] == "0"
    assert 100 <= int(environment["GOMP_SPINCOUNT"]) < 200_000


@pytest.mark.parametrize(
    ("set_by_user", "after"),
    [
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "3"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "3"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "0"}),
    ],
)
def test_what_the_user_set_stays(set_by_user: dict[str, str], after: dict[str, str]) -> None:
    environment = dict(set_by_user)
    prepare_environment(environment)
    assert environment == after
