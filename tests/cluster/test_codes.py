"""Pairing codes: what is typed is what was shown, or it is said to be mistyped."""

from __future__ import annotations

import base64
import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from homeinfer.cluster.wire.codes import SECRET_BYTES, PairingCode, decode_code, encode_code
from homeinfer.errors import HomeinferError

HOSTS = st.one_of(
    st.ip_addresses().map(str), st.from_regex(r"[a-z][a-z0-9-]{0,60}(\.[a-z][a-z0-9]{0,20})?", fullmatch=True)
).filter(lambda host: not host.endswith("-") and "-." not in host)
CODES = st.builds(
    PairingCode,
    hosts=st.lists(HOSTS, min_size=1, max_size=15).map(tuple),
    port=st.integers(1, 65535),
    key=st.binary(min_size=32, max_size=32).map(lambda key: z85.encode(key).decode()),
    secret=st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES),
)
CODE = PairingCode(("192.168.1.20",), 47711, z85.encode(bytes(range(32))).decode(), bytes(range(8)))


@given(CODES)
def test_what_is_typed_is_what_was_shown(code: PairingCode) -> None:
    assert decode_code(encode_code(code)) == code


def test_a_code_is_short_and_in_groups_of_four() -> None:
    text = encode_code(CODE)
    groups = text.split("-")
    assert len(groups) <= 21
    assert all(len(group) == 4 for group in groups[:-1])
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567-")


def test_case_hyphens_spaces_line_ends_and_look_alikes_do_not_matter() -> None:
    text = encode_code(CODE)
    sloppy = text.lower().replace("-", " ").replace("o", "0").replace("i", "1").replace("b", "8")
    assert decode_code(f"  {sloppy[:30]}\n   {sloppy[30:]}\r\n") == CODE
    assert decode_code(text.replace("-", "–")) == CODE
    assert decode_code(text.replace("-", "")) == CODE


@given(CODES, st.randoms(use_true_random=False))
def test_one_wrong_character_is_a_mistyped_code(code: PairingCode, noise: random.Random) -> None:
    text = encode_code(code)
    place = noise.choice([n for n, letter in enumerate(text) if letter != "-"])
    other = noise.choice([letter for letter in "ACDEFGHJKLMNPQRSTUVWXYZ234567" if letter != text[place]])
    changed = text[:place] + other + text[place + 1 :]
    assert read_back(changed) in (code, "mistyped")


def read_back(text: str) -> PairingCode | str:
    try:
        return decode_code(text)
    except HomeinferError as problem:
        return "mistyped" if "mistyped or cut off" in str(problem) else str(problem)


@pytest.mark.parametrize("end", range(0, 100, 7))
def test_a_code_that_is_cut_off_is_mistyped(end: int) -> None:
    with pytest.raises(HomeinferError, match="mistyped or cut off"):
        decode_code(encode_code(CODE)[:end])


@pytest.mark.parametrize("text", ["", "-", "no code", "ÄÖÜ", "\0", "A" * 100_000, "=" * 8, "٣٤٥٦", "AAAA-AAAA"])
def test_what_is_no_code_is_mistyped(text: str) -> None:
    with pytest.raises(HomeinferError, match="mistyped or cut off"):
        decode_code(text)


@given(st.text())
def test_any_text_is_a_code_or_one_clear_line(text: str) -> None:
    with pytest.raises(HomeinferError, match="mistyped or cut off"):
        decode_code(text)


def with_checksum(content: bytes) -> str:
    return base64.b32encode(content + hashlib.sha256(b"homeinfer code" + content).digest()[:3]).decode()


KEY_AND_SECRET = bytes(40)


@pytest.mark.parametrize(
    "hosts",
    [b"", b"\x04\x01", b"\x06\x01", b"\x00", b"\x05abcde", b"\x09../", b"\x08a\x1b", b"\xff", b"\x04\x01\x02\x03\x04X"],
)
def test_a_code_with_a_checksum_and_nonsense_in_it_is_refused(hosts: bytes) -> None:
    with pytest.raises(HomeinferError, match="mistyped or cut off"):
        decode_code(with_checksum(b"\x11\xba\x5f" + KEY_AND_SECRET + hosts))


@pytest.mark.parametrize("start", [b"\x10\xba\x5f", b"\x11\0\0"], ids=["no hosts", "no port"])
def test_a_code_without_host_or_port_is_refused(start: bytes) -> None:
    with pytest.raises(HomeinferError, match="mistyped or cut off"):
        decode_code(with_checksum(start + KEY_AND_SECRET + b"\x04\x01\x02\x03\x04"))


def test_a_code_of_a_later_version_says_so() -> None:
    with pytest.raises(HomeinferError, match="another version of homeinfer"):
        decode_code(with_checksum(b"\x21\xba\x5f" + KEY_AND_SECRET + b"\x04\x01\x02\x03\x04"))


@pytest.mark.parametrize("host", ["", "a b", "-x", "host:1", "ä", "x" * 64, "a..b", "a." * 101 + "b"])
def test_no_code_is_made_of_what_is_no_host(host: str) -> None:
    with pytest.raises(HomeinferError):
        encode_code(PairingCode((host,), 1, CODE.key, CODE.secret))
