"""Keys and addresses of a ring's devices. Needs little memory: an idle agent imports it."""

from __future__ import annotations

import msgspec
import zmq


class Keys(msgspec.Struct, frozen=True):
    """A device's CURVE key pair, Z85 text, and the public keys that may send to it."""

    public: str
    secret: str
    allowed: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Keys(public={self.public!r})"


class Peer(msgspec.Struct, frozen=True):
    """Where to send: an address, and for tcp the receiver's public key."""

    address: str
    public: str | None = None


def new_keys() -> tuple[str, str]:
    """A fresh CURVE key pair: (public, secret)."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()
