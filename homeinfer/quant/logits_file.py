"""A reference's log-probabilities on a text, kept in a file so that many models can be compared with it.

The file: the 8 bytes "HIlogits"; the length of the header in bytes, uint32; the header, one JSON object
(LogitsHeader); the tokens, int32 [n_chunks, n_ctx], as the text gave them; then for each chunk the records
(kld.record_type) of positions n_ctx/2 to n_ctx-2, one after the other. All numbers are little-endian, nothing
is padded, and nothing follows the last record. A position takes 16 + 2 * n_vocab bytes: 25 MB per chunk of
512 for a vocabulary of 49,152.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from homeinfer.errors import HomeinferError
from homeinfer.model.records import printable
from homeinfer.quant.kld import Records, record_type

MAGIC = b"HIlogits"
VERSION = 1
_MOST_HEADER_BYTES = 1 << 16
_MOST = 1 << 31
_AGAIN = "keep the logits again"
Tokens = npt.NDArray[np.int32]


class LogitsHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the logits belong to. bos is the token that every chunk began with instead of its own, or -1;
    tokens_sha256 is the hexadecimal digest of the tokens as the file holds them; reference is the model's name."""

    version: int
    n_vocab: int
    n_ctx: int
    n_chunks: int
    bos: int
    tokens_sha256: str
    reference: str

    @property
    def rows(self) -> int:
        """Positions of a chunk that are scored."""
        return scored_positions(self.n_ctx)

    @property
    def record_bytes(self) -> int:
        return 16 + 2 * self.n_vocab


def scored_positions(n_ctx: int) -> int:
    """Positions n_ctx/2 to n_ctx-2 of a chunk: the second half, as far as a token follows."""
    return n_ctx - 1 - n_ctx // 2


def made_for(tokens: Tokens, n_vocab: int, bos: int, reference: str) -> LogitsHeader:
    """The header of logits on these tokens, int32 [n_chunks, n_ctx]."""
    n_chunks, n_ctx = tokens.shape
    return LogitsHeader(VERSION, n_vocab, n_ctx, n_chunks, bos, _digest(tokens), reference)


