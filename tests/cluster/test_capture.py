"""scripts/capture_check.py finds what passes in the clear, however it is cut up."""

from __future__ import annotations

import random
import socket
import struct
from pathlib import Path

import pytest
import zmq
from capture_check import UNENCRYPTED, file_needles, frames, search_all, tcp_segment, text_needles

SECRET = b"the prompt that nobody may read"
NEEDLES = {"prompt": SECRET}


def tcp(payload: bytes, sequence: int, *, syn: bool = False, port: int = 40000, pad: bytes = b"") -> bytes:
    ports = struct.pack("!HHIIBBHHH", port, 47710, sequence & 0xFFFFFFFF, 0, 5 << 4, 2 if syn else 16, 100, 0, 0)
    ends = socket.inet_aton("10.77.0.1") + socket.inet_aton("10.77.0.2")
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40 + len(payload), 0, 0, 64, 6, 0) + ends
    return bytes(12) + b"\x08\x00" + head + ports + payload + pad


def tcp6(payload: bytes, sequence: int) -> bytes:
    ports = struct.pack("!HHIIBBHHH", 40000, 47710, sequence, 0, 5 << 4, 16, 100, 0, 0)
    ends = socket.inet_pton(socket.AF_INET6, "fd00::1") + socket.inet_pton(socket.AF_INET6, "fd00::2")
    return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, 20 + len(payload), 6, 64) + ends + ports + payload


def cut(data: bytes, size: int, start: int = 1000) -> list[bytes]:
    return [tcp(data[at : at + size], start + at) for at in range(0, len(data), size)]


def test_what_is_within_one_packet_is_found() -> None:
    assert search_all([tcp(b"x" + SECRET + b"y", 5)], NEEDLES) == {"prompt": 1}
    assert search_all([tcp6(SECRET, 5)], NEEDLES) == {"prompt": 1}


@pytest.mark.parametrize("start", [1000, (1 << 32) - 20])
@pytest.mark.parametrize("size", [1, 5, 30])
def test_what_is_spread_over_packets_in_any_order_and_twice_is_found_once(size: int, start: int) -> None:
    data = bytes(50) + SECRET + bytes(50)
    packets = cut(data, size, start) * 2
    random.Random(size).shuffle(packets)
    assert search_all([tcp(b"", start - 1, syn=True), *packets], NEEDLES) == {"prompt": 1}


def test_streams_are_not_mixed_up() -> None:
    halves = [tcp(SECRET[:10], 1, port=1), tcp(b"zzzz", 1, port=2), tcp(SECRET[10:], 11, port=1)]
    assert search_all(halves, NEEDLES) == {"prompt": 1}
    assert search_all([tcp(SECRET[:10], 1, port=1), tcp(SECRET[10:], 11, port=2)], NEEDLES) == {}


def test_a_new_connection_of_the_same_ports_starts_anew() -> None:
    old = [tcp(b"", 9, syn=True), tcp(bytes(1000), 10)]
    new = [tcp(b"", 99, syn=True), tcp(SECRET, 100)]
    assert search_all([*old, *new], NEEDLES) == {"prompt": 1}


def test_a_lost_packet_does_not_hide_what_comes_later() -> None:
    lost = [tcp(b"", 0, syn=True), *cut(bytes(9 << 20), 60_000, 500), tcp(SECRET, 500 + (9 << 20))]
    assert search_all(lost, NEEDLES) == {"prompt": 1}


def test_what_is_padding_or_not_tcp_is_searched_as_it_is() -> None:
    udp = bytearray(tcp(SECRET, 1))
    udp[14 + 9] = 17
    fragment = bytearray(tcp(SECRET, 1))
    fragment[14 + 6] = 0x20
    assert tcp_segment(bytes(udp)) is tcp_segment(bytes(fragment)) is None
    assert search_all([bytes(udp), bytes(fragment), SECRET], NEEDLES) == {"prompt": 3}
    padded = [tcp(SECRET[:5], 1, pad=b"\0\0\0"), tcp(SECRET[5:], 6)]
    assert search_all(padded, NEEDLES) == {"prompt": 1}


@pytest.mark.parametrize("length", range(0, 80, 3))
def test_broken_packets_do_not_stop_the_search(length: int) -> None:
    assert search_all([tcp(SECRET, 1)[:length], tcp6(SECRET, 1)[:length], tcp(SECRET, 900)], NEEDLES) == {"prompt": 1}


def test_lines_that_mean_something_are_looked_for() -> None:
    assert text_needles("answer", "Yes.\n  Paris is the capital of France. \n\n") == {
        "answer line 2": b"Paris is the capital of France."
    }


def test_pieces_of_weights_are_taken_from_everywhere_but_not_from_zeros(tmp_path: Path) -> None:
    data = bytes(50_000) + random.Random(0).randbytes(50_000)
    (tmp_path / "weights").write_bytes(data)
    needles = file_needles("weights", tmp_path / "weights")
    assert len(needles) == 32
    assert all(data.find(needle) >= 49_970 for needle in needles.values())
    assert set(search_all(cut(data[40_000:], 1448), needles)) == set(needles)


def test_a_file_of_captured_frames_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = struct.pack("<IIII", 0, 0, 3, 3)
    (tmp_path / "all.pcap").write_bytes(bytes(24) + record + b"abc" + record + b"def" + record[:7])
    assert list(frames(tmp_path / "all.pcap")) == [b"abc", b"def"]


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_a_connection_without_encryption_is_found_by_its_greeting(is_encrypted: bool) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer, socket.create_server(("127.0.0.1", 0)) as home:
        dealer.linger = 0
        if is_encrypted:
            dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
            dealer.curve_serverkey = zmq.curve_keypair()[0]
        dealer.connect(f"tcp://127.0.0.1:{home.getsockname()[1]}")
        connection, _ = home.accept()
        with connection:
            connection.settimeout(10)
            connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
            greeting = b""
            while len(greeting) < 64:
                greeting += (came := connection.recv(64))
                assert came
    assert bool(search_all(cut(greeting, 7), UNENCRYPTED)) is not is_encrypted
