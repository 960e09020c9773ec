#!/usr/bin/env python3
"""Whether what should be secret passes a network in the clear: captures an interface while a command runs.

    scripts/capture_check.py --on lo --text prompt.txt --text answer.txt --bytes model.gguf -- COMMAND …

Looks in every TCP stream (put together again in both directions) and every other packet for each line of the texts
(of 12 bytes and more), for pieces taken all over the binary files, and for connections of ZeroMQ that are not encrypted
at all: what they carry need not be text. A marker sent in the clear at the start must be found, or the capture proves
nothing. Prints JSON: `found` (what was seen in the clear, should be empty), `packets`,
`captured_bytes`, `dropped` (packets the kernel lost, should be 0), `marker_seen`, `needles`, and `returncode` of the
command. Exits with 1 when something was found, 2 when the capture is no proof. Linux, root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SHORTEST_LINE = 12
PIECES, PIECE_BYTES = 32, 24
UNENCRYPTED = {"a ZeroMQ connection in the clear": b"NULL" + bytes(16)}
"""How such a connection names its mechanism in its greeting (ZMTP 3)."""
MOST_WAITING = 8 << 20
"""Bytes of a stream that wait for a missing segment before it is taken for lost."""
_EVERY_PROTOCOL, _EXPERIMENTS = 0x0003, 0x88B5
_GLOBAL, _RECORD = struct.Struct("<IHHiIII"), struct.Struct("<IIII")
_SOL_PACKET, _ADD_MEMBERSHIP, _STATISTICS, _PROMISCUOUS, _RCVBUFFORCE = 263, 1, 6, 1, 33
_OUTGOING = 4


@dataclass(frozen=True)
class Segment:
    """A piece of one direction of a TCP connection. first: it opens the connection (SYN)."""

    stream: tuple[bytes, bytes, bytes]
    sequence: int
    first: bool
    payload: bytes


def tcp_segment(frame: bytes) -> Segment | None:
    """What an Ethernet frame carries of a TCP connection, None for anything else (fragments too)."""
    if len(frame) < 34:
        return None
    kind, start = struct.unpack_from("!H", frame, 12)[0], 14
    if kind == 0x0800 and frame[start + 9] == 6 and not struct.unpack_from("!H", frame, start + 6)[0] & 0x3FFF:
        header, total = 4 * (frame[start] & 15), struct.unpack_from("!H", frame, start + 2)[0]
        ends, end = frame[start + 12 : start + 20], start + total if total else len(frame)
    elif kind == 0x86DD and len(frame) >= 54 and frame[start + 6] == 6:
        header, total = 40, struct.unpack_from("!H", frame, start + 4)[0]
        ends, end = frame[start + 8 : start + 40], start + 40 + total if total else len(frame)
    else:
        return None
    tcp = start + header
    if len(frame) < tcp + 20:
        return None
    half = len(ends) // 2
    stream = (ends[:half] + frame[tcp : tcp + 2], ends[half:] + frame[tcp + 2 : tcp + 4], b"tcp")
    data = frame[tcp + 4 * (frame[tcp + 12] >> 4) : end]
    return Segment(stream, struct.unpack_from("!I", frame, tcp + 4)[0], bool(frame[tcp + 13] & 2), data)


@dataclass
class Stream:
    """One direction of a connection, put in order; `tail` is the end of what has been searched."""

    expected: int | None = None
    waiting: dict[int, bytes] = field(default_factory=dict)
    waiting_bytes: int = 0
    tail: bytes = b""

    def add(self, segment: Segment) -> bytes:
        """The bytes that are in order now and were not before."""
        if segment.first:
            self.expected = segment.sequence + 1 & 0xFFFFFFFF
            return b""
        if not segment.payload:
            return b""
        if self.expected is None:
            self.expected = segment.sequence
        if len(segment.payload) > len(self.waiting.get(segment.sequence, b"")):
            self.waiting_bytes += len(segment.payload) - len(self.waiting.get(segment.sequence, b""))
            self.waiting[segment.sequence] = segment.payload
        return b"".join(self._in_order(MOST_WAITING))

    def rest(self) -> bytes:
        """What still waits for something that will not come any more."""
        return b"".join(self._in_order(0))

    def _in_order(self, most_waiting: int) -> Iterator[bytes]:
        while self.waiting:
            assert self.expected is not None
            ahead = {_ahead(number, self.expected): number for number in self.waiting}
            nearest = min(ahead)
            if nearest > 0 and self.waiting_bytes < most_waiting:
                return
            data = self.waiting.pop(ahead[nearest])
            self.waiting_bytes -= len(data)
            new = data[max(0, -nearest) :]
            if new:
                self.expected = ahead[nearest] + len(data) & 0xFFFFFFFF
                yield new


def _ahead(number: int, expected: int) -> int:
    """How far a sequence number is ahead of another; they begin again at 2^32."""
    return (number - expected + (1 << 31)) % (1 << 32) - (1 << 31)


class Search:
    """Looks for needles in frames, one after the other."""

    def __init__(self, needles: dict[str, bytes]) -> None:
        """needles: by the name that they are reported as."""
        self._needles = needles
        self._overlap = max((len(needle) for needle in needles.values()), default=1) - 1
        self._streams: dict[tuple[bytes, bytes, bytes], Stream] = {}
        self.found: dict[str, int] = {}

    def frame(self, frame: bytes) -> None:
        segment = tcp_segment(frame)
        if segment is None:
            self._look(b"", frame)
            return
        stream = self._streams.setdefault(segment.stream, Stream())
        if segment.first:
            self._look_on(stream, stream.rest())
            self._streams[segment.stream] = stream = Stream()
        self._look_on(stream, stream.add(segment))

    def finish(self) -> None:
        """There are no more frames."""
        for stream in self._streams.values():
            self._look_on(stream, stream.rest())

    def _look_on(self, stream: Stream, new: bytes) -> None:
        if new:
            self._look(stream.tail, new)
            stream.tail = (stream.tail + new)[-self._overlap :] if self._overlap else b""

    def _look(self, tail: bytes, new: bytes) -> None:
        text = tail + new
        for name, needle in self._needles.items():
            if needle in text:
                self.found[name] = self.found.get(name, 0) + 1


def text_needles(name: str, text: str) -> dict[str, bytes]:
    """Each line that is long enough to mean something."""
    lines = (line.strip().encode() for line in text.splitlines())
    return {f"{name} line {n}": line for n, line in enumerate(lines, 1) if len(line) >= SHORTEST_LINE}


def file_needles(name: str, path: Path, pieces: int = PIECES) -> dict[str, bytes]:
    """Pieces from all over a file, none of them so monotonous that it could be anything."""
    size = path.stat().st_size
    places = [random.Random(n).randrange(max(1, size - PIECE_BYTES)) for n in range(8 * pieces)]
    found: dict[str, bytes] = {}
    with path.open("rb") as file:
        for place in places:
            file.seek(place)
            piece = file.read(PIECE_BYTES)
            if len(set(piece)) >= PIECE_BYTES // 2 and len(found) < pieces:
                found[f"{name} at {place}"] = piece
    return found


class Capture:
    """All packets of an interface, written to a pcap file by a thread of its own."""

    def __init__(self, interface: str, path: Path) -> None:
        """Raises OSError where it isn't allowed, or there is no such interface."""
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY_PROTOCOL))
        self._socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 512 << 20)
        self._socket.bind((interface, 0))
        membership = struct.pack("iHH8s", socket.if_nametoindex(interface), _PROMISCUOUS, 0, b"")
        self._socket.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, membership)
        self._socket.settimeout(0.2)
        self._interface, self._path = interface, path
        self._ends = threading.Event()
        self.packets = self.nbytes = self.dropped = 0
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def send_marker(self, marker: bytes) -> None:
        """A frame of its own in the clear, that nobody listens to."""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind((self._interface, 0))
            sender.send(bytes(6) + bytes(6) + _EXPERIMENTS.to_bytes(2, "big") + marker.ljust(46, b"\0"))

    def _write(self) -> None:
        with self._path.open("wb") as file:
            file.write(_GLOBAL.pack(0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 1))
            while not self._ends.is_set():
                with contextlib.suppress(TimeoutError):
                    frame, (interface, _, kind, *_) = self._socket.recvfrom(1 << 18)
                    if interface == "lo" and kind == _OUTGOING:
                        continue
                    now = time.time()
                    file.write(_RECORD.pack(int(now), int(now % 1 * 1e6), len(frame), len(frame)) + frame)
                    self.packets += 1
                    self.nbytes += len(frame)

    def stop(self) -> None:
        """What is on its way still gets in."""
        time.sleep(0.5)
        self._ends.set()
        self._thread.join()
        _, self.dropped = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _STATISTICS, 8))
        self._socket.close()