def is_logits_file(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins like kept logits; what can't be read doesn't."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class LogitsWriter:
    """Writes records in order into a file that the caller names, and removes when something fails."""

    def __init__(self, path: str | os.PathLike[str], header: LogitsHeader, tokens: Tokens) -> None:
        """Raises HomeinferError when the disk has too little room, or the file can't be made."""
        encoded = msgspec.json.encode(header)
        self._missing = header.n_chunks * header.rows
        needed = len(MAGIC) + 4 + len(encoded) + tokens.nbytes + self._missing * header.record_bytes
        free = shutil.disk_usage(Path(path).parent).free
        if free < needed:
            raise HomeinferError(
                f"the logits take {_size(needed)}, and {_size(free)} are free on the disk: "
                "free some space, or keep fewer chunks (--chunks)"
            )
        try:
            self._file = Path(path).open("wb")  # noqa: SIM115 (closed by finish)
        except OSError as error:
            raise _not_written(error) from None
        self._write(MAGIC + len(encoded).to_bytes(4, "little") + encoded)
        self._write(tokens.astype("<i4").tobytes())

    def write(self, records: Records) -> None:
        """Append records; raises HomeinferError when they can't be written."""
        self._missing -= len(records)
        self._write(records.tobytes())

    def finish(self) -> None:
        """Put all on the disk and close; raises HomeinferError when it can't be."""
        if self._missing:
            raise HomeinferError(f"{self._missing} positions of the logits were not computed; report this as a bug")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise _not_written(error) from None

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise _not_written(error) from None


class LogitsFile:
    """Kept logits, checked: everything but the records' values is known to be right after opening."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises HomeinferError, in one line, for a file that is cut short, damaged, or none of this kind."""
        self.name = printable(os.fspath(path), 1000)
        try:
            self._file = Path(path).open("rb")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise HomeinferError(f"{self.name}: it cannot be read: {error.strerror}; check the path") from None
        try:
            self.header = self._read_header()
            self._check_size()
            self.tokens = self._read_tokens()
        except BaseException:
            self.close()
            raise
        self._type = record_type(self.header.n_vocab)

    def read(self, chunk: int, first: int, count: int) -> Records:
        """Records of `count` scored positions of a chunk, from number `first` of them on."""
        header = self.header
        self._file.seek(self._start + (chunk * header.rows + first) * header.record_bytes)
        records: Records = np.frombuffer(self._take(count * header.record_bytes), self._type)
        sane = np.isfinite(records["scale"]) & (records["scale"] >= 0) & np.isfinite(records["least"])
        sane &= np.isfinite(records["nll"]) & (records["top"] < header.n_vocab)
        if not sane.all():
            raise self._damaged(f"the logits of chunk {chunk + 1} make no sense")
        return records

    def close(self) -> None:
        self._file.close()

    def _read_header(self) -> LogitsHeader:
        if self._take(len(MAGIC)) != MAGIC:
            raise HomeinferError(f"{self.name}: these are no logits that homeinfer kept; choose another file")
        length = int.from_bytes(self._take(4), "little")
        if length > _MOST_HEADER_BYTES:
            raise self._damaged(f"its header claims {length:,} bytes")
        encoded = self._take(length)
        try:
            header = msgspec.json.decode(encoded, type=LogitsHeader)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            raise self._damaged("its header can't be read (or a newer homeinfer wrote it)") from None
        if header.version != VERSION:
            raise HomeinferError(f"{self.name}: version {header.version} is not known here, {VERSION} is; {_AGAIN}")
        smallest = (("n_vocab", header.n_vocab, 1), ("n_ctx", header.n_ctx, 4), ("n_chunks", header.n_chunks, 1))
        for what, count, least in smallest:
            if not least <= count < _MOST:
                raise self._damaged(f"its {what} is {count}")
        return header

    def _check_size(self) -> None:
        header = self.header
        self._start = self._file.tell() + 4 * header.n_chunks * header.n_ctx
        expected = self._start + header.n_chunks * header.rows * header.record_bytes
        size = os.fstat(self._file.fileno()).st_size
        if size != expected:
            what = "is cut short" if size < expected else "is too long"
            raise HomeinferError(f"{self.name}: the file {what}, it has {size:,} of {expected:,} bytes; {_AGAIN}")

    def _read_tokens(self) -> Tokens:
        header = self.header
        data = self._take(4 * header.n_chunks * header.n_ctx)
        tokens = np.frombuffer(data, "<i4").astype(np.int32).reshape(header.n_chunks, header.n_ctx)
        if _digest(tokens) != header.tokens_sha256:
            raise self._damaged("its tokens are not those that were written")
        if tokens.min() < 0 or max(int(tokens.max()), header.bos) >= header.n_vocab:
            raise self._damaged("some of its tokens are outside the vocabulary")
        return tokens

    def _take(self, count: int) -> bytes:
        try:
            data = self._file.read(count)
        except OSError as error:
            raise HomeinferError(f"{self.name}: it cannot be read: {error.strerror}; check the disk") from None
        if len(data) < count:
            raise HomeinferError(f"{self.name}: the file is cut short; {_AGAIN}")
        return data

    def _damaged(self, how: str) -> HomeinferError:
        return HomeinferError(f"{self.name}: the file is damaged: {how}; {_AGAIN}")


def matching_chunks(kept: LogitsFile, tokens: Tokens, n_vocab: int, bos: int, chunks: int | None) -> int:
    """How many chunks a model can be compared on, whose vocabulary gives the text these tokens, [n, n_ctx].

    Without `chunks`, as many as are kept. Raises HomeinferError when the logits belong to something else.
    """
    header, name = kept.header, kept.name
    if (header.n_vocab, header.bos) != (n_vocab, bos):
        raise HomeinferError(
            f"{name}: these logits are of a model with another vocabulary ({header.n_vocab:,} tokens, here "
            f"{n_vocab:,}); only models that share one can be compared"
        )
    if header.n_ctx != tokens.shape[1]:
        raise HomeinferError(f"{name}: these logits have chunks of {header.n_ctx} tokens; give --ctx {header.n_ctx}")
    wanted = header.n_chunks if chunks is None else chunks
    if wanted > header.n_chunks:
        raise HomeinferError(
            f"{name}: it holds {header.n_chunks} chunks, {wanted} are wanted; give --chunks {header.n_chunks}, "
            "or keep more"
        )
    if len(tokens) < wanted or not np.array_equal(tokens[:wanted], kept.tokens[:wanted]):
        raise HomeinferError(
            f"{name}: these logits were kept for another text, or by another vocabulary; give that text, or keep them "
            "again"
        )
    return wanted


def _digest(tokens: Tokens) -> str:
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()


def _not_written(error: OSError) -> HomeinferError:
    return HomeinferError(f"the logits can't be written: {error.strerror}; free some space, or choose another folder")


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"
