"""How chat, run, bench and status find the cluster that runs on this machine."""

from __future__ import annotations

from pathlib import Path

import msgspec

from homeinfer.cluster.private_file import write_private
from homeinfer.process_start import still_runs

_FOLDER, _FILE = "run", "cluster.json"


class RunningCluster(msgspec.Struct, frozen=True):
    """address: of the socket for clients, ipc://… (a file that only this user can open) or tcp://127.0.0.1:… (CURVE:
    `key` is the server's, and only this device's own keys get in). began: the process's process_start."""

    pid: int
    began: str
    address: str
    key: str
    model_path: str
    port: int = 0


def run_folder(folder: Path) -> Path:
    """Of a state folder: what is there while a cluster runs."""
    return folder / _FOLDER


def running_cluster(folder: Path) -> RunningCluster | None:
    """The cluster of a state folder, or None when none runs (one that was killed has left its file, and counts not)."""
    try:
        found = msgspec.json.decode((run_folder(folder) / _FILE).read_bytes(), type=RunningCluster)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return found if still_runs(found.pid, found.began) else None


def was_killed(folder: Path) -> bool:
    """Whether the cluster that ran here last had no time to say that it runs no more. Only while none runs."""
    return (run_folder(folder) / _FILE).exists()


def write_running(folder: Path, cluster: RunningCluster) -> None:
    """Say that a cluster runs. `folder` is the state folder, whose run folder exists."""
    write_private(run_folder(folder) / _FILE, cluster, "what a running cluster says of itself")


def remove_running(folder: Path) -> None:
    """Say that it runs no more."""
    (run_folder(folder) / _FILE).unlink(missing_ok=True)
