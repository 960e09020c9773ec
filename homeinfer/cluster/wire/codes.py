"""Pairing codes as people copy them: base32 in groups of four.

Bytes: version and number of hosts (4 bits each), pairing port (2, big-endian), the head's key (32), the secret (8), the
hosts (a byte 4, 6 or the length + 6 of a name, then the address), the first 3 bytes of the SHA-256 of all that.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import re

import msgspec
from zmq.utils import z85

from homeinfer.errors import HomeinferError

SECRET_BYTES = 8
"""2^64 secrets, and the head closes after five wrong ones."""
_VERSION = 1
_CHECK_BYTES = 3
_MOST_HOSTS = 15
_MOST_TEXT = 4000
_LOOK_ALIKES = str.maketrans("018", "OIB")
_MISTYPED = "this pairing code is mistyped or cut off: copy the whole code again from where homeinfer cluster up runs"


class PairingCode(msgspec.Struct, frozen=True):
    """Where a head's pairing socket is (hosts: IPv4, IPv6 or name, best first), its key (Z85), and a secret."""

    hosts: tuple[str, ...]
    port: int
    key: str
    secret: bytes


def encode_code(code: PairingCode) -> str:
    """ABCD-EFGH-…: groups of four. Raises HomeinferError for a code that no head would make."""
    if not 1 <= len(code.hosts) <= _MOST_HOSTS or not 0 < code.port < 1 << 16 or len(code.secret) != SECRET_BYTES:
        raise HomeinferError("a pairing code needs 1 to 15 hosts, a port and a secret of 8 bytes")
    head = bytes([_VERSION << 4 | len(code.hosts)]) + code.port.to_bytes(2, "big")
    data = head + z85.decode(code.key) + code.secret + b"".join(map(_host_bytes, code.hosts))
    text = base64.b32encode(data + _check(data)).decode().rstrip("=")
    return "-".join(text[start : start + 4] for start in range(0, len(text), 4))


def decode_code(text: str) -> PairingCode:
    """The code that was typed or pasted: case, hyphens, spaces and line ends don't matter, 0, 1 and 8 are read as O, I
    and B. Raises HomeinferError for a mistyped one, and for one of another version of homeinfer."""
    plain = re.sub(r"[\s\-‐‑‒–—]+", "", text[:_MOST_TEXT]).upper().translate(_LOOK_ALIKES)
    try:
        data = base64.b32decode(plain + "=" * (-len(plain) % 8))
    except (binascii.Error, ValueError):
        raise HomeinferError(_MISTYPED) from None
    content, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if len(content) < 3 or _check(content) != check:
        raise HomeinferError(_MISTYPED)
    if content[0] >> 4 != _VERSION:
        raise HomeinferError(
            "this pairing code is of another version of homeinfer: install the same one on both devices"
        )
    return _parsed(content)


def _parsed(content: bytes) -> PairingCode:
    secret_end = 3 + 32 + SECRET_BYTES
    hosts = []
    rest = content[secret_end:]
    for _ in range(content[0] & 15):
        host, rest = _next_host(rest)
        hosts.append(host)
    port = int.from_bytes(content[1:3], "big")
    if rest or not hosts or not port:
        raise HomeinferError(_MISTYPED)
    return PairingCode(tuple(hosts), port, z85.encode(content[3:35]).decode(), content[35:secret_end])


def _check(data: bytes) -> bytes:
    return hashlib.sha256(b"homeinfer code" + data).digest()[:_CHECK_BYTES]


def _host_bytes(host: str) -> bytes:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.encode("ascii", "replace")
        if not _is_name(name):
            raise HomeinferError(f"{host} is no name of a host for a pairing code") from None
        return bytes([6 + len(name)]) + name
    return bytes([address.version]) + address.packed


def _next_host(data: bytes) -> tuple[str, bytes]:
    tag = data[0] if data else 0
    length = {4: 4, 6: 16}.get(tag, tag - 6)
    packed, rest = data[1 : 1 + length], data[1 + length :]
    if length < 1 or len(packed) != length:
        raise HomeinferError(_MISTYPED)
    if tag in (4, 6):
        return str(ipaddress.ip_address(packed)), rest
    if not _is_name(packed):
        raise HomeinferError(_MISTYPED)
    return packed.decode(), rest


def _is_name(name: bytes) -> bool:
    """Parts of up to 63 letters, digits, hyphens: Python's resolver raises UnicodeError for other lengths."""
    parts = name.split(b".")
    return len(name) <= 200 and all(re.fullmatch(rb"\w([\w-]{0,61}\w)?", part) for part in parts)
