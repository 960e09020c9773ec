"""A device's keys: made once, private, whole."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster.wire.keys import DeviceKeys, own_keys
from homeinfer.cluster.wire.transport import new_keys
from homeinfer.errors import HomeinferError


def test_keys_are_made_once_in_a_private_file(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    keys = own_keys(folder)
    assert own_keys(folder) == keys
    assert stat.S_IMODE((folder / "keys.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [file.name for file in folder.iterdir()] == ["keys.json"]
    assert own_keys(tmp_path / "other") != keys


def test_the_secret_is_not_shown(tmp_path: Path) -> None:
    keys = own_keys(tmp_path)
    assert keys.secret not in f"{keys} {keys!r}"


def test_a_loose_mode_is_tightened(tmp_path: Path) -> None:
    keys = own_keys(tmp_path)
    (tmp_path / "keys.json").chmod(0o644)
    assert own_keys(tmp_path) == keys
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600


def test_many_at_once_get_the_same_keys(tmp_path: Path) -> None:
    got: list[DeviceKeys] = []
    threads = [threading.Thread(target=lambda: got.append(own_keys(tmp_path))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 16
    assert len(set(got)) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is damaged"),
        (b"{}", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b" " * (2 << 20), "is far too large"),
        (b'{"public": "short", "secret": "short"}', "is damaged"),
        (msgspec.json.encode(DeviceKeys(new_keys()[0], new_keys()[1])), "holds no pair of keys"),
        (msgspec.json.encode(DeviceKeys("\u00e9" * 40, "\u00e9" * 40)), "holds no pair of keys"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_bytes(content)
    with pytest.raises(HomeinferError, match=problem):
        own_keys(tmp_path)
    assert (tmp_path / "keys.json").read_bytes() == content


def test_a_folder_that_cant_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HomeinferError, match="set HOMEINFER_STATE"):
        own_keys(tmp_path / "file" / "state")


def test_where_the_file_is_a_folder_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "keys.json").mkdir()
    with pytest.raises(HomeinferError, match=rf"keys\.json: .* can't be read: {os.strerror(21)}"):
        own_keys(tmp_path)
