"""Headers of the cluster's model from another device."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from typing import Final

from homeinfer.cluster.weights.fetch_source import Patience, SourceLink
from homeinfer.cluster.weights.messages import PIECE_BYTES
from homeinfer.cluster.weights.rate import RateLimit
from homeinfer.cluster.weights.schedule import Piece
from homeinfer.cluster.weights.store import Store
from homeinfer.cluster.wire.control import Source
from homeinfer.cluster.wire.secure import Secure
from homeinfer.errors import HomeinferError

_SILENT: Final = "did not answer"


async def fetch_headers(
    secure: Secure, store: Store, sources: Sequence[Source], limit: RateLimit, patience: Patience | None = None
) -> None:
    """Get the headers that store.missing_headers names, from the first source that has the right ones. Raises
    HomeinferError when none has."""
    patience = patience or Patience()
    give_up_at = time.monotonic() + patience.give_up
    problems: dict[str, str] = {}
    while store.missing_headers and time.monotonic() < give_up_at:
        problems = {}
        for source in sources:
            problem = await _try_headers(secure, source, store, limit, patience)
            if problem is None:
                return
            problems[source.name] = problem
        if all(problem is not _SILENT for problem in problems.values()):
            break
        await asyncio.sleep(patience.retry)
    if store.missing_headers:
        why = "; ".join(f"{name} {problem}" for name, problem in problems.items()) or "no device serves it"
        raise HomeinferError(f"the model's header can't be got: {why}; see that the head is on, then start again")


async def _try_headers(
    secure: Secure, source: Source, store: Store, limit: RateLimit, patience: Patience
) -> str | None:
    """None when all came, else why not."""
    try:
        link = SourceLink(secure, source)
    except HomeinferError as problem:
        return f"can't be reached: {problem}"
    try:
        return await _headers_from(link, store, limit, patience)
    finally:
        link.close()


async def _headers_from(link: SourceLink, store: Store, limit: RateLimit, patience: Patience) -> str | None:
    manifest = store.known()
    for file in store.missing_headers:
        data = bytearray()
        nbytes = manifest.files[file].header_bytes
        while len(data) < nbytes:
            piece = Piece(file, len(data), min(PIECE_BYTES, nbytes - len(data)))
            await limit.take(piece.nbytes)
            await link.ask(manifest.digest, file, piece.offset, piece.nbytes, piece)
            try:
                answer = await link.answer(patience.silence)
            except HomeinferError as problem:
                return f"sent nonsense: {problem}"
            if answer is None:
                return _SILENT
            if answer[1] is None:
                return "has not this model"
            data += answer[1]
        if hashlib.sha256(data).hexdigest() != manifest.files[file].digest:
            return "sent another header than the model's"
        await asyncio.to_thread(store.write_header, file, bytes(data))
    await asyncio.to_thread(store.header)
    return None
