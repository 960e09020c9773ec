"""GGUF files of real models' sizes without their data: enough for planning."""

from __future__ import annotations

from pathlib import Path

import gguf
import msgspec
import numpy as np


class LlamaSize(msgspec.Struct, frozen=True):
    """A llama in numbers."""

    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int = 128_256


LLAMA_8B = LlamaSize("Llama 3 8B", 32, 4096, 14_336, 32, 8)
LLAMA_70B = LlamaSize("Llama 3 70B", 80, 8192, 28_672, 64, 8)


def write_header_file(path: Path, size: LlamaSize, kind: str = "Q4_K") -> Path:
    """Metadata and the table of tensors of a llama whose matrices are of one type; the file ends before the data."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(size.name)
    writer.add_block_count(size.n_layer)
    writer.add_context_length(8192)
    writer.add_embedding_length(size.n_embd)
    writer.add_feed_forward_length(size.n_ff)
    writer.add_head_count(size.n_head)
    writer.add_head_count_kv(size.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size.n_vocab)
    kv = size.n_embd // size.n_head * size.n_head_kv
    _matrix(writer, "token_embd.weight", size.n_vocab, size.n_embd, kind)
    for layer in range(size.n_layer):
        name = f"blk.{layer}."
        _vector(writer, f"{name}attn_norm.weight", size.n_embd)
        _vector(writer, f"{name}ffn_norm.weight", size.n_embd)
        for matrix, rows, columns in (
            ("attn_q", size.n_embd, size.n_embd),
            ("attn_k", kv, size.n_embd),
            ("attn_v", kv, size.n_embd),
            ("attn_output", size.n_embd, size.n_embd),
            ("ffn_gate", size.n_ff, size.n_embd),
            ("ffn_up", size.n_ff, size.n_embd),
            ("ffn_down", size.n_embd, size.n_ff),
        ):
            _matrix(writer, f"{name}{matrix}.weight", rows, columns, kind)
    _vector(writer, "output_norm.weight", size.n_embd)
    _matrix(writer, "output.weight", size.n_vocab, size.n_embd, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def _matrix(writer: gguf.GGUFWriter, name: str, rows: int, columns: int, kind: str) -> None:
    raw = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[raw]
    row_bytes = columns // block * block_bytes
    writer.add_tensor_info(name, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_dtype=raw)


def _vector(writer: gguf.GGUFWriter, name: str, length: int) -> None:
    writer.add_tensor_info(name, (length,), np.dtype(np.float32), 4 * length)
