"""What a plan is made for: a model, devices, what the ring is for, what the user demands. Pure data."""

from __future__ import annotations

import msgspec

from homeinfer.cluster.planning.plan import Constraints, Workload
from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.shape import ModelShape
from homeinfer.errors import HomeinferError
from homeinfer.model.records import printable


class Problem(msgspec.Struct, frozen=True):
    """Everything that planning knows."""

    shape: ModelShape
    devices: tuple[DeviceProfile, ...]
    workload: Workload = Workload()
    constraints: Constraints = Constraints()

    @property
    def head(self) -> str:
        """The name of the device where the user is. Raises HomeinferError when there is none of that name."""
        if not self.devices:
            raise HomeinferError("there are no devices to plan for: give at least one profile")
        wanted = self.constraints.head or self.devices[0].name
        if all(device.name != wanted for device in self.devices):
            raise HomeinferError(f"no profile is named {printable(wanted, 60)}: name the head as its profile does")
        return wanted
