from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.quant.texts import chunks_of, default_text, read_texts


def test_texts_are_joined_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("first\n", encoding="utf-8")
    (tmp_path / "two.txt").write_text("zweiter – 第二", encoding="utf-8")
    assert read_texts([tmp_path / "one.txt"]) == "first\n"
    assert read_texts([tmp_path / "one.txt", tmp_path / "two.txt"]) == "first\n\n\nzweiter – 第二"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbftext")
    assert read_texts([tmp_path / "text.txt"]) == "text"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the text is empty"),
        (b" \n\t\n", "the text is empty"),
        (b"gr\xfcn", "byte 2 is not UTF-8"),
        (None, "No such"),
    ],
)
def test_what_is_no_text_is_refused_by_name(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HomeinferError, match=rf"calibration\.txt: .*{said}") as caught:
        read_texts([path])
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(HomeinferError, match="Is a directory"):
        read_texts([tmp_path])


def test_chunks_are_whole_and_the_rest_is_dropped() -> None:
    chunks = chunks_of(np.arange(10, dtype=np.int32), 4)
    assert [chunk.tolist() for chunk in chunks] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(chunk.dtype == np.int32 for chunk in chunks)


def test_a_text_shorter_than_a_chunk_is_one() -> None:
    assert [chunk.tolist() for chunk in chunks_of(np.arange(3, dtype=np.int32), 4)] == [[0, 1, 2]]


def test_what_begins_a_text_begins_every_chunk_and_leaves_the_tokens_alone() -> None:
    tokens = np.arange(8, dtype=np.int32)
    assert [chunk.tolist() for chunk in chunks_of(tokens, 4, begin=99)] == [[99, 1, 2, 3], [99, 5, 6, 7]]
    assert tokens.tolist() == list(range(8))


def test_no_tokens_are_refused() -> None:
    with pytest.raises(HomeinferError, match="no tokens"):
        chunks_of(np.array([], np.int32), 4)


def test_the_default_text_is_english_and_code() -> None:
    text = default_text()
    assert text == default_text()
    assert 100_000 < len(text) < 130_000
    assert "The assert statement" in text or "Assert statements are a convenient way" in text
    assert "class Popen" in text or "import" in text
