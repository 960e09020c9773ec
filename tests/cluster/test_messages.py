"""The ring's messages: what goes in comes out, and what is none is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from homeinfer.cluster.ring import RingPipeline, RingShape
from homeinfer.cluster.ring_steps import first_step, logits_of
from homeinfer.cluster.wire.messages import (
    Ask,
    Cancel,
    Edits,
    Failure,
    Finished,
    Message,
    Spent,
    Step,
    Told,
    decode,
    encode,
    is_split,
)
from homeinfer.cluster.wire.transport import Links, Peer, send
from homeinfer.engine.edits import Copy, Keep, Remove, Shift
from homeinfer.engine.pipeline import Batch, Floats
from homeinfer.engine.request import Finish, Request, Sampling
from homeinfer.errors import HomeinferError

counts = st.integers(0, 1 << 20)
numbers = st.integers(-(1 << 31), (1 << 31) - 1)
epochs = st.integers(0, (1 << 47) - 1)
edits = st.one_of(
    st.builds(Remove, numbers, numbers, numbers),
    st.builds(Keep, numbers),
    st.builds(Copy, numbers, numbers, numbers, numbers),
    st.builds(Shift, numbers, numbers, numbers, numbers),
)
times = st.floats(0, 1e12)
spents = st.lists(st.builds(Spent, times, times), max_size=3).map(tuple)
requests = st.builds(
    Request,
    sampling=st.builds(Sampling, seed=counts, grammar=st.none() | st.text(max_size=20)),
    limit=counts,
    keep=counts,
    fresh=st.booleans(),
)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Step,
        epoch=epochs,
        step=counts,
        hop=counts,
        n=counts,
        width=counts,
        index=st.binary(max_size=99),
        spent=spents,
    ),
    st.builds(Edits, epochs, counts, counts, st.lists(edits, max_size=4).map(tuple)),
    st.builds(Failure, epochs, counts, counts, st.text(), st.text()),
    st.builds(Ask, epochs, counts, counts, counts, requests, st.booleans()),
    st.builds(Cancel, epochs, counts, counts),
    st.builds(Told, epochs, counts, counts, counts, spents, times),
    st.builds(Finished, epochs, counts, counts, st.builds(Finish, st.just("stop"), counts, counts)),
)


def framed(header: bytes) -> bytes:
    return struct.pack("<I", len(header)) + header


@given(messages, st.binary(max_size=99))
def test_a_message_comes_back_as_it_was(message: Message, rows: bytes) -> None:
    frames = encode(message, rows)
    got, got_rows = decode(frames)
    assert len(frames) == 1
    assert not is_split(frames[0])
    assert got == message
    assert bytes(got_rows) == rows


@pytest.mark.parametrize("n", [0, 1, 16384, 16385, 300_000])
def test_rows_come_back_as_they_were_and_aligned(n: int) -> None:
    rows = np.arange(n, dtype=np.float32)
    frames = encode(Cancel(1, 2, 3), rows)
    assert is_split(bytes(frames[0])) == (len(frames) == 2) == (rows.nbytes > 65536)
    message, got = decode([bytes(frame) for frame in frames])
    assert message == Cancel(1, 2, 3)
    assert np.array_equal(np.frombuffer(got, np.float32), rows)
    if len(frames) == 1:
        assert (len(frames[0]) - rows.nbytes) % 16 == 0


def readable_or_refused(frames: list[bytes]) -> None:
    with suppress(HomeinferError):
        message, _ = decode(frames)
        assert isinstance(message, Message)


@given(messages, st.binary(max_size=40), st.data())
def test_a_cut_message_is_refused(message: Message, rows: bytes, data: st.DataObject) -> None:
    (frame,) = encode(message, rows)
    (length,) = struct.unpack_from("<I", frame)
    cut = data.draw(st.integers(0, 3 + length))
    with pytest.raises(HomeinferError, match="a message of the ring can't be read"):
        decode([frame[:cut]])


@given(messages, st.data())
def test_a_changed_message_is_read_or_refused(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    readable_or_refused([bytes(frame)])


@given(st.lists(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(framed)), max_size=3))
@example([])
@example([b""])
@example([framed(b"\x96\xa7failure\x01\x01\x01\xa2\xff\xfe\xa1x")])
@example([framed(b"\x95\xa6cancel\x01\x01\x01" + b"\x91" * 5000)])
def test_random_frames_are_read_or_refused(frames: list[bytes]) -> None:
    readable_or_refused(frames)


@pytest.mark.parametrize(
    "header",
    [
        ["cancel", 1, 2, -1],
        ["cancel", 1, 2, (1 << 20) + 1],
        ["cancel", 1, 2],
        ["step", 1, 2, 3, 1 << 40, 0, b""],
        ["step", 1, 2, 3, 1, 0, "text"],
        ["edits", 1, 2, 3, [{"type": "explode"}]],
        ["launch", 1, 2, 3],
        ["ask", 1, 2, 0, 3, {"sampling": {}, "limit": -1}, True],
        ["ask", 1, 2, 0, 3, {"sampling": {"temperature": -1}, "limit": 1}, True],
        ["told", 1, 2, 0, -1, [], 0.0],
        {"type": "cancel"},
    ],
    ids=str,
)
def test_a_header_that_is_none_is_refused(header: object) -> None:
    with pytest.raises(HomeinferError, match="a message of the ring can't be read"):
        decode([framed(msgspec.msgpack.encode(header))])


def test_the_first_step_carries_the_batch() -> None:
    batch = Batch.of([7, 8, 9], 40, 2)
    message, rows = decode(encode(*first_step(1, 5, batch)))
    assert isinstance(message, Step)
    assert (message.epoch, message.step, message.hop, message.n, message.width) == (1, 5, 0, 3, 0)
    assert np.frombuffer(rows, np.int32).tolist() == [7, 8, 9]
    assert np.frombuffer(message.index, np.int32, 6).tolist() == [40, 41, 42, 2, 2, 2]
    assert list(message.index[24:]) == [0, 0, 1]


@pytest.mark.parametrize(("width", "nbytes"), [(3, 12), (4, 12), (4, 20), (4, 0)])
def test_logits_of_another_size_are_refused(width: int, nbytes: int) -> None:
    with pytest.raises(HomeinferError, match="something other than the logits"):
        logits_of(Step(1, 1, 1, 1, width, b""), memoryview(bytes(nbytes)), 1, 4)


class DeviceEnd:
    """The device of a ring of one, played by the test, and the head's end."""

    def __init__(self, folder: Path) -> None:
        self.links = Links(f"ipc://{folder}/device", patience_ms=10_000)
        head = Links(f"ipc://{folder}/head", patience_ms=100)
        self._to_head = self.links.sender(Peer(head.address))
        shape = RingShape(
            9,
            Peer(self.links.address),
            Peer(self.links.address),
            n_vocab=4,
            n_ctx=8,
            n_batch=8,
            can_shift=True,
            devices=(),
        )
        self.ring = RingPipeline(shape, head, lambda: None, lambda: None)

    def say(self, epoch: int, step: int, value: float) -> None:
        send(self._to_head, encode(Step(epoch, step, 1, 1, 4, b""), np.full(4, value, np.float32)))

    def forward(self, answer: Callable[[int], None]) -> Floats:
        """One step of the ring, to whose number `answer` answers."""
        thread = Thread(target=lambda: answer(decode(self.links.receive() or [])[0].step))
        thread.start()
        try:
            return self.ring.forward(Batch.of([1], 0))
        finally:
            thread.join()

    def noise(self) -> None:
        send(self._to_head, [b"noise"])

    def close(self) -> None:
        self.ring.close()
        self.links.close()


def test_what_belongs_to_another_ring_or_step_is_dropped(temp_folder: Path) -> None:
    with closing(DeviceEnd(temp_folder)) as device:

        def answer(step: int) -> None:
            device.say(8, step, 1.0)
            device.say(9, step - 1, 2.0)
            device.say(9, step, 3.0)

        for _ in range(3):
            assert device.forward(answer).tolist() == [[3.0] * 4]


def test_an_answer_that_cannot_be_read_is_an_error_and_no_hang(temp_folder: Path) -> None:
    with (
        closing(DeviceEnd(temp_folder)) as device,
        pytest.raises(HomeinferError, match="a message of the ring can't be read"),
    ):
        device.forward(lambda _step: device.noise())
