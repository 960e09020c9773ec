"""Who is registered at a head, and the heads that a device knows."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from homeinfer.cluster.known_heads import KnownHead, forget_head, known_heads, remember_head
from homeinfer.cluster.members import Member, Members
from homeinfer.cluster.wire.transport import new_keys
from homeinfer.errors import HomeinferError


@pytest.fixture
def keys() -> list[str]:
    return [new_keys()[0] for _ in range(4)]


def test_members_are_kept_in_a_private_file(tmp_path: Path, keys: list[str]) -> None:
    members = Members(tmp_path)
    assert members.all() == ()
    assert members.add("laptop", keys[0]) == Member("laptop", keys[0])
    assert Members(tmp_path).all() == (Member("laptop", keys[0]),)
    assert stat.S_IMODE((tmp_path / "members.json").stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["members.json"]


def test_a_member_is_found_by_its_key_only(tmp_path: Path, keys: list[str]) -> None:
    members = Members(tmp_path)
    member = members.add("laptop", keys[0])
    assert members.get(keys[0]) == member
    assert members.get(keys[1]) is None
    assert members.get("") is None


def test_two_of_one_name_are_told_apart_and_one_key_is_one_device(tmp_path: Path, keys: list[str]) -> None:
    members = Members(tmp_path)
    assert [members.add("desk", key).name for key in keys] == ["desk", "desk-2", "desk-3", "desk-4"]
    assert members.add("other", keys[1]).name == "desk-2"
    members.forget("desk-2")
    assert members.add("desk", keys[1]).name == "desk-2"


@pytest.mark.parametrize(
    ("wished", "name"),
    [
        ("Anna's laptop", "Anna-s-laptop"),
        ("\x1b[31mred", "31mred"),
        ("../../etc", "etc"),
        ("  ", "device"),
        ("日本", "device"),
        ("x" * 64, "x" * 56),
        ("desk.local", "desk.local"),
    ],
)
def test_names_are_made_fit_for_a_terminal(wished: str, name: str, tmp_path: Path, keys: list[str]) -> None:
    assert Members(tmp_path).add(wished, keys[0]).name == name


def test_who_is_forgotten_is_gone_for_every_reader(tmp_path: Path, keys: list[str]) -> None:
    members, reader = Members(tmp_path), Members(tmp_path)
    members.add("desk", keys[0])
    assert reader.get(keys[0]) is not None
    assert members.forget("desk") == Member("desk", keys[0])
    assert reader.get(keys[0]) is None
    with pytest.raises(HomeinferError, match=r"^no device named desk is paired; paired are: none"):
        members.forget("desk")


def test_a_damaged_list_is_one_clear_line_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "members.json").write_text('{"members": [{"name": "", "key": "x"}]}')
    with pytest.raises(HomeinferError, match=r"members\.json is damaged"):
        Members(tmp_path)
    assert "members" in (tmp_path / "members.json").read_text()


def test_a_list_that_is_damaged_later_does_not_end_a_running_head(tmp_path: Path, keys: list[str]) -> None:
    members = Members(tmp_path)
    desk = members.add("desk", keys[0])
    (tmp_path / "members.json").write_text("{")
    assert members.get(keys[0]) == desk
    assert members.all() == (desk,)
    members.add("attic", keys[1])
    assert [member.name for member in Members(tmp_path).all()] == ["desk", "attic"]


def test_the_head_used_last_comes_first(tmp_path: Path, keys: list[str]) -> None:
    desk = KnownHead(keys[0], ("10.0.0.2", "fd00::2"), 47710, "desk")
    attic = KnownHead(keys[1], ("10.0.0.3",), 47710, "attic")
    assert known_heads(tmp_path) == ()
    remember_head(tmp_path, desk)
    remember_head(tmp_path, attic)
    assert known_heads(tmp_path) == (attic, desk)
    moved = KnownHead(keys[0], ("10.0.0.9",), 47720, "desk")
    remember_head(tmp_path, moved)
    assert known_heads(tmp_path) == (moved, attic)
    forget_head(tmp_path, keys[0])
    forget_head(tmp_path, keys[3])
    assert known_heads(tmp_path) == (attic,)
    assert stat.S_IMODE((tmp_path / "heads.json").stat().st_mode) == 0o600


def test_a_damaged_list_of_heads_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text('{"heads": [1]}')
    with pytest.raises(HomeinferError, match=r"heads\.json is damaged"):
        known_heads(tmp_path)
