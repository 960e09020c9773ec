"""What of a window's file is streamed, what is kept, and what stays mapped."""

from __future__ import annotations

from homeinfer.engine.streaming import Span, StreamGroup, least_buffer, stream_groups
from homeinfer.model.header import Header, HeaderFile, MetaValue, TensorInfo, ValueType


def test_experts_are_not_streamed_and_small_tensors_are_kept() -> None:
    tensors = [
        TensorInfo("token_embd.weight", (256, 1024), "F32", 4096, 1 << 20, 0),
        TensorInfo("blk.0.ffn_up_exps.weight", (256, 1024), "F32", 4096 + (1 << 20), 1 << 20, 0),
        TensorInfo("blk.0.ffn_gate_inp.weight", (256, 128), "F32", 4096 + (2 << 20), 128 << 10, 0),
        TensorInfo("blk.0.attn_norm.weight", (256,), "F32", 4096 + (2 << 20) + (128 << 10), 1024, 0),
        TensorInfo("blk.0.attn_q.weight", (256, 1024), "F32", 8192 + (2 << 20) + (128 << 10), 1 << 20, 0),
    ]
    header = header_of(tensors, 8192 + (3 << 20) + (128 << 10))
    kept, q, gate = stream_groups(header, False, False)
    assert kept == StreamGroup((Span(4096 + (2 << 20) + (128 << 10), 8192 + (2 << 20) + (128 << 10)),), kept=True)
    assert (q.nbytes, gate.nbytes) == (1 << 20, 128 << 10)
    assert least_buffer([(kept, q, gate)]) == 4096 + (1 << 20) + (128 << 10)
    tied = stream_groups(header, False, True)[-1]
    assert tied.spans == (Span(4096, 4096 + (1 << 20)),)
    assert stream_groups(header, True, True) == (kept, q, gate)


def header_of(tensors: list[TensorInfo], size: int) -> Header:
    metadata = {
        "general.architecture": MetaValue(ValueType.STRING, "llama"),
        "llama.block_count": MetaValue(ValueType.UINT32, 1),
    }
    return Header(3, (HeaderFile("window.gguf", size, 4096, 4096, size - 4096),), metadata, tuple(tensors))
