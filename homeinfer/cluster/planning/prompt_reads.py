"""What of a device's streamed layers a prompt in chunks reads. Pure."""

from __future__ import annotations

from homeinfer.cluster.planning.route import Stream, backs
from homeinfer.cluster.planning.shape import ModelShape


def prompt_stream(shape: ModelShape, stream: Stream, n_chunks: int) -> Stream:
    """The reads of all chunks, one after the other. Only the last one has use for an output matrix; since those before
    did without it, it is not read ahead, but when it is asked for (native/stream_reader.c)."""
    if n_chunks == 1 or stream.layers[-1] != len(shape.layers):
        return stream
    layers, sizes, read = stream.layers[:-1], stream.sizes[:-1], stream.read[:-1]
    fits = sum(sizes) <= stream.buffer
    again = (0.0,) * len(read) if fits else read
    back = (n_chunks * len(read),) * len(read) if fits else backs(sizes, stream.buffer)
    return Stream(
        layers=(*layers * n_chunks, stream.layers[-1]),
        sizes=(*sizes * n_chunks, stream.sizes[-1]),
        read=(*read, *again * (n_chunks - 1), stream.read[-1]),
        back=(*back * n_chunks, 1),
        buffer=stream.buffer,
    )
