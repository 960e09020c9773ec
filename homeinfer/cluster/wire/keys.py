"""A device's own CURVE key pair, made at first use and kept."""

from __future__ import annotations

from pathlib import Path

import msgspec
import zmq

from homeinfer.cluster.private_file import create_private, read_private
from homeinfer.cluster.wire.control import Key
from homeinfer.cluster.wire.peers import new_keys
from homeinfer.errors import HomeinferError

_FILE = "keys.json"


class DeviceKeys(msgspec.Struct, frozen=True):
    """A CURVE key pair, Z85. The secret never leaves this device, nor is it ever shown."""

    public: Key
    secret: Key

    def __repr__(self) -> str:
        return f"DeviceKeys(public={self.public!r})"


def own_keys(folder: Path) -> DeviceKeys:
    """The keys of the device whose state is in `folder`; made there (mode 0600) at first use.

    Raises HomeinferError when they can't be kept there, or what is there are no keys.
    """
    path = folder / _FILE
    keys = read_private(path, DeviceKeys, "this device's keys")
    if keys is None:
        create_private(path, DeviceKeys(*new_keys()), "this device's keys")
        keys = read_private(path, DeviceKeys, "this device's keys")
    if keys is None or not _belong_together(keys):
        raise HomeinferError(
            f"{path} holds no pair of keys; move it away (this device must then be paired again) and start again"
        )
    return keys


def _belong_together(keys: DeviceKeys) -> bool:
    try:
        return zmq.curve_public(keys.secret.encode()) == keys.public.encode()
    except (zmq.ZMQError, ValueError):
        return False
