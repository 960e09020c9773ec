"""Weights for other devices: headers and checked tensors of the cluster's model, to those whose keys are allowed."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

import zmq

from homeinfer.cluster.weights.messages import MOST_REQUEST_BYTES, Have, HaveNot, Want, encode, want_of
from homeinfer.cluster.weights.rate import RateLimit
from homeinfer.cluster.weights.store import Store
from homeinfer.cluster.wire.secure import Secure, bound_port, frames_of, sender_key
from homeinfer.errors import HomeinferError

_MOST_WAITING: Final = 64
"""Requests of one device that wait here; more are dropped, as nobody who counts credits sends them."""
_MOST_UNSENT: Final = 32
"""Answers that wait for one device to take them; more are dropped: a device that asks and never reads costs 8 MiB."""


class WeightsServer:
    """Answers requests one by one, each device in its turn."""

    def __init__(
        self, secure: Secure, address: str, is_allowed: Callable[[str], bool], store: Store, limit: RateLimit
    ) -> None:
        """Listens at once at tcp://HOST:PORT (PORT * for a free one). is_allowed: whether a device's key (Z85) may have
        weights, asked at each request. Raises HomeinferError where it can't listen."""
        self._socket = secure.router(address, "weights", is_allowed, MOST_REQUEST_BYTES, most_unsent=_MOST_UNSENT)
        self.port = bound_port(self._socket)
        self.sent_bytes = 0
        self._is_allowed = is_allowed
        self._store = store
        self._limit = limit
        self._waiting: OrderedDict[bytes, deque[Want]] = OrderedDict()
        self._came = asyncio.Event()

    async def serve(self) -> None:
        """Until cancelled; the socket is closed then."""
        answering = asyncio.create_task(self._answer_all())
        try:
            while True:
                self._take(frames_of(await self._socket.recv_multipart(copy=False)))
                if answering.done():
                    answering.result()  # what ended it is to be heard of
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            self._socket.close(linger=0)

    def _take(self, frames: list[zmq.Frame]) -> None:
        """Whatever is no request is dropped without a word."""
        if len(frames) != 2:
            return
        try:
            if not self._is_allowed(sender_key(frames[1])):
                return
            want = want_of(frames[1].bytes)
        except HomeinferError:
            return
        peer = frames[0].bytes
        waiting = self._waiting.setdefault(peer, deque())
        if len(waiting) < _MOST_WAITING:
            waiting.append(want)
            self._came.set()

    async def _answer_all(self) -> None:
        while True:
            while self._waiting:
                peer, wants = self._waiting.popitem(last=False)
                want = wants.popleft()
                if wants:
                    self._waiting[peer] = wants
                await self._answer(peer, want)
            self._came.clear()
            await self._came.wait()

    async def _answer(self, peer: bytes, want: Want) -> None:
        data = await asyncio.to_thread(self._store.read, want.digest, want.file, want.offset, want.nbytes)
        if data is None:
            await self._socket.send_multipart([peer, encode(HaveNot(want.id)), b""])
            return
        await self._limit.take(len(data))
        await self._socket.send_multipart([peer, encode(Have(want.id)), data])
        self.sent_bytes += len(data)
