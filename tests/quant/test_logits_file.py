from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from homeinfer.errors import HomeinferError
from homeinfer.quant.kld import Records, pack
from homeinfer.quant.logits_file import (
    LogitsFile,
    LogitsHeader,
    LogitsWriter,
    Tokens,
    is_logits_file,
    made_for,
    matching_chunks,
    scored_positions,
)

CHUNKS, N_CTX, N_VOCAB, BOS = 3, 16, 101, 5


@pytest.fixture
def tokens() -> Tokens:
    return np.random.default_rng(1).integers(0, N_VOCAB, (CHUNKS, N_CTX)).astype(np.int32)


@pytest.fixture
def records(tokens: Tokens) -> Records:
    following = tokens[:, N_CTX // 2 + 1 :].ravel()
    logits = np.random.default_rng(2).standard_normal((len(following), N_VOCAB)).astype(np.float32)
    return pack(logits, following)


@pytest.fixture
def kept(tmp_path: Path, tokens: Tokens, records: Records) -> Path:
    writer = LogitsWriter(tmp_path / "kept.logits", made_for(tokens, N_VOCAB, BOS, "model.gguf"), tokens)
    writer.write(records[:4])
    writer.write(records[4:])
    writer.finish()
    return tmp_path / "kept.logits"


def data_start(kept: Path) -> int:
    """Where the tokens begin."""
    return 12 + int.from_bytes(kept.read_bytes()[8:12], "little")


def refusal(kept: Path) -> str:
    with pytest.raises(HomeinferError) as refused:
        LogitsFile(kept).read(0, 0, 3)
    line = str(refused.value)
    assert line.startswith(f"{kept}: ")
    assert "\n" not in line
    return line


def test_what_was_written_is_read(kept: Path, tokens: Tokens, records: Records) -> None:
    file = LogitsFile(kept)
    assert is_logits_file(kept)
    assert (file.header.n_chunks, file.header.n_ctx, file.header.n_vocab) == (CHUNKS, N_CTX, N_VOCAB)
    assert (file.header.bos, file.header.reference) == (BOS, "model.gguf")
    assert np.array_equal(file.tokens, tokens)
    rows = scored_positions(N_CTX)
    assert file.read(2, 1, 3).tobytes() == records[2 * rows + 1 : 2 * rows + 4].tobytes()
    assert kept.stat().st_size == data_start(kept) + 4 * tokens.size + CHUNKS * rows * (16 + 2 * N_VOCAB)


def test_other_files_are_no_logits(tmp_path: Path) -> None:
    other = tmp_path / "model.gguf"
    other.write_bytes(b"GGUF1234")
    assert "no logits that homeinfer kept" in refusal(other)
    assert not any(is_logits_file(path) for path in (other, tmp_path, tmp_path / "missing"))


@pytest.mark.parametrize("share", [0.999, 0.5, 0.1, 0.02, 0.01])
def test_file_that_is_cut_short_is_refused(kept: Path, share: float) -> None:
    whole = kept.read_bytes()
    kept.write_bytes(whole[: int(len(whole) * share)])
    assert "the file is cut short" in refusal(kept)


def test_damaged_file_is_refused(kept: Path) -> None:
    whole, start = kept.read_bytes(), data_start(kept)
    first_record = start + 4 * CHUNKS * N_CTX
    nan, most = np.float32(np.nan).tobytes(), b"\xff" * 4
    for data, words in (
        (whole + b"\0", "too long"),
        (whole[:8] + most + whole[12:], "its header claims"),
        (whole[:12] + b"[" * (start - 12) + whole[start:], "its header can't be read"),
        (whole[:12] + most + whole[16:], "its header can't be read"),
        (whole[:start] + most + whole[start + 4 :], "its tokens are not those"),
        (whole[:first_record] + nan + whole[first_record + 4 :], "make no sense"),
        (whole[: first_record + 12] + most + whole[first_record + 16 :], "make no sense"),
    ):
        kept.write_bytes(data)
        assert words in refusal(kept)


@pytest.mark.parametrize(
    "hostile",
    [
        {"n_chunks": 1 << 40},
        {"n_chunks": 0},
        {"n_vocab": -5},
        {"n_ctx": (1 << 31) - 1, "n_chunks": (1 << 31) - 1, "n_vocab": (1 << 31) - 1},
        {"n_ctx": 1},
        {"version": 2},
        {"bos": 10_000_000},
    ],
)
def test_hostile_counts_are_refused_without_being_believed(kept: Path, hostile: dict[str, int]) -> None:
    data, start = kept.read_bytes(), data_start(kept)
    header = msgspec.json.decode(data[12:start], type=LogitsHeader)
    said = msgspec.json.encode(msgspec.structs.replace(header, **hostile))
    kept.write_bytes(data[:8] + len(said).to_bytes(4, "little") + said + data[start:])
    assert "keep the logits again" in refusal(kept)


def test_chunks_that_match_are_counted(kept: Path, tokens: Tokens) -> None:
    file = LogitsFile(kept)
    longer = np.concatenate([tokens, tokens])
    assert matching_chunks(file, tokens, N_VOCAB, BOS, None) == CHUNKS
    assert matching_chunks(file, longer, N_VOCAB, BOS, None) == CHUNKS
    assert matching_chunks(file, tokens[:2], N_VOCAB, BOS, 2) == 2


def test_logits_of_something_else_are_refused(kept: Path, tokens: Tokens) -> None:
    file = LogitsFile(kept)
    for arguments, words in (
        ((tokens, N_VOCAB + 1, BOS, None), "another vocabulary"),
        ((tokens, N_VOCAB, -1, None), "another vocabulary"),
        ((tokens.reshape(-1, N_CTX // 2), N_VOCAB, BOS, None), "give --ctx 16"),
        ((tokens, N_VOCAB, BOS, CHUNKS + 1), "it holds 3 chunks, 4 are wanted"),
        ((tokens[:2], N_VOCAB, BOS, None), "kept for another text"),
        ((tokens[::-1], N_VOCAB, BOS, 1), "kept for another text"),
    ):
        with pytest.raises(HomeinferError, match=words):
            matching_chunks(file, *arguments)


def test_logits_too_large_for_the_disk_are_not_begun(tmp_path: Path, tokens: Tokens) -> None:
    huge = msgspec.structs.replace(made_for(tokens, N_VOCAB, BOS, "model.gguf"), n_chunks=1 << 50)
    with pytest.raises(HomeinferError, match="are free on the disk"):
        LogitsWriter(tmp_path / "kept.logits", huge, tokens)
    assert list(tmp_path.iterdir()) == []


def test_file_without_all_its_records_is_not_finished(tmp_path: Path, tokens: Tokens, records: Records) -> None:
    writer = LogitsWriter(tmp_path / "kept.logits", made_for(tokens, N_VOCAB, BOS, "model.gguf"), tokens)
    writer.write(records[1:])
    with pytest.raises(HomeinferError, match="1 positions of the logits were not computed"):
        writer.finish()