def frames(path: Path) -> Iterator[bytes]:
    """The frames of a pcap file that Capture wrote."""
    with path.open("rb") as file:
        file.seek(_GLOBAL.size)
        while len(header := file.read(_RECORD.size)) == _RECORD.size:
            yield file.read(_RECORD.unpack(header)[2])


def search_all(captured: Iterable[bytes], needles: dict[str, bytes]) -> dict[str, int]:
    """How often each needle was seen, those that were."""
    search = Search(needles)
    for frame in captured:
        search.frame(frame)
    search.finish()
    return search.found


def check(interface: str, needles: dict[str, bytes], command: list[str], path: Path) -> dict[str, object]:
    """Run the command and say what passed in the clear meanwhile."""
    marker = b"in the clear " + os.urandom(12).hex().encode()
    capture = Capture(interface, path)
    try:
        capture.send_marker(marker)
        returncode = subprocess.run(command, check=False, stdout=sys.stderr).returncode
    finally:
        capture.stop()
    found = search_all(frames(path), {**needles, **UNENCRYPTED, "marker": marker})
    return {
        "marker_seen": found.pop("marker", 0) > 0,
        "found": found,
        "needles": len(needles),
        "packets": capture.packets,
        "captured_bytes": capture.nbytes,
        "dropped": capture.dropped,
        "returncode": returncode,
    }


def all_needles(texts: list[Path], binaries: list[Path]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in texts:
        found |= text_needles(path.name, path.read_text())
    for path in binaries:
        found |= file_needles(path.name, path)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", default="lo", help="the interface, lo or a testbed's bridge (homebr)")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--bytes", type=Path, action="append", default=[])
    parser.add_argument("--keep", type=Path, help="where the capture stays, for other tools")
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="capture-") as folder:
        needles = all_needles(asked.text, asked.bytes)
        path = asked.keep or Path(folder) / "all.pcap"
        result = check(asked.on, needles, asked.command, path)
    print(json.dumps(result, indent=2))
    if result["found"]:
        return 1
    return 0 if needles and result["marker_seen"] and not result["dropped"] and not result["returncode"] else 2


if __name__ == "__main__":
    sys.exit(main())
