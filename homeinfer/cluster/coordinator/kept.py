"""What a head remembers from one run to the next: its epoch, devices' profiles, and the plan that ran last."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import msgspec

from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.private_file import read_private, write_private
from homeinfer.errors import HomeinferError
from homeinfer.folders import private_folder

_MOST_PROFILES = 256


class _Epoch(msgspec.Struct, frozen=True):
    epoch: int


class HeadFiles:
    """In the folder cluster/ of a state folder. Raises HomeinferError when that can't be made."""

    def __init__(self, folder: Path) -> None:
        self._folder = private_folder(folder / "cluster")
        self._profiles = private_folder(self._folder / "profiles")

    def epoch(self) -> int:
        """The last one that was used, 0 before the first. Raises HomeinferError when it can't be read: a number that
        was used before would let old messages in."""
        found = read_private(self._folder / "epoch.json", _Epoch, "the number of the cluster's last epoch")
        return found.epoch if found is not None else 0

    def keep_epoch(self, epoch: int) -> None:
        """Raises HomeinferError when the disk is full."""
        write_private(self._folder / "epoch.json", _Epoch(epoch), "the number of the cluster's last epoch")

    def profile(self, key: str, digest: str) -> DeviceProfile | None:
        """A device's, with this model; None where it was not measured (or what was kept is of no use)."""
        with contextlib.suppress(HomeinferError):
            return read_private(self._profile(key, digest), DeviceProfile, "the profile of a device")
        return None

    def keep_profile(self, key: str, digest: str, profile: DeviceProfile) -> None:
        """It costs a measurement and no error when the disk is full."""
        with contextlib.suppress(HomeinferError, OSError):
            write_private(self._profile(key, digest), profile, "the profile of a device")
            every = sorted(self._profiles.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for old in every[:-_MOST_PROFILES]:
                old.unlink(missing_ok=True)

    def plan(self) -> PlanReport | None:
        """The plan that ran last."""
        with contextlib.suppress(HomeinferError):
            return read_private(self._folder / "plan.json", PlanReport, "the last plan")
        return None

    def keep_plan(self, report: PlanReport) -> None:
        with contextlib.suppress(HomeinferError):
            write_private(self._folder / "plan.json", report, "the last plan")

    def _profile(self, key: str, digest: str) -> Path:
        return self._profiles / f"{hashlib.sha256(f'{key} {digest}'.encode()).hexdigest()[:32]}.json"
