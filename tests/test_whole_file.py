from __future__ import annotations

from pathlib import Path

import pytest

from homeinfer.whole_file import whole_file


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with whole_file(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_file_that_is_not_finished_leaves_what_was_there(tmp_path: Path, stop: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail() -> None:
        with whole_file(path) as file:
            file.write(b"aft")
            raise stop

    with pytest.raises(stop):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
